"""Packed linears: oneDNN's product against float64, and that a model that inference makes ready uses it."""

# SPDX-License-Identifier: MIT
import copy

import pytest
import torch

import eomt
from kernels.packed_linear import PackedLinear, packed

from .test_eomt import images, tiny


def layer(width, out, bias=True):
    torch.manual_seed(0)
    return torch.nn.Linear(width, out, bias)


here = pytest.mark.skipif(not isinstance(packed(layer(1, 1)), PackedLinear), reason="no oneDNN on x86")


@here
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width,out", [(96, 40), (33, 1), (1, 7)])
def test_packed_linear_equals_float64(width, out, bias):
    """Any number of rows, none too, and rows that do not lie one after another."""
    linear = layer(width, out, bias)
    fast = PackedLinear(linear)
    exact = torch.nn.Linear(width, out, bias).double()
    exact.load_state_dict(linear.state_dict())
    many = torch.randn(2, 9, 3, width)
    for x in (many[0, 0, 0], many[0, 0], many, many[:, :0], many[:, 2:6], many.transpose(0, 2)):
        with torch.inference_mode():
            torch.testing.assert_close(fast(x).double(), exact(x.double()), rtol=1e-5, atol=1e-5)


@here
def test_accelerate_packs_on_a_cpu():
    """All linear layers of the encoder and the heads; none where the model is to be compiled."""
    for batch in (0, 2):
        model = tiny()
        model.compile = lambda **options: None
        before = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
        eomt.accelerate(model, batch=batch)
        kinds = [type(module) for module in model.modules()]
        left, made = (before, 0) if batch else (0, before)
        assert (kinds.count(torch.nn.Linear), kinds.count(PackedLinear)) == (left, made)


@here
@pytest.mark.parametrize("change", [
    copy.deepcopy, lambda m: m.to("meta"), lambda m: m.double(), lambda m: m.state_dict(),
    lambda m: m(torch.zeros(1, 3, 32, 32, requires_grad=True))])
def test_accelerated_model_refuses_what_it_cannot_do(change):
    """A model whose weights stay behind, or whose gradient lacks them, would be found out too late."""
    with pytest.raises(RuntimeError, match="for inference on this CPU only; load the model again"):
        change(eomt.accelerate(tiny()))


@here
def test_accelerated_model_under_autocast_and_compiled():
    model, pixels = tiny(), images(2, 3, 32, 32)
    want = model(pixels)[-1].classes
    assert not eomt.accelerate(model.requires_grad_(True))(pixels)[-1].classes.requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(pixels)[-1].classes.float(), want, rtol=0.1, atol=0.1)
    with torch.no_grad():
        found = torch.compile(model, backend="eager")(pixels)[-1].classes
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@here
def test_packed_layers_cannot_become_fp8():
    """Their weights are in another layout already; the call had made no fp8 layer, without a word."""
    model = eomt.accelerate(tiny())
    with pytest.raises(ValueError, match="^fp8: .*packed.*; load the model again$"):
        eomt.accelerate(model, fp8=True)
    eomt.accelerate(eomt.accelerate(tiny(), fp8=True), fp8=True)  # a second time it finds them


def test_accelerate_where_nothing_packs(monkeypatch):
    monkeypatch.setattr("kernels.packed_linear.platform.machine", lambda: "arm64")
    model, pixels = tiny(), images(2, 3, 32, 32)
    want = model(pixels)[-1]
    for a, b in zip(eomt.accelerate(model)(pixels)[-1], want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("change", [lambda m: m.double(), lambda m: m.bfloat16(), lambda m: m.to("meta")])
def test_packed_leaves_what_is_not_fp32_on_a_cpu(change):
    other = change(layer(4, 4))
    assert packed(other) is other


def test_packed_transposed_convolution_has_the_same_bits():
    torch.manual_seed(0)
    plain, x = torch.nn.ConvTranspose2d(24, 24, 2, 2), torch.randn(2, 7, 5, 24).permute(0, 3, 1, 2)
    want = plain(x)
    assert torch.equal(packed(plain)(x), want)
    assert plain.weight.is_contiguous(memory_format=torch.channels_last)
