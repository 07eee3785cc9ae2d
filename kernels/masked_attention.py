"""Attention whose first rows carry a bit mask over the keys (EoMT's masked attention).

    out[b, h, m] = sum_n softmax_n(q[m] . k[n] / sqrt(hd), over the keys n that row m may look at) v[n]

Row m < num_masked_rows may look at key n where bit n % 32 of bits[b, m, n // 32] is set; later rows look
everywhere. A row without a key returns 0 and passes no gradient.

In: q (B, nh, M, hd), k and v (B, nh, N, hd), any strides; bits int32 (B, num_masked_rows, ceil(N / 32)).
Out: (B, nh, M, hd), a view of (B, M, nh, hd) memory, so that the output projection needs no copy.
Triton: fp16 and bf16 with the head sizes of HEAD_SIZES. fp32 accumulation, no atomics: bitwise repeatable.

    bits = pack_mask(keep[:, :, None].float() - 0.5, (1, N), 0, N)  # of any bool mask keep (B, Q, N)
    out = masked_attention(q, k, v, bits, num_masked_rows=Q)  # copied, it needs choose.py beside it
"""
# SPDX-License-Identifier: MIT
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .choose import INTERPRET, cast, jit, tl, triton, use_triton

# Head size -> columns of its two tiles: matrix units want powers of two, and 72 padded to 128 wastes 44 %.
HEAD_SIZES = {16: (16, 0), 32: (32, 0), 64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32), 128: (128, 0)}

# (rows, keys, warps, stages) per pass and largest head size: the largest without spills in triton 3.6, 3.7.
# "big": Hopper, data-centre Blackwell (227 KiB of shared memory); "small": the rest (consumer cards: 99 KiB).
CONFIGS = {
    "big": {"forward": {128: (128, 64, 8, 3)},
            "grad_q": {128: (128, 64, 8, 2)},
            "grad_kv": {64: (64, 128, 8, 2), 128: (32, 128, 8, 2)}},
    "small": {"forward": {32: (128, 32, 4, 3), 64: (128, 64, 4, 3), 96: (128, 32, 4, 3),
                          128: (128, 64, 8, 2)},
              "grad_q": {96: (128, 32, 8, 2), 128: (64, 32, 4, 2)},
              "grad_kv": {64: (32, 128, 8, 2), 80: (32, 64, 8, 2), 96: (32, 64, 4, 1), 128: (32, 64, 8, 2)}},
}


# ---- plain torch ----

def unpack(bits, num_keys):
    """bits int32 (B, Q, W) -> bool (B, Q, num_keys)."""
    bit = 1 << torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits[..., None] & bit) != 0).flatten(-2)[..., :num_keys]  # (B, Q, N)


def masked_attention_ref(q, k, v, bits, num_masked_rows):
    """The formula above in torch: masked and dense rows apart, the vendor's flash attention takes no mask."""
    keep = unpack(bits, k.shape[2])[:, None]  # (B, 1, Q, N)
    if q.device.type == "cpu" and k.shape[2] < 1024:
        return _joint(q, k, v, keep)
    empty = ~keep.any(-1, keepdim=True)  # (B, 1, Q, 1)
    masked, dense = q.split((num_masked_rows, q.shape[2] - num_masked_rows), 2)  # (B, nh, Q | M-Q, hd)
    # Back ends disagree on a row without keys (0 or NaN): open it, then zero its output.
    masked = F.scaled_dot_product_attention(masked, k, v, attn_mask=keep | empty).masked_fill(empty, 0.0)
    dense = F.scaled_dot_product_attention(dense, k, v)  # (B, nh, M-Q, hd)
    return torch.cat((masked.transpose(1, 2), dense.transpose(1, 2)), 1).transpose(1, 2)  # (B, nh, M, hd)


def _joint(q, k, v, keep):
    """One call with a (B, 1, M, N) additive mask: on CPU a second call costs more than a small mask.

    Forward + backward on one core: 81 keys 0.63 ms against 0.77 split, 1805 keys 177 ms against 163 split."""
    mask = torch.where(keep, 0.0, -math.inf).to(q.dtype)  # (B, 1, Q, N); a row of -inf gives 0 on CPU, no NaN
    mask = F.pad(mask, (0, 0, 0, q.shape[2] - keep.shape[2]))  # (B, 1, M, N)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, nh, M, hd)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


