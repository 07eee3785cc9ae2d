"""Checkpoints survive a kill anywhere, full and read-only disks; what a run keeps and removes."""

# SPDX-License-Identifier: MIT
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eomt
import train

EVENTS = {"os.rename", "os.mkdir", "os.rmdir", "os.remove"}  # and "open" inside the run folder


@pytest.fixture(scope="module")
def parts():
    """(cfg, model, kept) with a filled optimiser state, small enough to be saved hundreds of times."""
    cfg, _ = train.parse(["--quick"])
    model = eomt.EoMT(eomt.ViT(16, 2, 2, 8, (2, 2)), 3, 2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    return cfg, model, {"optimizer": optimizer}


def save(parts, out, step):
    """What training does at step `step`: the weights say which it was."""
    cfg, model, kept = parts
    with torch.no_grad():
        model.q.weight.fill_(step)
    train.save_checkpoint(out / f"step-{step:08d}", model, kept, cfg, step, {})
    train.prune(out, step)


def save_best(parts, out, step):
    cfg, model, kept = parts
    with torch.no_grad():
        model.q.weight.fill_(step)
    train.save_checkpoint(out / "best", model, kept, cfg, step, {}, resumable=False)


def resumed(parts, out):
    """The step that the next start takes up, its weights looked at."""
    cfg, model, kept = parts
    train.tidy(out)
    with torch.no_grad():
        model.q.weight.zero_()
    step = train.resume(out, model, kept, cfg, lambda text: None)
    assert (model.q.weight == step).all()
    litter = {path.name for path in out.iterdir()} - {path.name for path in train.run_steps(out)}
    assert litter <= {"best", "filler"}, litter
    return step


def in_child(work):
    """Runs `work` in a fork of this process and returns how that ended: its exit code, or minus a signal."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        except OSError:
            code = 9
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(k, work):
    """`work` in a child that gets a real SIGKILL at its k-th file operation. True where it was killed.

    Operations: open, rename, remove, mkdir, rmdir (audit events), each fsync, and the moments
    after a file's content is written but not yet synced.
    """

    def child():
        count = [0]

        def tick():
            count[0] += 1
            if count[0] == k:
                os.kill(os.getpid(), signal.SIGKILL)

        def audit(event, arguments):
            if event in EVENTS or event == "open" and "pytest" in str(arguments[0]):
                tick()

        def ticking(real):
            def call(*args, **kwargs):
                tick()
                try:
                    return real(*args, **kwargs)
                finally:
                    tick()

            return call

        os.fsync, torch.save, eomt.save = ticking(os.fsync), ticking(torch.save), ticking(eomt.save)
        sys.addaudithook(audit)
        work()

    code = in_child(child)
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def test_kill_at_every_file_operation(parts, tmp_path):
    """A save and the removal of the oldest checkpoint: whichever operation is the last, a whole one is there,
    it is found at once, the next start resumes from it and removes the litter."""
    points = {}
    for name in ("first", "third", "again"):
        k, seen = 0, set()
        while True:
            k += 1
            out = tmp_path / f"{name}{k}"
            for step in () if name == "first" else (1, 2):
                save(parts, out, step)
            new = 2 if name == "again" else 3
            out.mkdir(exist_ok=True)
            cut = killed_at(k, lambda out=out, new=new: save(parts, out, new))
            if name != "first" or train.run_steps(out):
                assert eomt.damaged(eomt.find(out).parent) is None  # evaluation at this very moment
                assert eomt.read(out)[1]["q.weight"][0, 0] in (1 if name == "again" else 2, 2, 3)
            step = resumed(parts, out)
            assert step in ((0, 3) if name == "first" else (2, 3)), (k, step)
            seen.add(step)
            assert all(eomt.damaged(folder) is None for folder in train.run_steps(out))
            assert len(train.run_steps(out)) <= 3
            shutil.rmtree(out)
            if not cut:
                break
        assert seen == ({0, 3} if name == "first" else {2} if name == "again" else {2, 3})
        points[name] = k - 1
    assert all(count > 20 for count in points.values()), points


def test_kill_at_every_file_operation_of_best(parts, tmp_path):
    """best/ is replaced: at every moment one of the two whole ones is found, never a step's checkpoint."""
    k, found = 0, set()
    while True:
        k += 1
        out = tmp_path / str(k)
        save(parts, out, 1)
        save_best(parts, out, 7)
        cut = killed_at(k, lambda out=out: save_best(parts, out, 8))
        value = int(eomt.read(out)[1]["q.weight"][0, 0])
        assert resumed(parts, out) == 1
        assert int(eomt.read(out)[1]["q.weight"][0, 0]) == value and eomt.find(out).parent == out / "best"
        found.add(value)
        shutil.rmtree(out)
        if not cut:
            break
    assert found == {7, 8} and k > 20


def test_kill_amid_writing(parts, tmp_path):
    """The kernel ends the process at the n-th byte of a file (no handler, no clean-up), for many n."""
    out = tmp_path / "run"
    save(parts, out, 1)
    largest = max(path.stat().st_size for path in (out / "step-00000001").iterdir())
    ends = set()
    for size in [0, 1, 7, 8, 9, *range(500, largest, largest // 25), largest]:

        def child(size=size):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            save(parts, out, 2)

        ends.add(in_child(child))
        assert resumed(parts, out) == (2 if size == largest else 1), size
    assert ends == {-signal.SIGXFSZ, 0}


def test_power_cut_order(parts, tmp_path, monkeypatch):
    """Every file and the folder reach the disk before the rename, the name before anything old is removed."""
    out, log = tmp_path / "run", []
    for step in (1, 2):
        save(parts, out, step)
    real = dict(fsync=os.fsync, rename=os.rename, rmtree=shutil.rmtree)
    name = lambda path: str(Path(path).relative_to(out))  # noqa: E731
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (log.append(("sync", name(os.readlink(f"/proc/self/fd/{fd}")))), real["fsync"](fd)),
    )
    monkeypatch.setattr(
        os, "rename", lambda a, b: (log.append(("rename", name(a), name(b))), real["rename"](a, b))
    )
    monkeypatch.setattr(
        shutil,
        "rmtree",
        lambda path, **k: (
            log.append(("remove", name(path))) if Path(path).exists() else None,
            real["rmtree"](path, **k),
        ),
    )
    save(parts, out, 3)
    save_best(parts, out, 3)
    save_best(parts, out, 4)
    files = {f".tmp-step-00000003/{file}" for file in ("meta.json", "model.safetensors", "resume.pt")}
    at = log.index(("rename", ".tmp-step-00000003", "step-00000003"))
    assert {entry[1] for entry in log[:at]} == files | {".tmp-step-00000003"}
    assert log[at + 1 : at + 4] == [
        ("sync", "."),
        ("rename", "step-00000001", ".tmp-step-00000001"),
        ("remove", ".tmp-step-00000001"),
    ]
    assert log[-4:] == [
        ("rename", "best", ".old-best"),
        ("rename", ".tmp-best", "best"),
        ("sync", "."),
        ("remove", ".old-best"),
    ]


def test_full_disk_and_file_limit(parts, tmp_path):
    """A real full disk where this user may mount one, and a file-size limit: one line, the old ones whole,
    nothing left behind, and the next save works when there is room again."""
    out = tmp_path / "run"
    save(parts, out, 1)
    size = max(path.stat().st_size for path in (out / "step-00000001").iterdir())
    cfg, model, kept = parts

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1))
        save(parts, out, 2)

    assert in_child(limited) == 9  # an OSError, not a signal
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True
    )
    folders = [out]
    if mounted.returncode == 0:
        folders.append(disk)
        save(parts, disk, 1)
    try:
        for folder in folders:
            if folder == disk:
                (disk / "filler").write_bytes(
                    b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - 5000)
                )
                with pytest.raises(
                    OSError, match="step-00000002: cannot be written .*No space left on device.*; make room"
                ):
                    save(parts, folder, 2)
                assert {p.name for p in folder.iterdir()} == {"step-00000001", "filler"}
                assert resumed(parts, folder) == 1
                (disk / "filler").unlink()
            assert {p.name for p in folder.iterdir()} == {"step-00000001"} and resumed(parts, folder) == 1
            save(parts, folder, 2)
            assert resumed(parts, folder) == 2
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(disk)], check=True)


