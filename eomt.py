"""Encoder-only Mask Transformer (EoMT): a plain ViT encodes image patches and segmentation queries together.

In: images (B,3,H,W), uint8 or 0..255 float, H and W multiples of the patch size; the model normalises them.
Out: a list of `Prediction(masks, classes)` logits, last = final; `segment` takes images of any size.
In this order: the ViT encoder, EoMT, EoMT with open classes, post-processing and `segment`, checkpoints.

    model = load("runs/quick")                       # ours, model-zoo .bin, Lightning .ckpt, Hugging Face
    result = segment(model, [photo], "panoptic")[0]  # photo uint8 (3,H,W) -> Panoptic(ids, labels, scores)
"""
# SPDX-License-Identifier: MIT
import contextlib
import copy
import hashlib
import json
import math
import os
import pickle
import re
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:
    from kernels import mask_product, masked_attention, pack_mask, packed, panoptic_merge, restored, upscale
except ImportError:  # this file copied alone: the same numbers in plain torch; the story begins at "Encoder"
    mask_product = partial(torch.einsum, "bqc,bhwc->bqhw")  # mask logits
    packed = nn.Identity()

    def pack_mask(mask_logits, grid, prefix_columns, num_keys, keep_prob=1.0, noise=None):
        """Mask logits (B,Q,mh,mw) -> bool (B,Q,num_keys): may query q look at key n?"""
        allowed = F.interpolate(mask_logits.float(), grid, mode="bilinear").flatten(2) > 0  # (B, Q, h*w)
        if noise is not None:
            allowed = allowed | (noise >= keep_prob)[..., None]  # (B, Q, h*w)
        return F.pad(allowed, (prefix_columns, num_keys - prefix_columns - allowed.shape[-1]), value=True)

    def masked_attention(q, k, v, bits, num_masked_rows):
        """SDPA in two parts: the first `num_masked_rows` rows see what `bits` allows, the others all keys."""
        n = num_masked_rows
        rows = F.scaled_dot_product_attention(q[:, :, :n], k, v, attn_mask=bits[:, None])  # (B, nh, n, hd)
        return torch.cat([rows, F.scaled_dot_product_attention(q[:, :, n:], k, v)], 2)  # (B, nh, N, hd)

    def restored(masks, window, content, size):
        """Mask logits (k,mh,mw) of a padded window -> (where, the image's (k,H,W)[where]), one at a time."""
        for q in range(len(masks)):
            logits = F.interpolate(masks[None, q:q + 1].detach().float(), window, mode="bilinear")
            logits = F.interpolate(logits[..., :content[0], :content[1]], size, mode="bilinear")
            yield (slice(q, q + 1),), logits[0]  # (1, H, W)

    def panoptic_merge(masks, scores, window, content, size, mask_threshold=0.5):
        """The query int32 (H,W) with the highest score * probability, k where that is outside its own mask;
        int64 (3,k): pixels of each mask, pixels where its query is the highest, pixels that are both."""
        best = torch.full(size, -1.0, device=masks.device)  # (H, W) highest so far
        owner = torch.zeros(size, dtype=torch.int64, device=masks.device)  # (H, W), + k outside its mask
        own, k = [], len(masks)
        for q, (_, logits) in enumerate(restored(masks, window, content, size)):
            prob = logits[0].sigmoid()  # (H, W)
            inside, value = prob >= mask_threshold, prob * scores[q]  # (H, W) x 2
            own.append(inside.count_nonzero())
            owner = torch.where(value > best, torch.where(inside, q, q + k), owner)
            best = torch.maximum(best, value)
        both, outside = owner.flatten().bincount(minlength=2 * k).view(2, k)
        return owner.clamp(max=k).int(), torch.stack([torch.stack(own), both + outside, both])

    def upscale(x, weight1, bias1, weight2, gain, shift, eps):
        """(B,h,w,C) -> (B,2h,2w,C): ConvTranspose 2x2, GELU, depthwise 3x3, LayerNorm over channels."""
        x = F.gelu(F.conv_transpose2d(x.permute(0, 3, 1, 2), weight1, bias1, stride=2))  # (B, C, 2h, 2w)
        x = F.conv2d(x, weight2, padding=1, groups=len(gain)).permute(0, 2, 3, 1)  # (B, 2h, 2w, C)
        return F.layer_norm(x, gain.shape, gain, shift, eps)


# ---- Encoder: a plain ViT, as DINOv2 (position table) or as DINOv3 (RoPE, keys without bias) -------------
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Sizes of the DINOv2 and DINOv3 papers; num_blocks = blocks that see the queries, EoMT paper sec. 4.
ENCODERS = {
    "tiny": dict(width=96, depth=5, heads=4, patch=8),  # for the procedural world of train.py --quick
    "dinov2_small": dict(width=384, depth=12, heads=6),
    "dinov2_base": dict(width=768, depth=12, heads=12),
    "dinov2_large": dict(width=1024, depth=24, heads=16),
    "dinov2_giant": dict(width=1536, depth=40, heads=24, ffn=4096, swiglu=True),
    "dinov3_small": dict(width=384, depth=12, heads=6, rope=100.0, eps=1e-5),
    "dinov3_base": dict(width=768, depth=12, heads=12, rope=100.0, eps=1e-5),
    "dinov3_large": dict(width=1024, depth=24, heads=16, rope=100.0, eps=1e-5),
}


def constant(value) -> Tensor:
    """A tensor that is always real, also where the rest of a model is built on "meta", without memory."""
    return torch.tensor(value, device="cpu" if torch.get_default_device().type == "meta" else None)


class Attention(nn.Module):
    def __init__(self, width, heads, key_bias):
        super().__init__()
        assert width % heads == 0, f"width {width} does not split into {heads} heads"
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        # Under RoPE a key bias would not cancel in the softmax, so DINOv3's missing one is held at zero.
        used = None if key_bias else constant([1.0, 0.0, 1.0]).repeat_interleave(width)  # (3*C,)
        self.register_buffer("bias_used", used, persistent=False)

    def forward(self, x, attend):
        used = self.bias_used
        x = self.qkv(x) if used is None else F.linear(x, self.qkv.weight, self.qkv.bias * used)  # (B, N, 3*C)
        q, k, v = x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, nh, N, hd), views
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))  # (B, N, C)


class Mlp(nn.Module):
    def __init__(self, width, hidden, swiglu):
        super().__init__()
        self.swiglu = swiglu
        self.fc1 = nn.Linear(width, 2 * hidden if swiglu else hidden)  # SwiGLU packs [gate | up]
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        x = self.fc1(x)  # (B, N, hidden) or (B, N, 2*hidden)
        if self.swiglu:
            gate, up = x.chunk(2, -1)  # 2 x (B, N, hidden)
            return self.fc2(F.silu(gate) * up)
        return self.fc2(F.gelu(x))


class Block(nn.Module):
    """Pre-norm block with LayerScale. Masks and RoPE come in as `attend(q, k, v)`, (B,nh,N,hd) each."""

    def __init__(self, width, heads, hidden, swiglu, eps, key_bias):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads, key_bias)
        self.ls1 = nn.Parameter(torch.ones(width))
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, hidden, swiglu)
        self.ls2 = nn.Parameter(torch.ones(width))

    def forward(self, x, attend=F.scaled_dot_product_attention):
        x = x + self.ls1 * self.attn(self.norm1(x), attend)  # (B, N, C)
        return x + self.ls2 * self.mlp(self.norm2(x))  # (B, N, C)


