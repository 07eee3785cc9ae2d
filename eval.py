"""A checkpoint and a data set to numbers: PQ, mIoU or mask AP, and exported predictions.

    python eval.py --ckpt runs/quick --data runs/shapes
    torchrun --nproc_per_node=4 eval.py --ckpt runs/x --data /coco --save-panoptic out/
    python eval.py --ckpt runs/ov/B --data /coco --split ovp_val --sweep ov-bias=0,0.5,1     # open vocabulary
    python eval.py --ckpt runs/ov/B --data /ade --task ade20k_panoptic                       # other classes
    python eval.py --ckpt google/siglip2-large-patch16-512 --gt-masks --data /coco           # before training

Ranks share the images without padding and merge exact counts, so N processes print the digits of one.
Evaluation never skips an image: the score is of the whole set, or there is none.
"""
# SPDX-License-Identifier: MIT
import argparse
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import data
import eomt
import metrics
import siglip2
import vocab


@dataclass
class Result:
    """Numbers by name (percent), the name of the headline, (class, percent) rows, and the effort."""

    numbers: dict[str, float]
    headline: str
    per_class: list[tuple[str, float]]
    images: int
    seconds: float
    partial: bool


SHOWN = {"PQ": "PQ PQ_th PQ_st SQ RQ",
         "hPQ": "PQ_all PQ_th PQ_st PQ_seen PQ_unseen PQ_unseen_th PQ_unseen_st hPQ SQ RQ",
         "mIoU": "mIoU mIoU_upstream pixel_accuracy mIoU_seen mIoU_unseen",
         "AP": "AP AP50 AP75 AP_small AP_medium AP_large AP_seen AP_unseen"}


def line(result: Result) -> str:
    """The one line an evaluation ends with."""
    shown = SHOWN["hPQ" if "hPQ" in result.numbers else result.headline].split()
    text = " ".join(f"{key} {result.numbers[key]:.2f}" for key in shown if key in result.numbers)
    return f"{text} images {result.images} in {result.seconds:.1f} s" + " (partial)" * result.partial


def as_json(values: dict, indent: int | None = None) -> str:
    """JSON text; NaN and infinities, which JSON lacks, become null."""
    return json.dumps(json.loads(json.dumps(values), parse_constant=lambda word: None), indent=indent)


# ---- One image: model output and target in the metric's terms ----------------------------------------------
def add_panoptic(metric, result, sample):
    target = sample.target
    rows = zip(target.labels.tolist(), target.area.tolist(), target.crowd.tolist(), strict=True)
    truth = [dict(id=t, category_id=label, area=area, iscrowd=int(crowd))
             for t, (label, area, crowd) in enumerate(rows, 1)]
    found = [dict(id=s, category_id=label) for s, label in enumerate(result.labels.tolist(), 1)]
    metric.update(result.ids.cpu().numpy(), found, target.disjoint_ids(), truth, sample.name)


def add_semantic(metric, result, sample):
    table = np.concatenate([[metric.ignore], sample.target.labels.numpy()])  # (T+1,)
    metric.update(result.cpu().numpy(), table[sample.target.disjoint_ids()], sample.name)


def overlaps(masks, truth, chunk=1 << 18):
    """Areas (D,) and (G,), shared pixels (D,G), int64, of bool masks (D,H,W) and (G,H,W) on one device.
    Sums of 0/1 products in fp32 (TF32 too) are exact up to 2**24; a chunk of 100 masks takes 100 MB."""
    a, b = masks.flatten(1), truth.flatten(1)  # (D, H*W), (G, H*W)
    pairs = zip(a.split(chunk, 1), b.split(chunk, 1), strict=True)
    shared = sum((part.float() @ other.float().mT).long() for part, other in pairs)  # (D, G)
    return a.sum(1), b.sum(1), shared


