"""Reading, augmentation and batches, on data made here; real samples are used where present."""

# SPDX-License-Identifier: MIT
import colorsys
import contextlib
import gc
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import resource
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, JpegImagePlugin

import bench
import data
import vocab
from data import TASKS, Augment, FolderReader, SegmentDataset, Target, ZipReader
from metrics import rle_encode

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A small procedural COCO: 40 training images, 12 for validation."""
    root = tmp_path_factory.mktemp("shapes")
    data.write_shapes(root, vocab.SHAPES, 40, 12, seed=3)
    return root


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def training(root, **options):
    return SegmentDataset(root, "shapes", "train", Augment(64, (0.5, 2.0)), **options)


def png(array, mode=None, **options):
    file = io.BytesIO()
    Image.fromarray(np.asarray(array, np.uint8), mode).save(file, "PNG", **options)
    return file.getvalue()


def write_zip(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def same(a: data.Batch, b: data.Batch):
    fields = ("ids", "layer", "value", "labels", "crowd", "area")
    return (
        a.names == b.names
        and torch.equal(a.images, b.images)
        and all(
            torch.equal(getattr(x, f), getattr(y, f))
            for x, y in zip(a.targets, b.targets, strict=True)
            for f in fields
        )
    )


# ----------------------------------------------------------------------------------------------------
# Readers

MEMBERS = {
    "a/b.txt": b"hello" * 1000,
    "a/empty": b"",
    "\u00fc/\u732b.bin": bytes(range(256)) * 40,
    "z": b"\0" * 100_000,
}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("kind", ["plain", "prefixed", "zip64", "shifted"])
def test_zip_reader_gives_the_bytes_of_zipfile(tmp_path, monkeypatch, compression, kind):
    if kind == "zip64":
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    path = write_zip(tmp_path / "x.zip", MEMBERS, compression)
    if kind == "prefixed":  # offsets as if nothing stood before the zip
        path.write_bytes(b"#!/bin/sh\nexit 0\n" + path.read_bytes())
    if kind == "shifted":  # offsets count what stands before
        path.write_bytes(b"head")
        with zipfile.ZipFile(path, "a", compression) as file:
            for name, content in MEMBERS.items():
                file.writestr(name, content)
    reader = ZipReader(path)
    assert sorted(os.fsdecode(n) for n in reader.names) == sorted(MEMBERS)
    for name, content in MEMBERS.items():
        assert reader.read(name) == content
        assert reader.read(int(reader.find([name])[0])) == content
    assert reader.find(["a", "a/b", "zz", ""]).tolist() == [-1] * 4


def test_zip_reader_hides_junk_and_never_extracts(tmp_path):
    names = ["__MACOSX/._x.jpg", "d/._y.jpg", "d/", "../evil.txt", "/abs.txt", "ok.txt"]
    reader = ZipReader(write_zip(tmp_path / "x.zip", dict.fromkeys(names, b"1")))
    assert sorted(os.fsdecode(n) for n in reader.names) == ["../evil.txt", "/abs.txt", "ok.txt"]
    reader.read("../evil.txt")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["x.zip"]
    assert reader.names.nbytes < 100


@pytest.mark.parametrize("names", [["a/p/x/1", "p/x/2"], ["b/p/x/1", "a/b/p/x/2", "q"], ["p/x/1", "a/p/x/2"]])
def test_folder_of_a_zip_is_the_one_nearest_to_its_top(tmp_path, names):
    """An attic with old pictures must not take the place of the data."""
    reader = ZipReader(write_zip(tmp_path / "x.zip", dict.fromkeys(names, b"1")))
    best = min((n for n in names if "p/x/" in n), key=lambda n: n.count("/"))
    assert reader.folder("p/x") == best[:-1] and reader.folder("p/y") == ""


def without_utf8_flag(raw):
    """The bytes of a zip, its first member without flags."""
    for signature, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        place = raw.index(signature) + at
        raw = raw[:place] + b"\0\0" + raw[place + 2 :]
    return raw


def test_zip_reader_decodes_utf8_names_without_their_flag(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"\u732b.txt": b"1"})
    path.write_bytes(without_utf8_flag(path.read_bytes()))
    assert ZipReader(path).read("\u732b.txt") == b"1"


@pytest.mark.parametrize("system,name", [(0, "d/images/a.png"), (3, "d\\images\\a.png")])
def test_zip_of_windows_has_folders(tmp_path, system, name):
    """.NET wrote backslashes between folders; in a zip of Unix they are part of a name."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        info = zipfile.ZipInfo("d/images/a.png")
        info.filename, info.create_system = "d\\images\\a.png", system
        archive.writestr(info, b"1")
    reader = ZipReader(tmp_path / "x.zip")
    assert reader.read(name) == b"1" and len(reader.names) == 1


def test_nested_zip_whose_name_lacks_its_utf8_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    inner = io.BytesIO()
    write_zip(inner, MEMBERS)
    path = write_zip(tmp_path / "o.zip", {"\u732b.zip": inner.getvalue()})
    path.write_bytes(without_utf8_flag(path.read_bytes()))
    assert ZipReader(path).nested("\u732b.zip").read("z") == MEMBERS["z"]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_nested_zip_in_place_or_unpacked_once(tmp_path, monkeypatch, compression):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    inner = io.BytesIO()
    write_zip(inner, MEMBERS)
    outer = write_zip(tmp_path / "o.zip", {"pad": b"x" * 99, "d/in.zip": inner.getvalue()}, compression)
    for _ in range(2):
        nested = ZipReader(outer).nested("d/in.zip")
        assert {n: nested.read(n) for n in MEMBERS} == MEMBERS
    cached = list((tmp_path / "cache").rglob("*.*"))
    assert len(cached) == (compression == zipfile.ZIP_DEFLATED), cached
    with monkeypatch.context() as patch:  # what is there waits for nobody
        patch.setattr(data.fcntl, "flock", lambda *rest: pytest.fail("waits for a lock"))
        ZipReader(outer).nested("d/in.zip")
    os.utime(outer, (1, 1))  # another archive now, so another copy
    ZipReader(outer).nested("d/in.zip")
    assert len(list((tmp_path / "cache").rglob("*.*"))) == 2 * len(cached)