class ViT(nn.Module):
    """Plain ViT: `embed` -> `blocks` -> `norm`; tokens [cls | registers | patches], `prefix` = 1 + registers.
    `grid`: trained position grid (h, w), resampled to any other; `rope`: RoPE base (DINOv3) instead of it."""

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, width, depth, heads, patch=16, grid=(40, 40), registers=4, ffn=None, swiglu=False,
                 rope=None, eps=1e-6):
        super().__init__()
        ffn = ffn or 4 * width
        self.config = dict(width=width, depth=depth, heads=heads, patch=patch, grid=list(grid),
                           registers=registers, ffn=ffn, swiglu=swiglu, rope=rope, eps=eps)
        self.width, self.patch, self.prefix, self.rope = width, patch, 1 + registers, rope
        self.grid = tuple(grid)
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        # DINOv3 trains on coordinates stretched at random, one factor a step: the trainer sets it.
        self.register_buffer("rope_scale", constant(1.0), persistent=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, width))
        self.pos_embed = None if rope else nn.Parameter(torch.zeros(1, grid[0] * grid[1], width))
        self.blocks = nn.ModuleList(Block(width, heads, ffn, swiglu, eps, rope is None) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for table in (self.cls_token, self.reg_token, *([] if rope else [self.pos_embed])):
            nn.init.trunc_normal_(table, std=0.02)

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Normalised images (B,3,H,W) -> tokens (B,P+h*w,C) and the patch grid (h,w)."""
        x = self.patch_embed(images)  # (B, C, h, w)
        grid = tuple(x.shape[-2:])
        x = x.flatten(2).mT  # (B, h*w, C)
        if self.pos_embed is not None:
            x = x + resample_positions(self.pos_embed, self.grid, grid)  # (B, h*w, C)
        prefix = torch.cat([self.cls_token, self.reg_token], 1).expand(x.shape[0], -1, -1)  # (B, P, C)
        return torch.cat([prefix.to(x.dtype), x], 1), grid

    def attention(self, grid, attend=F.scaled_dot_product_attention):
        """The attention function of one pass: `attend`, with q and k of the patches rotated under RoPE."""
        if self.rope is None:
            return attend
        head = self.width // self.config["heads"]
        angles = rope_angles(grid, head, self.rope, self.norm.weight.device)  # (h*w, hd)
        if self.training:
            angles = angles * self.rope_scale  # (h*w, hd)
        return partial(_attend_rotated, angles.cos(), angles.sin(), attend)


def rope_angles(grid, head, base, device) -> Tensor:
    """RoPE angles (h*w, hd) of the patch centres in [-1, 1] x [-1, 1], rows first (DINOv3, sec. 3.2)."""
    y, x = ((torch.arange(side, device=device) + 0.5) / side * 2 - 1 for side in grid)  # (h,), (w,)
    centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)  # (h*w, 2)
    periods = base ** torch.arange(0, 1, 4 / head, device=device)  # (hd/4,)
    angles = 2 * math.pi * centres[:, :, None] / periods  # (h*w, 2, hd/4)
    return angles.flatten(1).repeat(1, 2)  # (h*w, hd)


def _attend_rotated(cos, sin, attend, q, k, v):
    start = k.shape[2] - len(cos)  # patches come last; queries, cls and registers stay as they are: 1, 0
    cos = F.pad(cos, (0, 0, start, 0), value=1.0)[:, None].to(k.dtype)  # (N, 1, hd)
    sin = F.pad(sin, (0, 0, start, 0))[:, None].to(k.dtype)  # (N, 1, hd)
    def rotate(t):
        t = t.transpose(1, 2)  # (B, N, nh, hd): as in memory, or attention's output would be head by head
        a, b = t.chunk(2, -1)  # 2 x (B, N, nh, hd/2)
        return (t * cos + torch.cat([-b, a], -1) * sin).transpose(1, 2)  # (B, nh, N, hd)
    return attend(rotate(q), rotate(k), v)


def resample_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position table (1,h*w,C) from grid `old` to `new`: bicubic with antialias, in fp32, as timm does."""
    if old == new:
        return table
    image = table.float().mT.unflatten(2, old)  # (1, C, h, w)
    image = F.interpolate(image, new, mode="bicubic", antialias=True)  # (1, C, h', w')
    return image.flatten(2).mT.to(table.dtype)  # (1, h'*w', C)


def resample_patch(kernel: Tensor, patch: int) -> Tensor:
    """Patch kernel (C,3,p,p) to (C,3,patch,patch) so that a resized patch keeps its embedding: the
    pseudo-inverse of the bicubic resize (FlexiViT, arXiv 2212.08013, eq. 3)."""
    old = kernel.shape[-1]
    if old == patch:
        return kernel
    basis = torch.eye(old * old).reshape(old * old, 1, old, old)  # every pixel of a patch as an image
    rows = F.interpolate(basis, (patch, patch), mode="bicubic", antialias=True).flatten(1)  # (old^2, new^2)
    inverse = torch.linalg.pinv(rows.double())  # (new^2, old^2)
    return (kernel.double().flatten(2) @ inverse.mT).unflatten(2, (patch, patch)).to(kernel.dtype)


# ---- EoMT --------------------------------------------------------------------------------------------------
class Prediction(NamedTuple):
    """Logits of one prediction: masks (B,Q,mh,mw), classes (B,Q,K+1) with no-object last."""
    masks: Tensor
    classes: Tensor


class ScaleBlock(nn.Module):
    """Twice the resolution, (B,h,w,C) -> (B,2h,2w,C): the parameters of `upscale`."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(width, width, 2, 2)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, x):
        up, norm = self.conv1, self.norm
        return upscale(x, up.weight, up.bias, self.conv2.weight, norm.weight, norm.bias, norm.eps)


def default_num_blocks(depth: int) -> int:
    """How many last blocks see the queries: 3 of 12, 4 of 24, 5 of 40 (EoMT paper); at least 1."""
    return {12: 3, 24: 4, 40: 5}.get(depth, max(1, depth // 4))


class EoMT(nn.Module):
    """Encoder-only Mask Transformer over an encoder with `embed`, `attention`, `blocks`, `norm`, `width`,
    `patch`, `prefix`, `mean`, `std`. K = num_classes, Q = num_queries.
    `forward` returns num_blocks + 1 predictions in training mode and wherever `mask_prob` asks for masked
    attention, else the final one alone. `meta` is what a checkpoint says of itself (task, classes)."""

    def __init__(self, encoder, num_classes, num_queries=200, num_blocks=None):
        super().__init__()
        self.encoder = encoder
        depth, width = len(encoder.blocks), encoder.width
        self.num_blocks = default_num_blocks(depth) if num_blocks is None else num_blocks
        if not 1 <= self.num_blocks <= depth:
            raise ValueError(f"num_blocks {num_blocks}: the encoder has depth {depth}; take 1 to {depth}")
        self.config = dict(num_classes=num_classes, num_queries=num_queries, num_blocks=self.num_blocks)
        self.meta, self.recompute = {}, False
        self.q = nn.Embedding(num_queries, width)  # N(0, 1)
        self.class_head = nn.Linear(width, num_classes + 1)
        self.mask_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
                                       nn.Linear(width, width))
        steps = max(1, int(math.log2(encoder.patch)) - 2)  # masks at 1/4 of the image, at 1/7 for patch 14
        self.upscale = nn.Sequential(*(ScaleBlock(width) for _ in range(steps)))
        self.register_buffer("mean", constant(encoder.mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", constant(encoder.std).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, mask_prob: Tensor | None = None,
                noise: Tensor | None = None) -> list[Prediction]:
        """images uint8 or 0..255 float (B,3,H,W); mask_prob (num_blocks,) in [0,1], the share of queries with
        masked attention in each block, None = nowhere; noise (B,num_blocks,Q) uniform decides which.
        Raises ValueError for sides that patches do not fill."""
        x, grid = self.embed(images)  # (B, P+h*w, C)
        attend = self.encoder.attention(grid)
        first = len(self.encoder.blocks) - self.num_blocks
        for block in self.encoder.blocks[:first]:
            x = self.run(block, x, attend)
        x = torch.cat([self.queries().to(x.dtype).expand(x.shape[0], -1, -1), x], 1)  # (B, N, C)
        if mask_prob is not None and noise is None:
            noise = torch.rand(len(x), self.num_blocks, self.q.num_embeddings, device=x.device)
        predictions = []
        # A prediction before each of these blocks: trained by the loss too, and the mask of its attention.
        for i, block in enumerate(self.encoder.blocks[first:]):
            if self.training or mask_prob is not None:
                predictions.append(self.predict(x, grid))
            if mask_prob is not None:
                attend = self.masked(predictions[-1].masks, grid, mask_prob[i], noise[:, i])
                attend = self.encoder.attention(grid, attend)
            x = self.run(block, x, attend)
        return [*predictions, self.predict(x, grid)]

    def embed(self, images):
        """Images as in `forward` -> the encoder's tokens (B,P+h*w,C) and grid (h,w)."""
        height, width, patch = *images.shape[2:], self.encoder.patch
        if height % patch or width % patch:
            raise ValueError(f"{height}x{width} pixels do not split into patches of {patch}; resize or pad")
        return self.encoder.embed((images.to(self.mean.dtype) / 255 - self.mean) / self.std)

    def run(self, block, x, attend):
        """block(x, attend); with `recompute` backward makes its inner values again, for less memory."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, x, attend, use_reentrant=False)
        return block(x, attend)

    def queries(self) -> Tensor:
        """The queries (Q,C) before they meet an image."""
        return self.q.weight

    def masked(self, masks, grid, keep_prob, noise):
        """Attention in which query q sees only the patches where its mask logits (B,Q,mh,mw) are positive."""
        rows, start = masks.shape[1], masks.shape[1] + self.encoder.prefix  # queries; first patch column
        bits = pack_mask(masks.detach(), grid, start, start + grid[0] * grid[1], keep_prob, noise)
        return partial(masked_attention, bits=bits, num_masked_rows=rows)

    def dot(self, queries, patches, grid) -> Tensor:
        """Mask logits (B,Q,mh,mw): mask head of query tokens (B,Q,C) . upscaled patches (B,h*w,C)."""
        queries = self.mask_head(queries)  # (B, Q, C)
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or patches.is_cuda or len(patches) == 1:
            return mask_product(queries, self.upscale(patches.unflatten(1, grid)))
        # One by one: an image's features, its largest tensors, stay in the cache from pass to pass.
        return torch.cat([mask_product(q, self.upscale(p.unflatten(1, grid)))
                          for q, p in zip(queries.split(1), patches.split(1), strict=True)])

    def predict(self, x: Tensor, grid: tuple[int, int]) -> Prediction:
        """Tokens (B,N,C) -> mask logits (B,Q,mh,mw) and class logits (B,Q,K+1)."""
        x = self.encoder.norm(x)
        queries = x[:, :self.q.num_embeddings]  # (B, Q, C)
        patches = x[:, self.q.num_embeddings + self.encoder.prefix:]  # (B, h*w, C)
        return Prediction(self.dot(queries, patches, grid), self.class_head(queries))


def anneal_windows(total: int, num_blocks: int) -> list[tuple[float, float]]:
    """(start, end) step of each query block's mask annealing; the formula gives all published recipes."""
    starts = [total / 6 + total / 2 * i / max(1, num_blocks - 1) for i in range(num_blocks)]
    return [(start, start + total / 6) for start in starts]


def anneal(step: int, windows: list[tuple[float, float]]) -> list[float]:
    """Share of queries that keep their mask, per block: 1 before the window, (1 - progress)^0.9, 0 after."""
    return [(1 - min(1.0, max(0.0, (step - a) / max(b - a, 1e-9)))) ** 0.9 for a, b in windows]


# ---- EoMT with open classes: SigLIP 2 for an encoder, classes are texts ------------------------------------
class Taught(NamedTuple):
    """A Prediction with the patch tokens (B,N,C) of the adapted encoder and of the same without adapters."""
    masks: Tensor
    classes: Tensor
    student: Tensor
    teacher: Tensor | None


class OpenVocabEoMT(EoMT):
    """EoMT over a siglip2.VisionTower, classified by a siglip2.OpenVocabHead whose vocabulary can be swapped.
    isolate: patches attend to patches alone, so that a frozen tower's tokens stay SigLIP 2's; the query rows
    run through copies of the last blocks (query_blocks "copy") or through these ("shared"). Else joint
    attention as in EoMT. fuse_last 3 adds two earlier layers to the mask features. query_init: "learnable",
    "text" (`centres` (Q,C_t) of text rows, through a map) or "text+learnable". Training gives classes over
    the head's seen ones and void; evaluation log-probabilities over all. With `distil` set, the last training
    prediction is a `Taught`."""

    def __init__(self, encoder, head, num_queries=200, num_blocks=None, isolate=True, query_blocks="copy",
                 fuse_last=1, query_init="learnable", pool="map", gamma=4.0):
        super().__init__(encoder, len(head.seen), num_queries, num_blocks)
        self.config["open"] = dict(isolate=isolate, query_blocks=query_blocks, fuse_last=fuse_last,
                                   query_init=query_init, pool=pool, gamma=gamma)
        if not 1 <= fuse_last <= self.num_blocks + 1:
            raise ValueError(f"fuse_last {fuse_last}: {self.num_blocks} query blocks give 1 to "
                             f"{self.num_blocks + 1} layers; take one of these")
        self.class_head, self.isolate = head, isolate
        self.pool, self.gamma, self.adapters, self.distil = pool, gamma, None, False
        self.q_blocks = self.q_norm = None
        if isolate and query_blocks == "copy":  # they start as the encoder's are now: load that first
            self.q_blocks = copy.deepcopy(encoder.blocks[-self.num_blocks:]).requires_grad_(True)
            self.q_norm = copy.deepcopy(encoder.norm).requires_grad_(True)
        self.fuse = nn.Parameter(torch.zeros(fuse_last - 1)) if fuse_last > 1 else None
        if query_init != "learnable":
            self.register_buffer("centres", torch.zeros(num_queries, head.rows.shape[1]))  # (Q, C_t)
            self.q_map = nn.Linear(head.rows.shape[1], encoder.width, bias=False)
            self.q_gate = nn.Parameter(torch.zeros(()))
            nn.init.normal_(self.q.weight, std=0.02)  # tells apart queries of one centre
            self.q.requires_grad_(query_init == "text+learnable")

    def adapt(self, last_n: int, rank_attn: int, rank_ffn: int):
        """Freezes the encoder and puts LoRA adapters into its last blocks."""
        import lora
        self.encoder.requires_grad_(False)
        lora.add(self.encoder.blocks, last_n, rank_attn, rank_ffn)
        self.adapters = dict(last_n=last_n, rank_attn=rank_attn, rank_ffn=rank_ffn)

    def queries(self):
        if self.config["open"]["query_init"] == "learnable":
            return self.q.weight
        return self.q.weight + self.q_gate * self.q_map(self.centres)  # (Q, C)

    def forward(self, images, mask_prob=None, noise=None):
        taught = self.training and self.distil
        if self.isolate:
            x, grid = self.embed(images)  # (B, h*w, C)
            attend, states = self.encoder.attention(grid), [x]
            for block in self.encoder.blocks:
                states.append(self.run(block, states[-1], attend))
            x = self.encoder.norm(states.pop())
            teacher = self.teach(states, grid) if taught else None
            out = self.ask(states, x, grid, mask_prob, noise)
        else:
            out = super().forward(images, mask_prob, noise)
            if taught:
                x, grid = self.embed(images)  # (B, h*w, C)
                teacher = self.teach([x], grid)
        plain = [Prediction(p.masks, p.classes) for p in out]
        return [*plain[:-1], out[-1]._replace(teacher=teacher)] if taught else plain

    @torch.no_grad()
    def teach(self, states, grid):
        """Patches (B,h*w,C) before each block, or the first -> after the final norm, all without adapters."""
        import lora
        # Up to the first block that trains, the teacher's tokens are the encoder's.
        blocks, attend = self.encoder.blocks, self.encoder.attention(grid)
        trains = [any(p.requires_grad for p in block.parameters()) for block in blocks[:len(states)]]
        first = trains.index(True) if True in trains else 0
        x = states[first]
        with lora.disabled(self.encoder):
            for block in blocks[first:]:
                x = block(x, attend)
        return self.encoder.norm(x)

    def ask(self, states, x, grid, mask_prob, noise):
        """Query rows through their blocks. states: patches (B,h*w,C) before each block, x: after the norm."""
        states, norm = states[-self.num_blocks:], self.q_norm or self.encoder.norm
        blocks = self.q_blocks or self.encoder.blocks[-self.num_blocks:]
        features = x if self.fuse is None else x + sum(
            a * self.encoder.norm(state) for a, state in zip(self.fuse, reversed(states), strict=False))
        features = self.upscale(features.unflatten(1, grid))  # (B, mh, mw, C)
        q = self.queries().to(x.dtype).expand(x.shape[0], -1, -1)  # (B, Q, C)
        if mask_prob is not None and noise is None:
            noise = torch.rand(len(x), self.num_blocks, q.shape[1], device=x.device)
        kept, masks, rows = [], [], q.shape[1]
        for i, (block, state) in enumerate(zip([*blocks, None], [*states, None], strict=True)):
            if self.training or mask_prob is not None or block is None:
                kept.append(norm(q))
                masks.append(mask_product(self.mask_head(kept[-1]), features))
            if block is None:
                break
            attend = F.scaled_dot_product_attention
            if mask_prob is not None:
                attend = self.masked(masks[-1], grid, mask_prob[i], noise[:, i])
            qh, k, v = block.attn.split(block.norm1(torch.cat([q, state], 1)))  # (B, nh, N, hd) each
            q = q + block.attn.proj(attend(qh[:, :, :rows], k, v).transpose(1, 2).flatten(2))  # (B, Q, C)
            q = q + block.mlp(block.norm2(q))
        return [Taught(m, self.classify(t, m, x, grid), x, None) for m, t in zip(masks, kept, strict=True)]

    def predict(self, x, grid):
        x = self.encoder.norm(x)
        queries, patches = x.split((self.q.num_embeddings, x.shape[1] - self.q.num_embeddings), 1)
        masks = self.dot(queries, patches, grid)  # (B, Q, mh, mw)
        return Taught(masks, self.classify(queries, masks, patches, grid), patches, None)

    def classify(self, queries, masks, patches, grid):
        """Query tokens (B,Q,C) and in evaluation their regions -> classes (B,Q,K+1)."""
        return self.class_head(queries) if self.training else self.name_regions(queries, masks, patches, grid)

    @torch.compiler.disable  # a compiled model keeps its graph when the vocabulary changes
    def name_regions(self, queries, masks, patches, grid):
        from siglip2 import map_pool
        z = F.adaptive_avg_pool2d(masks.float(), grid).flatten(2)  # (B, Q, h*w)
        return self.class_head(queries, map_pool(self.encoder, patches, z, self.gamma, self.pool))

    def set_classes(self, names, thing=None, prompts=None, seen=None, weights="", tokenizer="", cache=None):
        """Swaps the vocabulary. names: K strings; thing, seen: K bools, default all and none; prompts: per
        class, per synonym, the texts to average, default the names in the templates of training; weights:
        the text tower, default that of training. Raises ValueError for another tower's text."""
        import vocab
        from siglip2 import text_rows
        if isinstance(names, str) or len(set(names)) < len(names) or len(thing or names) != len(names):
            raise ValueError(f"names {names!r:.60}: give a list of different names, and a `thing` for each")
        words = vocab.Vocabulary("names", names, range(1, len(names) + 1), thing or [True] * len(names))
        prompts = prompts or vocab.prompts(words, vocab.LANGUAGES, self.meta.get("template", "default"))
        weights = weights or self.meta["text"]
        rows, owner, scale, bias = text_rows(weights, tokenizer or self.meta.get("tokenizer"), prompts, cache)
        head = self.class_head
        ours = torch.stack([head.logit_scale, head.logit_bias]).cpu()
        if rows.shape[1] != head.rows.shape[1] or not torch.allclose(torch.cat([scale, bias]), ours, 1e-4):
            raise ValueError(f"{weights}: the text tower of another SigLIP 2 than this model's (its width is "
                             f"{rows.shape[1]}, here {head.rows.shape[1]}, or its scale); give the right one")
        head.set_classes(rows, owner, [False] * len(names) if seen is None else seen)
        self.config["num_classes"] = len(names)
        self.meta |= dict(names=list(names), ids=[*words.ids], thing=[*words.thing], calibration=head.kept)


# ---- Post-processing and `segment`, the one inference path -------------------------------------------------
class Panoptic(NamedTuple):
    """ids int32 (H,W), 0 = void, segment s has id s+1; labels int64 (S,), scores float (S,)."""
    ids: Tensor
    labels: Tensor
    scores: Tensor


class Instances(NamedTuple):
    """masks bool (n,H,W), labels int64 (n,), scores float (n,), best first."""
    masks: Tensor
    labels: Tensor
    scores: Tensor


def panoptic(masks: Tensor, classes: Tensor, window, content, size, thing, score_threshold=0.8,
             mask_threshold=0.5, overlap_threshold=0.8) -> Panoptic:
    """One image's logits, masks (Q,mh,mw) and classes (Q,K+1), to a panoptic map of `size` (H,W).
    window: (h,w) of the network input; content: (h,w) of the image in it without padding; thing: K bools.
    Thresholds of upstream's evaluation: class score > 0.8, mask >= 0.5, kept share of a mask >= 0.8 (> 0.8 in
    transformers). Raises ValueError where `thing` does not fit the classes."""
    if thing is None or len(thing) != classes.shape[-1] - 1:
        raise ValueError(f"thing: not one bool for each of {classes.shape[-1] - 1} classes; see vocab.py")
    scores, labels = classes.float().softmax(-1).max(-1)  # (Q,), (Q,)
    keep = ((labels != classes.shape[-1] - 1) & (scores > score_threshold)).nonzero()[:, 0]  # (k,), a wait
    scores, labels = scores[keep], labels[keep]
    if len(keep) == 0:
        return Panoptic(torch.zeros(size, dtype=torch.int32, device=masks.device), labels, scores)
    owner, areas = panoptic_merge(masks[keep], scores, window, content, size, mask_threshold)
    own, assigned, final = areas  # 3 x (k,)
    good = (final > 0) & (assigned / own.clamp(min=1) >= overlap_threshold)  # (k,)
    kept, number, segments = [], [], {}  # first query of each segment; each query's segment, from 1, 0 = none
    for k, (fine, label) in enumerate(torch.stack([good, labels], 1).tolist()):  # the host's last wait
        segment = ("thing", k) if thing[label] else ("stuff", label)  # stuff of one class shares one
        number.append(segments.setdefault(segment, len(segments) + 1) if fine else 0)
        if number[-1] > len(kept):
            kept.append(k)
    table = torch.tensor([*kept, *number, 0], device=masks.device)  # one upload: (S,), then (k+1,), 0 = void
    kept, number = table[:len(kept)], table[len(kept):].int()
    return Panoptic(number.index_select(0, owner.flatten()).view(size), labels[kept], scores[kept])


def instance(masks: Tensor, classes: Tensor, window, content, size, top=100) -> Instances:
    """One image's logits to the `top` (query, class) pairs; score = class score * mean probability inside."""
    prob = classes.float().softmax(-1)[:, :-1]  # (Q, K)
    scores, flat = prob.flatten().topk(min(top, prob.numel()))
    query, labels = flat // prob.shape[1], flat % prob.shape[1]  # (n,), (n,)
    query, row = query.unique(return_inverse=True)  # a query may be there with several classes: (q,), (n,)
    out = torch.empty(len(row), *size, dtype=torch.bool, device=masks.device)  # (n, H, W), first (q, H, W)
    area, total = scores.new_zeros(2, len(query))  # (q,) x 2
    for where, logits in restored(masks[query], window, content, size):
        mask = torch.gt(logits, 0, out=torch.empty_like(logits))  # (q', H', W') bools are slow on CPU
        out[where] = mask
        area[where[0]] += mask.flatten(1).sum(1)
        total[where[0]] += logits.sigmoid_().mul_(mask).flatten(1).sum(1)
    scores, order = (scores * (total / (area + 1e-6))[row]).sort(descending=True, stable=True)  # empty -> 0
    for band in out.split(64, 1):  # in place: 100 masks of 100 MP are 10 GB
        band.copy_(band[row[order]])  # (n, 64, W)
    return Instances(out, labels[order], scores)


def semantic(masks: Tensor, classes: Tensor, window) -> Tensor:
    """Logits masks (B,Q,mh,mw), classes (B,Q,K+1) of windows -> class scores (B,K,h,w) at window size."""
    masks = F.interpolate(masks.float(), window, mode="bilinear").sigmoid()  # (B, Q, h, w)
    return torch.einsum("bqhw,bqk->bkhw", masks, classes.float().softmax(-1)[..., :-1])  # (B, K, h, w)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (3,H,W) to `size` with Pillow's bilinear filter, the one the published numbers were made with."""
    import numpy as np
    from PIL import Image
    assert image.dtype == torch.uint8 and len(image) == 3, f"uint8 (3,H,W): {image.dtype} {image.shape}"
    if tuple(image.shape[1:]) == tuple(size):
        return image
    array = np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())  # (H, W, 3)
    array = np.asarray(Image.fromarray(array).resize(size[::-1], Image.Resampling.BILINEAR))
    return torch.from_numpy(array.copy()).permute(2, 0, 1).to(image.device)  # (3, h, w)


