"""Speed of the kernels, the model, the training step, the loader and the metrics, against rivals in one run.

In: a subject and, where the defaults do not do, an encoder, sizes, batches, a data folder. Out: a Markdown
table per case, with --json the same rows in a file. The first row that ran is ours; "ours / it" below 1 means
that we are faster. Calls of a case alternate and take random inputs in turn.

    python bench.py model --encoder dinov2_large --size 640 1280 --batch 1 8 --json model.json

Rivals do the same work on the same inputs; `error` is how far a result is from ours or from float64.
kernels: PyTorch's attention in several ways, upstream EoMT's first, and plain modules; model, train: EoMT of
transformers with our weights; data: upstream's loader; metrics: the official tools, hotcoco, torchmetrics."""
# SPDX-License-Identifier: MIT
import contextlib
import copy
import importlib.metadata
import io
import json
import os
import sys
import tempfile
import time
from functools import partial
from operator import itemgetter, sub
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, features

import data
import eomt
import metrics
import vocab
from kernels import ahead, masked_attention, pack_mask, panoptic_merge
from kernels.masked_attention import unpack
from losses import SetLoss

PEAK, BANDWIDTH = 790e12, 4.3e12  # FLOP/s of a bf16 product of 8192^3, byte/s of a copy, both on a Hopper
TABLE = "| | median (p20 / p80) ms | ours / it | rate | % of floor | peak MB | error |\n" + "|---" * 7 + "|"


# ---- Measuring. `run`: the parsed flags, with device, cuda and the rows so far -----------------------------
def clock(run, call, first, repeat=1):
    """Mean seconds of call(first), call(first + 1), ..., and on CUDA the megabytes they add at their peak."""
    if run.cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
    began = time.perf_counter()
    for i in range(first, first + repeat):
        call(i)
    if not run.cuda:
        return (time.perf_counter() - began) / repeat, None
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeat, (torch.cuda.max_memory_allocated() - before) / 1e6


def compare(run, case, calls, work=0.0, unit="image/s", floor=None, error=None):
    """Time calls (name -> function of an input number, None if not installed, or why else it does not run),
    print their table. work: what one call does, rate = work / seconds; floor: seconds that no call on Hopper
    goes below, known for FLOP and bytes; error: results of a call and of ours, the first -> how far off."""
    floor = floor or work / {"GFLOP/s": PEAK, "GB/s": BANDWIDTH}.get(unit, float("inf"))
    print(f"\n**{case}**\n\n{TABLE}", flush=True)
    repeat, samples, errors, total, first = {}, {}, {}, 0, None
    with contextlib.redirect_stdout(io.StringIO()):  # some rivals talk
        for name, call in calls.items():
            if callable(call):
                for i in (1, 2):  # compiles, fills caches; the second call records a CUDA graph
                    call(i)
                first = call(0) if first is None else first
                errors[name] = abs(error(call(0), first)) if error else None
                seconds, samples[name] = clock(run, call, 1)[0], []
                repeat[name] = min(100, max(1, int(0.02 / seconds)))
                total += repeat[name] * seconds
        for n in range(3 if run.quick else min(40, max(5, int(20 / total)))):  # about 20 seconds a case
            for name in samples:
                samples[name].append(clock(run, calls[name], n * repeat[name], repeat[name]))
    ours = next(iter(samples.values()))
    for name, call in calls.items():
        if name in samples:
            # Ratios of neighbours in time: what else the machine does weighs on both.
            ratio = np.median([a / b for (a, _), (b, _) in zip(ours, samples[name], strict=True)]).item()
            show(run, case, name, samples[name], ratio, work, unit, floor, errors[name])
        else:
            print(f"| {name} | {call or 'not installed'} | | | | | |", flush=True)
            run.rows.append(dict(case=case, name=name, note=call or "not installed"))


def show(run, case, name, samples, ratio=None, work=0.0, unit="image/s", floor=None, error=None):
    """Print and keep one row; samples are (seconds, peak megabytes)."""
    p20, median, p80 = np.quantile([seconds for seconds, _ in samples], (0.2, 0.5, 0.8)).tolist()
    peak = max(peak for _, peak in samples) if run.cuda else None
    rate = work / median / (1e9 if unit[0] == "G" else 1) if work else None
    share = 100 * floor / median if floor and run.cuda else None
    run.rows += [dict(case=case, name=name, median=median, p20=p20, p80=p80, samples=len(samples), rate=rate,
                      ours_over_it=ratio, unit=unit, floor_percent=share, peak_mb=peak, error=error)]
    values = {"{:.2f}": ratio, "{:.3g} " + unit: rate, "{:.0f}": share, "{:.1f}": peak, "{:.1e}": error}
    texts = ["-" if value is None else form.format(value) for form, value in values.items()]
    times = f"{1e3 * median:.4g} ({1e3 * p20:.4g} / {1e3 * p80:.4g})"
    print(f"| {name} | {times} | {' | '.join(texts)} |", flush=True)


