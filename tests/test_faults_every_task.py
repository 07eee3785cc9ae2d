"""The fault table for every task: each fault is put into each layout; what is said, and who goes on."""

# SPDX-License-Identifier: MIT
import io
import json
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval as evaluation
import vocab
from data import Augment, SegmentDataset
from tests.test_data_faults import LINE, flip_crc
from tests.test_tasks import (
    coco_names,
    encoded,
    make_ade20k,
    make_cityscapes,
    make_coco,
    make_own_masks,
    trained,
)

PANOPTIC, INSTANCE = "panoptic_annotations_trainval2017.zip", "annotations_trainval2017.zip"
ADE = "ADEChallengeData2016"


def own_names(root, gone):
    """A user's own COCO file: other names, and only the annotations of one kind."""
    make_coco(root)
    (root / gone).unlink()
    (path,) = root.glob("*annotations*.zip")
    repack(path, lambda name, old: old.replace(b'"red disc"', b'"apple"'))


def repack(path, change, method=zipfile.ZIP_STORED):
    """The zip again, each member as `change(name, bytes)` has it; None drops it."""
    with zipfile.ZipFile(path) as file:
        members = {name: change(name, file.read(name)) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            if content is not None:
                file.writestr(name, content)


def coco(split):
    return {"image": (f"{split}2017.zip", f"{split}2017/000000000002.jpg")}


def coco_png(split):
    nested = f"annotations/panoptic_{split}2017.zip"
    return coco(split) | {"label": (PANOPTIC, nested, f"panoptic_{split}2017/000000000002.png")}


def ade(split):
    stem = f"{dict(train='training', val='validation')[split]}/ADE_{split}_00000002"
    return {"image": (f"{ADE}.zip", f"{ADE}/images/{stem}.jpg"),
            "label": (f"{ADE}.zip", f"{ADE}/annotations/{stem}.png")}  # fmt: skip


def ade_things(split):
    folder = dict(train="training", val="validation")[split]
    thing = ("annotations_instance.zip", f"annotations_instance/{folder}/ADE_{split}_00000002.png")
    return ade(split) | {"things": thing}


def cityscapes(split):
    stem = f"{split}/town/town_000001_000019_"
    return {"image": ("leftImg8bit_trainvaltest.zip", f"leftImg8bit/{stem}leftImg8bit.png"),
            "label": ("gtFine_trainvaltest.zip", f"gtFine/{stem}gtFine_labelIds.png")}  # fmt: skip


def own(split):
    return {"image": (f"images/{split}", "1.jpg"), "label": (f"masks/{split}", "1.png")}


# name: (--task, maker, where the second image and its labels are, mode of the label PNGs)
FORMS = {
    "coco_panoptic": ("coco_panoptic", coco_names, coco_png, "RGB"),
    "coco_instance": ("coco_instance", coco_names, coco, ""),
    "ade20k_panoptic": ("ade20k_panoptic", lambda root: make_ade20k(root, things=True), ade_things, "L"),
    "ade20k_semantic": ("ade20k_semantic", make_ade20k, ade, "L"),
    "cityscapes_semantic": ("cityscapes_semantic", make_cityscapes, cityscapes, "L"),
    "own_panoptic": ("auto", lambda root: own_names(root, INSTANCE), coco_png, "RGB"),
    "own_instance": ("auto", lambda root: own_names(root, PANOPTIC), coco, ""),
    "own_semantic": ("auto", make_own_masks, own, "L"),
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Every form once; the tests change copies."""
    roots = {}
    for name, (_, make, _, _) in FORMS.items():
        roots[name] = tmp_path_factory.mktemp(name)
        make(roots[name])
    return roots


@pytest.fixture(params=FORMS)
def world(request, worlds, tmp_path, monkeypatch):
    """(fresh(), task, places, PNG mode): fresh() is another whole copy of the form's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    task, _, places, mode = FORMS[request.param]
    copies = iter(range(999))
    return lambda: shutil.copytree(worlds[request.param], tmp_path / f"{next(copies)}"), task, places, mode


def change(root, place, work):
    """Puts `work(bytes)` in the place of one member, also of a zip in a zip; None drops it."""
    top, *inner = place
    if (root / top).is_dir():
        path, new = root / top / inner[0], work((root / top / inner[0]).read_bytes())
        path.unlink() if new is None else path.write_bytes(new)
        return

    def nested(old):
        file = root / "nested.tmp"
        file.write_bytes(old)
        change(root, (file.name, *inner[1:]), work)
        new = file.read_bytes()
        file.unlink()
        return new

    act = work if len(inner) == 1 else nested
    repack(root / top, lambda name, old: act(old) if name == inner[0] else old)


def picture(content):
    return np.array(Image.open(io.BytesIO(content)))


def palette(content):
    file = io.BytesIO()
    Image.fromarray(picture(content)).convert("P").save(file, "PNG")
    return file.getvalue()


def other_value(content):
    """A value, or an RGB id, that neither a class table nor an annotation knows."""
    array = picture(content)
    array[:3, :3] = 200
    return encoded(array)


def undecodable(mode):
    """fault: (part, change of the member, words of the error)."""
    rows = {
        "image empty": ("image", lambda old: b"", "0 bytes, not a picture"),
        "image web page": ("image", lambda old: b"<!DOCTYPE html><html></html>", "not a picture"),
        "image cut": ("image", lambda old: old[: len(old) // 2], "cannot be decoded"),
        "image 16 bits": ("image", lambda old: encoded(picture(old)[..., 0].astype(np.uint16)), "8 bits"),
        "image size": ("image", lambda old: encoded(np.zeros((9, 7, 3), np.uint8)), "picture 7x9, "),
    }
    if mode:
        grey, colour = np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.uint8)
        wrong = ("mode RGB, wanted L", colour) if mode == "L" else ("mode L, wanted RGB", grey)
        rows |= {
            "label empty": ("label", lambda old: b"", "not a picture"),
            "label cut": ("label", lambda old: old[: len(old) // 2], "cannot be decoded"),
            "label 16 bits": ("label", lambda old: encoded(grey.astype(np.uint16)), "more than 8 bits"),
            "label mode": ("label", lambda old: encoded(wrong[1]), wrong[0]),
            "label size": ("label", lambda old: encoded(picture(old)[1:]), ""),
            "label value": ("label", other_value, " is not in "),
        }
    if mode == "RGB":
        rows["label palette"] = ("label", lambda old: palette(encoded(picture(old)[..., 0])), "mode P")
    return rows


def refused(work, *words):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        work()
    text = str(caught.value)
    assert LINE.match(text) and all(word in text for word in words), (text, words)


def bad_member(root, task, places, part, words):
    """Training takes the next image, the same one each time, with one line; evaluation ends with it."""
    member = re.search("[0-9]+", places("train")[part][-1].split("/")[-1])[0]  # of two sizes, either's name
    dataset = SegmentDataset(root, task, "train", Augment(32, (1, 1)))
    first, again, whole = dataset[0, 1], dataset[0, 1], dataset[0, 0]
    assert len(first.faults) == 1 and LINE.match(first.faults[0]), first.faults
    assert member in first.faults[0] and words in first.faults[0], first.faults
    assert torch.equal(first.image, again.image) and first.name == again.name and not whole.faults
    refused(lambda: SegmentDataset(root, task, "val")[1], member, words)


def test_members_that_cannot_be_decoded(world):
    fresh, task, places, mode = world
    for fault, (part, work, words) in undecodable(mode).items():
        root = fresh()
        for split in ("train", "val"):
            change(root, places(split)[part], work)
        try:
            bad_member(root, task, places, part, words)
        except (AssertionError, ValueError, pytest.fail.Exception) as error:
            raise AssertionError(f"{fault}: {error}") from error
    if ".zip" in places("val")["image"][0]:
        root = fresh()
        for split in ("train", "val"):
            flip_crc(root / places(split)["image"][0], places(split)["image"][1])
        bad_member(root, task, places, "image", "wrong CRC")
    if "things" in places("val"):
        root = fresh()
        for split in ("train", "val"):
            change(root, places(split)["things"], lambda old: old[: len(old) // 2])
        bad_member(root, task, places, "things", "cannot be decoded")


def opens(root, task, split):
    return lambda: SegmentDataset(root, task, split)


NO_ZIP = {"a web page": lambda old: b"<html>quota</html>", "empty": lambda old: b"",
          "cut or damaged": lambda old: old[:-30]}  # fmt: skip


def test_members_and_archives_that_are_not_there(world):
    """Known before the first step, in train and in val, by the name of the member or the archive."""
    fresh, task, places, _ = world
    known = data.TASKS.get(task) or data.detect(fresh())
    for split in ("train", "val"):
        for part, (top, *inner) in places(split).items():
            root = fresh()
            change(root, (top, *inner), lambda old: None)
            refused(opens(root, task, split), inner[-1].removesuffix(".jpg"), ": missing; ")
            assert len(data.check(root, task, split)) == 1
            if part == "image" and top.startswith(split):  # COCO's own: its JSON names every image
                with zipfile.ZipFile(root / top, "a") as file:
                    file.writestr(inner[-1].upper(), b"")
                refused(opens(root, task, split), inner[-1], "case differs")
            if not top.endswith(".zip"):
                continue
            root = fresh()
            whole = (root / top).read_bytes()
            for words, work in NO_ZIP.items():
                (root / top).write_bytes(work(whole))
                refused(opens(root, known, split), top, words)
            (root / top).unlink()
            refused(opens(root, known, split), str(root), top[:7])


def same(first, second):
    assert [s.name for s in first] == [s.name for s in second]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.image, b.image) and torch.equal(a.target.masks(), b.target.masks())
        assert a.target.labels.tolist() == b.target.labels.tolist()


def test_other_packings_give_the_same_images(world):
    """Deflated, with junk of other systems, unpacked into folders: nothing changes."""
    fresh, task, _, _ = world
    root = fresh()
    task = data.TASKS.get(task) or data.detect(root)
    plain = list(SegmentDataset(root, task, "val"))
    assert len(plain) >= 2 and sum(len(s.target.labels) for s in plain)
    deflated, junk, folder = fresh(), fresh(), fresh()
    for path in deflated.glob("*.zip"):
        repack(path, lambda name, old: old, zipfile.ZIP_DEFLATED)
    for path in junk.glob("*.zip"):
        with zipfile.ZipFile(path, "a") as file:
            for name in file.namelist():
                file.writestr("__MACOSX/" + name.replace("/", "/._"), b"Mac")
            file.writestr(".DS_Store", b"x")
            file.writestr("../../escape.txt", b"x")
    for path in folder.glob("*.zip"):
        with zipfile.ZipFile(path) as file:
            file.extractall(folder)
        path.unlink()
    for path in folder.rglob("*.zip"):  # the PNGs of COCO panoptic
        with zipfile.ZipFile(path) as file:
            file.extractall(path.parent)
        path.unlink()
    for path in (junk / "images" / "val", junk / "masks" / "val"):
        if path.is_dir():
            (path / ".DS_Store").write_bytes(b"x")
            (path / "._1.jpg").write_bytes(b"Mac")
    for other in (deflated, junk, folder):
        same(plain, list(SegmentDataset(other, task, "val")))
    assert not list(junk.parent.rglob("escape.txt"))


def void(value):
    """A label file in which no segment is left."""
    return lambda old: encoded(np.full_like(picture(old), value))


def strip_segments(name, content):
    """COCO's JSON with no segment in the second image."""
    if not name.endswith(".json"):
        return content
    table = json.loads(content)
    rows = table["annotations"]
    table["annotations"] = [row for row in rows if row["image_id"] != 2 or "segments_info" in row]
    for row in rows:
        if row["image_id"] == 2:
            row["segments_info"] = []
    return json.dumps(table).encode()


def test_image_without_segments_trains_and_counts(world, tmp_path, capsys):
    """No object at all in an image: a finite loss, and the image is one of those evaluated."""
    fresh, task, places, mode = world
    root = fresh()
    whole = len(SegmentDataset(root, task, "val"))
    for split in ("train", "val"):
        if mode:
            change(root, places(split)["label"], void(255 if mode == "L" and task == "auto" else 0))
        if "things" in places(split):
            change(root, places(split)["things"], void(0))
    if mode in ("RGB", ""):
        for path in root.glob("*annotations*.zip"):
            repack(path, strip_segments)
    sample = SegmentDataset(root, task, "val")[1]
    assert len(sample.target.labels) == 0 or task == "cityscapes_semantic"
    out = trained(root, tmp_path / "run", "--task", task, "--batch-size", "2")
    text = capsys.readouterr().out
    assert re.search(r"step 2/2 loss \d", text) and "bad" not in text
    done = evaluation.run(evaluation.parser().parse_args(["--ckpt", str(out), "--workers", "0"]))
    assert done.images == whole and not done.partial


def test_bad_image_in_a_run(world, tmp_path, capsys):
    """The run goes on, counts it and ends well; the evaluation of such a set gives no score."""
    fresh, task, places, _ = world
    root = fresh()
    change(root, places("train")["image"], lambda old: old[: len(old) // 2])
    size = str(len(SegmentDataset(root, task, "train")))
    out = trained(root, tmp_path / "run", "--task", task, "--batch-size", size)
    text = capsys.readouterr()
    assert re.search(r"step 2/2 .* bad 1$", text.out, re.M), text.out  # met in both epochs
    assert len(re.findall(re.escape(places("train")["image"][-1]), text.out + text.err)) == 1
    change(root, places("val")["image"], lambda old: old[: len(old) // 2])
    argv = ["--ckpt", str(out), "--workers", "0"]
    refused(lambda: evaluation.run(evaluation.parser().parse_args(argv)), places("val")["image"][-1])
    assert not re.search("PQ|AP|mIoU", capsys.readouterr().out)


def rotated(content):
    """The same picture as a camera held upright writes it: turned pixels and a note to turn them back."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(picture(content)).copy()).save(file, "PNG", exif=exif)
    return file.getvalue()


def test_photo_of_a_camera_held_upright(world):
    """Where only the upright size agrees with the labels the photo is turned; labels never are."""
    fresh, task, places, _ = world
    root, other = fresh(), fresh()
    change(other, places("val")["image"], lambda old: encoded(picture(old)))
    plain = SegmentDataset(other, task, "val")[1]
    change(root, places("val")["image"], rotated)
    if plain.image.shape[1] == plain.image.shape[2]:
        return  # a square one: the raw size agrees, and the note is not followed
    same([plain], [SegmentDataset(root, task, "val")[1]])


def test_305_segments(tmp_path, monkeypatch):
    """More than a byte counts: 255 instances above 50 stripes of stuff, in ADE20K's two PNGs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_ade20k(tmp_path, things=True)
    stuff = np.flatnonzero(~np.array(vocab.ADE20K.thing)) + 1  # (50,) values
    labels = np.zeros((20, 255), np.uint8)
    labels[10:, :250] = stuff.repeat(5)
    things = np.zeros((20, 255, 3), np.uint8)
    things[:10] = np.stack([np.full(255, 7), np.arange(255) + 1, np.zeros(255)], -1)
    for part, new in {"image": things, "label": labels, "things": things}.items():
        for split in ("train", "val"):
            change(tmp_path, ade_things(split)[part], lambda old, new=new: encoded(new))
    target = SegmentDataset(tmp_path, "ade20k_panoptic", "val")[1].target
    assert len(target.labels) == 305 and [int(m.sum()) for m in target.masks()] == [50] * 50 + [10] * 255
    out = trained(tmp_path, tmp_path / "run", "--task", "ade20k_panoptic")
    argv = ["--ckpt", str(out), "--workers", "0"]
    assert evaluation.run(evaluation.parser().parse_args(argv)).images == 3


def test_image_of_one_pixel(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_own_masks(tmp_path / "own")
    for split in ("train", "val"):
        change(tmp_path / "own", own(split)["label"], lambda old: encoded(np.zeros((1, 1), np.uint8)))
        change(tmp_path / "own", own(split)["image"], lambda old: encoded(np.zeros((1, 1, 3), np.uint8)))
    out = trained(tmp_path / "own", tmp_path / "run", "--task", "auto", "--batch-size", "3")
    argv = ["--ckpt", str(out), "--workers", "0"]
    assert evaluation.run(evaluation.parser().parse_args(argv)).images == 2


def test_names_of_other_alphabets(tmp_path):
    """Own images named in any letters, with spaces; class names likewise."""
    root = tmp_path / "data"
    make_own_masks(root)
    for kind, end in (("images", "jpg"), ("masks", "png")):
        folder = root / kind / "val"
        (folder / f"1.{end}").rename(folder / f"2 \u96ea h\u00e9 \u041f.{end}")
    (root / "classes.txt").write_text("sky\n\u98a8\u7b5d kite\n", "utf-8")
    dataset = SegmentDataset(root, "auto", "val")
    assert [len(s.target.labels) > 0 for s in dataset] == [True, True]
    assert dataset.task.vocabulary.names[1] == "\u98a8\u7b5d kite"
    assert data.check(root, "auto", "val", True) == []