def fit(size, window, kind="panoptic") -> tuple[int, int]:
    """(H,W) scaled to lie inside the window, semantic: to cover it, but strips, which are cut first. Python's
    round() as upstream, where transformers' semantic truncates; at least a pixel (1x1500 images exist)."""
    if kind == "semantic" and max(size) > 8 * min(size):
        return tuple(size)
    choose, least = (max, window) if kind == "semantic" else (min, (1, 1))
    factor = choose(window[0] / size[0], window[1] / size[1])
    return tuple(max(one, round(side * factor)) for side, one in zip(size, least, strict=True))


def fitted(image: Tensor, window: tuple[int, int], kind: str) -> Tensor:
    """The image as `segment` resizes it first: 17 ms for a window of 1280, which evaluation hides."""
    return resize(image, fit(image.shape[1:], window, kind))


@torch.no_grad()
def accelerate(model: EoMT, fp8: bool = False, batch: int = 0) -> EoMT:
    """For inference, in place; never to be moved, saved or trained then. Layers keep their weights as a call
    would make them: bf16 on CUDA, in oneDNN's layout on a CPU. fp8: the blocks' linear ones in float8, also
    on a CPU, each about 4 % off. batch > 0: CUDA graphs for batches of this size; `segment` fills them up."""
    for name, module in list(model.requires_grad_(False).named_modules()):
        if isinstance(module, Attention) and module.bias_used is not None:
            module.qkv.bias.mul_(module.bias_used)
            module.bias_used = None
        layer = isinstance(module, nn.Linear | nn.ConvTranspose2d)
        if not layer or name.startswith(("encoder.head.", "class_head.")):
            continue  # these heads are called without autocast too
        if fp8 and "blocks." in name:
            from kernels.fp8_linear import Fp8Linear
            model.set_submodule(name, Fp8Linear(module))
        elif module.weight.is_cuda:
            module.to(torch.bfloat16)
        elif not batch:
            model.set_submodule(name, packed(module))
    if fp8 and torch.float8_e4m3fn not in {buffer.dtype for buffer in model.buffers()}:
        raise ValueError("fp8: its layers are packed, by a call without fp8 before; load the model again")
    if batch:
        model.meta["batch"] = batch
        model.compile(mode="reduce-overhead")
    return model