def distance(got, want) -> float:
    """Largest ||got - want|| / ||want|| of pairs of tensors."""
    got, want = ([x.double() for x in tensors] for tensors in (got, want))
    return max(((g - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True))


def optional(name):
    """A module that need not be installed, or None."""
    sys.modules.setdefault("torchvision", None)  # one of another torch breaks transformers; none is needed
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)


def regions(count, height, width) -> np.ndarray:
    """uint8 (height,width) of up to `count` smooth regions 0..count-1, like the segments of a photo."""
    noise = F.interpolate(torch.randn(1, count, 7, 9), (height, width), mode="bicubic")  # (1, count, H, W)
    return noise[0].argmax(0).numpy().astype(np.uint8)


# ---- kernels -----------------------------------------------------------------------------------------------
def attention_rivals(run, grid):
    """name -> (mask logits (B,Q,4h,4w) -> mask, attend(q, k, v, mask)) of those that run here."""
    sdpa = F.scaled_dot_product_attention

    def rows(logits):
        seen = F.interpolate(logits, grid, mode="bilinear").flatten(2) > 0  # (B, Q, h*w)
        return F.pad(seen, (logits.shape[1] + 5, 0), value=True)[:, None]  # (B, 1, Q, N); 5 = cls + registers

    def dense(logits):
        mask = rows(logits)  # (B, 1, Q, N)
        return F.pad(mask, (0, 0, 0, mask.shape[3] - mask.shape[2]), value=True)  # (B, 1, N, N)

    def split(q, k, v, mask):
        n = mask.shape[2]
        return torch.cat([sdpa(q[:, :, :n], k, v, mask), sdpa(q[:, :, n:], k, v)], 2)  # (B, nh, N, hd)

    rivals = {"ours": (lambda x: pack_mask(x, grid, x.shape[1] + 5, x.shape[1] + 5 + grid[0] * grid[1]),
                       lambda q, k, v, bits: masked_attention(q, k, v, bits, bits.shape[1])),
              "mask expanded over heads (upstream)":
                  (dense, lambda q, k, v, mask: sdpa(q, k, v, mask.expand(-1, q.shape[1], -1, -1))),
              "mask[:, None]": (dense, sdpa), "split SDPA": (rows, split)}
    if run.cuda:
        flex = importlib.import_module("torch.nn.attention.flex_attention")
        attend = torch.compile(flex.flex_attention)

        def blocks(logits):
            mask = dense(logits)[:, 0]  # (B, N, N)
            return flex.create_block_mask(lambda b, h, m, n: mask[b, m, n], len(mask), None, *mask.shape[1:])

        rivals["split SDPA, compiled"] = rows, torch.compile(split)
        rivals["FlexAttention"] = blocks, lambda q, k, v, mask: attend(q, k, v, block_mask=mask)
    return rivals


