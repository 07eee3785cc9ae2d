"""Images to pictures and JSON, from a checkpoint of ours, the model zoo or Hugging Face.

    python predict.py --ckpt runs/quick photo.jpg           # photo.overlay.png, photo.png, predictions.json
    python predict.py --ckpt coco_panoptic_eomt_large_640.bin photos/ "more/*.jpg" --out results
    python predict.py --ckpt runs/ov/B street.jpg --prompts "cat, bicycle|bike; stuff: road, sky"

Results come in COCO's panoptic layout: NAME.png with id = R + 256 G + 65536 B, and predictions.json.
The drawing functions also make train.py's pictures; they need Pillow only.
"""
# SPDX-License-Identifier: MIT
import colorsys
import glob
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

import data
import eomt
import vocab


# ---- Drawing -----------------------------------------------------------------------------------------------
def colour(index: int) -> tuple[int, int, int]:
    """The index-th of endless well-separated colours: golden-ratio hues, three strengths."""
    strength, value = (0.85, 0.6, 1.0)[index % 3], (1.0, 0.85, 0.7)[index // 3 % 3]
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(index * 0.618034 % 1, strength, value))


def overlay(image: np.ndarray, ids: np.ndarray, rows: list[dict], alpha=0.55) -> Image.Image:
    """Photo uint8 (H,W,3) and id map (H,W), 0 = nothing, with a row (id, category, text) each.

    A class keeps its colour over all pictures; its further instances are darker."""
    rows, count = [row for row in rows if (ids == row["id"]).any()], {}  # without segments wholly hidden
    table = np.zeros((ids.max() + 1, 3), np.float32)  # (S+1, 3)
    for row in rows:
        count[row["category"]] = count.get(row["category"], -1) + 1
        table[row["id"]] = np.array(colour(row["category"])) * (1 - 0.15 * (count[row["category"]] % 4))
    mixed = np.where(ids[..., None] > 0, (1 - alpha) * image + alpha * table[ids], 0.4 * image)  # (H, W, 3)
    mixed[:, 1:][ids[:, 1:] != ids[:, :-1]] = 255  # outlines
    mixed[1:][ids[1:] != ids[:-1]] = 255
    picture = Image.fromarray(mixed.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for row in rows:
        y, x = np.nonzero(ids == row["id"])
        near = ((x - x.mean()) ** 2 + (y - y.mean()) ** 2).argmin()  # the centre itself may lie outside
        half, (w, h) = draw.textlength(row["text"]) / 2 + 2, picture.size  # a label is moved in, not cut
        at = max(half, min(x[near], w - half)), max(8, min(y[near], h - 8))
        draw.text(at, row["text"], fill="white", stroke_width=1, stroke_fill="black", anchor="mm")
    return picture


def segments(ids, labels, scores, names) -> list[dict]:
    """A row per segment of an id map: id, category (class index), name, score, area, text to draw."""
    areas = np.bincount(ids.ravel(), minlength=len(labels) + 1).tolist()
    rows = []
    for n, (label, score) in enumerate(zip(labels, scores, strict=True), 1):
        text = names[label] if score is None else f"{names[label]} {score:.2f}"
        rows.append(dict(id=n, category=label, name=names[label], score=score, area=areas[n], text=text))
    return rows


def layers(result, kind, names) -> tuple[np.ndarray, list[dict]]:
    """A result of `eomt.segment` as one id map (H,W), 0 = nothing, and its rows; of instances the likely."""
    if kind == "panoptic":
        ids, labels, scores = result.ids.cpu().numpy(), result.labels.tolist(), result.scores.tolist()
    elif kind == "instance":
        rows = (result.scores >= 0.5).nonzero()[:, 0].tolist()
        ids = np.zeros(tuple(result.masks.shape[1:]), np.int32)  # (H, W)
        for number, row in reversed(list(enumerate(rows, 1))):  # the best one, which is first, comes on top
            ids[result.masks[row].cpu().numpy()] = number
        labels, scores = result.labels[rows].tolist(), result.scores[rows].tolist()
    else:
        labels, ids = np.unique(result.cpu().numpy(), return_inverse=True)
        ids = ids.reshape(result.shape).astype(np.int32) + 1  # (H, W)
        labels, scores = labels.tolist(), [None] * len(labels)
    return ids, segments(ids, labels, scores, names)


def truth_layers(target, names) -> tuple[np.ndarray, list[dict]]:
    """A target likewise; later segments lie on top."""
    ids = np.zeros(target.ids.shape[1:], np.int32)  # (H, W)
    for t, mask in enumerate(target.masks().numpy()):
        ids[mask] = t + 1
    return ids, segments(ids, target.labels.tolist(), [None] * len(target.labels), names)


def draw_comparison(model, dataset, path, count=6, height=220):
    """Rows of photo | target | prediction for the first validation images."""
    meta, rows = model.meta, []
    for index in range(min(count, len(dataset))):
        sample = dataset[index]
        photo = sample.image.permute(1, 2, 0).numpy()  # (H, W, 3)
        found = layers(eomt.segment(model, [sample.image], meta["kind"])[0], meta["kind"], meta["names"])
        zoom = max(1, min(height // photo.shape[0], 4 * height // photo.shape[1]))  # words need room
        photo = photo.repeat(zoom, 0).repeat(zoom, 1)  # (zH, zW, 3)
        parts = [Image.fromarray(photo)]
        for ids, segments in (truth_layers(sample.target, meta["names"]), found):
            parts.append(overlay(photo, ids.repeat(zoom, 0).repeat(zoom, 1), segments))
        width = round(height * min(max(photo.shape[1] / photo.shape[0], 0.25), 4))  # 1x1500 photos exist
        rows.append([part.resize((width, height)) for part in parts])
    sheet = Image.new("RGB", (max(3 * row[0].width + 8 for row in rows), len(rows) * (height + 4)), "white")
    for y, row in enumerate(rows):
        for x, part in enumerate(row):
            sheet.paste(part, (x * (part.width + 4), y * (height + 4)))
    sheet.save(path)


def draw_chart(series: dict[str, list[tuple[float, float]]], path, size=(860, 260)):
    """One panel per series of (x, y), each on its own scale, below each other."""
    sheet = Image.new("RGB", (size[0], size[1] * max(1, len(series))), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (name, points) in enumerate(series.items()):
        left, top, right, bottom = 70, k * size[1] + 24, size[0] - 20, (k + 1) * size[1] - 30
        x, y = np.array(points, float).T
        low, high = y.min(), max(y.max(), y.min() + 1e-12)
        px = left + (x - x.min()) / max(np.ptp(x), 1) * (right - left)
        py = bottom - (y - low) / (high - low) * (bottom - top)
        draw.rectangle((left, top, right, bottom), outline="#bbbbbb")
        draw.line(list(zip(px, py, strict=True)), fill=colour(k), width=2)
        draw.text((left, top - 18), f"{name}   last {y[-1]:.4g}", fill="black")
        for value, at in ((high, top), (low, bottom)):
            draw.text((left - 6, at), f"{value:.3g}", fill="black", anchor="rm")
        for value, at in ((x.min(), left), (x.max(), right)):
            draw.text((at, bottom + 6), f"{value:.0f}", fill="black", anchor="mt")
    sheet.save(path)


def draw_bars(rows: list[tuple[str, float]], path, width=700):
    """A horizontal bar per (name, value in percent), best first; nan = the class never occurred."""
    rows = sorted(((n, v) for n, v in rows if v == v), key=lambda row: -row[1])
    sheet = Image.new("RGB", (width, 16 * len(rows) + 16), "white")
    draw = ImageDraw.Draw(sheet)
    for top, (name, value) in zip(range(8, 16 * len(rows), 16), rows, strict=True):
        draw.text((210, top + 7), name[:34], fill="black", anchor="rm")
        draw.rectangle((220, top + 1, 220 + (width - 280) * value / 100, top + 13), fill="#4a78c8")
        draw.text((width - 50, top + 7), f"{value:.1f}", fill="black", anchor="lm")
    sheet.save(path)


# ---- Export ------------------------------------------------------------------------------------------------
class Logits(torch.nn.Module):
    """A model as images uint8 (B,3,S,S) -> mask logits, class logits: two tensors, as exporters want it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return tuple(self.model(images)[-1])


def export(model, path: Path) -> float | None:
    """Writes PATH.onnx (needs onnx and onnxscript) or PATH.pt2 (torch.export), any batch size, fixed side.

    Returns the largest difference from the model's own logits, None where onnxruntime is not installed."""
    if path.suffix not in (".onnx", ".pt2") or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--export {path}: end the name in .onnx or .pt2, in a folder that can be written")
    images = torch.randint(0, 256, (2, 3) + (model.meta["size"],) * 2, dtype=torch.uint8)  # (2, 3, S, S)
    net, shapes = Logits(model.cpu()).eval(), {"images": {0: torch.export.Dim.AUTO}}
    with torch.no_grad():
        want, program = net(images), torch.export.export(net, (images,), dynamic_shapes=shapes)
        if path.suffix == ".pt2":
            torch.export.save(program, path)
            got = torch.export.load(path).module()(images)
        else:
            try:
                torch.onnx.export(program, (), path, verbose=False, output_names=["masks", "classes"])
            except ImportError as error:
                raise ValueError(f"{path}: needs {error.name}; pip install onnx onnxscript") from None
            try:
                import onnxruntime
            except ImportError:
                return None
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            got = [torch.from_numpy(array) for array in session.run(None, {"images": images.numpy()})]
    return torch.stack([(a - b).abs().max() for a, b in zip(want, got, strict=True)]).max().item()


# ---- Open vocabulary ---------------------------------------------------------------------------------------
def set_words(model, words, texts, args):
    """A vocabulary and its texts become the classes; those that share a word with a trained one are seen."""
    trained, indices = model.meta["trained"]
    seen, _ = vocab.overlap(vocab.Vocabulary(**trained), words, indices)
    model.set_classes(words.names, words.thing, texts, [k in seen for k in range(len(words.names))],
                      args.text_weights, args.tokenizer, data.cache_dir() / "text_rows.safetensors")


def set_prompts(model, args):
    """The user's words become the classes; distractor words after them take what is none of these."""
    meta = model.meta
    words = vocab.parse_prompts(args.prompts, "--prompts")
    rest = vocab.background(args.background, words)
    both = vocab.Vocabulary("prompts", words.names + rest.names, range(1, len(words.names + rest.names) + 1),
                            words.thing + rest.thing, words.synonyms + rest.synonyms)
    texts = vocab.prompts(words, vocab.LANGUAGES, meta["template"])
    texts += vocab.prompts(rest, meta["languages"].split(","), meta["template"])
    set_words(model, both, texts, args)
    meta |= dict(kind="panoptic", shown=len(words.names))


@torch.inference_mode()
def segment_open(model, image, embeddings=False):
    """Panoptic of the first `shown` classes; per segment its scores, with `embeddings` its region's, too."""
    head, calls = model.class_head, []
    hook = head.register_forward_hook(lambda module, inputs, output: calls.append((*inputs, output)))
    result = eomt.segment(model, [image], "panoptic")[0]
    hook.remove()
    queries, region, output = (tensor[:1].float() for tensor in calls[-1])
    prob, labels = output[0].softmax(-1)[:, :-1].max(-1)  # (Q,) each
    p_in = (head.in_logits(queries)[0, :, :-1] / head.temp_in).softmax(-1)  # (Q, K)
    l_out = head.out_logits(region)[0]  # (Q, K)
    p_out = (l_out / head.temp_out).softmax(-1)  # (Q, K)
    keep = (result.labels < model.meta.get("shown", len(head.seen))).nonzero()[:, 0].tolist()
    rows = []
    for s, label in zip(keep, result.labels[keep].tolist(), strict=True):
        q = ((prob - result.scores[s]).abs() + (labels != label)).argmin().item()  # the query it came from
        rows.append(dict(score_in=p_in[q, label].item(), score_out=p_out[q, label].item(),
                         presence=l_out[q, label].sigmoid().item()))
        rows[-1] |= dict(embedding=region[0, q].tolist()) if embeddings else {}
    table = torch.zeros(len(result.labels) + 1, dtype=result.ids.dtype, device=result.ids.device)  # (S+1,)
    table[[s + 1 for s in keep]] = torch.arange(1, len(keep) + 1, dtype=table.dtype, device=table.device)
    return eomt.Panoptic(table[result.ids.long()], result.labels[keep], result.scores[keep]), rows


# ---- Command line ------------------------------------------------------------------------------------------
def expand(patterns: list[str]) -> list[Path]:
    """Images named by files, folders and globs, in that order, none twice."""
    found = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            hits = sorted(p for p in path.iterdir() if p.suffix.lower() in data.SUFFIXES and p.is_file())
        else:
            hits = [path] if path.exists() else map(Path, sorted(glob.glob(pattern, recursive=True)))
            hits = [p for p in hits if not p.is_dir()]
        if not hits:
            raise FileNotFoundError(f"{pattern}: no image there; give an image, a folder or a glob in quotes")
        found |= dict.fromkeys(hits)
    return list(found)


def open_image(path: Path) -> torch.Tensor:
    """uint8 (3,H,W), turned upright by its EXIF tag; grey, palette, CMYK and RGBA of 8 bits become RGB."""
    try:
        picture = data.open_picture(path.read_bytes(), str(path))
        array = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))  # (H, W, 3)
    except data.UNDECODABLE as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def write_result(path: Path, image, result, details, meta, out: Path, number: int) -> dict:
    """NAME.overlay.png and NAME.png (ids); returns the image's row of predictions.json."""
    ids, rows = layers(result, meta["kind"], meta["names"])
    overlay(image.permute(1, 2, 0).numpy(), ids, rows).save(out / f"{path.stem}.overlay.png")
    data.write_ids(ids, out / f"{path.stem}.png")
    for row, more in zip(rows, details or [{}] * len(rows), strict=True):
        row |= dict(category_id=meta["ids"][row.pop("category")], **more)
        del row["text"]
    return dict(image_id=number, file_name=f"{path.stem}.png", image=path.name, segments_info=rows)


def check_names(paths: list[Path], out: Path) -> None:
    """No picture that will be written takes the place of another one or of an image."""
    taken = {path.resolve(): path for path in paths}
    for path in paths:
        for name in (f"{path.stem}.png", f"{path.stem}.overlay.png"):
            if other := taken.get(place := (out / name).resolve()):
                raise ValueError(f"{path}: its {name} would replace {other}, or its result; "
                                 "give another --out, to two images of one name two")
            taken[place] = path


def parser():
    top = data.Arguments(usage="%(prog)s --ckpt CKPT [options] IMAGE...", description=__doc__.split("\n")[0])
    top.add_argument("images", nargs="*", help="images, folders or globs")
    top.add_argument("--ckpt", required=True, help="run (best, else newest), step folder, file or HF name")
    top.add_argument("--out", default="predictions", help="folder for the results")
    top.add_argument("--prompts", default=None, help="classes by name: 'cat, zebra|zebras; stuff: grass'")
    top.add_argument("--background", default="coco", help="distractor words: coco, ade, none or a file")
    top.add_argument("--embeddings", action="store_true", help="region embeddings in the JSON too")
    top.add_argument("--text-weights", default="", help="SigLIP 2 with the text tower; default: training's")
    top.add_argument("--tokenizer", default="", help="its tokenizer; default: in its folder")
    top.add_argument("--base", default="", help="DINOv3 encoder that a delta checkpoint is added to")
    top.add_argument("--task", default="auto", help=f"auto (the checkpoint's), {', '.join(data.TASKS)}")
    top.add_argument("--size", type=int, default=0, help="network input side; default: the checkpoint's")
    top.add_argument("--export", default="", metavar="FILE", help="write the model as .onnx or .pt2 and stop")
    top.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return top


def set_task(model, args):
    """Kind and class names of --task; files of other projects do not say what they were trained on."""
    auto, classes = args.task == "auto", model.config["num_classes"]
    if auto and "kind" in model.meta:
        return
    task = data.fit_task(classes, args.ckpt) if auto else data.find_task("", args.task)
    words, meta = task.vocabulary, model.meta
    if "open" not in model.config and len(words.names) != classes:
        raise ValueError(f"--task {args.task}: {len(words.names)} classes, {args.ckpt} {classes}; drop it")
    if "open" in model.config and list(words.names) != list(meta["names"]):
        set_words(model, words, vocab.prompts(words, meta["languages"].split(","), meta["template"]), args)
    meta |= dict(kind=task.kind, names=words.names, ids=words.ids, thing=words.thing)


def load_model(args) -> eomt.EoMT:
    """The checkpoint's model with the classes and the size that the options ask for."""
    model = eomt.load(args.ckpt, args.device, args.base or None)
    set_task(model, args)
    if "open" not in model.config and (args.prompts is not None or args.embeddings):
        raise ValueError(f"{args.ckpt}: has closed classes; --prompts and --embeddings need a --stage run")
    if args.prompts is not None:
        if args.task != "auto":
            raise ValueError(f"--task {args.task}: --prompts name other classes; drop one of the two")
        set_prompts(model, args)
    if args.embeddings and model.meta["kind"] != "panoptic":
        raise ValueError(f"--embeddings: come with panoptic segments, not {model.meta['kind']}; drop them")
    if args.size < 0 or args.size % model.encoder.patch:
        raise ValueError(f"--size {args.size}: no multiple of the patch size {model.encoder.patch}; give one")
    model.meta["size"] = args.size or model.meta["size"]
    return model


def run(args):
    model = load_model(args)
    if args.export:
        off = export(model, Path(args.export))
        if off != off:
            raise ValueError(f"{args.export}: gives NaN where the model does not; try the other format")
        print(f"{args.export}: " + ("not checked" if off is None else f"logits differ by at most {off:.1e}"))
        return
    eomt.accelerate(model)
    paths, out = expand(args.images), Path(args.out)
    if not paths:
        raise ValueError("no images; give files, folders or globs")
    check_names(paths, out)
    out.mkdir(parents=True, exist_ok=True)
    data.writable(out / "predictions.json")  # what cannot be written is known now
    numbers = [int(path.stem) for path in paths if path.stem.isdecimal()]
    numbers = numbers if len(set(numbers)) == len(paths) else range(len(paths))  # every image has its own
    rows, bad, free = [], [], "open" in model.config and model.meta["kind"] == "panoptic"
    for number, path in zip(numbers, tqdm(paths, unit="img", disable=not sys.stderr.isatty()), strict=True):
        try:
            image = open_image(path)
        except ValueError as error:  # the first is told again at the end; no other is lost for it
            bad.append(str(error))
            print(error)
            continue
        answer = segment_open(model, image, args.embeddings) if free else \
            (eomt.segment(model, [image], model.meta["kind"])[0], [])
        rows.append(write_result(path, image, *answer, model.meta, out, number))
        found = ", ".join(r["name"] for r in rows[-1]["segments_info"]) or "nothing"
        print(f"{path}: {found} -> {out / path.stem}.overlay.png")
    (out / "predictions.json").write_text(json.dumps(dict(annotations=rows), indent=1))
    if bad:
        raise ValueError(bad[0] + (f" (and {len(bad) - 1} more of {len(paths)} images)" if bad[1:] else ""))


def main():
    data.command(lambda argv: run(parser().parse_args(argv)), sys.argv[1:])


if __name__ == "__main__":
    main()