def _network(model, images, mask_prob):
    device, count = model.mean.device, len(images)
    fill = model.meta.get("batch", count) - count  # a compiled model knows one size
    if "batch" in model.meta:  # its first call imports the compiler, a second
        torch.compiler.cudagraph_mark_step_begin()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        prediction = model(F.pad(images.to(device), (0,) * 7 + (fill,)), mask_prob)[-1]
    return Prediction(prediction.masks[:count].float(), prediction.classes[:count].float())


@torch.inference_mode()
def segment(model: nn.Module, images: list[Tensor], kind: str, window: tuple[int, int] | None = None,
            thing: list[bool] | None = None, mask_prob: Tensor | None = None, batch: int = 8,
            sizes: list[tuple[int, int]] | None = None) -> list:
    """Images uint8 (3,H,W) of any sizes -> one result each, on the model's device.
    kind: "panoptic" -> Panoptic, "instance" -> Instances, "semantic" -> int64 class map (H,W).
    window: network input (h,w), default model.meta["size"]; thing: K bools, default model.meta["thing"].
    batch: at most this many windows go through the network at once; sizes: (H,W) of each result, where the
    images are resized to `fit` already. Raises ValueError for an unknown kind."""
    if kind not in ("panoptic", "instance", "semantic"):
        raise ValueError(f"kind {kind}: unknown; one of panoptic, instance, semantic")
    if window is None and "size" not in model.meta:
        raise ValueError("window: none given, and model.meta has no size; give window=(h, w)")
    window, batch = window or (model.meta["size"],) * 2, model.meta.get("batch", batch)
    sizes = sizes or [image.shape[1:] for image in images]
    if kind == "semantic":
        return list(map(partial(_segment_semantic, model, window, mask_prob, batch), images, sizes))
    finish = instance
    if kind == "panoptic":  # open-vocabulary scores are flatter than the thresholds of closed classes
        finish = partial(panoptic, thing=thing or model.meta.get("thing"), **model.meta.get("thresholds", {}))
    results = []
    for start in range(0, len(images), batch):
        part = sizes[start:start + batch]
        contents = [fit(size, window) for size in part]
        inputs = torch.zeros(len(part), 3, *window, dtype=torch.uint8)  # (B, 3, h, w)
        for slot, image, (h, w) in zip(inputs, images[start:], contents, strict=False):
            slot[:, :h, :w] = resize(image, (h, w))
        masks, classes = _network(model, inputs, mask_prob)
        results += [finish(m, c, window, content, tuple(size))
                    for m, c, content, size in zip(masks, classes, contents, part, strict=True)]
    return results


