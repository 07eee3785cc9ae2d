"""kernels/upscale.py: torch path and Triton kernels (interpreted, on a GPU) against fp64 and the modules.

`test_interpreter_all_cases` runs the tests marked `interpreted` in a process of their own, as in
tests/test_kernels.py; the compiler's gate for these kernels is there too.
"""
# SPDX-License-Identifier: MIT
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import mask_product, upscale
from kernels.choose import INTERPRET, triton

from .conftest import run_interpreted
from .test_kernels import DTYPES, TOLERANCE, compiled, error, gpu, interpreted, surrounded

module = importlib.import_module("kernels.upscale")
NAMES = "out", "dx", "dweight1", "dbias1", "dweight2", "dgain", "dshift"


@pytest.fixture(autouse=True)
def path(monkeypatch):
    """Tests of the interpreter force Triton, the rest starts from an unset environment."""
    torch.manual_seed(0)
    if INTERPRET:
        monkeypatch.setenv("EOMT_KERNELS", "triton")
    else:
        monkeypatch.delenv("EOMT_KERNELS", raising=False)


def inputs_of(batch, h, w, channels, dtype=torch.float32, device="cpu"):
    """x and the five parameters."""
    shapes = [(batch, h, w, channels), (channels, channels, 2, 2), (channels,), (channels, 1, 3, 3),
              (channels,), (channels,)]
    scales = [1, channels**-0.5, 0.3, 0.3, 1, 1]
    return [(torch.randn(s, device=device) * a).to(dtype) for s, a in zip(shapes, scales, strict=True)]


def modules(x, weight1, bias1, weight2, gain, shift, eps=1e-6):
    """The chain of modules, channels first, that the function replaces."""
    channels = x.shape[-1]
    conv1 = torch.nn.ConvTranspose2d(channels, channels, 2, 2)
    conv2 = torch.nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    norm = torch.nn.LayerNorm(channels, eps)
    call = torch.func.functional_call
    y = call(conv1, dict(weight=weight1, bias=bias1), x.permute(0, 3, 1, 2).contiguous())  # (B, C, 2h, 2w)
    y = call(conv2, dict(weight=weight2), F.gelu(y))  # (B, C, 2h, 2w)
    return call(norm, dict(weight=gain, bias=shift), y.permute(0, 2, 3, 1))  # (B, 2h, 2w, C)


def oracle(x, weight1, bias1, weight2, gain, shift, eps=1e-6):
    """The formula in elementary operations."""
    B, h, w, C = x.shape
    y = torch.einsum("bhwc,cdij->bhiwjd", x, weight1).reshape(B, 2 * h, 2 * w, C) + bias1
    y = F.pad(y * 0.5 * (1 + torch.erf(y / math.sqrt(2))), (0, 0, 1, 1, 1, 1))  # (B, 2h+2, 2w+2, C)
    d = sum(y[:, k:k + 2 * h, m:m + 2 * w] * weight2[:, 0, k, m] for k in range(3) for m in range(3))
    d = d - d.mean(-1, keepdim=True)  # (B, 2h, 2w, C)
    return d / (d.square().mean(-1, keepdim=True) + eps).sqrt() * gain + shift


