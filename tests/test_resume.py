"""Resuming equals never having stopped, bit by bit: after signals, a kill, damage, a dead data process."""

# SPDX-License-Identifier: MIT
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

import eomt
import eval as evaluation
import train

from .test_train import TINY, shapes  # noqa: F401 (fixture)

STEPS = [*TINY, "--steps", "14", "--save-every", "5"]  # 6 steps an epoch: every cut is amid one


class Run:
    """train.py, or eval.py, in forks of this process, a process group for each rank."""

    def __init__(self, folder, *argv, ranks=1, patch=None, main=train.main):
        self.log = Path(folder).with_suffix(f".{time.monotonic_ns()}.log")
        self.log.touch()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.pids, self.codes = [], {}
        for rank in range(ranks):
            pid = os.fork()
            if not pid:
                self.child([str(word) for word in argv], rank, ranks, port, patch, main)
            self.pids.append(pid)

    def child(self, argv, rank, ranks, port, patch, main):
        code = 99
        try:
            os.setpgid(0, 0)
            file = os.open(self.log, os.O_WRONLY | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
            if ranks > 1:
                os.environ |= dict(
                    RANK=str(rank),
                    WORLD_SIZE=str(ranks),
                    LOCAL_RANK=str(rank),
                    MASTER_ADDR="localhost",
                    MASTER_PORT=str(port),
                )
            if patch:
                patch(rank)
            sys.argv = ["x.py", *argv]
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def text(self):
        return self.log.read_text()

    def until(self, words, seconds=60):
        """Waits for `words` in the output."""
        end = time.monotonic() + seconds
        while words not in self.text():
            assert time.monotonic() < end, self.text()
            time.sleep(0.005)

    def wait(self, seconds=60):
        """Exit codes of all ranks; where one takes longer than that, all are killed and the test fails."""
        end = time.monotonic() + seconds
        while len(self.codes) < len(self.pids):
            for rank, pid in enumerate(self.pids):
                done, status = (0, 0) if rank in self.codes else os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
            for rank, pid in enumerate(self.pids):
                if rank not in self.codes and time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        assert time.monotonic() <= end + 1, f"hangs\n{self.text()}"
        return [self.codes[rank] for rank in range(len(self.pids))]


def rows(out):
    """The logged numbers but for the speed."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "img_s"} for line in lines]


def same_run(a, b):
    """Weights, optimiser, logged numbers and the choice of the best: bit by bit."""
    last = train.run_steps(a)[0].name
    states = [eomt.read(out / last)[1] for out in (a, b)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0] | states[1])
    states = [torch.load(out / last / "resume.pt", weights_only=True)["optimizer"]["state"] for out in (a, b)]
    assert all(torch.equal(states[0][i][k], states[1][i][k]) for i in states[0] for k in states[0][i])
    assert repr(rows(a)) == repr(rows(b))  # nan is not nan
    assert repr(train.Log(a, 0).summary()) == repr(train.Log(b, 0).summary())
    names = [sorted(path.name for path in out.iterdir() if path.name != "log.txt") for out in (a, b)]
    assert names[0] == names[1]


@pytest.fixture(scope="module")
def straight(shapes, tmp_path_factory):  # noqa: F811
    """The run that nothing disturbed."""
    out = tmp_path_factory.mktemp("straight") / "run"
    run = Run(out, *STEPS, "--data", shapes, "--out", out)
    assert run.wait() == [0], run.text()
    return out


def resume(out, shapes, *argv):  # noqa: F811
    """The next start, as a user types it; its output."""
    run = Run(out, *STEPS, "--data", shapes, "--out", out, "--resume", *argv)
    assert run.wait() == [0], run.text()
    assert "resumed" in run.text()
    return run.text()


@pytest.mark.parametrize(
    "number,code,workers",
    [(signal.SIGTERM, 143, 0), (signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 2), (signal.SIGUSR1, 143, 1)],
)
def test_signal_saves_and_resumes_bitwise(straight, shapes, tmp_path, number, code, workers):  # noqa: F811
    """The signal goes to the whole group, as from a terminal or a cluster, and a second one at once,
    as torchrun adds: saved at the next step, resumed with another number of workers."""
    out = tmp_path / "run"
    run = Run(out, *STEPS, "--data", shapes, "--out", out, "--workers", workers)
    run.until("step 7/")
    os.killpg(run.pids[0], number)
    time.sleep(0.05)
    os.kill(run.pids[0], signal.SIGTERM)
    assert run.wait(20) == [code], run.text()
    stopped = int(re.search(r"stopped by a signal at step (\d+)", run.text()).group(1))
    assert 7 <= stopped <= 9 and "error" not in run.text() and "Traceback" not in run.text()
    assert [path.name for path in train.run_steps(out)] == [f"step-{stopped:08d}", "step-00000005"]
    resume(out, shapes, "--workers", 1 if workers != 1 else 0)
    same_run(straight, out)


def test_second_signal_ends_at_once(shapes, tmp_path):  # noqa: F811
    """After a second's pause: not saved, nothing torn; the checkpoint before is there."""
    out = tmp_path / "run"

    def slow(rank):
        step = train.Trainer.step

        def asleep(self, number, *rest):
            if number == 6:
                print("asleep", flush=True)
                time.sleep(30)
            return step(self, number, *rest)

        train.Trainer.step = asleep

    run = Run(out, *STEPS, "--data", shapes, "--out", out, patch=slow)
    run.until("asleep")
    for pause in (1.3, 0):
        os.kill(run.pids[0], signal.SIGINT)
        time.sleep(pause)
    assert run.wait(5) == [130]
    assert [path.name for path in train.run_steps(out)] == ["step-00000005"]
    assert eomt.damaged(out / "step-00000005") is None


def test_kill_and_resume_bitwise(straight, shapes, tmp_path):  # noqa: F811
    """SIGKILL amid steps, then amid the last evaluation, then amid its log line and summary; and damage."""
    out = tmp_path / "run"
    run = Run(out, *STEPS, "--data", shapes, "--out", out, "--workers", 2)
    run.until("step 8/")
    os.kill(run.pids[0], signal.SIGKILL)
    assert run.wait(5) == [-signal.SIGKILL] and [p.name for p in train.run_steps(out)] == ["step-00000005"]

    def die(rank):
        evaluation.evaluate = lambda *rest: os.kill(os.getpid(), signal.SIGKILL)

    run = Run(out, *STEPS, "--data", shapes, "--out", out, "--resume", patch=die)
    assert run.wait() == [-signal.SIGKILL]
    assert "step 14/14" in run.text() and not (out / "best").exists()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 14, "PQ"')  # cut by the kill
    (out / "summary.json").write_text("")  # and by a power cut
    assert "step 14/14" not in resume(out, shapes)
    same_run(straight, out)
    # One flipped byte in the newest: the one before is taken, and all comes out the same.
    flipped = bytearray((out / "step-00000014" / "model.safetensors").read_bytes())
    flipped[-100] ^= 1
    (out / "step-00000014" / "model.safetensors").write_bytes(flipped)
    assert "changed since it was written; use another checkpoint; taking the one before" in resume(
        out, shapes
    )
    same_run(straight, out)
    (out / "step-00000014" / "model.safetensors").write_bytes(flipped)
    with pytest.raises(ValueError, match="step-00000014!model.safetensors: .*changed since it was written"):
        eomt.load(out / "step-00000014")


def test_resume_with_other_settings(straight, shapes, tmp_path):  # noqa: F811
    """Every key that differs is named; what belongs to the machine may differ."""
    run = Run(
        tmp_path / "run", *STEPS, "--data", shapes, "--out", straight, "--resume", "--seed", 5, "--lr", 1
    )
    assert run.wait() == [1]
    line = run.text().splitlines()[-1]
    assert re.fullmatch(r"error: \S+step-00000014: .*lr 0.002 -> 1.0, .*seed 0 -> 5; use the same, .*", line)


def test_killed_data_process(straight, shapes, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    run = Run(out, *STEPS, "--data", shapes, "--out", out, "--workers", 1, "--steps", 4000)
    run.until("step 8/")
    children = Path(f"/proc/{run.pids[0]}/task/{run.pids[0]}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert run.wait(20) == [1]
    assert re.fullmatch(r"error: .*a data worker died.*; .*", run.text().splitlines()[-1]), run.text()
    assert train.run_steps(out) and eomt.damaged(train.run_steps(out)[0]) is None


def test_unwritable_folder_ends_before_the_first_step(shapes, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", Path("/proc/nothing")):
        run = Run(tmp_path / "run", *STEPS, "--data", shapes, "--out", out)
        assert run.wait() == [1]
        assert run.text().splitlines()[-1].startswith("error: ") and "step 1/" not in run.text()
        assert "Traceback" not in run.text()
