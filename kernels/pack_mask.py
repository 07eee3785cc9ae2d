"""Mask logits to the bit mask of `masked_attention`: resize, threshold, drop at random and pack, in one pass.

    bit n of (b, q) = n < prefix_columns or noise[b, q] >= keep_prob or resized[b, q, n - prefix_columns] > 0
    resized = F.interpolate(mask_logits, grid, mode="bilinear", align_corners=False)

Keys are [queries | prefix | patches]: the leading prefix_columns (queries and prefix) stay open, and so does
every key of a query that drops its mask. Bits that fill up the last word are 1. Only what the resize needs is
read: from 160 rows to 40 the 2 x 2 centre of each 4 x 4 cell.

In: mask_logits float (B, Q, mh, mw), any strides; grid (h, w); noise (B, Q) uniform in [0, 1).
Out: int32 (B, Q, ceil(num_keys / 32)), without gradient.

    bits = pack_mask(logits, (40, 40), 205, 1805, keep_prob=0.5, noise=torch.rand(2, 200))
"""
# SPDX-License-Identifier: MIT
import torch
import torch.nn.functional as F
from torch import Tensor

from .choose import jit, tl, triton, use_triton

WORDS = 8  # words a program packs: 256 bits for 4 warps
LAUNCH = dict(WORDS=WORDS, num_warps=4, num_stages=2, enable_fp_fusion=True)


# ---- plain torch ----

def pack_mask_ref(mask_logits, grid, prefix_columns, keep=None):
    """The formula above in torch; keep bool (B, Q) says which queries use their mask, None: all."""
    batch, queries = mask_logits.shape[:2]
    num_keys = prefix_columns + grid[0] * grid[1]
    words = (num_keys + 31) // 32
    # One channel each: with many, torch on CPU copies to channels last first, 5 times the work.
    single = mask_logits.detach().flatten(0, 1)[:, None]  # (B*Q, 1, mh, mw)
    resized = F.interpolate(single, size=grid, mode="bilinear", align_corners=False)  # (B*Q, 1, h, w)
    seen = (resized > 0).view(batch, queries, grid[0] * grid[1])  # (B, Q, h*w)
    if keep is not None:
        seen = seen | ~keep[..., None]
    seen = F.pad(seen, (prefix_columns, words * 32 - num_keys), value=True)  # (B, Q, words*32)
    bit = 1 << torch.arange(32, dtype=torch.int32, device=seen.device)
    return (seen.view(batch, queries, words, 32) * bit).sum(-1, dtype=torch.int32)  # (B, Q, words)


# ---- Triton ----

