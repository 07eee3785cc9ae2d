"""Speed of the kernels, the model, the training step, the loader and the metrics, against rivals in one run.

In: a subject, and if not the defaults an encoder, sizes, batches, a data folder. Out: a Markdown table for
each case, and with --json the same rows in a file. The first row of a case is ours; "ours / it" below 1 means
that we are faster. Calls of a case alternate and take random inputs in turn.

    python bench.py model --encoder dinov2_large --size 640 --batch 1 8 --json model.json
"""
# SPDX-License-Identifier: MIT
import argparse
import contextlib
import copy
import importlib
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data
import eomt
import metrics
import vocab
from kernels import masked_attention, pack_mask
from losses import Prediction, SetLoss  # noqa

PEAK, BANDWIDTH = 790e12, 4.3e12  # FLOP/s of a bf16 product 8192^3 and byte/s of a copy, measured on Hopper
SCALES = {"FLOP/s": (1e12, "TFLOP/s"), "B/s": (1e9, "GB/s")}
HEAD = "| | median (p20 / p80) ms | ours / it | rate | % of floor | peak MB | error |\n" + "|---" * 7 + "|"


# ---- Measuring ---------------------------------------------------------------------------------------------
class Run(NamedTuple):
    """What all cases share."""

    args: argparse.Namespace
    device: torch.device
    cuda: bool
    rows: list


def clock(run, call, first, repeat):
    """Mean seconds of call(first), call(first + 1), ..."""
    if run.cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
    began = time.perf_counter()
    for i in range(first, first + repeat):
        call(i)
    if not run.cuda:
        return (time.perf_counter() - began) / repeat
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeat


def prepare(run, call):
    """Warm a call up: its seconds and, on CUDA, the megabytes it takes at its peak."""
    call(0)  # compiles, allocates, fills caches
    if not run.cuda:
        return clock(run, call, 1, 1), None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return clock(run, call, 1, 1), (torch.cuda.max_memory_allocated() - before) / 1e6


def compare(run, case, calls, work=0.0, unit="", floor=None, errors=None):
    """Time calls (name -> function of an input number, or the reason why it does not run), print their table.

    work: what a call does, in `unit` without its "/s"; floor: seconds that no call on Hopper goes below.
    """
    print(f"\n**{case}**\n\n{HEAD}", flush=True)
    ready = {name: call for name, call in calls.items() if callable(call)}
    cost = {name: prepare(run, call) for name, call in ready.items()}
    repeat = {name: min(100, max(1, int(0.02 / seconds))) for name, (seconds, _) in cost.items()}
    total = sum(repeat[name] * seconds for name, (seconds, _) in cost.items())
    rounds = 3 if run.args.quick else min(40, max(5, int(20 / total)))  # about 20 seconds a case
    samples = {name: [] for name in ready}
    for n in range(rounds):
        for name, call in ready.items():
            samples[name].append(clock(run, call, n * repeat[name], repeat[name]))
    ours = next(iter(samples.values()))
    for name, call in calls.items():
        if name in ready:
            # Neighbours in time: what else the machine does weighs on both.
            ratio = statistics.median(a / b for a, b in zip(ours, samples[name], strict=True))
            show(run, case, name, samples[name], ratio, work, unit, floor if run.cuda else None,
                 cost[name][1], (errors or {}).get(name))
        else:
            print(f"| {name} | {call} | | | | | |", flush=True)
            run.rows.append(dict(case=case, name=name, note=call))


def show(run, case, name, samples, ratio=None, work=0.0, unit="", floor=None, peak=None, error=None):
    """Print a row of a table and keep it; samples are seconds."""
    p20, median, p80 = np.quantile(samples, (0.2, 0.5, 0.8)).tolist()
    rate, share = work / median if work else None, 100 * floor / median if floor else None
    run.rows.append(dict(case=case, name=name, median=median, p20=p20, p80=p80, samples=len(samples),
                         ours_over_it=ratio, rate=rate, unit=unit, floor_percent=share, peak_mb=peak, error=error))
    scale, unit = SCALES.get(unit, (1, unit))
    cells = ((ratio, "{:.2f}"), (rate and rate / scale, "{:.3g} " + unit), (share, "{:.0f}"), (peak, "{:.1f}"),
             (error, "{:.1e}"))
    texts = ["-" if value is None else form.format(value) for value, form in cells]
    print(f"| {name} | {1e3 * median:.4g} ({1e3 * p20:.4g} / {1e3 * p80:.4g}) | {' | '.join(texts)} |", flush=True)


def error(got, want) -> float:
    """Largest ||got - want|| / ||want|| of pairs of tensors."""
    pairs = zip(got, want, strict=True)
    return max(((g.double() - w.double()).norm() / w.double().norm()).item() for g, w in pairs)