def test_read_only_folder_found_at_the_start(parts, tmp_path):
    """As another user when the tests run as root, whom permissions do not stop."""
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o555)
    for parent in [tmp_path, *tmp_path.parents]:
        if str(parent).startswith("/tmp/"):
            parent.chmod(0o755)

    def child():
        if os.getuid() == 0:
            os.setuid(65534)
        save(parts, tmp_path / "locked", 1)

    assert in_child(child) == 9
    assert not list((tmp_path / "locked").iterdir())


@pytest.mark.parametrize("mask,mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_follow_the_umask(parts, tmp_path, mask, mode):
    old = os.umask(mask)
    try:
        save(parts, tmp_path / "run", 1)
        train.replace(tmp_path / "run" / "summary.json", "{}")
    finally:
        os.umask(old)
    files = [*(tmp_path / "run" / "step-00000001").iterdir(), tmp_path / "run" / "summary.json"]
    assert len(files) == 4 and all(path.stat().st_mode & 0o777 == mode for path in files)


def test_last_two_and_best_are_kept(parts, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_bytes(b"1")
    for step in (1, 2, 3):
        save(parts, out, step)
        save_best(parts, out, 1)
    os.symlink(tmp_path / "elsewhere", out / "step-00000000")  # moved away by hand: never followed
    save(parts, out, 4)
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert names == {"step-00000003", "step-00000004", "best"}
    assert (tmp_path / "elsewhere" / "precious").exists()
    for folder in ("step-00000004", "best"):
        sums = json.loads((out / folder / "meta.json").read_text())["sha256"]
        assert set(sums) == {p.name for p in (out / folder).iterdir()} - {"meta.json"}


def flip(path, at=-20):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "file,fault",
    [
        ("model.safetensors", flip),
        ("resume.pt", flip),
        ("meta.json", lambda path: path.write_text("{")),
        ("meta.json", lambda path: path.unlink()),
        ("resume.pt", lambda path: path.unlink()),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("meta.json", lambda path: path.write_text("[" * 100000)),
    ],
)
def test_damage_takes_the_one_before(parts, tmp_path, file, fault):
    """The newest is passed over with a warning and goes at the next save, when there is a newer whole one."""
    cfg, model, kept = parts
    out, said = tmp_path / "run", []
    for step in (10, 20):
        save(parts, out, step)
    fault(out / "step-00000020" / file)
    assert train.resume(out, model, kept, cfg, said.append) == 10
    assert len(said) == 2 and f"step-00000020!{file}: " in said[0] and said[0].startswith("warning: ")
    save(parts, out, 12)
    assert [path.name for path in train.run_steps(out)] == ["step-00000012", "step-00000010"]
    assert resumed(parts, out) == 12
    for folder in train.run_steps(out):
        flip(folder / "model.safetensors")
    with pytest.raises(ValueError, match="none of its checkpoints is whole"):
        train.resume(out, model, kept, cfg, said.append)


def test_flipped_byte_of_a_record(parts, tmp_path):
    """Of meta.json: the checkpoint is passed over, or nothing has changed that matters; never the settings
    that the run is said to have been started with."""
    cfg, model, kept = parts
    for step in (1, 2):
        save(parts, tmp_path, step)
    path, steps = tmp_path / "step-00000002" / "meta.json", set()
    whole = path.read_bytes()
    for at in range(0, len(whole), 5):
        path.write_bytes(whole)
        flip(path, at)
        steps.add(step := train.resume(tmp_path, model, kept, cfg, str))
        assert (model.q.weight == step).all()
    assert 1 in steps
    record = json.loads(whole)  # of an older run
    del record["own_sha256"]
    path.write_text(json.dumps(record))
    assert train.resume(tmp_path, model, kept, cfg, str) == 2


@pytest.mark.parametrize("before,after", [(True, True), (True, False), (False, True)])
def test_gradient_scale_goes_on(parts, tmp_path, before, after):
    """fp16 goes on with the scale that it had found; --amp may change between a run and its resumption."""
    cfg, model, kept = parts
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**11, enabled=before)
    scaler.scale(torch.ones(1))
    save((cfg, model, kept | {"scaler": scaler}), tmp_path, 3)
    fresh = torch.amp.GradScaler("cpu", enabled=after)
    assert train.resume(tmp_path, model, kept | {"scaler": fresh}, cfg, print) == 3
    fresh.scale(torch.ones(1))
    assert fresh.get_scale() == ((2.0**11 if before else 2.0**16) if after else 1.0)


