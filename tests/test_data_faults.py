"""The fault table of the data: what is said, in which form, and who goes on; made in a small real COCO."""

# SPDX-License-Identifier: MIT
import contextlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import vocab
from data import Augment, FolderReader, SegmentDataset, ZipReader
from metrics import PanopticQuality, rle_encode

ROOT = Path(__file__).resolve().parents[1]
LINE = re.compile(r"^[^!\n]+(![^\n]+?)?: [^\n]+; [^\n]+$")  # <file>!<member>: <what is wrong>; <what to do>
PANOPTIC = "panoptic_annotations_trainval2017.zip"
JSON, PNGS = "annotations/panoptic_{}2017.json", "annotations/panoptic_{}2017.zip"


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    root = tmp_path_factory.mktemp("clean")
    data.write_shapes(root, vocab.SHAPES, 5, 3, seed=0)
    return root


@pytest.fixture
def root(clean, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(clean, tmp_path / "coco")


def edit(path, changes, compression=zipfile.ZIP_STORED):
    """Pack a zip again; `changes` maps a member to new bytes, a function of the old ones, or None (drop)."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    for name, change in changes.items():
        members[name] = change(members[name]) if callable(change) else change
    target = io.BytesIO() if isinstance(path, io.BytesIO) else path
    with zipfile.ZipFile(target, "w", compression) as file:
        for name, content in members.items():
            if content is not None:
                file.writestr(name, content)
    return target


def edit_json(root, split, change):
    def apply(content):
        table = json.loads(content)
        change(table)
        return json.dumps(table).encode()

    edit(root / PANOPTIC, {JSON.format(split): apply})


def edit_png(root, split, number, change):
    """Change the bytes of one panoptic PNG inside its nested zip."""
    name = f"panoptic_{split}2017/{number:012}.png"
    edit(root / PANOPTIC, {PNGS.format(split): lambda old: edit(io.BytesIO(old), {name: change}).getvalue()})


def encode(array, mode=None):
    file = io.BytesIO()
    Image.fromarray(array, mode).save(file, "PNG")
    return file.getvalue()


def rgb(content):
    return np.array(Image.open(io.BytesIO(content)))


def flip_crc(path, member):
    """Change one byte of a stored member, so that its checksum is wrong."""
    with zipfile.ZipFile(path) as file:
        info = file.getinfo(member)
    raw = bytearray(path.read_bytes())
    raw[info.header_offset + 30 + len(member) + info.compress_size // 2] ^= 0xFF
    path.write_bytes(raw)


def set_field(path, member, value, local, central):
    """Set a 16-bit field of a member in its local header and in the directory."""
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        at = file.getinfo(member).header_offset
    raw[at + local : at + local + 2] = struct.pack("<H", value)
    at = raw.index(b"PK\1\2")
    while raw[at + 46 : at + 46 + len(member)] != member.encode():
        at = raw.index(b"PK\1\2", at + 1)
    raw[at + central : at + central + 2] = struct.pack("<H", value)
    path.write_bytes(raw)


def error_of(work, *words):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        work()
    text = str(caught.value)
    assert LINE.match(text), text
    for word in words:
        assert word in text, text
    return text


# ----------------------------------------------------------------------------------------------------
# Archives


@pytest.mark.parametrize(
    "content,word",
    [
        (b"", "0 bytes, empty"),
        (b"<!DOCTYPE html><html>quota exceeded</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"PK\3\4" + b"x" * 500, "a cut or damaged zip"),
        (b"\x1f\x8b" + b"x" * 500, "neither a zip nor a .tar"),
        (None, "not found"),
    ],
)
def test_what_is_not_a_zip(root, content, word):
    path = root / "val2017.zip"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
        error_of(lambda: SegmentDataset(root, "shapes", "val"), f"{path}: ", word, "download it again")
        assert data.check(root, "shapes", "val") == [error_of(lambda: ZipReader(path))]
    error_of(lambda: ZipReader(path), str(path), word)
    if content is None:
        error_of(lambda: SegmentDataset(root, "shapes", "val"), str(root), "val2017")


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_cut_zip(root, keep):
    path = root / "train2017.zip"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep)])
    error_of(lambda: SegmentDataset(root, "shapes", "train"), f"{path}: ", "a cut or damaged zip")


def test_zip_that_lost_its_beginning(root):
    path = root / "val2017.zip"
    path.write_bytes(path.read_bytes()[500:])
    error_of(lambda: [s for s in SegmentDataset(root, "shapes", "val")], str(path))


def test_damaged_nested_zip(root):
    edit(root / PANOPTIC, {}, zipfile.ZIP_DEFLATED)
    raw = bytearray((root / PANOPTIC).read_bytes())
    with zipfile.ZipFile(root / PANOPTIC) as file:
        info = file.getinfo(PNGS.format("val"))
    middle = info.header_offset + 60 + info.compress_size // 2
    raw[middle : middle + 50] = bytes(50)
    (root / PANOPTIC).write_bytes(raw)
    error_of(lambda: SegmentDataset(root, "shapes", "val"), PNGS.format("val"), "damaged")
    assert [p.suffix for p in data.cache_dir().iterdir()] == [".npz"]  # no half zip, no temporary file


@pytest.mark.parametrize("content", [b"", b"nothing", b"\x1f\x8b\x08" + b"z" * 600])
def test_what_is_not_a_tar(tmp_path, content):
    path = tmp_path / "annotations_instance.tar"
    path.write_bytes(content)
    error_of(lambda: ZipReader(path), str(path))


def test_bombs_are_refused_by_their_size(tmp_path, monkeypatch):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("big", bytes(3 << 20))
    error_of(lambda: ZipReader(path).read("big", limit=1 << 20), f"{path}!big", "3145728 bytes")
    raw = path.read_bytes()  # a directory that lies about the size: no more than it says is ever unpacked
    path.write_bytes(raw.replace(struct.pack("<I", 3 << 20), struct.pack("<I", 1000)))
    error_of(lambda: ZipReader(path).read("big", limit=1 << 20), f"{path}!big", "1001 of 1000 bytes")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "big").write_bytes(bytes(5000))
    error_of(lambda: FolderReader(tmp_path / "f").read("big", limit=4000), "!big", "over 4000 bytes")
    error_of(lambda: FolderReader(tmp_path / "f").read("../x"), "!../x", "missing")


def test_picture_bomb(tmp_path):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        error_of(
            lambda: data.open_picture(bomb, "a.zip!b.png"),
            "a.zip!b.png: cannot be decoded",
            "3600000000 pixels",
        )


# ----------------------------------------------------------------------------------------------------
# Start: what shows without decoding


def rename(old, new):
    def change(path):
        with zipfile.ZipFile(path) as file:
            content = file.read(old)
        edit(path, {old: None, new: content})

    return change


def test_image_missing_or_named_in_another_case(root):
    member = "val2017/000000000002.jpg"
    edit(root / "val2017.zip", {member: None})
    text = error_of(
        lambda: SegmentDataset(root, "shapes", "val"), f"{root / 'val2017.zip'}!{member}: missing; "
    )
    assert data.check(root, "shapes", "val") == [text]
    edit(root / "val2017.zip", {"val2017/000000000002.JPG": b"", "val2017/000000000003.jpg": None})
    text = error_of(
        lambda: SegmentDataset(root, "shapes", "val"),
        f"!{member}: case differs, there is {member[:-3]}JPG; rename it, or ",
        "(and 1 more",
    )
    assert len(data.check(root, "shapes", "val")) == 2


def test_panoptic_png_missing(root):
    edit_png(root, "val", 2, None)
    where = f"{root / PANOPTIC}!{PNGS.format('val')}!panoptic_val2017/000000000002.png"
    error_of(lambda: SegmentDataset(root, "shapes", "val"), f"{where}: missing; ")


def test_annotation_file_missing(root):
    edit(root / PANOPTIC, {JSON.format("val"): None})
    error_of(
        lambda: SegmentDataset(root, "shapes", "val"), f"{root / PANOPTIC}!{JSON.format('val')}: missing; "
    )
    (root / PANOPTIC).unlink()
    error_of(lambda: SegmentDataset(root, "shapes", "val"), str(root), PANOPTIC)
    error_of(lambda: data.detect(root / "nowhere"), "not found")


def test_member_there_twice(root):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(root / "val2017.zip", "a") as file:
            file.writestr("val2017/000000000003.jpg", b"second")
    error_of(
        lambda: SegmentDataset(root, "shapes", "val"), "!val2017/000000000003.jpg: there more than once; "
    )


def change_images(table):
    table["images"][1]["id"] = table["images"][0]["id"]


def change_unknown(table):
    table["annotations"][0]["image_id"] = 99


def change_twice(table):
    table["annotations"].append(table["annotations"][0])


def change_none(table):
    del table["annotations"][1]


def change_category(table):
    table["annotations"][0]["segments_info"][0]["category_id"] = 77


def change_name(table):
    """Ids as known, but other names: the wrong words would be trained without any other sign."""
    used = table["annotations"][0]["segments_info"][0]["category_id"]
    next(c for c in table["categories"] if c["id"] == used)["name"] = "banner"


def change_zero(table):
    table["annotations"][0]["segments_info"][0]["id"] = 0


def change_same_id(table):
    infos = table["annotations"][0]["segments_info"]
    infos[1]["id"] = infos[0]["id"]


@pytest.mark.parametrize(
    "change,words",
    [
        (change_images, ("image id 1 twice",)),
        (change_unknown, ("image id 99 is not in images",)),
        (change_twice, ("image id 1 is annotated twice",)),
        (change_none, ("image id 2 has no annotation",)),
        (change_category, ("category 77 is not in the table shapes",)),
        (change_name, (" banner is not in the table shapes; choose another --task",)),
        (change_zero, ("segment id 0 in image id 1",)),
        (change_same_id, ("twice in image id 1",)),
    ],
)
def test_faults_of_the_annotation_file(root, change, words):
    edit_json(root, "val", change)
    where = f"{root / PANOPTIC}!{JSON.format('val')}: "
    problems = data.check(root, "shapes", "val")
    assert all(LINE.match(line) for line in problems)
    assert any(line.startswith(where) and all(w in line for w in words) for line in problems), problems
    text = error_of(lambda: SegmentDataset(root, "shapes", "val"), where)
    assert text.startswith(problems[0])
    assert data.check(root, "shapes", "train") == []
    assert data.check(root, "shapes", "val") == problems  # again, from the cache


@pytest.mark.parametrize(
    "content,word",
    [
        (b"{", "1 bytes"),
        (b"\xff\xfe", "2 bytes"),
        (b"[" * 200_000, "recursion"),
        (b"{}", "COCO"),
        (b"[1]", "COCO"),
        (b'{"images": 3}', "COCO"),
    ],
)
def test_json_that_is_none(root, content, word):
    edit(root / PANOPTIC, {JSON.format("val"): content})
    said = error_of(lambda: SegmentDataset(root, "shapes", "val"), f"!{JSON.format('val')}: ", word)
    assert "; fix or download it" in said or "; give COCO's panoptic form" in said


def test_unknown_task_split_and_layout(root, tmp_path):
    error_of(lambda: SegmentDataset(root, "coco", "val"), "--task coco: unknown")
    with pytest.raises(ValueError, match="train or val"):
        SegmentDataset(root, "shapes", "test")
    (tmp_path / "empty").mkdir()
    words = "annotations/instances_{train,val}.json", "images/ masks/ classes.txt"
    error_of(lambda: data.detect(tmp_path / "empty"), "no known layout", *words)
    error_of(lambda: SegmentDataset(tmp_path / "empty", "cityscapes_semantic", "val"), "leftImg8bit")


# ----------------------------------------------------------------------------------------------------
# Members that cannot be decoded: evaluation stops, training goes on with the next image

BROKEN = {
    "empty": (lambda old: b"", "0 bytes, not a picture"),
    "garbage": (lambda old: b"garbage " * 32, "not a picture"),
    "cut": (lambda old: old[: len(old) // 2], "cannot be decoded"),
    "16 bits": (lambda old: encode(np.zeros((64, 64), np.uint16)), "more than 8 bits"),
    "float": (lambda old: tiff(np.zeros((64, 64), np.float32)), "more than 8 bits"),
    "other size": (lambda old: encode(np.zeros((64, 65, 3), np.uint8)), "picture 65x64, annotation 64x64"),
}
BROKEN_PNG = {
    "empty": (lambda old: b"", "not a picture"),
    "cut": (lambda old: old[: len(old) // 2], "cannot be decoded"),
    "grey": (lambda old: encode(np.zeros((64, 64), np.uint8)), "mode L, wanted RGB"),
    "palette": (lambda old: palette(), "mode P, wanted RGB"),
    "16 bits": (lambda old: encode(np.zeros((64, 64), np.uint16)), "more than 8 bits"),
    "other size": (lambda old: encode(np.zeros((32, 64, 3), np.uint8)), "PNG 64x32, its JSON says 64x64"),
    "unknown id": (lambda old: encode(np.full((64, 64, 3), 9, np.uint8)), "id 592137 is not in its JSON"),
}


def tiff(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "TIFF")
    return file.getvalue()


def palette():
    file = io.BytesIO()
    Image.new("P", (64, 64)).save(file, "PNG")
    return file.getvalue()


def goes_on(root, member, word):
    """Training replaces the image by the next one, always the same, and says so; evaluation raises."""
    dataset = SegmentDataset(root, "shapes", "train", Augment(64, (1, 1)))
    sample, again = dataset[0, 1], dataset[0, 1]
    assert sample.name == "000000000003.jpg" and len(sample.faults) == 1
    assert LINE.match(sample.faults[0]) and member in sample.faults[0] and word in sample.faults[0], (
        sample.faults
    )
    assert torch.equal(sample.image, again.image) and list(sample.faults) == list(again.faults)
    assert dataset[0, 0].faults == [] or not dataset[0, 0].faults
    batch = data.collate([dataset[0, i] for i in range(5)])
    assert len(batch.faults) == 1 and len(batch.names) == 5
    error_of(lambda: SegmentDataset(root, "shapes", "train")[1], member, word)
    assert len(SegmentDataset(root, "shapes", "train")[0].name)
    problems = data.check(root, "shapes", "train", decode=True)
    assert len(problems) == 1 and member in problems[0] and data.check(root, "shapes", "train") == []


@pytest.mark.parametrize("kind", BROKEN)
def test_undecodable_image(root, kind):
    change, word = BROKEN[kind]
    member = "train2017/000000000002.jpg"
    edit(root / "train2017.zip", {member: change})
    goes_on(root, f"{root / 'train2017.zip'}!{member}: ", word)


@pytest.mark.parametrize("kind", BROKEN_PNG)
def test_undecodable_panoptic_png(root, kind):
    change, word = BROKEN_PNG[kind]
    edit_png(root, "train", 2, change)
    goes_on(root, f"{PNGS.format('train')}!panoptic_train2017/000000000002.png: ", word)


@pytest.mark.parametrize(
    "kind,word",
    [
        ("crc", "wrong CRC"),
        ("encrypted", "encrypted"),
        ("deflate64", "Deflate64"),
        ("bzip2", "compression method 12"),
    ],
)
def test_unreadable_members(root, kind, word):
    path, member = root / "train2017.zip", "train2017/000000000002.jpg"
    if kind == "crc":
        flip_crc(path, member)
    elif kind == "encrypted":
        set_field(path, member, 1, 6, 8)
    else:
        set_field(path, member, {"deflate64": 9, "bzip2": 12}[kind], 8, 10)
    goes_on(root, f"{path}!{member}: ", word)


def test_segment_of_the_json_without_pixels(root):
    def erase(content):
        array = rgb(content)
        array[(array == array[32, 32]).all(-1)] = 0
        return encode(array)

    edit_png(root, "val", 2, erase)
    dataset = SegmentDataset(root, "shapes", "val")
    error_of(lambda: dataset[1], "panoptic_val2017/000000000002.png: id ", " of its JSON has no pixels; ")


@pytest.mark.parametrize("area", [0, 0.5, -3])
def test_segment_of_area_zero(root, area):
    """Without a pixel it says itself that it is none, with pixels the annotation tool left its area out."""
    whole = SegmentDataset(root, "shapes", "val")[1].target
    extra = {"id": 77, "category_id": vocab.SHAPES.ids[0], "iscrowd": 0}

    def change(table):
        infos = table["annotations"][1]["segments_info"]
        infos[0]["area"] = area
        infos.insert(1, {**extra, "area": min(area, 0)})

    edit_json(root, "val", change)
    assert data.check(root, "shapes", "val", decode=True) == []
    for crowd in (True, False):
        target = SegmentDataset(root, "shapes", "val").source.target(1, crowd)
        rows = torch.from_numpy(np.flatnonzero(np.full(len(whole.labels), crowd) | ~whole.crowd.numpy()))
        assert torch.equal(target.masks(), whole.masks()[rows])
        assert torch.equal(target.labels, whole.labels[rows]) and torch.equal(target.area, whole.area[rows])
    quality = PanopticQuality(vocab.SHAPES.thing)
    segments = [{"id": int(value), "category_id": int(label), "area": float(area), "iscrowd": 0}
                for value, label, area in zip(target.value, target.labels, target.area, strict=True)]
    quality.update(target.ids[0].numpy(), segments, target.ids[0].numpy(), segments)
    assert quality.compute()["PQ"] == 1


def test_training_gives_up_when_nothing_can_be_decoded(root):
    names = [f"train2017/{n:012}.jpg" for n in range(1, 6)]
    edit(root / "train2017.zip", dict.fromkeys(names, b"x"))
    dataset = SegmentDataset(root, "shapes", "train", Augment(64))
    with pytest.raises(ValueError, match="and the 4 images after it"):
        dataset[0, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_never_skips(root, workers):
    member = "val2017/000000000002.jpg"
    edit(root / "val2017.zip", {member: b"x"})
    dataset, seen = SegmentDataset(root, "shapes", "val"), []
    text = error_of(
        lambda: [seen.extend(s.name for s in part) for part in data.eval_loader(dataset, workers=workers)],
        f"{root / 'val2017.zip'}!{member}: 1 bytes, not a picture; ",
    )
    assert "Traceback" not in text and seen == ["000000000001.jpg"]
    assert not multiprocessing.active_children()  # a kept error does not keep the data processes


def test_data_process_puts_sigterm_off(root, monkeypatch):
    """It goes on for a while, so that its parent can save, and then leaves quietly."""
    monkeypatch.setattr(data, "GRACE", 2)
    dataset = SegmentDataset(root, "shapes", "val")
    stream = iter(torch.utils.data.DataLoader(dataset, 1, num_workers=1, collate_fn=data.pack,
                                              worker_init_fn=data._deaf, multiprocessing_context="fork"))
    next(stream)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert len(list(stream)) == 2 and worker.exitcode in (None, 0)
    worker.join(10)
    assert worker.exitcode == 0


def test_faults_pass_through_workers(root):
    edit(root / "train2017.zip", {"train2017/000000000002.jpg": b"x"})
    dataset = SegmentDataset(root, "shapes", "train", Augment(64))
    plain = list(data.loader(dataset, 5, 2))
    forked = list(data.loader(dataset, 5, 2, workers=1, context="fork"))
    assert [b.faults for b in plain] == [b.faults for b in forked] and all(len(b.faults) == 1 for b in plain)
    assert all(torch.equal(a.images, b.images) for a, b in zip(plain, forked, strict=True))


@pytest.mark.parametrize("ending", ["raise SystemExit(3)", "os.kill(os.getpid(), signal.SIGINT)"])
def test_process_with_workers_ends(root, ending):
    """Data processes ignore signals; a process that ends amid its batches must not wait for them for ever."""
    code = (
        "import os, signal, sys, data\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sets = data.SegmentDataset({str(root)!r}, 'shapes', 'val')\n"
        "stream = data.eval_loader(sets, workers=2)\n"
        "next(stream)\n" + ending
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30, capture_output=True)
    assert done.returncode in (3, -signal.SIGINT), done.stderr


def test_check_command_names_every_fault(root, capsys):
    edit(root / "val2017.zip", {"val2017/000000000002.jpg": b"x", "val2017/000000000003.jpg": b"y"})
    assert data.main([str(root), "--decode", "--split", "val", "--out", str(root / "g.png")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(
        line.startswith(f"error: {root / 'val2017.zip'}!val2017/") for line in lines
    )
    assert not (root / "g.png").exists()


# ----------------------------------------------------------------------------------------------------
# Pictures that do more, or less, than they should

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EndComments\n(x) show\n%%EOF\n"


@pytest.mark.parametrize("shrink", [1, 2])
def test_no_program_runs_for_a_picture(monkeypatch, shrink):
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    for name in ("check_call", "Popen", "run"):
        monkeypatch.setattr(subprocess, name, lambda *a, **k: pytest.fail("a program was started"))
    error_of(lambda: data.open_picture(EPS, "a.zip!b.jpg", shrink), f"b.jpg: {len(EPS)} bytes, not a picture")


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "TGA"])
def test_kinds_of_pictures(kind):
    file = io.BytesIO()
    Image.new("RGB", (6, 4), "red").save(file, kind)
    for shrink in (1, 2):
        picture = data.open_picture(file.getvalue(), "x", shrink)
        assert data.oriented(picture, (4, 6), "x").mode == "RGB"


@pytest.mark.filterwarnings("ignore")  # Pillow's on such a tag
@pytest.mark.parametrize(
    "exif",
    [b"garbagegarbage", b"II", b"II*\0\x08\0\0\0\x05\0\x12\x01", b"II*\0\xff\xff\xff\x7f", b"",
     b"II*\0\x08\0\0\0\1\0\x12\x01\2\0\2\0\0\x006\0\0\0\0\0\0\0"],  # the last: a tag that is a letter
)
def test_exif_that_cannot_be_read_is_none(exif):
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(file, "JPEG", exif=b"Exif\0\0" + exif, dpi=(72, 72))
    for shrink in (1, 2):
        picture = data.open_picture(file.getvalue(), "x!y", shrink)
        assert picture.size == (64 // shrink, 48 // shrink) and data.oriented(picture, (48, 64), "x!y")
        error_of(lambda: data.oriented(picture, (64, 48), "x!y"), "picture 64x48, annotation 48x64; ")  # noqa: B023


def test_text_in_a_png_is_not_its_size():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    raw, said = encode(np.zeros((48, 64, 3), np.uint8)), chunk(b"tEXt", b"size\0big")
    for at in (33, len(raw) - 12):  # before the pixels, and after them
        picture = data.open_picture(raw[:at] + said + raw[at:], "x!y")
        assert data.oriented(picture, (48, 64), "x!y").size == (64, 48)


# ----------------------------------------------------------------------------------------------------
# The cache after a power cut


def cached_file(suffix):
    (path,) = data.cache_dir().glob(f"*{suffix}")
    return path


def flipped(raw, at):
    return raw[:at] + bytes([raw[at] ^ 0x40]) + raw[at + 1:]


@pytest.mark.parametrize("damage", ["empty", "cut", "zeros", "flipped", "another"])
def test_damaged_table_is_parsed_again(root, damage):
    wanted = SegmentDataset(root, "shapes", "val")[0].target
    path = cached_file(".npz")
    raw = path.read_bytes()
    other = io.BytesIO()
    np.savez(other, other=np.zeros(3))
    path.write_bytes({"empty": b"", "cut": raw[: len(raw) // 2], "zeros": bytes(len(raw)),
                      "flipped": flipped(raw, len(raw) // 2), "another": other.getvalue()}[damage])
    assert torch.equal(SegmentDataset(root, "shapes", "val")[0].target.ids, wanted.ids)
    assert path.read_bytes() == raw


def test_table_with_any_byte_flipped(root):
    """Either it is read as before, or thrown away: it never ends a run, nor changes a number."""
    reader, member = ZipReader(root / PANOPTIC), JSON.format("val")
    wanted = data.load_table(reader, member, "panoptic")
    path = cached_file(".npz")
    raw = path.read_bytes()
    for at in range(0, len(raw), 7):
        path.write_bytes(flipped(raw, at))
        table = data.load_table(reader, member, "panoptic")
        assert table.keys() == wanted.keys(), at
        assert all(np.array_equal(table[key], wanted[key]) for key in wanted), at


@pytest.mark.parametrize("keep", [0, 200])
def test_cut_copy_of_a_nested_zip_is_made_again(root, keep):
    edit(root / PANOPTIC, {}, zipfile.ZIP_DEFLATED)
    wanted = SegmentDataset(root, "shapes", "val")[0].target
    os.truncate(cached_file(".zip"), keep)
    assert torch.equal(SegmentDataset(root, "shapes", "val")[0].target.ids, wanted.ids)


def test_cache_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    sync, move = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.fstat(file).st_size), sync(file)))
    monkeypatch.setattr(os, "replace", lambda *a: (done.append("named"), move(*a)))
    data.write_atomically(tmp_path / "x", lambda file: file.write(b"12345"))
    assert done == [5, "named"]


# ----------------------------------------------------------------------------------------------------
# Folders


def test_linked_folders_are_read(tmp_path):
    """Cities often lie on another disk; a link into a folder around it is no endless way."""
    (tmp_path / "disk" / "b").mkdir(parents=True)
    (tmp_path / "disk" / "b" / "1.png").write_bytes(b"1")
    (tmp_path / "disk" / "b" / "back").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "z").mkdir(parents=True)
    (tmp_path / "set" / "z" / "2.png").write_bytes(b"2")
    (tmp_path / "set" / "z" / "around").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "a").symlink_to(tmp_path / "set" / "z")  # under both names, whichever comes first
    (tmp_path / "set" / "b").symlink_to(tmp_path / "disk" / "b")
    (tmp_path / "top").symlink_to(tmp_path / "set")
    for root in (tmp_path / "set", tmp_path / "top"):
        reader = FolderReader(root)
        assert reader.names.tolist() == [b"a/2.png", b"b/1.png", b"z/2.png"]
        assert reader.read("b/1.png") == b"1"


def test_long_names(tmp_path):
    """All up to 1000 characters are found. Longer ones, where each name would take their room, are in
    nobody's way."""
    long = "d" * 100 + "/" + "e" * 100 + "/" + "f" * 100 + ".png"
    longer = "/".join(["n" * 200] * 6)
    for name in (long, longer):
        (tmp_path / "set" / name).parent.mkdir(parents=True)
        (tmp_path / "set" / name).write_bytes(b"1")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for name in ("n" * 3000, long):
            file.writestr(name, b"1")
    for reader in (FolderReader(tmp_path / "set"), ZipReader(tmp_path / "x.zip")):
        assert reader.read(long) == b"1" and reader.names.nbytes == len(long)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", ["images", "masks"])
def test_long_names_that_are_wanted(tmp_path, kind, zipped):
    """None of a user's own pictures is passed over for its name; what is no picture may have any."""
    own(tmp_path, encode(np.zeros((4, 4), np.uint8)))
    place = tmp_path / kind / "val" / "/".join(["n" * 200] * 6)
    for name in ("notes.txt", "b.png"):
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"1")
        if zipped:
            shutil.make_archive(tmp_path / kind, "zip", tmp_path, kind)
        if name == "notes.txt":
            assert len(SegmentDataset(tmp_path, "auto", "val")) == 1
    words = "characters; make it shorter" if kind == "images" else "/b: missing; get it, or drop its PNG"
    error_of(lambda: SegmentDataset(tmp_path, "auto", "val"), "n" * 200, words)


