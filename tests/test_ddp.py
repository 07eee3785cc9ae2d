"""Two gloo ranks equal one process in training and evaluation; what they do when one stops, dies, hangs, is
not finite."""

# SPDX-License-Identifier: MIT
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import eomt
import eval as evaluation
import losses
import train

from .test_resume import STEPS, Run, rows, straight  # noqa: F401 (fixture)
from .test_train import ROOT, TINY, shapes  # noqa: F401 (fixture)


def two(out, shapes, *argv, patch=None):  # noqa: F811
    return Run(out, *STEPS, "--data", shapes, "--out", out, *argv, ranks=2, patch=patch)


def torchrun(out, shapes, *argv):  # noqa: F811
    """The real launcher, its output in a file."""
    head = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
        str(ROOT / "train.py"),
    ]
    log = open(out.with_suffix(".log"), "w")
    words = [*STEPS, "--data", shapes, "--out", out, *argv]
    return subprocess.Popen(
        [*head, *map(str, words)],
        stdout=log,
        stderr=log,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def until(out, words, seconds=60):
    path, end = out.with_suffix(".log"), time.monotonic() + seconds
    while words not in path.read_text():
        assert time.monotonic() < end, path.read_text()
        time.sleep(0.01)


def processes(out):
    """Ids of all processes of this run, but for zombies: ranks and data processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command, status = (path / "cmdline").read_bytes(), (path / "stat").read_text()
        except OSError:
            continue
        if str(out).encode() in command and b"torch.distributed.run" not in command and ") Z " not in status:
            found.append(int(path.name))
    return found


def test_annotations_are_parsed_once_a_machine(shapes, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def tell(rank):
        parse, *rest = data.PARSERS["panoptic"]
        data.PARSERS["panoptic"] = lambda table: print("parsed by", rank) or parse(table), *rest

    done = two(tmp_path / "run", shapes, patch=tell)
    assert done.wait() == [0, 0], done.text()
    assert done.text().count("parsed by") == 2, done.text()  # train and val


def test_bad_images_of_all_ranks_are_counted_once(shapes, tmp_path):  # noqa: F811
    def broken(rank):
        item = data.SegmentDataset.__getitem__
        faults = ["a.jpg: cut", f"b{rank}.jpg: cut"]
        data.SegmentDataset.__getitem__ = lambda self, key: item(self, key)._replace(
            faults=faults if self.transform else ())

    done = two(tmp_path / "run", shapes, "--workers", "0", "--max-bad", "3", patch=broken)
    assert done.wait() == [0, 0], done.text()
    assert " bad 3" in done.text() and done.text().count("a.jpg: cut") == 1
    done = two(tmp_path / "other", shapes, "--workers", "0", "--max-bad", "2", patch=broken)
    assert 1 in done.wait() and "3 undecodable training images, --max-bad is 2" in done.text()
    assert train.run_steps(tmp_path / "other")


@pytest.mark.parametrize("main", [train.main, evaluation.main])
def test_data_fault_is_the_same_line_on_all_ranks(straight, shapes, tmp_path, main):  # noqa: F811
    words = ["--ckpt", straight] if main is evaluation.main else STEPS
    done = Run(tmp_path / "run", *words, "--data", tmp_path / "no", ranks=2, main=main)
    assert done.wait() == [1, 1], done.text()
    lines = [line for line in done.text().splitlines() if line.startswith("error: ")]
    assert len(lines) == 2 and len(set(lines)) == 1 and str(tmp_path / "no") in lines[0], done.text()


@pytest.mark.parametrize("device_batch", [2, 1])
def test_training_two_ranks_equal_one(straight, shapes, tmp_path, device_batch):  # noqa: F811
    """Same seeds, same order, same random points: only the order of sums differs, also with accumulation."""
    run = two(tmp_path / "two", shapes, "--device-batch-size", device_batch)
    assert run.wait() == [0, 0], run.text()
    one, both = rows(straight), rows(tmp_path / "two")
    assert abs(one[0]["loss"] - both[0]["loss"]) < 1e-5 * one[0]["loss"]  # step 1: the same weights
    for a, b in list(zip(one, both, strict=True))[:4]:
        for key in ("loss", "mask", "dice", "class", "grad"):
            assert abs(a[key] - b[key]) <= 2e-3 * abs(a[key]), (key, a, b)


def test_evaluation_two_ranks_same_digits(straight, shapes, tmp_path):  # noqa: F811
    """7 images on 2 ranks, and 1 image on 2 ranks: no image twice or missing, equal JSON."""
    for limit in (0, 1):
        for ranks in (1, 2):
            argv = (
                "--ckpt",
                straight,
                "--data",
                shapes,
                "--workers",
                0,
                "--limit",
                limit,
                "--out",
                tmp_path / f"{limit}-{ranks}.json",
            )
            run = Run(tmp_path / "eval", *argv, ranks=ranks, main=evaluation.main)
            assert run.wait() == [0] * ranks, run.text()
            assert len(re.findall(r"^PQ ", run.text(), re.M)) == 1
        a, b = ((tmp_path / f"{limit}-{ranks}.json").read_text() for ranks in (1, 2))
        assert a == b and json.loads(a)["images"] == (limit or 7)


def test_evaluation_ends_when_one_rank_cannot_read(straight, shapes, tmp_path):  # noqa: F811
    """An undecodable image in the share of rank 1: no score from anyone, no waiting."""
    root = shutil.copytree(shapes, tmp_path / "coco")
    with zipfile.ZipFile(root / "val2017.zip") as file:
        info = file.infolist()[1]
    content = bytearray((root / "val2017.zip").read_bytes())
    content[info.header_offset + 30 + len(info.filename) + 200] ^= 255  # its sum no longer fits
    (root / "val2017.zip").write_bytes(content)
    run = Run(
        tmp_path / "eval", "--ckpt", straight, "--data", root, "--workers", 0, ranks=2, main=evaluation.main
    )
    codes = run.wait(30)
    assert all(codes) and "PQ" not in run.text() and f"val2017.zip!{info.filename}: " in run.text(), (
        run.text()
    )


def test_gradient_does_not_depend_on_split(shapes):  # noqa: F811
    """One step's gradient from a batch of 4, from 2 + 2 and from four singles, in this process."""
    cfg, _ = train.parse([*TINY, "--data", str(shapes), "--weight-decay", "0"])
    sets = data.SegmentDataset(shapes, data.TASKS["shapes"], "train", data.Augment(64, (0.8, 1.25), False))
    gradients = []
    for device_batch in (4, 2, 1):
        cfg.device_batch_size = device_batch
        model = train.make_model(cfg, data.TASKS["shapes"].vocabulary).train()
        trainer = train.Trainer(cfg, model, torch.device("cpu"))
        parts = list(data.loader(sets, 4, 1, 0, 0, device_batch=device_batch))
        assert len(parts) == trainer.accumulate
        norm, stopping = trainer.agree(parts, SimpleNamespace(signal=0))
        assert not stopping and norm[0] == sum(min(len(t.labels), 6) for part in parts for t in part.targets)
        for i, part in enumerate(parts):
            trainer.backward(0, i, part, norm)
        gradients.append({k: p.grad for k, p in model.named_parameters()})
    for other in gradients[1:]:
        for key, want in gradients[0].items():
            torch.testing.assert_close(
                other[key], want, rtol=1e-3, atol=1e-5 * want.abs().max().item() + 1e-9
            )


def test_ranks_exchange_gradients_once_a_step(shapes):  # noqa: F811
    """Not after every part: in forward and backward DDP is told so for all but the last."""
    cfg, _ = train.parse([*TINY, "--data", str(shapes), "--device-batch-size", "1"])
    trainer = train.Trainer(cfg, train.make_model(cfg, data.TASKS["shapes"].vocabulary), torch.device("cpu"))
    sets, seen = data.SegmentDataset(shapes, "shapes", "train", data.Augment(64)), []

    def look(*_):
        seen.append(trainer.model.require_backward_grad_sync)

    trainer.raw.register_forward_pre_hook(look)
    trainer.raw.q.weight.register_hook(look)  # backward
    for i, part in enumerate(data.loader(sets, 4, 1, device_batch=1)):
        trainer.backward(0, i, part, torch.ones(2))
    assert seen == [False, False] * 3 + [True, True]


# ---- Faults ------------------------------------------------------------------------------------------------
def test_signal_to_one_rank_stops_all(shapes, tmp_path):  # noqa: F811
    """Rank 1 alone is told: both agree, one checkpoint is saved, both end."""
    out = tmp_path / "run"
    run = two(out, shapes)
    run.until("step 6/")
    os.kill(run.pids[1], signal.SIGTERM)
    assert run.wait(20) == [143, 143], run.text()
    assert run.text().count("stopped by a signal at step") == 1
    assert eomt.damaged(train.run_steps(out)[0]) is None and train.run_steps(out)[0].name > "step-00000005"


def poison(rank, step=6, where=1):
    """From the next call on, the logits of rank `where` at `step` are NaN."""
    backward, criterion = train.Trainer.backward, losses.SetLoss.forward
    now = [None]

    def remember(self, number, *rest):
        now[0] = number
        return backward(self, number, *rest)

    def spoil(self, predictions, *rest):
        if rank == where and now[0] == step:
            predictions = [p._replace(masks=p.masks * torch.nan) for p in predictions]
        return criterion(self, predictions, *rest)

    train.Trainer.backward, losses.SetLoss.forward = remember, spoil


@pytest.mark.parametrize("why", ["signal", "bad images"])
def test_ranks_wait_for_the_last_save(shapes, tmp_path, why):  # noqa: F811
    """torchrun ends all when one has ended: rank 0 must not be in the middle of writing."""
    def slow(rank):
        save, fit, item = train.save_checkpoint, train.Trainer.fit, data.SegmentDataset.__getitem__

        def saved(folder, *rest, **more):
            save(folder, *rest, **more)
            time.sleep(1.5 if folder.name.startswith("step-") else 0)
            print("saved", folder.name, flush=True)

        def fitted(self, first, stop):
            stop.signal = signal.SIGTERM if why == "signal" else 0
            try:
                return fit(self, first, stop)
            finally:
                print("left", rank, flush=True)

        train.save_checkpoint, train.Trainer.fit = saved, fitted
        if why != "signal":
            data.SegmentDataset.__getitem__ = lambda self, key: item(self, key)._replace(
                faults=["a.jpg: cut"] if self.transform else ())

    done = two(tmp_path / "run", shapes, "--workers", "0", "--max-bad", "0", patch=slow)
    assert set(done.wait()) == {143 if why == "signal" else 1}, done.text()
    assert 0 < done.text().index("saved step-") < done.text().index("left"), done.text()


def test_not_finite_on_one_rank(shapes, tmp_path):  # noqa: F811
    """Both ranks know before the update, say step, cause, images, and stop; or skip the step if allowed."""
    out = tmp_path / "stop"
    run = two(out, shapes, patch=poison)
    assert run.wait(30) == [1, 1], run.text()
    lines = [line for line in run.text().splitlines() if line.startswith("error: ")]
    assert len(lines) == 2 and lines[0] == lines[1], run.text()
    want = r"error: step 7: not finite, gradient nan \(rank 1: \S+\.jpg.*matching cost.*, images \S+\.jpg, "
    assert re.match(want, lines[0]), lines
    assert "rank 0" not in lines[0] and train.run_steps(out)[0].name == "step-00000005"
    out = tmp_path / "skip"
    run = two(out, shapes, "--skip-nonfinite", 1, patch=poison)
    assert run.wait(60) == [0, 0], run.text()
    assert run.text().count("warning: step 7: not finite") == 1 and run.text().count("step skipped") == 1
    assert all(v.isfinite().all() for v in eomt.read(train.run_steps(out)[0])[1].values())
    finite = [row["loss"] is not None for row in rows(out) if "loss" in row]
    assert finite == [True] * 6 + [False] + [True] * 7


def test_one_rank_hangs(shapes, tmp_path):  # noqa: F811
    """The other waits --timeout seconds, then says how far it came; the checkpoint before is whole."""
    out = tmp_path / "run"

    def hang(rank):
        step = train.Trainer.step
        train.Trainer.step = lambda self, number, *rest: (
            rank == 1 and number == 6 and time.sleep(600),
            step(self, number, *rest),
        )[1]

    run = two(out, shapes, "--timeout", 3, patch=hang)
    end = time.monotonic() + 40
    while "error: " not in run.text() and time.monotonic() < end:
        time.sleep(0.05)
    said = run.text()
    os.kill(run.pids[1], signal.SIGKILL)  # torchrun's part
    assert re.search(
        r"^error: rank 0 after step 6: .*[Tt]ime.*; see the other lines", said, re.M
    ), said
    assert run.wait(10) == [1, -signal.SIGKILL]
    assert eomt.damaged(train.run_steps(out)[0]) is None


def test_one_rank_killed_under_torchrun(shapes, tmp_path):  # noqa: F811
    """The whole job ends non-zero in seconds, nothing is left running, and it resumes under torchrun; then
    SIGTERM to the launcher: saved, and ended."""
    out = tmp_path / "run"
    job = torchrun(out, shapes, "--steps", 4000, "--workers", 1, "--save-every", 4)
    until(out, "step 6/")
    ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    victim = next(pid for pid in ranks if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    began = time.monotonic()
    os.kill(int(victim), signal.SIGKILL)
    assert job.wait(30) != 0 and time.monotonic() - began < 30
    end = time.monotonic() + 10  # data processes look for their parent every few seconds
    while processes(out) and time.monotonic() < end:
        time.sleep(0.1)
    assert not processes(out)
    assert re.search(r"^error: rank 0 after step \d+: ", out.with_suffix(".log").read_text(), re.M)
    train.tidy(out)
    assert all(eomt.damaged(folder) is None for folder in train.run_steps(out))

    job = torchrun(out, shapes, "--steps", 4000, "--workers", 1, "--save-every", 1000, "--resume")
    until(out, "resumed")
    resumed = int(re.search(r"resumed \S+step-(\d+)", out.with_suffix(".log").read_text()).group(1))
    assert resumed >= 4
    until(out, f"step {resumed + 3}/")
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) != 0
    text = out.with_suffix(".log").read_text()
    stopped = int(re.search(r"stopped by a signal at step (\d+)", text).group(1))
    assert train.run_steps(out)[0].name == f"step-{stopped:08d}" and stopped >= resumed + 3
    assert eomt.damaged(train.run_steps(out)[0]) is None and not processes(out)


def test_torchrun_killed_and_one_run_a_folder(shapes, tmp_path):  # noqa: F811
    """While ranks train nobody else may use their folder; when SIGKILL has taken their launcher, which tells
    them nothing, they save and end, and the folder is free."""
    out = tmp_path / "run"
    job = torchrun(out, shapes, "--steps", 4000, "--workers", 1, "--save-every", 1000)
    until(out, "step 6/")
    for flag in ("--resume", "--overwrite"):
        other = Run(out, *STEPS, "--data", shapes, "--out", out, "--steps", 4000, flag)
        line = (f"error: {out}: another process trains there; end it, or give another --out; if none "
                f"is left, as after a crash of another machine, remove {out}/.lock")
        assert other.wait(30) == [1] and other.text().splitlines()[-1] == line, other.text()
    job.kill()
    job.wait(5)
    until(out, "stopped by a signal at step", 20)
    end = time.monotonic() + 10
    while processes(out) and time.monotonic() < end:
        time.sleep(0.1)
    assert not processes(out)
    stopped = train.run_steps(out)[0]
    other = Run(out, *STEPS, "--data", shapes, "--out", out, "--steps", int(stopped.name[5:]) + 1, "--resume")
    assert other.wait(60) == [1] and "started with other settings: steps 4000" in other.text(), other.text()
