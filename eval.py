"""A checkpoint and a data set to numbers: PQ, mIoU or mask AP, and exported predictions.

    python eval.py --ckpt runs/quick --data runs/shapes
    python eval.py --ckpt coco_panoptic_eomt_large_640.bin --data /coco
    torchrun --nproc_per_node=4 eval.py --ckpt runs/x --data /coco --save-panoptic out/

Ranks share the images without padding and merge exact counts, so N processes print the digits of one.
Evaluation never skips an image: the score is of the whole set, or there is none.
"""

# SPDX-License-Identifier: MIT
import argparse
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
    """Numbers by name (percent), the name of the headline, (class, percent) rows, and the effort."""

    numbers: dict[str, float]
    headline: str
    per_class: list[tuple[str, float]]
    images: int
    seconds: float
    partial: bool


SHOWN = {
    "PQ": ("PQ", "PQ_th", "PQ_st", "SQ", "RQ"),
    "mIoU": ("mIoU", "mIoU_upstream", "pixel_accuracy"),
    "AP": ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
}


def line(result: Result) -> str:
    """The one line an evaluation ends with."""
    text = " ".join(f"{key} {result.numbers[key]:.2f}" for key in SHOWN[result.headline])
    return f"{text} images {result.images} in {result.seconds:.1f} s" + " (partial)" * result.partial


# ---- One image: model output and target in the metric's terms ----------------------------------------------
def target_map(target) -> np.ndarray:
    """int32 (H,W) id map of a target whose segments are disjoint: segment t has id t + 1, 0 = void."""
    out = np.zeros(target.ids.shape[1:], np.int32)  # (H, W)
    for layer, ids in enumerate(target.ids.numpy()):
        table, rows = np.zeros(256, np.int32), np.flatnonzero(target.layer.numpy() == layer)
        table[target.value.numpy()[rows]] = rows + 1
        out = np.maximum(out, table[ids])  # (H, W)
    return out


def add_panoptic(metric, result, sample):
    target = sample.target
    rows = zip(target.labels.tolist(), target.area.tolist(), target.crowd.tolist(), strict=True)
    truth = [
        dict(id=t + 1, category_id=label, area=area, iscrowd=int(crowd))
        for t, (label, area, crowd) in enumerate(rows)
    ]
    found = [dict(id=s + 1, category_id=label) for s, label in enumerate(result.labels.tolist())]
    metric.update(result.ids.cpu().numpy(), found, target_map(target), truth, sample.name)


def add_semantic(metric, result, sample):
    table = np.concatenate([[metric.ignore], sample.target.labels.numpy()])  # (T+1,)
    metric.update(result.cpu().numpy(), table[target_map(sample.target)], sample.name)


def add_instance(metric, result, sample):
    target = sample.target
    found = dict(
        masks=result.masks.cpu().numpy(),
        scores=result.scores.cpu().numpy(),
        labels=result.labels.cpu().numpy(),
    )
    truth = dict(
        masks=target.masks().numpy(),
        labels=target.labels.numpy(),
        crowd=target.crowd.numpy(),
        area=target.area.numpy(),
    )
    metric.update(found, truth, sample.name)


def percent(value):
    """Scores in percent; counts, nan and COCO's -1 (no such object) as they are."""
    return 100 * value if isinstance(value, float) and value >= 0 else value


# ---- A data set --------------------------------------------------------------------------------------------
def make_metric(meta):
    """(metric, how to add an image, headline number, its name in the per-class rows) for a model's kind."""
    if meta["kind"] == "panoptic":
        return metrics.PanopticQuality(meta["thing"]), add_panoptic, "PQ", "PQ"
    if meta["kind"] == "semantic":
        return metrics.MeanIoU(len(meta["names"])), add_semantic, "mIoU", "IoU"
    return metrics.MaskAP(len(meta["names"])), add_instance, "AP", "AP"