def add_instance(metric, result, sample):
    target, masks, name = sample.target, result.masks, f"{sample.image_id:012} {sample.name}"
    found = dict(scores=result.scores.cpu().numpy(), labels=result.labels.cpu().numpy())
    truth = dict(labels=target.labels.numpy(), crowd=target.crowd.numpy(), area=target.area.numpy())
    if masks.is_cuda:  # counted where they are: 100 masks are 30 MB, their counts some kB
        counts = overlaps(masks, target.to(masks.device).masks())
        found["pixels"], truth["pixels"], shared = (count.cpu().numpy() for count in counts)
        metric.update_overlaps(found, truth, shared, name)
    else:  # bits are faster than products here
        found["masks"], truth["masks"] = masks.cpu().numpy(), target.masks().numpy()
        metric.update(found, truth, name)


def percent(value):
    """Scores in percent; counts, nan and COCO's -1 (no such object) as they are."""
    return 100 * value if isinstance(value, float) and value >= 0 else value


# ---- A data set --------------------------------------------------------------------------------------------
def gather(value) -> list:
    """The `value` of every rank, on every rank."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def make_metric(meta):
    """(metric, how to add an image, headline number, its name in the per-class rows) for a model's kind."""
    count = len(meta["names"])
    return {"panoptic": (metrics.PanopticQuality(meta["thing"]), add_panoptic, "PQ", "PQ"),
            "semantic": (metrics.MeanIoU(count), add_semantic, "mIoU", "IoU"),
            "instance": (metrics.MaskAP(count), add_instance, "AP", "AP")}[meta["kind"]]


def split_groups(meta) -> dict[str, list[int]]:
    """The classes of a split: seen, unseen, and the latter's things and stuff; {} without unseen ones."""
    classes = range(len(meta["names"]))
    seen = meta.get("seen", classes)
    unseen = meta.get("unseen") or [k for k in classes if k not in seen]
    things = [k for k in unseen if meta["thing"][k]]
    stuff = [k for k in unseen if not meta["thing"][k]]
    return dict(seen=list(seen), unseen=list(unseen), unseen_th=things, unseen_st=stuff) if unseen else {}


def conclude(metric, meta, headline, column) -> tuple[dict, list]:
    """Numbers by name and (class, number) rows, in percent, of a metric that all ranks' images are in."""
    rows = [(meta["names"][row["class"]], percent(row[column])) for row in metric.per_class()]
    groups = split_groups(meta)
    numbers = metric.compute(groups) if groups and headline == "PQ" else metric.compute()
    numbers = {key: percent(value) for key, value in numbers.items()}
    if groups and headline == "PQ":
        a, b = numbers["PQ_seen"], numbers["PQ_unseen"]  # nan where a group has no class
        numbers |= {"PQ_all": numbers["PQ"], "hPQ": 2 * a * b / (a + b) if a + b else 0.0}
    elif groups:
        for name in ("seen", "unseen"):
            real = [rows[k][1] for k in groups[name] if rows[k][1] >= 0]
            numbers[f"{headline}_{name}"] = sum(real) / len(real) if real else float("nan")
    return numbers, rows


def evaluate(model, dataset, rank=0, world=1, workers=0, limit=0, masked=False, exports=()) -> Result:
    """Numbers of `model` on `dataset` (data.SegmentDataset, no transform); `model.meta` says kind and names.
    limit: only the first images (then `partial`); masked: masked attention as in training; exports: each is
    called with every (result, sample). Runs on the model's device; every rank gets the same Result."""
    return evaluate_each(model, dataset, [lambda: None], rank, world, workers, limit, masked, exports)[0]


