"""Which kept query owns each pixel of the original image, and the areas that decide which segments stay.

    logit[q] = resize(resize(masks[q], window)[:content[0], :content[1]], size)     both bilinear
    owner    = argmax over q of scores[q] * sigmoid(logit[q]), the first of equals, where the owner's own
               sigmoid >= mask_threshold; elsewhere k
    areas[q] = pixels with sigmoid(logit[q]) >= mask_threshold, pixels whose argmax is q, pixels with both

In one pass: the resizes are separable and linear, so an output pixel needs 2 or (two resizes) 4 mask rows and
columns, and no (k, H, W) tensor is ever made. A NaN logit owns nothing in Triton.

In: masks float (k, mh, mw), any strides, k >= 1; scores float (k,); window, content and size (h, w).
Out: owner int32 (H, W), areas int64 (3, k), without gradient. fp32 arithmetic; counts are integers, so their
atomics are bitwise repeatable.

    owner, areas = panoptic_merge(masks[keep], scores[keep], (640, 640), (480, 640), (960, 1280))
"""
# SPDX-License-Identifier: MIT
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .choose import jit, tl, triton, use_triton
from .pack_mask import _against, _source

# pixels of a program; BH * BW < 2^16, see _merge_kernel
TILE = dict(BH=16, BW=32, num_warps=8, num_stages=2, enable_fp_fusion=True)


# ---- plain torch ----

_BLOCK, _STRIP = 1 << 18, 1 << 21  # values of a block of logits and of a strip resized along x: cache sizes


def _neighbours(at, old, new):
    """Rows low and high that row `at` of a resize from `old` to `new` rows mixes, and the weight of high."""
    # In float64, rounded once: F.interpolate's fp32 product and sum are fused.
    scale = torch.tensor(old / new, dtype=torch.float32).item()
    place = ((at.double() + 0.5) * scale - 0.5).float().clamp(min=0)
    low = place.long()  # at most old - 1: place < old - 0.5
    return low, (low + 1).clamp(max=old - 1), (place - low)[:, None]


def _taps(mask, window, content, size, device):
    """An axis: neighbours in the mask of the one or two window rows that make an output row, their weight."""
    low, high, weight = _neighbours(torch.arange(size), content, size)
    rows = (low,) if content == size else (low, high)
    pairs = [[t.to(device) for t in _neighbours(row, mask, window)] for row in rows]
    return pairs, weight.to(device)


def _stretch(x, taps, part):
    """x (k, n, c) -> (k, n', c): both resizes along axis 1, of whose rows only `part` is made."""
    ends = [torch.lerp(x.index_select(1, low[part]), x.index_select(1, high[part]), weight[part])
            for low, high, weight in taps[0]]
    return ends[0] if len(ends) == 1 else torch.lerp(*ends, taps[1][part])