def evaluate(model, dataset, rank=0, world=1, workers=0, limit=0, masked=False, exports=()) -> Result:
    """Numbers of `model` on `dataset` (data.SegmentDataset, no transform); `model.meta` says kind and names.

    limit: only the first images (then `partial`); masked: masked attention as in training; exports: each is
    called with every (result, sample). Runs on the model's device; every rank gets the same Result.
    """
    began, meta, training = time.time(), model.meta, model.training
    metric, add, headline, per_class = make_metric(meta)
    model.eval()
    device = model.mean.device
    mask_prob = torch.ones(model.num_blocks, device=device) if masked else None
    images = min(limit or len(dataset), len(dataset))
    batches = data.eval_loader(
        dataset, rank, world, workers, 8 if device.type == "cuda" else 1, limit or None
    )
    with tqdm(total=images, unit="img", disable=rank > 0 or not sys.stderr.isatty()) as bar:
        for samples in batches:
            pictures = [sample.image for sample in samples]
            for result, sample in zip(
                eomt.segment(model, pictures, meta["kind"], mask_prob=mask_prob), samples, strict=True
            ):
                add(metric, result, sample)
                for export in exports:
                    export(result, sample)
            bar.update(len(samples) * world)
    model.train(training)
    if world > 1:
        states = [None] * world
        dist.all_gather_object(states, metric.state())
        metric.merge(states)
    numbers = {key: percent(value) for key, value in metric.compute().items()}
    rows = [(meta["names"][row["class"]], percent(row[per_class])) for row in metric.per_class()]
    return Result(numbers, headline, rows, images, time.time() - began, images < len(dataset))


# ---- Exports in the layouts of the official tools ----------------------------------------------------------
def gathered(rows: list, rank: int, world: int) -> list:
    """The rows of all ranks, on rank 0 in the order of their images."""
    parts = [rows]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, rows)
    return (
        sorted((row for part in parts for row in part), key=lambda row: row["image_id"]) if rank == 0 else []
    )


class PanopticExport:
    """COCO's panoptic submission: FOLDER/NAME.png and FOLDER.json."""

    def __init__(self, folder: str, task: data.Task):
        self.folder, self.ids, self.rows = Path(folder), task.vocabulary.ids, []
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, result, sample):
        ids, name = result.ids.cpu().numpy(), Path(sample.name).stem + ".png"
        data.write_ids(ids, self.folder / name)
        areas = np.bincount(ids.ravel(), minlength=len(result.labels) + 1)
        segments = [
            dict(id=s + 1, category_id=self.ids[label], area=int(areas[s + 1]))
            for s, label in enumerate(result.labels.tolist())
        ]
        self.rows.append(dict(image_id=sample.image_id, file_name=name, segments_info=segments))

    def close(self, rank, world):
        rows = gathered(self.rows, rank, world)
        if rank == 0:
            self.folder.with_name(self.folder.name + ".json").write_text(json.dumps(dict(annotations=rows)))


class InstanceExport:
    """COCO's instance results: one JSON list of image_id, category_id, RLE segmentation, score."""

    def __init__(self, path: str, task: data.Task):
        self.path, self.ids, self.rows = Path(path), task.vocabulary.ids, []
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, result, sample):
        for mask, label, score in zip(
            result.masks.cpu().numpy(), result.labels.tolist(), result.scores.tolist(), strict=True
        ):
            self.rows.append(
                dict(
                    image_id=sample.image_id,
                    category_id=self.ids[label],
                    score=score,
                    segmentation=metrics.rle_encode(mask),
                )
            )

    def close(self, rank, world):
        rows = gathered(self.rows, rank, world)
        if rank == 0:
            self.path.write_text(json.dumps(rows))


class SemanticExport:
    """FOLDER/NAME.png with the data set's own label values: ADE20K 1..150, Cityscapes labelIds."""

    def __init__(self, folder: str, task: data.Task):
        self.folder = Path(folder)
        self.values = np.array(task.vocabulary.ids, np.uint8) + data.PAIRS[task.layout].offset  # (K,)
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, result, sample):
        labels = self.values[result.cpu().numpy()]  # (H, W)
        Image.fromarray(labels).save(self.folder / (Path(sample.name).stem + ".png"))

    def close(self, rank, world):
        """Every image is its own file: nothing to join."""