def evaluate_each(model, dataset, turns, rank, world, workers, limit, masked, exports=()) -> list[Result]:
    """A Result for each of `turns`: every batch is asked about as often, after a call of each."""
    began, meta, training = time.time(), model.meta, model.training
    kinds = [make_metric(meta) for _ in turns]
    device = model.eval().mean.device
    mask_prob = torch.ones(model.num_blocks, device=device) if masked else None
    images, batch = min(limit or len(dataset), len(dataset)), 8 if device.type == "cuda" else 1
    resize = partial(eomt.fitted, window=(meta["size"],) * 2, kind=meta["kind"])

    def count(kind, results, samples):
        for result, sample in zip(results, samples, strict=True):
            kind[1](kind[0], result, sample)
            for export in exports:
                export(result, sample)

    # a thread counts one batch while the model is at the next: in order, at most two batches in memory
    bar = tqdm(total=images, unit="img", disable=rank > 0 or not sys.stderr.isatty())
    with bar, ThreadPoolExecutor(1) as thread:
        counted = thread.submit(count, kinds[0], [], [])
        for samples in data.eval_loader(dataset, rank, world, workers, batch, limit or None, resize):
            pictures, sizes = [s.image for s in samples], [s.target.ids.shape[1:] for s in samples]
            for kind, turn in zip(kinds, turns, strict=True):
                turn()
                results = eomt.segment(model, pictures, meta["kind"], mask_prob=mask_prob, sizes=sizes)
                counted.result()
                counted = thread.submit(count, kind, results, samples)
            bar.update(len(samples) * world)
        counted.result()
    model.train(training)
    done = []
    for metric, _, headline, column in kinds:
        if world > 1:
            metric.merge(gather(metric.state()))
        numbers, rows = conclude(metric, meta, headline, column)
        done.append(Result(numbers, headline, rows, images, time.time() - began, images < len(dataset)))
    return done


# ---- Open vocabulary: true regions, calibration, sweeps ----------------------------------------------------
# Ensemble scores of many classes are flat: no score threshold (as FC-CLIP), and masks may overlap more.
THRESHOLDS = dict(score_threshold=0.0, overlap_threshold=0.6)


def windows(model, dataset, limit=0):
    """(network input (1,3,S,S), true masks bool (T,S,S), labels (T,)) of images, crowds left out."""
    side = model.meta["size"]
    for index in range(min(limit or len(dataset), len(dataset))):
        sample = dataset[index]
        h, w = eomt.fit(sample.image.shape[1:], (side, side))
        image = torch.zeros(1, 3, side, side, dtype=torch.uint8)  # (1, 3, S, S)
        image[0, :, :h, :w] = eomt.resize(sample.image, (h, w))
        masks = torch.zeros(len(sample.target.labels), side, side, dtype=torch.bool)  # (T, S, S)
        if len(masks):
            small = torch.nn.functional.interpolate(sample.target.masks()[None].float(), (h, w), mode="area")
            masks[:, :h, :w] = small[0] >= 0.5
        keep = ~sample.target.crowd & masks.flatten(1).any(1)  # (T,)
        yield tuple(t.to(model.mean.device) for t in (image, masks[keep], sample.target.labels[keep]))