def test_long_name_in_the_annotation_file(root):
    with zipfile.ZipFile(root / "val2017.zip", "a") as file:
        file.writestr("val2017/" + "n" * 3000, b"1")
    assert len(SegmentDataset(root, "shapes", "val")) == 3
    edit_json(root, "val", lambda table: table["images"][0].update(file_name="n" * 3000))
    error_of(lambda: SegmentDataset(root, "shapes", "val"), "val2017.zip!val2017/nnn", "3008 characters")


def test_undecodable_mask_is_left_out_of_the_counts(tmp_path):
    own(tmp_path, encode(np.array([[0, 1], [1, 1]], np.uint8)), photo=encode(np.zeros((2, 2, 3), np.uint8)))
    for name in ("0", "b"):
        shutil.copy(tmp_path / "images/val/a.png", tmp_path / f"images/val/{name}.png")
        (tmp_path / f"masks/val/{name}.png").write_bytes(b"garbage")
    dataset = SegmentDataset(tmp_path, "auto", "val", Augment(2, (1, 1)))
    assert dataset.class_counts().tolist() == [1, 1]
    assert len(dataset[0, 0].faults) == 1 and dataset[0, 0].name == "a.png"
    kept = SegmentDataset(tmp_path, "auto", "val", Augment(2, (1, 1)), hidden=[1], policy="drop")
    assert kept.index.tolist() == [0, 2] and kept.class_counts().tolist() == [0, 0]