def test_nested_zip_is_unpacked_by_one_process(tmp_path, monkeypatch):
    """Two that come at the same time make one copy, which the second waits for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    inner = io.BytesIO()
    write_zip(inner, MEMBERS)
    outer = write_zip(tmp_path / "o.zip", {"d/in.zip": inner.getvalue()})
    context, copy = multiprocessing.get_context("fork"), data.shutil.copyfileobj
    made, both = context.Value("i"), context.Barrier(2)

    def slow(*rest):
        with made:
            made.value += 1
        time.sleep(0.5)
        copy(*rest)

    def work():
        reader = ZipReader(outer)
        both.wait(20)
        nested = reader.nested("d/in.zip")
        os._exit(0 if {name: nested.read(name) for name in MEMBERS} == MEMBERS else 1)

    monkeypatch.setattr(data.shutil, "copyfileobj", slow)
    processes = [context.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0] and made.value == 1


def _read_all(reader, queue):
    for _ in range(50):
        for name, content in MEMBERS.items():
            if reader.read(name) != content:
                queue.put("wrong")
                return
    queue.put("right")


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_zip_reader_is_shared_by_processes(tmp_path, start):
    reader = ZipReader(write_zip(tmp_path / "x.zip", MEMBERS))
    reader.read("z")  # its descriptor is open before the fork
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    workers = [context.Process(target=_read_all, args=(reader, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    _read_all(reader, queue)
    assert [queue.get(timeout=60) for _ in range(3)] == ["right"] * 3
    for worker in workers:
        worker.join()


def test_zip_reader_is_small_and_picklable(tmp_path):
    path = tmp_path / "many.zip"
    write_zip(path, {f"train2017/{n:012}.jpg": b"" for n in range(3000)}, zipfile.ZIP_STORED)
    reader = ZipReader(path)
    size = len(pickle.dumps(reader))
    assert size < 3000 * 80, size
    again = pickle.loads(pickle.dumps(reader))
    assert again.read("train2017/000000000007.jpg") == b""


def test_folder_and_tar_read_like_a_zip(tmp_path):
    for name, content in MEMBERS.items():
        path = tmp_path / "f" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with tarfile.open(tmp_path / "f.tar", "w") as tar:
        tar.add(tmp_path / "f", arcname=".")
    names = sorted(MEMBERS)
    for reader in (FolderReader(tmp_path / "f"), ZipReader(tmp_path / "f.tar")):
        assert [os.fsdecode(n) for n in reader.names] == sorted(names, key=os.fsencode)
        assert {n: reader.read(n) for n in names} == MEMBERS
        assert pickle.loads(pickle.dumps(reader)).read("z") == MEMBERS["z"]


def test_cache_falls_back_to_a_private_temporary_folder(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    path = data.cache_dir()
    assert path.is_dir() and os.access(path, os.W_OK) and blocked not in path.parents
    assert path.stat().st_mode & 0o077 == 0


def test_atomic_write_leaves_nothing_behind(tmp_path):
    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        data.write_atomically(tmp_path / "x", fail)
    assert list(tmp_path.iterdir()) == []


def test_asking_whether_a_file_can_be_written_changes_nothing(tmp_path):
    old, new, link = (tmp_path / name for name in ("old", "new", "link"))
    old.write_bytes(b"kept")
    os.utime(old, (5, 5))
    link.symlink_to(new)  # nothing is there, but it could be
    for path in (old, new, str(new), link):
        data.writable(path)
    assert old.read_bytes() == b"kept" and old.stat().st_mtime == 5
    assert link.is_symlink() and sorted(tmp_path.iterdir()) == [link, old]
    for place in (tmp_path, tmp_path / "no" / "x", old / "x", "/proc/x.json"):  # in the words of open()
        with pytest.raises(OSError) as wanted:
            open(place, "ab").close()
        with pytest.raises(type(wanted.value)) as found:
            data.writable(place)
        assert str(found.value) == str(wanted.value)
    assert sorted(tmp_path.iterdir()) == [link, old]


# ----------------------------------------------------------------------------------------------------
# Target


def test_target_keeps_overlapping_masks_apart():
    rng = np.random.default_rng(0)
    masks = rng.random((7, 20, 30)) > 0.7
    masks[3] = False
    target = Target.from_masks(masks, np.arange(7), crowd=np.arange(7) == 2)
    assert target.ids.dtype == torch.uint8 and target.ids.shape[1:] == (20, 30) and target.ids.shape[0] > 1
    assert np.array_equal(target.masks().numpy(), masks)
    assert target.labels.tolist() == list(range(7)) and target.crowd.tolist().index(True) == 2
    assert target.area.tolist() == masks.sum((1, 2)).tolist()
    moved = target.to("meta")
    assert all(
        getattr(moved, f).device.type == "meta" for f in ("ids", "layer", "value", "labels", "crowd", "area")
    )


def test_target_puts_disjoint_masks_in_one_layer_of_255():
    cells = np.arange(400).reshape(20, 20)
    masks = cells == np.arange(300)[:, None, None]
    target = Target.from_masks(masks, np.zeros(300))
    assert target.ids.shape == (2, 20, 20) and target.value.max() == 255
    assert np.array_equal(target.masks().numpy(), masks)


def test_target_from_masks_one_by_one():
    masks = np.random.default_rng(1).random((9, 20, 30)) > 0.8
    wanted, target = (Target.from_masks(m, np.arange(9), shape=(20, 30)) for m in (masks, iter(masks)))
    for field in data.fields(Target):
        assert torch.equal(getattr(target, field.name), getattr(wanted, field.name)), field.name


def test_many_instances_in_a_large_picture_take_little_memory(tmp_path):
    """A stack of 40 masks would hold 160 MB."""
    boxes = [[40 * k, 10, 40 * k + 70, 10, 40 * k + 70, 60, 40 * k, 60] for k in range(40)]
    notes = [{"image_id": 1, "category_id": 1, "area": 9, "segmentation": [box]} for box in boxes]
    table = {"images": [{"id": 1, "file_name": "a.jpg", "height": 2000, "width": 2000}],
             "categories": [{"id": 1, "name": "x"}], "annotations": notes}
    for name, content in (("annotations/instances_val2017.json", json.dumps(table).encode()),
                          ("val2017/a.jpg", b"")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    source = SegmentDataset(tmp_path, "auto", "val").source
    tracemalloc.start()
    target = source.target(0, False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(target.labels) == 40 and target.ids.shape == (2, 2000, 2000) and peak < 60e6, peak
    mask = target.masks()[3]  # (H, W)
    assert mask[10:60, 120:190].all() and mask.sum() == 50 * 70


def test_target_without_segments():
    target = Target.from_masks(np.zeros((0, 4, 5), bool), [])
    assert target.masks().shape == (0, 4, 5) and target.ids.shape == (1, 4, 5) and not target.ids.any()


# ----------------------------------------------------------------------------------------------------
# Augmentation


def scene(height, width, count=9, seed=0):
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize((width, height))
    picture = Image.fromarray(
        np.clip(np.asarray(blocks) + rng.normal(0, 20, (height, width, 1)), 0, 255).astype(np.uint8)
    )
    ids = np.asarray(
        Image.fromarray(rng.integers(0, count + 1, (5, 6), dtype=np.uint8)).resize((width, height), 0)
    )
    masks = np.stack([ids == k for k in range(1, count + 1)])
    return picture, Target.from_masks(masks, np.arange(count))


def slow_augment(window, picture, masks, size):
    """What torchvision-style pipelines do: flip, resize everything, pad, crop, mask by mask."""

    def place(image):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if window.flip else image
        resample = Image.Resampling.BILINEAR if image.mode == "RGB" else Image.Resampling.NEAREST
        scaled = image.resize((window.width, window.height), resample)
        canvas = Image.new(image.mode, (max(size, scaled.width), max(size, scaled.height)))
        canvas.paste(scaled, (0, 0))
        return np.asarray(canvas.crop((window.left, window.top, window.left + size, window.top + size)))

    return place(picture), np.stack([place(Image.fromarray(m.astype(np.uint8))) > 0 for m in masks])


def augmented(augment, picture, target, rng):
    """Uint8 (3,S,S) and the Target of a crop, drawn as the data set does it."""
    window, target = augment.place(target, rng)
    return augment.cut_picture(window, picture, rng), target


@pytest.mark.parametrize("height,width", [(48, 64), (64, 48), (100, 37), (333, 500)])
def test_augment_equals_resizing_everything_mask_by_mask(height, width):
    picture, target = scene(height, width)
    augment, rng = Augment(64), np.random.default_rng(1)
    seen, checked = set(), []
    for _ in range(30):
        window = augment.draw(height, width, rng)
        image = augment.cut_picture(window, picture)
        ids, kept = augment.cut_ids(window, target)
        wanted, masks = slow_augment(window, picture, target.masks().numpy(), 64)
        assert image.shape == (3, 64, 64) and image.dtype == np.uint8
        difference = np.abs(
            image.transpose(1, 2, 0).astype(int) - wanted
        )  # Pillow's box is float32: other ties
        assert difference.max() <= 2 and difference.mean() < 0.3
        got = ids[target.layer.numpy()] == target.value.numpy()[:, None, None]
        # where a centre lies exactly between two pixels, Pillow's running sum may round either way
        y, x = np.arange(64) + window.top, np.arange(64) + window.left
        sure = ((2 * y + 1) * height % (2 * window.height) > 0)[:, None] & (
            (2 * x + 1) * width % (2 * window.width) > 0
        )
        assert np.array_equal(got[:, sure], masks[:, sure])
        checked.append(sure.mean())
        assert kept.tolist() == masks.any((1, 2)).tolist()
        seen.add((window.flip, window.width < 64, window.height < 64))
    assert {flip for flip, _, _ in seen} == {True, False} and len(seen) > 2  # the cases really occurred
    assert np.mean(checked) > 0.8


def test_augment_draws_the_published_distribution():
    augment, rng = Augment(64, (0.5, 2.0)), np.random.default_rng(0)
    windows = [augment.draw(48, 96, rng) for _ in range(4000)]
    ratios = np.array([w.width / 96 for w in windows])
    assert 0.32 < ratios.min() < 0.36 and 1.30 < ratios.max() <= 64 / 96 * 2  # r * min(S/h, S/w)
    assert (
        abs(np.mean(ratios) - 1.25 * 64 / 96) < 0.02 and abs(np.mean([w.flip for w in windows]) - 0.5) < 0.03
    )
    assert all(w.left + 64 <= max(64, w.width) and w.top + 64 <= max(64, w.height) for w in windows)
    lefts = [w.left for w in windows if w.width >= 120]
    assert min(lefts) <= 1 and max(lefts) >= 55


def test_augment_keeps_only_segments_in_the_crop():
    picture, target = scene(300, 300)
    image, cut = augmented(Augment(32, (4.0, 6.0)), picture, target, np.random.default_rng(0))
    assert 0 < len(cut.labels) < len(target.labels)
    assert image.shape == (3, 32, 32) and image.dtype == np.uint8 and cut.ids.shape[1:] == (32, 32)
    assert cut.masks().flatten(1).any(1).all()
    assert cut.area.tolist() == target.area[cut.labels].tolist()  # areas are the annotation's, not the crop's


def test_augment_draws_again_when_nothing_is_left_but_at_most_ten_times(monkeypatch):
    masks = np.zeros((1, 200, 200), bool)
    masks[0, :20, :20] = True
    draws, draw = [], Augment.draw
    monkeypatch.setattr(Augment, "draw", lambda *a: draws.append(1) or draw(*a))
    tiny, empty = Target.from_masks(masks, [3]), Target.from_masks(masks[:0], [])
    picture, augment = Image.new("RGB", (200, 200)), Augment(32, (6.0, 6.0))
    found = [len(augmented(augment, picture, tiny, np.random.default_rng(s))[1].labels) for s in range(60)]
    once = np.mean(
        [augment.cut_ids(draw(augment, 200, 200, np.random.default_rng(s)), tiny)[1].any() for s in range(60)]
    )
    assert once < 0.3 and np.mean(found) > 2 * once
    draws.clear()
    image, target = augmented(augment, picture, empty, np.random.default_rng(0))
    assert len(draws) == 10 and len(target.labels) == 0 and image.shape == (3, 32, 32)


@pytest.mark.parametrize("height,width", [(1, 1), (1, 1500), (1500, 1)])
def test_augment_takes_pictures_of_one_pixel(height, width):
    target = Target.from_masks(np.ones((1, height, width), bool), [0])
    for seed in range(20):
        picture = Image.new("RGB", (width, height), "white")
        image, cut = augmented(Augment(64), picture, target, np.random.default_rng(seed))
        assert image.shape == (3, 64, 64) and len(cut.labels) == 1


def test_jitter_is_off_by_default_and_bounded():
    picture, target = scene(40, 40)

    def crop(seed, jitter):
        return augmented(Augment(40, (1, 1), jitter), picture, target, np.random.default_rng(seed))[0]

    plain = [crop(s, False) for s in range(12)]
    assert all(np.array_equal(p, plain[0]) or np.array_equal(p, plain[0][..., ::-1]) for p in plain)
    assert len({crop(s, True).tobytes() for s in range(40)}) > 25
    grey = Image.new("RGB", (8, 8), (100, 100, 100))

    def jitter(picture, seed):
        """Colour (3,) of the first pixel."""
        pixels = np.asarray(picture).transpose(2, 0, 1).copy()
        return data.jitter(pixels, data.draw_jitter(picture, np.random.default_rng(seed)))[:, 0, 0]

    values = np.array([jitter(grey, s) for s in range(2000)])
    # grey has no hue or saturation and contrast leaves its mean: only brightness moves it, by 32/255
    assert (np.ptp(values, axis=1) == 0).all() and 87 <= values.min() < 90 and 110 < values.max() <= 113
    assert 0.48 < (values[:, 0] == 100).mean() < 0.6  # half, and what rounds to 100
    red = np.array([jitter(Image.new("RGB", (8, 8), (200, 50, 50)), s) for s in range(300)]).astype(int)
    assert (red[:, 0] > red[:, 1:].max(1)).all() and (
        red[:, 1] != red[:, 2]
    ).mean() > 0.3  # hue turns, 18 degrees at most


def test_jitter_of_a_part_equals_float_jitter_of_the_whole_picture():
    picture, _ = scene(200, 260)
    box, kinds, worst = (40, 30, 200, 150), set(), [0, 0]
    for seed in range(60):
        steps = data.draw_jitter(picture, np.random.default_rng(seed))
        kinds.add(tuple(kind for kind, _, _ in steps))
        whole = bench.float_jitter(torch.from_numpy(np.array(picture)).permute(2, 0, 1), steps)  # (3, H, W)
        wanted = whole[:, box[1] : box[3], box[0] : box[2]].numpy().astype(int)
        part = np.asarray(picture.crop(box)).transpose(2, 0, 1).copy()
        error = np.abs(data.jitter(part, steps) - wanted)
        turned = any(kind == "hue" for kind, _, _ in steps)
        worst[turned] = max(worst[turned], error.mean())
    assert worst[0] < 2 and worst[1] < 2.5, worst
    assert len(kinds) > 12 and any(k[:2] == ("contrast", "saturation") for k in kinds)
    assert any(k[-1:] == ("contrast",) and len(k) > 2 for k in kinds)


def test_hue_turns_like_hsv():
    rng = np.random.default_rng(0)
    colours = np.concatenate([rng.integers(0, 256, (500, 3)), rng.choice((0, 128, 255), (200, 3))])
    for sixths in (19 / 64, -19 / 64, 6 / 64, 0.0):
        turned = data.jitter(colours.T[:, None].astype(np.uint8).copy(), [("hue", sixths, 0)])[:, 0].T
        for colour, got in zip(colours / 255, turned, strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*colour)
            wanted = np.array(colorsys.hsv_to_rgb((hue + sixths / 6) % 1, saturation, value)) * 255
            assert np.abs(got - wanted).max() <= 1, (sixths, colour, got, wanted)


def noisy_jpeg(height, width, **options):
    file = io.BytesIO()
    scene(height, width)[0].save(file, "JPEG", quality=95, **options)
    return file.getvalue()


@pytest.mark.parametrize("height,width", [(427, 640), (333, 500), (301, 203)])
def test_smaller_decoding_is_close_to_the_full_path(height, width):
    raw, seen = noisy_jpeg(height, width), set()
    full, augment, rng = data.open_picture(raw, "z!a"), Augment(300, (0.1, 1.2)), np.random.default_rng(0)
    for _ in range(40):
        window = augment.draw(height, width, rng)
        small = data.open_picture(raw, "z!a", window.shrink)
        assert small.size == (-(-width // window.shrink), -(-height // window.shrink))
        # nothing is enlarged that would not be anyway
        assert window.shrink == 1 or (small.width >= window.width and small.height >= window.height)
        seen.add(window.shrink)
        error = augment.cut_picture(window, small).astype(int) - augment.cut_picture(window, full)
        assert np.abs(error).mean() < 2.5, (window, np.abs(error).mean())
        # shifted by half a pixel or stretched it would be farther off in one direction
        assert abs(error.mean()) < 0.5
    assert seen >= {1, 2, 4}


def test_smaller_decoding_keeps_size_checks_exif_and_faults():
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = noisy_jpeg(96, 161, exif=exif.tobytes())
    flat = data.oriented(data.open_picture(raw, "z!a", 4), (96, 161), "z!a")
    upright = data.oriented(data.open_picture(raw, "z!a", 4), (161, 96), "z!a")
    assert flat.size == (161, 96) and upright.size == (96, 161)  # turned ones are decoded whole
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(flat), -1))
    for wrong in ((96, 160), (96, 164), (24, 41)):  # the sizes 160 and 164 shrink to the same 41 or 40
        with pytest.raises(ValueError, match="^z!a: picture 161x96, annotation "):
            data.oriented(data.open_picture(raw, "z!a", 4), wrong, "z!a")
    for shrink in (1, 2, 8):
        for cut in (raw[: len(raw) // 2], raw[: -len(raw) // 8]):
            with pytest.raises(ValueError, match="^z!a: cannot be decoded"):
                data.open_picture(cut, "z!a", shrink)


def test_only_training_decodes_smaller(tmp_path, monkeypatch):
    one_image_coco(tmp_path, np.ones((256, 256), int))
    one_image_coco(tmp_path, np.ones((256, 256), int), split="train")
    for split in ("train", "val"):
        (tmp_path / f"{split}2017" / "a.png").write_bytes(noisy_jpeg(256, 256))  # Pillow goes by the content
    asked, draft = [], JpegImagePlugin.JpegImageFile.draft
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", lambda *a: asked.append(1) or draft(*a))
    SegmentDataset(tmp_path, "coco_panoptic", "train", Augment(64, (0.5, 0.5)))[0, 0]
    assert asked == [1]
    sample = SegmentDataset(tmp_path, "coco_panoptic", "val")[0]
    assert asked == [1] and sample.image.shape == (3, 256, 256)


@pytest.mark.parametrize("size,scaled", [(427, 611), (640, 1280), (333, 97), (500, 500), (7, 200)])
def test_cut_resamples_only_the_window(size, scaled):
    """Pixels beyond the cut never matter, and the cut is not much larger than the window."""
    picture, target = scene(size, size)
    augment = Augment(96)
    taken = []
    for top in range(0, max(1, scaled - 96), 7):
        window = data.Window(scaled, scaled, top, 0, False, (size, size), 1)
        start, stop, skipped = data._cut(top, min(96, scaled), size, scaled)
        assert 0 <= start <= top * size / scaled and abs((top - skipped) * size / scaled - start) < 1 / 64
        lines = np.asarray(picture).copy()
        lines[:start], lines[stop:] = 0, 255
        assert np.array_equal(
            augment.cut_picture(window, picture), augment.cut_picture(window, Image.fromarray(lines))
        )
        taken.append((stop - start) * scaled / size)
    assert scaled <= 200 or np.mean(taken) < 96 + 64 + 16


@pytest.mark.slow
def test_hundred_megapixels_in_bounded_memory(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    picture = data.open_picture(png(np.zeros((10000, 10000))), "x!y")
    target = Target.from_masks(np.ones((1, 10000, 10000), bool), [0])
    picture = data.oriented(picture, (10000, 10000), "x!y")
    augmented(Augment(64), picture, target, np.random.default_rng(0))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_800_000  # KiB


# ----------------------------------------------------------------------------------------------------
# Data set: the procedural world as a COCO, every pixel against zipfile + json


def raw_coco(root, split):
    with zipfile.ZipFile(root / "panoptic_annotations_trainval2017.zip") as outer:
        table = json.loads(outer.read(f"annotations/panoptic_{split}2017.json"))
        pngs = zipfile.ZipFile(io.BytesIO(outer.read(f"annotations/panoptic_{split}2017.zip")))
    photos = zipfile.ZipFile(root / f"{split}2017.zip")
    for image, note in zip(table["images"], table["annotations"], strict=True):
        photo = Image.open(photos.open(f"{split}2017/{image['file_name']}")).convert("RGB")
        rgb = np.asarray(Image.open(pngs.open(f"panoptic_{split}2017/{note['file_name']}"))).astype(int)
        yield image, note, np.asarray(photo), rgb @ [1, 256, 65536]


@pytest.mark.parametrize("root", ["shapes", "coco", "coco_official"])
def test_panoptic_evaluation_gives_every_segment_pixel_and_crowd(shapes, root):
    folder = shapes if root == "shapes" else REAL / root
    if not folder.exists():
        pytest.skip("real samples are not here")
    words = vocab.SHAPES if root == "shapes" else vocab.COCO_PANOPTIC
    dataset = SegmentDataset(folder, "auto", "val")
    assert dataset.task.vocabulary == words
    for sample, (image, note, photo, ids) in zip(dataset, raw_coco(folder, "val"), strict=True):
        infos = note["segments_info"]
        assert (sample.name, sample.image_id) == (image["file_name"], image["id"])
        assert np.array_equal(sample.image.permute(1, 2, 0), photo)
        assert np.array_equal(sample.target.masks(), np.stack([ids == s["id"] for s in infos]))
        assert [words.ids[k] for k in sample.target.labels] == [s["category_id"] for s in infos]
        assert sample.target.area.tolist() == [s["area"] for s in infos]
        assert sample.target.crowd.int().tolist() == [s["iscrowd"] for s in infos]


def test_crowds_are_void_in_training(tmp_path):
    data.write_shapes(tmp_path, vocab.SHAPES, 60, 1, seed=0)
    dataset = SegmentDataset(tmp_path, "shapes", "train", Augment(64, (1, 1)))
    crowds = 0
    for index, (_, note, _, ids) in enumerate(raw_coco(tmp_path, "train")):
        target = dataset[0, index].target
        real = [s for s in note["segments_info"] if not s["iscrowd"]]
        crowds += len(note["segments_info"]) - len(real)
        masks = np.stack([ids == s["id"] for s in real])
        assert len(target.labels) == len(real) and not target.crowd.any()
        assert target.masks().sum((1, 2)).tolist() == masks.sum((1, 2)).tolist()
        assert (target.ids > 0).sum() == masks.sum()  # crowd pixels are 0, like void
    assert crowds > 0


def test_items_are_a_function_of_seed_epoch_and_index(shapes):
    dataset, other = training(shapes), training(shapes)
    a, b = dataset[1, 5], other[1, 5]
    assert torch.equal(a.image, b.image) and torch.equal(a.target.ids, b.target.ids) and a.name == b.name
    assert torch.equal(dataset[5].image, dataset[0, 5].image)
    for key in ((0, 5), (2, 5), (1, 5, 1)):
        assert dataset[key].name == a.name and not torch.equal(dataset[key].image, a.image)
    torch.manual_seed(0)
    np.random.seed(0)
    assert torch.equal(dataset[1, 5].image, a.image)


def test_sample_is_small(shapes):
    sample = SegmentDataset(shapes, "shapes", "train", Augment(640))[0, 0]
    assert sample.image.nbytes + sample.target.ids.nbytes <= 1.6 * 2**20


@pytest.mark.parametrize("count", [255, 256, 300])
def test_many_segments(tmp_path, count):
    one_image_coco(tmp_path, np.arange(1, 401).reshape(20, 20).clip(max=count) * 7)
    target = SegmentDataset(tmp_path, "coco_panoptic", "val")[0].target
    assert target.ids.shape[0] == (count + 254) // 255
    wanted = np.arange(1, 401).reshape(20, 20).clip(max=count) == np.arange(1, count + 1)[:, None, None]
    assert np.array_equal(target.masks(), wanted)


def one_image_coco(root, ids, photo=None, split="val", crowd=(), category=1, **info):
    """A COCO of one image with the id map `ids` (H,W)."""
    ids = np.asarray(ids)
    photo = np.zeros((*ids.shape, 3)) if photo is None else photo
    segments = [
        {
            "id": int(i),
            "category_id": category,
            "iscrowd": int(i in crowd),
            "area": int((ids == i).sum()),
            **info,
        }
        for i in np.unique(ids[ids > 0])
    ]
    size = {"height": ids.shape[0], "width": ids.shape[1]}
    words = vocab.COCO_PANOPTIC
    table = {
        "images": [{"id": 7, "file_name": "a.png", **size}],
        "annotations": [{"image_id": 7, "file_name": "a.png", "segments_info": segments}],
        "categories": [
            {"id": i, "name": n, "isthing": int(t)}
            for i, n, t in zip(words.ids, words.names, words.thing, strict=True)
        ],
    }
    rgb = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1)
    for path, content in {
        f"{split}2017/a.png": png(photo),
        f"annotations/panoptic_{split}2017/a.png": png(rgb),
        f"annotations/panoptic_{split}2017.json": json.dumps(table).encode(),
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


@pytest.mark.parametrize("ids,crowd", [([[0, 0]], ()), ([[5, 5]], (5,)), ([[0, 9]], ())])
def test_images_without_real_segments_train(tmp_path, ids, crowd):
    one_image_coco(tmp_path, np.array(ids), split="train", crowd=crowd)
    sample = SegmentDataset(tmp_path, "coco_panoptic", "train", Augment(32))[0, 0]
    assert len(sample.target.labels) == (ids == [[0, 9]]) and not sample.faults
    assert data.collate([sample, sample]).images.shape == (2, 3, 32, 32)


def test_nested_zip_that_is_unpacked_waits_for_nobody(tmp_path, monkeypatch):
    """Another process may hold the archive for the half minute that a JSON in it takes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    inner = io.BytesIO()
    write_zip(inner, MEMBERS)
    outer = write_zip(tmp_path / "o.zip", {"d/in.zip": inner.getvalue()})
    ZipReader(outer).nested("d/in.zip")
    monkeypatch.setattr(data.fcntl, "flock", lambda *_: pytest.fail("it waits"))
    assert ZipReader(outer).nested("d/in.zip").read("a/b.txt") == MEMBERS["a/b.txt"]