@torch.inference_mode()
def probe_regions(model, dataset, limit=0) -> dict[str, dict[str, float]]:
    """Per pooling mode the percentage of true masks that SigLIP 2 alone names right, by group of classes.
    Nothing is trained for it; in real towers `mean` is at chance, for raw tokens are not in text space."""
    head, thing = model.class_head, torch.tensor(model.meta["thing"])
    hits, labels = {mode: [] for mode in ("map", "value", "mean")}, []
    for image, masks, truth in windows(model, dataset, limit):
        patches = model.encoder((image.float() / 255 - model.mean) / model.std)  # (1, h*w, C)
        z = siglip2.grid_logits(masks, tuple(side // model.encoder.patch for side in image.shape[2:]))
        for mode, rows in hits.items():
            region = siglip2.map_pool(model.encoder, patches, z[None], mode=mode)  # (1, T, C_t)
            rows.append(head.out_logits(region)[0].argmax(-1) == truth)
        labels.append(truth)
    label, split = torch.cat(labels).cpu(), split_groups(model.meta)
    groups = {"things": thing[label], "stuff": ~thing[label]}
    groups |= {name: torch.isin(label, torch.tensor(split[name])) for name in ("seen", "unseen") if split}
    score = {mode: torch.cat(rows).cpu().double() for mode, rows in hits.items()}
    return {mode: {name: 100 * hit[rows].mean().item() for name, rows in groups.items() if rows.any()}
            for mode, hit in score.items()}


class Replay(torch.nn.Module):
    """A model that keeps what its class head saw since `fresh`; asked again, it only classifies."""

    def __init__(self, model):
        super().__init__()
        self.model, self.meta, self.num_blocks, self.mean = model, model.meta, model.num_blocks, model.mean
        self.kept, self.at = [], 0

    def turn(self, fresh: bool, calibration: dict):
        """Before the same images come again, or fresh ones."""
        self.kept, self.at = [] if fresh else self.kept, 0
        self.model.class_head.calibrate(**calibration)

    def forward(self, images, mask_prob=None):
        head, seen = self.model.class_head, []
        if self.at == len(self.kept):
            hook = head.register_forward_hook(lambda module, inputs, output: seen.append(inputs))
            masks = self.model(images, mask_prob)[-1].masks
            hook.remove()
            self.kept.append(tuple(t.clone() for t in (masks, *seen[-1])))  # a CUDA graph reuses its memory
        masks, queries, region = self.kept[self.at]
        self.at += 1
        return [eomt.Prediction(masks, head(queries, region))]


@torch.inference_mode()
def seen_matches(model, dataset, limit=256):  # validation images that `auto` looks at
    """Logits in (n,K+1), out (n,K), labels (n,) of masks with IoU > 0.5 on a segment of a seen class."""
    head, replay, rows = model.class_head, Replay(model).eval(), []
    for image, truth, labels in windows(model, dataset, limit):
        masks = eomt._network(replay, image, None).masks  # (1, Q, mh, mw)
        _, queries, region = replay.kept.pop()
        replay.at = 0
        found = torch.nn.functional.interpolate(masks, image.shape[2:], mode="bilinear")[0] > 0
        found, truth = found.flatten(1).float(), truth.flatten(1).float()  # (Q, S*S), (T, S*S)
        shared = truth @ found.T  # (T, Q)
        iou = shared / (truth.sum(1)[:, None] + found.sum(1) - shared).clamp(min=1)  # (T, Q)
        best, query = iou.max(1)
        good = (best > 0.5) & head.seen[labels]  # (T,)
        l_in, l_out = head.in_logits(queries)[0], head.out_logits(region)[0]  # (Q, K+1), (Q, K)
        rows.append((l_in[query[good]], l_out[query[good]], labels[good]))
    return tuple(torch.cat(column) for column in zip(*rows, strict=True))


def calibrate(model, dataset, options) -> None:
    """Sets the ensemble of `model` from options.ov_*; what is `auto` is fitted to seen masks of `dataset`."""
    head = model.class_head
    if options.ov_pool not in ("map", "value", "mean"):
        raise ValueError(f"--ov-pool {options.ov_pool}: unknown; map, value or mean")
    model.pool, training = options.ov_pool, model.training
    model.eval()
    head.calibrate()
    values = dict(alpha=options.ov_alpha, beta=options.ov_beta, bias=options.ov_bias)
    if options.ov_class_bias:
        values["class_bias"] = class_bias(model, options.ov_class_bias)
    if "auto" in (options.ov_temp, options.ov_reject):
        l_in, l_out, labels = seen_matches(model, dataset)
        if not len(labels):
            raise ValueError("auto: no predicted mask fits a true one of a seen class; give numbers")
    if options.ov_temp == "auto":
        temps = [siglip2.fit_temperature(logits[:, :len(head.seen)], labels) for logits in (l_in, l_out)]
    else:
        temps = number_list("--ov-temp", options.ov_temp, 2)
    if min(temps) <= 0:
        raise ValueError(f"--ov-temp {options.ov_temp}: not above 0; 1 leaves the logits as they are")
    values |= dict(temp_in=temps[0], temp_out=temps[-1])
    head.calibrate(**values)
    if options.ov_reject == "auto":  # 5 % of the right masks are given up
        values["reject"] = head.energy(l_out).quantile(0.05).item()
    elif options.ov_reject:
        values["reject"] = number_list("--ov-reject", options.ov_reject, 1)[0]
    head.calibrate(**values)
    model.meta["calibration"] = values
    model.train(training)


def number_list(flag: str, text: str, most: int) -> list[float]:
    try:
        values = [float(part) for part in str(text).split(",")]
    except ValueError:
        values = []
    if not 1 <= len(values) <= most or any(math.isnan(value) for value in values):
        raise ValueError(f"{flag} {text}: not auto, nor numbers with commas ({most} at most); see --help")
    return values


def class_bias(model, source: str) -> list[float]:
    """Logit adjustment of every class: by the training set's frequency, or a JSON list."""
    head = model.class_head
    if source == "auto":
        counts = model.meta.get("counts") or []
        if len(counts) != len(head.seen):
            raise ValueError("--ov-class-bias auto: no class counts of this vocabulary; give a JSON file")
        return siglip2.frequency_bias(torch.tensor(counts).float(), head.seen.cpu()).tolist()
    try:
        values = json.loads(Path(source).read_text())
        values = [float(value) for value in values] if isinstance(values, list) else []
    except (ValueError, TypeError):
        values = []
    if len(values) != len(head.seen) or not all(map(math.isfinite, values)):
        raise ValueError(f"{source}: not a JSON list of {len(head.seen)} numbers, one a class")
    return values


def sweep(model, dataset, args, rank, world) -> Result:
    """A line per value of `--sweep ov-bias=0,0.5`; the network sees every image once."""
    flag, _, listed = args.sweep.replace("_", "-").partition("=")
    kinds = {f"ov-{name}": kind for name, kind, _ in OV_OPTIONS if name not in ("pool", "class-bias")}
    if flag not in kinds or not listed:
        raise ValueError(f"--sweep {args.sweep}: write ov-bias=0,0.5,1, or ov-alpha, -beta, -temp, -reject")
    values, replay, turns = number_list(f"--sweep {flag}", listed, 1000), Replay(model), []
    for value in values:
        setattr(args, flag.replace("-", "_"), kinds[flag](value))
        calibrate(model, dataset, args)
        turns.append(partial(replay.turn, not turns, model.meta["calibration"]))
    results = evaluate_each(replay, dataset, turns, rank, world, args.workers, args.limit, args.masked_attn)
    for value, result in zip(values, results, strict=True):
        if rank == 0:
            print(f"{flag} {value:g}: {line(result)}")
    return results[-1]


# ---- Exports in the layouts of the official tools ----------------------------------------------------------
class Export:
    """Called with every (result, sample), it writes the former at `path` as the official tools want them.
    panoptic: COCO's submission, PATH/NAME.png and in PATH.json a row; instance: COCO's results, in PATH a row
    of image_id, category_id, RLE segmentation and score each; semantic: PATH/NAME.png with the data set's own
    label values: ADE20K 1..150, Cityscapes labelIds."""

    def __init__(self, path: str, task: data.Task):
        self.path, self.task, self.rows = Path(path).resolve(), task, []  # resolved, "." has a name
        self.file = dict(panoptic=Path(f"{self.path}.json"), instance=self.path).get(task.kind)
        (self.path.parent if task.kind == "instance" else self.path).mkdir(parents=True, exist_ok=True)
        if self.file:
            data.writable(self.file)  # what cannot be written is known now, not after the evaluation

    def __call__(self, result, sample):
        classes, name = self.task.vocabulary.ids, Path(sample.name).with_suffix(".png")
        if self.task.kind == "instance":
            columns = result.masks.cpu().numpy(), result.labels.tolist(), result.scores.tolist()
            self.rows += [dict(image_id=sample.image_id, category_id=classes[label], score=score,
                               segmentation=metrics.rle_encode(mask))
                          for mask, label, score in zip(*columns, strict=True)]
            return
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"{sample.name}: leads out of {self.path}; rename it in the data set")
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)  # one name may lie in several folders
        if self.task.kind == "semantic":
            values = np.array(classes, np.uint8) + data.PAIRS[self.task.layout].offset  # (K,)
            Image.fromarray(values[result.cpu().numpy()]).save(self.path / name)
            return
        ids = result.ids.cpu().numpy()
        data.write_ids(ids, self.path / name)
        areas = np.bincount(ids.ravel(), minlength=len(result.labels) + 1)
        segments = [dict(id=s, category_id=classes[label], area=int(areas[s]))
                    for s, label in enumerate(result.labels.tolist(), 1)]
        self.rows.append(dict(image_id=sample.image_id, file_name=str(name), segments_info=segments))

    def finish(self, rank):
        """Rank 0 writes the rows of all ranks in the order of their images."""
        rows = sorted(sum(gather(self.rows), []), key=lambda row: row["image_id"])
        if rank == 0 and self.file:
            self.file.write_text(json.dumps(dict(annotations=rows) if self.task.kind == "panoptic" else rows))


