"""Two gloo ranks equal one process: training losses and weights, evaluation to the last digit."""

# SPDX-License-Identifier: MIT
import json
import re
from types import SimpleNamespace

import pytest
import torch

import data
import train

from .test_train import TINY, run, shapes, short_run  # noqa: F401 (fixtures)


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("device_batch", [2, 1])
def test_training_two_ranks_equal_one(short_run, shapes, tmp_path, device_batch):  # noqa: F811
    """Same seeds, same order, same random points: only the order of sums differs, also with accumulation."""
    out, _ = short_run
    done = run(
        "train.py",
        *TINY,
        "--data",
        shapes,
        "--out",
        tmp_path / "two",
        "--device-batch-size",
        device_batch,
        ranks=2,
    )
    assert done.returncode == 0, done.stderr
    for a, b in zip(rows(out), rows(tmp_path / "two"), strict=True):
        for key in ("loss", "mask", "dice", "class", "grad"):
            if key in a:
                assert abs(a[key] - b[key]) <= 2e-3 * abs(a[key]), (key, a, b)
    one, two = rows(out)[0], rows(tmp_path / "two")[0]
    assert abs(one["loss"] - two["loss"]) < 1e-5 * one["loss"]  # step 1: the same weights


def test_accumulation_equals_one_batch(short_run, shapes, tmp_path):  # noqa: F811
    out, _ = short_run
    done = run("train.py", *TINY, "--data", shapes, "--out", tmp_path / "run", "--device-batch-size", 1)
    assert done.returncode == 0, done.stderr
    first, again = rows(out)[0], rows(tmp_path / "run")[0]
    assert abs(first["loss"] - again["loss"]) < 1e-5 * first["loss"]
    assert abs(first["grad"] - again["grad"]) < 1e-4 * first["grad"]


def test_evaluation_two_ranks_same_digits(short_run, shapes, tmp_path):  # noqa: F811
    """7 images on 2 ranks, and 1 image on 2 ranks: no image twice or missing, equal JSON."""
    out, _ = short_run
    for limit in (0, 1):
        for ranks in (0, 2):
            done = run(
                "eval.py",
                "--ckpt",
                out,
                "--data",
                shapes,
                "--workers",
                0,
                "--limit",
                limit,
                "--out",
                tmp_path / f"{limit}-{ranks}.json",
                ranks=ranks,
            )
            assert done.returncode == 0, done.stderr
            assert len(re.findall(r"^PQ ", done.stdout, re.M)) == 1
        a, b = ((tmp_path / f"{limit}-{ranks}.json").read_text() for ranks in (0, 2))
        assert a == b and json.loads(a)["images"] == (limit or 7)


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