# ----------------------------------------------------------------------------------------------------
# Other layouts


def own(root, mask, classes=b"cat\ndog\n", photo=None):
    photo = encode(np.zeros((4, 4, 3), np.uint8)) if photo is None else photo
    for path, content in {"classes.txt": classes, "images/val/a.png": photo, "masks/val/a.png": mask}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            (root / path).write_bytes(content)


@pytest.mark.parametrize(
    "mask,word",
    [
        (np.full((4, 4), 2, np.uint8), "value 2 is not in the class table"),
        (np.zeros((4, 4, 3), np.uint8), "mode RGB, wanted L"),
        (np.zeros((4, 4), np.uint16), "more than 8 bits"),
        (np.zeros((3, 4), np.uint8), "picture 4x4, annotation 4x3"),
    ],
)
def test_own_masks(tmp_path, mask, word):
    own(tmp_path, encode(mask))
    error_of(lambda: SegmentDataset(tmp_path, "auto", "val")[0], "a.png: ", word)


def test_check_names_classes_without_a_pixel(tmp_path, capsys, monkeypatch):
    """Masks of 0 and 255, as many tools write them: 255 is ignored, so the second class was lost unsaid."""
    own(tmp_path, encode(np.array([[0, 255]] * 4, np.uint8)), photo=encode(np.zeros((4, 2, 3), np.uint8)))
    monkeypatch.chdir(tmp_path)
    assert data.main([str(tmp_path), "--split", "val", "--decode"]) == 0
    assert "val: no segment of dog\n" in (said := capsys.readouterr().out) and "cat" not in said
    (tmp_path / "classes.txt").write_text("cat\ndog\nsky, high\n")
    assert data.main([str(tmp_path), "--split", "val", "--decode"]) == 0
    assert "val: no segment of dog; sky, high\n" in capsys.readouterr().out  # one line: there may be 150