@jit
def _source(at, scale, size):
    """Two neighbours and the weight of the second, by the rule of F.interpolate without aligned corners."""
    place = tl.maximum((at.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    low = tl.minimum(place.to(tl.int32), size - 1)
    return low, tl.minimum(low + 1, size - 1), place - low.to(tl.float32)


@jit
def _pack_kernel(
    LOGITS,  # (B, Q, mh, mw)
    KEEP,  # bool (B, Q)
    BITS,  # int32 (B, Q, words), written
    sx, sk, sb, scale_y, scale_x, queries, mh, mw, w, prefix_columns, num_keys, words,
    WORDS: tl.constexpr,
):
    b = (tl.program_id(0) // queries).to(tl.int64)
    q = (tl.program_id(0) % queries).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, 32)[None, :]
    key = word[:, None] * 32 + bit  # (WORDS, 32)
    masked = tl.load(KEEP + b * sk[0] + q * sk[1]) != 0
    # a query that drops its mask reads nothing; no &, which Triton 3.9's interpreter refuses on a scalar here
    read = tl.where(masked, (key >= prefix_columns) & (key < num_keys), False)
    patch = key - prefix_columns
    y0, y1, wy = _source(patch // w, scale_y, mh)
    x0, x1, wx = _source(patch % w, scale_x, mw)
    at = LOGITS + b * sx[0] + q * sx[1]
    v00 = tl.load(at + y0 * sx[2] + x0 * sx[3], mask=read, other=1.0).to(tl.float32)
    v01 = tl.load(at + y0 * sx[2] + x1 * sx[3], mask=read, other=1.0).to(tl.float32)
    v10 = tl.load(at + y1 * sx[2] + x0 * sx[3], mask=read, other=1.0).to(tl.float32)
    v11 = tl.load(at + y1 * sx[2] + x1 * sx[3], mask=read, other=1.0).to(tl.float32)
    value = (1.0 - wy) * ((1.0 - wx) * v00 + wx * v01) + wy * ((1.0 - wx) * v10 + wx * v11)
    # F.interpolate rounds to the dtype of the logits, where a tiny positive fp16 is 0.
    value = value.to(LOGITS.dtype.element_ty).to(tl.float32)
    seen = (value > 0) | ~read
    packed = tl.sum(seen.to(tl.int32) << bit, 1)  # the bits are disjoint: sum == or
    tl.store(BITS + b * sb[0] + q * sb[1] + word * sb[2], packed, mask=word < words)


# ---- launcher ----

def launch_pack(mask_logits, grid, prefix_columns, keep, bits):
    """Fill bits int32 (B, Q, words)."""
    batch, queries, mh, mw = mask_logits.shape
    num_keys = prefix_columns + grid[0] * grid[1]
    tensors = (mask_logits, keep, bits)
    with torch.cuda.device_of(bits):  # Triton launches on the current device, which may be another
        _pack_kernel[(batch * queries, triton.cdiv(bits.shape[2], WORDS))](
            *tensors, *(t.stride() for t in tensors), mh / grid[0], mw / grid[1], queries, mh, mw, grid[1],
            prefix_columns, num_keys, bits.shape[2], **LAUNCH)


def ahead_jobs(arch):
    """(name, kernel, constants and launch options) of what ships, the same on every architecture."""
    yield "pack_mask", _pack_kernel, dict(LAUNCH)


# ---- library op ----

@torch.library.custom_op("nanoeomt::pack_mask", mutates_args=())
def pack_mask_op(mask_logits: Tensor, keep: Tensor, height: int, width: int, prefix_columns: int) -> Tensor:
    """The Triton path: int32 (B, Q, ceil((prefix_columns + height * width) / 32))."""
    words = (prefix_columns + height * width + 31) // 32
    bits = mask_logits.new_empty(*mask_logits.shape[:2], words, dtype=torch.int32)  # (B, Q, words)
    launch_pack(mask_logits, (height, width), prefix_columns, keep, bits)
    return bits


@pack_mask_op.register_fake
def _(mask_logits, keep, height, width, prefix_columns):
    words = (prefix_columns + height * width + 31) // 32
    return mask_logits.new_empty(*mask_logits.shape[:2], words, dtype=torch.int32)  # (B, Q, words)


# ---- the public function ----

def _check(mask_logits, grid, prefix_columns, num_keys, keep_prob, noise):
    """Raise ValueError when the arguments do not fit each other."""
    shape = tuple(mask_logits.shape)
    if mask_logits.dim() != 4 or not mask_logits.is_floating_point():
        raise ValueError(f"kernels/pack_mask.py!mask_logits: {mask_logits.dtype} {shape} found; "
                         "pass floating logits (B, Q, mh, mw)")
    if prefix_columns + grid[0] * grid[1] != num_keys:
        raise ValueError(f"kernels/pack_mask.py!num_keys: {num_keys} is not {prefix_columns} open columns + "
                         f"grid {tuple(grid)}; pass queries + prefix + h*w")
    if noise is not None and noise.shape != mask_logits.shape[:2]:
        raise ValueError(f"kernels/pack_mask.py!noise: {tuple(noise.shape)}; pass torch.rand{shape[:2]}")
    if noise is None and not isinstance(keep_prob, Tensor) and keep_prob != 1:
        raise ValueError(f"kernels/pack_mask.py!noise: None for {keep_prob}; pass torch.rand{shape[:2]}")


def _keep(mask_logits, keep_prob, noise):
    """bool (B, Q): which queries use their mask; None: all. Without noise a tensor is taken as 0 or 1."""
    if noise is not None:
        return noise < keep_prob
    if isinstance(keep_prob, Tensor):
        return (keep_prob > 0).expand(mask_logits.shape[:2])
    return None


def _against(mask_logits):
    """Why Triton cannot take the logits, or ""."""
    if mask_logits.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return ""
    return f"dtype {mask_logits.dtype} is none of float32, float16, bfloat16"


def pack_mask(mask_logits: Tensor, grid: tuple[int, int], prefix_columns: int, num_keys: int,
              keep_prob: float | Tensor = 1.0, noise: Tensor | None = None) -> Tensor:
    """mask_logits (B, Q, mh, mw) -> int32 (B, Q, ceil(num_keys / 32)); num_keys = prefix_columns + h*w.

    A query keeps its mask where noise (B, Q) < keep_prob: 1 masks all, 0 opens all. A 0-d tensor spares
    torch.compile a recompilation per value. Raises ValueError where the arguments do not fit each other."""
    _check(mask_logits, grid, prefix_columns, num_keys, keep_prob, noise)
    keep = _keep(mask_logits, keep_prob, noise)
    if not use_triton("pack_mask", mask_logits, _against(mask_logits)):
        return pack_mask_ref(mask_logits, grid, prefix_columns, keep)
    if keep is None:
        keep = mask_logits.new_ones(mask_logits.shape[:2], dtype=torch.bool)  # (B, Q)
    return pack_mask_op(mask_logits.detach(), keep, grid[0], grid[1], prefix_columns)
