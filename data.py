"""Segmentation data: archives read in place, tasks, targets, augmentation, batches, a procedural world.

In: a folder with the archives as downloaded (COCO, ADE20K, Cityscapes; zip, tar or unpacked) or a user's own.
Out: uint8 images (3,S,S) with a `Target` each, batched; for evaluation the original images.
The order depends on (seed, epoch) alone, an augmentation on (seed, epoch, index).

    task = detect("/coco")  # or TASKS["coco_panoptic"]
    dataset = SegmentDataset("/coco", task, "train", Augment(task.size, task.scale, task.color_jitter))
    for batch in loader(dataset, batch_size=16, steps=100, workers=4):
        batch.images  # uint8 (16, 3, 640, 640)

`python data.py /coco --decode` checks a data folder and draws some of it. Mistakes raise ValueError or
FileNotFoundError with one line, `<file>!<member>: <what is wrong>; <what to do>`. Instances need metrics.py.
"""
# SPDX-License-Identifier: MIT
import argparse
import atexit
import collections
import contextlib
import difflib
import fcntl
import gc
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import stat
import struct
import sys
import tarfile
import tempfile
import time
import weakref
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, UnidentifiedImageError
from torch import Tensor

import vocab
from vocab import Vocabulary

IMAGE_LIMIT = 1 << 28  # bytes of one picture, decompressed; the largest real one is near 20 MB
JSON_LIMIT = 1 << 30  # COCO's largest JSON has 0.45 GB
NESTED_LIMIT = 1 << 34  # COCO's largest nested zip has 0.8 GB
LONGEST = 1000  # characters of a name: in an array of them each takes the room of the longest
ENCRYPTED, NO_CRC = 99, -1  # in the columns `method` and `crc`
GRACE = 30  # seconds that a data process outlives SIGTERM

# ---- Cache -------------------------------------------------------------------------------------------------
def cache_dir() -> Path:
    """Folder for what is computed once per archive: ~/.cache/nanoeomt, else a private temporary one."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for path in (Path(base) / "nanoeomt", Path(tempfile.gettempdir()) / f"nanoeomt-{os.getuid()}"):
        with contextlib.suppress(OSError):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(path, os.W_OK) and path.stat().st_uid == os.getuid():
                return path
    raise ValueError(f"{base}: no folder to keep the data index in; set XDG_CACHE_HOME to a writable folder")


def cache_file(path: str | Path, key: str, suffix: str) -> Path:
    """Where work on the archive at `path` is kept; another size or mtime of the archive is another file."""
    now = os.stat(path)
    text = f"{os.path.abspath(path)} {now.st_size} {now.st_mtime_ns} {key}"
    return cache_dir() / (hashlib.blake2b(os.fsencode(text), digest_size=12).hexdigest() + suffix)


def write_atomically(target: Path, write) -> None:
    """`write(file)` to a temporary file, on disk before it is renamed: `target` is whole or absent."""
    temporary = target.with_name(f".tmp-{os.urandom(8).hex()}")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def writable(path: str | Path) -> None:
    """Raises the OSError that opening this file to write would; changes no file and leaves no new one."""
    new = not os.path.exists(path)
    with open(path, "ab") as file:
        if new and not file.tell():
            Path(path).resolve().unlink(missing_ok=True)


# ---- Readers -----------------------------------------------------------------------------------------------
def _junk(name):
    return name.endswith("/") or os.path.basename(name).startswith("._") or not {
        "__MACOSX", "lost+found", "@eaDir", ".Trashes", ".snapshot"}.isdisjoint(name.split("/"))


class Reader:
    """The sorted names (`names`, bytes array (n,)) of what is in an archive or folder; look-ups on them.
    Those over LONGEST are in `long` alone: in nobody's way, and an error where they are wanted."""

    def find(self, names: Iterable[str]) -> np.ndarray:
        """Index of each name, int64 (n,), -1 where there is none."""
        wanted = np.array([os.fsencode(n) for n in names], dtype="S")
        if not len(self.names):
            return np.full(len(wanted), -1)
        at = np.minimum(np.searchsorted(self.names, wanted), len(self.names) - 1)
        return np.where(self.names[at] == wanted, at, -1)

    def index(self, member: str | int) -> int:
        """Index of one member; FileNotFoundError if it is not there."""
        found = int(self.find([member])[0]) if isinstance(member, str) else int(member)
        if found < 0:
            raise FileNotFoundError(f"{self.label}!{member}: missing; get it, or fix the annotation file")
        return found

    def where(self, index: int) -> str:
        """`file!member`, the start of every message."""
        return f"{self.label}!{os.fsdecode(self.names[index])}"

    def locate(self, names: Sequence[str], problems: list[str]) -> np.ndarray:
        """Like `find`, with a line in `problems` for every name that is missing, or there more than once."""
        at = self.find(names)
        lower = {n.lower(): n for n in self.names.tolist()} if (at < 0).any() else {}
        for name in (names[i] for i in np.flatnonzero(at < 0)):
            other = lower.get(os.fsencode(name).lower())
            found = f"case differs, there is {os.fsdecode(other)}; rename it" if other else \
                f"{len(name)} characters; make it shorter" if len(name) > LONGEST else "missing; get it"
            problems.append(f"{self.label}!{name}: {found}, or fix the annotation file")
        twice = np.append(self.names[1:] == self.names[:-1], False)
        for i in at[twice[at]]:  # -1 is the last, which never is one of two
            problems.append(f"{self.where(i)}: there more than once; pack this archive again")
        return at

    def folder(self, wanted: str) -> str:
        """Prefix of the folder `wanted` in here, such as "top/wanted/"; "" if there is no such folder."""
        ends = np.char.find(np.char.add(b"/", self.names), os.fsencode(f"/{wanted}/")).tolist()
        tops = {name[:end] for name, end in zip(self.names.tolist(), ends, strict=True) if end >= 0}
        top = min(tops, key=lambda top: (top.count(b"/"), top), default=None)  # not the copy in some backup/
        return "" if top is None else f"{os.fsdecode(top)}{wanted}/"

    def under(self, prefix: str, suffixes: tuple[str, ...]) -> list[str]:
        """Sorted names that start with `prefix` and end with one of `suffixes`, without the prefix."""
        names, ends = [*map(os.fsdecode, self.names), *self.long], tuple(end.lower() for end in suffixes)
        return [n[len(prefix):] for n in names if n.startswith(prefix) and n.lower().endswith(ends)]


def _refuse(error):
    """What may not be read is neither missing nor empty."""
    what = f"{error.filename}: cannot be read ({error.strerror.lower()})"
    raise ValueError(f"{what}; check its rights (ls -ld), and the disk") from None


def _open(path, flags=os.O_RDONLY):
    """os.open, also for `open(opener=)`."""
    try:
        return os.open(path, flags)
    except OSError as error:
        _refuse(error)


def _mode(path):
    """What is at a path, for stat.S_ISREG and S_ISDIR; 0 if nothing is there."""
    try:
        return os.stat(path).st_mode
    except OSError as error:
        return 0 if isinstance(error, FileNotFoundError | NotADirectoryError) else _refuse(error)


class ZipReader(Reader):
    """Reads members of a .zip (or plain .tar) in place; nothing is ever unpacked under a member's name.
    `start` and `length` bound a zip stored inside another file; `label` names it in messages."""

    def __init__(self, path: str | Path, start: int = 0, length: int | None = None, label: str = ""):
        self.path, self.label, self.start, self._descriptor = str(path), label or str(path), start, None
        if not stat.S_ISREG(_mode(path)):
            raise FileNotFoundError(f"{path}: not found; check the path, or download it")
        self.length = os.path.getsize(path) - start if length is None else length
        rows = _tar_rows(self) if self.path.endswith(".tar") else _zip_rows(self)
        rows = [row for row in rows if not _junk(row[0])]
        self.long = [name for name, *_ in rows if len(name) > LONGEST]
        rows = sorted((os.fsencode(name), *rest) for name, *rest in rows if len(name) <= LONGEST)
        self.names = np.array([row[0] for row in rows], dtype="S")
        table = np.array([row[1:] for row in rows], np.int64).reshape(-1, 5)  # (n, 5)
        self.offset, self.packed, self.size, self.crc = table[:, :4].T.copy()
        self.method = table[:, 4].astype(np.uint8)

    def __getstate__(self):
        return {**self.__dict__, "_descriptor": None}

    def pread(self, offset: int, count: int) -> bytes:
        """Bytes at `offset`, fewer at the end; moves no file position, so forked processes may share one."""
        if self._descriptor is None:
            self._descriptor = _open(self.path)
            weakref.finalize(self, os.close, self._descriptor)
        parts, count = [], min(count, self.length - offset)
        while count > 0 and (part := os.pread(self._descriptor, min(count, 1 << 30), self.start + offset)):
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return b"".join(parts)

    def _begin(self, i, limit):
        """Where the bytes of member i start, once it is known to be readable."""
        if self.method[i] not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            kinds = {ENCRYPTED: "encrypted", 9: "Deflate64"}
            kind = kinds.get(int(self.method[i]), f"compression method {self.method[i]}")
            raise ValueError(f"{self.where(i)}: {kind}; pack it again, stored or deflated")
        if self.size[i] > limit:
            raise ValueError(f"{self.where(i)}: {self.size[i]} bytes unpacked, limit {limit}; remove it")
        if self.crc[i] == NO_CRC:  # tar
            return int(self.offset[i])
        head = self.pread(int(self.offset[i]), 30)  # whose name and extra field have their own lengths
        if head[:4] != b"PK\3\4" or len(head) < 30:
            raise ValueError(f"{self.where(i)}: not where the directory says; download the archive again")
        return int(self.offset[i]) + 30 + sum(struct.unpack("<HH", head[26:]))

    def read(self, member: str | int, limit: int = IMAGE_LIMIT) -> bytes:
        """Contents of one member (name or index), checked against its length and CRC."""
        i = self.index(member)
        data = self.pread(self._begin(i, limit), int(self.packed[i]))
        if self.method[i] == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-15).decompress(data, int(self.size[i]) + 1)
            except zlib.error as error:
                raise ValueError(f"{self.where(i)}: damaged ({error}); download the archive again") from None
        if len(data) != self.size[i]:
            raise ValueError(f"{self.where(i)}: cut, {len(data)} of {self.size[i]} bytes; download it again")
        if self.crc[i] not in (NO_CRC, zlib.crc32(data)):
            raise ValueError(f"{self.where(i)}: wrong CRC; download the archive again")
        return data

    def nested(self, member: str) -> "ZipReader":
        """A zip inside this one: in place if it is stored, else unpacked once into the cache."""
        start = self._begin(i := self.index(member), NESTED_LIMIT)
        if self.method[i] == zipfile.ZIP_STORED:
            return ZipReader(self.path, self.start + start, int(self.size[i]), self.where(i))
        target = cache_file(self.path, f"{self.start} {member}", ".zip")
        with open(self.path, "rb", opener=_open) as lock:
            with contextlib.suppress(OSError):  # on a disk without locks each process unpacks
                if not target.exists():
                    fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists() or target.stat().st_size != self.size[i]:
                self._unpack(i, target)
        return ZipReader(target, label=self.where(i))

    def _unpack(self, i, target):
        if shutil.disk_usage(target.parent).free < self.size[i]:
            need = f"no room for {self.size[i]} bytes of {self.where(i)}"
            raise ValueError(f"{target.parent}: {need}; set XDG_CACHE_HOME to a larger disk")
        try:  # a MB at a time; zipfile checks its length and CRC
            with zipfile.ZipFile(_File(self)) as archive:  # which may know it by another name
                info = next(one for one in archive.infolist() if one.header_offset == self.offset[i])
                with archive.open(info) as packed:
                    write_atomically(target, lambda file: shutil.copyfileobj(packed, file, 1 << 20))
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{self.where(i)}: damaged ({error}); download the archive again") from None