# ---- Triton: pieces. A "pair" is a tile of HD columns cut in D1 + D2; D2 = 0: the second half is unused ----

@jit
def _dot(a, b, acc):
    """acc + a @ b in fp32; the interpreter multiplies bf16 as integers, so it gets fp32."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def _dot_pairs(a, b, D2: tl.constexpr):
    """a @ b.T over both halves, fp32."""
    out = _dot(a[0], tl.trans(b[0]), tl.zeros((a[0].shape[0], b[0].shape[0]), tl.float32))
    if D2 > 0:
        out = _dot(a[1], tl.trans(b[1]), out)
    return out


@jit
def _add_pair(acc, p, b, D2: tl.constexpr):
    """acc + p @ b for each half."""
    p = cast(p, b[0].dtype)
    two = acc[1]
    if D2 > 0:
        two = _dot(p, b[1], two)
    return _dot(p, b[0], acc[0]), two


@jit
def _load_half(at, rows, limit, stride, FIRST: tl.constexpr, COUNT: tl.constexpr, HD: tl.constexpr,
               BOUND: tl.constexpr):
    cols = FIRST + tl.arange(0, COUNT)
    where = at + rows[:, None] * stride[2] + cols[None, :] * stride[3]
    if FIRST + COUNT > HD:
        return tl.load(where, mask=(rows < limit)[:, None] & (cols < HD)[None, :], other=0.0)
    if BOUND:
        return tl.load(where, mask=(rows < limit)[:, None], other=0.0)
    return tl.load(where)


@jit
def _load(at, rows, limit, stride, HD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BOUND: tl.constexpr):
    """Pair of rows of the (limit, HD) matrix at `at`, 0 outside it; BOUND: rows may pass limit."""
    one = _load_half(at, rows, limit, stride, 0, D1, HD, BOUND)
    two = one
    if D2 > 0:
        two = _load_half(at, rows, limit, stride, D1, D2, HD, BOUND)
    return one, two


@jit
def _store(at, rows, limit, stride, pair, HD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Write what _load would read."""
    where = at + rows[:, None] * stride[2]
    cols = tl.arange(0, D1)[None, :]
    inside = (rows < limit)[:, None]
    tl.store(where + cols * stride[3], cast(pair[0], at.dtype.element_ty), mask=inside)
    if D2 > 0:
        cols = D1 + tl.arange(0, D2)[None, :]
        tl.store(where + cols * stride[3], cast(pair[1], at.dtype.element_ty), mask=inside & (cols < HD))