OV_OPTIONS = (("pool", str, "map, value or mean"), ("alpha", float, "region weight of seen classes"),
              ("beta", float, "of unseen ones"), ("temp", str, "temperature, `in,out` or auto"),
              ("bias", float, "subtracted from seen classes"), ("class-bias", str, "auto or a JSON list"),
              ("reject", str, "energy below which a mask is void, or auto"))
OV_KEYS = ["ov_" + name.replace("-", "_") for name, _, _ in OV_OPTIONS]


# ---- Command line ------------------------------------------------------------------------------------------
def parser() -> argparse.ArgumentParser:
    top = data.Arguments(usage="%(prog)s --ckpt CKPT [options]", description=__doc__.split("\n")[0])
    top.add_argument("--ckpt", required=True, help="run folder (best, else newest), step folder or file")
    top.add_argument("--base", default="", help="DINOv3 encoder that a delta checkpoint is added to")
    top.add_argument("--data", default="", help="data folder; default: the one the run was trained on")
    top.add_argument("--task", default="", help=f"auto, {', '.join(data.TASKS)}; default: the checkpoint's")
    top.add_argument("--size", type=int, default=0, help="network input side; default: the checkpoint's")
    top.add_argument("--masked-attn", action="store_true", help="masked attention as in training")
    top.add_argument("--limit", type=int, default=0, help="only this many images; the line then says partial")
    top.add_argument("--workers", type=int, default=2, help="data processes a rank")
    one = top.add_mutually_exclusive_group()
    one.add_argument("--save-panoptic", default="", metavar="DIR", help="write COCO's panoptic submission")
    one.add_argument("--save-instance", default="", metavar="FILE", help="write COCO's instance results")
    one.add_argument("--save-semantic", default="", metavar="DIR", help="write label PNGs")
    one.add_argument("--gt-masks", action="store_true", help="only name regions of true masks")
    one.add_argument("--sweep", default="", metavar="ov-bias=0,0.5", help="a line per value")
    top.add_argument("--split", default="", help="unseen classes: " + ", ".join(vocab.SPLITS) + ", a file")
    top.add_argument("--text-weights", default="", help="SigLIP 2 with the text tower, for other classes")
    top.add_argument("--tokenizer", default="", help="its tokenizer; default: in its folder")
    top.add_argument("--templates", default="", help=", ".join(vocab.TEMPLATES) + "; default: training's")
    top.add_argument("--languages", default="", help="of class names: en, zh or en,zh; default: training's")
    for name, kind, what in OV_OPTIONS:
        top.add_argument(f"--ov-{name}", type=kind, default=None, help=f"{what}; default: the checkpoint's")
    top.add_argument("--out", default="", help="write the numbers as JSON to this file")
    top.add_argument("--compile", action="store_true", help="with CUDA graphs; pays off for many images")
    top.add_argument("--fp8", action="store_true", help="the blocks' linear layers in 8-bit floats")
    top.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return top