def test_cityscapes_value_beyond_the_published(tmp_path):
    """Of labelIds 0..33 and 255 those outside the 19 classes are void; any other is a wrong file."""
    base, stem = tmp_path / "leftImg8bit" / "val" / "town", "town_000000_000019"
    label = tmp_path / "gtFine" / "val" / "town" / f"{stem}_gtFine_labelIds.png"
    for folder in (base, label.parent):
        folder.mkdir(parents=True)
    (base / f"{stem}_leftImg8bit.png").write_bytes(encode(np.zeros((4, 4, 3), np.uint8)))
    label.write_bytes(encode(np.array([[0, 7, 33, 255]] * 4, np.uint8)))
    dataset = SegmentDataset(tmp_path, "cityscapes_semantic", "val")
    assert dataset[0].target.labels.tolist() == [0, 18]
    label.write_bytes(encode(np.array([[0, 7, 33, 34]] * 4, np.uint8)))
    dataset = SegmentDataset(tmp_path, "cityscapes_semantic", "val")
    error_of(lambda: dataset[0], "labelIds.png: value 34 is not in the class table", "--task or classes.txt")


def test_own_folder_without_mask_or_classes(tmp_path):
    own(tmp_path, None)
    error_of(lambda: SegmentDataset(tmp_path, "auto", "val"), f"{tmp_path / 'masks/val'}!a.png: missing")
    (tmp_path / "classes.txt").write_text("\n")
    error_of(lambda: data.detect(tmp_path), "classes.txt: 0 names")