def _segment_semantic(model, window, mask_prob, batch, image, size):
    """Evenly overlapping windows along the long side; class scores are averaged, then resized back."""
    scaled = fit(size, window, "semantic")
    if max(size) > 8 * min(size):  # the class scores of a strip of 1x1500 at window height would need 200 GB
        axis = 0 if size[0] > size[1] else 1
        return torch.cat([_segment_semantic(model, window, mask_prob, batch, half, half.shape[1:])
                          for half in image.chunk(2, axis + 1)], axis)  # (3, H/2, W) or (3, H, W/2) each
    image = resize(image, scaled)
    axis = 0 if scaled[0] / window[0] >= scaled[1] / window[1] else 1
    count = math.ceil(scaled[axis] / window[axis])
    # Whole numbers: in upstream's floats the last of 8 windows can end a pixel early, that column unscored.
    starts = [j * (scaled[axis] - window[axis]) // max(1, count - 1) for j in range(count)]
    crops = torch.stack([image.narrow(axis + 1, s, window[axis]) for s in starts])  # (n, 3, h, w)
    scores = torch.cat([semantic(*_network(model, part, mask_prob), window) for part in crops.split(batch)])
    total = scores.new_zeros(scores.shape[1], *scaled)  # (K, H', W')
    hits = scores.new_zeros(scaled)  # (H', W')
    for start, score in zip(starts, scores, strict=True):
        total.narrow(axis + 1, start, window[axis]).add_(score)
        hits.narrow(axis, start, window[axis]).add_(1)
    total /= hits
    best = torch.full(size, -1.0, device=total.device)  # (H, W)
    label = torch.zeros(size, dtype=torch.int64, device=total.device)  # (H, W)
    step = max(1, (1 << 26) // (size[0] * size[1]))  # 256 MB of fp32
    for first in range(0, len(total), step):  # 150 classes of a 100 MP photo do not fit: running maximum
        scores = F.interpolate(total[None, first:first + step], size, mode="bilinear")[0]  # (K', H, W)
        value, index = scores.max(0)  # (H, W) x 2
        better = value > best
        best, label = torch.where(better, value, best), torch.where(better, index + first, label)
    return label


# ---- Checkpoints: one strict reader for ours, the model zoo, Lightning, timm and Hugging Face names --------
_HEADER = "nanoeomt"  # key of our JSON in the safetensors header
_FILES = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")

# Our names and those of transformers' Eomt: `read` reads by this table, `save` writes by it.
_HF = (
    ("encoder.cls_token", "embeddings.cls_token"), ("encoder.reg_token", "embeddings.register_tokens"),
    ("encoder.pos_embed", "embeddings.position_embeddings.weight"), ("encoder.norm.", "layernorm."),
    ("encoder.patch_embed.", "embeddings.patch_embeddings.projection."), ("encoder.blocks.", "layers."),
    (".attn.proj.", ".attention.out_proj."), (".ls1", ".layer_scale1.lambda1"),
    (".ls2", ".layer_scale2.lambda1"), ("q.weight", "query.weight"), ("class_head.", "class_predictor."),
    ("mask_head.0.", "mask_head.fc1."), ("mask_head.2.", "mask_head.fc2."),
    ("mask_head.4.", "mask_head.fc3."), ("upscale.", "upscale_block.block."), (".norm.", ".layernorm2d."),
)
_WRAPPED = re.compile(r"^((module|_orig_mod|network)\.)+|(?<=\.)_orig_mod\.")
# What others write (the published .bin files, timm, transformers' EomtDinov3, Dinov2*, DINOv3ViT), then the
# table, applied in order. "#q" marks the q part of a packed tensor.
_ALIASES = [(re.compile(pattern), name) for pattern, name in (
    (_WRAPPED, ""),
    (r"^encoder\.backbone\.", "encoder."),
    (r"^(encoder\.|model\.)?(layers?|blocks)\.(?=\d)", "encoder.blocks."),
    (r"^(cls_token|reg_token|pos_embed|patch_embed|norm|mask_token)(?=$|\.)", r"encoder.\1"),
    (r"^encoder\.patch_embed\.(?=cls_token|mask_token|register_tokens|patch_embeddings)", "embeddings."),
    (r"^(embeddings\.patch_embeddings|encoder\.patch_embed\.proj)\.(?=weight|bias)", "encoder.patch_embed."),
    (r"^embeddings\.position_embeddings$", "encoder.pos_embed"),
    (r"\.attention\.(attention\.)?([qkv])(_proj|uery|ey|alue)\.(weight|bias)$", r".attn.qkv.\4#\2"),
    (r"\.attention\.(o_proj|output\.dense)\.", ".attn.proj."),
    (r"\.ls([12])\.gamma$", r".ls\1"),
    (r"\.mlp\.(gate|up)_proj\.(weight|bias)$", r".mlp.fc1.\2#\1"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.fc2."),
    *((re.escape(theirs), ours) for ours, theirs in _HF),
    # no weights: annealing state, constants of the input, of RoPE and of the loss
    (r"^(.*\.)?(attn_mask_probs|pixel_mean|pixel_std|empty_weight|mask_token|rope_emb.*)$", ""),
)]

# Whatever values that nobody has chosen may lead to.
_FAULTS = (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError, ArithmeticError)


@contextlib.contextmanager
def _blame(path, what, *more):
    """Inside, _FAULTS and `more` become one line that names the file."""
    try:
        yield
    except (*_FAULTS, *more) as e:
        fault = f"{what} ({type(e).__name__}: {str(e)[:80]!r}); copy or download it again"
        raise ValueError(f"{path}: {fault}") from None


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder by the sums in meta.json, or None; flipped bits would load."""
    if not (folder / "meta.json").exists():
        return None
    try:
        meta = _json(folder / "meta.json")
        sums, own = {**meta["sha256"]}, meta.pop("own_sha256", None)  # older ones have none
        if own not in (None, hashlib.sha256(json.dumps(meta).encode()).hexdigest()):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        return f"{folder}!meta.json: damaged or edited; use another checkpoint"
    for name, want in sums.items():
        if not (folder / name).exists() or sha256(folder / name) != want:
            return f"{folder}!{name}: missing or changed since it was written; use another checkpoint"
    return None


def _json(path) -> dict:
    if path.stat().st_size > 1 << 26:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, too long for a configuration; get it again")
    with _blame(path, "damaged JSON"):
        return {**json.loads(path.read_text())}


def find(path: str | Path) -> Path:
    """The weight file of a run folder (best, else the newest step), of a step or Hugging Face folder, of a
    Hugging Face repository (by name, downloaded), or the file itself.
    Raises FileNotFoundError, or ValueError for a damaged checkpoint; of a run folder the next is taken."""
    path = Path(path)
    if not path.exists():
        return _download(str(path))
    if not path.is_dir():
        return path
    steps = sorted((p for p in path.glob("step-*") if p.name[5:].isdigit()), key=lambda p: -int(p.name[5:]))
    first, best = None, path / "best"
    # While training replaces best/, the old one is there under its other name; it may be back a moment later.
    folders = (path, best, path / ".old-best", best, *steps)
    for weights in (folder / name for folder in folders for name in _FILES if (folder / name).exists()):
        fault = damaged(weights.parent)
        if fault is None:
            if first:
                print(f"warning: {first}; taking {weights.parent}", file=sys.stderr)
            return weights
        first = first or fault
    if first:
        raise ValueError(first)
    raise FileNotFoundError(f"{path}: no checkpoint in this folder; give a run, a step-* folder or a file")


def _download(name: str) -> Path:
    """The weight file of a Hugging Face repository, where huggingface_hub is installed and can reach it."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or Path(name).parent.exists():
        raise FileNotFoundError(f"{name}: no such checkpoint; give a run, a file or a Hugging Face name")
    try:
        from huggingface_hub import snapshot_download
        # Whole or in parts with an index; what is not there is no error. A pickle only where that is all.
        for files in (["config.json", "model*.safetensors*"], ["pytorch_model.bin"]):
            folder = Path(snapshot_download(name, allow_patterns=files))
            if found := [folder / file for file in _FILES if (folder / file).exists()]:
                return found[0]
        fault = "no weights there"
    except (ImportError, OSError, ValueError) as e:  # not installed; offline, no such repository, not allowed
        fault = type(e).__name__
    raise FileNotFoundError(f"{name}: no such file, and not fetched from Hugging Face ({fault}); download "
                            f"model.safetensors or pytorch_model.bin of {name} and give its path")


def _raw(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors of a weight file as they are named there, and our JSON header ({} in foreign files)."""
    with open(path, "rb") as file:
        head = file.read(256)
    # The whole word: a safetensors file may begin with " <", its header's length.
    signs = {"an HTML page": rb"\s*<(!doctype|html|\?xml)", "a git-lfs pointer": rb"version https://git-lfs",
             "empty": rb"\Z"}
    for what, sign in signs.items():
        if re.match(sign, head, re.IGNORECASE):
            raise ValueError(f"{path}: the file is {what}, not weights; download it again")
    if not path.name.endswith(".index.json"):
        return _tensors(path, head)
    index = _json(path)
    with _blame(path, "no list of weight files beside it"):
        shards = sorted(set(index["weight_map"].values()), key=str)
        for bad in (s for s in shards if not re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin)", str(s))):
            raise ValueError(bad)
    return {k: v for shard in shards for k, v in _raw(path.parent / shard)[0].items()}, {}


def unpickle(path: Path):
    """What torch.save wrote, tensors and plain values only. Raises ValueError for code and for damage."""
    if torch.__version__ < "2.10":
        raise ValueError(f"{path}: a pickle, which torch {torch.__version__} may not read safely; take 2.10")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (*_FAULTS, pickle.UnpicklingError, EOFError, OSError) as e:
        if re.search(r"unsupported (global|class)|instantiate|not allowed", str(e).lower()):
            raise ValueError(f"{path}: refused: holds code; ask its author for safetensors") from None
        raise ValueError(f"{path}: cut or damaged file ({type(e).__name__}); download it again") from None


def _tensors(path, head):
    from safetensors import SafetensorError, safe_open
    if path.suffix == ".safetensors" or head[8:10] == b'{"':  # whatever its name
        with _blame(path, "cut or damaged file", SafetensorError), safe_open(str(path), "pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            return {key: file.get_tensor(key) for key in file.keys()}, header
    state = unpickle(path)
    if isinstance(state, dict):
        state = state.get("state_dict", state)  # Lightning keeps it one level down
    if not isinstance(state, dict) or not all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise ValueError(f"{path}: holds other things than tensors by name; export a state dict")
    return state, {}


def _rename(raw, path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Foreign tensors, fp32, under our names, and the key that each of ours came from (for messages)."""
    parts, origin = {}, {}
    for key, value in raw.items():
        name = key
        for pattern, ours in _ALIASES:
            name = pattern.sub(ours, name)
        if not name:
            continue
        name, _, part = name.partition("#")
        if part in parts.setdefault(name, {}):
            raise ValueError(f"{path}!{key}: the same tensor as {origin[name]}; remove one of them")
        parts[name][part] = value.float() if value.is_floating_point() else value
        origin[name] = key
    rope = "encoder.pos_embed" not in parts
    return {name: _join(name, found, rope, f"{path}!{origin[name]}") for name, found in parts.items()}, origin


def _join(name, parts, rope, where):
    """One tensor of its parts, "" being the whole."""
    if list(parts) in ([""], ["up"]):  # DINOv3's plain MLP calls its only first layer up_proj
        return next(iter(parts.values()))
    if rope and name.endswith(".qkv.bias") and "k" not in parts:
        parts["k"] = torch.zeros_like(next(iter(parts.values())))  # DINOv3's keys have no bias
    wanted = ["q", "k", "v"] if ".qkv." in name else ["gate", "up"]
    if sorted(parts) != sorted(wanted):
        raise ValueError(f"{where}: {name} is not whole: {', '.join(parts)} of {', '.join(wanted)}; "
                         "copy or download it again")
    return torch.cat([parts[part] for part in wanted])


def _tidy(state):
    """In place: registers are there, may be none; a position table is (1,h*w,C): where it counts the cls
    token (HF DINOv2), that row moves into cls_token."""
    state.setdefault("encoder.reg_token", state["encoder.cls_token"][:, :0])
    if "encoder.pos_embed" in state:
        table = state["encoder.pos_embed"].flatten(0, -2)[None]  # (1, h*w, C) or (1, 1+h*w, C)
        if math.isqrt(table.shape[1]) ** 2 == table.shape[1] - 1:
            state["encoder.cls_token"] = state["encoder.cls_token"] + table[:, :1]
            table = table[:, 1:]
        state["encoder.pos_embed"] = table


def _hints(path) -> dict:
    """What a Hugging Face config.json says that shapes do not."""
    said = {key: value for key, value in _json(path).items() if value is not None}
    if isinstance(said.get("image_size"), list):  # some write [height, width]
        said["image_size"] = next(iter(said["image_size"]), "[]")
    for key, kind, least in (("num_attention_heads", int, 1), ("image_size", int, 1), ("num_blocks", int, 0),
                             ("layer_norm_eps", float, 0)):
        value = said.get(key, least)
        if type(value) not in (int, kind) or value < least:
            raise ValueError(f"{path}!{key}: {str(value)[:40]!r}; wanted: {kind.__name__} number >= {least}")
    return said


def _infer(state, raw, hints) -> dict:
    """Model configuration from tensor shapes and `_hints`."""
    width, patch = (state["encoder.patch_embed.weight"].shape[axis] for axis in (0, 3))
    hidden = state["encoder.blocks.0.mlp.fc2.weight"].shape[1]
    depth = 1 + max(int(number) for number in re.findall(r"encoder\.blocks\.(\d+)\.", " ".join(state)))
    rope, eps, side = 100.0, 1e-5, hints.get("image_size", 640 if hints else 0) // patch  # DINOv3; 0: load's
    if "encoder.pos_embed" in state:
        rope, eps, side = None, 1e-6, math.isqrt(state["encoder.pos_embed"].shape[1])
    encoder = dict(width=width, depth=depth, heads=hints.get("num_attention_heads", max(1, width // 64)),
                   patch=patch, grid=[side, side], registers=state["encoder.reg_token"].shape[1], ffn=hidden,
                   swiglu=len(state["encoder.blocks.0.mlp.fc1.weight"]) == 2 * hidden, rope=rope,
                   eps=hints.get("layer_norm_eps", eps))
    if "q.weight" not in state:
        return dict(encoder=encoder)
    probs = next((len(v) for k, v in raw.items() if k.endswith("attn_mask_probs") and v.ndim), 0)
    blocks = hints.get("num_blocks") or probs or default_num_blocks(depth)
    return dict(encoder=encoder, num_classes=len(state["class_head.weight"]) - 1,
                num_queries=len(state["q.weight"]), num_blocks=blocks)


def _dialect(keys) -> str:
    """Whose names a file's keys are; no keys stand for our own files."""
    signs = {r"layers?\.": "Hugging Face's", r"backbone\.": "upstream EoMT's", ".": "timm's",
             "": "this program's"}
    return next(whose for sign, whose in signs.items() if re.search(sign, " ".join(keys)))


def _note(raw, path):
    """Says what reading a file changes."""
    said = [f"{word} stripped from names" for word in ("module.", "_orig_mod.", "network.")
            if any(word in key for key in raw)]
    if _dialect(raw) == "Hugging Face's":
        said.append("Hugging Face names made ours")
    dtypes = {str(value.dtype).removeprefix("torch.") for value in raw.values() if value.is_floating_point()}
    said += [f"{dtype} made float32" for dtype in sorted(dtypes - {"float32"})]
    if said:
        print(f"note: {path}: {'; '.join(said)}", file=sys.stderr)


def read(path: str | Path, base: str | Path | None = None) -> tuple[dict, dict[str, Tensor], dict]:
    """Any checkpoint -> (config, state under our names, meta); an encoder alone gives only config["encoder"].
    base: the DINOv3 encoder that a model zoo file is the difference to, for those files only.
    Raises FileNotFoundError or ValueError with one line; nothing in a file is ever executed."""
    path = find(path)
    raw, header = _raw(path)
    bad = [key for key, value in raw.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise ValueError(f"{path}!{bad[0]}: NaN or Inf in {len(bad)} tensor(s); use another checkpoint")
    _check_base(path, raw, base)
    _note(raw, path)
    if header:
        return _checked(header, raw, path)
    beside = path.parent / "config.json"
    hints = _hints(beside) if path.suffix != ".bin" and beside.exists() else {}
    try:
        state, origin = _rename(raw, path)
        if not len(state.get("encoder.patch_embed.weight", ())):
            raise ValueError(f"{path}: no EoMT, DINOv2 or DINOv3 by the names of this program, upstream "
                             f"EoMT, timm or Hugging Face ({len(raw)} keys, e.g. {next(iter(raw), '-')}); "
                             "give one of these, or strip what stands before its names")
        _tidy(state)
        config = _infer(state, raw, hints)
    except KeyError as e:
        raise ValueError(f"{path}: missing {e.args[0]}; read with {_dialect(raw)} names: give a whole "
                         "checkpoint") from None
    except (IndexError, TypeError, RuntimeError, ArithmeticError) as e:
        raise ValueError(f"{path}: an impossible shape of a tensor ({str(e)[:80]!r}); get it again") from None
    if base is not None:
        _add_base(config, state, base)
    return config, state, {"origin": origin}


def _checked(header, raw, path):
    """(config, state, meta) of a header of ours, whose model, built without memory, has the file's shapes."""
    state = {_WRAPPED.sub("", key): value for key, value in raw.items()}
    with _blame(path, "its header describes no model"), torch.device("meta"):
        config, meta = dict(header["config"]), dict(header["meta"])
        # A relative path counts from here, else from where the training was started.
        near = {k: meta[k] for k in ("text", "tokenizer", "data") if not os.path.exists(meta.get(k) or ".")}
        far = {k: os.path.join(meta.get("cwd", ""), path) for k, path in near.items()}
        meta |= {k: path for k, path in far.items() if os.path.exists(path)}  # not in others' closed folders
        encoder, options, width = config["encoder"], config.get("open"), len(state["encoder.norm.weight"])
        fits = [encoder["width"] == width, width % encoder["heads"] == 0,
                len(state) == len(raw) >= max(encoder["depth"], config["num_blocks"])]
        if options is not None:
            rows, owner = state["class_head.rows"].shape, state["class_head.owner"].unique().tolist()
            fits += [[*rows, len(owner)] == [options["rows"], options["text_width"], config["num_classes"]],
                     owner == list(range(len(owner)))]  # every class has a row, and none beyond
        if not all(fits):
            raise ValueError("sizes that its tensors do not have, or a name twice")
        model = build(config)
    _compare(model.state_dict(), state, path, {})
    return config, state, meta


def _check_base(path, raw, base):
    """A file of differences, as the model zoo's DINOv3 ones, needs a base; all others must come without.
    Only upstream's spelling of DINOv3 can be one. Trained LayerNorm weights are nearly all positive, their
    changes have both signs, mostly minus (weight decay); what never changes, as pixel_std, is 0 there."""
    tokens = next((value for key, value in raw.items() if key.endswith("patch_embed.register_tokens")), None)
    norms = [v.flatten() for k, v in raw.items() if re.search(r"backbone\.(.*\.)?norm[12]?\.weight$", k)]
    still = any(value.abs().sum() < 0.1 for key, value in raw.items() if key.endswith("pixel_std"))
    positive = (torch.cat([*norms, torch.empty(0)]) > 0).float().mean()
    delta = tokens is not None and (still or positive < 0.75)
    if delta and base is None:
        name = {384: "vits16", 768: "vitb16", 1024: "vitl16"}.get(tokens.shape[-1], "*")
        raise ValueError(f"{path}: differences to an encoder, not weights; give its path as base too "
                         f"(facebook/dinov3-{name}-pretrain-lvd1689m)")
    if base is not None and not delta:
        raise ValueError(f"{path}: weights, not differences to an encoder; leave base away")


def _add_base(config, state, base):
    """Differences to weights, in place: encoder = base + difference; the rest started from 0."""
    base_config, encoder, _ = read(base)
    for key in [key for key in state if key.startswith("encoder.")]:
        if key not in encoder or encoder[key].shape != state[key].shape:
            raise ValueError(f"{base}: {key} is missing or of another shape; give the encoder of this size")
        state[key] = encoder[key] + state[key]
    config["encoder"] |= {name: base_config["encoder"][name] for name in ("heads", "eps")}


def build(config: dict) -> EoMT:
    """The model of a checkpoint's config, with random weights."""
    config = dict(config)
    encoder, options = config.pop("encoder"), dict(config.pop("open", {}))
    if not options:
        return EoMT(ViT(**encoder), **config)
    from siglip2 import OpenVocabHead, VisionTower
    tower, count = VisionTower(**encoder), config.pop("num_classes")
    rows, width, adapters = (options.pop(key) for key in ("rows", "text_width", "adapters"))
    with torch.device("cpu"):  # also where the rest is built on "meta": the head looks into its tables
        owner = torch.arange(rows).clamp(max=count - 1)
        head = OpenVocabHead(tower.width, torch.zeros(rows, width), owner, [False] * count, 0.0, 0.0)
    model = OpenVocabEoMT(tower, head, **config, **options)
    if adapters:
        model.adapt(**adapters)
    return model


def fill(model: nn.Module, state: dict[str, Tensor], path, origin=None, skip: tuple[str, ...] = ()):
    """Strict load: one error names missing, unexpected and misshapen keys, but for the prefixes `skip`."""
    state = {key: value for key, value in state.items() if not key.startswith(skip)}
    own = {key: value for key, value in model.state_dict().items() if not key.startswith(skip)}
    _compare(own, state, path, origin or {})
    if assign := next(model.parameters()).is_meta:  # copies: a file is mapped, a pickle keeps odd strides
        state = {key: value.to(own[key].dtype, copy=True).contiguous() for key, value in state.items()}
    model.load_state_dict(state, strict=False, assign=assign)


def _compare(own, state, path, origin):
    """ValueError where a file's tensors are not the model's: the first three of each fault, by its names."""
    both = [(origin.get(key, key), state[key], own[key]) for key in own if key in state]
    faults = (
        [f"missing {key}" for key in own if key not in state],
        [f"unexpected {origin.get(key, key)}" for key in state if key not in own],
        [f"{key} has shape {tuple(value.shape)}, the model wants {tuple(want.shape)}"
         for key, value, want in both if value.shape != want.shape],
        [f"{key} holds {value.dtype}, the model wants {want.dtype}"
         for key, value, want in both if value.is_floating_point() != want.is_floating_point()])
    if some := [fault for kind in faults for fault in kind[:3]]:
        more = sum(map(len, faults)) - len(some)
        raise ValueError(f"{path}: {'; '.join(some)}{f' and {more} more' if more else ''}; read with "
                         f"{_dialect(origin.values())} names: give the checkpoint of this model")


def _named_size(path) -> int:
    """The published size in the name of a file, its folder or repository, else 640; says which it took."""
    place = re.sub(r"/snapshots/[^/]+", "", str(Path(path).absolute()))  # of a Hugging Face cache
    sizes = re.findall(r"(?<![^\W_])(?:512|640|1024|1280)(?![^\W_])", "/".join(place.split("/")[-2:]))
    size, why = (sizes[-1], "from its name") if sizes else (640, "its name has none")
    print(f"notice: {path} does not say its size; taken as {size} x {size} ({why}); "
          "give --size if that is wrong", file=sys.stderr)
    return int(size)


def load(path: str | Path, device="cpu", base: str | Path | None = None) -> EoMT:
    """An evaluation-ready EoMT from any checkpoint `read` knows; `model.meta` is what that says of itself."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch finds no GPU; use --device cpu")
    config, state, meta = read(path, base)
    if "num_classes" not in config:
        raise ValueError(f"{path}: an encoder without heads; give it to train.py --encoder-weights")
    if "origin" in meta and not config["encoder"]["grid"][0]:
        config["encoder"]["grid"] = [_named_size(path) // config["encoder"]["patch"]] * 2
    with _blame(path, "describes no model"), torch.device("meta"):  # no random weights: slow
        model = build(config)
    fill(model, state, path, meta.pop("origin", None))
    if "open" in config:
        import lora
        lora.merge(model.encoder)
        model.adapters, model.meta = None, meta
        model.class_head.calibrate(**meta.get("calibration", {}))
    else:
        model.meta = {"size": config["encoder"]["grid"][0] * config["encoder"]["patch"], **meta}
    return model.to(device).eval()


def load_encoder(encoder: ViT, path: str | Path):
    """Pretrained DINOv2 / DINOv3 weights (timm, Hugging Face or an EoMT) into `encoder`; kernel and positions
    are resampled to its patch size and grid once, here."""
    config, state, meta = read(path)
    heads = ("q.", "class_head.", "mask_head.", "upscale.", "head.")  # not loaded: EoMT's, timm's classifier
    if not config["encoder"]["registers"] and encoder.prefix > 1:
        raise ValueError(f"{path}: weights without the {encoder.prefix - 1} register tokens of this encoder; "
                         "take facebook/dinov2-with-registers-*, or timm's vit_*_patch14_reg4_dinov2")
    kernel, table, grid = "encoder.patch_embed.weight", "encoder.pos_embed", config["encoder"]["grid"]
    state[kernel] = resample_patch(state[kernel], encoder.patch)
    if table in state and encoder.pos_embed is not None:
        state[table] = resample_positions(state[table], tuple(grid), encoder.grid)
    fill(nn.ModuleDict({"encoder": encoder}), state, path, meta.get("origin"), heads)


def save(path: str | Path, model: EoMT, format: str = "nanoeomt", **meta):
    """Weights and a JSON header {config, meta} in one safetensors file, all that eval and predict need; or
    format "hf": a folder for transformers' `from_pretrained`, of Eomt, or EomtDinov3 under RoPE, with the
    class names model.meta["names"]. Raises ValueError for a format, or a model that has no place in it."""
    if format not in ("nanoeomt", "hf"):
        raise ValueError(f"format {format}: unknown; nanoeomt or hf")
    if format == "hf":
        return _save_hf(path, model)
    config = dict(encoder=model.encoder.config, **model.config)
    if "open" in config:
        rows, width = model.class_head.rows.shape
        config["open"] = dict(config["open"], rows=rows, text_width=width, adapters=model.adapters)
    _write(path, model.state_dict(), {_HEADER: json.dumps(dict(config=config, meta=meta))})


def save_adapters(path: str | Path, model: OpenVocabEoMT):
    """The LoRA adapters alone, a few MB."""
    import lora
    _write(path, lora.state_dict(model.encoder), {"format": "pt"})


def _write(path, state, header):
    from safetensors.torch import save as serialise
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    Path(path).write_bytes(serialise(state, header))  # the library's own file would have mode 0600


def _save_hf(folder, model):
    if not isinstance(model.encoder, ViT):
        raise ValueError(f"{folder}: transformers' Eomt has no {type(model.encoder).__name__}; use save()")
    folder, encoder = Path(folder), model.encoder.config
    (height, width), channels, rope, swiglu = (encoder[key] for key in ("grid", "width", "rope", "swiglu"))
    hidden = (8 * channels // 3 + 7) // 8 * 8 if swiglu else 4 * channels  # what EomtConfig computes
    if rope and swiglu or not rope and (height != width or encoder["ffn"] != hidden):
        raise ValueError(f"{folder}: transformers has no Eomt like this (grid {height}x{width}, MLP "
                         f"{encoder['ffn']}, SwiGLU {swiglu}); use save()")
    names = [str(name) for name in model.meta.get("names", range(model.config["num_classes"]))]
    kind, own = "Eomt", dict(model_type="eomt", use_swiglu_ffn=swiglu)
    if rope:
        kind, own = "EomtDinov3", dict(model_type="eomt_dinov3", intermediate_size=encoder["ffn"],
                                       rope_parameters=dict(rope_type="default", rope_theta=rope))
    config = dict(
        own, architectures=[f"{kind}ForUniversalSegmentation"], dtype="float32", hidden_size=channels,
        num_hidden_layers=encoder["depth"], layer_norm_eps=encoder["eps"],
        num_attention_heads=encoder["heads"], num_register_tokens=encoder["registers"],
        patch_size=encoder["patch"], image_size=height * encoder["patch"], num_blocks=model.num_blocks,
        num_queries=model.config["num_queries"], num_upscale_blocks=len(model.upscale),
        id2label=dict(enumerate(names)), label2id={name: k for k, name in enumerate(names)})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write(folder / "model.safetensors", _hf_state(model, rope, swiglu), {"format": "pt"})


def _hf_state(model, rope, swiglu):
    """The model's tensors under transformers' names, packed ones in parts, and the constants kept there."""
    rows = [*_HF, (".attn.qkv.", ".attention.q_proj. .attention.k_proj. .attention.v_proj.")]
    if rope:
        rows += [(".projection.", "."), (".out_proj.", ".o_proj.")]
    if rope or swiglu:
        first = ".mlp.gate_proj. .mlp.up_proj." if swiglu else ".mlp.up_proj."
        rows += [(".mlp.fc1.", first), (".mlp.fc2.", ".mlp.down_proj.")]
    state = {"attn_mask_probs": torch.zeros(model.num_blocks),  # evaluation is unmasked
             "criterion.empty_weight": torch.tensor([1.0] * model.config["num_classes"] + [0.1])}
    for key, value in model.state_dict().items():
        names = [key]
        for ours, theirs in rows:
            if ours in names[0]:
                names = [names[0].replace(ours, part) for part in theirs.split()]
        value = value[0] if key == "encoder.pos_embed" else value
        state |= dict(zip(names, value.chunk(len(names)), strict=True))
    return {key: value for key, value in state.items() if not (rope and key.endswith(".k_proj.bias"))}