ORIGINAL = {"--model.ckpt_path": "--ckpt", "--data.path": "--data", "OPEN_VOCAB_SPLIT": "--split",
            "--model.network.masked_attn_enabled": "--masked-attn, without a value", "OUTPUT_DIR": "--out",
            "OPEN_VOCAB.TEMP": "--ov-temp", "OPEN_VOCAB.CALIBRATION_BIAS": "--ov-bias",
            "OPEN_VOCAB.ENERGY_REJECT_THR": "--ov-reject", "OPEN_VOCAB.MULTILINGUAL": "--languages en,zh"}


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; the original recipe's words are answered with ours."""
    for word in argv:
        if flag := ORIGINAL.get(word.split("=")[0].removeprefix("MODEL.")):
            raise ValueError(f"{word}: this is {flag} here; see --help")
    args = parser().parse_args(argv)
    if min(args.limit, args.workers) < 0:
        raise ValueError(f"--limit {args.limit}, --workers {args.workers}: below 0; give 0 or more")
    if args.out and (Path(args.out).is_dir() or not Path(args.out).parent.is_dir()):
        raise FileNotFoundError(f"--out {args.out}: not a file in a folder that is there; give another")
    if args.out and args.sweep:
        raise ValueError(f"--out {args.out}: --sweep writes no file; leave it out and keep the lines")
    if args.out:
        data.writable(args.out)  # what cannot be written is known now, not after the evaluation
    return args