@pytest.mark.parametrize("top", ["", "images/", "x/images/"])
def test_splits_stay_apart_in_one_zip(tmp_path, top):
    """images.zip packed without its own folder gave every picture to both splits."""
    (tmp_path / "classes.txt").write_text("cat\n")
    for part in ("images", "masks"):
        with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as archive:
            for name in ("train/a.png", "train/b.png", "val/c.png"):
                content = encode(np.zeros((4, 4, 3) if part == "images" else (4, 4), np.uint8))
                archive.writestr(top.replace("images", part) + name, content)
    assert SegmentDataset(tmp_path, "auto", "train").source.stems[-1].endswith("b")
    assert [len(SegmentDataset(tmp_path, "auto", split)) for split in ("train", "val")] == [2, 1]
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr(f"{top}train/a.png", encode(np.zeros((4, 4, 3), np.uint8)))
    error_of(lambda: SegmentDataset(tmp_path, "auto", "val"), "has no images/val[.zip] or images.zip with it")


def test_ade_instance_of_two_classes(tmp_path):
    things = np.zeros((4, 4, 3), np.uint8)
    things[0], things[1] = (1, 1, 0), (2, 1, 0)
    base = "ADEChallengeData2016"
    for path, content in {
        f"{base}/images/validation/x.jpg": encode(np.zeros((4, 4, 3), np.uint8)),
        f"{base}/annotations/validation/x.png": encode(np.ones((4, 4), np.uint8)),
        "annotations_instance/validation/x.png": encode(things),
    }.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(content)
    dataset = SegmentDataset(tmp_path, "ade20k_panoptic", "val")
    error_of(lambda: dataset[0], "validation!x.png: an instance of two classes")


