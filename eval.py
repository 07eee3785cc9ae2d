"""A checkpoint and a data set to numbers: PQ, mIoU or mask AP, and exported predictions.

    python eval.py --ckpt runs/quick --data runs/shapes
    python eval.py --ckpt coco_panoptic_eomt_large_640.bin --data /coco
    torchrun --nproc_per_node=4 eval.py --ckpt runs/x --data /coco --save-panoptic out/

Ranks share the images without padding and merge integer counts, so N processes print the digits of one. Evaluation
never skips an image: the score is of the whole set, or there is none.
"""
# SPDX-License-Identifier: MIT
import argparse
import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import data
import eomt
import metrics


@dataclass
class Result:
    """numbers: name -> value in percent; headline: the first of them; per_class: (name, value); and what it took."""

    numbers: dict[str, float]
    headline: str
    per_class: list[tuple[str, float]]
    images: int
    seconds: float
    partial: bool


# ---- one image: model output and target in the metric's terms -------------------------------------------------
def target_map(target) -> np.ndarray:
    """int32 (H,W) id map of a target: segment t has id t + 1, 0 = void."""
    out = np.zeros(target.ids.shape[1:], np.int32)  # (H, W)
    for layer, ids in enumerate(target.ids.numpy()):
        table = np.zeros(256, np.int32)
        rows = np.flatnonzero(target.layer.numpy() == layer)
        table[target.value.numpy()[rows]] = rows + 1
        out = np.maximum(out, table[ids])  # segments of different layers do not overlap in panoptic data
    return out


def add_panoptic(metric, result, sample):
    truth, target = target_map(sample.target), sample.target
    rows = zip(target.labels.tolist(), target.area.tolist(), target.crowd.tolist(), strict=True)
    true_segments = [dict(id=t + 1, category_id=label, area=area, iscrowd=int(crowd))
                     for t, (label, area, crowd) in enumerate(rows)]
    segments = [dict(id=s + 1, category_id=label) for s, label in enumerate(result.labels.tolist())]
    metric.update(result.ids.cpu().numpy(), segments, truth, true_segments, sample.name)


def semantic_truth(target, ignore=255) -> np.ndarray:
    """Class map (H,W) of a target, `ignore` where there is no segment."""
    table = np.concatenate([[ignore], target.labels.numpy()])  # (T+1,)
    return table[target_map(target)]


def add_semantic(metric, result, sample):
    metric.update(result.cpu().numpy(), semantic_truth(sample.target), sample.name)


def add_instance(metric, result, sample):
    target = sample.target
    metric.update(dict(masks=result.masks.cpu().numpy(), scores=result.scores.cpu().numpy(),
                       labels=result.labels.cpu().numpy()),
                  dict(masks=target.masks().numpy(), labels=target.labels.numpy(), crowd=target.crowd.numpy(),
                       area=target.area.numpy()), sample.name)


def percent(value):
    """Scores in percent; counts, nan and COCO's -1 (no such object) as they are."""
    return 100 * value if isinstance(value, float) and value >= 0 else value


# ---- a data set --------------------------------------------------------------------------------------------------
def make_metric(kind, meta):
    if kind == "panoptic":
        return metrics.PanopticQuality(meta["thing"]), add_panoptic
    if kind == "semantic":
        return metrics.MeanIoU(len(meta["names"])), add_semantic
    return metrics.MaskAP(len(meta["names"])), add_instance


def merged(metric, world):
    """The metric over all ranks, on every rank."""
    if world > 1:
        states = [None] * world
        dist.all_gather_object(states, metric.state())
        metric.merge(states)
    return metric


def evaluate(model, dataset, rank=0, world=1, workers=0, limit=0, masked=False, export=None) -> Result:
    """Numbers of `model` on `dataset` (a data.SegmentDataset without transform); `model.meta` says kind and classes.

    limit: only the first images (then `partial`); masked: masked attention as in training; export: called with each
    (result, sample). Runs on the model's device; every rank gets the same Result.
    """
    began, meta, training = time.time(), model.meta, model.training
    metric, add = make_metric(meta["kind"], meta)
    model.eval()
    device = model.mean.device
    mask_prob = torch.ones(model.num_blocks, device=device) if masked else None
    batches = data.eval_loader(dataset, rank, world, workers, 8 if device.type == "cuda" else 1, limit or None)
    bar = tqdm(total=len(range(len(dataset))[:limit or None][rank::world]), unit="img",
               disable=rank > 0 or not sys.stderr.isatty())
    for samples in batches:
        results = eomt.segment(model, [sample.image for sample in samples], meta["kind"], mask_prob=mask_prob)
        for result, sample in zip(results, samples, strict=True):
            add(metric, result, sample)
            if export:
                export(result, sample)
        bar.update(len(samples))
    bar.close()
    model.train(training)
    numbers = {key: percent(value) for key, value in merged(metric, world).compute().items()}
    images = min(limit or len(dataset), len(dataset))
    headline = {"panoptic": "PQ", "semantic": "mIoU", "instance": "AP"}[meta["kind"]]
    score = {"PQ": "PQ", "mIoU": "IoU", "AP": "AP"}[headline]
    per_class = [(meta["names"][row["class"]], percent(row[score])) for row in metric.per_class()]
    return Result(numbers, headline, per_class, images, time.time() - began, images < len(dataset))