class _File(io.RawIOBase):
    """The part of a file that a ZipReader covers, as the file object that zipfile wants."""

    def __init__(self, reader):
        self.reader, self.at = reader, 0

    def seek(self, offset, whence=io.SEEK_SET):
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.reader.length}[whence]
        return self.at

    def read(self, count=-1):
        data = self.reader.pread(self.at, self.reader.length if count is None or count < 0 else count)
        self.at += len(data)
        return data


def _zip_rows(reader):
    """Rows (name, offset, packed size, size, crc, method) of a zip's directory."""
    try:
        with zipfile.ZipFile(_File(reader)) as archive:
            infos, end = archive.infolist(), reader.length - 22 - len(archive.comment)
        if any(info.header_offset < 0 for info in infos) or reader.pread(end, 4) != b"PK\5\6":
            raise zipfile.BadZipFile("its beginning or end is missing")  # it may end as a zip in it does
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError) as error:
        head = reader.pread(0, 64).lstrip()
        kind = "empty" if not reader.length else "a web page" if head[:1] == b"<" else \
            "a git-lfs pointer" if head.startswith(b"version https://git-lfs") else \
            "a cut or damaged zip" if head[:2] == b"PK" else f"neither a zip nor a .tar ({error})"
        raise ValueError(f"{reader.label}: {reader.length} bytes, {kind}; zip or download it again") from None
    return [(_name(info), info.header_offset, info.compress_size, info.file_size, info.CRC,
             ENCRYPTED if info.flag_bits & 1 else info.compress_type) for info in infos]


def _name(info):
    """A member's name. Without the UTF-8 flag zipfile takes cp437: what most tools wrote is UTF-8."""
    name = info.filename.replace("\\", "/") if info.create_system == 0 else info.filename  # 0: by .NET
    with contextlib.suppress(UnicodeError):
        return name if info.flag_bits & 0x800 else name.encode("cp437").decode()  # ASCII is the same in both
    return name


def _tar_rows(reader):
    try:
        with tarfile.open(fileobj=_File(reader), mode="r:") as tar:
            files = [m for m in tar if m.isreg()]
    except tarfile.TarError as error:
        raise ValueError(f"{reader.path}: not an uncompressed whole tar ({error}); get it again") from None
    return [(m.name.removeprefix("./"), m.offset_data, m.size, m.size, NO_CRC, 0) for m in files]


class FolderReader(Reader):
    """The interface of ZipReader over the files of a plain folder."""

    def __init__(self, path: str | Path):
        self.path = self.label = str(path)
        names, real, top = [], {}, os.path.join(Path(path), "")
        walk = os.walk(Path(path), followlinks=True, onerror=lambda error: _junk(
            os.path.basename(error.filename)) or _refuse(error))
        for folder, folders, files in walk:
            real[folder] = (*real.get(os.path.dirname(folder), ()), os.path.realpath(folder))
            if real[folder][-1] in real[folder][:-1]:  # a link to a folder that it lies in
                folders[:] = files[:] = ()
            names += [n for file in files if not _junk(n := os.path.join(folder, file).removeprefix(top))]
        self.long = [name for name in names if len(name) > LONGEST]
        self.names = np.array(sorted(os.fsencode(n) for n in names if len(n) <= LONGEST), dtype="S")

    def read(self, member: str | int, limit: int = IMAGE_LIMIT) -> bytes:
        i = self.index(member)
        with open(os.path.join(self.path, os.fsdecode(self.names[i])), "rb", opener=_open) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise ValueError(f"{self.where(i)}: over {limit} bytes; not from a data set, drop it")
        return data

    def nested(self, member: str) -> ZipReader:
        return ZipReader(os.path.join(self.path, member))


def mount(root: str | Path, folders: Sequence[str], archives: Sequence[str] = ()) -> tuple[Reader, str]:
    """Reader and member prefix of the first of `folders`: inside one of `archives`, as FOLDER.zip, or plain.
    `root` is a folder, or one zip that holds them all."""
    root = Path(root)
    if not _mode(root):
        raise FileNotFoundError(f"{root}: not found; check the path")
    for path in (root, *(root / name for name in [*archives, *(f"{folder}.zip" for folder in folders)])):
        if stat.S_ISREG(_mode(path)):
            reader, shared = ZipReader(path), path.name in archives and "/" in folders[0]
            # a zip of all splits may lack its own folder at the top, but not the split's
            tops = [*folders, *(folder.partition("/")[2] for folder in folders if shared)]
            prefix = next(filter(None, map(reader.folder, tops)), "")
            if prefix or path != root and not shared:
                return reader, prefix
    for folder in folders:
        if stat.S_ISDIR(_mode(root / folder)):
            return FolderReader(root / folder), ""
    wanted = " or ".join([f"{folder}[.zip]" for folder in folders] + [f"{name} with it" for name in archives])
    raise FileNotFoundError(f"{root}: has no {wanted}; download it, or give another folder")


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")  # of a user's own pictures
EPS = b"%!PS", b"\xc5\xd0\xd3\xc6"  # how a picture begins for which Pillow would start Ghostscript
UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error,
               Image.DecompressionBombError)  # what Pillow raises on damaged pictures

# ---- Tasks -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Task:
    """One row: what is segmented, how its files lie (`layout`), and the numbers of the published recipe."""

    name: str
    vocabulary: Vocabulary
    kind: str  # "panoptic", "instance" or "semantic"
    layout: str  # a key of SOURCES
    queries: int = 200
    epochs: int = 12
    size: int = 640
    scale: tuple[float, float] = (0.1, 2.0)
    color_jitter: bool = False
    images: int = 0  # of the official training split


ADE_RECIPE = dict(epochs=31, color_jitter=True, images=20210)
# Recipes of EoMT's model zoo; the procedural worlds' objects have a tiny model's size, so they scale little.
TASKS = {task.name: task for task in (
    Task("coco_panoptic", vocab.COCO_PANOPTIC, "panoptic", "coco_panoptic", images=118287),
    Task("coco_instance", vocab.COCO_INSTANCE, "instance", "coco_instance", images=118287),
    Task("ade20k_panoptic", vocab.ADE20K, "panoptic", "ade20k_panoptic", **ADE_RECIPE),
    Task("ade20k_instance", vocab.ADE20K_INSTANCE, "instance", "ade20k_panoptic", **ADE_RECIPE),
    Task("ade20k_semantic", vocab.ADE20K, "semantic", "ade20k", 100, 31, 512, (0.5, 2.0), True, 20210),
    Task("cityscapes_semantic", vocab.CITYSCAPES, "semantic", "cityscapes", 100, 107, 1024, (0.5, 2.0),
         True, 2975),
    Task("shapes", vocab.SHAPES, "panoptic", "coco_panoptic", 16, 20, 64, (0.8, 1.25)),
    Task("shapes_open", vocab.SHAPES_OPEN, "panoptic", "coco_panoptic", 16, 20, 64, (0.8, 1.25)),
)}


class Pairs(NamedTuple):
    """Where pictures and label PNGs lie; {} is the split's folder. A pixel is its class's id + `offset`."""

    images: str
    masks: str
    archives: tuple[str, str]
    splits: tuple[str, str]  # folder names of train and val
    suffixes: tuple[str, str]  # end of a picture's name -> end of its PNG's name
    ignored: tuple[int, ...]
    offset: int = 0


ADE = "ADEChallengeData2016"
PAIRS = {
    "ade20k": Pairs(f"{ADE}/images/{{}}", f"{ADE}/annotations/{{}}", (f"{ADE}.zip",) * 2,
                    ("training", "validation"), (".jpg", ".png"), (0,), 1),
    "cityscapes": Pairs("leftImg8bit/{}", "gtFine/{}",
                        ("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"), ("train", "val"),
                        ("_leftImg8bit.png", "_gtFine_labelIds.png"), (*range(34), 255)),
    "own_semantic": Pairs("images/{}", "masks/{}", ("images.zip", "masks.zip"), ("train", "val"),
                          ("", ".png"), (255,)),
}