def test_instance_annotation_of_another_image(root):
    def change(content):
        table = json.loads(content)
        table["annotations"][0]["image_id"] = 50
        return json.dumps(table).encode()

    edit(root / "annotations_trainval2017.zip", {"annotations/instances_val2017.json": change})
    task = data.replace(data.TASKS["shapes"], kind="instance", layout="coco_instance")
    error_of(
        lambda: SegmentDataset(root, task, "val"), "instances_val2017.json: image id 50 is not in images"
    )


def test_out_of_gpu_memory_names_the_flags():
    short = "CUDA out of memory. Tried to allocate 2.50 GiB"
    said = f"{short}. GPU 0 has a total capacity of 79.10 GiB of which 1.13 GiB is free. See documentation"
    advice = "lower --device-batch-size or --size, or use --recompute"
    assert data.one_line(torch.OutOfMemoryError(said)) == f"{short}; {advice}"


def spoil_instances(root, change):
    """The instance JSON of val with `change(annotations, categories)` done to it, in place in its zip."""
    path = root / "annotations_trainval2017.zip"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    content = json.loads(members["annotations/instances_val2017.json"])
    change(content["annotations"], content["categories"])
    members["annotations/instances_val2017.json"] = json.dumps(content)
    with zipfile.ZipFile(path, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)


@pytest.mark.parametrize(
    "outline,word",
    [
        ([[1, 1, 2, 2]], "a polygon has 4 coordinates"),
        ([[1, 1, float("nan"), 1, 30, 40]], "no number below 1e6"),
        ([[1, 1, float("inf"), 1, 30, 40]], "no number below 1e6"),
        ([[1, 1, 1e9, 1, 30, 40]], "no number below 1e6"),
        ({"size": [64, 64], "counts": [5]}, "counts fill"),
    ],
)
def test_outline_that_is_none_names_its_image(tmp_path, outline, word):
    data.write_shapes(tmp_path, vocab.SHAPES, 1, 2)
    task = data.replace(data.TASKS["coco_instance"], vocabulary=vocab.SHAPES)
    spoil_instances(tmp_path, lambda notes, _: notes[0].update(segmentation=outline))
    dataset = SegmentDataset(tmp_path, task, "val")
    place = "annotations/instances_val2017.json: image id 1, number 1 of its annotations: "
    error_of(lambda: dataset[0], f"{tmp_path}/annotations_trainval2017.zip!{place}", word)
    assert len(dataset[1].target.labels)


@pytest.mark.parametrize("outline", [[], None, {}])
def test_box_alone_is_no_segment(tmp_path, outline):
    """Exports for detection hold "segmentation": []; it trained on nothing, unsaid."""
    data.write_shapes(tmp_path, vocab.SHAPES, 1, 2)
    task = data.replace(data.TASKS["coco_instance"], vocabulary=vocab.SHAPES)
    spoil_instances(tmp_path, lambda notes, _: notes[0].update(segmentation=outline))
    place = "instances_val2017.json: image id 1, number 1 of its annotations: "
    error_of(lambda: SegmentDataset(tmp_path, task, "val"), place, "no outline", "polygons or RLE")


def test_flags_that_are_text(tmp_path):
    """numpy takes "0" for true, so every object was a crowd and every class a thing."""
    data.write_shapes(tmp_path, vocab.SHAPES, 1, 2)

    def change(notes, kinds):
        notes[0].update(iscrowd="0"), notes[1].update(iscrowd="1"), notes[2].update(iscrowd=None)
        kinds[0].update(isthing="0"), kinds[1].update(isthing="1"), kinds[2].update(isthing=None)

    spoil_instances(tmp_path, change)
    table = data.coco_table(tmp_path, "instances", "val")[0]
    assert table["crowd"][:3].tolist() == [False, True, False]
    assert table["category_thing"][:3].tolist() == [False, True, False]


def test_category_twice_and_area_of_nothing(tmp_path):
    data.write_shapes(tmp_path, vocab.SHAPES, 1, 2)
    spoil_instances(tmp_path, lambda _, kinds: kinds.append(dict(kinds[0], name="other")))
    error_of(lambda: SegmentDataset(tmp_path, "coco_instance", "val"), "category id 1 twice; fix this file")
    spoil_instances(tmp_path, lambda notes, kinds: (kinds.pop(), notes[0].update(area=None)))
    error_of(lambda: SegmentDataset(tmp_path, "coco_instance", "val"), "not COCO's form", "NoneType")


def test_blank_line_among_the_class_names(tmp_path):
    (tmp_path / "classes.txt").write_text("sky\n\nroad\n")
    error_of(lambda: data.detect(tmp_path), "classes.txt: line 2 is blank")