def optional(name):
    """A module that need not be installed, or None."""
    sys.modules.setdefault("torchvision", None)  # a wrong one breaks transformers; nothing here needs it
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)


def regions(count, height, width) -> np.ndarray:
    """uint8 (height,width) of up to `count` smooth regions 0..count-1, like the segments of a photo."""
    noise = F.interpolate(torch.randn(1, count, 7, 9), (height, width), mode="bicubic")  # (1, count, H, W)
    return noise[0].argmax(0).numpy().astype(np.uint8)


# ---- kernels -----------------------------------------------------------------------------------------------
class Mask(NamedTuple):
    """One mask in the forms its users want."""

    bits: torch.Tensor | None  # int32 (B, Q, words)
    dense: torch.Tensor  # bool (B, N, N)
    queries: int
    blocks: object = None  # FlexAttention's, CUDA only


def dense_mask(logits, grid):
    """The bool (B,N,N) that upstream makes of mask logits (B,Q,4h,4w)."""
    start = logits.shape[1] + 5  # queries, then cls and 4 registers, then patches
    tokens = start + grid[0] * grid[1]
    mask = torch.ones(len(logits), tokens, tokens, dtype=torch.bool, device=logits.device)  # (B, N, N)
    mask[:, :start - 5, start:] = F.interpolate(logits, grid, mode="bilinear").flatten(2) > 0
    return mask


def packed_mask(logits, grid):
    start = logits.shape[1] + 5
    return pack_mask(logits, grid, start, start + grid[0] * grid[1])  # (B, Q, words)


def split(q, k, v, mask):
    sdpa, rows = F.scaled_dot_product_attention, mask.dense[:, None, :mask.queries]  # (B, 1, Q, N)
    masked = sdpa(q[:, :, :mask.queries], k, v, rows)  # (B, nh, Q, hd)
    return torch.cat([masked, sdpa(q[:, :, mask.queries:], k, v)], 2)  # (B, nh, N, hd)


def broadcast(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask.dense[:, None])


def expanded(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask.dense[:, None].expand(-1, q.shape[1], -1, -1))


def attention_rivals(flex):
    """name -> attend(q, k, v, mask)."""
    rivals = {"ours": lambda q, k, v, mask: masked_attention(q, k, v, mask.bits, mask.queries),
              "dense mask, expanded over heads (upstream)": expanded, "dense mask[:, None]": broadcast,
              "split SDPA": split}
    if flex is None:
        return rivals | dict.fromkeys(("FlexAttention", "split SDPA, compiled"), "CUDA only")
    fused = torch.compile(flex.flex_attention)
    return rivals | {"FlexAttention": lambda q, k, v, mask: fused(q, k, v, block_mask=mask.blocks),
                     "split SDPA, compiled": torch.compile(split)}