def load_model(args) -> eomt.EoMT:
    """The checkpoint's model; with --gt-masks a bare SigLIP 2 will do too."""
    folder = siglip2.fetch(Path(args.ckpt)) if args.gt_masks else None
    if not folder or not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return eomt.load(args.ckpt, args.device, args.base or None)
    words = data.find_task(args.data, args.task or "auto").vocabulary
    said = dict(languages=args.languages or "en", template=args.templates or "default")
    texts = vocab.prompts(words, said["languages"].split(","), said["template"])
    text = siglip2.text_rows(args.text_weights or folder, args.tokenizer, texts)
    tower = siglip2.load(folder, "vision")
    every = list(range(len(words.names)))
    head = siglip2.OpenVocabHead(tower.width, *text[:2], [True] * len(every), *text[2:])
    model = eomt.OpenVocabEoMT(tower, head, 1, 1)
    model.meta = dict(size=tower.config["grid"] * tower.patch, text=str(folder), names=list(words.names),
                      seen=every, trained=[asdict(words), every], **said)
    return model.to(args.device).eval()


def open_words(model, words, args) -> None:
    """The vocabulary and its seen classes: another task's names take the place of the trained ones."""
    meta, every = model.meta, range(len(words.names))
    if other := list(words.names) != list(meta["names"]):  # what was fitted to the trained classes is left
        trained, indices = meta["trained"]
        seen, unseen = vocab.overlap(vocab.Vocabulary(**trained), words, indices)
        meta |= dict(seen=list(seen), unseen=list(unseen), counts=[], ov=meta["ov"] | dict(ov_class_bias=""))
    wanted = dict(languages=args.languages or meta["languages"], template=args.templates or meta["template"])
    if other or any(meta[key] != value for key, value in wanted.items()):
        texts = vocab.prompts(words, wanted["languages"].split(","), wanted["template"])
        model.set_classes(words.names, words.thing, texts, [k in meta["seen"] for k in every],
                          args.text_weights, args.tokenizer, data.cache_dir() / "text_rows.safetensors")
        meta |= wanted
    if args.split:
        seen, unseen = vocab.split(words, args.split)
        trained = [words.names[k] for k in unseen if model.class_head.seen[k]]
        if trained and not args.gt_masks:  # a bare tower has learnt none of them
            print(f"notice: {len(trained)} unseen classes of {args.split} were trained on: "
                  f"{', '.join(trained[:5])}", file=sys.stderr)
        meta |= dict(seen=list(seen), unseen=list(unseen))


