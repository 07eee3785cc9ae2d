"""kernels/: torch paths and Triton kernels (interpreted, compiled ahead of time, on a GPU) against fp64.

Interpreting needs TRITON_INTERPRET=1 before triton is imported, so `test_interpreter_all_cases` runs the
tests marked `interpreted` in a process of their own.
"""
# SPDX-License-Identifier: MIT
import importlib
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels import ahead, masked_attention, pack_mask
from kernels.choose import INTERPRET, triton

from .conftest import run_interpreted

# The package exports functions of the modules' own names.
attention_module = importlib.import_module("kernels.masked_attention")
pack_module = importlib.import_module("kernels.pack_mask")

ROOT = Path(__file__).resolve().parents[1]
# ||error|| / ||reference||
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
interpreted = pytest.mark.skipif(not INTERPRET, reason="test_interpreter_all_cases runs it")
compiled = pytest.mark.skipif(bool(INTERPRET), reason="wants the compiler or the plain torch path")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def path(request, monkeypatch):
    """Tests of the interpreter force Triton, the rest starts from an unset environment."""
    torch.manual_seed(0)
    if INTERPRET:
        monkeypatch.setenv("EOMT_KERNELS", "triton")
    else:
        monkeypatch.delenv("EOMT_KERNELS", raising=False)


def random_mask(batch, rows, keys, open_columns):
    """bool (batch, rows, keys) with the first columns open."""
    mask = torch.rand(batch, rows, keys) < 0.4
    mask[:, :, :open_columns] = True
    return mask


def pack(mask):
    """bool (B, Q, N) -> int32 (B, Q, ceil(N / 32)), one Python integer at a time; unused bits 0."""
    words = math.ceil(mask.shape[-1] / 32)
    rows = [[sum(1 << i for i, on in enumerate(row[32 * w:32 * w + 32]) if on) for w in range(words)]
            for row in mask.flatten(0, 1).tolist()]
    signed = [[word - (word >> 31 << 32) for word in row] for row in rows]
    return torch.tensor(signed, dtype=torch.int32).reshape(*mask.shape[:2], words)