def line(result: Result) -> str:
    """The one line an evaluation ends with."""
    shown = {"PQ": ("PQ", "PQ_th", "PQ_st", "SQ", "RQ"), "mIoU": ("mIoU", "mIoU_upstream"),
             "AP": ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")}[result.headline]
    text = " ".join(f"{key} {result.numbers[key]:.2f}" for key in shown)
    partial = " (partial)" if result.partial else ""
    return f"{text} images {result.images} in {result.seconds:.1f} s{partial}"


# ---- exports -----------------------------------------------------------------------------------------------------
class PanopticExport:
    """COCO's panoptic submission: DIR/<name>.png with id = R + 256 G + 65536 B, and DIR.json (DIR/predictions.json
    per rank until `close` joins them)."""

    def __init__(self, folder: str, meta: dict, rank: int):
        self.folder, self.meta, self.rows, self.rank = Path(folder), meta, [], rank
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, result, sample):
        ids = result.ids.cpu().numpy()  # (H, W)
        name = Path(sample.name).stem + ".png"
        write_id_png(ids, self.folder / name)
        areas = np.bincount(ids.ravel(), minlength=len(result.labels) + 1)
        segments = [dict(id=s + 1, category_id=self.meta["ids"][label], area=int(areas[s + 1]))
                    for s, label in enumerate(result.labels.tolist())]
        self.rows.append(dict(image_id=sample.image_id, file_name=name, segments_info=segments))

    def close(self, world):
        parts = [self.rows]
        if world > 1:
            parts = [None] * world
            dist.all_gather_object(parts, self.rows)
        if self.rank == 0:
            rows = sorted((row for part in parts for row in part), key=lambda row: row["image_id"])
            self.folder.with_name(self.folder.name + ".json").write_text(json.dumps(dict(annotations=rows)))


def write_id_png(ids: np.ndarray, path):
    """Integer ids (H,W) -> RGB PNG, id = R + 256 G + 65536 B."""
    channels = np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], -1).astype(np.uint8)  # (H, W, 3)
    Image.fromarray(channels).save(path)


# ---- command line ------------------------------------------------------------------------------------------------
def parser():
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    top.add_argument("--ckpt", required=True, help="run folder (best, else newest), step folder, file or HF name")
    top.add_argument("--data", default="", help="data folder; default: the one the run was trained on")
    top.add_argument("--task", default="", help=f"one of {', '.join(data.TASKS)}; default: the checkpoint's")
    top.add_argument("--size", type=int, default=0, help="network input side; default: the checkpoint's")
    top.add_argument("--masked-attn", action="store_true", help="masked attention as in training (an ablation)")
    top.add_argument("--limit", type=int, default=0, help="only this many images; the line then says partial")
    top.add_argument("--workers", type=int, default=2, help="data processes a rank")
    top.add_argument("--save-panoptic", default="", metavar="DIR", help="write COCO's panoptic submission")
    top.add_argument("--out", default="", help="write the numbers as JSON to this file")
    top.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def guess_task(model, args) -> data.Task:
    """The task of a checkpoint: what it says, else the one whose class count fits (zoo files do not say)."""
    name = args.task or model.meta.get("task")
    fits = [t for t in data.TASKS.values() if len(t.vocabulary.names) == model.config["num_classes"]]
    if not name and len(fits) != 1:
        raise ValueError(f"{args.ckpt}: does not say its task; give --task, one of {', '.join(t.name for t in fits)}")
    if name and name not in data.TASKS:
        raise ValueError(f"--task {name}: unknown; one of {', '.join(data.TASKS)}")
    task = data.TASKS[name] if name else fits[0]
    if len(task.vocabulary.names) != model.config["num_classes"]:
        raise ValueError(f"{args.ckpt}: {model.config['num_classes']} classes, {task.name} has "
                         f"{len(task.vocabulary.names)}; give the --task it was trained on")
    return task


def run(args) -> Result:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.device == "cuda" and world > 1:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    model = eomt.load(args.ckpt, args.device)
    task = guess_task(model, args)
    if args.size % model.encoder.patch:
        raise ValueError(f"--size {args.size}: not a multiple of the patch size {model.encoder.patch}")
    words = task.vocabulary
    model.meta = dict(size=model.meta["size"], kind=task.kind, names=list(words.names), ids=list(words.ids),
                      thing=list(words.thing)) | {k: v for k, v in model.meta.items() if k == "data"}
    model.meta["size"] = args.size or model.meta["size"]
    root = args.data or model.meta.get("data")
    if not root:
        raise ValueError("--data is missing; give the folder that holds the data set's zips")
    dataset = data.SegmentDataset(root, task, "val")
    if world > 1:
        dist.init_process_group("gloo")
    export = PanopticExport(args.save_panoptic, model.meta, rank) if args.save_panoptic else None
    result = evaluate(model, dataset, rank, world, args.workers, args.limit, args.masked_attn, export)
    if export:
        export.close(world)
    if rank == 0:
        print(line(result))
        if args.out:
            Path(args.out).write_text(json.dumps(dict(result.numbers, images=result.images), indent=1))
    if world > 1:
        dist.destroy_process_group()
    return result


def main():
    args = parser().parse_args()
    with contextlib.nullcontext() if args.debug else one_line():
        run(args)


@contextlib.contextmanager
def one_line():
    """User mistakes end with one line and exit code 1."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {str(error).splitlines()[0] if str(error) else type(error).__name__}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