# ---- Annotation JSON, parsed once into flat arrays ---------------------------------------------------------
class Table(dict):
    """Flat arrays of one annotation file, kept in the cache; pickled as a path, spawned workers reload it."""

    def __init__(self, path: Path):
        self.path = path
        with np.load(path, allow_pickle=False) as file:
            if file.zip.testzip() or "problems" not in file:  # the last; numpy may not read up to a wrong CRC
                raise zipfile.BadZipFile(f"{path}: damaged; remove it")
            super().__init__(file)

    def __reduce__(self):
        return Table, (self.path,)


def load_table(reader: Reader, member: str, kind: str) -> Table:
    """A member as PARSERS makes it, from the cache if that is whole; one process makes it, others wait."""
    parse, form = PARSERS[kind]
    path = Path(reader.path) / member if isinstance(reader, FolderReader) else reader.path
    where = reader.where(reader.index(member))
    cached = cache_file(path, f"{member} {parse.__name__} 3", ".npz")  # 3: what is checked, and the layout
    with open(path, "rb", opener=_open) as lock:
        with contextlib.suppress(OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
            if not cached.exists():
                fcntl.flock(lock, fcntl.LOCK_EX)
            return Table(cached)
        tree = reader.read(member, JSON_LIMIT)  # the text, then what it says
        size, threshold = len(tree), gc.get_threshold()
        gc.set_threshold(0)  # a collection would go through millions of lists that are all in use
        try:
            arrays, problems = parse(tree := json.loads(tree))
        except (ValueError, OverflowError, RecursionError) as error:  # not JSON, or numbers that are none
            raise ValueError(f"{where}: {size} bytes, {str(error)[:99]}; fix or download it") from None
        except (KeyError, TypeError, AttributeError) as error:
            found = f"no key {error}" if isinstance(error, KeyError) else f"not COCO's form ({error!r})"
            form = f"images (id, file_name, height, width), categories (id, name), annotations ({form})"
            raise ValueError(f"{where}: {found}; give COCO's {kind} form: {form}") from None
        finally:
            del tree  # freed in the order of the file, which is faster, and before any collection
            gc.set_threshold(*threshold)
        arrays["problems"] = np.array([f"{where}: {line}".encode() for line in problems[:1000]], dtype="S")
        write_atomically(cached, lambda file: np.savez(file, **arrays))
    return Table(cached)


def _twice(values):
    """What is in `values` more than once."""
    return [value for value, count in collections.Counter(values).items() if count > 1]


def _image_arrays(data):
    """Arrays of the "images" and "categories" lists, the annotations of each image, and what is wrong."""
    images, categories, problems = data["images"], data["categories"], []
    for what, entries in (("category", categories), ("image", images)):
        problems += [f"{what} id {i} twice; fix this file" for i in _twice(entry["id"] for entry in entries)]
    arrays = {
        "image_id": np.array([i["id"] for i in images], np.int64),
        "hw": np.array([(i["height"], i["width"]) for i in images], np.int64).reshape(-1, 2),  # (n, 2)
        "image_name": np.array([i["file_name"].encode() for i in images], dtype="S"),
        "category_id": np.array([c["id"] for c in categories], np.int64),
        "category_name": np.array([c["name"].encode() for c in categories], dtype="S"),
        "category_thing": np.array([int(c.get("isthing", 1) or 0) for c in categories], bool),
    }
    for i in np.flatnonzero((arrays["hw"] < 1).any(1) | (arrays["hw"].prod(1, dtype=float) > IMAGE_LIMIT)):
        problems.append(f"image id {images[i]['id']} has height, width {arrays['hw'][i]}; fix this file")
    lists = {image["id"]: [] for image in images}
    for annotation in data["annotations"]:
        if annotation["image_id"] in lists:
            lists[annotation["image_id"]].append(annotation)
        else:
            problems.append(f"image id {annotation['image_id']} is not in images; fix this file")
    return arrays, [lists[image["id"]] for image in images], problems


def _segments(lists, arrays):
    """All segments, in image order; columns of them, those of image i in rows start[i]:start[i+1]."""
    segments = [segment for one in lists for segment in one]
    arrays["start"] = np.cumsum([0, *map(len, lists)])  # (n+1,)
    arrays["category"] = np.array([s["category_id"] for s in segments], np.int64)
    arrays["crowd"] = np.array([int(s.get("iscrowd") or 0) for s in segments], bool)
    arrays["area"] = np.array([float(s["area"]) for s in segments], np.float64)  # of None it makes an error
    return segments


def parse_panoptic(data: dict) -> tuple[dict, list[str]]:
    """COCO panoptic JSON -> arrays, and what is wrong with it."""
    arrays, lists, problems = _image_arrays(data)
    for image_id, annotations in zip(arrays["image_id"], lists, strict=True):
        if len(annotations) != 1:
            what = "is annotated twice" if annotations else "has no annotation"
            problems.append(f"image id {image_id} {what}; fix this file")
    found = [annotations[0] for annotations in lists if annotations]
    segments = _segments([annotation["segments_info"] for annotation in found], arrays)
    ids = arrays["id"] = np.array([s["id"] for s in segments], np.int64)
    arrays["png_name"] = np.array([annotation["file_name"].encode() for annotation in found], dtype="S")
    owner = np.repeat([annotation["image_id"] for annotation in found], np.diff(arrays["start"]))
    for s in np.flatnonzero((ids < 1) | (ids >= 1 << 24)):
        problems.append(f"segment id {ids[s]} in image id {owner[s]}; ids are 1 to 16777215, fix this file")
    for s, image_id in _twice(zip(ids.tolist(), owner.tolist(), strict=True)):
        problems.append(f"segment id {s} twice in image id {image_id}; fix this file")
    return arrays, problems


def parse_instances(data: dict) -> tuple[dict, list[str]]:
    """COCO instance JSON -> arrays; row s has parts part[s]:part[s+1], each a run of `numbers`."""
    arrays, lists, problems = _image_arrays(data)
    segments = _segments(lists, arrays)
    arrays["is_rle"] = np.array([isinstance(s["segmentation"], dict) for s in segments], bool)
    parts, ends = [], [0]
    for image_id, hw, one in zip(arrays["image_id"], arrays["hw"].tolist(), lists, strict=True):
        for number, segment in enumerate(one, 1):
            try:
                parts += _parts(segment["segmentation"], hw)
            except ValueError as error:
                problems.append(f"image id {image_id}, number {number} of its annotations: {error}")
            ends.append(len(parts))
    arrays["part"], arrays["number"] = np.array(ends), np.cumsum([0, *map(len, parts)])
    numbers = np.fromiter(itertools.chain.from_iterable(parts), np.float64)
    # annotations have two decimals: hundredths in int32 take half the room and give the same doubles back
    np.round(hundredths := numbers * 100, out=hundredths)
    exact = np.abs(hundredths).max(initial=0) < 2**31 and (hundredths / 100 == numbers).all()
    arrays["numbers"], arrays["unit"] = (hundredths.astype(np.int32), 100) if exact else (numbers, 1)
    return arrays, problems


def _parts(outline, hw):
    """The polygons of an outline, or the uncompressed counts of its RLE as the only part."""
    if not outline:
        raise ValueError("no outline; give polygons or RLE (a box alone is no segment), or remove it")
    if not isinstance(outline, dict):
        return outline
    from metrics import rle_counts, rle_decode
    size, counts = outline.get("size"), outline["counts"]
    if size not in (None, hw, [*map(str, hw)]):
        raise ValueError(f"RLE of size {size}, its image has {hw}; fix this file, or get the matching pair")
    return [counts if isinstance(counts, list) else rle_counts(rle_decode({"size": hw, "counts": counts}))]


PARSERS = {  # and what they read of an annotation
    "panoptic": (parse_panoptic, "image_id, file_name, segments_info (id, category_id, area)"),
    "instances": (parse_instances, "image_id, category_id, area, segmentation"),
}

# ---- Ground truth of one image -----------------------------------------------------------------------------
@dataclass
class Target:
    """T segments as L layers of id maps: segment t is `ids[layer[t]] == value[t]`; disjoint: one layer."""

    ids: Tensor  # uint8 (L, H, W), 0 = nothing
    layer: Tensor  # int64 (T,)
    value: Tensor  # int64 (T,) in 1..255
    labels: Tensor  # int64 (T,) class index
    crowd: Tensor  # bool (T,)
    area: Tensor  # float64 (T,) as the annotation states it (COCO's instances have decimals), else pixels

    def masks(self) -> Tensor:
        """Bool (T,H,W)."""
        return self.ids[self.layer] == self.value[:, None, None].to(torch.uint8)  # (T, H, W)

    def to(self, device) -> "Target":
        return Target(*(getattr(self, field.name).to(device) for field in fields(self)))

    def keep(self, rows: np.ndarray) -> "Target":
        """The same maps with only the segments where `rows` bool (T,) is true."""
        index = torch.from_numpy(np.flatnonzero(rows))
        return Target(self.ids, *(getattr(self, field.name)[index] for field in fields(self)[1:]))

    def disjoint_ids(self) -> np.ndarray:
        """int32 (H,W) id map of segments that do not overlap: segment t has id t + 1, 0 = void."""
        out = np.zeros(self.ids.shape[1:], np.int32)  # (H, W)
        for layer, ids in enumerate(self.ids.numpy()):
            table, rows = np.zeros(256, np.int32), np.flatnonzero(self.layer.numpy() == layer)
            table[self.value.numpy()[rows]] = rows + 1
            out = np.maximum(out, table[ids])  # (H, W)
        return out

    @staticmethod
    def from_masks(masks, labels, crowd=None, area=None, shape=None) -> "Target":
        """From bool masks (T,H,W): each goes into the first layer where it overlaps nothing. With a `shape`
        (H,W) they may be made one by one, as iterated over."""
        layers, layer, value, pixels = [], [], [], []
        for mask in masks:
            mask = np.asarray(mask).astype(bool, copy=False)  # (H, W)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = np.s_[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1] if len(rows) else np.s_[:0, :0]
            part = mask[box]
            free = (k for k, ids in enumerate(layers) if layer.count(k) < 255 and not ids[box][part].any())
            layer.append(next(free, len(layers)))
            if layer[-1] == len(layers):
                layers.append(np.zeros(mask.shape, np.uint8))  # (H, W)
            value.append(layer.count(layer[-1]))
            layers[layer[-1]][box][part] = value[-1]
            pixels.append(part.sum())
        ids = np.stack(layers or [np.zeros(shape or masks.shape[1:], np.uint8)])  # (L, H, W)
        crowd = np.zeros(len(layer)) if crowd is None else crowd
        return _target(ids, layer, value, labels, crowd, pixels if area is None else area)


def _target(ids, layer, value, labels, crowd, area):
    kinds = (np.uint8, np.int64, np.int64, np.int64, bool, np.float64)
    columns = zip((ids, layer, value, labels, crowd, area), kinds, strict=True)
    return Target(*(torch.from_numpy(np.ascontiguousarray(column, kind)) for column, kind in columns))


# ---- Pictures ----------------------------------------------------------------------------------------------
def _orientation(picture):
    """The EXIF orientation, 1 to 8; 1, as stored, if the tag is missing or damaged."""
    with contextlib.suppress(*UNDECODABLE):
        value = picture.getexif().get(0x0112)
        return value if value in range(1, 9) else 1
    return 1


def open_picture(data: bytes, where: str, shrink: int = 1) -> Image.Image:
    """A decoded picture of 8 bits a channel; `where` starts the message if it cannot be decoded.
    A JPEG is decoded at 1/shrink (1, 2, 4 or 8) of its sides; `info["size"]` keeps their true lengths."""
    try:
        picture = Image.open(io.BytesIO(b"" if data[:4] in EPS else data))
        size = picture.size
        if shrink > 1 and _orientation(picture) < 5:  # turned, its partial pixels would lead
            picture.draft(None, [max(1, side // shrink) for side in size])
        picture.load()
        picture.info["size"] = size  # a PNG may hold a text of this name, also behind its pixels
    except UnidentifiedImageError:  # its own text holds an address, so it is another one each time
        raise ValueError(f"{where}: {len(data)} bytes, not a picture; download it again") from None
    except UNDECODABLE as error:
        raise ValueError(f"{where}: cannot be decoded ({error}); download it again") from None
    if picture.mode[0] in "IF" or picture.format == "PNG" and data[24] == 16:  # Pillow would clip, unsaid
        raise ValueError(f"{where}: more than 8 bits a channel (mode {picture.mode}); convert it to 8 bits")
    return picture


def id_map(data: bytes, where: str) -> np.ndarray:
    """Ids uint32 (H,W) = R + 256 G + 65536 B of a panoptic PNG, in the lower 24 of the bits."""
    picture = open_picture(data, where)
    if picture.mode != "RGB":
        raise ValueError(f"{where}: mode {picture.mode}, wanted RGB (id = R + 256 G + 65536 B); convert it")
    return np.frombuffer(picture.tobytes("raw", "RGBX"), "<u4").reshape(picture.size[::-1])  # (H, W)


def write_ids(ids: np.ndarray, file) -> None:
    """Integer ids (H,W) -> RGB PNG (a path or an open file) with id = R + 256 G + 65536 B, COCO's form."""
    channels = np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], -1).astype(np.uint8)  # (H, W, 3)
    Image.fromarray(channels).save(file, "PNG")


# ---- Sources, one per layout: `images` (reader), `members` (n,) indices in it, `names`, `image_ids`, -------
# `problems` (what is wrong, seen without decoding), `target(i, crowd)` with or without crowds, `labels()`
def coco_table(root: str | Path, kind: str, split: str) -> tuple[Table, Reader, str]:
    """Arrays of a COCO JSON (`kind` panoptic or instances), its reader, and its name without .json."""
    archive = "annotations_trainval2017.zip"
    reader, prefix = mount(root, ["annotations"], [f"panoptic_{archive}" if kind == "panoptic" else archive])
    stems = [f"{prefix}{kind}_{split}2017", f"{prefix}{kind}_{split}"]
    stem = next((s for s in stems if reader.find([f"{s}.json"])[0] >= 0), stems[0])
    reader.index(f"{stem}.json")
    if kind == "instances":
        try:
            import metrics  # noqa: F401
        except ImportError:
            raise ValueError(f"{__file__}: instances need metrics.py; copy it beside this file") from None
    return load_table(reader, f"{stem}.json", kind), reader, stem


class _Coco:
    def __init__(self, root, task, split):
        self.table, self.reader, self.stem = coco_table(root, self.kind, split)
        self.problems = [line.decode() for line in self.table["problems"]]
        self.image_ids, self.hw, self.names = (self.table[k] for k in ("image_id", "hw", "image_name"))
        self.images, prefix = mount(root, [f"{split}2017", f"images/{split}2017", f"images/{split}", split])
        self.members = self.images.locate([prefix + n.decode() for n in self.names], self.problems)
        words, table, categories = task.vocabulary, self.table, self.table["category"].tolist()
        row, known = {c: k for k, c in enumerate(words.ids)}, set(zip(words.ids, words.names, strict=True))
        said = dict(zip(table["category_id"].tolist(), table["category_name"].tolist(), strict=True))
        for c, name in sorted({(c, said.get(c, b"").decode()) for c in categories} - known):
            self.problems.append(f"{self.reader.label}!{self.stem}.json: category {f'{c} {name}'.strip()} is "
                                 f"not in the table {words.name}; choose another --task, or fix this file")
        self.row = np.array([row.get(c, -1) for c in categories], np.int16)  # (S,) class index

    def labels(self):
        """(image, class index) of every segment that is no crowd."""
        owner = np.repeat(np.arange(len(self.names)), np.diff(self.table["start"]))
        real = ~self.table["crowd"]
        return owner[real], self.row[real]


class CocoPanoptic(_Coco):
    """Panoptic JSON beside a (nested) zip or folder of id PNGs."""

    kind = "panoptic"

    def __init__(self, root, task, split):
        super().__init__(root, task, split)
        self.pngs, prefix = self.reader, f"{self.stem}/"
        if self.reader.find([f"{self.stem}.zip"])[0] >= 0:
            self.pngs = self.reader.nested(f"{self.stem}.zip")
            prefix = self.pngs.folder(self.stem.rsplit("/", 1)[-1])
        names = [prefix + name.decode() for name in self.table["png_name"]]
        self.png_members = self.pngs.locate(names, self.problems)

    def target(self, i: int, crowd: bool) -> Target:
        rows = np.arange(*self.table["start"][i:i + 2])
        ids, where = np.append(0, self.table["id"][rows]), self.pngs.where(self.png_members[i])
        png = id_map(self.pngs.read(self.png_members[i]), where)  # (H, W)
        if png.shape != tuple(self.hw[i]):
            found, said = f"{png.shape[1]}x{png.shape[0]}", f"{self.hw[i][1]}x{self.hw[i][0]}"
            raise ValueError(f"{where}: PNG {found}, its JSON says {said}; get the matching pair")
        # a map is a few thousand runs of one id; each is looked up once
        start = np.append(0, np.flatnonzero(png.ravel()[1:] != png.ravel()[:-1]) + 1)  # (R,)
        found, length = png.ravel()[start] & 0xFFFFFF, np.diff(start, append=png.size)  # (R,), (R,)
        order = np.argsort(ids)
        index = order[np.searchsorted(ids, found, sorter=order).clip(max=len(rows))]  # (R,), 0 = void
        for unknown in found[ids[index] != found][:1]:
            raise ValueError(f"{where}: id {unknown} is not in its JSON; get the matching pair")
        pixels, area = np.bincount(index, length, len(ids))[1:], self.table["area"][rows]
        for s in np.flatnonzero(crowd & (pixels == 0) & (area > 0)):
            raise ValueError(f"{where}: id {ids[s + 1]} of its JSON has no pixels; get the matching pair")
        # an area below 1 was left out by a tool; panopticapi's union would divide by 0 or pass an IoU of 1
        area = np.where(area >= 1, area, pixels)
        keep = np.append(False, (pixels > 0) & (crowd | ~self.table["crowd"][rows]))
        layer, value = np.divmod(np.where(keep[index], index, 0) - 1, 255)  # (R,), (R,); void is in layer -1
        runs = [np.where(layer == k, value + 1, 0) for k in range(max(1, math.ceil(len(rows) / 255)))]
        maps = np.array(runs, np.uint8).repeat(length, 1).reshape(-1, *png.shape)  # (L, H, W)
        t = np.flatnonzero(keep) - 1
        return _target(maps, t // 255, t % 255 + 1, self.row[rows[t]], self.table["crowd"][rows[t]], area[t])


class CocoInstance(_Coco):
    """Instance JSON with polygons or RLE; instances may overlap."""

    kind = "instances"

    def target(self, i: int, crowd: bool) -> Target:
        rows = np.arange(*self.table["start"][i:i + 2])
        rows = rows if crowd else rows[~self.table["crowd"][rows]]
        masks = (self._mask(i, s, *self.hw[i].tolist()) for s in rows)  # a stack might be larger than RAM
        columns = self.row[rows], self.table["crowd"][rows], self.table["area"][rows]
        return Target.from_masks(masks, *columns, tuple(self.hw[i]))

    def _mask(self, i, s, height, width):
        from metrics import polygons_to_mask, rle_decode
        edges = self.table["number"][self.table["part"][s]:self.table["part"][s + 1] + 1]
        parts = [self.table["numbers"][a:b] / self.table["unit"] for a, b in itertools.pairwise(edges)]
        try:
            if self.table["is_rle"][s]:
                return rle_decode({"size": [height, width], "counts": parts[0].astype(np.int64)})
            return polygons_to_mask(parts, height, width)
        except ValueError as error:
            where = f"{self.reader.label}!{self.stem}.json: image id {self.image_ids[i]}"
            number = s - self.table["start"][i] + 1
            raise ValueError(f"{where}, number {number} of its annotations: {error}") from None


class LabelPairs:
    """Pictures beside PNGs of class values: semantic segmentation, one segment for each class present."""

    def __init__(self, root, task, split):
        self.spec, self.problems = PAIRS[task.layout.replace("ade20k_panoptic", "ade20k")], []
        folder = self.spec.splits[split == "val"]
        self.images, prefix = mount(root, [self.spec.images.format(folder)], self.spec.archives[:1])
        self.masks, mask_prefix = mount(root, [self.spec.masks.format(folder)], self.spec.archives[1:])
        suffix, mask_end = self.spec.suffixes
        names = self.images.under(prefix, ends := (suffix,) if suffix else SUFFIXES)
        if not names:
            raise FileNotFoundError(f"{self.images.label}!{prefix}: no *{', *'.join(ends)}; add pictures")
        self.names, self.image_ids = np.array([n.encode() for n in names]), np.arange(len(names))
        self.members = self.images.locate([prefix + n for n in names], self.problems)
        self.stems = [n[:-len(suffix)] if suffix else n.rsplit(".", 1)[0] for n in names]
        self.mask_members = self.masks.locate([mask_prefix + s + mask_end for s in self.stems], self.problems)
        stems = {n[:-len(mask_end)] for n in self.masks.under(mask_prefix, (mask_end,))}
        self.problems += [f"{self.images.label}!{prefix}{s}{suffix}: missing; get it, or drop its PNG"
                          for s in sorted(stems.difference(self.stems))]
        self.slot = np.full(256, -1)  # pixel value -> class index + 1; 0 ignored; -1 unknown
        self.slot[list(self.spec.ignored)] = 0
        self.slot[np.array(task.vocabulary.ids) + self.spec.offset] = 1 + np.arange(len(task.vocabulary.ids))

    def _classes(self, i):
        """Class index + 1, 0 = ignored: uint8 (H,W)."""
        where = self.masks.where(self.mask_members[i])
        picture = open_picture(self.masks.read(self.mask_members[i]), where)
        if picture.mode not in ("L", "P"):
            raise ValueError(f"{where}: mode {picture.mode}, wanted L or P (class index a pixel); convert it")
        values = np.asarray(picture)  # (H, W)
        present = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
        for value in present[self.slot[present] < 0]:
            raise ValueError(f"{where}: value {value} is not in the class table; see --task or classes.txt")
        return self.slot.astype(np.uint8)[values]  # (H, W)

    def target(self, i: int, crowd: bool) -> Target:
        ids = self._classes(i)  # (H, W)
        area = np.bincount(ids.ravel(), minlength=256)[1:]
        labels = np.flatnonzero(area)
        return _target(ids[None], 0 * labels, labels + 1, labels, 0 * labels, area[labels])

    def labels(self):
        """(image, class index) of every segment; there is no JSON, so it reads every PNG (that it can)."""
        found = []
        for i in range(len(self.names)):
            with contextlib.suppress(ValueError, OSError):  # training skips it, counts it and says so
                found += [(i, label) for label in self.target(i, False).labels.tolist()]
        return np.array(found, np.int64).reshape(-1, 2).T  # (2, S)


class AdePanoptic(LabelPairs):
    """ADE20K panoptic: stuff from the label PNGs, things from annotations_instance (R = class, G = number).
    Training: things over stuff in their own layer; evaluation (`crowd`): in its place. Instance: no stuff."""

    def __init__(self, root, task, split):
        super().__init__(root, task, split)
        folder = f"annotations_instance/{self.spec.splits[split == 'val']}"
        archives = ["annotations_instance.zip", "annotations_instance.tar"]
        self.things, prefix = mount(root, [folder, f"{ADE}/{folder}"], archives)
        self.thing_members = self.things.locate([f"{prefix}{s}.png" for s in self.stems], self.problems)
        self.thing_rows = np.flatnonzero(task.vocabulary.thing)
        self.slot[(self.slot < 0) & (task.kind == "instance")] = 0

    def target(self, i: int, crowd: bool) -> Target:
        stuff = self._classes(i)  # (H, W)
        stuff = np.where(np.isin(np.arange(256) - 1, self.thing_rows)[stuff], 0, stuff)  # (H, W)
        where = self.things.where(self.thing_members[i])
        ids = id_map(self.things.read(self.thing_members[i]), where)  # (H, W)
        if ids.shape != stuff.shape:
            raise ValueError(f"{where}: shape {ids.shape}, label PNG {stuff.shape}; get the matching pair")
        number = np.where(ids & 255, ids >> 8 & 255, 0)  # (H, W), 0 = no instance
        seen = np.flatnonzero(np.bincount((number << 8 | ids & 255).ravel(), minlength=1 << 16)[256:]) + 256
        value, label = seen >> 8, (seen & 255) - 1
        if len(set(value)) < len(value) or label.max(initial=0) >= len(self.thing_rows):
            raise ValueError(f"{where}: an instance of two classes, or an unknown class; download it again")
        stuff = np.where(number > 0, 0, stuff) if crowd else stuff  # (H, W)
        pixels = [np.bincount(m.ravel(), minlength=256) for m in (stuff, number)]
        labels = np.flatnonzero(pixels[0][1:])
        layer = np.repeat([0, 1], [len(labels), len(value)])
        area = np.concatenate((pixels[0][labels + 1], pixels[1][value]))
        return _target(np.stack([stuff, number]), layer, np.concatenate((labels + 1, value)),
                       np.concatenate((labels, self.thing_rows[label])), np.zeros(len(layer)), area)


SOURCES = {"coco_panoptic": CocoPanoptic, "coco_instance": CocoInstance, "ade20k_panoptic": AdePanoptic,
           **dict.fromkeys(PAIRS, LabelPairs)}

# ---- Which task is it? -------------------------------------------------------------------------------------
def detect(root: str | Path) -> Task:
    """The task whose files lie in `root`; own data in COCO's layout, or images/ masks/ classes.txt, too."""
    if not _mode(Path(root)):
        raise FileNotFoundError(f"{root}: not found; check the path")
    kinds, splits = (("panoptic", "coco_panoptic"), ("instances", "coco_instance")), ("val", "train")
    for (kind, layout), split in itertools.product(kinds, splits):
        with contextlib.suppress(FileNotFoundError):
            return _coco_task(coco_table(root, kind, split)[0], layout)
    if task := _labels_task(root):
        return task
    known = [TASKS[name] for name in ("ade20k_panoptic", "ade20k_semantic", "cityscapes_semantic")]
    for task, split in itertools.product(known, splits):
        with contextlib.suppress(FileNotFoundError):
            SOURCES[task.layout](root, task, split)
            return task
    wanted = "COCO, ADE20K, Cityscapes, annotations/instances_{train,val}.json, or images/ masks/ classes.txt"
    raise FileNotFoundError(f"{root or '--data'}: no known layout; give a folder with archives of {wanted}")


def _coco_task(table, layout):
    """The task of a COCO JSON: a known one if its categories are, else one with its own vocabulary."""
    ids, names = table["category_id"].tolist(), [n.decode() for n in table["category_name"]]
    for task in TASKS.values():
        known = zip(task.vocabulary.ids, task.vocabulary.names, strict=True)
        if task.layout == layout and sorted(zip(ids, names, strict=True)) == sorted(known):
            return task
    own = Vocabulary("own", names, ids, table["category_thing"].tolist())
    return replace(TASKS[layout], name=layout.replace("coco", "own"), vocabulary=own)


def _labels_task(root):
    """The task of classes.txt: line n (from 0) names pixel value n, 255 is ignored."""
    path, data = Path(root) / "classes.txt", None
    if _mode(path):
        with open(path, "rb", opener=_open) as file:
            data = file.read()
    elif Path(root).is_file():
        reader = ZipReader(root)
        names = [n for n in reader.under("", ("classes.txt",)) if n.split("/", 1)[-1] == "classes.txt"]
        data = reader.read(min(names, key=lambda name: name.count("/"))) if names else None
    if data is None:
        return None
    own = vocab.parse_classes(data.decode("utf-8-sig", errors="replace"), f"{root}!classes.txt")
    return replace(TASKS["ade20k_semantic"], name="own_semantic", layout="own_semantic", vocabulary=own)


# ---- Augmentation ------------------------------------------------------------------------------------------
def oriented(picture: Image.Image, hw: tuple[int, int], where: str) -> Image.Image:
    """The picture, RGB, as its annotation of size `hw` saw it: as stored, or upright by its EXIF tag."""
    (height, width), size = hw, picture.info.get("size", picture.size)
    if size != (width, height):
        turn = {5: 5, 6: 4, 7: 6, 8: 2}.get(_orientation(picture))  # EXIF orientation -> Transpose
        if turn is None or size != (height, width):
            found = f"picture {size[0]}x{size[1]}, annotation {width}x{height}"
            raise ValueError(f"{where}: {found}; get the matching pair")
        picture = picture.transpose(turn)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


GREY = np.array([38, 75, 15], np.int16)  # of 128: .299 .587 .114


def _turn_hue(x, amount):
    """Hue + `amount` (below 1) of a sixth of a turn in int16 (3,H,W), whose other HSV values stay.
    Around the circle a channel is at the top, slopes to the bottom, stays there, slopes back. It moves by
    amount * (top - bottom) from where an endless slope would be, down if the channel before it is the smaller
    neighbour, and is cut to the ends."""
    top, low = np.maximum(np.maximum(x[0], x[1]), x[2]), np.minimum(np.minimum(x[0], x[1]), x[2])  # (H, W)
    step = (top - low) * round(64 * amount) + 32 >> 6  # (H, W)
    up, back, moved = top + low - x[0] - x[1] - x[2] + step, -2 * step, 2 * x  # (H, W), (H, W), (3, H, W)
    for k in range(3):  # >> 15: all bits if the channel before it is the smaller neighbour
        moved[k] += (x[k - 1] - x[k - 2] >> 15 & back) + up
    return np.minimum(np.maximum(moved, low, out=moved), top, out=moved)


def draw_jitter(picture: Image.Image, rng: np.random.Generator) -> list[tuple[str, float, float]]:
    """Random brightness, contrast (before or after the others), saturation, hue, each with p = 0.5: steps of
    (kind, amount in 64ths, for contrast the mean grey of the whole picture just before)."""
    # widths 32/255, 0.5, 0.5, 18/360 are SSD's and upstream's
    kinds = [("brightness", 32 / 255), ("contrast", 0.5), ("saturation", 0.5), ("hue", 6 * 18 / 360)]
    kinds.insert(1 if rng.random() < 0.5 else 3, kinds.pop(1))
    steps = []
    for kind, width in (one for one in kinds if rng.random() < 0.5):
        mean = 0.0
        if kind == "contrast":
            small = picture.resize([-(-side // 4) for side in picture.size], Image.Resampling.NEAREST)
            small = np.stack(small.split())  # (3, H/4, W/4)
            mean = float(GREY @ jitter(small, steps).mean((1, 2)) / 128)
        steps.append((kind, round(64 * (rng.uniform(-width, width) + (kind != "hue"))) / 64, mean))
    return steps


def jitter(pixels: np.ndarray, steps: Sequence[tuple[str, float, float]]) -> np.ndarray:
    """Recolours uint8 (3,H,W), any part of a picture, in place, by the steps of `draw_jitter`."""
    for first in range(0, pixels.shape[1] if steps else 0, 128):  # bands that stay in the CPU's cache
        x = pixels[:, first:first + 128].astype(np.int16)  # (3, 128, W); sums of products stay below 2^15
        for kind, amount, mean in steps:
            if kind == "hue":
                x = _turn_hue(x, amount)  # (3, 128, W)
            else:  # away from each pixel's grey, from the mean, or from black, which is 0
                grey = GREY[0] * x[0] + GREY[1] * x[1] + GREY[2] * x[2] >> 7 if kind == "saturation" else mean
                share = round(64 * amount)
                x *= share
                x += np.asarray((64 - share) * grey + 32, np.int16)
                np.clip(x >> 6, 0, 255, out=x)
        pixels[:, first:first + 128] = x
    return pixels


class Window(NamedTuple):
    """A crop to be: a `source` (H,W) scaled to (height, width), flipped if `flip`, cut at (top, left)."""

    height: int
    width: int
    top: int
    left: int
    flip: bool
    source: tuple[int, int]
    shrink: int  # 1, 2, 4 or 8: how much smaller a JPEG may be decoded, and nothing be enlarged for it


def _cut(first, count, side, scaled):
    """The part of `side` pixels behind `count` of their `scaled` ones from `first` on: start, stop, how many
    scaled ones come before `first`. The start lies between pixels of both, up to 1/64 of a pixel."""
    ratio = side / scaled
    margin = math.ceil(2 * max(1, 1 / ratio))  # a bilinear filter reaches no farther, in scaled pixels
    begin = int(np.flatnonzero(np.arange(max(1, first - margin + 1)) * ratio % 1 < 1 / 64)[-1])
    stop = min(math.ceil((first + count + margin) * ratio), math.ceil(side))
    return int(begin * ratio), stop, first - begin


@dataclass(frozen=True)
class Augment:
    """Colour jitter, flip, scale, pad, crop to uint8 (3,size,size); drawn until a segment is left.
    Scale and crop are drawn on the id map alone; only that window of the picture is resampled, recoloured."""

    size: int
    scale: tuple[float, float] = (0.1, 2.0)
    color_jitter: bool = False

    def place(self, target: Target, rng: np.random.Generator) -> tuple[Window, Target]:
        """A random window, the last of ten or the first with a segment in it, and the Target of its crop."""
        for _ in range(10):
            window = self.draw(*target.ids.shape[1:], rng)
            ids, kept = self.cut_ids(window, target)
            if kept.any():
                break
        return window, replace(target, ids=torch.from_numpy(ids)).keep(kept)

    def draw(self, height: int, width: int, rng: np.random.Generator) -> Window:
        """A random window of a picture of this size."""
        ratio = rng.uniform(*sorted(self.scale)) * min(self.size / height, self.size / width)
        tall, wide = max(1, int(height * ratio)), max(1, int(width * ratio))
        top, left = (int(rng.integers(max(0, side - self.size) + 1)) for side in (tall, wide))
        shrink = max(s for s in (1, 2, 4, 8) if s == 1 or s * tall <= height and s * wide <= width)
        return Window(tall, wide, top, left, bool(rng.random() < 0.5), (height, width), shrink)

    def cut_ids(self, window: Window, target: Target) -> tuple[np.ndarray, np.ndarray]:
        """Ids uint8 (L,S,S) of the crop, nearest and centre-aligned; which segments are in it, bool (T,)."""
        source = target.ids.numpy()  # (L, H, W)
        height, width = source.shape[1:]
        y = np.arange(window.top, min(window.top + self.size, window.height))
        x = np.arange(window.left, min(window.left + self.size, window.width))
        rows = (2 * y + 1) * height // (2 * window.height)  # of the pixel under the centre, in exact integers
        columns = (2 * x + 1) * width // (2 * window.width)
        columns = width - 1 - columns if window.flip else columns
        part = source.take(rows, 1).take(columns, 2)  # (L, h, w)
        layers, where = [layer.tobytes() for layer in part], (target.layer.tolist(), target.value.tolist())
        kept = np.array([value in layers[layer] for layer, value in zip(*where, strict=True)], bool)  # (T,)
        return F.pad(torch.from_numpy(part), (0, self.size - len(x), 0, self.size - len(y))).numpy(), kept

    def cut_picture(self, window: Window, picture: Image.Image, rng=None) -> np.ndarray:
        """The crop uint8 (3,S,S), recoloured, bilinear with antialias, zero beyond the scaled picture.
        An RGB picture may be window.shrink times smaller than the window's source."""
        height, width = window.source
        shrink = 1 if picture.size == (width, height) else window.shrink
        rows, columns = min(self.size, window.height - window.top), min(self.size, window.width - window.left)
        left = window.width - window.left - columns if window.flip else window.left
        top, bottom, y = _cut(window.top, rows, height / shrink, window.height)
        left, right, x = _cut(left, columns, width / shrink, window.width)
        part = picture.crop((left, top, right, bottom))
        steps = draw_jitter(picture, rng) if self.color_jitter else []
        if steps and part.width * part.height < rows * columns:  # recolour where there are fewer pixels
            planes, steps = jitter(np.stack(part.split()), steps), []  # (3, h, w)
            part = Image.merge("RGB", [Image.fromarray(plane) for plane in planes])
        part = torch.from_numpy(np.array(part)).permute(2, 0, 1)[None]  # (1, 3, h, w), interleaved: fastest
        # a ratio a little too large: its product with the sides is rounded down
        ratio = [(a + 1e-3) * shrink / b for a, b in zip(window[:2], window.source, strict=True)]
        part = F.interpolate(part, scale_factor=ratio, mode="bilinear", antialias=True)
        part = part[0, :, y:y + rows, x:x + columns]  # (3, rows, columns)
        part = part.flip(2) if window.flip else part
        crop = F.pad(part, (0, self.size - columns, 0, self.size - rows)).numpy()  # (3, S, S)
        jitter(crop[:, :rows, :columns], steps)
        return crop


# ---- Data set ----------------------------------------------------------------------------------------------
class Sample(NamedTuple):
    """One image: uint8 (3,H,W), its target, file name, id in the data set, faults of those it replaces."""

    image: Tensor
    target: Target
    name: str
    image_id: int
    faults: Sequence[str] = ()


def find_task(root: str | Path, task: Task | str) -> Task:
    """A row of TASKS by name, or "auto": the one whose files lie in `root`."""
    if isinstance(task, Task):
        return task
    if task not in (*TASKS, "auto"):
        raise ValueError(f"--task {task}: unknown; choose auto, {', '.join(TASKS)}")
    return detect(root) if task == "auto" else TASKS[task]


def fit_task(num_classes: int, source) -> Task:
    """The only task with so many classes, for checkpoints that do not name theirs (`source` in errors)."""
    fits = [task for task in TASKS.values() if len(task.vocabulary.names) == num_classes]
    if len(fits) != 1:
        known = ", ".join(task.name for task in fits) or f"none of ours has {num_classes} classes"
        raise ValueError(f"{source}: does not say its task; give --task ({known})")
    return fits[0]


class SegmentDataset(torch.utils.data.Dataset):
    """Images of one split: augmented crops with a transform (training), else originals with crowds (eval).
    `hidden` classes leave training: policy "void" drops their segments, "drop" every image with one. A member
    that cannot be decoded is replaced by the next one and named in `faults`; evaluation raises."""

    def __init__(self, root: str | Path, task: Task | str, split: str, transform: Augment | None = None,
                 hidden: Sequence[int] = (), policy: str = "void"):
        if split not in ("train", "val") or policy not in ("void", "drop"):
            raise ValueError(f"split {split!r}, policy {policy!r}; give train or val, void or drop")
        self.task, self.split, self.transform = find_task(root, task), split, transform
        self.hidden = np.array(sorted(hidden), np.int64)
        self.source = SOURCES[self.task.layout](root, self.task, split)
        if problems := self.source.problems:
            rest = f" (and {len(problems) - 1} more, see python data.py {root})" if len(problems) > 1 else ""
            raise ValueError(problems[0] + rest)
        self.index = np.arange(len(self.source.names))
        if policy == "drop" and len(self.hidden):
            image, label = self.source.labels()
            self.index = np.setdiff1d(self.index, image[np.isin(label, self.hidden)])
        if not len(self.index):
            raise ValueError(f"{root}: no images in {split}; check its annotation file")

    def __len__(self):
        return len(self.index)

    def __getitem__(self, key) -> Sample:
        """By `index` or (epoch, index[, seed]); what is random depends on the key alone."""
        epoch, index, seed = (*key, 0)[:3] if isinstance(key, tuple) else (0, key, 0)
        index = range(len(self))[index]
        if self.transform is None:
            return self._load(index)
        rng, faults = np.random.default_rng((seed, epoch, index)), []
        for step in range(min(len(self), 50)):
            try:
                return self._load((index + step) % len(self), rng)._replace(faults=faults)
            except (ValueError, OSError) as error:
                faults.append(one_line(error))
        raise ValueError(f"{faults[0]} (and the {len(faults) - 1} images after it)")

    def _load(self, index, rng=None):
        i, source = int(self.index[index]), self.source
        where = source.images.where(source.members[i])
        target = source.target(i, crowd=rng is None)
        hw, shrink = tuple(target.ids.shape[1:]), 1
        if rng is not None:
            if len(self.hidden):
                target = target.keep(~np.isin(target.labels.numpy(), self.hidden))
            window, target = self.transform.place(target, rng)
            shrink = window.shrink
        picture = oriented(open_picture(source.images.read(source.members[i]), where, shrink), hw, where)
        if rng is None:
            image = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()  # (3, H, W)
        else:
            image = torch.from_numpy(self.transform.cut_picture(window, picture, rng))
        return Sample(image, target, source.names[i].decode(), int(source.image_ids[i]))

    def class_counts(self) -> np.ndarray:
        """Segments of each class in this split, int64 (K,); from the cached arrays where there is a JSON."""
        image, label = self.source.labels()
        return np.bincount(label[np.isin(image, self.index)], minlength=len(self.task.vocabulary.ids))


# ---- Batches -----------------------------------------------------------------------------------------------
@dataclass
class Batch:
    """Images uint8 (B,3,S,S), B targets and names, and the faults met on the way."""

    images: Tensor
    targets: list[Target]
    names: list[str]
    faults: list[str]
    packed: list  # as `pack` made it


def pack(samples: Sequence[Sample], prepare=None) -> tuple:
    """Samples -> the form that leaves a worker: few tensors, as each costs a file descriptor, often of 1024.
    Pixels uint8 (bytes,): images, then id maps; numbers float64 (T_all, 5): layer, value, label, crowd, area;
    the shapes of the pixels; T of each sample; its (name, image_id, faults). `prepare` makes other images."""
    targets = [s.target for s in samples]
    maps = [prepare(s.image) if prepare else s.image for s in samples] + [t.ids for t in targets]
    columns = [(t.layer, t.value, t.labels, t.crowd, t.area) for t in targets]
    rows = [torch.stack([column.double() for column in five], 1) for five in columns]
    pixels = torch.empty(0, dtype=torch.uint8)
    if torch.utils.data.get_worker_info():  # made where it is sent from: a copy less, no holes in the heap
        pixels.set_(torch.UntypedStorage._new_shared(sum(m.numel() for m in maps)))
    torch.cat([m.flatten() for m in maps], out=pixels)
    return (pixels, torch.cat(rows), [tuple(m.shape) for m in maps],
            [len(t.labels) for t in targets], [(s.name, s.image_id, s.faults) for s in samples])


def unpack(packed: tuple) -> list[Sample]:
    """The samples back; pixels are views."""
    pixels, numbers, shapes, counts, rest = packed
    flat = pixels.split([math.prod(shape) for shape in shapes])
    maps = [part.view(*shape) for part, shape in zip(flat, shapes, strict=True)]
    samples = []
    for k, rows in enumerate(numbers.split(counts)):
        layer, value, labels = rows[:, :3].long().unbind(1)
        target = Target(maps[len(counts) + k], layer, value, labels, rows[:, 3].bool(), rows[:, 4])
        samples.append(Sample(maps[k], target, *rest[k]))
    return samples


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one size -> a batch."""
    return _batch(pack(samples))


def _batch(packed):
    samples, pixels, shape = unpack(packed), packed[0], packed[2][0]
    images = pixels[:len(samples) * math.prod(shape)].view(-1, *shape)  # (B, 3, S, S)
    faults = [fault for s in samples for fault in s.faults]
    return Batch(images, [s.target for s in samples], [s.name for s in samples], faults, list(packed))


def staged(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on `device`; to a GPU each is copied while the one before is worked on."""
    if device.type != "cuda":
        yield from batches
        return
    copies, ready = torch.cuda.Stream(device), None
    for batch in itertools.chain(batches, (None,)):
        if packed := ready:
            torch.cuda.current_stream(device).wait_stream(copies)
            for tensor in packed[:2]:
                tensor.record_stream(torch.cuda.current_stream(device))  # its memory is free after that
        with torch.cuda.stream(copies):  # two copies, however many targets there are
            ready = batch and [t.to(device, non_blocking=True) for t in batch.packed[:2]] + batch.packed[2:]
        if packed:
            yield _batch(packed)


def positions(n: int, batch_size: int, seed: int, step: int) -> list[tuple[int, int, int]]:
    """Keys (epoch, index, seed) of one global step; every epoch is a permutation f(seed, epoch).
    The remainder of an epoch is dropped if n >= batch_size; smaller sets run on through permutations."""
    length = n - n % batch_size or n  # of an epoch
    places = [divmod(p, length) for p in range(step * batch_size, (step + 1) * batch_size)]
    order = {epoch: np.random.default_rng((seed, epoch)).permutation(n) for epoch in dict(places)}
    return [(epoch, int(order[epoch][at]), seed) for epoch, at in places]


def one_line(error: BaseException) -> str:
    """The line a script ends with. Torch's signal handler tells of a killed data process at any moment."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror.lower()}"
    if isinstance(error, torch.OutOfMemoryError):
        text = f"{'. '.join(text.split('. ')[:2])}; lower --device-batch-size or --size, or use --recompute"
    if text.startswith("DataLoader worker"):
        text = f"a data worker died ({text}); use fewer --workers, or more memory"
    return text


class Arguments(argparse.ArgumentParser):
    """A command line whose mistakes are a ValueError: one line from `command`, with exit code 1."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message):
        word = message.removeprefix("unrecognized arguments: ").split("=")[0].split(" ")[0]
        near = difflib.get_close_matches(word, self._option_string_actions, 1)
        raise ValueError(f"{message}; {f'did you mean {near[0]}?' if near else '--help lists the options'}")


def command(work, argv: Sequence[str]):
    """`work(argv)` of a script: a user's mistake ends in one line and exit code 1; --debug shows where."""
    try:
        return work(argv)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if "--debug" in argv:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _deaf(worker: int):
    """A data process outlives Ctrl-C and a signal to the whole group: its parent ends it, after saving.
    SIGTERM is also how torch and Python end a process whose queue is gone, so it is only put off."""
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))  # 0: else torch raises in the parent
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _packs(dataset, keys, workers, context=None, pin=False, work=pack):
    """The samples of each list of keys as `work` packs them; a fault in a data process ends in one line."""
    batches = torch.utils.data.DataLoader(
        dataset, batch_sampler=keys, collate_fn=work, num_workers=workers, pin_memory=pin,
        worker_init_fn=_deaf, multiprocessing_context=context if workers else None)
    if not workers:
        yield from batches
        return
    stream = iter(batches)
    end = weakref.WeakMethod(stream.__del__)  # who ends amid the batches shall not wait GRACE seconds
    atexit.register(lambda: (stop := end()) and stop())
    try:
        yield from stream
    except (ValueError, RuntimeError, OSError, EOFError) as error:
        if "in DataLoader worker process" in str(error):  # the data set's own, with a traceback before it
            error.__traceback__ = None  # its frames hold the stream and so the processes, while it is kept
            raise ValueError(str(error).strip().splitlines()[-1].split("Error: ", 1)[-1]) from None
        time.sleep(1)  # torch's signal handler also raises: let it do so here, not amid the caller's clean-up
        reason = str(error).strip().removeprefix("DataLoader worker") or type(error).__name__
        raise RuntimeError(f"DataLoader worker {reason}") from None
    finally:
        del stream


def loader(dataset: SegmentDataset, batch_size: int, steps: int, seed: int = 0, start_step: int = 0,
           rank: int = 0, world: int = 1, device_batch: int | None = None, workers: int = 0,
           context: str | None = None, pin: bool = False) -> Iterator[Batch]:
    """Micro-batches of `rank` for the global steps start_step..steps-1, in order.
    `batch_size` counts all ranks and micro-batches: micro-batch m of rank r takes the device_batch positions
    from (m * world + r) * device_batch of its step, so neither split nor workers change what a step sees."""
    device_batch = device_batch or max(1, batch_size // world)
    if batch_size % (world * device_batch):
        need = f"a multiple of {world} ranks x {device_batch} (--device-batch-size)"
        raise ValueError(f"--batch-size {batch_size}: cannot be split; make it {need}")
    every = (positions(len(dataset), batch_size, seed, step) for step in range(start_step, steps))
    firsts = range(rank * device_batch, batch_size, world * device_batch)
    keys = (step[first:first + device_batch] for step in every for first in firsts)
    return map(_batch, _packs(dataset, keys, workers, context, pin))


def eval_loader(dataset: SegmentDataset, rank: int = 0, world: int = 1, workers: int = 0,
                batch_size: int = 1, limit: int | None = None, prepare=None) -> Iterator[list[Sample]]:
    """Lists of up to `batch_size` samples, each of its own size: images rank, rank + world, and on; `prepare`
    works in the data processes."""
    mine = range(len(dataset))[:limit][rank::world]
    keys = [mine[first:first + batch_size] for first in range(0, len(mine), batch_size)]
    return map(unpack, _packs(dataset, keys, workers, work=partial(pack, prepare=prepare)))


# ---- The procedural world: things (colour x shape) over stuff (ground x pattern), as official COCO zips ----
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 230), "yellow": (235, 220, 50),
           "white": (245, 245, 245), "gray": (105, 105, 105), "brown": (125, 80, 35), "teal": (20, 110, 110)}


def _outline(shape, radius, angle):
    """Corners (P,2) of a thing around the origin."""
    if shape in ("disc", "ring"):
        turn = np.arange(24) * 2 * np.pi / 24
        return radius * np.stack([np.cos(turn), np.sin(turn)], 1)  # (24, 2)
    if shape == "cross":  # an x
        angle += np.pi / 4
        corners = np.array([(1, 1), (1, 3.5), (-1, 3.5), (-1, 1), (-3.5, 1), (-3.5, -1), (-1, -1), (-1, -3.5),
                            (1, -3.5), (1, -1), (3.5, -1), (3.5, 1)]) / 3  # (12, 2)
    else:
        sides = (1.3, 0.45) if shape == "bar" else (0.45, 1.3)
        corners = np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)]) * sides  # (4, 2)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return radius * corners @ turn  # (P, 2)