def heads_of(qkv):
    """(B, N, 3, nh, hd), as the qkv linear leaves it, -> q, k, v (B, nh, N, hd)."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def full_mask(q, k, mask):
    """bool (B, Q, N) -> bool (B, 1, M, N), open from row Q on."""
    full = q.new_ones(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool)  # (B, 1, M, N)
    full[:, 0, :mask.shape[1]] = mask
    return full


def oracle(q, k, v, mask, grad):
    """Textbook attention in fp64 with a full mask: out, dq, dk, dv."""
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    full = full_mask(q, k, mask)
    weight = (q @ k.mT / math.sqrt(q.shape[-1])).exp() * full  # (B, nh, M, N); small scores need no maximum
    out = weight / weight.sum(-1, keepdim=True).clamp(min=1e-300) @ v  # (B, nh, M, hd)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad.double())


def ours(q, k, v, bits, rows, grad):
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))  # views keep their strides
    out = masked_attention(q, k, v, bits, rows)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def dense_torch(q, k, v, mask, grad):
    """What same-dtype torch makes of it: SDPA's math with a full mask."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    full = full_mask(q, k, mask)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=full)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def error(result, wanted):
    return ((result.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def check(q, k, v, mask, rival=True):
    """Output and every gradient against fp64: within the tolerance and 2x the error of same-dtype torch."""
    grad = torch.randn(q.shape, device=q.device).to(q.dtype)
    bits = pack(mask.cpu()).to(q.device)
    results = ours(q, k, v, bits, mask.shape[1], grad)
    wanted = oracle(q, k, v, mask, grad)
    rivals = dense_torch(q, k, v, mask, grad) if rival else results
    names = ("out", "dq", "dk", "dv")
    for name, result, target, other in zip(names, results, wanted, rivals, strict=True):
        assert result.dtype == q.dtype and result.isfinite().all(), name
        assert error(result, target) <= TOLERANCE[q.dtype], (name, error(result, target))
        if rival:  # 1e-6: below it fp32 orders of summation differ at random
            assert error(result, target) <= 2 * error(other, target) + 1e-6, (name, error(other, target))
    assert results[0].transpose(1, 2).is_contiguous()
    return results


def qkv_of(batch, heads, keys, size, dtype, device="cpu"):
    return torch.randn(batch, keys, 3, heads, size, device=device).to(dtype)


# ---- packing, torch or interpreted ----

def wanted_bits(logits, grid, prefix, keep):
    """bool (B, Q, N) by the words of the specification."""
    batch, queries = logits.shape[:2]
    resized = F.interpolate(logits, grid, mode="bilinear", align_corners=False)  # (B, Q, h, w)
    seen = torch.cat([torch.ones(batch, queries, prefix, dtype=torch.bool), resized.flatten(2) > 0], 2)
    return seen | ~keep[..., None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size, grid, prefix", [
    ((24, 32), (6, 8), 7),  # 4x: the case of the model, 55 keys
    ((17, 23), (6, 9), 0),  # odd ratios, no open column
    ((5, 7), (9, 11), 31),  # upwards
    ((12, 12), (12, 12), 48),  # as is, N = 192: no bit to fill up
    ((1, 1), (3, 2), 1),  # a single logit
])
def test_pack_mask_against_interpolate(dtype, size, grid, prefix):
    logits = torch.randn(2, *size, 5).to(dtype).permute(0, 3, 1, 2)  # (B, Q, mh, mw), channels last in memory
    noise = torch.rand(2, 5)
    num_keys = prefix + grid[0] * grid[1]
    for keep_prob in (0.0, 0.4, 1.0, torch.tensor(0.4)):
        bits = pack_mask(logits, grid, prefix, num_keys, keep_prob, noise)
        wanted = wanted_bits(logits, grid, prefix, noise < keep_prob)
        fill = torch.ones(2, 5, -num_keys % 32, dtype=torch.bool)
        assert bits.dtype == torch.int32 and torch.equal(bits, pack(torch.cat([wanted, fill], 2)))
        assert torch.equal(attention_module.unpack(bits, num_keys), wanted)
    assert not (pack_mask(logits, grid, prefix, num_keys, 1.0, noise) == -1).all()


def test_pack_mask_keep_prob_ends():
    logits = torch.full((2, 3, 8, 8), -1.0)
    opened = pack_mask(logits, (2, 2), 4, 8, 0.0, torch.zeros(2, 3))  # noise 0 is the smallest rand returns
    closed = pack_mask(logits, (2, 2), 4, 8, 1.0, torch.full((2, 3), 1 - 2.0**-24))  # and this the largest
    assert (attention_module.unpack(opened, 8)).all()
    for bits in (closed, pack_mask(logits, (2, 2), 4, 8), pack_mask(logits, (2, 2), 4, 8, torch.tensor(1.0))):
        assert torch.equal(attention_module.unpack(bits, 8)[1, 2], torch.tensor([True] * 4 + [False] * 4))
    assert (pack_mask(logits, (2, 2), 4, 8, torch.tensor(0.0)) == -1).all()


def test_pack_mask_reads_only_the_centre_of_each_cell():
    logits = torch.randn(1, 4, 24, 24)
    centre = torch.zeros(4, 4, dtype=torch.bool)
    centre[1:3, 1:3] = True
    poisoned = logits.where(centre.repeat(6, 6), torch.tensor(math.nan))
    poisoned[0, 3] = math.nan  # a query that drops its mask reads nothing
    noise = torch.tensor([[0.1, 0.1, 0.1, 0.9]])
    bits = pack_mask(poisoned, (6, 6), 5, 41, 0.5, noise)
    assert torch.equal(bits, pack_mask(logits, (6, 6), 5, 41, 0.5, noise))
    assert (bits[0, 3] == -1).all() and not (bits[0, :3] == -1).all()


def test_pack_mask_empty_batch_and_no_gradient():
    assert pack_mask(torch.randn(0, 3, 8, 8), (2, 2), 4, 8, 0.5, torch.rand(0, 3)).shape == (0, 3, 1)
    logits = torch.randn(1, 3, 8, 8, requires_grad=True)
    assert not pack_mask(logits, (2, 2), 4, 8).requires_grad


@compiled
@pytest.mark.parametrize("arguments, member", [
    (dict(mask_logits=torch.zeros(2, 3, 8)), "mask_logits"),
    (dict(mask_logits=torch.zeros(2, 3, 8, 8, dtype=torch.int32)), "mask_logits"),
    (dict(num_keys=9), "num_keys"),
    (dict(noise=torch.rand(3, 2), keep_prob=0.5), "noise"),
    (dict(keep_prob=0.5), "noise"),
])
def test_pack_mask_errors_are_one_line(arguments, member):
    defaults = dict(mask_logits=torch.zeros(2, 3, 8, 8), grid=(2, 2), prefix_columns=4, num_keys=8)
    arguments = defaults | arguments
    with pytest.raises(ValueError, match=rf"^kernels/pack_mask\.py!{member}: [^\n]+; [^\n]+$"):
        pack_mask(**arguments)


# ---- attention in plain torch ----

@compiled
@pytest.mark.parametrize("rows, keys, masked", [
    (81, 81, 17), (81, 81, 81), (81, 81, 0), (9, 81, 9),  # one call
    (40, 1100, 7), (7, 1100, 7), (7, 1100, 0),  # 1024 keys and more: two calls
])
def test_torch_path_against_fp64(rows, keys, masked):
    for dtype in (torch.float64, torch.bfloat16):
        q, k, v = heads_of(qkv_of(2, 3, keys, 24, dtype))
        mask = random_mask(2, masked, keys, 20)
        check(q[:, :, :rows], k, v, mask, rival=dtype != torch.float64)


@compiled
@pytest.mark.parametrize("keys", [81, 1100])
def test_torch_path_row_without_a_key_returns_zero(keys):
    q, k, v = heads_of(qkv_of(2, 2, keys, 16, torch.float64))
    mask = random_mask(2, 5, keys, 9)
    mask[1, 3] = False
    out, dq, *_ = check(q[:, :, :30], k, v, mask, rival=False)
    assert (out[1, :, 3] == 0).all() and (dq[1, :, 3] == 0).all() and (out[0, :, 3] != 0).all()


@compiled
def test_torch_path_makes_no_square_mask_and_no_copy_over_heads():
    """What eager code materialises at 1024 keys and more: never (B, N, N), never nh masks."""
    batch, heads, keys, masked = 2, 8, 1100, 10
    sizes = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                sizes.append(tensor.untyped_storage().nbytes() if isinstance(tensor, torch.Tensor) else 0)
            return out

    qkv = torch.randn(batch, keys, 3, heads, 8)
    bits = pack(random_mask(batch, masked, keys, 9))
    with Record():
        masked_attention(*heads_of(qkv), bits, masked)
    assert max(sizes) <= qkv.untyped_storage().nbytes() < batch * keys * keys


@compiled
@pytest.mark.parametrize("change, member", [
    (dict(k=torch.zeros(2, 3, 40, 16, dtype=torch.float64)), "dtype"),
    (dict(v=torch.zeros(2, 3, 41, 16)), "shape"),
    (dict(q=torch.zeros(2, 3, 40, 8)), "shape"),
    (dict(bits=torch.zeros(2, 5, 2)), "bits"),
    (dict(bits=torch.zeros(2, 5, 3, dtype=torch.int32)), "bits"),
    (dict(bits=torch.zeros(2, 5, 40, dtype=torch.bool)), "bits"),
    (dict(num_masked_rows=4), "bits"),
    (dict(bits=torch.zeros(2, 41, 2, dtype=torch.int32), num_masked_rows=41), "bits"),
])
def test_masked_attention_errors_are_one_line(change, member):
    arguments = {name: torch.zeros(2, 3, 40, 16) for name in "qkv"}
    arguments |= dict(bits=torch.zeros(2, 5, 2, dtype=torch.int32), num_masked_rows=5) | change
    with pytest.raises(ValueError, match=rf"^kernels/masked_attention\.py!{member}: [^\n]+; [^\n]+$"):
        masked_attention(**arguments)


@compiled
@pytest.mark.parametrize("mode, size, dtype, words", [
    ("triton", 16, torch.bfloat16, "cuda tensors, found cpu"),
    ("cuda", 16, torch.bfloat16, "say torch, triton or nothing"),
])
def test_forced_path_errors_are_one_line(monkeypatch, mode, size, dtype, words):
    monkeypatch.setenv("EOMT_KERNELS", mode)
    q = torch.zeros(1, 2, 8, size, dtype=dtype)
    with pytest.raises(ValueError, match=rf"^kernels/masked_attention\.py!EOMT_KERNELS: [^\n]*{words}"):
        masked_attention(q, q, q, torch.zeros(1, 3, 1, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match=rf"^kernels/pack_mask\.py!EOMT_KERNELS: [^\n]*{words}"):
        pack_mask(torch.zeros(1, 2, 4, 4), (1, 1), 0, 1)


@interpreted
@pytest.mark.parametrize("size, dtype, words", [
    (256, torch.float16, "head size 256 is none of 16, 32"),
    (24, torch.float16, "head size 24"),
    (16, torch.float64, "dtype torch.float64"),
])
def test_interpreted_refuses_what_the_kernel_cannot(size, dtype, words):
    q = torch.zeros(1, 2, 8, size, dtype=dtype)
    with pytest.raises(ValueError, match=rf"^kernels/masked_attention\.py!EOMT_KERNELS: [^\n]*{words}"):
        masked_attention(q, q, q, torch.zeros(1, 3, 1, dtype=torch.int32), 3)
    if dtype == torch.float64:
        with pytest.raises(ValueError, match=r"^kernels/pack_mask\.py!EOMT_KERNELS: dtype torch.float64"):
            pack_mask(torch.zeros(1, 2, 4, 4, dtype=dtype), (1, 1), 0, 1)


@compiled
def test_import_without_triton_asks_no_device():
    """The package imports where triton is missing, and importing touches neither CUDA nor the environment."""
    code = """
import sys, torch
sys.modules["triton"] = None
def forbidden(*args, **kwargs): raise AssertionError("device query")
for name in ("is_available", "device_count", "get_device_capability", "current_device", "_lazy_init"):
    setattr(torch.cuda, name, forbidden)
import kernels
bits = kernels.pack_mask(torch.randn(1, 3, 4, 4), (2, 2), 4, 8)
print(tuple(kernels.masked_attention(*torch.randn(3, 1, 2, 8, 24), bits, 3).shape))
import os
os.environ["EOMT_KERNELS"] = "triton"
try:
    kernels.pack_mask(torch.randn(1, 3, 4, 4), (2, 2), 4, 8)
except ValueError as fault:
    print(fault)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shape, fault = done.stdout.splitlines()
    assert shape == "(1, 2, 8, 24)" and fault.startswith("kernels/pack_mask.py!EOMT_KERNELS: triton is not")


# ---- compile, checkpointing, autocast: torch or interpreted ----

class Block(torch.nn.Module):
    """qkv linear, pack, attend: the way eomt.py uses the two ops."""

    def __init__(self, width=32, heads=2):
        super().__init__()
        self.qkv, self.heads = torch.nn.Linear(width, 3 * width), heads

    def forward(self, x, logits, keep_prob, noise):
        queries = logits.shape[1]
        bits = pack_mask(logits, (4, 5), queries + 1, x.shape[1], keep_prob, noise)
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, N, 3, nh, hd)
        return masked_attention(*heads_of(qkv), bits, queries).transpose(1, 2).flatten(2) + x


def block_inputs():
    x = torch.randn(2, 6 + 1 + 20, 32, requires_grad=True)
    return x, torch.randn(2, 6, 16, 20), torch.tensor(0.5), torch.rand(2, 6)


def gradients(module, run, inputs):
    out = run(*inputs)
    return out.detach(), *torch.autograd.grad(out.square().sum(), (inputs[0], *module.parameters()))


def test_module_compile_fullgraph_equals_eager():
    module, inputs = Block(), block_inputs()
    eager = gradients(module, module, inputs)
    module.compile(fullgraph=True, backend="aot_eager")
    for result, wanted in zip(gradients(module, module, inputs), eager, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)


def test_checkpointing_twice_equals_plain():
    """Two blocks share one mask and are recomputed in backward: the same numbers, bit for bit."""
    module, inputs = Block(), block_inputs()
    x, *rest = inputs
    plain = gradients(module, lambda x, *rest: module(module(x, *rest), *rest), inputs)
    for reentrant in (False, True):
        def run(x, *rest, reentrant=reentrant):
            once = checkpoint(module, x, *rest, use_reentrant=reentrant)
            return checkpoint(module, once, *rest, use_reentrant=reentrant)
        if reentrant:  # reentrant checkpoints only know .backward()
            out = run(*inputs)
            out.square().sum().backward()
            results = out.detach(), x.grad, *(p.grad for p in module.parameters())
        else:
            results = gradients(module, run, inputs)
        assert all(torch.equal(a, b) for a, b in zip(results, plain, strict=True))


def test_autocast_takes_mixed_dtypes():
    """RoPE leaves q and k in fp32 while v is bf16: as in SDPA, autocast decides."""
    q, k, v = heads_of(qkv_of(1, 2, 40, 16, torch.float32))
    bits = pack(random_mask(1, 5, 40, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = masked_attention(q, k, v.bfloat16(), bits, 5)
    assert out.dtype == torch.bfloat16
    wanted = masked_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), bits, 5)
    assert torch.equal(out, wanted)


# ---- the Triton kernels, interpreted ----

@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 64, 72, 96])
def test_interpreted_forward_and_gradients(size, dtype):
    """N = 150 is a multiple of no tile; rows 128..150 make a second tile of rows."""
    q, k, v = heads_of(qkv_of(1, 2, 150, size, dtype))
    check(q, k, v, random_mask(1, 37, 150, 40))


@interpreted
@pytest.mark.parametrize("size, dtype", [(32, torch.float16), (80, torch.bfloat16), (128, torch.float32)])
def test_interpreted_other_head_sizes(size, dtype):
    q, k, v = heads_of(qkv_of(1, 1, 150, size, dtype))
    check(q, k, v, random_mask(1, 37, 150, 40))


@interpreted
@pytest.mark.parametrize("rows, keys, masked, open_columns, kind", [
    (33, 33, 1, 1, "random"),  # one query, no prefix, one key past the first word
    (70, 70, 20, 25, "all kept"),
    (70, 70, 20, 25, "patches masked"),
    (50, 150, 50, 60, "random"),  # every row masked, rectangular
    (150, 70, 130, 10, "random"),  # more rows than keys, masked rows pass the first tile
    (150, 140, 0, 0, "random"),  # no masked row
])
def test_interpreted_shapes(rows, keys, masked, open_columns, kind):
    q = torch.randn(2, 1, rows, 16)
    k, v = torch.randn(2, 2, 1, keys, 16).unbind(0)
    mask = random_mask(2, masked, keys, open_columns)
    if kind != "random":
        mask[:, :, open_columns:] = kind == "all kept"
    out, *_ = check(q, k, v, mask)
    if kind == "all kept":
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-6)


@interpreted
def test_interpreted_row_without_a_key_returns_zero():
    q, k, v = torch.randn(3, 2, 2, 70, 16).unbind(0)
    mask = random_mask(2, 5, 70, 9)
    mask[1, 3] = False
    mask[0, 2, :64] = False  # no key in the first tile, some in the second
    mask[0, 2, 66] = True
    out, dq, *_ = check(q, k, v, mask, rival=False)
    assert (out[1, :, 3] == 0).all() and (dq[1, :, 3] == 0).all() and (out[0, :, 2] != 0).all()


@interpreted
@pytest.mark.parametrize("keep_prob", [0.0, 1.0])
def test_interpreted_annealing_ends(keep_prob):
    """P = 0 is dense attention, P = 1 masks every query: packed and attended by the kernels."""
    logits = torch.randn(1, 6, 16, 20)
    bits = pack_mask(logits, (4, 5), 7, 27, keep_prob, torch.rand(1, 6))
    q, k, v = torch.randn(3, 1, 2, 27, 16).unbind(0)
    full = torch.ones(1, 1, 27, 27, dtype=torch.bool)
    if keep_prob:
        full[0, 0, :6, 7:] = F.interpolate(logits, (4, 5), mode="bilinear").flatten(2)[0] > 0
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=full)
    torch.testing.assert_close(masked_attention(q, k, v, bits, 6), wanted, rtol=1e-5, atol=1e-6)


@interpreted
@pytest.mark.parametrize("shape", [(0, 70, 70), (2, 0, 70), (2, 70, 0)])
def test_interpreted_empty_axes(shape):
    batch, rows, keys = shape
    q = torch.randn(batch, 2, rows, 16, requires_grad=True)
    k, v = (torch.randn(batch, 2, keys, 16, requires_grad=True) for _ in range(2))
    bits = torch.full((batch, min(rows, 3), math.ceil(keys / 32)), -1, dtype=torch.int32)
    out = masked_attention(q, k, v, bits, min(rows, 3))
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert out.shape == q.shape and all((t == 0).all() for t in (grads if rows * keys == 0 else ()))
    assert (out == 0).all()


@interpreted
def test_interpreted_strides_change_nothing():
    """Views of the qkv linear, copies, columns apart in memory, an expanded gradient: bit for bit."""
    qkv = qkv_of(2, 2, 70, 72, torch.bfloat16)
    bits = pack(random_mask(2, 9, 70, 12))
    wide = torch.zeros(2, 20, 5, dtype=torch.int32)[:, ::2, 1:4][:, :9].copy_(bits)
    grad = torch.randn(72).bfloat16().expand(2, 2, 70, 72)  # strides 0
    views = heads_of(qkv)
    wanted = ours(*(t.contiguous() for t in views), bits, 9, grad.contiguous())
    column_major = tuple(t.mT.contiguous().mT for t in views)
    for tensors in (views, column_major):
        for result, target in zip(ours(*tensors, wide, 9, grad), wanted, strict=True):
            assert torch.equal(result, target)


@interpreted
def test_interpreted_is_repeatable_and_batched_equals_single():
    q, k, v = heads_of(qkv_of(2, 1, 150, 16, torch.bfloat16))
    bits = pack(random_mask(2, 9, 150, 12))
    grad = torch.randn(q.shape).bfloat16()
    first = ours(q, k, v, bits, 9, grad)
    again = ours(q, k, v, bits, 9, grad)
    single = ours(q[1:], k[1:], v[1:], bits[1:], 9, grad[1:])
    for a, b, c in zip(first, again, single, strict=True):
        assert torch.equal(a, b) and torch.equal(a[1:], c)


def surrounded(tensor):
    """The same numbers as a view into a larger buffer of NaN."""
    buffer = torch.full([n + 2 for n in tensor.shape], math.nan, dtype=tensor.dtype)
    view = buffer[tuple(slice(1, 1 + n) for n in tensor.shape)]
    view.copy_(tensor)
    return buffer, view


@interpreted
def test_interpreted_poisoned_memory():
    """Outputs start as NaN inside NaN: all is written, nothing outside; neighbours of inputs are not used."""
    q, k, v = (surrounded(t)[1] for t in torch.randn(3, 2, 2, 70, 72).unbind(0))
    mask = random_mask(2, 9, 70, 12)
    grad = surrounded(torch.randn(2, 2, 70, 72))[1]
    names = ("out", "lse", "delta", "dq", "dk", "dv")
    poison = torch.full((2, 2, 70, 72), math.nan)
    buffers = {n: surrounded(poison[..., 0] if n in ("lse", "delta") else poison) for n in names}
    views = {name: view for name, (_, view) in buffers.items()}
    bits = pack(mask)
    attention_module.launch_forward(q, k, v, bits, views["out"], views["lse"])
    attention_module.launch_backward(grad, q, k, v, bits, *views.values())
    wanted = dict(zip(("out", "dq", "dk", "dv"), oracle(q, k, v, mask, grad), strict=True))
    for name, target in wanted.items():
        assert error(views[name], target) < 1e-5, name
    for name, (buffer, view) in buffers.items():
        assert view.isfinite().all() and buffer.isfinite().sum() == view.numel(), name


@interpreted
def test_interpreted_library_ops_pass_opcheck():
    q, k, v = (t.detach().requires_grad_() for t in heads_of(qkv_of(1, 2, 40, 16, torch.float32)))
    bits = pack(random_mask(1, 5, 40, 6))
    out, lse = attention_module.masked_attention_op(q, k, v, bits)
    torch.library.opcheck(attention_module.masked_attention_op, (q, k, v, bits))
    saved = [t.detach() for t in (q, k, v, bits, out, lse)]
    torch.library.opcheck(attention_module.masked_attention_backward_op, (torch.randn(out.shape), *saved))
    keep = torch.tensor([[True, False]])
    torch.library.opcheck(pack_module.pack_mask_op, (torch.randn(1, 2, 8, 8), keep, 2, 3, 4))


@interpreted
def test_interpreted_model_equals_torch_path(monkeypatch):
    """A small EoMT in training: predictions and every gradient, Triton against torch."""
    eomt = pytest.importorskip("eomt")
    model = eomt.EoMT(eomt.ViT(32, 3, 2, patch=8, grid=(4, 4)), num_classes=3, num_queries=5, num_blocks=2)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    noise = torch.rand(2, 2, 5)
    results = []
    for path in ("triton", "torch"):
        monkeypatch.setenv("EOMT_KERNELS", path)
        predictions = model(pixels, torch.tensor([1.0, 0.5]), noise)
        loss = sum(p.masks.square().mean() + p.classes.square().mean() for p in predictions)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)


@interpreted
def test_interpreted_launches_on_the_device_of_the_tensors(monkeypatch):
    """`torchrun eval.py` keeps rank 1 on cuda:1 without making it current, where Triton would launch."""
    seen, real = [], torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: seen.append(tensor.device) or real(tensor))
    bits = pack_mask(torch.randn(1, 2, 4, 4), (2, 2), 2, 6)
    masked_attention(*torch.randn(3, 1, 1, 6, 16).unbind(0), bits, 2)
    assert len(seen) == 2


@pytest.mark.skipif(triton is None or bool(INTERPRET), reason="the interpreter comes with triton")
def test_interpreter_all_cases():
    run_interpreted(__file__, 50)


# ---- ahead of time: what a GPU would run, without one ----

GATE = [(arch, dtype, size) for arch in ("sm_80", "sm_90") for dtype in ("bf16", "fp16")
        for size in attention_module.HEAD_SIZES]


@pytest.mark.skipif(triton is None or bool(INTERPRET), reason="wants triton's compiler")
@pytest.mark.parametrize("arch, dtype, size", [
    # bf16 always; fp16, the same code but for the conversions, where the models live
    pytest.param(*case, marks=[pytest.mark.slow] if case[1] == "fp16" and case[2] not in (64, 72) else [])
    for case in GATE])
def test_ahead_of_time_attention(arch, dtype, size):
    """Every shipped configuration: compiles, no spills, fits shared memory, runs on the matrix units."""
    rows = list(ahead.rows(f" hd {size} ", dtype, arch))
    assert len(rows) == 3
    check_rows(rows)
    assert all(row["HGMMA" if arch == "sm_90" else "HMMA"] > 0 for row in rows)


@pytest.mark.skipif(triton is None or bool(INTERPRET), reason="wants triton's compiler")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("module", [name for name in ahead.KERNELS if name != "masked_attention"])
def test_ahead_of_time_other_kernels(module, dtype, arch):
    rows = list(ahead.rows(module, dtype, arch))
    assert rows
    check_rows(rows)


def check_rows(rows):
    # KiB of shared memory: sm_80 has 163, but its configurations also serve consumer cards with 99.
    for row in rows:
        assert row["spilled bytes"] == 0, row
        assert row["shared KiB"] <= (227 if row["arch"] == "sm_90" else 99), row


def test_ahead_types_come_from_shape_comments():
    found = {name: (word, len(axes)) for name, word, axes in ahead.pointers(pack_module._pack_kernel)}
    assert found == {"LOGITS": ("", 4), "KEEP": ("bool", 2), "BITS": ("int32", 3)}


# ---- a real GPU ----

@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", sorted(attention_module.HEAD_SIZES))
def test_gpu_attention_at_model_size(size, dtype):
    """640 pixels: 200 queries + 5 + 40 x 40 patches."""
    q, k, v = heads_of(qkv_of(2, 4, 1805, size, dtype, "cuda"))
    mask = random_mask(2, 200, 1805, 205).cuda()
    first = check(q, k, v, mask)
    grad = torch.randn(q.shape, device="cuda").to(dtype)
    bits = pack(mask.cpu()).cuda()
    again = [ours(q, k, v, bits, 200, grad) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True)) and len(first) == 4


@pytest.mark.gpu
@gpu
def test_gpu_takes_triton_by_itself(monkeypatch):
    """The default on CUDA is the library op, fp32 takes torch, EOMT_KERNELS=torch agrees."""
    q, k, v = heads_of(qkv_of(1, 2, 300, 64, torch.bfloat16, "cuda"))
    bits = pack(random_mask(1, 20, 300, 30)).cuda()
    calls = []
    op = attention_module.masked_attention_op
    monkeypatch.setattr(attention_module, "masked_attention_op", lambda *a: calls.append(1) or op(*a))
    fused = masked_attention(q, k, v, bits, 20)
    masked_attention(q.float(), k.float(), v.float(), bits, 20)
    monkeypatch.setenv("EOMT_KERNELS", "torch")
    plain = masked_attention(q, k, v, bits, 20)
    assert len(calls) == 1
    torch.testing.assert_close(fused, plain, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@gpu
def test_gpu_empty_axes_and_rows_without_keys():
    for batch, rows, keys in ((0, 70, 70), (2, 0, 70), (2, 70, 0), (2, 70, 70)):
        q = torch.randn(batch, 2, rows, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.randn(batch, 2, keys, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        bits = torch.zeros(batch, min(rows, 3), math.ceil(keys / 32), dtype=torch.int32, device="cuda")
        out = masked_attention(q, k, v, bits, min(rows, 3))
        out.sum().backward()
        assert (out[:, :, :3] == 0).all() and out.isfinite().all() and q.grad.isfinite().all()


@pytest.mark.gpu
@gpu
def test_gpu_pack_equals_torch(monkeypatch):
    for size, grid in (((160, 160), (40, 40)), ((320, 320), (80, 80)), ((96, 128), (27, 31))):
        logits = torch.randn(2, 200, *size, device="cuda").bfloat16()
        noise = torch.rand(2, 200, device="cuda")
        arguments = (logits, grid, 205, 205 + grid[0] * grid[1], torch.tensor(0.5, device="cuda"), noise)
        monkeypatch.setenv("EOMT_KERNELS", "triton")
        fused = attention_module.unpack(pack_mask(*arguments), arguments[3])
        monkeypatch.setenv("EOMT_KERNELS", "torch")
        plain = attention_module.unpack(pack_mask(*arguments), arguments[3])
        wrong = (fused != plain).float().mean().item()
        # Odd weights may round to either side of 0.
        assert wrong <= (0 if size[0] == 4 * grid[0] else 1e-5), (size, wrong)


@pytest.mark.gpu
@gpu
def test_gpu_compiled_training_step_equals_reference(monkeypatch):
    """Whole-model step under autocast, compiled with the ops against eager torch."""
    eomt = pytest.importorskip("eomt")
    encoder = eomt.ViT(128, 4, 2, patch=16, grid=(10, 10))
    model = eomt.EoMT(encoder, num_classes=5, num_queries=20, num_blocks=2).cuda()
    pixels = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8, device="cuda")
    noise, prob = torch.rand(2, 2, 20, device="cuda"), torch.tensor([0.5, 1.0], device="cuda")

    def step(run):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            predictions = run(pixels, prob, noise)
        loss = sum(p.masks.float().square().mean() + p.classes.float().square().mean() for p in predictions)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([loss.reshape(1), *(g.flatten() for g in grads)])

    monkeypatch.setenv("EOMT_KERNELS", "torch")
    plain = step(model)
    monkeypatch.delenv("EOMT_KERNELS")
    for run in (model, torch.compile(model)):
        assert error(step(run), plain.double()) < 5e-2


def test_any_bool_mask_in_bits_as_the_docstring_says():
    """Who copies masked_attention.py has a bool mask (B,Q,N), not mask logits on a grid."""
    keep, N = torch.rand(2, 5, 37) > 0.5, 37
    recipe = re.search(r"bits = (pack_mask\(keep.*\))  #", attention_module.__doc__)[1]
    bits = eval(recipe, dict(pack_mask=pack_mask, keep=keep, N=N))
    assert torch.equal(attention_module.unpack(bits, N), keep)
    assert "choose.py" in attention_module.__doc__