def test_out_of_memory_is_one_line(capsys):
    def work(argv):
        return np.zeros(1 << 50)

    with pytest.raises(SystemExit):
        data.command(work, [])
    assert capsys.readouterr().err.startswith("error: Unable to allocate")


@pytest.mark.parametrize("tag,size", [(1, (17, 9)), (6, (130, 70))])
def test_turned_jpeg_is_decoded_whole(tag, size):
    """A picture of 130 x 70 has a partial pixel at 1/8, which a turn would bring to its beginning."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = tag
    Image.new("RGB", (130, 70), "red").save(file, "JPEG", exif=exif)
    assert data.open_picture(file.getvalue(), "x", 8).size == size


def test_class_name_twice(tmp_path):
    (tmp_path / "classes.txt").write_text("sky\nroad\nsky\n")
    error_of(lambda: data.detect(tmp_path), "classes.txt: line 3 is a name again")


# ----------------------------------------------------------------------------------------------------
# Outlines, rights, keys, a file copied alone, wrong arguments

INSTANCES = "annotations_trainval2017.zip!annotations/instances_val2017.json"


def two_pictures(root, notes, kinds=vocab.SHAPES, sides=(10, 12)):
    """An instance set whose first picture (10,12) has the annotations `notes`."""
    common = {"category_id": 1, "area": 4, "iscrowd": 0}
    table = {
        "images": [{"id": k, "file_name": f"{k}.png", "height": sides[0], "width": sides[1]} for k in (3, 4)],
        "annotations": [{**common, "image_id": 3, **note} for note in notes],
        "categories": [{"id": i, "name": n} for i, n in zip(kinds.ids, kinds.names, strict=True)],
    }
    members = {"annotations/instances_val2017.json": json.dumps(table)}
    photos = {f"val2017/{k}.png": encode(np.zeros((*sides, 3), np.uint8)) for k in (3, 4)}
    for name, content in (("annotations_trainval2017.zip", members), ("val2017.zip", photos)):
        with zipfile.ZipFile(root / name, "w") as file:
            for member, data_ in content.items():
                file.writestr(member, data_)
    return data.replace(data.TASKS["coco_instance"], vocabulary=kinds)


SQUARE = [[1, 1, 5, 1, 5, 4, 1, 4]]
TURNED = rle_encode(np.pad(np.ones((2, 3), bool), ((2, 8), (1, 6))))  # of 12 x 10 pixels, not 10 x 12


@pytest.mark.parametrize(
    "outline,word",
    [
        ({"size": [12, 10], "counts": [30, 20, 70]}, "RLE of size [12, 10], its image has [10, 12]; "),
        ({"size": [12, 10], "counts": TURNED["counts"]}, "RLE of size [12, 10], its image has [10, 12]; "),
        ({"size": [5, 6], "counts": [10, 20]}, "RLE of size [5, 6], its image has [10, 12]; "),
        ({"size": 120, "counts": [30, 20, 70]}, "RLE of size 120, its image has [10, 12]; "),
        ({"size": [10, 12], "counts": TURNED["counts"][:-1]}, "RLE"),
    ],
)
def test_rle_of_another_size_is_refused(tmp_path, outline, word):
    """A mask of as many pixels would be read in other columns, without a sign of it."""
    task = two_pictures(tmp_path, [{"segmentation": SQUARE}, {"segmentation": outline}])
    where = f"{tmp_path}/{INSTANCES}: image id 3, number 2 of its annotations: "
    problems = data.check(tmp_path, task, "val")
    assert len(problems) == 1 and problems[0].startswith(where + word) and LINE.match(problems[0]), problems
    error_of(lambda: SegmentDataset(tmp_path, task, "val"), where)


@pytest.mark.parametrize("size", [None, ["10", "12"]])
def test_rle_may_leave_its_size_out(tmp_path, size):
    counts = rle_encode(np.pad(np.ones((2, 3), bool), ((1, 7), (2, 7))))["counts"]
    notes = [{"segmentation": {"counts": counts}},
             {"segmentation": {"counts": [21, 2, 8, 2, 8, 2, 77], "size": size}}]
    task = two_pictures(tmp_path, [{"segmentation": SQUARE, "iscrowd": 1}, *notes])
    _, first, second = SegmentDataset(tmp_path, task, "val")[0].target.masks()
    assert torch.equal(first, second) and first.sum() == 6


@pytest.mark.parametrize("name", ["lost+found", "@eaDir", ".Trashes"])
def test_folders_of_the_system_need_no_rights(open_folder, name):
    (open_folder / "images" / name).mkdir(parents=True)
    (open_folder / "images" / "a.png").write_bytes(b"")
    with closed(open_folder / "images" / name, 0):
        assert data.FolderReader(open_folder / "images").names.tolist() == [b"a.png"]


def test_number_of_an_annotation_behind_a_crowd(tmp_path):
    """Training leaves crowds out; the line still counts them."""
    notes = [{"segmentation": SQUARE, "iscrowd": 1}, {"segmentation": [[1, 1, 2, 2]]}]
    source = SegmentDataset(tmp_path, two_pictures(tmp_path, notes), "val").source
    for crowd in (True, False):
        error_of(lambda crowd=crowd: source.target(0, crowd), "image id 3, number 2 of its annotations: ")


@contextlib.contextmanager
def closed(path, mode):
    """`path` with other rights, for a user whom they bind: root is nobody for a while."""
    root, before = os.geteuid() == 0, path.stat().st_mode
    path.chmod(mode)
    try:
        if root:
            os.seteuid(65534)
        yield
    except PermissionError as error:
        raise AssertionError(f"{error}: not a line of ours") from error
    finally:
        if root:
            os.seteuid(0)
        path.chmod(before)


@pytest.fixture
def open_folder():
    """A folder that everyone may read; pytest's own is closed to others."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.parametrize("mode", [0o000, 0o311, 0o644])
@pytest.mark.parametrize("part", ["", "images", "images/val", "val2017.zip", "classes.txt", "one.tar"])
def test_what_may_not_be_read_is_not_missing(open_folder, part, mode):
    for name in ("images/val", "masks/val"):
        (open_folder / name).mkdir(parents=True)
    own(open_folder, encode(np.zeros((4, 4), np.uint8)))
    path = open_folder / part
    if path.suffix in (".zip", ".tar"):
        path.write_bytes(b"PK\5\6" + bytes(18) if path.suffix == ".zip" else bytes(10240))
    if path.suffix and mode != 0:
        pytest.skip("the same for a file")
    words = "cannot be read (permission denied); "
    assert data.check(open_folder, "auto", "val", decode=True) == []
    with closed(path, mode):
        if path.suffix in (".zip", ".tar"):
            error_of(lambda: ZipReader(path), f"{path}: {words}")
            error_of(lambda: FolderReader(open_folder).read(part), f"{path}: {words}")
            return
        if part in ("", "images") and mode == 0o311:
            return  # it may be gone through, which is enough
        for work in (data.detect, lambda root: SegmentDataset(root, "auto", "val")[0]):
            if work is not data.detect or part in ("", "classes.txt"):
                error_of(lambda work=work: work(open_folder), str(path), words)
        (line,) = data.check(open_folder, "auto", "val", decode=True)
        assert line.startswith(str(path)) and words in line and LINE.match(line), line