def _thing_mask(shape, size, scale, rng):
    """Bool (H,W) of one thing near a grid of 8 pixels, where a small model finds it easily."""
    corners = _outline(shape, scale * rng.uniform(11, 13), rng.uniform(-0.1, 0.1))
    at = 8 * rng.integers(1, size // 8, 2) + rng.uniform(-1, 1, 2)
    mask = Image.new("L", (size, size))
    draw = ImageDraw.Draw(mask)
    draw.polygon([tuple(p) for p in corners + at], fill=1)
    if shape == "ring":
        draw.polygon([tuple(p) for p in 0.5 * corners + at], fill=0)
    return np.asarray(mask) > 0


def draw_scene(rng: np.random.Generator, vocabulary: Vocabulary, allowed: Sequence[int], size=64, things=4):
    """Image uint8 (H,W,3), map (H,W) of 0 = void and 1.. = segments, (class, crowd) of each segment.
    One or two stuff halves, one to `things` things, at times a crowd of 4 small ones; slivers become void."""
    stuff, kinds = ([k for k in allowed if vocabulary.thing[k] == flag] for flag in (False, True))
    y, x = np.mgrid[:size, :size]
    angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(-0.22, 0.22) * size
    far = ((x - size / 2) * np.cos(angle) + (y - size / 2) * np.sin(angle) > offset) & (rng.random() > 0.4)
    index, image, segments = 1 + far.astype(np.int64), np.zeros((size, size, 3)), []  # (H, W), (H, W, 3)
    for k in rng.choice(stuff, 2, replace=False):
        colour, pattern = vocabulary.names[k].split()
        u, v = (x + rng.integers(8), y + rng.integers(8))[::rng.choice((1, -1))]
        dark = {"stripes": u % 6 < 3, "dots": (u % 6 - 2.5) ** 2 + (v % 6 - 2.5) ** 2 < 3.5,
                "bricks": (v % 6 == 0) | ((u + v // 6 * 4) % 8 == 0)}[pattern]  # (H, W)
        shade = np.where(dark, 0.45, 1.1)[..., None]  # (H, W, 1)
        segments.append((int(k), 0))
        image = np.where((index == len(segments))[..., None], np.array(COLOURS[colour]) * shade, image)
    for _ in range(rng.integers(1, things + 1)):
        k, crowd = int(rng.choice(kinds)), int(rng.random() < 0.02)
        colour, shape = vocabulary.names[k].split()
        masks = [_thing_mask(shape, size, 0.5 if crowd else 1.0, rng) for _ in range(4 if crowd else 1)]
        mask = np.logical_or.reduce(masks)  # (H, W)
        segments.append((k, crowd))
        image[mask] = np.array(COLOURS[colour]) * rng.uniform(0.8, 1.05)
        index[mask] = len(segments)
    image = np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
    small = np.bincount(index.ravel(), minlength=len(segments) + 1) < [0, 60, 60] + [30] * (len(segments) - 2)
    return image, np.where(small[index], 0, index), segments


def _annotate(index, segments, vocabulary, image_id, rng):
    """Panoptic ids (H,W), their segments_info, and the instance annotations (RLE) of the things."""
    ids = np.concatenate(([0], rng.choice(4096, len(segments), replace=False) << 12 | 1))  # uses all 3 bytes
    infos, instances = [], []
    for t, (k, crowd) in enumerate(segments, 1):
        mask = index == t  # (H, W)
        if not mask.any():
            continue
        left, top, right, bottom = Image.fromarray(mask).getbbox()
        infos.append({"id": int(ids[t]), "category_id": vocabulary.ids[k], "iscrowd": crowd,
                      "area": int(mask.sum()), "bbox": [left, top, right - left, bottom - top]})
        if vocabulary.thing[k]:
            ends = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False, append=not mask[-1, -1]))
            outline = {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()}
            instances.append(infos[-1] | dict(id=image_id * 100 + t, image_id=image_id, segmentation=outline))
    return ids[index], infos, instances


def _write_split(root, split, count, vocabulary, allowed, rng, size):
    """Write one split's image zip; return its zip of panoptic PNGs (bytes), panoptic and instance JSON."""
    images, panoptic, instances, nested = [], [], [], io.BytesIO()
    with zipfile.ZipFile(root / f"{split}2017.zip", "w") as photos, zipfile.ZipFile(nested, "w") as pngs:
        for n in range(1, count + 1):
            image, index, segments = draw_scene(rng, vocabulary, allowed, size)
            ids, infos, things = _annotate(index, segments, vocabulary, n, rng)
            with photos.open(f"{split}2017/{n:012}.jpg", "w") as file:
                Image.fromarray(image).save(file, "JPEG", quality=95, subsampling=0)  # keeps the hue
            with pngs.open(f"panoptic_{split}2017/{n:012}.png", "w") as file:
                write_ids(ids, file)
            images.append({"id": n, "file_name": f"{n:012}.jpg", "height": size, "width": size})
            panoptic.append({"image_id": n, "file_name": f"{n:012}.png", "segments_info": infos})
            instances += things
    rows = zip(vocabulary.ids, vocabulary.names, vocabulary.thing, strict=True)
    categories = [{"id": i, "name": name, "isthing": int(thing)} for i, name, thing in rows]
    tables = [{"images": images, "categories": categories, "annotations": a} for a in (panoptic, instances)]
    return nested.getvalue(), *tables


def write_shapes(root: str | Path, vocabulary: Vocabulary, train: int = 2000, val: int = 200, seed: int = 0,
                 train_classes: Sequence[int] | None = None, size: int = 64) -> None:
    """Write the world's four official zips into `root`; training images show only `train_classes`, if given.
    Names in `vocabulary` are a colour and a shape or pattern: "red disc", "gray stripes"."""
    root, every = Path(root), range(len(vocabulary.names))
    root.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root / "panoptic_annotations_trainval2017.zip", "w") as panoptic_zip, \
            zipfile.ZipFile(root / "annotations_trainval2017.zip", "w", zipfile.ZIP_DEFLATED) as instance_zip:
        for number, (split, count) in enumerate((("train", train), ("val", val))):
            allowed = every if split == "val" or train_classes is None else train_classes
            rng = np.random.default_rng((seed, number))
            pngs, panoptic, instances = _write_split(root, split, count, vocabulary, allowed, rng, size)
            panoptic_zip.writestr(f"annotations/panoptic_{split}2017.zip", pngs)
            panoptic_zip.writestr(f"annotations/panoptic_{split}2017.json", json.dumps(panoptic))
            instance_zip.writestr(f"annotations/instances_{split}2017.json", json.dumps(instances))


# ---- The check of a data folder ----------------------------------------------------------------------------
def check(root: str | Path, task: Task | str = "auto", split: str = "val", decode: bool = False) -> list[str]:
    """Everything wrong with one split, one line each; `decode` also reads every picture and mask."""
    try:
        task = find_task(root, task)
        problems = SOURCES[task.layout](root, task, split).problems
        dataset = SegmentDataset(root, task, split) if decode and not problems else []
    except (ValueError, OSError) as error:
        return [one_line(error)]
    for index in range(len(dataset)):
        try:
            dataset[index]
        except (ValueError, OSError) as error:
            problems.append(one_line(error))
    return problems


def grid(dataset: SegmentDataset, count: int = 8, height: int = 200) -> Image.Image:
    """The first images, each beside its segments in random colours, two pairs a row."""
    tiles = []
    for index in range(min(count, len(dataset))):
        sample = dataset[index]
        painted = photo = sample.image.permute(1, 2, 0).numpy()  # (H, W, 3)
        for number, ids in enumerate(sample.target.ids.numpy()):
            colours = np.random.default_rng(number).integers(40, 256, (256, 3))  # (256, 3)
            painted = np.where(ids[..., None] > 0, 0.4 * painted + 0.6 * colours[ids], painted)  # (H, W, 3)
        pair = Image.fromarray(np.concatenate([photo, painted.astype(np.uint8)], 1))
        width = min(max(pair.width * height // pair.height, height // 5), 10 * height)  # 1 x 1500 was GBs
        tiles.append(pair.resize((width, height)))
    width = max(tile.width for tile in tiles)
    page = Image.new("RGB", (2 * width, (len(tiles) + 1) // 2 * height))
    for number, tile in enumerate(tiles):
        page.paste(tile, (number % 2 * width, number // 2 * height))
    return page


def main(argv: Sequence[str]) -> int:
    parser = Arguments(description="Check a data folder, draw some of it.")
    parser.add_argument("path", help="folder (or zip) that holds the data")
    parser.add_argument("--task", default="auto", help=f"auto, {', '.join(TASKS)}")
    parser.add_argument("--split", default="train,val", help="splits to check, with a comma")
    parser.add_argument("--decode", action="store_true", help="also decode every image and mask")
    parser.add_argument("--out", default="data_check.png", help="picture to write")
    args = parser.parse_args(argv)
    splits, out, page, wrong = args.split.split(","), Path(args.out), None, 0
    if not {"train", "val"}.issuperset(splits):
        raise ValueError(f"--split {args.split}: unknown; give train, val or train,val")
    if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise ValueError(f"--out {out}: no folder to write in; make it (mkdir -p), or give another path")
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out {out}: not the name of a picture; end it in .png or .jpg")
    task = find_task(args.path, args.task)
    print(f"{args.path}: {task.name}, {task.kind}, {len(task.vocabulary.names)} classes")
    for split in splits:
        wrong += len(problems := check(args.path, task, split, args.decode))
        sys.stderr.writelines(f"error: {line}\n" for line in problems)
        if not problems:
            dataset = SegmentDataset(args.path, task, split)
            print(f"{split}: {len(dataset)} images" + (", all decoded" if args.decode else ", not decoded"))
            if args.decode and (rare := np.flatnonzero(dataset.class_counts() == 0)).size:
                print(f"{split}: no segment of {'; '.join(task.vocabulary.names[k] for k in rare)}")
            page = page or grid(dataset)
    if page:
        page.save(args.out)
        print(f"wrote {args.out}")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