def results(function, inputs, grad, dtype=None):
    """Output and every gradient."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


def check(inputs, grad=None):
    """Output and gradients against fp64: within the tolerance and 2x the error of the modules."""
    B, h, w, C = inputs[0].shape
    dtype = inputs[0].dtype
    if grad is None:
        grad = torch.randn(B, 2 * h, 2 * w, C, device=inputs[0].device).to(dtype)
    got, want = results(upscale, inputs, grad), results(oracle, inputs, grad, torch.float64)
    rivals = results(modules, inputs, grad) if not inputs[0].is_cuda else got
    assert got[0].shape == (B, 2 * h, 2 * w, C) and got[0].is_contiguous()
    for name, result, target, rival in zip(NAMES, got, want, rivals, strict=True):
        assert result.dtype == dtype and result.isfinite().all(), name
        assert error(result, target) <= TOLERANCE[dtype], (name, error(result, target))
        assert error(result, target) <= 2 * error(rival, target) + 1e-6, (name, error(rival, target))
    return got


# ---- plain torch ----

@compiled
@pytest.mark.parametrize("shape", [(2, 3, 5, 24), (1, 1, 1, 8), (0, 3, 2, 16), (2, 9, 7, 96)])
def test_torch_path_against_formula_and_modules(shape):
    inputs = inputs_of(*shape, dtype=torch.float64)
    grad = torch.randn(shape[0], 2 * shape[1], 2 * shape[2], shape[3]).double()
    for rival in (oracle, modules):
        for got, want in zip(results(upscale, inputs, grad), results(rival, inputs, grad), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_path_of_sliced_tokens(dtype):
    """Patches behind queries, as predict passes them; autocast gives what the modules get."""
    x, *rest = inputs_of(2, 4, 5, 32)
    tokens = torch.randn(2, 7 + 20, 32)
    patches = tokens[:, 7:].unflatten(1, (4, 5))  # (2, 4, 5, 32), a view
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        got, want = upscale(patches, *rest), modules(patches, *rest)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 5e-2)


@compiled
@pytest.mark.parametrize("change, member", [
    ({0: torch.zeros(2, 12, 16)}, "shape"),  # tokens without their grid
    ({0: torch.zeros(2, 3, 4, 17)}, "shape"),
    ({1: torch.zeros(16, 8, 2, 2)}, "shape"),
    ({3: torch.zeros(16, 16, 3, 3)}, "shape"),
    ({5: torch.zeros(1)}, "shape"),
    ({0: torch.zeros(2, 3, 4, 16, dtype=torch.float64)}, "dtype"),
    ({0: torch.zeros(2, 3, 4, 16, dtype=torch.uint8)}, "dtype"),
])
def test_errors_are_one_line(change, member):
    inputs = [change.get(i, t) for i, t in enumerate(inputs_of(2, 3, 4, 16))]
    with pytest.raises(ValueError, match=rf"^kernels/upscale\.py!{member}: [^\n]+; [^\n]+$"):
        upscale(*inputs)


@interpreted
@pytest.mark.parametrize("channels, dtype, words", [
    (24, torch.float32, "24 channels"), (1552, torch.float32, "1552 channels"), (16, torch.float64, "dtype")])
def test_interpreted_refuses_what_the_kernel_cannot(channels, dtype, words):
    x = torch.zeros(1, 1, 1, channels, dtype=dtype)
    parameters = [t.expand(s) for t, s in zip(5 * [torch.zeros((), dtype=dtype)], [
        (channels, channels, 2, 2), (channels,), (channels, 1, 3, 3), (channels,), (channels,)], strict=True)]
    with pytest.raises(ValueError, match=rf"^kernels/upscale\.py!EOMT_KERNELS: [^\n]*{words}"):
        upscale(x, *parameters)


# ---- the Triton kernels, interpreted ----

@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [
    (1, 1, 1, 16),  # a single cell
    (1, 3, 5, 48),  # channels fill no power of two
    (2, 1, 9, 16),  # a tile and two columns of a second
])
def test_interpreted_forward_and_gradients(shape, dtype):
    check(inputs_of(*shape, dtype=dtype))


@interpreted
def test_interpreted_wide():
    """Three chunks of channels in the backward pass, four padded to in the forward one."""
    check(inputs_of(1, 1, 2, 384))


@interpreted
def test_interpreted_large_mean():
    """A mean 1000 times the spread: the variance is taken around it."""
    inputs = inputs_of(1, 2, 2, 32)
    inputs[2] += 1000.0
    inputs[3][:] = 0.0
    inputs[3][:, :, 1, 1] = 1.0
    wanted = oracle(*(t.double() for t in inputs))
    assert error(upscale(*inputs), wanted) <= 2 * error(modules(*inputs), wanted) + 1e-6


@interpreted
def test_interpreted_empty_batch():
    inputs = [t.requires_grad_() for t in inputs_of(0, 2, 3, 16)]
    out = upscale(*inputs)
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert out.shape == (0, 4, 6, 16) and all((g == 0).all() for g in grads[1:])


@interpreted
def test_interpreted_strides_change_nothing(monkeypatch):
    """Tokens behind queries, parameters in other layouts, an expanded gradient; few programs: bit for bit."""
    inputs = inputs_of(2, 2, 1, 32)
    grad = torch.randn(32).expand(2, 4, 2, 32)  # strides 0
    wanted = check(inputs, grad.contiguous())
    views = [torch.cat([torch.randn(2, 5, 32), inputs[0].flatten(1, 2)], 1)[:, 5:].unflatten(1, (2, 1)),
             inputs[1].mT.contiguous().mT, *inputs[2:]]
    views[3] = inputs[3].to(memory_format=torch.channels_last)
    views[4] = torch.stack([inputs[4], inputs[5]], 1)[:, 0]  # every second number
    for result, target in zip(results(upscale, views, grad), wanted, strict=True):
        assert torch.equal(result, target)
    monkeypatch.setattr(module, "PROGRAMS", 3)  # several tiles a program, in other sums
    check(inputs, grad)


@interpreted
def test_interpreted_repeatable_and_batched_equals_single():
    inputs = inputs_of(2, 1, 9, 16, torch.bfloat16)
    grad = torch.randn(2, 2, 18, 16).bfloat16()
    first, again = (results(upscale, inputs, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    single = results(upscale, [inputs[0][1:], *inputs[1:]], grad[1:])
    assert torch.equal(first[0][1:], single[0]) and torch.equal(first[1][1:], single[1])


@interpreted
def test_interpreted_poisoned_memory():
    """Outputs start as NaN inside NaN: all is written, nothing outside; neighbours of inputs are not used."""
    B, h, w, C = 2, 2, 3, 48
    _, _, _, weight2, gain, shift = inputs_of(B, h, w, C)
    weight2, gain, shift = (surrounded(t)[1] for t in (weight2, gain, shift))
    y, grad = surrounded(torch.randn(B, h, w, 2, 2, C))[1], surrounded(torch.randn(B, 2 * h, 2 * w, C))[1]
    image, one = (B, 2 * h, 2 * w, C), (B, 2 * h, 2 * w, 1)
    shapes = dict(out=image, mean=one, rstd=one, dd=image, dy=y.shape, norm=(4, 2, C), conv=(4, 9, C))
    buffers = {name: surrounded(torch.full(shape, math.nan)) for name, shape in shapes.items()}
    out, mean, rstd, *grads = (view for _, view in buffers.values())
    module.launch_forward(y, weight2, gain, shift, 1e-6, out, mean, rstd)
    module.launch_backward(grad, y, weight2, gain, mean, rstd, *grads)
    for name, (buffer, view) in buffers.items():
        assert view.isfinite().all() and buffer.isfinite().sum() == view.numel(), name
    leaves = [t.double().requires_grad_() for t in (y, weight2, gain, shift)]
    d = F.conv2d(F.gelu(leaves[0]).transpose(2, 3).reshape(image).permute(0, 3, 1, 2), leaves[1], padding=1,
                 groups=C).permute(0, 2, 3, 1)  # (B, 2h, 2w, C)
    wanted = F.layer_norm(d, (C,), *leaves[2:], 1e-6)
    dy, dweight2, dgain, dshift = torch.autograd.grad(wanted, leaves, grad.double())
    part_norm, part_conv = grads[2].sum(0), grads[3].sum(0).T.reshape(C, 1, 3, 3)
    pairs = [(out, wanted), (grads[1], dy), (part_conv, dweight2)]
    pairs += [(part_norm[0], dgain), (part_norm[1], dshift)]
    assert all(error(got, want.detach()) < 1e-5 for got, want in pairs)


@interpreted
def test_interpreted_library_ops_pass_opcheck():
    y, *rest = torch.randn(1, 1, 2, 2, 2, 16), *inputs_of(1, 1, 2, 16)[3:]
    leaves = [t.requires_grad_() for t in (y, *rest)]
    torch.library.opcheck(module.upscale_op, (*leaves, 1e-6))
    out, mean, rstd = (t.detach() for t in module.upscale_op(*leaves, 1e-6))
    saved = [t.detach() for t in leaves[:3]]
    torch.library.opcheck(module.upscale_backward_op, (torch.randn(out.shape), *saved, mean, rstd))


@compiled
@pytest.mark.parametrize("shape", [(2, 7, 4, 6, 24), (1, 1, 1, 1, 8), (0, 3, 2, 2, 16)])
def test_mask_product_against_einsum(shape):
    """The same numbers; the gradient of the features lies in memory as the features do, einsum's does not."""
    B, Q, H, W, C = shape
    queries, features = (torch.randn(s).double().requires_grad_() for s in ((B, Q, C), (B, H, W, C)))
    grad = torch.randn(B, Q, H, W).double()
    out, want = mask_product(queries, features), torch.einsum("bqc,bhwc->bqhw", queries, features)
    got, theirs = (torch.autograd.grad(o, (queries, features), grad) for o in (out, want))
    torch.testing.assert_close((out, *got), (want, *theirs), rtol=1e-12, atol=1e-12)
    assert got[1].is_contiguous() and (theirs[1].is_contiguous() == (B * H * W < 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the torch path leaves a LayerNorm's features in fp32
        low = mask_product(queries.bfloat16(), features.float())
        q, f = queries.detach().float().requires_grad_(), features.detach().float().requires_grad_()
        cast = mask_product(q, f)  # einsum takes them too
    cast.backward(grad.to(cast.dtype))
    assert q.grad.dtype == f.grad.dtype == torch.float32
    assert B == 0 or max(error(q.grad, got[0]), error(f.grad, got[1])) < 1e-2
    assert low.dtype == torch.bfloat16 and (B == 0 or error(low.detach(), want.detach()) < 1e-2)
    low.sum().backward()
    assert features.grad.dtype == torch.float64 and queries.grad.isfinite().all()


def test_compile_fullgraph_and_checkpointing_equal_eager():
    """Torch or interpreted; recomputed in backward: bit for bit."""
    inputs, grad = inputs_of(1, 2, 2, 16), torch.randn(1, 4, 4, 16)
    plain = results(upscale, inputs, grad)
    again = results(lambda *a: checkpoint(upscale, *a, use_reentrant=False), inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    fast = torch.compile(upscale, fullgraph=True, backend="aot_eager")
    for result, wanted in zip(results(fast, inputs, grad), plain, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)


@interpreted
def test_interpreted_autocast():
    """GEMM in the autocast dtype, parameters and their gradients stay fp32."""
    inputs = [t.requires_grad_() for t in inputs_of(1, 2, 2, 32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, wanted = upscale(*inputs), modules(*inputs)
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert out.dtype == wanted.dtype and all(g.dtype == torch.float32 for g in grads)
    reference = oracle(*(t.detach().double() for t in inputs))
    assert error(out.detach(), reference) <= 1.2 * error(wanted.detach(), reference)


@pytest.mark.skipif(triton is None or bool(INTERPRET), reason="the interpreter comes with triton")
def test_interpreter_all_cases():
    run_interpreted(__file__, 18)


# ---- a real GPU ----

@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [96, 384, 768, 1024, 1536])
def test_gpu_at_model_size(channels, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    inputs = inputs_of(2, 20, 23, channels, dtype, "cuda")
    grad = torch.randn(2, 40, 46, channels, device="cuda").to(dtype)
    first, again = check(inputs, grad), results(upscale, inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert upscale(*inputs).dtype == torch.bfloat16
