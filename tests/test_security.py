"""Nothing in a file of others runs, and nothing is written outside: pickles, archives, JSON, links, names."""

# SPDX-License-Identifier: MIT
import ast
import builtins
import io
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import data
import eomt
import eval as evaluation
import train

from .test_checkpoint import in_child, parts, save  # noqa: F401 (fixture)
from .test_layout import MODULES, ROOT
from .test_resume import STEPS, Run
from .test_train import shapes  # noqa: F401 (fixture)


# ---- pickles that hold code --------------------------------------------------------------------------------
class Calls:
    """Pickles as a call: `function(*arguments)` runs in whoever loads it carelessly."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(mark):
    """Names and objects whose loading would create the file `mark`."""
    shell = f"touch {mark}"
    return {
        "exec": Calls(exec, f"open({str(mark)!r}, 'w').close()"),
        "eval": Calls(eval, f"open({str(mark)!r}, 'w')"),
        "system": Calls(os.system, shell),
        "popen": Calls(subprocess.Popen, ["touch", str(mark)]),
        "open": Calls(open, str(mark), "w"),
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "import": Calls(__import__, "antigravity"),
        "pathlib": Calls(Path.touch, mark),
        "rebuild": Calls(torch.hub.load, "a/b", "c"),
        "torch.load": Calls(torch.load, str(mark)),
        "class": Calls(subprocess.Popen),
    }


def weight_files(folder, value):
    """Every way in which a pickle may be the weights, or lie among them."""
    good = torch.zeros(2)
    for name, content in (
        ("value", {"network.q.weight": value}),
        ("whole", value),
        ("key", [value, good]),
        ("lightning", {"state_dict": {"q.weight": good}, "callbacks": value}),
    ):
        for suffix in ("bin", "ckpt", "pt", "pth"):
            torch.save(content, folder / f"{name}.{suffix}")
            yield folder / f"{name}.{suffix}"
    torch.save({"a": value}, folder / "old.bin", _use_new_zipfile_serialization=False)
    yield folder / "old.bin"
    (folder / "bare.bin").write_bytes(pickle.dumps({"a": value}))
    yield folder / "bare.bin"
    shutil.copy(folder / "value.bin", folder / "renamed.safetensors")
    yield folder / "renamed.safetensors"


def test_no_payload_runs(tmp_path):
    """Every payload in every kind of file: refused in one line, and nothing has happened."""
    mark, tried, refused = tmp_path / "mark", 0, 0
    watched = {"os.system", "subprocess.Popen", "exec", "os.posix_spawn", "os.exec", "socket.connect"}
    seen = []
    active = [True]

    def audit(event, arguments):
        if active[0] and event in watched and not (event == "exec" and "eomt" in str(arguments[0])):
            seen.append((event, str(arguments)[:100]))

    import safetensors  # noqa: F401 (importing executes modules; not while we watch)

    eomt.sha256(Path(__file__))
    with pytest.raises(ValueError):
        (tmp_path / "warm.bin").write_bytes(pickle.dumps(Calls(os.getcwd)))
        eomt.load(tmp_path / "warm.bin")
    sys.addaudithook(audit)
    try:
        for value in payloads(mark).values():
            for path in weight_files(tmp_path, value):
                seen.clear()
                with pytest.raises(ValueError) as caught:
                    eomt.load(path)
                text = str(caught.value)
                assert "\n" not in text and str(path) in text and not seen, (text, seen)
                tried, refused = tried + 1, refused + ("refused: holds code" in text)
                assert not mark.exists()
    finally:
        active[0] = False
    assert tried == 11 * 19 and refused >= 11 * 17, (
        tried,
        refused,
    )  # the rest: bytes that are no safetensors


def test_payload_runs_without_us(tmp_path):
    """The test above can fail: the same files, read carelessly, do run."""
    path = next(weight_files(tmp_path, payloads(tmp_path / "mark")["open"]))
    torch.load(path, weights_only=False)
    assert (tmp_path / "mark").exists()


def test_resume_file_with_code(parts, tmp_path):  # noqa: F811
    """A checkpoint from elsewhere with right sums: its optimiser state is data, or nothing."""
    cfg, model, kept = parts
    for value in payloads(tmp_path / "mark").values():
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        save(parts, tmp_path / "run", 1)
        folder = tmp_path / "run" / "step-00000001"
        torch.save(dict(optimizer=value, step=1), folder / "resume.pt")
        meta = json.loads((folder / "meta.json").read_text())
        meta["sha256"]["resume.pt"] = eomt.sha256(folder / "resume.pt")
        del meta["own_sha256"]  # as in older ones; whoever forges the other sums can leave it out
        (folder / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(ValueError, match=r"resume\.pt: refused: holds code"):
            train.resume(tmp_path / "run", model, kept, cfg, print)
        assert not (tmp_path / "mark").exists()
    for content in ([1], {"step": 1}, {"optimizer": {}, "step": 1, "more": 2}):
        torch.save(content, folder / "resume.pt")
        meta["sha256"]["resume.pt"] = eomt.sha256(folder / "resume.pt")
        (folder / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(ValueError, match=r"resume\.pt: not what train\.py writes"):
            train.resume(tmp_path / "run", model, kept, cfg, print)


def test_scripts_refuse_code(shapes, tmp_path):  # noqa: F811
    """As a user meets it: exit 1, one line, no score, no payload."""
    mark = tmp_path / "mark"
    torch.save({"network.q.weight": payloads(mark)["system"]}, tmp_path / "evil.bin")
    for argv, main in (
        (["--ckpt", tmp_path / "evil.bin", "--data", shapes], evaluation.main),
        ([*STEPS, "--data", shapes, "--out", tmp_path / "r", "--init", tmp_path / "evil.bin"], train.main),
    ):
        run = Run(tmp_path / "x", *argv, main=main)
        assert run.wait() == [1] and not mark.exists()
        assert re.fullmatch(r"error: \S+evil.bin: refused: holds code; .*", run.text().splitlines()[-1])


# ---- archives, JSON, links, names --------------------------------------------------------------------------
def test_weight_bombs_in_bounded_memory(tmp_path):
    """Small files that unpack to hundreds of times their size: refused under a limit of memory."""
    torch.save({"q.weight": torch.zeros(4)}, tmp_path / "small.bin")
    with zipfile.ZipFile(tmp_path / "small.bin") as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, content in members.items():
            with file.open(name, "w") as member:
                if name.endswith("data/0"):
                    for _ in range(600):
                        member.write(bytes(1 << 20))
                else:
                    member.write(content)
    (tmp_path / "m").mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        with open(tmp_path / "m" / name, "wb") as file:
            file.truncate(3 << 30)  # sparse: no room on the disk
    assert (tmp_path / "bomb.bin").stat().st_size < 1 << 23

    def child():
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 28), now + (1 << 28)))
        for path in (tmp_path / "bomb.bin", tmp_path / "m"):
            try:
                eomt.load(path)
                os._exit(3)
            except ValueError as error:
                assert str(tmp_path) in str(error) and "\n" not in str(error), error

    assert in_child(child) == 0


def test_nothing_is_written_outside(shapes, tmp_path, monkeypatch):  # noqa: F811
    """Members named as paths elsewhere: listed under no name that leaves the archive, never written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = shutil.copytree(shapes, tmp_path / "coco")
    with zipfile.ZipFile(root / "train2017.zip", "a") as file:
        for name in (
            "../../escaped",
            "/tmp/escaped-absolute",
            "a/../../escaped",
            "C:\\escaped",
            "train2017/../x",
        ):
            file.writestr(name, b"x")
        link = zipfile.ZipInfo("train2017/link.jpg")
        link.external_attr = 0o120777 << 16  # a symbolic link
        file.writestr(link, "/etc/passwd")
    opened = []
    active = [True]

    def audit(event, arguments):
        if active[0] and event == "open" and isinstance(arguments[0], str) and "w" in (arguments[1] or ""):
            opened.append(arguments[0])

    sys.addaudithook(audit)
    try:
        dataset = data.SegmentDataset(root, "shapes", "train", data.Augment(64))
        list(data.loader(dataset, 4, 2))
    finally:
        active[0] = False
    assert not [name for name in opened if not name.startswith(str(tmp_path))], opened
    assert not list(tmp_path.rglob("*escaped*")) and not Path("/tmp/escaped-absolute").exists()