def _blocks(masks, window, content, size):
    """(where, logits (k, H, W)[where]) block by block: memory grows with neither k nor H nor W."""
    k, mh, mw = masks.shape
    down, across = (_taps(*axis, masks.device) for axis in zip((mh, mw), window, content, size, strict=True))
    turned = masks.detach().float().mT.contiguous()  # (k, mw, mh); rows of memory are what index_select likes
    width = min(size[1], max(1, _STRIP // (k * mh)))
    height = max(1, _BLOCK // (k * width))
    for x in range(0, size[1], width):
        columns = slice(x, x + width)
        strip = _stretch(turned, across, columns).mT.contiguous()  # (k, mh, W')
        for y in range(0, size[0], height):
            rows = slice(y, y + height)
            yield (slice(0, k), rows, columns), _stretch(strip, down, rows)  # (k, H', W')


def restored(masks: Tensor, window, content, size) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """Masks (k, mh, mw) -> (where, logits (k, H, W)[where]), the logit of the formula above in parts."""
    if masks.device.type == "cpu":
        yield from _blocks(masks, window, content, size)
        return
    step = max(1, (1 << 26) // max(size[0] * size[1], window[0] * window[1]))  # few launches, 256 MB
    for first in range(0, len(masks), step):
        part = F.interpolate(masks[None, first:first + step].detach().float(), tuple(window), mode="bilinear")
        part = F.interpolate(part[..., :content[0], :content[1]], tuple(size), mode="bilinear")
        yield (slice(first, first + part.shape[1]),), part[0]  # (k', H, W)


def panoptic_merge_ref(masks, scores, window, content, size, mask_threshold):
    """The formula above in torch, in blocks that stay in cache; comparing into floats is 4 times faster."""
    k = len(masks)
    scores = scores.detach().float()[:, None, None]  # (k, 1, 1)
    rank = torch.arange(k, 0, -1.0, device=masks.device)[:, None, None]  # (k, 1, 1) the first has the highest
    owner = torch.empty(size, dtype=torch.int32, device=masks.device)  # (H, W)
    own, won = masks.new_zeros(k, dtype=torch.int64), masks.new_zeros(2 * k, dtype=torch.int64)
    for where, logits in _blocks(masks, window, content, size):
        prob = logits.sigmoid_()  # (k, H', W')
        on = torch.ge(prob, mask_threshold, out=torch.empty_like(prob))  # (k, H', W')
        own += on.flatten(1).sum(1).long()  # exact: a block has less than 2^24 pixels
        value = prob.mul_(scores)  # (k, H', W')
        first = torch.eq(value, value.amax(0), out=value).mul_(rank).amax(0)  # (H', W') rank of the owner
        code = (k - first).long().clamp_(max=k - 1)  # (H', W')
        code += k * (on.gather(0, code[None])[0] == 0)  # + k outside the owner's own mask
        won += code.flatten().bincount(minlength=2 * k)
        owner[where[1:]] = code.clamp_(max=k)
    inside, outside = won.view(2, k)
    return owner, torch.stack((own, inside + outside, inside))


# ---- Triton ----

@jit
def _mixed(at, scale, mask, scale2, content):
    """Four mask rows and their weights for output row `at`; the last two weigh 0 where content == size."""
    low, high, weight = _source(at, scale2, content)
    a, b, first = _source(low, scale, mask)
    c, d, second = _source(high, scale, mask)
    near, far = 1.0 - weight, weight
    return (a, b, c, d), (near * (1.0 - first), near * first, far * (1.0 - second), far * second)


@jit
def _merge_kernel(
    LOGITS,  # (k, mh, mw)
    SCORES,  # fp32 (k,)
    OWNER,  # int32 (H, W), written
    AREAS,  # int32 (3, k), added to
    # floats are called scale_*: ahead.py takes other numbers for integers
    sl, ss, sw, sa, scale_y, scale_x, scale_y2, scale_x2, scale_threshold, k, mh, mw, h, w, height, width,
    TAPS: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
):
    tiles = tl.cdiv(width, BW)
    y = tl.program_id(0) // tiles * BH + tl.arange(0, BH)
    x = tl.program_id(0) % tiles * BW + tl.arange(0, BW)
    real = (y < height)[:, None] & (x < width)[None, :]  # (BH, BW); pixels past the edge repeat the last one
    rows, row_weights = _mixed(tl.minimum(y, height - 1), scale_y, mh, scale_y2, h)
    columns, column_weights = _mixed(tl.minimum(x, width - 1), scale_x, mw, scale_x2, w)
    best = tl.full((BH, BW), -1.0, tl.float32)
    owner = tl.zeros((BH, BW), tl.int32)
    inside = tl.zeros((BH, BW), tl.int32)
    at = LOGITS
    for q in range(k):
        logit = tl.zeros((BH, BW), tl.float32)
        for i in tl.static_range(TAPS):
            line = tl.zeros((BH, BW), tl.float32)
            for j in tl.static_range(TAPS):
                value = tl.load(at + rows[i][:, None] * sl[1] + columns[j][None, :] * sl[2])  # (BH, BW)
                line += column_weights[j][None, :] * value.to(tl.float32)
            logit += row_weights[i][:, None] * line
        prob = tl.sigmoid(logit)
        on = (prob >= scale_threshold).to(tl.int32)
        value = prob * tl.load(SCORES + q * ss[0])
        better = value > best  # strictly: the first of equals stays
        best = tl.where(better, value, best)
        owner = tl.where(better, q, owner)
        inside = tl.where(better, on, inside)
        count = tl.sum(tl.where(real, on, 0))
        tl.atomic_add(AREAS + q * sa[1], count, mask=count > 0)
        at += sl[0]
    one = tl.where(real, 1 + (inside << 16), 0)  # both counts of a query in one sum
    for q in range(k):
        count = tl.sum(tl.where(owner == q, one, 0))
        tl.atomic_add(AREAS + sa[0] + q * sa[1], count & 0xFFFF, mask=count > 0)
        tl.atomic_add(AREAS + 2 * sa[0] + q * sa[1], count >> 16, mask=count > 0)
    where = OWNER + y.to(tl.int64)[:, None] * sw[0] + x[None, :] * sw[1]  # 64 bits: gigapixel photos
    tl.store(where, tl.where(inside != 0, owner, k), mask=real)


# ---- launcher ----

def launch_merge(masks, scores, window, content, size, mask_threshold, owner, areas):
    """Fill owner int32 (H, W) and add to areas int32 (3, k)."""
    k, mh, mw = masks.shape
    assert scores.dtype == torch.float32 and owner.dtype == areas.dtype == torch.int32, (scores, owner, areas)
    assert scores.shape == (k,) and owner.shape == tuple(size) and areas.shape == (3, k), (owner, areas)
    assert owner.numel() < 2**31, f"{tuple(size)}: the counts are int32"
    tensors = (masks, scores, owner, areas)
    with torch.cuda.device_of(masks):  # Triton launches on the current device, which may be another
        _merge_kernel[(triton.cdiv(size[0], TILE["BH"]) * triton.cdiv(size[1], TILE["BW"]),)](
            *tensors, *(t.stride() for t in tensors), mh / window[0], mw / window[1], content[0] / size[0],
            content[1] / size[1], mask_threshold, k, mh, mw, *content, *size,
            TAPS=2 if tuple(content) == tuple(size) else 4, **TILE)


def ahead_jobs(arch: int) -> Iterator[tuple]:
    """(name, kernel, constants and launch options) of what ships, the same on every architecture."""
    for taps in (2, 4):
        yield f"panoptic_merge {taps} taps", _merge_kernel, dict(TAPS=taps, **TILE)


# ---- library op ----

@torch.library.custom_op("nanoeomt::panoptic_merge", mutates_args=())
def panoptic_merge_op(masks: Tensor, scores: Tensor, window: Sequence[int], content: Sequence[int],
                      size: Sequence[int], mask_threshold: float) -> tuple[Tensor, Tensor]:
    """The Triton path: int32 (H, W) and int64 (3, k)."""
    owner = masks.new_empty(size, dtype=torch.int32)  # (H, W)
    areas = masks.new_zeros(3, len(masks), dtype=torch.int32)  # (3, k)
    launch_merge(masks, scores.float(), window, content, size, mask_threshold, owner, areas)
    return owner, areas.long()


@panoptic_merge_op.register_fake
def _(masks, scores, window, content, size, mask_threshold):
    return masks.new_empty(size, dtype=torch.int32), masks.new_empty(3, len(masks), dtype=torch.int64)


# ---- the public function ----

def _check(masks, scores, window, content, size):
    """Raise ValueError when the arguments do not fit each other."""
    shape, where = tuple(masks.shape), "kernels/panoptic_merge.py!"
    if masks.dim() != 3 or not masks.is_floating_point() or 0 in shape:
        raise ValueError(f"{where}masks: {masks.dtype} {shape} found; "
                         "pass floating logits (k, mh, mw) of one query or more")
    if scores.shape != shape[:1] or not scores.is_floating_point():
        raise ValueError(f"{where}scores: {scores.dtype} {tuple(scores.shape)}; pass one float "
                         f"for each of {shape[0]} masks")
    for name, pair in dict(window=window, content=content, size=size).items():
        if len(pair) != 2 or min(pair) < 1:
            raise ValueError(f"{where}{name}: {tuple(pair)}; pass a height and a width of at least 1")
    if content[0] > window[0] or content[1] > window[1]:
        raise ValueError(f"{where}content: {tuple(content)} is not inside the window {tuple(window)}")


def panoptic_merge(masks: Tensor, scores: Tensor, window, content, size,
                   mask_threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """masks (k, mh, mw), scores (k,) -> owner int32 (H, W), k = nobody; areas int64 (3, k): own, won, both.

    window: (h, w) of the network's input; content: (h, w) of the image in it, without padding; size: (H, W).
    Raises ValueError where the arguments do not fit each other. No host waits on the Triton path."""
    _check(masks, scores, window, content, size)
    if not use_triton("panoptic_merge", masks, _against(masks)):
        return panoptic_merge_ref(masks, scores, window, content, size, mask_threshold)
    return panoptic_merge_op(masks.detach(), scores.detach(), window, content, size, mask_threshold)
