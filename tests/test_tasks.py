"""Every published task and a user's own data: official layouts made here, trained, evaluated, exported."""

# SPDX-License-Identifier: MIT
import io
import json
import re
import shlex
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eomt
import eval as evaluation
import predict
import train
import vocab

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SMALL = [
    "--encoder",
    "tiny",
    "--encoder-weights",
    "random",
    "--size",
    "32",
    "--steps",
    "2",
    "--batch-size",
    "2",
]
SMALL += ["--num-points", "64", "--num-queries", "5", "--workers", "0", "--log-every", "1", "--warmup", "0,0"]


@pytest.fixture(autouse=True)
def private(tmp_path_factory, monkeypatch):
    """A cache of its own, and the signal handlers as they were."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(name) for name in names]
    yield
    for name, handler in zip(names, before, strict=True):
        signal.signal(name, handler)


def encoded(array, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def photo(rng, height, width):
    return encoded(rng.integers(0, 256, (height, width, 3), np.uint8), "JPEG")


def blocks(rng, height, width, values):
    """A map of rectangles of the given values, uint8 (H,W)."""
    out = np.full((height, width), values[0], np.uint8)
    for value in values[1:]:
        y, x = rng.integers(0, height // 2), rng.integers(0, width // 2)
        out[y : y + height // 2, x : x + width // 2] = value
    return out


def write(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)


def make_ade20k(root, things=False):
    """Values 1..150 as published; with `things`, also annotations_instance with R = class, G = number."""
    rng, members, instances = np.random.default_rng(0), {}, {}
    thing = [k for k, flag in enumerate(vocab.ADE20K.thing) if flag]
    stuff = [k + 1 for k, flag in enumerate(vocab.ADE20K.thing) if not flag]
    for split, code, count in (("training", "train", 4), ("validation", "val", 3)):
        for i in range(count):
            name, size = f"ADE_{code}_{i + 1:08d}", (40 + i, 60 - i)
            labels = blocks(rng, *size, [0, stuff[i], stuff[i + 5], thing[i] + 1])
            members[f"ADEChallengeData2016/images/{split}/{name}.jpg"] = photo(rng, *size)
            members[f"ADEChallengeData2016/annotations/{split}/{name}.png"] = encoded(labels)
            number = (labels == thing[i] + 1).astype(np.uint8)
            pixels = np.stack([number * (i + 1), number * 7, number * 0], -1)  # (H, W, 3)
            instances[f"annotations_instance/{split}/{name}.png"] = encoded(pixels)
    write(root / "ADEChallengeData2016.zip", members)
    if things:
        write(root / "annotations_instance.zip", instances)


def make_cityscapes(root):
    rng, images, labels = np.random.default_rng(0), {}, {}
    for split, count in (("train", 4), ("val", 3)):
        for i in range(count):
            stem = f"{split}/town/town_{i:06d}_000019"
            images[f"leftImg8bit/{stem}_leftImg8bit.png"] = encoded(
                rng.integers(0, 256, (32, 64, 3), np.uint8)
            )
            labels[f"gtFine/{stem}_gtFine_labelIds.png"] = encoded(blocks(rng, 32, 64, [0, 7, 8 + i, 26]))
    write(root / "leftImg8bit_trainvaltest.zip", images)
    write(root / "gtFine_trainvaltest.zip", labels)


def make_coco(root):
    data.write_shapes(root, vocab.SHAPES, 4, 3, seed=3)


def coco_names(root):
    """The procedural world's zips with its categories renamed to COCO's first ones, ids and all."""
    make_coco(root)
    for name, table in (("annotations_trainval2017.zip", vocab.COCO_INSTANCE),
                        ("panoptic_annotations_trainval2017.zip", vocab.COCO_PANOPTIC)):  # fmt: skip
        with zipfile.ZipFile(root / name) as file:
            members = {member: file.read(member) for member in file.namelist()}
        for member in [m for m in members if m.endswith(".json")]:
            content = json.loads(members[member])
            unused = {
                flag: iter([i for i, t in zip(table.ids, table.thing, strict=True) if t == flag])
                for flag in (True, False)
            }
            new = {c["id"]: next(unused[bool(c.get("isthing", 1))], None) for c in content["categories"]}
            for note in content["annotations"]:
                for row in note.get("segments_info", [note]):
                    row["category_id"] = new[row["category_id"]]
            content["categories"] = [dict(id=i, name=n, isthing=int(t)) for i, n, t in
                                     zip(table.ids, table.names, table.thing, strict=True)]  # fmt: skip
            members[member] = json.dumps(content)
        write(root / name, members)


def make_own_masks(root):
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            (root / "images" / split / f"{i}.jpg").write_bytes(photo(rng, 40, 50))
            (root / "masks" / split / f"{i}.png").write_bytes(encoded(blocks(rng, 40, 50, [255, 0, 1])))
    (root / "classes.txt").write_text("sky\nkite\n")


def trained(root, out, *argv):
    """Two steps on `root`; the run folder, made in this process."""
    assert train.run(*train.parse([*SMALL, "--data", str(root), "--out", str(out), *argv])) == 0
    return out


def evaluated(capsys, *argv):
    capsys.readouterr()
    result = evaluation.run(evaluation.parser().parse_args([*map(str, argv), "--workers", "0"]))
    assert evaluation.line(result) in capsys.readouterr().out
    return result


CASES = {
    "coco_panoptic": (coco_names, "panoptic"),
    "coco_instance": (coco_names, "instance"),
    "ade20k_panoptic": (lambda root: make_ade20k(root, things=True), "panoptic"),
    "ade20k_instance": (lambda root: make_ade20k(root, things=True), "instance"),
    "ade20k_semantic": (make_ade20k, "semantic"),
    "cityscapes_semantic": (make_cityscapes, "semantic"),
}


@pytest.mark.parametrize("name", CASES)
def test_task_trains_evaluates_exports(name, tmp_path, capsys):
    make, kind = CASES[name]
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    out = trained(root, tmp_path / "run", "--task", name)
    target = tmp_path / "export.json" if kind == "instance" else tmp_path / "export"
    result = evaluated(capsys, "--ckpt", out, f"--save-{kind}", target)
    assert (
        result.images == 3
        and not result.partial
        and len(result.per_class) == len(data.TASKS[name].vocabulary.names)
    )
    assert result.headline == {"panoptic": "PQ", "instance": "AP", "semantic": "mIoU"}[kind]
    check_export(kind, name, target, root)
    (path,) = list((tmp_path / "run" / "viz").glob("*.png"))
    assert Image.open(path).size[0] > 300


def check_export(kind, name, target, root):
    """Read back as the official tools do."""
    table = data.TASKS[name].vocabulary
    if kind == "panoptic":
        rows = json.loads(target.with_name("export.json").read_text())["annotations"]
        assert len(rows) == 3 and all(s["category_id"] in table.ids for r in rows for s in r["segments_info"])
    elif name == "ade20k_instance":
        rows = json.loads(target.read_text())
        assert len({row["image_id"] for row in rows}) == 3
        assert {row["category_id"] for row in rows} <= set(table.ids)
    elif kind == "instance":
        coco = pytest.importorskip("pycocotools.coco")
        with zipfile.ZipFile(root / "annotations_trainval2017.zip") as file:
            file.extract("annotations/instances_val2017.json", root)
        truth = coco.COCO(root / "annotations" / "instances_val2017.json")
        found = truth.loadRes(str(target))
        assert len(found.getImgIds()) == 3 and set(found.getCatIds()) <= set(table.ids)
    else:
        values = {v for p in target.glob("**/*.png") for v in np.unique(np.asarray(Image.open(p))).tolist()}
        offset = 1 if name.startswith("ade") else 0
        assert len(list(target.glob("**/*.png"))) == 3 and values <= {i + offset for i in table.ids}


def test_exports_give_our_numbers_in_the_official_tools(tmp_path, monkeypatch):
    """Half-right predictions exported, then scored by hotcoco and pycocotools: equal."""
    hotcoco, coco = pytest.importorskip("hotcoco"), pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    root = tmp_path / "data"
    root.mkdir()
    coco_names(root)
    with zipfile.ZipFile(root / "annotations_trainval2017.zip") as file:
        file.extract("annotations/instances_val2017.json", root)
    with zipfile.ZipFile(root / "panoptic_annotations_trainval2017.zip") as file:
        file.extract("annotations/panoptic_val2017.json", root)
        (root / "png.zip").write_bytes(file.read("annotations/panoptic_val2017.zip"))
    with zipfile.ZipFile(root / "png.zip") as file:
        file.extractall(root / "annotations")
    rng = np.random.default_rng(0)

    def half_right(model, images, kind, **_):
        target = queue.pop(0).target
        target = target.keep((~target.crowd.numpy()) & (rng.random(len(target.labels)) < 0.7))
        scores = torch.from_numpy(rng.random(len(target.labels)))
        if kind == "panoptic":
            ids = torch.from_numpy(np.roll(target.disjoint_ids(), 2, 1))
            kept = [s for s in range(len(target.labels)) if (ids == s + 1).any()]
            ids = sum(((ids == s + 1) * (n + 1) for n, s in enumerate(kept)), torch.zeros_like(ids))
            return [eomt.Panoptic(ids.int(), target.labels[kept], scores[kept])]
        return [eomt.Instances(target.masks().roll(3, 2), target.labels, scores)]

    monkeypatch.setattr(eomt, "segment", half_right)
    for name, (_, kind) in list(CASES.items())[:2]:
        task = data.TASKS[name]
        dataset = data.SegmentDataset(root, task, "val")
        queue, words = [dataset[i] for i in range(len(dataset))], task.vocabulary
        model = eomt.EoMT(eomt.ViT(8, 1, 1, 8, (2, 2)), len(words.names), 2, 1)
        model.meta = dict(kind=kind, names=words.names, thing=words.thing, size=16)
        export = evaluation.Export(str(tmp_path / f"{kind}.out"), task)
        ours = evaluation.evaluate(model, dataset, exports=[export]).numbers
        export.finish(0)
        if kind == "panoptic":
            truth, folder = (
                root / "annotations" / "panoptic_val2017.json",
                root / "annotations" / "panoptic_val2017",
            )
            found = tmp_path / "panoptic.out.json"
            theirs = hotcoco.panoptic.pq_compute(
                str(truth), str(found), str(folder), str(tmp_path / "panoptic.out")
            )
            assert ours["PQ"] == pytest.approx(100 * theirs["All"]["pq"], abs=1e-7) and 10 < ours["PQ"] < 90
        else:
            api = coco.COCO(root / "annotations" / "instances_val2017.json")
            official = cocoeval.COCOeval(api, api.loadRes(str(tmp_path / "instance.out")), "segm")
            official.evaluate(), official.accumulate(), official.summarize()
            assert ours["AP"] == pytest.approx(100 * official.stats[0], abs=1e-4) and 5 < ours["AP"] < 95


def test_perfect_predictions_score_100(tmp_path, monkeypatch):
    """From zips to numbers, with the ground truth as the prediction: every task gives 100."""

    def perfect(model, images, kind, **_):
        sample = queue.pop(0)
        target = sample.target
        if kind == "semantic":
            table = torch.cat([torch.zeros(1, dtype=torch.int64), target.labels])
            return [table[torch.from_numpy(target.disjoint_ids()).long()]]
        if kind == "panoptic":
            keep = ~target.crowd
            target = target.keep(keep.numpy())
            ids = torch.from_numpy(target.disjoint_ids())
            return [eomt.Panoptic(ids, target.labels, torch.ones(len(target.labels)))]
        target = target.keep(~target.crowd.numpy())
        return [eomt.Instances(target.masks(), target.labels, torch.ones(len(target.labels)))]

    monkeypatch.setattr(eomt, "segment", perfect)
    for name, (make, kind) in CASES.items():
        root = tmp_path / name
        root.mkdir()
        make(root)
        task = data.TASKS[name]
        dataset = data.SegmentDataset(root, task, "val")
        queue = [dataset[i] for i in range(len(dataset))]
        words = task.vocabulary
        model = eomt.EoMT(eomt.ViT(8, 1, 1, 8, (2, 2)), len(words.names), 2, 1)
        model.meta = dict(kind=kind, names=words.names, thing=words.thing, size=16)
        result = evaluation.evaluate(model, dataset)
        assert result.numbers[result.headline] == pytest.approx(100), name


# ---- a user's own data ----------------------------------------------------------------------------------
@pytest.mark.parametrize("make,kind,names", [(make_coco, "panoptic", 8), (make_own_masks, "semantic", 2)])
def test_own_data_is_recognised(make, kind, names, tmp_path, capsys):
    """`--task auto`, 3 or 4 images: classes come from the data; eval and predict know them."""
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    if make is make_coco:  # other names than the procedural world's: a user's own COCO file
        path = root / "panoptic_annotations_trainval2017.zip"
        with zipfile.ZipFile(path) as file:
            members = {member: file.read(member) for member in file.namelist()}
        write(path, {m: c.replace(b'"red disc"', b'"apple"') for m, c in members.items()})
    out = trained(root, tmp_path / "run", "--task", "auto", "--batch-size", "4")
    model = eomt.load(out)
    assert model.meta["kind"] == kind and len(model.meta["names"]) == names == model.config["num_classes"]
    assert evaluated(capsys, "--ckpt", out).images in (2, 3)
    (tmp_path / "a.jpg").write_bytes(photo(np.random.default_rng(1), 30, 40))
    predict.run(
        predict.parser().parse_args(
            [str(tmp_path / "a.jpg"), "--ckpt", str(out), "--out", str(tmp_path / "p")]
        )
    )
    assert (tmp_path / "p" / "a.overlay.png").exists()


def test_labels_stay_inside_the_picture():
    """A label at the edge is moved in, not cut: it leaves as many light pixels as one in the middle."""
    inside = []
    for x in (60, 0, 119):
        ids = np.zeros((40, 120), np.int32)
        ids[20, x] = 1
        row = dict(id=1, category=0, text="yellow pole 1.00")
        ink = np.asarray(predict.overlay(np.zeros((40, 120, 3), np.uint8), ids, [row]))
        inside.append(int((ink > 128).all(-1).sum()))
    assert min(inside) > 0.8 * max(inside), inside


def test_eval_refuses_a_split_of_closed_classes(tmp_path):
    """--split means nothing there; it was passed over in silence, a misspelled one too."""
    root = tmp_path / "data"
    root.mkdir()
    make_own_masks(root)
    out = trained(root, tmp_path / "run", "--task", "auto")
    with pytest.raises(ValueError, match="closed classes; --s[a-z]+ needs a --stage run"):
        evaluation.run(evaluation.parser().parse_args(["--ckpt", str(out), "--split", "ovp_val"]))


def test_hidden_instance_is_drawn_as_nothing():
    """The worst instance wholly under better ones has no pixel of the id map: no IndexError."""
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :4], masks[1, :2] = True, True
    result = eomt.Instances(masks, torch.tensor([0, 1]), torch.tensor([0.9, 0.8]))
    ids, rows = predict.layers(result, "instance", ["cat", "dog"])
    assert [row["area"] for row in rows] == [32, 0]
    both = [np.asarray(predict.overlay(np.zeros((8, 8, 3), np.uint8), ids, r)) for r in (rows, rows[:1])]
    assert np.array_equal(*both)


def test_own_data_from_other_checkpoint(tmp_path, capsys):
    """--init from a model of other classes: the class head is made anew, with one line; the rest is taken."""
    root = tmp_path / "data"
    root.mkdir()
    make_own_masks(root)
    start = eomt.EoMT(eomt.ViT(**eomt.ENCODERS["tiny"], grid=(4, 4)), 133, 5)
    eomt.save(tmp_path / "coco.safetensors", start, task="coco_panoptic")
    out = trained(
        root, tmp_path / "a run", "--task", "auto", "--init", str(tmp_path / "coco.safetensors"), "--lr", "0"
    )
    text = capsys.readouterr().out
    words = shlex.split(text.split("next: python ")[1])  # as a shell reads it
    assert words[words.index("--ckpt") + 1] == str(out)
    assert len(re.findall("class head not loaded: 133 classes there, 2 here", text)) == 1
    assert torch.equal(eomt.load(out).q.weight, start.q.weight)


def test_own_data_of_as_many_classes_with_other_names(tmp_path, capsys):
    """The class head of other names is not taken over, though its shape would fit."""
    root = tmp_path / "data"
    root.mkdir()
    make_own_masks(root)
    first = trained(root, tmp_path / "a", "--task", "auto")
    (root / "classes.txt").write_text("sky\nhouse\n")
    argv = ["--task", "auto", "--init", str(first), "--lr", "0"]
    second = trained(root, tmp_path / "b", *argv)
    assert capsys.readouterr().out.count("class head not loaded: 2 classes there, 2 here, other names") == 1
    argv[3] = str(second)
    third = trained(root, tmp_path / "c", *argv)  # the same names: taken
    heads = [eomt.load(run).class_head.weight for run in (first, second, third)]
    assert not torch.equal(heads[0], heads[1]) and torch.equal(heads[1], heads[2])


def test_predict_refuses_another_task(tmp_path):
    """A misspelled one was taken for none, and one of more classes lent its names."""
    root = tmp_path / "data"
    root.mkdir()
    make_own_masks(root)
    out = trained(root, tmp_path / "run", "--task", "auto")
    cases = {"coco_panoptik": "unknown; choose", "ade20k_semantic": "150 classes, .* 2; drop it"}
    for task, words in cases.items():
        with pytest.raises(ValueError, match=f"^--task {task}: {words}"):
            predict.run(predict.parser().parse_args(["x.jpg", "--ckpt", str(out), "--task", task]))


@pytest.mark.skipif(not SHARED.exists(), reason="real samples are not here")
@pytest.mark.parametrize("name,folder", [("coco_instance", "coco"), ("ade20k_semantic", "ade20k"),
                                         ("coco_panoptic", "coco")])  # fmt: skip
def test_task_on_real_samples(name, folder, tmp_path, capsys):
    out = trained(SHARED / folder, tmp_path / "run", "--task", name)
    result = evaluated(capsys, "--ckpt", out)
    assert result.images == (3 if folder == "ade20k" else 28)


def test_resume_on_other_data(tmp_path):
    """The same images may have moved; others, or another number of them, are another run."""
    make_own_masks(tmp_path / "first")
    out = trained(tmp_path / "first", tmp_path / "run", "--task", "auto")
    (tmp_path / "first").rename(tmp_path / "moved")
    trained(tmp_path / "moved", out, "--task", "auto", "--resume")
    for split, change, found in (("train", "9", 3), ("val", "9", 2), ("train", None, 2)):
        shutil.copytree(tmp_path / "moved", tmp_path / "other", dirs_exist_ok=True)
        for path in (tmp_path / "other").glob(f"*/{split}/0.*"):
            path.rename(path.with_stem(change)) if change else path.unlink()
        before, name = dict(train=3, val=2)[split], r"\(names [0-9a-f]{8}\)"
        said = f"with other settings: {split} images {before} {name} -> {found} {name}; use the same"
        with pytest.raises(ValueError, match=f"step-00000002: the run was started {said}"):
            trained(tmp_path / "other", out, "--task", "auto", "--resume")
        shutil.rmtree(tmp_path / "other")
    record = json.loads((out / "step-00000002" / "meta.json").read_text())  # of an older run
    del record["images"], record["own_sha256"]
    (out / "step-00000002" / "meta.json").write_text(json.dumps(record))
    (tmp_path / "moved" / "images" / "train" / "0.jpg").unlink()
    (tmp_path / "moved" / "masks" / "train" / "0.png").unlink()
    trained(tmp_path / "moved", out, "--task", "auto", "--resume")