def attention_step(attend, qkv, mask, grad):
    """qkv (B,N,3,nh,hd) -> (B,N,C) as the output projection wants it, with grad (B,N,C) and its gradient."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, nh, N, hd), views
    out = attend(q, k, v, mask).transpose(1, 2).flatten(2)  # (B, N, C)
    return (out,) if grad is None else (out, *torch.autograd.grad(out, qkv, grad))


def bench_attention(run, size, batch):
    """Masked attention at the encoder's shapes: forward, forward + backward, the same and making the mask."""
    row, queries = eomt.ENCODERS[run.encoder], 20 if run.quick else 200
    grid, hd = (size // row.get("patch", 16),) * 2, row["width"] // row["heads"]
    tokens, rivals = queries + 5 + grid[0] * grid[1], attention_rivals(run, grid)
    make = partial(torch.randn, device=run.device, dtype=torch.bfloat16 if run.cuda else torch.float32)
    logits = [make(batch, queries, 4 * grid[0], 4 * grid[1]) for _ in range(3)]  # 3 x (B, Q, 4h, 4w)
    qkv = [make(batch, tokens, 3, row["heads"], hd) for _ in range(3)]  # 3 x (B, N, 3, nh, hd)
    rows = make(batch, tokens, row["width"])  # (B, N, C)
    # Heads do not mix: float64 on the first one of the first image is the reference.
    head = qkv[0][:1, :, :, :1].double().requires_grad_()  # (1, N, 3, 1, hd)
    mask = rivals["mask[:, None]"][0](logits[0][:1])  # (1, 1, N, N)
    want = attention_step(F.scaled_dot_product_attention, head, mask, rows[:1, :, :hd].double())
    title = f"{run.encoder} {size}: batch {batch}, {row['heads']} heads, {tokens} tokens, {queries} masked"
    for case, passes in (("forward", 1), ("forward + backward", 3.5), ("mask + forward + backward", 3.5)):
        calls, grad, inputs = {}, rows if passes > 1 else None, [x.requires_grad_(passes > 1) for x in qkv]
        for name, (make, attend) in rivals.items():
            late, ready = (make, logits) if "mask" in case else (lambda x: x, [make(x) for x in logits])
            calls[name] = lambda i, attend=attend, late=late, ready=ready, qkv=inputs, grad=grad: \
                attention_step(attend, qkv[i % 3], late(ready[i % 3]), grad)
        calls |= {} if run.cuda else dict.fromkeys(("split SDPA, compiled", "FlexAttention"), "CUDA only")
        work = passes * 4 * batch * tokens**2 * row["width"]
        compare(run, f"masked attention, {case}, {title}", calls, work, "GFLOP/s", error=lambda got, _:
                distance([got[0][:1, :, :hd], *(g[:1, :, :, :1] for g in got[1:])], want[:len(got)]))
    moved = logits[0].numel() // 4 * logits[0].element_size()  # the middle 2 x 2 of every 4 x 4
    calls = {name: lambda i, make=rivals[name][0]: make(logits[i % 3]) for name in ("ours", "mask[:, None]")}
    compare(run, f"mask of {tokens} tokens from logits", calls, moved, "GB/s", error=lambda got, ours:
            distance([unpack(got, tokens) if got.ndim == 3 else got[:, 0, :queries]], [unpack(ours, tokens)]))
    photo, scores, up = (480, 640), torch.rand(20, device=run.device), partial(F.interpolate, mode="bilinear")

    def two(i):
        prob = up(up(logits[i % 3][:1, :20].float(), (size, size)), photo)[0].sigmoid()  # (k, H, W)
        owner = (prob * scores[:, None, None]).max(0, keepdim=True)[1]  # (1, H, W)
        return owner.where(prob.gather(0, owner) >= 0.5, 20)[0], (prob >= 0.5).sum((1, 2))

    calls = {"ours": lambda i: panoptic_merge(logits[i % 3][0, :20], scores, *[(size, size)] * 2, photo),
             "two F.interpolate": two}
    compare(run, f"merge of 20 queries, {size} to 480 x 640; error: share of other pixels", calls, 1,
            error=lambda got, ours: (got[0] != ours[0]).float().mean().item())


def bench_upscale(run, size, batch):
    """The last ScaleBlock against its modules, channels first in between as upstream."""
    side, width = size // 8, eomt.ENCODERS[run.encoder]["width"]
    block = eomt.ScaleBlock(width).to(run.device, torch.bfloat16 if run.cuda else torch.float32)
    inputs = [torch.randn(batch, side, side, width).to(block.norm.weight).requires_grad_() for _ in range(3)]
    grad = torch.randn(batch, 2 * side, 2 * side, width).to(block.norm.weight)
    stem = torch.nn.Sequential(block.conv1, torch.nn.GELU(), block.conv2)
    rivals = {"ours": block,
              "modules": lambda x: block.norm(stem(x.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1))}
    rivals |= {"modules, compiled": torch.compile(rivals["modules"])} if run.cuda else {}
    work, title = 2 * batch * side**2 * width * (4 * width + 36), f"{run.encoder} {size}, batch {batch}"
    calls = {name: torch.no_grad()(lambda i, f=f: [f(inputs[i % 3])]) for name, f in rivals.items()}
    compare(run, f"upscale, forward, {title}", calls, work, "GFLOP/s", error=distance)
    calls = {name: lambda i, f=f: torch.autograd.grad(f(inputs[i % 3]), [inputs[i % 3], *block.parameters()],
                                                      grad) for name, f in rivals.items()}
    compare(run, f"upscale, forward + backward, {title}", calls, 3 * work, "GFLOP/s", error=distance)


def ahead_of_time(run):
    """Without a GPU: what the compiler makes of the shipped configurations."""
    if run.cuda:
        return
    print("\nGPU rows were not run: there is no CUDA device. The kernels compiled ahead of time, bf16:")
    print("" if ahead.triton else "triton is not installed")
    for n, row in enumerate(ahead.rows("forward hd 64" if run.quick else "")):
        if n == 0:
            print(f"| {' | '.join(row)} |\n{'|---' * len(row)}|")
        print(f"| {' | '.join(map(str, row.values()))} |", flush=True)
        run.rows.append(dict(case="ahead of time", name=row["kernel"], **row))


# ---- model -------------------------------------------------------------------------------------------------
def model_flops(model, size, predictions=1) -> float:
    """FLOP (1 MAC = 2) of the forward pass of one size x size image with so many predictions."""
    c, width, queries = model.encoder.config, model.encoder.width, model.config["num_queries"]
    patches, total = (size // c["patch"]) ** 2, 2 * size**2 * 3 * width
    for i in range(c["depth"]):
        tokens = patches + model.encoder.prefix + (queries if i >= c["depth"] - model.num_blocks else 0)
        total += 2 * tokens * width * (4 * width + c["ffn"] * (3 if c["swiglu"] else 2) + 2 * tokens)
    cells = patches * 4 ** len(model.upscale)
    heads = 2 * queries * width * (3 * width + model.config["num_classes"] + 1 + cells)
    upscale = sum(2 * patches * 4**k * width * (4 * width + 36) for k in range(len(model.upscale)))
    return total + predictions * (heads + upscale)


def build(run, size):
    """Our model; theirs with the same weights, or None; what to say of a rival that does not run."""
    torch.compiler.reset()  # or another size is compiled for any size, which no script does
    row = {"patch": 16, **eomt.ENCODERS[run.encoder]}
    model = eomt.EoMT(eomt.ViT(**row, grid=(size // row["patch"],) * 2), 133, 20 if run.quick else 200)
    transformers, theirs = optional("transformers"), None
    if transformers:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        eomt.save(run.folder, model, format="hf")
        theirs = transformers.AutoModelForUniversalSegmentation.from_pretrained(run.folder).to(run.device)
    return model.to(run.device), theirs, "CUDA only" if theirs else "not installed"


@torch.no_grad()
def bench_network(run, size, batch):
    """The network alone, as `segment` runs it; the reference is ours in float64."""
    model, theirs, missing = build(run, size)
    images = torch.randint(256, (3, batch, 3, size, size), dtype=torch.uint8, device=run.device)
    want = copy.deepcopy(model).eval().double()(images[0][:1])[-1]
    model, dtype = model.eval(), torch.bfloat16 if run.cuda else torch.float32
    pixels = [((x / 255 - model.mean) / model.std).to(dtype) for x in images]  # 3 x (B, 3, S, S)

    def ours(**options):
        fast = eomt.accelerate(copy.deepcopy(model), **options)
        return lambda i: eomt._network(fast, images[i % 3], None)

    def rival(network):
        fields = itemgetter("masks_queries_logits", "class_queries_logits")
        return lambda i: fields(network(pixel_values=pixels[i % 3]))

    calls = {"ours, compiled": "CUDA only", "ours, fp8, compiled": "CUDA only", "ours": ours(),
             "transformers Eomt, compiled": missing, "transformers Eomt": missing}
    if run.cuda:
        calls |= {"ours, compiled": ours(batch=batch), "ours, fp8, compiled": ours(fp8=True, batch=batch)}
    if theirs:
        calls["transformers Eomt"] = rival(theirs.eval().to(dtype))
    if theirs and run.cuda:
        calls["transformers Eomt, compiled"] = rival(torch.compile(theirs, mode="reduce-overhead"))
    work, title = batch * model_flops(model, size), f"network, {run.encoder} {size}, batch {batch}, {dtype}"
    compare(run, title, calls, work, "GFLOP/s", error=lambda got, _: distance([x[:1] for x in got], want))


def bench_processing(run):
    """A 480 x 640 photo to the network's input; logits with 20 certain queries to its panoptic map."""
    size, shape, queries = run.size[0], (480, 640), 30 if run.quick else 200
    photo, window, side = torch.randint(256, (3, *shape), dtype=torch.uint8), (size, size), size // 4
    content, thing, logits = eomt.fit(shape, window), [k < 10 for k in range(133)], []
    for _ in range(3):
        inside = torch.from_numpy(regions(20, side, side)) == torch.arange(20)[:, None, None]  # (20, mh, mw)
        masks, classes = torch.randn(queries, side, side) - 4, torch.randn(queries, 134)  # (Q,mh,mw), (Q,K+1)
        masks[:20] += 8 * inside
        classes[:20, :20] += 15 * torch.eye(20)
        logits.append((masks.to(run.device), classes.to(run.device)))
    padding, name = (0, size - content[1], 0, size - content[0]), "transformers"
    before = {"ours": lambda i: F.pad(eomt.resize(photo, content), padding), name: "not installed"}
    after = dict(before, ours=lambda i: eomt.panoptic(*logits[i % 3], window, content, shape, thing))
    if pil := optional("transformers.models.eomt.image_processing_pil_eomt"):
        processor = pil.EomtImageProcessorPil(size=dict(shortest_edge=size, longest_edge=size), do_pad=True)
        before[name] = lambda i: processor(photo, return_tensors="pt")
        outputs = [SimpleNamespace(masks_queries_logits=m[None], class_queries_logits=c[None])
                   for m, c in logits]
        after[name] = lambda i: processor.post_process_panoptic_segmentation(
            outputs[i % 3], [shape], stuff_classes=list(range(10, 133)))[0]["segmentation"]
    compare(run, f"pre-processing, 480 x 640 photo to {size}", before, 1)
    compare(run, f"post-processing, {size} to a panoptic map of 480 x 640, 20 of {queries} queries kept; "
            "error: share of other pixels", after, 1, error=lambda got, ours: (
                ours.ids != (got.ids if isinstance(got, eomt.Panoptic) else got + 1)).float().mean().item())


# ---- train -------------------------------------------------------------------------------------------------
def bench_loss(run):
    """Set loss of 5 layers, batch 4, 200 queries, 20 targets: forward + backward."""
    layers, batch, queries, count, side = (2, 2, 20, 4, 16) if run.quick else (5, 4, 200, 20, 160)
    make = partial(torch.randn, device=run.device, requires_grad=True)
    predictions = [eomt.Prediction(make(batch, queries, side, side), make(batch, queries, 134))
                   for _ in range(layers)]
    leaves, criterion = [x for p in predictions for x in p], SetLoss(133)
    ids = [regions(count, 4 * side, 4 * side) == np.arange(count)[:, None, None] for _ in range(3 * batch)]
    targets = [data.Target.from_masks(masks, np.arange(count)).to(run.device) for masks in ids]
    targets = [targets[i:i + batch] for i in range(0, 3 * batch, batch)]
    losses = {"ours": lambda i: criterion(predictions, targets[i % 3])["loss"]}
    if transformers := optional("transformers"):
        module = importlib.import_module("transformers.models.mask2former.modeling_mask2former")
        oracle = module.Mask2FormerLoss(transformers.Mask2FormerConfig(num_labels=133), {}).to(run.device)
        truth = [[[t.masks().float() for t in part], [t.labels for t in part]] for part in targets]
        others = [dict(masks_queries_logits=m, class_queries_logits=c) for m, c in predictions[1:]]
        losses["transformers Mask2FormerLoss"] = lambda i: sum(  # its weights are applied outside it
            value * (2 if "cross_entropy" in key else 5)
            for key, value in oracle(*predictions[0], *truth[i % 3], others).items())
    calls = {n: lambda i, f=f: (loss := f(i), torch.autograd.grad(loss, leaves)) for n, f in losses.items()}
    calls.setdefault("transformers Mask2FormerLoss", "not installed")
    compare(run, f"set loss, {layers} layers, batch {batch}, {queries} queries, {count} targets, forward + "
            "backward; error: of the total to ours on other random points", calls, batch,
            error=lambda got, ours: (got[0] / ours[0] - 1).item())


def bench_step(run, size, batch):
    """A masked training step in parts, and without data and optimiser against transformers'."""
    model, theirs, missing = build(run, size)
    optimizer = torch.optim.AdamW(model.train().parameters(), 0.0, fused=run.cuda)  # theirs stay equal
    criterion, now = SetLoss(133), SimpleNamespace()
    cast = partial(torch.autocast, run.device.type, torch.bfloat16, enabled=run.cuda)
    batches = data.loader(open_photos(run, size), batch, 10**6)
    model.compile(disable=not run.cuda)

    def load(i):
        part = next(batches)
        now.images, now.targets = part.images.to(run.device), [t.to(run.device) for t in part.targets]

    def forward(i):
        with cast():
            now.predictions = model(now.images, torch.ones(model.num_blocks, device=run.device))

    def loss(i):
        now.loss = criterion(now.predictions, now.targets)["loss"]
        return now.loss

    def optimise(i):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()

    parts = dict(data=load, forward=forward, loss=loss)
    parts |= dict(backward=lambda i: now.loss.backward(), optimiser=optimise)
    laps = [[clock(run, part, 0) for part in parts.values()] for _ in range(4 if run.quick else 8)][2:]
    peak = clock(run, lambda i: [part(i) for part in parts.values()], 0)[1]  # a part's is above what is there
    whole = [(sum(seconds for seconds, _ in lap), peak) for lap in laps]
    case = f"training step, {run.encoder} {size}, batch {batch}, data loaded in this process"
    floor = 3 * batch * model_flops(model, size, model.num_blocks + 1) / PEAK  # backward = 2 x forward
    print(f"\n**{case}**\n\n{TABLE}")
    show(run, case, "whole", whole, None, batch, floor=floor)
    for name, lap in zip(parts, zip(*laps, strict=True), strict=True):
        share = 100 * np.median([a / b for (a, _), (b, _) in zip(lap, whole, strict=True)])
        show(run, case, f"{name}, {share:.0f} %", lap)
    calls = {"ours": lambda i: [parts[part](i) for part in ("forward", "loss", "backward")][1],
             "transformers Eomt": missing, "transformers Eomt, compiled": missing}
    if theirs:
        theirs.train().attn_mask_probs.fill_(1)
        truth = dict(pixel_values=(now.images.float() / 255 - model.mean) / model.std,
                     mask_labels=[t.masks().float() for t in now.targets],
                     class_labels=[t.labels for t in now.targets])

        def rival(i, network=theirs):
            with cast():
                total = network(**truth).loss
            total.backward()
            return total

        calls["transformers Eomt"] = rival
        if run.cuda:
            calls["transformers Eomt, compiled"] = partial(rival, network=torch.compile(theirs))
    compare(run, f"forward + loss + backward, {run.encoder} {size}, batch {batch}; error: of the loss on "
            "other random points", calls, batch, floor=floor, error=lambda got, ours: (got / ours - 1).item())


# ---- data --------------------------------------------------------------------------------------------------
def open_photos(run, size, jitter=False) -> data.SegmentDataset:
    """Training crops of --data, else of procedural photos with the pixels of 480 x 640."""
    folder, task = run.data, "auto"
    if not folder:
        folder, task = f"{run.folder}/photos", "shapes"
        data.write_shapes(folder, vocab.SHAPES, 4 if run.quick else 24, 1, size=560)
    return data.SegmentDataset(folder, task, "train", data.Augment(size, color_jitter=jitter))


def turn_hue(image, amount):
    """Float (3,H,W) of 0..1, its hue moved by `amount` of a turn: to HSV and back."""
    v, p = image.amax(0), image.amin(0)  # (H, W)
    r, g, b = (v - image) / (v - p).clamp(1e-9)  # 3 x (H, W)
    hue = torch.where(image[0] == v, b - g, torch.where(image[1] == v, 2 + r - b, 4 + g - r))  # in sixths
    hue = (hue / 6 + amount) % 1 * 6  # (H, W)
    q, t = v - (v - p) * (hue % 1), p + (v - p) * (hue % 1)  # (H, W)
    sectors = (v, q, p, p, t, v), (t, v, v, q, p, p), (p, p, t, v, v, q)
    mine = hue.floor() % 6 == torch.arange(6)[:, None, None]  # (6, H, W)
    return (torch.stack([torch.stack(six) for six in sectors]) * mine).sum(1)  # (3, H, W)


def float_jitter(image, steps):
    """Steps of data.draw_jitter on all of uint8 (3,H,W) as torchvision does them to tensors: in float32."""
    for kind, amount, _ in steps:
        if kind == "hue":
            image = (turn_hue(image / 255, amount / 6) * 255).round().byte()
            continue
        r, g, b = image  # 3 x (H, W)
        base = 0.0 if kind == "brightness" else (r * 0.299).add_(g, alpha=0.587).add_(b, alpha=0.114)
        base = base.mean() if kind == "contrast" else base
        image = (image * amount).add_(base * (1 - amount)).clamp_(0, 255).byte()
    return image


def mask_by_mask(dataset, key):
    """EoMT's own loader in the calls it comes down to: ids found by sorting the map, a full-size bool mask of
    each, then jitter, flip, resize (bool by way of float32), pad and crop of the picture and all masks."""
    (epoch, index, seed), source, augment = key, dataset.source, dataset.transform
    rng = np.random.default_rng((seed, epoch, index))
    files = source.images.read(source.members[index]), source.pngs.read(source.png_members[index])
    photo, png = (Image.open(io.BytesIO(file)).convert("RGB") for file in files)
    window, size = augment.draw(photo.height, photo.width, rng), augment.size
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)  # (3, H, W)
    image = float_jitter(image, data.draw_jitter(photo, rng)) if augment.color_jitter else image
    ids = torch.from_numpy(np.array(png)).long() @ torch.tensor([1, 256, 65536])  # (H, W)
    masks = torch.stack([ids == k for k in ids.unique() if k.item()])  # (T, H, W), without void
    image, masks = (x.flip(-1) if window.flip else x for x in (image, masks))
    image = F.interpolate(image[None], window[:2], mode="bilinear", antialias=True)[0]  # (3, h, w)
    masks = F.interpolate(masks.float()[None], window[:2], mode="nearest-exact")[0].bool()  # (T, h, w)
    box = -window.left, window.left + size - window.width, -window.top, window.top + size - window.height
    image, masks = F.pad(image, box).contiguous(), F.pad(masks, box)  # (3, S, S), (T, S, S)
    return image, masks[masks.flatten(1).any(1)]


def bench_data(run, size, batch):
    """Training crops without and with colour jitter, in this process, of the same images."""
    for jitter in (False, True):
        stream = data.loader(dataset := open_photos(run, size, jitter), batch, 10**6)
        calls = {"ours": lambda i, s=stream: next(s), "mask by mask": lambda i, d=dataset: [
            mask_by_mask(d, key) for key in data.positions(len(d), batch, 0, i)]}
        if dataset.task.layout != "coco_panoptic":
            calls["mask by mask"] = "panoptic data only"
        case = f"{batch} training crops of {size} with{'' if jitter else 'out'} jitter"
        compare(run, f"{case} from {run.data or 'procedural photos'}, one core", calls, batch)


# ---- metrics -----------------------------------------------------------------------------------------------
def bench_pq(run):
    """Panoptic quality of 15 regions an image and the same moved; the rivals take nothing but PNG files."""
    count, sides, thing = 4 if run.quick else 200, {"true": [], "pred": []}, [k < 3 for k in range(5)]
    for k in range(count):
        true = regions(15, 480, 640).astype(np.int32) + 1 if k < 20 else sides["true"][k - 20][0]  # (H, W)
        for name, ids in (("true", true), ("pred", np.roll(true, (k % 9, k % 7), (0, 1)))):
            sides[name].append((ids, [dict(id=s, category_id=s % 5, iscrowd=0, area=int((ids == s).sum()))
                                      for s in np.unique(ids).tolist()]))

    def ours(i):
        metric = metrics.PanopticQuality(thing)
        for true, pred in zip(*sides.values(), strict=True):
            metric.update(*pred, *true)
        return metric.compute()["PQ"]

    files = [f"{run.folder}/{name}.json" for name in sides]  # the truth first
    for name, side in sides.items():
        os.mkdir(f"{run.folder}/{name}")
        for k, (ids, _) in enumerate(side):
            data.write_ids(ids, f"{run.folder}/{name}/{k}.png")
        rows = [dict(image_id=k, file_name=f"{k}.png", segments_info=s) for k, (_, s) in enumerate(side)]
        Path(run.folder, f"{name}.json").write_text(json.dumps(dict(
            images=[dict(id=k, height=480, width=640) for k in range(count)], annotations=rows,
            categories=[dict(id=k, name=str(k), isthing=int(t)) for k, t in enumerate(thing)])))
    calls = {"ours": ours}
    for name, module in (("hotcoco", "hotcoco.panoptic"), ("panopticapi", "panopticapi.evaluation")):
        found = optional(module)
        calls[name] = found and (lambda i, f=found: f.pq_compute(*files)["All"]["pq"])
    compare(run, f"PQ of {count} maps 480 x 640, which rivals read from PNG files", calls, count, error=sub)


def bench_miou(run):
    """Mean IoU of maps of 19 classes."""
    (height, width), count = ((256, 512), 2) if run.quick else ((1024, 2048), 100)
    maps = [[regions(19, height, width) for _ in range(2)] for _ in range(2)]

    def evaluate(metric, order, convert=np.asarray):
        for k in range(count):
            metric.update(*map(convert, maps[k % 2][::order]))  # hotcoco wants the truth first
        return metric

    coco, torchmetrics = optional("hotcoco"), optional("torchmetrics.classification")
    calls = {"ours": lambda i: evaluate(metrics.MeanIoU(19), 1).compute()["mIoU"]}
    calls["hotcoco"] = coco and (lambda i: evaluate(
        coco.semantic.SemanticEval(19), -1).report()["metrics"]["mIoU"])
    calls["torchmetrics"] = torchmetrics and (lambda i: evaluate(
        torchmetrics.MulticlassJaccardIndex(19, validate_args=False), 1, torch.from_numpy).compute().item())
    compare(run, f"mIoU of {count} maps {height} x {width}", calls, count, error=sub)


def bench_ap(run):
    """Mask AP from RLE: 30 detections and 8 objects an image; detections are objects moved by some pixels."""
    rng, count, images, objects, results = np.random.default_rng(0), 5 if run.quick else 500, [], [], []
    ids = [regions(40, 480, 640) for _ in range(2 if run.quick else 20)]  # 400 runs a mask; COCO's have 100
    for k in range(count):
        true = [ids[k % len(ids)] == s for s in rng.choice(40, 8, replace=False)]  # 8 x (H, W)
        source, shift, own = rng.integers(8, size=30), rng.integers(-9, 10, (30, 2)), rng.integers(80, size=8)
        masks = [np.roll(true[s], d, (0, 1)) for s, d in zip(source, shift, strict=True)] + true
        masks, labels = [metrics.rle_encode(mask) for mask in masks], [*own[source].tolist(), *own.tolist()]
        scores, area = rng.random(30).tolist(), [int(mask.sum()) for mask in true]
        images.append((dict(masks=masks[:30], scores=scores, labels=labels[:30]),
                       dict(masks=masks[30:], labels=labels[30:], area=area)))
        rows = [dict(image_id=k, category_id=c, segmentation=m) for c, m in zip(labels, masks, strict=True)]
        results += [dict(row, score=score) for row, score in zip(rows[:30], scores, strict=True)]
        objects += [dict(row, id=8 * k + j + 1, area=area[j], bbox=[0, 0, 1, 1], iscrowd=0)
                    for j, row in enumerate(rows[30:])]

    def ours(i):
        metric = metrics.MaskAP(80)
        for k, (found, truth) in enumerate(images):
            metric.update(found, truth, f"{k:09}")
        return metric.compute()["AP"]

    def official(i, truth, evaluation):  # loadRes reads the detections' RLE, as update does
        done = evaluation(truth, truth.loadRes([*map(dict, results)]), "segm")
        for step in (done.evaluate, done.accumulate, done.summarize):
            step()
        return done.stats[0]

    path, categories = Path(run.folder, "objects.json"), [dict(id=k, name=str(k)) for k in range(80)]
    frames = [dict(id=k, height=480, width=640) for k in range(count)]
    path.write_text(json.dumps(dict(images=frames, annotations=objects, info={}, categories=categories)))
    calls = {"ours": ours}
    for name, *names in (("pycocotools", "pycocotools.coco", "pycocotools.cocoeval"),
                         ("hotcoco", "hotcoco", "hotcoco")):
        coco, scores = map(optional, names)
        with contextlib.redirect_stdout(io.StringIO()):
            calls[name] = coco and partial(official, truth=coco.COCO(str(path)), evaluation=scores.COCOeval)
    compare(run, f"mask AP of {count} images, 30 detections, 8 objects, from RLE", calls, count, error=sub)


# ---- main --------------------------------------------------------------------------------------------------
# Cases of every size and batch, cases run once, (encoder, sizes, batches) on CUDA, the same on a CPU.
LARGE, SMALL = "dinov2_large", "dinov2_small"
SUBJECTS = {
    "kernels": ([bench_attention, bench_upscale], [ahead_of_time], (LARGE, [640], [4]),
                (SMALL, [224, 640], [1])),
    "model": ([bench_network], [bench_processing], (LARGE, [640], [1, 8]), (SMALL, [224], [1, 8])),
    "train": ([bench_step], [bench_loss], (LARGE, [640], [4]), (SMALL, [224], [4])),
    "data": ([bench_data], [], (LARGE, [640], [8]), (LARGE, [640], [8])),
    "metrics": ([], [bench_pq, bench_miou, bench_ap], (LARGE, [640], [8]), (LARGE, [640], [8])),
}


def parser():
    p = data.Arguments(description=__doc__.splitlines()[0])
    p.add_argument("subject", choices=SUBJECTS)
    p.add_argument("--encoder", choices=eomt.ENCODERS)
    p.add_argument("--size", type=int, nargs="+", help="pixels of a side, one or more")
    p.add_argument("--batch", type=int, nargs="+", help="images of a call, one or more")
    p.add_argument("--data", help="a data folder for train and data (default: procedural photos)")
    p.add_argument("--json", help="also write the rows to this file")
    p.add_argument("--threads", type=int, default=1, help="CPU threads")
    p.add_argument("--quick", action="store_true", help="small shapes, seconds")
    return p


def measure(argv):
    run = parser().parse_args(argv)
    run.cuda, run.rows = torch.cuda.is_available(), []
    run.device = torch.device("cuda" if run.cuda else "cpu")
    each, once, gpu, cpu = SUBJECTS[run.subject]
    encoder, size, batch = ("tiny", [64], [2]) if run.quick else gpu if run.cuda else cpu
    run.encoder, run.size, run.batch = run.encoder or encoder, run.size or size, run.batch or batch
    if min(*run.size, *run.batch, run.threads) < 1:
        raise ValueError("--size, --batch, --threads: numbers from 1 on; see --help")
    for size in run.size if run.subject in ("kernels", "model", "train") else ():
        if size % (patch := eomt.ENCODERS[run.encoder].get("patch", 16)):
            raise ValueError(f"--size {size}: no multiple of the patch size; take a multiple of {patch}")
    if run.json:
        data.writable(run.json)  # what cannot be written is known now, not after the measuring
    torch.set_num_threads(run.threads)
    os.environ.setdefault("RAYON_NUM_THREADS", str(run.threads))  # hotcoco's
    versions, zlib = {p.name: p.version for p in importlib.metadata.distributions()}, features.version("zlib")
    rivals = ("transformers", "panopticapi", "pycocotools", "hotcoco", "torchmetrics")
    about = dict(command=f"python bench.py {' '.join(argv)}",
                 gpu=torch.cuda.get_device_name() if run.cuda else "none", torch=torch.__version__,
                 triton=getattr(optional("triton"), "__version__", "not installed"),
                 cpu=f"{torch.backends.cpu.get_cpu_capability()}, {run.threads} thread(s), zlib {zlib}",
                 rivals=", ".join(f"{name} {versions.get(name, 'not installed')}" for name in rivals))
    print("\n".join(f"{key}: {value}" for key, value in about.items()), flush=True)
    torch.manual_seed(0)
    sized = [partial(case, size=s, batch=b) for case in each for s in run.size for b in run.batch]
    with tempfile.TemporaryDirectory() as run.folder:
        for case in [*sized, *once]:
            case(run)
    if run.json:
        Path(run.json).write_text(json.dumps(dict(**about, rows=run.rows), indent=1))


def main():
    data.command(measure, sys.argv[1:])


if __name__ == "__main__":
    main()