def attention_step(attend, qkv, mask, grad):
    """qkv (B,N,3,nh,hd) -> (B,N,C) as the output projection wants it, and with grad (B,N,C) qkv's gradient."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, nh, N, hd), views
    out = attend(q, k, v, mask).transpose(1, 2).flatten(2)  # (B, N, C)
    return (out,) if grad is None else (out, *torch.autograd.grad(out, qkv, grad))


def attention_error(attend, qkv, mask, grad):
    """Against float64 on the first head of the first image; heads do not mix."""
    size = qkv.shape[-1]
    head = qkv[:1, :, :, :1].detach().double().requires_grad_(grad is not None)  # (1, N, 3, 1, hd)
    part = None if grad is None else grad[:1, :, :size].double()  # (1, N, hd)
    want = attention_step(broadcast, head, Mask(None, mask.dense[:1], mask.queries), part)
    out, *grads = attention_step(attend, qkv, mask, grad)
    return error([out[:1, :, :size], *(g[:1, :, :, :1] for g in grads)], want)


def bench_kernels(run):
    """Masked attention and mask packing at the encoder's shapes; without a GPU also what one would run."""
    args = run.args
    flex = importlib.import_module("torch.nn.attention.flex_attention") if run.cuda else None
    row, queries = eomt.ENCODERS[args.encoder], 20 if args.quick else 200
    make = partial(torch.randn, device=run.device, dtype=torch.bfloat16 if run.cuda else torch.float32)
    for size, batch in ((size, batch) for size in args.size for batch in args.batch):
        grid = (size // row.get("patch", 16),) * 2
        logits = [make(batch, queries, 4 * grid[0], 4 * grid[1]) for _ in range(3)]  # 3 x (B, Q, 4h, 4w)
        masks = []
        for x in logits:
            dense = dense_mask(x, grid)
            blocks = flex and flex.create_block_mask(lambda b, h, m, n, dense=dense: dense[b, m, n], batch, None,
                                                     *dense.shape[1:], device=run.device)  # not timed
            masks.append(Mask(packed_mask(x, grid), dense, queries, blocks))
        tokens, shape = dense.shape[1], (batch, dense.shape[1], 3, row["heads"], row["width"] // row["heads"])
        title = f"{args.encoder} {size}: batch {batch}, {row['heads']} heads, {tokens} tokens, {queries} masked"
        for what, passes in (("forward", 1), ("forward + backward", 3.5)):
            qkv = [make(shape, requires_grad=passes > 1) for _ in range(3)]  # 3 x (B, N, 3, nh, hd)
            grad = None if passes == 1 else make(batch, tokens, row["width"])  # (B, N, C)
            rivals = attention_rivals(flex)
            calls = {name: (lambda i, a=a, qkv=qkv, grad=grad, masks=masks: attention_step(
                a, qkv[i % 3], masks[i % 3], grad)) if callable(a) else a for name, a in rivals.items()}
            errors = {name: attention_error(a, qkv[0], masks[0], grad) for name, a in rivals.items() if callable(a)}
            work = passes * 4 * batch * tokens**2 * row["width"]
            compare(run, f"masked attention, {what}, {title}", calls, work, "FLOP/s", work / PEAK, errors)
        moved = logits[0].numel() // 4 * logits[0].element_size()  # the middle 2 x 2 of every 4 x 4
        calls = {"ours": lambda i, logits=logits, grid=grid: packed_mask(logits[i % 3], grid),
                 "bool (B, N, N) (upstream)": lambda i, logits=logits, grid=grid: dense_mask(logits[i % 3], grid)}
        compare(run, f"mask packing, {title}", calls, moved, "B/s", moved / BANDWIDTH)
    if not run.cuda:
        ahead_of_time(run)


# ---- kernels without a GPU: compiled ahead of time ---------------------------------------------------------
def compile_kernel(kernel, arch, constants, options):
    """The bf16 cubin that a launch on contiguous, aligned tensors gets, and its bytes of shared memory."""
    compiler, backends = (importlib.import_module(f"triton.{n}") for n in ("compiler", "backends.compiler"))
    pointers = {"BITS": "*i32", "KEEP": "*i1", "LSE": "*fp32", "DELTA": "*fp32"}
    axes = {"sb": 3, "sl": 3, "sd": 3, "sk": 2 if "KEEP" in kernel.arg_names else 4}  # of each tensor's strides
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[i,] = "constexpr", constants[name]
        elif name[0] == "s" and len(name) <= 3:
            last = axes.get(name, 4) - 1
            signature[name], constexprs[i, last] = ("i32",) * last + ("constexpr",), 1
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(last) if last == 3}
        elif name.isupper() and name not in ("M", "N"):
            signature[name], attributes[i,] = pointers.get(name, "*bf16"), [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    done = compiler.compile(source, target=backends.GPUTarget("cuda", arch, 32), options=options)
    return done.asm["cubin"], done.metadata.shared


def dump(binary, tool, flag):
    """What a tool of triton's wheel says of a cubin."""
    path = Path(importlib.import_module("triton").__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([path, flag, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def ahead_of_time(run):
    """Every shipped configuration on sm_90 and sm_80."""
    print("\nGPU rows were not run: there is no CUDA device. Ahead of time, bf16:\n")
    if optional("triton") is None:
        print("triton is not installed")
        return
    attention, pack = (importlib.import_module(f"kernels.{n}") for n in ("masked_attention", "pack_mask"))
    small = dict(WORDS=pack.WORDS, num_warps=4, num_stages=2)
    jobs = [(arch, "pack", "-", pack._pack_kernel, small) for arch in (90, 80)]
    for arch, family in ((90, "big"), (80, "small")):
        for step, size in ((step, size) for size in attention.HEAD_SIZES for step in attention.CONFIGS[family]):
            kernel = getattr(attention, f"_{step}_kernel")
            jobs.append((arch, step, size, kernel, attention.config(family, step, size)))
    columns = ("arch", "kernel", "head", "tile", "warps", "registers", "spilled", "shared KiB", "HGMMA", "HMMA")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for arch, step, size, kernel, constants in jobs[1:3] if run.args.quick else jobs:
        options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
        binary, shared = compile_kernel(kernel, arch, dict(constants), options)
        usage, code = dump(binary, "cuobjdump", "-res-usage"), dump(binary, "nvdisasm", "-c")
        registers, *spills = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
        counts = (len(re.findall(rf"\b{word}\b", code)) for word in ("HGMMA", "HMMA"))
        tile = f"{constants['BM']}x{constants['BN']}" if "BM" in constants else f"{pack.WORDS} words"
        values = (f"sm_{arch}", step, size, tile, options["num_warps"], registers, sum(spills), shared >> 10, *counts)
        print(f"| {' | '.join(map(str, values))} |", flush=True)
        run.rows.append(dict(case="ahead of time", **dict(zip(columns, values, strict=True))))