def open_options(model, dataset, args) -> None:
    """Calibrates; options not given are the ones that the checkpoint was evaluated with in training."""
    if "open" not in model.config:
        own = ["sweep", "split", "text_weights", "templates", "languages", *OV_KEYS]
        for flag in (key.replace("_", "-") for key in own if getattr(args, key) not in (None, "")):
            raise ValueError(f"{args.ckpt}: closed classes; --{flag} needs a --stage run")
        return
    vars(args).update({key: model.meta["ov"][key] for key in OV_KEYS if getattr(args, key) is None})
    calibrate(model, dataset, args)


def report_regions(model, dataset, args):
    """--gt-masks: a line per pooling mode."""
    if "open" not in model.config:
        raise ValueError(f"{args.ckpt}: --gt-masks needs a SigLIP2-EoMT or a SigLIP 2 folder")
    numbers = probe_regions(model, dataset, args.limit)
    for mode, row in numbers.items():
        print(f"{mode}: " + " ".join(f"{name} {value:.1f}" for name, value in row.items()))
    if args.out:
        Path(args.out).write_text(json.dumps(numbers, indent=1))
    return numbers


def open_task(model: eomt.EoMT, args) -> tuple[data.Task, str]:
    """Task and data folder: from the flags, else from the checkpoint, else what its class count leaves."""
    root = args.data or model.meta.get("data", "")
    if not root or not args.data and not Path(root).exists():
        found = f"that of the training, {root}, is not there" if root else "the checkpoint names none"
        raise ValueError(f"--data is missing, and {found}; give the folder that holds the data set's zips")
    classes, name = model.config["num_classes"], args.task or model.meta.get("task")
    task = data.find_task(root, name) if name else data.fit_task(classes, args.ckpt)
    words = task.vocabulary
    if "open" in model.config:
        open_words(model, words, args)
    elif len(words.names) != classes or list(words.names) != model.meta.get("names", list(words.names)):
        raise ValueError(f"{args.ckpt}: its {classes} classes are not the {len(words.names)} of {task.name}; "
                         "give the --task and --data it was trained on")
    model.meta |= dict(kind=task.kind, names=list(words.names), ids=list(words.ids), thing=list(words.thing))
    return task, root


def open_exports(args, task) -> list:
    wanted = dict(panoptic=args.save_panoptic, instance=args.save_instance, semantic=args.save_semantic)
    for kind in (kind for kind, path in wanted.items() if path and kind != task.kind):
        raise ValueError(f"--save-{kind}: {task.name} is {task.kind}; use --save-{task.kind}")
    exports = [Export(path, task) for path in wanted.values() if path]
    if args.out and Path(args.out).resolve() in [export.file for export in exports]:
        raise ValueError(f"--out {args.out}: --save-{task.kind} writes there too; give another file")
    return exports


def run(args) -> Result:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.device == "cuda" and world > 1:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    model = load_model(args)
    if args.size < 0 or args.size % model.encoder.patch:
        raise ValueError(f"--size {args.size}: no multiple of the patch size {model.encoder.patch}; give one")
    model.meta["size"] = args.size or model.meta["size"]
    task, root = open_task(model, args)
    dataset = data.SegmentDataset(root, task, "val")
    if args.gt_masks:
        return report_regions(model, dataset, args)
    if world > 1:
        dist.init_process_group("gloo")
    exports = open_exports(args, task)
    open_options(model, dataset, args)
    eomt.accelerate(model, args.fp8, 8 if args.compile else 0)
    if args.sweep:
        result = sweep(model, dataset, args, rank, world)
    else:
        result = evaluate(model, dataset, rank, world, args.workers, args.limit, args.masked_attn, exports)
        for export in exports:
            export.finish(rank)
        if rank == 0:
            print(line(result))
            if args.out:
                Path(args.out).write_text(as_json(result.numbers | dict(images=result.images), indent=1))
    if world > 1:
        dist.destroy_process_group()
    return result


def main():
    data.command(lambda argv: run(parse(argv)), sys.argv[1:])


if __name__ == "__main__":
    main()
