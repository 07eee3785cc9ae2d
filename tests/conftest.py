"""Every test runs on one thread: two threads on a shared machine cost milliseconds an operation."""
# SPDX-License-Identifier: MIT
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a bare `pytest`
torch.set_num_threads(1)