@pytest.mark.parametrize("fault", [None, ValueError, KeyError])
def test_json_is_parsed_without_garbage_collection(shapes, tmp_path, monkeypatch, fault):
    """It took a quarter of the first start with COCO: it goes through millions of lists, all in use."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    parse, form = data.PARSERS["panoptic"]
    collections = []

    def parse_panoptic(tree):
        before = [generation["collections"] for generation in gc.get_stats()]
        lists = [[] for _ in range(10**5)]
        collections.extend(now["collections"] - old for now, old in zip(gc.get_stats(), before, strict=True))
        if fault:
            raise fault(len(lists))
        return parse(tree)

    monkeypatch.setitem(data.PARSERS, "panoptic", (parse_panoptic, form))
    assert gc.isenabled()
    threshold = gc.get_threshold()
    with pytest.raises(ValueError) if fault else contextlib.nullcontext():
        SegmentDataset(shapes, "shapes", "val")
    assert collections == [0, 0, 0] and gc.isenabled() and gc.get_threshold() == threshold


def test_json_is_parsed_once(shapes, monkeypatch):
    first = SegmentDataset(shapes, "shapes", "val")[0]
    monkeypatch.setattr(data.json, "loads", lambda text: pytest.fail("parsed again"))
    again = SegmentDataset(shapes, "shapes", "val")
    assert torch.equal(again[0].target.ids, first.target.ids)
    os.utime(shapes / "panoptic_annotations_trainval2017.zip", (5, 5))
    with pytest.raises(pytest.fail.Exception):
        SegmentDataset(shapes, "shapes", "val")


def test_dataset_pickle_leaves_the_arrays_at_home(tmp_path):
    data.write_shapes(tmp_path, vocab.SHAPES, 300, 1)
    dataset = training(tmp_path)
    dataset[0]
    assert len(pickle.dumps(dataset)) < 100_000
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[0, 3].image, dataset[0, 3].image)


def test_class_counts_and_hidden_classes(shapes):
    dataset = training(shapes)
    wanted = np.zeros(8, int)
    images = []
    for _, note, _, _ in raw_coco(shapes, "train"):
        kinds = [s["category_id"] - 1 for s in note["segments_info"] if not s["iscrowd"]]
        np.add.at(wanted, kinds, 1)
        images.append(set(kinds))
    assert dataset.class_counts().tolist() == wanted.tolist()
    hidden = (0, 6)
    void, drop = training(shapes, hidden=hidden), training(shapes, hidden=hidden, policy="drop")
    assert len(void) == 40 and len(drop) == sum(not kinds & set(hidden) for kinds in images) < 40
    labels = {
        int(k) for d in (void, drop) for e in range(2) for i in range(len(d)) for k in d[e, i].target.labels
    }
    assert labels == {1, 2, 3, 4, 5, 7}


# ----------------------------------------------------------------------------------------------------
# Other layouts


def test_instances_equal_pycocotools_on_real_annotations():
    mask_api = pytest.importorskip("pycocotools.mask")
    if not (REAL / "coco").exists():
        pytest.skip("real samples are not here")
    with zipfile.ZipFile(REAL / "coco" / "annotations_trainval2017.zip") as file:
        table = json.loads(file.read("annotations/instances_val2017.json"))
    dataset = SegmentDataset(REAL / "coco", "coco_instance", "val")
    kinds = set()
    for sample, image in zip(dataset, table["images"], strict=True):
        notes = [a for a in table["annotations"] if a["image_id"] == image["id"]]
        assert sample.target.area.tolist() == [a["area"] for a in notes]
        assert [vocab.COCO_INSTANCE.ids[k] for k in sample.target.labels] == [a["category_id"] for a in notes]
        assert sample.target.crowd.int().tolist() == [a["iscrowd"] for a in notes]
        for note, mask in zip(notes, sample.target.masks().numpy(), strict=True):
            rle = note["segmentation"]
            kinds.add(type(rle))
            if isinstance(rle, list):
                rle = mask_api.merge(mask_api.frPyObjects(rle, image["height"], image["width"]))
            elif isinstance(rle["counts"], list):
                rle = mask_api.frPyObjects(rle, image["height"], image["width"])
            assert np.array_equal(mask_api.decode(rle).astype(bool), mask)
    assert kinds == {list, dict}


def test_instances_of_the_world_equal_its_panoptic_things(shapes):
    table = TASKS["shapes"]
    task = data.replace(table, kind="instance", layout="coco_instance")
    for split in ("train", "val"):
        things, whole = SegmentDataset(shapes, task, split), SegmentDataset(shapes, "shapes", split)
        for a, b in zip(things, whole, strict=True):
            rows = torch.tensor(table.vocabulary.thing)[b.target.labels]
            assert torch.equal(a.target.masks(), b.target.masks()[rows])
            assert a.target.labels.tolist() == b.target.labels[rows].tolist()


def test_instance_annotations_of_every_form(tmp_path):
    square = [[1, 1, 5, 1, 5, 4, 1, 4]]
    notes = [
        {"segmentation": square + [[6, 6, 8, 6, 8, 8.25, 6, 8]], "area": 15.5, "iscrowd": 0},
        {"segmentation": {"size": [10, 12], "counts": [30, 20, 70]}, "area": 20, "iscrowd": 1},
        {
            "segmentation": {
                "size": [10, 12],
                "counts": rle_encode(np.repeat([False, True, False], [30, 20, 70]).reshape(12, 10).T)[
                    "counts"
                ],
            },
            "area": 20,
            "iscrowd": 0,
        },
        {"segmentation": square, "area": 12, "iscrowd": 0},
    ]
    words = vocab.COCO_INSTANCE
    table = {
        "images": [
            {"id": 3, "file_name": "a.png", "height": 10, "width": 12},
            {"id": 4, "file_name": "b.png", "height": 4, "width": 4},
        ],
        "annotations": [{"id": n, "image_id": 3, "category_id": 90, **note} for n, note in enumerate(notes)],
        "categories": [{"id": i, "name": n} for i, n in zip(words.ids, words.names, strict=True)],
    }
    write_zip(
        tmp_path / "annotations_trainval2017.zip", {"annotations/instances_val2017.json": json.dumps(table)}
    )
    write_zip(
        tmp_path / "val2017.zip",
        {"val2017/a.png": png(np.zeros((10, 12, 3))), "val2017/b.png": png(np.zeros((4, 4)))},
    )
    dataset = SegmentDataset(tmp_path, "auto", "val")
    assert dataset.task is TASKS["coco_instance"]
    first, second = dataset[0].target, dataset[1]
    masks = first.masks()
    assert first.labels.tolist() == [79] * 4 and first.area.tolist() == [15.5, 20, 20, 12]
    assert torch.equal(masks[1], masks[2]) and masks[1].sum() == 20 and first.ids.shape[0] > 1
    assert masks[0].sum() > masks[3].sum() > 0
    assert second.target.masks().shape == (0, 4, 4) and second.image.shape == (
        3,
        4,
        4,
    )  # an image without annotation


def label_png(height=12, width=16, values=(0, 1, 4, 150)):
    return np.resize(np.repeat(values, 5), (height, width))


def test_ade20k_semantic(tmp_path):
    base, values = "ADEChallengeData2016", label_png()
    photo = png(np.zeros((12, 16, 3)))
    write_zip(
        tmp_path / f"{base}.zip",
        {
            f"{base}/images/validation/x.jpg": photo,
            f"{base}/annotations/validation/x.png": png(values),
            f"{base}/images/training/y.jpg": photo,
            f"{base}/annotations/training/y.png": png(values),
            f"{base}/readme": b"",
        },
    )
    dataset = SegmentDataset(tmp_path, "auto", "val")
    assert dataset.task is TASKS["ade20k_semantic"] and len(dataset) == 1
    target = dataset[0].target
    assert target.labels.tolist() == [0, 3, 149]
    assert np.array_equal(target.masks(), values == np.array([1, 4, 150])[:, None, None])
    assert target.area.tolist() == [(values == v).sum() for v in (1, 4, 150)]


@pytest.mark.parametrize("kind", ["zip", "tar", "folder"])
def test_ade20k_panoptic(tmp_path, kind):
    base, values = "ADEChallengeData2016", np.zeros((12, 16), int)
    values[:, :8], values[:, 8:] = 1, 4  # wall, floor: stuff
    values[:2] = 8  # bed: the first thing, left to the instance PNG
    things = np.zeros((12, 16, 3), int)
    things[:2, :8], things[:2, 8:12], things[5, :4] = (1, 1, 0), (1, 2, 0), (2, 3, 0)
    write_zip(
        tmp_path / f"{base}.zip",
        {f"{base}/images/{s}/x.jpg": png(np.zeros((12, 16, 3))) for s in ("validation", "training")}
        | {f"{base}/annotations/{s}/x.png": png(values) for s in ("validation", "training")},
    )
    for split in ("validation", "training"):
        path = tmp_path / "annotations_instance" / split / "x.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(png(things))
    if kind == "zip":
        write_zip(
            tmp_path / "annotations_instance.zip",
            {f"annotations_instance/{s}/x.png": png(things) for s in ("validation", "training")},
        )
    if kind == "tar":
        with tarfile.open(tmp_path / "annotations_instance.tar", "w") as tar:
            tar.add(tmp_path / "annotations_instance", arcname="annotations_instance")
    if kind != "folder":
        for path in sorted((tmp_path / "annotations_instance").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (tmp_path / "annotations_instance").rmdir()
    dataset = SegmentDataset(tmp_path, "auto", "val")
    assert dataset.task is TASKS["ade20k_panoptic"]
    target = dataset[0].target
    names = [vocab.ADE20K.names[k].split(",")[0].strip() for k in target.labels]
    assert names == ["wall", "floor", "bed", "bed", "window"]
    assert target.area.tolist() == [80 - 4, 80, 16, 8, 4]
    assert target.masks().sum(0).max() == 1  # in evaluation things replace stuff
    over = SegmentDataset(tmp_path, "ade20k_panoptic", "train").source.target(0, crowd=False)
    assert over.masks().sum(0).max() == 2 and over.area.tolist() == [
        80,
        80,
        16,
        8,
        4,
    ]  # in training they lie over it
    alone = SegmentDataset(tmp_path, "ade20k_instance", "val")
    things = alone[0].target
    assert [alone.task.vocabulary.names[k] for k in things.labels] == ["bed", "bed", "window"]
    assert torch.equal(things.masks(), target.masks()[2:]) and things.area.tolist() == [16, 8, 4]


def test_cityscapes(tmp_path):
    ids = np.array([[0, 7, 26, 33, 255, 3, 7, 11]])
    for split in ("train", "val"):
        stem = f"{split}/bern/bern_000000_000019"
        for path, content in {
            f"leftImg8bit/{stem}_leftImg8bit.png": png(np.zeros((1, 8, 3))),
            f"gtFine/{stem}_gtFine_labelIds.png": png(ids),
            f"gtFine/{stem}_gtFine_color.png": b"",
        }.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(content)
    dataset = SegmentDataset(tmp_path, "auto", "val")
    assert dataset.task is TASKS["cityscapes_semantic"]
    sample = dataset[0]
    assert [vocab.CITYSCAPES.names[k] for k in sample.target.labels] == ["road", "building", "car", "bicycle"]
    assert sample.target.masks().int().argmax(-1).tolist()[2] == [2] and sample.name.startswith("bern/")
    train = SegmentDataset(tmp_path, "auto", "train")
    assert train.class_counts().sum() == 4


@pytest.mark.parametrize("packed", [False, "", "top/"])
def test_own_pictures_and_masks(tmp_path, packed):
    values = np.array([[0, 0, 2], [255, 2, 2]])
    members = {"classes.txt": b"\xef\xbb\xbfcat\nlong grass\nsky\n\n"}  # as Windows' editors write it
    for split in ("train", "val"):
        members |= {
            f"images/{split}/a.b.jpg": png(np.zeros((2, 3, 3))),
            f"masks/{split}/a.b.png": png(values),
        }
    if packed is not False:
        root = write_zip(tmp_path / "mine.zip", {packed + name: content for name, content in members.items()})
    else:
        root = tmp_path
        for name, content in members.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
    dataset = SegmentDataset(root, "auto", "val")
    assert dataset.task.kind == "semantic" and dataset.task.vocabulary.names == ("cat", "long grass", "sky")
    assert dataset[0].target.labels.tolist() == [0, 2] and dataset[0].target.area.tolist() == [2, 3]
    assert dataset[0].name == "a.b.jpg"


@pytest.mark.parametrize("suffix", [".webp", ".bmp", ".tif", ".TIFF"])
def test_own_pictures_of_every_kind_that_predict_reads(tmp_path, suffix):
    (tmp_path / "classes.txt").write_text("cat\n")
    for part in ("images", "masks"):
        (tmp_path / part / "val").mkdir(parents=True)
    Image.new("RGB", (3, 2), (255, 0, 0)).save(tmp_path / f"images/val/a{suffix}")
    Image.new("L", (3, 2)).save(tmp_path / "masks/val/a.png")
    sample = SegmentDataset(tmp_path, "auto", "val")[0]
    assert sample.name == f"a{suffix}" and sample.image[0].float().mean() > 250
    assert len(sample.target.labels) == 1
    (tmp_path / f"images/val/a{suffix}").rename(tmp_path / "images/val/a.heic")
    with pytest.raises(FileNotFoundError, match=r"images/val!: no \*\.jpg, .*\*\.webp, .*; "):
        SegmentDataset(tmp_path, "auto", "val")


def test_own_coco_gets_its_own_vocabulary(tmp_path):
    data.write_shapes(tmp_path, vocab.SHAPES_OPEN, 2, 2, train_classes=[0, 1, 2, 25, 26])
    assert data.detect(tmp_path) is TASKS["shapes_open"]
    mine = vocab.Vocabulary("x", ("red disc", "gray dots", "teal dots"), (4, 9, 2), (True, False, False))
    data.write_shapes(tmp_path / "own", mine, 2, 2)
    task = data.detect(tmp_path / "own")
    assert (task.vocabulary.names, task.vocabulary.ids, task.vocabulary.thing) == (
        mine.names,
        mine.ids,
        mine.thing,
    )
    assert task.kind == "panoptic"
    assert max(SegmentDataset(tmp_path / "own", task, "train").class_counts()) > 0


def test_unpacked_folders_and_deflated_nested_zip_give_the_same(shapes, tmp_path):
    wanted = [s for s in SegmentDataset(shapes, "shapes", "val")]
    for path in shapes.glob("*.zip"):
        with zipfile.ZipFile(path) as file:
            file.extractall(tmp_path / "flat")
    for split in ("train", "val"):
        nested = tmp_path / f"flat/annotations/panoptic_{split}2017.zip"
        with zipfile.ZipFile(nested) as file:
            file.extractall(tmp_path / "flat/annotations")
        nested.unlink()
    (tmp_path / "tight").mkdir()
    for path in shapes.glob("*.zip"):
        with zipfile.ZipFile(path) as file:
            write_zip(tmp_path / "tight" / path.name, {n: file.read(n) for n in file.namelist()})
    for root in (tmp_path / "flat", tmp_path / "tight"):
        for a, b in zip(SegmentDataset(root, "auto", "val"), wanted, strict=True):
            assert (
                torch.equal(a.image, b.image) and torch.equal(a.target.ids, b.target.ids) and a.name == b.name
            )


@pytest.mark.parametrize("orientation,turned", [(6, True), (8, True), (5, True), (3, False), (1, False)])
def test_exif_follows_the_annotation(tmp_path, orientation, turned):
    photo = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "PNG", exif=exif)
    raw = data.oriented(data.open_picture(file.getvalue(), "z!a"), (4, 6), "z!a")
    assert np.array_equal(np.asarray(raw), photo)  # the annotation has the raw size: the tag is ignored
    picture = data.open_picture(file.getvalue(), "z!a")
    if turned:
        from PIL import ImageOps

        upright = np.asarray(ImageOps.exif_transpose(picture))
        assert np.array_equal(np.asarray(data.oriented(picture, (6, 4), "z!a")), upright)
    else:
        with pytest.raises(ValueError, match="^z!a: picture 6x4, annotation 4x6; "):
            data.oriented(picture, (6, 4), "z!a")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "LA", "1"])
def test_picture_modes_become_rgb(mode):
    file = io.BytesIO()
    kind = "JPEG" if mode == "CMYK" else "PNG"
    Image.new("RGB", (5, 4), (200, 100, 50)).convert(mode).save(file, kind)
    picture = data.oriented(data.open_picture(file.getvalue(), "z!a"), (4, 5), "z!a")
    assert picture.mode == "RGB" and picture.size == (5, 4)
    if mode in ("RGBA", "P", "CMYK"):
        assert np.abs(np.asarray(picture).astype(int) - (200, 100, 50)).max() < 30


# ----------------------------------------------------------------------------------------------------
# Order, ranks, workers


def stream(n, batch, steps, seed=0):
    return [data.positions(n, batch, seed, step) for step in range(steps)]


def test_order_is_whole_permutations_without_the_remainder():
    steps = stream(23, 5, 8)
    for epoch in (0, 1):
        items = [k for step in steps[4 * epoch : 4 * epoch + 4] for k in step]
        assert {e for e, _, _ in items} == {epoch} and len({i for _, i, _ in items}) == 20
    assert [k[1] for k in steps[0]] != [k[1] for k in steps[4]]
    assert stream(23, 5, 1, seed=1) != stream(23, 5, 1, seed=0)


def test_order_of_a_set_smaller_than_the_batch_runs_on():
    items = [k for step in stream(3, 8, 3) for k in step]
    assert len(items) == 24
    for start in range(0, 24, 3):
        assert sorted(i for _, i, _ in items[start : start + 3]) == [0, 1, 2]
        assert {e for e, _, _ in items[start : start + 3]} == {start // 3}


def batches(dataset, *args, **options):
    return list(data.loader(dataset, *args, **options))


@pytest.mark.parametrize("workers,context", [(2, "fork"), (1, "spawn"), (1, "forkserver")])
def test_loader_is_the_same_with_workers(shapes, workers, context):
    wanted = batches(training(shapes), 4, 3, seed=5)
    got = batches(training(shapes), 4, 3, seed=5, workers=workers, context=context)
    assert len(got) == 3 and all(same(a, b) for a, b in zip(wanted, got, strict=True))


def test_loader_resumes_anywhere(shapes):
    whole = batches(training(shapes), 16, 7)
    for start in (1, 2, 5):
        rest = batches(training(shapes), 16, 7, start_step=start)
        assert len(rest) == 7 - start and all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))


@pytest.mark.parametrize("world,device_batch", [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)])
def test_loader_splits_a_step_over_ranks_and_micro_batches(shapes, world, device_batch):
    dataset = training(shapes)
    whole = batches(dataset, 8, 2)
    parts = [batches(dataset, 8, 2, rank=r, world=world, device_batch=device_batch) for r in range(world)]
    micro = 8 // (world * device_batch)
    for step in range(2):
        order = [parts[r][step * micro + m] for m in range(micro) for r in range(world)]
        assert [n for b in order for n in b.names] == whole[step].names
        assert torch.equal(torch.cat([b.images for b in order]), whole[step].images)
        assert all(len(b.targets) == device_batch for b in order)


@pytest.mark.parametrize("batch,world,device", [(16, 3, None), (8, 2, 3), (2, 4, None)])
def test_loader_refuses_impossible_splits(shapes, batch, world, device):
    with pytest.raises(ValueError, match="--batch-size .*; make it a multiple of"):
        data.loader(training(shapes), batch, 1, world=world, device_batch=device)


def test_batch_targets_are_those_of_the_samples(shapes):
    dataset = training(shapes)
    samples = [dataset[0, i] for i in range(5)]
    batch = data.collate(samples)
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (5, 3, 64, 64) and batch.faults == []
    for sample, target, image in zip(samples, batch.targets, batch.images, strict=True):
        assert torch.equal(sample.image, image) and torch.equal(sample.target.masks(), target.masks())
        for field in ("ids", "layer", "value", "labels", "crowd", "area"):
            a, b = getattr(sample.target, field), getattr(target, field)
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("count,world", [(12, 1), (7, 2), (1, 2), (7, 3)])
@pytest.mark.parametrize("workers", [0, 1])
def test_eval_loader_shards_without_padding(shapes, count, world, workers):
    if workers and (count, world) != (7, 2):
        pytest.skip("workers are slow to start")
    dataset = SegmentDataset(shapes, "shapes", "val")
    shards = [
        [s for part in data.eval_loader(dataset, r, world, workers, 3, limit=count) for s in part]
        for r in range(world)
    ]
    assert [[s.image_id for s in shard] for shard in shards] == [
        [i + 1 for i in range(r, count, world)] for r in range(world)
    ]
    for shard in shards:
        for sample in shard:
            direct = dataset[sample.image_id - 1]
            assert torch.equal(sample.image, direct.image) and torch.equal(
                sample.target.masks(), direct.target.masks()
            )


def test_staged_copies_the_next_batch_beside_the_work(monkeypatch):
    """On a stream of its own; work waits for its own batch alone, whose memory is kept until it is done."""
    streams, done = ["main"], []

    class Pixels:
        def __init__(self, name):
            self.name = name

        def to(self, device, non_blocking=False):
            done.append(f"{streams[-1]} copies {self.name}{'' if non_blocking else ' and waits'}")
            return self

        def record_stream(self, stream):
            done.append(f"{stream.name} keeps {self.name}")

    @contextlib.contextmanager
    def enter(stream):
        streams.append(stream.name)
        yield
        streams.pop()

    def stream(name):
        def wait_stream(other):
            done.append(f"{name} waits for {other.name}")

        return SimpleNamespace(name=name, wait_stream=wait_stream)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream(streams[-1]))
    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(data, "_batch", lambda packed: packed[2])
    rows = [SimpleNamespace(packed=[Pixels(f"a{k}"), Pixels(f"b{k}"), k]) for k in range(2)]
    for k in data.staged(rows, SimpleNamespace(type="cuda")):
        done.append(f"{streams[-1]} works on {k}")
    copies = [[f"side copies a{k}", f"side copies b{k}"] for k in range(2)]
    ready = [["main waits for side", f"main keeps a{k}", f"main keeps b{k}"] for k in range(2)]
    assert done == [*copies[0], *ready[0], *copies[1], "main works on 0", *ready[1], "main works on 1"]


def run_script(body):
    """Standard output and error of a script that has `data` and the loader's pieces at hand."""
    code = (
        "import os, signal, resource, multiprocessing, torch\ntorch.set_num_threads(1)\nimport data\n" + body
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(data.__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_killed_worker_ends_in_an_error_within_seconds(shapes):
    began = time.time()
    done = run_script(f"""
dataset = data.SegmentDataset({str(shapes)!r}, "shapes", "train", data.Augment(64))
batches = data.loader(dataset, 4, 10**6, workers=1, context="fork")
next(batches)
os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
for batch in batches:
    pass
""")
    # torch's signal handler may raise first, or again while the traceback is printed
    lines = done.stderr.splitlines()
    said = [line for line in lines if line.startswith("RuntimeError: ") and "worker" in line]
    assert done.returncode and said, done.stderr[-800:]
    assert time.time() - began < 40  # imports included


def test_error_in_a_worker_leaves_no_process_behind(tmp_path):
    """Workers are deaf to SIGTERM, but a script that fails while they live must end."""
    data.write_shapes(tmp_path, vocab.SHAPES, 1, 6, seed=0)
    write_zip(tmp_path / "val2017.zip", {f"val2017/{n:012}.jpg": b"x" for n in range(1, 7)})
    began = time.time()
    done = run_script(f"""
dataset = data.SegmentDataset({str(tmp_path)!r}, "shapes", "val")
batches = data.eval_loader(dataset, workers=1)
try:
    next(batches)
except ValueError as error:
    kept = error  # and its frames, which hold the loader
    print("said", error)
""")
    assert done.stdout.startswith("said ") and done.returncode == 0, done.stderr[-800:]
    assert time.time() - began < 60


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_data_processes_do_not_grow(shapes):
    """Batches made on the heap and then copied to shared memory left holes there: 26 MB a batch."""
    others = multiprocessing.active_children()

    def own():
        mine = [p.pid for p in multiprocessing.active_children() if p not in others]
        texts = [Path(f"/proc/{pid}/status").read_text() for pid in mine]
        return [int(re.search(r"RssAnon:\s+(\d+)", text)[1]) / 1024 for text in texts]  # MB each

    crops = data.SegmentDataset(shapes, "shapes", "train", data.Augment(640))
    batches = data.loader(crops, 16, 61, workers=2)
    next(itertools.islice(batches, 10, None))
    before = own()
    next(itertools.islice(batches, 48, None))
    assert len(before) == 2 and max(own()) < max(before) + 100


def test_few_file_descriptors_are_enough(shapes):
    done = run_script(f"""
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
dataset = data.SegmentDataset({str(shapes)!r}, "shapes", "train", data.Augment(64))
kept = list(data.loader(dataset, 16, 12, workers=3, context="fork"))
print(sum(len(batch.targets) for batch in kept))
""")
    assert done.stdout.strip() == "192", done.stderr[-800:]


# ----------------------------------------------------------------------------------------------------
# The procedural world, the check, speed


def test_world_is_deterministic_and_quick(tmp_path):
    began = time.process_time()
    data.write_shapes(tmp_path / "a", vocab.SHAPES, 100, 10, seed=1)
    assert (time.process_time() - began) / 110 < 10 / 2000  # 2000 images in 10 s
    data.write_shapes(tmp_path / "b", vocab.SHAPES, 100, 10, seed=1)
    data.write_shapes(tmp_path / "c", vocab.SHAPES, 100, 10, seed=2)
    first, second, third = (
        ZipReader(tmp_path / x / "train2017.zip").read("train2017/000000000001.jpg") for x in "abc"
    )
    assert first == second != third


def test_world_ties_colour_to_class(shapes):
    dataset = SegmentDataset(shapes, "shapes", "train")
    right = total = 0
    for sample in dataset:
        for mask, label in zip(sample.target.masks(), sample.target.labels, strict=True):
            colour = sample.image[:, mask].double().mean(1)
            shade = 0.78 if vocab.SHAPES.names[label].split()[1] in ("stripes", "dots", "bricks") else 0.92
            table = torch.tensor([data.COLOURS[n.split()[0]] for n in vocab.SHAPES.names]).double() * shade
            right += int((table - colour).norm(dim=1).argmin() == label)
            total += 1
    assert right / total > 0.95


def test_world_restricts_training_classes(tmp_path):
    seen = [
        k
        for k, name in enumerate(vocab.SHAPES_OPEN.names)
        if name not in ("red ring", "brown dots", "blue disc")
    ]
    data.write_shapes(tmp_path, vocab.SHAPES_OPEN, 120, 150, seed=0, train_classes=seen)
    train, val = (SegmentDataset(tmp_path, "shapes_open", s).class_counts() for s in ("train", "val"))
    hidden = np.setdiff1d(np.arange(34), seen)
    assert train[hidden].sum() == 0 and (train[seen] > 0).all() and (val[hidden] > 0).all()


def test_world_has_void_and_crowds(tmp_path):
    data.write_shapes(tmp_path, vocab.SHAPES, 200, 1)
    samples = list(SegmentDataset(tmp_path, "shapes", "train"))
    assert 2 <= sum(int(s.target.crowd.sum()) for s in samples) <= 40
    assert any((s.target.ids == 0).any() for s in samples)
    assert max(len(s.target.labels) for s in samples) >= 5


def test_check_command_draws_a_grid(shapes, tmp_path, capsys):
    assert data.main([str(shapes), "--decode", "--out", str(tmp_path / "g.png")]) == 0
    printed = capsys.readouterr()
    assert "shapes, panoptic, 8 classes" in printed.out and "train: 40 images, all decoded" in printed.out
    assert printed.err == ""
    with Image.open(tmp_path / "g.png") as page:
        assert (
            page.size == (800, 800)
            and len(set(page.get_flattened_data() if hasattr(page, "get_flattened_data") else page.getdata()))
            > 1000
        )
    with pytest.raises(SystemExit, match="1"):
        data.command(data.main, [str(tmp_path / "nowhere")])
    assert capsys.readouterr().err == f"error: {tmp_path / 'nowhere'}: not found; check the path\n"


@pytest.mark.parametrize("height,width", [(1, 1500), (1500, 1), (1, 1), (2, 900)])
def test_grid_of_thin_pictures_is_small(height, width):
    target = Target.from_masks(np.ones((1, height, width), bool), [0])
    thin = data.Sample(torch.zeros(3, height, width, dtype=torch.uint8), target, "x", 1)
    page = data.grid([thin, thin, thin])
    assert page.height == 400 and 40 <= page.width <= 4000


def test_throughput_beats_the_mask_by_mask_pipeline():
    if not (REAL / "coco").exists():
        pytest.skip("real samples are not here")
    dataset = SegmentDataset(REAL / "coco", "coco_panoptic", "train", Augment(640))
    source, rng = dataset.source, np.random.default_rng(0)

    def fit(image, window, mode, **options):
        """One tensor (C,H,W) through flip, resize, pad and crop."""
        image = image.flip(-1) if window.flip else image
        scaled = F.interpolate(image[None], (window.height, window.width), mode=mode, **options)[
            0
        ]  # (C, h, w)
        scaled = F.pad(scaled, (0, max(0, 640 - window.width), 0, max(0, 640 - window.height)))
        return scaled[:, window.top : window.top + 640, window.left : window.left + 640].contiguous()

    def rival(i):
        photo = Image.open(io.BytesIO(source.images.read(source.members[i]))).convert("RGB")
        rgb = np.asarray(Image.open(io.BytesIO(source.pngs.read(source.png_members[i])))).astype(np.int64)
        ids = torch.from_numpy(rgb @ np.array([1, 256, 65536]))
        window = dataset.transform.draw(photo.height, photo.width, rng)
        image = fit(torch.from_numpy(np.array(photo)).permute(2, 0, 1), window, "bilinear", antialias=True)
        masks = [ids == k for k in source.table["id"][slice(*source.table["start"][i : i + 2])].tolist()]
        masks = [fit(m[None].to(torch.uint8), window, "nearest-exact")[0].bool() for m in masks]
        return image, torch.stack([m for m in masks if m.any()] or masks)

    def seconds(work):
        began = time.process_time()
        for i in range(20):
            work(i)
        return time.process_time() - began

    seconds(lambda i: dataset[0, i])
    ours = min(seconds(lambda i, e=e: dataset[e, i]) for e in range(3))
    theirs = seconds(rival)
    print(f"ours {20 / ours:.1f}, mask by mask {20 / theirs:.1f} images/s at 640, ratio {theirs / ours:.1f}")
    assert theirs / ours > 2  # 3 on a quiet core, where decoding alone takes half of our time
