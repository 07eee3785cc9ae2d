"""Layers as a CPU is quickest with them, for inference: a weight is laid out once, not at each call.

    y[t, o] = sum_c x[t, c] w[o, c] + b[o]

A linear layer becomes oneDNN's product. It adds up in another order, so the last bits of fp32 differ. The two
ops are those torch.compile takes for a frozen model; on one core of x86 they need a fifth to a quarter less
time than F.linear, which asks MKL. A transposed convolution takes its channels last, with the same bits.

In: x float (..., C) on a CPU. Out: fp32 (..., O). No gradient.

    model.mask_head[0] = packed(model.mask_head[0])
"""
# SPDX-License-Identifier: MIT
import platform

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A trained fp32 nn.Linear, its weight in a layout of this CPU's. RuntimeError where it needs another."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach()

    @torch.compiler.disable  # which lays out weights itself, and takes no others
    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            self._refuse()
        return torch.ops.mkldnn._linear_pointwise(x.float(), self.weight, self.bias, "none", [], "")

    def _refuse(self, *_, **__):
        raise RuntimeError("kernels/packed_linear.py!weight: for inference on this CPU only; load the model "
                           "again to move, copy, save or train it")

    _apply = _save_to_state_dict = __deepcopy__ = _refuse  # what .to(), .state_dict() and copies call


def packed(layer: nn.Module) -> nn.Module:
    """What to put in place of a trained layer on a CPU: a PackedLinear for an fp32 nn.Linear where oneDNN is
    there and the faster one (x86), else the layer itself; a transposed convolution gets its layout."""
    if isinstance(layer, nn.ConvTranspose2d):
        return layer.to(memory_format=torch.channels_last)
    fp32 = isinstance(layer, nn.Linear) and layer.weight.type() == "torch.FloatTensor"  # and on a CPU
    onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return PackedLinear(layer) if fp32 and onednn and platform.machine() in ("x86_64", "AMD64") else layer
