"""Every test runs on one thread: two threads on a shared machine cost milliseconds an operation."""
# SPDX-License-Identifier: MIT
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for a bare `pytest`
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Torch starts a process with a random seed; a test's numbers are its own, in any order and alone."""
    torch.manual_seed(0)


def run_interpreted(file, least):
    """The tests of `file` in a process of their own under Triton's interpreter; `least` of them must pass."""
    version = importlib.metadata.version("triton")
    if version < "3.7" and numpy.__version__ >= "2.4":
        pytest.skip("the interpreter of Triton 3.6 needs numpy below 2.4")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # the second of the warnings is torch's on Python 3.13.0
    options = ["-W", "error::RuntimeWarning", "-W", "ignore:Guards may run slower", "-m", "pytest"]
    command = [sys.executable, *options, "-p", "no:cacheprovider", "-o", "addopts=",
               "-m", "not gpu and not slow", str(Path(file).relative_to(ROOT))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= least, done.stdout[-1000:]  # a run that selects nothing must not pass
