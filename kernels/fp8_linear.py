"""Linear layers in 8-bit floats for inference: a scale for each token and for each output channel.

    y[t, o] = s[t] w[o] sum_c x8[t, c] w8[o, c] + b[o],  s[t] = max_c |x[t, c]| / 448,  w[o] likewise

The product is torch's own scaled matmul (tensor cores from sm_89 on), on a CPU the formula, since there
torch 2.10 knows one scale a tensor. What else stands here is the rounding, which torch.compile fuses into the
layer before. e4m3 keeps 3 bits of mantissa: for random numbers a layer's output is off by 4 % of its norm.

In: x float (..., C), C and O multiples of 16. Out: (..., O) in bf16. No gradient.

    model.blocks[0].mlp.fc1 = Fp8Linear(model.blocks[0].mlp.fc1)
"""
# SPDX-License-Identifier: MIT
import torch
from torch import Tensor, nn

LARGEST = 448.0  # of float8_e4m3fn


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x (n, C) -> float8 (n, C) and the scale fp32 (n, 1) that gives them back; zeros stay zeros."""
    x = x.float()
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST  # (n, 1)
    return (x / scale).to(torch.float8_e4m3fn), scale


def fp8_linear_ref(rows, size, weight, scale, bias):
    """The formula: float8 rows (n, C), weight (O, C), their scales (n, 1), (O, 1), bias (O,) -> (n, O)."""
    return ((rows.float() @ weight.float().T) * size * scale.T + bias.float()).to(torch.bfloat16)


def fp8_linear(rows, size, weight, scale, bias):
    """The same by torch's scaled matmul."""
    return torch._scaled_mm(rows, weight.T, size, scale.T, bias, out_dtype=torch.bfloat16,
                            use_fast_accum=rows.is_cuda)


class Fp8Linear(nn.Module):
    """A trained nn.Linear with its weight in float8. Raises ValueError for sides the matmul cannot take."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        if linear.in_features % 16 or linear.out_features % 16:
            raise ValueError(f"kernels/fp8_linear.py!weight: {tuple(linear.weight.shape)}, not multiples of "
                             "16; leave this layer as it is")
        weight, scale = quantise(linear.weight.detach())
        bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        self.register_buffer("weight", weight)  # (O, C)
        self.register_buffer("scale", scale)  # (O, 1)
        self.register_buffer("bias", bias.to(torch.bfloat16))  # (O,)

    def forward(self, x: Tensor) -> Tensor:
        rows, size = quantise(x.flatten(0, -2))  # (n, C), (n, 1)
        product = fp8_linear if x.is_cuda else fp8_linear_ref
        return product(rows, size, self.weight, self.scale, self.bias).unflatten(0, x.shape[:-1])
