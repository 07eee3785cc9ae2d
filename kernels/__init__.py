"""Fused ops of EoMT beside their plain-torch references: Triton on CUDA, torch elsewhere, the same numbers;
`packed` and fp8_linear.py are layers for inference.

In and out: see the file of each name. EOMT_KERNELS=torch|triton forces a path.

    bits = pack_mask(mask_logits, (40, 40), 205, 1805, keep_prob=0.5, noise=torch.rand(2, 200))
    out = masked_attention(q, k, v, bits, num_masked_rows=200)
"""
# SPDX-License-Identifier: MIT
from .masked_attention import masked_attention
from .pack_mask import pack_mask
from .packed_linear import packed
from .panoptic_merge import panoptic_merge, restored
from .upscale import mask_product, upscale

__all__ = ["mask_product", "masked_attention", "pack_mask", "packed", "panoptic_merge", "restored", "upscale"]