def test_links_in_a_run_folder(parts, tmp_path):  # noqa: F811
    """Cleaning follows no link; a dangling one and a loop are no checkpoint."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("1")
    out = tmp_path / "run"
    save(parts, out, 1)
    os.symlink(precious, out / ".tmp-step-00000009")
    os.symlink(precious, out / ".old-step-00000001")
    os.symlink(out / "loop", out / "loop")
    os.symlink(tmp_path / "gone", out / "best")
    train.tidy(out)
    assert (precious / "file").exists() and eomt.find(out).parent.name == "step-00000001"
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        eomt.load(out / "loop")
    assert "\n" not in str(caught.value)


def test_deep_json_of_a_run(parts, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    for step in (1, 2):
        save(parts, out, step)
    for text in ("[" * 200000, '{"sha256": ' + '{"a":' * 100000, '{"sha256": {"../../x": "0"}}'):
        (out / "step-00000002" / "meta.json").write_text(text)
        assert eomt.find(out).parent.name == "step-00000001"


# ---- our own source ----------------------------------------------------------------------------------------
def test_no_dangerous_module_outside_named_places():
    """Network only to fetch weights by name, processes only to ask git, pickle only for its error class."""
    allowed = {
        "eomt.py": {"huggingface_hub", "pickle"},
        "train.py": {"subprocess", "wandb"},
        "siglip2.py": {"huggingface_hub"},
    }
    risky = {
        "socket",
        "urllib",
        "requests",
        "http",
        "ftplib",
        "subprocess",
        "pickle",
        "marshal",
        "shelve",
        "ctypes",
        "huggingface_hub",
        "wandb",
        "importlib",
        "code",
        "pty",
        "xmlrpc",
        "dill",
        "cloudpickle",
        "joblib",
    }
    for name in MODULES:
        if name == "bench.py":  # looks for rivals to race against
            continue
        tree = ast.parse((ROOT / name).read_text())
        used = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                used.add(node.module.split(".")[0])
        assert used & risky <= allowed.get(name, set()), (name, used & risky)
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {
            "eval",
            "exec",
            "compile",
            "__import__",
            "os.system",
            "os.popen",
            "pickle.load",
            "pickle.loads",
            "pickle.Unpickler",
            "torch.hub.load",
            "zipfile.extractall",
        }, name
        assert not [call for call in calls if call.endswith((".extractall", ".extract"))], name
        assert not any(
            isinstance(node, ast.Name)
            and node.id in ("eval", "exec")
            and hasattr(builtins, node.id)
            and isinstance(node.ctx, ast.Load)
            for node in ast.walk(tree)
        ), name


def test_numpy_never_unpickles(tmp_path):
    """A cached index is read with allow_pickle off, numpy's default: no call turns it on."""
    for name in MODULES:
        assert "allow_pickle=True" not in (ROOT / name).read_text(), name
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, buffer)
    (tmp_path / "x.bin").write_bytes(buffer.getvalue())
    assert eomt.unpickle(tmp_path / "x.bin")["a"] == 0