def test_summary_and_rows_survive_a_cut(tmp_path):
    """What a power cut leaves of the small files does not stop the next start; later rows are made again."""
    log = train.Log(tmp_path, 0)
    assert log.summary() == {}
    for text in ("", "{", "[1]", '{"best": 3.5}'):
        (tmp_path / "summary.json").write_text(text)
        assert log.summary() == ({"best": 3.5} if "best" in text else {}), text
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3}\n{"st'  # NaN: of an older run
    )
    log.rewind(2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n'
    log.record(step=3, loss=1.0)
    log.draw_curves()


@pytest.mark.parametrize("line", [b'{"step": 2,, "loss": 1.0}', b'{"stap": 2}', b"[2]", b"2", b"",
                                  b'{"step": "2"}', b'{"step": 2, "\xff": 1}', b"\0\0\0\0", b"[" * 100000])
def test_damaged_rows_are_named_and_left_out(tmp_path, capsys, line):
    log, path = train.Log(tmp_path, 0), tmp_path / "metrics.jsonl"
    rows = [b'{"step": 1, "loss": 3.25}', b'{"step": 3, "loss": 2.5}']
    path.write_bytes(b"\n".join([rows[0], line, rows[1], b'{"step": 4}', b""]))
    log.rewind(3)
    assert path.read_bytes() == b"\n".join([*rows, b""])
    assert capsys.readouterr().out == f"warning: {path}: line 2 is damaged; it is left out\n"
    log.draw_curves()


def test_numbers_that_are_none_are_null(tmp_path):
    """NaN and Infinity are no JSON; as null they come back, and are in no curve."""
    def strict(text):
        return json.loads(text, parse_constant=lambda word: pytest.fail(word))

    log = train.Log(tmp_path, 0)
    log.record(step=1, loss=float("nan"), lr=0.5, PQ=float("nan"))
    log.record(step=2, loss=2.0, grad=float("inf"))
    first, second = map(strict, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first == dict(step=1, loss=None, lr=0.5, PQ=None) and second == dict(step=2, loss=2.0, grad=None)
    log.draw_curves()
    log.rewind(2)
    assert strict((tmp_path / "metrics.jsonl").read_text().splitlines()[1]) == second
    (tmp_path / "summary.json").write_text('{"step": 3, "best": null}')
    assert log.summary() == dict(step=3, best=None)
