"""Layers as a CPU is quickest with them, for inference: a weight is laid out once, not at each call.

    y[t, o] = sum_c x[t, c] w[o, c] + b[o]

A linear layer becomes oneDNN's product. It adds up in another order, so the last bits of fp32 differ. The two
ops are those torch.compile takes for a frozen model; on one core of x86 they need a fifth to a quarter less
time than F.linear, which asks MKL. A transposed convolution takes its channels last, with the same bits.

In: x fp32 (..., C) on a CPU. Out: fp32 (..., O). No gradient.

    model.mask_head[0] = packed(model.mask_head[0])
"""
# SPDX-License-Identifier: MIT
import platform

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A trained fp32 nn.Linear. Its weight is in a layout that cannot be moved, copied or saved."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def packed(layer: nn.Module) -> nn.Module:
    """What to put in place of a layer; itself where that is no gain: not fp32, no oneDNN, not on x86."""
    if isinstance(layer, nn.ConvTranspose2d):
        return layer.to(memory_format=torch.channels_last)
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    there = there and platform.machine().lower() in ("x86_64", "amd64")
    good = isinstance(layer, nn.Linear) and layer.weight.device.type == "cpu"
    return PackedLinear(layer) if there and good and layer.weight.dtype == torch.float32 else layer