def test_root_behind_a_closed_folder(open_folder):
    (open_folder / "a" / "b").mkdir(parents=True)
    with closed(open_folder / "a", 0o000):
        for work in (data.detect, lambda root: data.mount(root, ["images"])):
            error_of(lambda work=work: work(open_folder / "a" / "b"), f"{open_folder}/a/b: cannot be read ")


def spoil(path, member, change):
    def apply(content):
        table = json.loads(content)
        change(table)
        return json.dumps(table).encode()

    edit(path, {member: apply})


@pytest.mark.parametrize(
    "kind,change,key",
    [
        ("panoptic", lambda t: t.pop("categories"), "categories"),
        ("panoptic", lambda t: t["images"][1].pop("height"), "height"),
        ("panoptic", lambda t: t["annotations"][1].pop("segments_info"), "segments_info"),
        ("panoptic", lambda t: t["annotations"][0]["segments_info"][0].pop("area"), "area"),
        ("instances", lambda t: t.pop("images"), "images"),
        ("instances", lambda t: t["categories"][0].pop("name"), "name"),
        ("instances", lambda t: t["annotations"][0].pop("segmentation"), "segmentation"),
        ("instances", lambda t: t["annotations"][0]["segmentation"].pop("counts"), "counts"),
    ],
)
def test_json_without_a_key(root, kind, change, key):
    archive = PANOPTIC if kind == "panoptic" else INSTANCES.split("!")[0]
    spoil(root / archive, f"annotations/{kind}_val2017.json", change)
    task = data.TASKS["shapes"] if kind == "panoptic" else data.replace(data.TASKS["shapes"], kind="instance",
                                                                        layout="coco_instance")
    where = f"{root / archive}!annotations/{kind}_val2017.json: "
    text = error_of(lambda: SegmentDataset(root, task, "val"), where, f"key '{key}'", "categories (id, name)")
    assert "Error" not in text and ("segments_info" if kind == "panoptic" else "segmentation") in text


@pytest.mark.parametrize("kind", ["panoptic", "instances"])
@pytest.mark.parametrize("hw", [(10**9, 64), (10**12, 10**12), (0, 64), (64, -1)])
def test_size_that_no_picture_has(tmp_path, kind, hw):
    """It ended in "Unable to allocate 59.6 GiB", without a file, or in numpy's words."""
    images = [{"id": 7, "file_name": "a.png", "height": hw[0], "width": hw[1]}]
    (tmp_path / "annotations").mkdir()
    table = {"images": images, "categories": [{"id": 1, "name": "cat"}], "annotations": []}
    (tmp_path / f"annotations/{kind}_val.json").write_text(json.dumps(table))
    problems = data.coco_table(tmp_path, kind, "val")[0]["problems"].tolist()
    assert any(b"_val.json: image id 7 has height, width [" in line and b"; fix" in line for line in problems)


def test_number_too_large_for_an_id(root):
    edit_json(root, "val", lambda table: table["images"][0].update(id=10**30))
    error_of(lambda: SegmentDataset(root, "shapes", "val"), JSON.format("val"), "too large")


def test_instances_without_metrics_beside_data(tmp_path):
    """data.py is there to be copied; the line says what else instances need, before anything is read."""
    for name in ("data.py", "vocab.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "set").mkdir()
    two_pictures(tmp_path / "set", [{"segmentation": {"size": [10, 12], "counts": [30, 20, 70]}}])
    for known in (False, True):
        if known:  # the arrays are there from before
            data.check(tmp_path / "set", "auto", "val")
        done = subprocess.run([sys.executable, "data.py", "set", "--split", "val"], cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        line = done.stderr.removeprefix("error: ").strip()
        assert LINE.match(line) and line.startswith(f"{tmp_path}/data.py: ") and "metrics.py" in line, line
    data.write_shapes(tmp_path / "world", vocab.SHAPES, 1, 2)  # panoptic, so it needs none
    done = subprocess.run([sys.executable, "data.py", "world", "--out", "world.png"], cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "world.png").exists()
    shutil.copy(ROOT / "metrics.py", tmp_path)
    done = subprocess.run([sys.executable, "data.py", "set", "--split", "val"], cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "data_check.png").exists()


@pytest.mark.parametrize(
    "words,said",
    [
        ("--taks auto", "unrecognized arguments: --taks auto"),
        ("--split tset", "--split tset: unknown"),
        ("--split val,", "--split val,: unknown"),
        ("--task coco", "--task coco: unknown"),
        ("--out nowhere/x.png", "--out nowhere/x.png: "),
        ("--out x.xyz", "--out x.xyz: "),
        ("--out x.psd", "--out x.psd: "),  # Pillow reads it only
        ("--out x", "--out x: "),
        ("--out .", "--out .: "),
        ("--decode=3", "--decode"),
        (None, "required: path"),
    ],
)
def test_wrong_arguments_end_in_a_line_before_the_work(root, words, said, capsys, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setattr(data, "check", lambda *a: pytest.fail("the work began"))
    with pytest.raises(SystemExit) as caught:
        data.command(data.main, [str(root), *words.split()] if words else [])
    text = capsys.readouterr()
    (line,) = text.err.splitlines()
    assert caught.value.code == 1 and line.startswith("error: ") and said in line and "; " in line, line
    assert text.out == ""


def test_debug_shows_where(tmp_path):
    with pytest.raises(FileNotFoundError, match="not found"):
        data.command(data.main, [str(tmp_path / "nowhere"), "--debug"])


def test_top_folder_of_another_alphabet(tmp_path):
    """A zip's top folder may be named in letters of several bytes."""
    own(tmp_path / "data", encode(np.zeros((4, 4), np.uint8)))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for path in (tmp_path / "data").rglob("*.*"):
            file.write(path, f"\u732b \u00e9/{path.relative_to(tmp_path / 'data')}")
    assert data.check(tmp_path / "x.zip", "auto", "val", decode=True) == []
