"""fp8 linears: torch's scaled matmul against the formula, and the error they are allowed to make."""

# SPDX-License-Identifier: MIT
import pytest
import torch

from kernels.fp8_linear import Fp8Linear, fp8_linear, fp8_linear_ref, quantise


def layer(width, out, bias=True, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(width, out, bias)


@pytest.mark.parametrize("shape,width,out", [((1,), 16, 16), ((2, 37), 64, 96), ((3, 5, 7), 96, 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_fp8_linear_equals_formula(shape, width, out, bias):
    """Against the rounded tokens and weights in float64, by torch's scaled matmul too where it can."""
    linear = layer(width, out, bias)
    x = torch.randn(*shape, width) * torch.logspace(-3, 3, shape[-1])[:, None]  # each token has its scale
    fast = Fp8Linear(linear)
    rows, size = quantise(x.flatten(0, -2))
    want = (rows.double() * size) @ (fast.weight.double() * fast.scale).T + fast.bias.double()
    got = fast(x)
    assert got.dtype == torch.bfloat16 and got.shape == (*shape, out)
    near = dict(rtol=8e-3, atol=1e-5 * want.abs().max().item())  # bf16 has 8 bits
    true = linear.bias if bias else torch.zeros(out)
    torch.testing.assert_close(fast.bias.float(), true, rtol=4e-3, atol=0)
    torch.testing.assert_close(got.flatten(0, -2).double(), want, **near)
    if torch.__version__ >= "2.13":
        got = fp8_linear(rows, size, fast.weight, fast.scale, fast.bias)
        torch.testing.assert_close(got.double(), want, **near)


@pytest.mark.gpu
def test_gpu_scaled_matmul_equals_formula():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with float8 products")
    fast, x = Fp8Linear(layer(96, 32)).cuda(), torch.randn(3, 70, 96, device="cuda")
    want = fp8_linear_ref(*quantise(x.flatten(0, -2)), fast.weight, fast.scale, fast.bias)  # (210, 32)
    torch.testing.assert_close(fast(x).flatten(0, -2), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_linear_error(dtype):
    """A relative error of about 4 %: both roundings of 1/16 at most, their mean over random mantissas."""
    linear, x = layer(256, 128), torch.randn(512, 256)
    want = linear(x)
    error = (Fp8Linear(linear)(x.to(dtype)).float() - want).norm() / want.norm()
    assert 0.01 < error < 0.05, error


def test_quantise_uses_the_range_and_keeps_zeros():
    x = torch.tensor([[0.0, 1e-3, -2e-3], [0.0, 0.0, 0.0], [1e4, 0.0, -5e3]])
    rows, scale = quantise(x)
    assert rows.float().abs().amax(1).tolist() == [448, 0, 448] and torch.isfinite(scale).all()
    torch.testing.assert_close(rows.float() * scale, x, rtol=0.07, atol=0)


def test_fp8_linear_refuses_odd_sides():
    with pytest.raises(ValueError, match=r"fp8_linear.py!weight: \(10, 16\), .*; leave this layer"):
        Fp8Linear(layer(16, 10))


def test_fp8_linear_moves_and_saves():
    fast = Fp8Linear(layer(32, 16))
    other = Fp8Linear(layer(32, 16, seed=1))
    other.load_state_dict(fast.state_dict())
    x = torch.randn(4, 32)
    assert torch.equal(other(x), fast(x)) and not list(fast.parameters())
