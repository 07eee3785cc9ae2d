"""Resuming equals never having stopped, bit by bit; signals; what a killed save leaves behind."""

# SPDX-License-Identifier: MIT
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch

import eomt
import train

from .test_train import ROOT, TINY, run, shapes, short_run  # noqa: F401 (fixtures)


def weights(folder):
    return eomt.read(folder)[1]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_bitwise(short_run, shapes, tmp_path, workers):  # noqa: F811
    """Stopped in the middle of an epoch and resumed with other workers: the same weights and optimiser."""
    out, _ = short_run
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "step-00000004")
    shutil.rmtree(copy / "best")
    done = run("train.py", *TINY, "--data", shapes, "--out", copy, "--resume", "--workers", workers)
    assert done.returncode == 0 and "resumed" in done.stdout, done.stderr
    assert same(weights(out / "step-00000004"), weights(copy / "step-00000004"))
    a, b = (
        torch.load(f / "step-00000004" / "resume.pt", weights_only=True)["optimizer"]["state"]
        for f in (out, copy)
    )
    assert all(torch.equal(a[i][k], b[i][k]) for i in a for k in a[i])


def test_resume_skips_damaged(short_run, shapes, tmp_path):  # noqa: F811
    """One flipped byte in the newest checkpoint: a warning, the one before is taken; named, an error."""
    out, _ = short_run
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    path = copy / "step-00000004" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="changed since it was written"):
        eomt.load(copy / "step-00000004")
    done = run("train.py", *TINY, "--data", shapes, "--out", copy, "--resume")
    assert done.returncode == 0 and "warning" in done.stdout and "resumed" in done.stdout
    assert same(weights(out / "step-00000004"), weights(copy / "step-00000004"))


def test_sigterm_saves_and_resumes(short_run, shapes, tmp_path):  # noqa: F811
    argv = [
        *TINY,
        "--data",
        str(shapes),
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "400",
        "--save-every",
        "1000",
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *argv],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 143 and "stopped by a signal" in rest
    steps = train.run_steps(tmp_path / "run")
    assert len(steps) == 1 and eomt.damaged(steps[0]) is None
    stopped = int(steps[0].name[5:])
    straight = run(
        "train.py", *argv[:-4], "--steps", 400, "--save-every", 1000, "--out", tmp_path / "other", "--dry-run"
    )
    assert straight.returncode == 0 and 3 <= stopped < 400


def test_killed_save_leaves_no_litter(short_run, shapes, tmp_path):  # noqa: F811
    """What kill -9 can leave: a half-written temporary, and best/ moved aside; the next start tidies both."""
    copy = tmp_path / "run"
    shutil.copytree(short_run[0], copy)
    (copy / ".tmp-step-00000006").mkdir()
    (copy / ".tmp-step-00000006" / "model.safetensors").write_bytes(b"half")
    os.rename(copy / "best", copy / ".old-best")
    train.tidy(copy)
    assert not list(copy.glob(".*")) and (copy / "best" / "model.safetensors").exists()


def test_kill_at_every_file_operation(tmp_path, monkeypatch):
    """A save is cut before its k-th file operation, for every k: a whole checkpoint is always there."""
    cfg, _ = train.parse([*TINY, "--out", str(tmp_path)])
    model = eomt.EoMT(eomt.ViT(16, 2, 2, 8, (2, 2)), 3, 2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    out = tmp_path / "run"
    train.save_checkpoint(out / "step-00000001", model, optimizer, cfg, 1, {})
    train.save_checkpoint(out / "best", model, optimizer, cfg, 1, {}, resumable=False)

    class Killed(BaseException):
        pass

    def cut(k, work):
        count = [0]

        def guarded(real):
            def call(*args, **kwargs):
                count[0] += 1
                if count[0] == k:
                    raise Killed
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as m:
            for owner, name in (
                (os, "rename"),
                (os, "fsync"),
                (os, "open"),
                (torch, "save"),
                (eomt, "save"),
                (eomt, "sha256"),
                (shutil, "rmtree"),
            ):
                m.setattr(owner, name, guarded(getattr(owner, name)))
            try:
                work()
                return True
            except Killed:
                return False

    for name, resumable in (("step-00000002", True), ("best", False)):
        k, finished = 0, False
        while not finished:
            k += 1
            assert k < 200
            save = partial(train.save_checkpoint, out / name, model, optimizer, cfg, 2, {}, resumable)
            finished = cut(k, save)
            train.tidy(out)
            whole = [f for f in (*train.run_steps(out), out / "best") if f.exists()]
            assert (out / "best").exists() and all(eomt.damaged(f) is None for f in whole)
            assert (out / "step-00000001").exists() and not list(out.glob(".tmp-*"))
        assert k > 8