EXPORTS = dict(panoptic=PanopticExport, instance=InstanceExport, semantic=SemanticExport)


# ---- Command line ------------------------------------------------------------------------------------------
def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    top.add_argument(
        "--ckpt", required=True, help="run folder (best, else newest), step folder, file or HF name"
    )
    top.add_argument("--base", default="", help="DINOv3 encoder that a delta checkpoint is added to")
    top.add_argument("--data", default="", help="data folder; default: the one the run was trained on")
    top.add_argument("--task", default="", help=f"{', '.join(data.TASKS)}; default: the checkpoint's")
    top.add_argument("--size", type=int, default=0, help="network input side; default: the checkpoint's")
    top.add_argument(
        "--masked-attn", action="store_true", help="masked attention as in training (an ablation)"
    )
    top.add_argument("--limit", type=int, default=0, help="only this many images; the line then says partial")
    top.add_argument("--workers", type=int, default=2, help="data processes a rank")
    top.add_argument("--save-panoptic", default="", metavar="DIR", help="write COCO's panoptic submission")
    top.add_argument(
        "--save-instance", default="", metavar="FILE", help="write COCO's instance results (RLE)"
    )
    top.add_argument("--save-semantic", default="", metavar="DIR", help="write label PNGs")
    top.add_argument("--out", default="", help="write the numbers as JSON to this file")
    top.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def open_task(model: eomt.EoMT, args) -> tuple[data.Task, str]:
    """Task and data folder: from the flags, else from the checkpoint, else what its class count leaves."""
    root = args.data or model.meta.get("data")
    if not root:
        raise ValueError("--data is missing; give the folder that holds the data set's zips")
    classes, name = model.config["num_classes"], args.task or model.meta.get("task")
    task = data.find_task(root, name) if name else data.fit_task(classes, args.ckpt)
    words = task.vocabulary
    if len(words.names) != classes or list(words.names) != model.meta.get("names", list(words.names)):
        raise ValueError(f"{args.ckpt}: its {classes} classes are not the {len(words.names)} of {task.name}; "
                         "give the --task and --data it was trained on")
    model.meta |= dict(kind=task.kind, names=list(words.names), ids=list(words.ids), thing=list(words.thing))
    return task, root


def run(args) -> Result:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.device == "cuda" and world > 1:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    model = eomt.load(args.ckpt, args.device, args.base or None)
    if args.size % model.encoder.patch:
        raise ValueError(f"--size {args.size}: no multiple of the patch size {model.encoder.patch}")
    model.meta["size"] = args.size or model.meta["size"]
    task, root = open_task(model, args)
    wanted = {kind: getattr(args, f"save_{kind}") for kind in EXPORTS}
    for kind, target in wanted.items():
        if target and kind != task.kind:
            raise ValueError(f"--save-{kind}: {task.name} is {task.kind}; use --save-{task.kind}")
    dataset = data.SegmentDataset(root, task, "val")
    if world > 1:
        dist.init_process_group("gloo")
    exports = [EXPORTS[kind](target, task) for kind, target in wanted.items() if target]
    result = evaluate(model, dataset, rank, world, args.workers, args.limit, args.masked_attn, exports)
    for export in exports:
        export.close(rank, world)
    if rank == 0:
        print(line(result))
        if args.out:
            Path(args.out).write_text(json.dumps(dict(result.numbers, images=result.images), indent=1))
    if world > 1:
        dist.destroy_process_group()
    return result


def main():
    args = parser().parse_args()
    try:
        run(args)
    except (ValueError, OSError, RuntimeError) as error:
        if args.debug:
            raise
        print(f"error: {(str(error) or type(error).__name__).splitlines()[0]}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