@jit
def _head(at, stride, nh):
    """Where this program's (image, head) starts; 64 bits, a batch may pass 2^31 elements."""
    at += (tl.program_id(1) // nh).to(tl.int64) * stride[0]
    return at + (tl.program_id(1) % nh).to(tl.int64) * stride[1]


@jit
def _keep(BITS, sb, nh, rows, num_masked, start, N, BM: tl.constexpr, BN: tl.constexpr):
    """bool (BM, BN): may the row see key start + j? Rows past num_masked see all, keys past N are closed."""
    word = start // 32 + tl.arange(0, BN // 32)
    at = BITS + (tl.program_id(1) // nh).to(tl.int64) * sb[0] + rows[:, None] * sb[1] + word[None, :] * sb[2]
    inside = (rows < num_masked)[:, None] & (word < tl.cdiv(N, 32))[None, :]
    packed = tl.load(at, mask=inside, other=-1)  # each word is read once and fanned out in registers
    keep = tl.reshape((packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1, (BM, BN)) != 0
    return keep & (start + tl.arange(0, BN) < N)[None, :]


# ---- Triton: forward ----

@jit
def _forward_step(q, K, V, BITS, rows, start, peak, total, acc, sk, sv, sb, scale, nh, N, num_masked,
                  HD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  GENERAL: tl.constexpr):
    """One tile of keys of the online softmax. GENERAL: read the bits and mind the last key."""
    keys = start + tl.arange(0, BN)
    s = _dot_pairs(q, _load(K, keys, N, sk, HD, D1, D2, GENERAL), D2)  # (BM, BN)
    if GENERAL:
        s = tl.where(_keep(BITS, sb, nh, rows, num_masked, start, N, BM, BN), s, -float("inf"))
    new = tl.maximum(peak, tl.max(s, 1) * scale)
    base = new
    if GENERAL:
        base = tl.where(new == -float("inf"), 0.0, new)  # no key so far: exp2(-inf - 0), not exp2(-inf + inf)
    p = tl.exp2(s * scale - base[:, None])
    fade = tl.exp2(peak - base)
    acc = acc[0] * fade[:, None], acc[1] * fade[:, None]
    acc = _add_pair(acc, p, _load(V, keys, N, sv, HD, D1, D2, GENERAL), D2)
    return new, total * fade + tl.sum(p, 1), acc


@jit
def _forward_kernel(
    Q,  # (B, nh, M, HD)
    K,  # (B, nh, N, HD)
    V,  # (B, nh, N, HD)
    BITS,  # int32 (B, num_masked, ceil(N / 32))
    OUT,  # (B, nh, M, HD), written
    LSE,  # fp32 (B, nh, M), written: log2 of the softmax's denominator, +inf for a row without a key
    sq, sk, sv, sb, so, sl,  # strides
    scale, nh, M, N, num_masked,  # scale holds log2(e): exp2 is the native instruction
    HD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    first = tl.program_id(0) * BM
    rows = first + tl.arange(0, BM)
    K = _head(K, sk, nh)
    V = _head(V, sv, nh)
    q = _load(_head(Q, sq, nh), rows, M, sq, HD, D1, D2, True)
    acc = tl.zeros((BM, D1), tl.float32), tl.zeros((BM, max(D2, 16)), tl.float32)
    peak = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    # Tiles of dense rows read no mask up to the last whole tile of keys.
    plain = tl.where(first < num_masked, 0, N // BN * BN)
    for start in range(0, plain, BN):
        peak, total, acc = _forward_step(q, K, V, BITS, rows, start, peak, total, acc, sk, sv, sb,
                                         scale, nh, N, num_masked, HD, D1, D2, BM, BN, False)
    for start in range(plain, N, BN):
        peak, total, acc = _forward_step(q, K, V, BITS, rows, start, peak, total, acc, sk, sv, sb,
                                         scale, nh, N, num_masked, HD, D1, D2, BM, BN, True)
    some = total > 0
    total = tl.where(some, total, 1.0)  # a row without a key: acc is 0, and so is its output
    acc = acc[0] / total[:, None], acc[1] / total[:, None]
    _store(_head(OUT, so, nh), rows, M, so, acc, HD, D1, D2)
    lse = tl.where(some, peak + tl.log2(total), float("inf"))
    tl.store(_head(LSE, sl, nh) + rows * sl[2], lse, mask=rows < M)


# ---- Triton: backward ----

@jit
def _grad_q_step(q, grad, K, V, BITS, rows, start, lse, delta, dq, sk, sv, sb, scale, nh, N, num_masked,
                 HD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 GENERAL: tl.constexpr):
    """Add one tile of keys to the gradient of a tile of queries."""
    keys = start + tl.arange(0, BN)
    k = _load(K, keys, N, sk, HD, D1, D2, GENERAL)
    p = tl.exp2(_dot_pairs(q, k, D2) * scale - lse[:, None])  # (BM, BN)
    if GENERAL:
        p = tl.where(_keep(BITS, sb, nh, rows, num_masked, start, N, BM, BN), p, 0.0)
    dp = _dot_pairs(grad, _load(V, keys, N, sv, HD, D1, D2, GENERAL), D2)  # (BM, BN)
    return _add_pair(dq, p * (dp - delta[:, None]), k, D2)


@jit
def _grad_q_kernel(
    Q,  # (B, nh, M, HD)
    K,  # (B, nh, N, HD)
    V,  # (B, nh, N, HD)
    BITS,  # int32 (B, num_masked, ceil(N / 32))
    OUT,  # (B, nh, M, HD)
    GRAD,  # (B, nh, M, HD), gradient of OUT
    LSE,  # fp32 (B, nh, M)
    DELTA,  # fp32 (B, nh, M), written: GRAD . OUT per row, read by _grad_kv_kernel
    DQ,  # (B, nh, M, HD), written
    sq, sk, sv, sb, so, sg, sl, sd, sdq,  # strides
    scale, nh, M, N, num_masked,
    HD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    first = tl.program_id(0) * BM
    rows = first + tl.arange(0, BM)
    K = _head(K, sk, nh)
    V = _head(V, sv, nh)
    q = _load(_head(Q, sq, nh), rows, M, sq, HD, D1, D2, True)
    grad = _load(_head(GRAD, sg, nh), rows, M, sg, HD, D1, D2, True)
    out = _load(_head(OUT, so, nh), rows, M, so, HD, D1, D2, True)
    delta = tl.sum(grad[0].to(tl.float32) * out[0].to(tl.float32), 1)
    if D2 > 0:
        delta += tl.sum(grad[1].to(tl.float32) * out[1].to(tl.float32), 1)
    tl.store(_head(DELTA, sd, nh) + rows * sd[2], delta, mask=rows < M)
    lse = tl.load(_head(LSE, sl, nh) + rows * sl[2], mask=rows < M, other=float("inf"))
    dq = tl.zeros((BM, D1), tl.float32), tl.zeros((BM, max(D2, 16)), tl.float32)
    plain = tl.where(first < num_masked, 0, N // BN * BN)
    for start in range(0, plain, BN):
        dq = _grad_q_step(q, grad, K, V, BITS, rows, start, lse, delta, dq, sk, sv, sb,
                          scale, nh, N, num_masked, HD, D1, D2, BM, BN, False)
    for start in range(plain, N, BN):
        dq = _grad_q_step(q, grad, K, V, BITS, rows, start, lse, delta, dq, sk, sv, sb,
                          scale, nh, N, num_masked, HD, D1, D2, BM, BN, True)
    scale = scale * 0.6931471805599453  # ln 2 takes log2(e) out again
    _store(_head(DQ, sdq, nh), rows, M, sdq, (dq[0] * scale, dq[1] * scale), HD, D1, D2)


@jit
def _grad_kv_step(k, v, Q, GRAD, BITS, LSE, DELTA, first, start, dk, dv, sq, sg, sb, sl, sd,
                  scale, nh, M, N, num_masked,
                  HD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  MASKED: tl.constexpr):
    """Add one tile of rows to the gradients of a tile of keys and values; scores are transposed here."""
    rows = start + tl.arange(0, BM)
    lse = tl.load(LSE + rows * sl[2], mask=rows < M, other=float("inf"))  # +inf: a row past the end has p = 0
    delta = tl.load(DELTA + rows * sd[2], mask=rows < M, other=0.0)
    q = _load(Q, rows, M, sq, HD, D1, D2, True)
    grad = _load(GRAD, rows, M, sg, HD, D1, D2, True)
    p = tl.exp2(_dot_pairs(k, q, D2) * scale - lse[None, :])  # (BN, BM)
    if MASKED:
        p = tl.where(tl.trans(_keep(BITS, sb, nh, rows, num_masked, first, N, BM, BN)), p, 0.0)
    dp = _dot_pairs(v, grad, D2)  # (BN, BM)
    dv = _add_pair(dv, p, grad, D2)
    return _add_pair(dk, p * (dp - delta[None, :]), q, D2), dv


@jit
def _grad_kv_kernel(
    Q,  # (B, nh, M, HD)
    K,  # (B, nh, N, HD)
    V,  # (B, nh, N, HD)
    BITS,  # int32 (B, num_masked, ceil(N / 32))
    GRAD,  # (B, nh, M, HD), gradient of the output
    LSE,  # fp32 (B, nh, M)
    DELTA,  # fp32 (B, nh, M)
    DK,  # (B, nh, N, HD), written
    DV,  # (B, nh, N, HD), written
    sq, sk, sv, sb, sg, sl, sd, sdk, sdv,  # strides
    scale, nh, M, N, num_masked,
    HD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    first = tl.program_id(0) * BN
    keys = first + tl.arange(0, BN)
    Q = _head(Q, sq, nh)
    GRAD = _head(GRAD, sg, nh)
    LSE = _head(LSE, sl, nh)
    DELTA = _head(DELTA, sd, nh)
    k = _load(_head(K, sk, nh), keys, N, sk, HD, D1, D2, True)
    v = _load(_head(V, sv, nh), keys, N, sv, HD, D1, D2, True)
    dk = tl.zeros((BN, D1), tl.float32), tl.zeros((BN, max(D2, 16)), tl.float32)
    dv = tl.zeros((BN, D1), tl.float32), tl.zeros((BN, max(D2, 16)), tl.float32)
    dense = tl.cdiv(num_masked, BM) * BM  # the first tile of rows without a masked one
    for start in range(0, dense, BM):
        dk, dv = _grad_kv_step(k, v, Q, GRAD, BITS, LSE, DELTA, first, start, dk, dv, sq, sg, sb, sl, sd,
                               scale, nh, M, N, num_masked, HD, D1, D2, BM, BN, True)
    for start in range(dense, M, BM):
        dk, dv = _grad_kv_step(k, v, Q, GRAD, BITS, LSE, DELTA, first, start, dk, dv, sq, sg, sb, sl, sd,
                               scale, nh, M, N, num_masked, HD, D1, D2, BM, BN, False)
    scale = scale * 0.6931471805599453  # ln 2 takes log2(e) out again
    _store(_head(DK, sdk, nh), keys, N, sdk, (dk[0] * scale, dk[1] * scale), HD, D1, D2)
    _store(_head(DV, sdv, nh), keys, N, sdv, dv, HD, D1, D2)


# ---- launchers ----

def config(family, step, head_size):
    """Keyword arguments of one kernel's launch on "big" or "small" cards."""
    table = CONFIGS[family][step]
    rows, keys, warps, stages = table[min(size for size in table if size >= head_size)]
    first, second = HEAD_SIZES[head_size]
    return dict(HD=head_size, D1=first, D2=second, BM=rows, BN=keys, num_warps=warps, num_stages=stages,
                enable_fp_fusion=True)


def ahead_jobs(arch):
    """(name, kernel, constants and launch options) of what ships for an architecture, 80 or 90."""
    family = "big" if arch == 90 else "small"
    for size in HEAD_SIZES:
        for step, kernel in dict(forward=_forward_kernel, grad_q=_grad_q_kernel,
                                 grad_kv=_grad_kv_kernel).items():
            options = config(family, step, size)
            yield f"{step} hd {size} {options['BM']}x{options['BN']}", kernel, options


def _launch(kernel, step, axis, tensors, q, k, bits):
    """Run a kernel over tiles of the rows ("BM") or keys ("BN") of every (image, head)."""
    cuda = q.device.type == "cuda"
    big = cuda and torch.cuda.get_device_capability(q.device)[0] in (9, 10)
    options = config("big" if big else "small", step, q.shape[3])
    heads, tokens = q.shape[0] * q.shape[1], q.shape[2] if axis == "BM" else k.shape[2]
    assert heads < 65536, f"B * nh is the second axis of the grid, below 65536: {tuple(q.shape)}"
    scale = q.shape[3] ** -0.5 * math.log2(math.e)
    sizes = q.shape[1], q.shape[2], k.shape[2], bits.shape[1]
    grid = triton.cdiv(tokens, options[axis]), heads
    with torch.cuda.device_of(q):  # Triton launches on the current device, which may be another
        kernel[grid](*tensors, *(t.stride() for t in tensors), scale, *sizes, **options)


def launch_forward(q, k, v, bits, out, lse):
    """Fill out (B, nh, M, hd) and lse fp32 (B, nh, M)."""
    _launch(_forward_kernel, "forward", "BM", (q, k, v, bits, out, lse), q, k, bits)


def launch_backward(grad, q, k, v, bits, out, lse, delta, dq, dk, dv):
    """Fill delta fp32 (B, nh, M), dq (B, nh, M, hd), dk and dv (B, nh, N, hd)."""
    _launch(_grad_q_kernel, "grad_q", "BM", (q, k, v, bits, out, grad, lse, delta, dq), q, k, bits)
    _launch(_grad_kv_kernel, "grad_kv", "BN", (q, k, v, bits, grad, lse, delta, dk, dv), q, k, bits)


# ---- library ops ----

def _token_major(like):
    """Empty (B, nh, M, hd) whose memory is (B, M, nh, hd)."""
    batch, heads, rows, size = like.shape
    return like.new_empty(batch, rows, heads, size).transpose(1, 2)


@torch.library.custom_op("nanoeomt::masked_attention", mutates_args=())
def masked_attention_op(q: Tensor, k: Tensor, v: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """The Triton forward: out (B, nh, M, hd) and, for backward, lse fp32 (B, nh, M)."""
    out, lse = _token_major(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    launch_forward(q, k, v, bits, out, lse)
    return out, lse


@masked_attention_op.register_fake
def _(q, k, v, bits):
    return _token_major(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("nanoeomt::masked_attention_backward", mutates_args=())
def masked_attention_backward_op(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bits: Tensor, out: Tensor,
                                 lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton backward: gradients of q, k and v."""
    dq, dk, dv = _token_major(q), _token_major(k), _token_major(v)
    launch_backward(grad, q, k, v, bits, out, lse, torch.empty_like(lse), dq, dk, dv)
    return dq, dk, dv


@masked_attention_backward_op.register_fake
def _(grad, q, k, v, bits, out, lse):
    return _token_major(q), _token_major(k), _token_major(v)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, grad, grad_lse):
    return *masked_attention_backward_op(grad, *ctx.saved_tensors), None


masked_attention_op.register_autograd(_backward, setup_context=_save)


# ---- the public function ----

def _check(q, k, v, bits, num_masked_rows):
    """Raise ValueError when shapes or dtypes do not fit each other."""
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"kernels/masked_attention.py!dtype: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; "
                         "cast them to one dtype")
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3:] != k.shape[3:]:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(f"kernels/masked_attention.py!shape: q, k, v are {shapes}; "
                         "pass (B, nh, M, hd), (B, nh, N, hd), (B, nh, N, hd)")
    wanted = (q.shape[0], num_masked_rows, (k.shape[2] + 31) // 32)
    if bits.dtype != torch.int32 or bits.shape != wanted or num_masked_rows > q.shape[2]:
        found = f"{bits.dtype} {tuple(bits.shape)} on {q.shape[2]} rows"
        raise ValueError(f"kernels/masked_attention.py!bits: {found} is not int32 {wanted}; "
                         f"make it with pack_mask(..., num_keys={k.shape[2]})")


def _against(q):
    """Why Triton cannot take q, or ""."""
    if q.shape[3] not in HEAD_SIZES:
        return f"head size {q.shape[3]} is none of {', '.join(map(str, HEAD_SIZES))}"
    if q.dtype not in (torch.float16, torch.bfloat16) and not (INTERPRET and q.dtype == torch.float32):
        return f"dtype {q.dtype} is neither float16 nor bfloat16"
    return ""


def masked_attention(q: Tensor, k: Tensor, v: Tensor, bits: Tensor, num_masked_rows: int) -> Tensor:
    """q (B, nh, M, hd), k, v (B, nh, N, hd), bits int32 (B, num_masked_rows, ceil(N / 32)) -> (B, nh, M, hd).

    One floating dtype (autocast's under autocast), differentiable. Raises ValueError on what does not fit."""
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    _check(q, k, v, bits, num_masked_rows)
    if use_triton("masked_attention", q, _against(q)):
        return masked_attention_op(q, k, v, bits)[0]
    return masked_attention_ref(q, k, v, bits, num_masked_rows)
