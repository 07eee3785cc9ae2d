"""SigLIP2-EoMT: stages A -> B -> C -> eval -> predict on a toy tower, and what must hold on the way."""

# SPDX-License-Identifier: MIT
import json
import math
import re
import signal
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eomt
import eval as evaluation
import lora
import predict
import siglip2
import train
import vocab

from .test_resume import Run

WORDS = vocab.SHAPES_OPEN
SEEN, UNSEEN = vocab.split(WORDS, "shapes")
TINY = ["--quick", "--log-every", "1", "--num-points", "128", "--eval-limit", "4", "--overwrite"]


def train_here(*argv):
    """train.py in this process; returns its rows of metrics.jsonl."""
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    cfg, origin = train.parse([*TINY, *map(str, argv)])
    assert train.run(cfg, origin) == 0
    for name, handler in handlers.items():
        signal.signal(name, handler)
    return [json.loads(line) for line in open(f"{cfg.out}/metrics.jsonl")]


def eval_here(*argv):
    return evaluation.run(evaluation.parse(["--workers", "0", *map(str, argv)]))


def predict_here(*argv):
    return predict.run(predict.parser().parse_args([*map(str, argv)]))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A data set whose training images show seen classes only, and a tower pretrained on captions of all."""
    root = tmp_path_factory.mktemp("world")
    data.write_shapes(root / "data", WORDS, 256, 40, 0, SEEN)
    train.pretrain_toy(root / "tower", WORDS, 250, 0, say=lambda text: None)
    return root


@pytest.fixture(scope="module")
def stages(world):
    """Runs A, B and C, one from another; their log rows by name."""
    here = ["--data", world / "data", "--encoder-weights", world / "tower"]
    rows = {"A": train_here("--stage", "A", *here, "--steps", 60, "--out", world / "A")}
    for stage, before in (("B", "A"), ("C", "B")):
        more = ["--init", world / before, "--steps", 3, "--out", world / stage]
        rows[stage] = train_here("--stage", stage, *here[:2], *more)
    return rows


@pytest.fixture
def val(world):
    return data.SegmentDataset(world / "data", "shapes_open", "val")


def batch(world, count=4):
    transform = data.Augment(64, (1.0, 1.0))
    hidden = set(range(34)) - set(SEEN)
    train_set = data.SegmentDataset(world / "data", "shapes_open", "train", transform, hidden)
    return data.collate([train_set[(0, i)] for i in range(count)])


def make(world, stage="B", *argv):
    """Model and trainer of a stage on random heads, in training mode."""
    cfg, origin = train.parse([*TINY, "--stage", stage, "--batch-size", "4", *map(str, argv)])
    cfg.encoder_weights, cfg.steps = str(world / "tower"), 10
    model = train.make_open(cfg, WORDS, None).train()
    return model, train.Trainer(cfg, model, torch.device("cpu"))


def losses_of(trainer, part, step=0):
    norm, _ = trainer.agree([part], SimpleNamespace(signal=0))
    return trainer.backward(step, 0, part, norm)


# ---- the chain ---------------------------------------------------------------------------------------------
def test_stages_run_and_leave_checkpoints(world, stages):
    for stage in "ABC":
        folder = world / stage / "best"
        assert (folder / "adapters.safetensors").exists() == (stage != "A")
        assert all(math.isfinite(row.get("loss", 0)) for row in stages[stage])
        assert {"PQ_seen", "PQ_unseen", "hPQ", "PQ_unseen_th", "PQ_unseen_st"} <= stages[stage][-1].keys()
    config, _, meta = eomt.read(world / "C")
    assert config["open"]["fuse_last"] == 3 and config["open"]["adapters"]["rank_ffn"] == 48
    assert meta["stage"] == "C" and meta["split"] == "shapes" and meta["split_policy"] == "void"
    assert stages["A"][-2]["loss"] < 0.6 * stages["A"][0]["loss"]


def test_stage_b_first_loss_is_stage_a(world, stages):
    """LoRA starts as identity: A continued and B begun see the same batch and get the same losses."""
    rows = train_here(
        "--stage", "A", "--data", world / "data", "--init", world / "A", "--steps", 1, "--out", world / "A2"
    )
    for key in ("mask", "dice", "class"):
        assert stages["B"][0][key] == pytest.approx(rows[0][key], rel=1e-6)
    assert stages["B"][0]["feat"] == pytest.approx(0, abs=1e-6)


def test_stage_c_first_is_stage_b(world, stages, val):
    """B's adapters live on inside C's larger ones, and fused layers start at 0: the same model, bit by bit
    but for the order of sums."""
    cfg, origin = train.parse(
        [*TINY, "--stage", "C", "--init", str(world / "B"), "--data", str(world / "data")]
    )
    start = train.read_start(cfg)
    train.inherit(cfg, origin, start, WORDS)
    grown = train.make_open(cfg, WORDS, start).eval()
    before = eomt.load(world / "B")
    images = torch.stack([val[i].image for i in range(4)])
    with torch.no_grad():
        for a, b in zip(grown(images)[-1], before(images)[-1], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        deltas = [float(adapter.delta().abs().max()) for adapter in lora.adapters(grown.encoder).values()]
    assert max(deltas) > 0  # B did move, so that the comparison says something


def test_checkpoint_merges_and_adapters_apart(world, stages, val):
    from safetensors.torch import load_file

    config, state, _ = eomt.read(world / "B")
    model = eomt.build(config)
    eomt.fill(model, state, "B")
    apart = load_file(world / "B" / "best" / "adapters.safetensors")
    assert apart.keys() == lora.state_dict(model.encoder).keys()
    assert all(torch.equal(apart[key], value) for key, value in lora.state_dict(model.encoder).items())
    merged = eomt.load(world / "B")
    assert not lora.adapters(merged)
    with torch.no_grad():
        image = val[0].image[None]
        for a, b in zip(model.eval()(image)[-1], merged(image)[-1], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_resume_continues_a_stage(world, stages):
    more = ["--data", world / "data", "--init", world / "A", "--stage", "B", "--save-every", 2]
    whole = train_here(*more, "--steps", 3, "--out", world / "whole")
    out = world / "cut"
    train_here(*more, "--steps", 3, "--out", out)
    import shutil

    shutil.rmtree(out / "step-00000003")
    cfg, origin = train.parse(
        [*TINY, *map(str, more), "--steps", "3", "--out", str(out), "--resume", "--no-overwrite"]
    )
    assert train.run(cfg, origin) == 0
    again = [json.loads(line) for line in open(out / "metrics.jsonl")]
    assert [r["loss"] for r in again if "loss" in r][-1] == [r["loss"] for r in whole if "loss" in r][-1]


def test_two_ranks_first_loss(world, stages):
    words = [*TINY, "--stage", "B", "--data", world / "data", "--init", world / "A", "--steps", 3]
    two = Run(world / "B2", *words, "--out", world / "B2", ranks=2)
    assert two.wait() == [0, 0], two.text()
    rows = [json.loads(line) for line in open(world / "B2" / "metrics.jsonl")]
    for key in ("loss", "mask", "dice", "class", "itc"):
        assert rows[0][key] == pytest.approx(stages["B"][0][key], rel=1e-5)
        assert rows[2][key] == pytest.approx(stages["B"][2][key], rel=5e-3)


# ---- unseen classes are found by their names ---------------------------------------------------------------
def test_unseen_found_by_name_not_by_chance(world, stages, val):
    """The same model with the text rows of the unseen classes shuffled must lose them and nothing else."""
    model = eomt.load(world / "A")
    head, moved = model.class_head, list(UNSEEN[1:] + UNSEEN[:1])
    right = evaluation.evaluate(model, val).numbers
    rows = head.rows.clone()
    rows[list(UNSEEN)] = head.rows[moved]  # one row a class here
    head.set_classes(rows, head.owner, head.seen)
    wrong = evaluation.evaluate(model, val).numbers
    assert right["PQ_unseen"] > 5 and right["PQ_unseen"] > 5 * wrong["PQ_unseen"]
    assert wrong["PQ_seen"] == pytest.approx(right["PQ_seen"], abs=2)


def test_groups_against_brute_force(world, stages, val):
    """PQ_seen and PQ_unseen against loops over classes, images and pairs of masks."""
    pairs = []
    result = evaluation.evaluate(eomt.load(world / "A"), val, exports=[lambda *pair: pairs.append(pair)])
    quality = {}
    for k in range(34):
        total, tp, fp, fn = 0.0, 0, 0, 0
        for found, sample in pairs:
            truth, crowd = sample.target.masks().numpy(), sample.target.crowd.numpy()
            ids, void = found.ids.numpy(), ~truth.any(0)
            mine = [ids == s + 1 for s, label in enumerate(found.labels.tolist()) if label == k]
            true = [
                m
                for m, label, c in zip(truth, sample.target.labels, crowd, strict=True)
                if label == k and not c
            ]
            crowds = [
                m for m, label, c in zip(truth, sample.target.labels, crowd, strict=True) if label == k and c
            ]
            used = set()
            for mask in mine:
                hits = [
                    (np.sum(mask & m) / (np.sum(mask | m) - np.sum(mask & void)), j)
                    for j, m in enumerate(true)
                ]
                iou, j = max(hits, default=(0, -1))
                forgiven = np.sum(mask & void) + (np.sum(mask & crowds[-1]) if crowds else 0)
                if iou > 0.5:
                    total, tp = total + iou, tp + 1
                    used.add(j)
                elif forgiven / np.sum(mask) <= 0.5:
                    fp += 1
            fn += len(true) - len(used)
        if tp + fp + fn:
            quality[k] = 100 * total / (tp + fp / 2 + fn / 2)
    for name, members in (("seen", SEEN), ("unseen", UNSEEN)):
        want = np.mean([quality[k] for k in members if k in quality])
        assert result.numbers[f"PQ_{name}"] == pytest.approx(want, abs=1e-6)
    a, b = result.numbers["PQ_seen"], result.numbers["PQ_unseen"]
    assert result.numbers["hPQ"] == pytest.approx(2 * a * b / (a + b))
    assert result.numbers["PQ_all"] == result.numbers["PQ"]


def test_vocabulary_permutation(world, stages, val):
    """Classes in another order: the same segments under other numbers."""
    model = eomt.load(world / "A")
    image, head = val[3].image[None], model.class_head
    order = torch.randperm(34, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(image)[-1].classes
        head.set_classes(head.rows[order], torch.arange(34), head.seen[order])
        after = model(image)[-1].classes
    torch.testing.assert_close(after[..., :-1], before[..., :-1][..., order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after[..., -1], before[..., -1], atol=1e-5, rtol=1e-5)


# ---- gradients ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", ["A", "B"])
def test_unseen_rows_no_gradient(world, stage):
    """Through the whole model and every loss, distillation included."""
    model, trainer = make(world, stage)
    rows = model.class_head.rows.requires_grad_(True)
    losses_of(trainer, batch(world))
    norms = rows.grad.norm(dim=1)
    assert (norms[list(UNSEEN)] == 0).all() and (norms[list(SEEN)] > 0).any()


def test_stage_b_gradients_adapters_only(world):
    model, trainer = make(world, "B", "--lora-last-n", "2")
    losses_of(trainer, batch(world))
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and all(name.endswith((".A", ".B")) and ".blocks." in name for name in trained)
    assert {name.split(".")[2] for name in trained} == {"2", "3"}


def test_no_autograd_below_first_trainable_block(world):
    """Stage A keeps no graph of the tower at all, Stage B none below its adapters."""
    for stage, first in (("A", 4), ("B", 2)):
        model, trainer = make(world, stage, "--lora-last-n", "2")
        graphs = []
        for block in model.encoder.blocks:
            block.register_forward_hook(lambda module, inputs, out, to=graphs: to.append(out.requires_grad))
        losses_of(trainer, batch(world))
        assert graphs[:4] == [i >= first for i in range(4)]
        assert graphs[4:] == [False] * (4 - first)  # Stage B's teacher takes the tokens that are the same


def test_teacher_is_the_tower_without_adapters(world):
    model, trainer = make(world, "B")
    for adapter in lora.adapters(model).values():
        torch.nn.init.normal_(adapter.B, std=0.1)
    images = batch(world).images
    last = model(images)[-1]
    plain = siglip2.load(world / "tower", "vision")
    with torch.no_grad():
        want = plain((images.float() / 255 - model.mean) / model.std)
    assert torch.equal(last.teacher, want) and not torch.allclose(last.student, want, atol=1e-2)
    assert last.student.requires_grad and not last.teacher.requires_grad


@pytest.mark.parametrize(
    "argv",
    [
        ["--no-isolate"],
        ["--query-blocks", "shared"],
        ["--query-init", "text"],
        ["--query-init", "text+learnable", "--fuse-last", "3"],
    ],
)
@pytest.mark.parametrize("stage", ["A", "B"])
def test_variants_train(world, stage, argv):
    model, trainer = make(world, stage, *argv, "--train-heads")
    losses = losses_of(trainer, batch(world))
    assert all(value.isfinite() for value in losses.values())
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    dead = [name for name, grad in grads.items() if grad is None]
    assert not dead
    if "--query-init" in argv:
        assert model.q_gate.grad.abs() > 0 and model.q.weight.requires_grad == ("text+learnable" in argv)
        assert model.centres.norm() > 0
    if "--fuse-last" in argv:
        assert (model.fuse.grad != 0).all()


def test_isolate_leaves_patches_alone(world):
    """Bitwise: whatever the queries are, the tokens are the tower's own; not so with joint attention."""
    images = batch(world).images
    for argv, same in (([], True), (["--no-isolate"], False)):
        model, _ = make(world, "B", *argv)
        torch.nn.init.normal_(model.q.weight, std=3.0)
        with torch.no_grad():
            tokens, alone = (
                model(images)[-1].student,
                model.encoder((images.float() / 255 - model.mean) / model.std),
            )
        assert torch.equal(tokens, alone) == same


def test_query_blocks_copy_starts_as_shared(world):
    images = batch(world).images
    outputs = []
    for kind in ("copy", "shared"):
        model, _ = make(world, "A", "--query-blocks", kind)
        outputs.append(model(images)[-1])
    torch.testing.assert_close(outputs[0].masks, outputs[1].masks)


def test_masked_attention_changes_query_rows_only(world):
    model, _ = make(world, "B")
    images = batch(world).images
    free, held = model(images)[-1], model(images, torch.ones(2))[-1]
    assert torch.equal(free.student, held.student) and not torch.allclose(free.masks, held.masks, atol=1e-3)
    opened = model(images, torch.zeros(2), torch.rand(4, 2, 12))[-1]  # no query keeps its mask
    torch.testing.assert_close(opened.masks, free.masks, atol=1e-4, rtol=1e-4)


# ---- full sizes --------------------------------------------------------------------------------------------
def linear(n, m):
    return n * m + m


@pytest.mark.parametrize("name,width,hidden,depth,grid", [
    ("large", 1024, 4096, 24, 32), ("base", 768, 3072, 12, 32), ("so400m", 1152, 4304, 27, 32),
    ("giant", 1536, 6144, 40, 24)])
@pytest.mark.parametrize(
    "stage,blocks,attn,ffn,fuse", [("A", 0, 0, 0, 0), ("B", 12, 16, 32, 0), ("C", 16, 16, 48, 2)]
)
def test_dry_run_counts(capsys, stage, blocks, attn, ffn, fuse, name, width, hidden, depth, grid):
    """Right to the parameter, against sums over the layers written out here."""
    cfg, origin = train.parse(["--stage", stage, "--encoder", f"siglip2_{name}", "--dry-run"])
    assert train.run(cfg, origin) == 0
    found = re.search(r"parameters: ([\d,]+) trained, ([\d,]+) frozen", capsys.readouterr().out)
    trained, frozen = (int(text.replace(",", "")) for text in found.groups())
    block = (
        4 * width
        + linear(width, 3 * width)
        + linear(width, width)
        + linear(width, hidden)
        + linear(hidden, width)
    )
    pool = (
        width
        + linear(width, 3 * width)
        + linear(width, width)
        + 2 * width
        + linear(width, hidden)
        + linear(hidden, width)
    )
    tower = linear(16 * 16 * 3, width) + grid * grid * width + depth * block + 2 * width + pool
    up = 2 * (4 * width * width + width + 9 * width + 2 * width)  # transposed 2x2, depthwise 3x3, norm
    heads = (
        200 * width
        + 4 * block
        + 2 * width
        + 3 * linear(width, width)
        + up
        + 3 * linear(width, width)
        + width
        + 1
    )
    adapters = min(blocks, depth) * (attn * 3 * 2 * width + ffn * 2 * (width + hidden))
    assert (trained, frozen) == ((heads, tower) if stage == "A" else (adapters + fuse, tower + heads))


# ---- evaluation --------------------------------------------------------------------------------------------
def test_eval_line_and_options(world, stages, capsys):
    result = eval_here("--ckpt", world / "B", "--data", world / "data")
    text = capsys.readouterr().out
    assert re.search(
        r"^PQ_all [\d.]+ .*PQ_seen [\d.]+ PQ_unseen [\d.]+ PQ_unseen_th .* hPQ [\d.]+", text, re.M
    )
    direct = [row for row in stages["B"] if "PQ" in row][-1]
    assert result.numbers["PQ_seen"] == pytest.approx(
        direct["PQ_seen"], abs=0.5
    )  # merged, another order of sums
    only = eval_here("--ckpt", world / "B", "--ov-alpha", 0, "--ov-beta", 0).numbers
    assert only["PQ_unseen"] != result.numbers["PQ_unseen"]


def test_eval_sweep_equals_single_runs(world, stages, capsys):
    eval_here("--ckpt", world / "A", "--sweep", "ov-bias=0,3")
    lines = re.findall(r"ov-bias (\S+): .*PQ_seen ([\d.]+) PQ_unseen ([\d.]+)", capsys.readouterr().out)
    assert [line[0] for line in lines] == ["0", "3"]
    for bias, seen, unseen in lines:
        numbers = eval_here("--ckpt", world / "A", "--ov-bias", bias).numbers
        assert (float(seen), float(unseen)) == (round(numbers["PQ_seen"], 2), round(numbers["PQ_unseen"], 2))
    assert float(lines[1][1]) < float(lines[0][1])  # taken from the seen classes


def test_eval_auto_calibration(world, stages):
    model = eomt.load(world / "A")
    val = data.SegmentDataset(world / "data", "shapes_open", "val")
    options = Namespace(
        ov_pool="map",
        ov_alpha=0.4,
        ov_beta=0.8,
        ov_temp="auto",
        ov_bias=0.0,
        ov_class_bias="auto",
        ov_reject="auto",
    )
    evaluation.calibrate(model, val, options)
    kept = model.meta["calibration"]
    assert 0.01 <= kept["temp_in"] <= 100 and len(kept["class_bias"]) == 34 and math.isfinite(kept["reject"])
    l_in, l_out, labels = evaluation.seen_matches(model, val)
    assert model.class_head.seen[labels].all() and len(labels) >= 10
    share = (model.class_head.energy(l_out) < kept["reject"]).float().mean()
    assert share == pytest.approx(0.05, abs=0.03)
    json.dumps(kept)  # it is stored in the checkpoint


def test_replay_outlives_the_memory_of_a_graph():
    """A CUDA graph writes its outputs where those of the call before are: what is kept is a copy."""

    def same_memory(graph, inputs):
        kept = []

        def call(*arguments):
            outputs = graph(*arguments)
            kept[:] = kept or [output.clone() for output in outputs]
            return [old.copy_(output) for old, output in zip(kept, outputs, strict=True)]

        return call

    torch.manual_seed(0)
    tower = siglip2.VisionTower(16, 32, 2, 2, 8, 2)
    head = siglip2.OpenVocabHead(16, torch.randn(3, 16), torch.arange(3), [True] * 3, 4.7, -16.0)
    model = eomt.OpenVocabEoMT(tower, head, 4, 1).eval()
    images = torch.randint(0, 256, (2, 1, 3, 16, 16), dtype=torch.uint8)
    torch._dynamo.reset()
    with torch.inference_mode():
        want = [model(image)[-1] for image in images]
        model.compile(backend=same_memory)
        replay = evaluation.Replay(model)
        for turn in range(2):
            replay.turn(turn == 0, {})
            torch.testing.assert_close([replay(image)[-1] for image in images], want)
    torch._dynamo.reset()


def test_calibration_asks_as_segment_does(world, stages, val, monkeypatch):
    """`accelerate` leaves bf16 weights on CUDA, which only the autocast of `segment`'s path fits."""
    real, calls = eomt._network, []
    monkeypatch.setattr(eomt, "_network", lambda *arguments: calls.append(arguments) or real(*arguments))
    evaluation.seen_matches(eomt.load(world / "A"), val, 3)
    assert len(calls) == 3


def test_region_probe(world, stages, capsys):
    """Of the tower alone and of a trained stage the same: nothing is trained for it."""
    bare = eval_here(
        "--ckpt",
        world / "tower",
        "--gt-masks",
        "--data",
        world / "data",
        "--task",
        "shapes_open",
        "--templates",
        "plain",
    )
    staged = eval_here("--ckpt", world / "A", "--gt-masks")
    assert bare["map"]["things"] == staged["map"]["things"] and bare["map"]["stuff"] == staged["map"]["stuff"]
    assert staged["map"]["stuff"] > 40 and staged["map"]["stuff"] > staged["mean"]["stuff"] + 20
    assert "map: things" in capsys.readouterr().out


def test_region_probe_of_a_split(world, stages, capsys):
    """Its groups are the split's; a bare tower has been trained on none of them."""
    rows = eval_here("--ckpt", world / "tower", "--gt-masks", "--data", world / "data", "--task",
                     "shapes_open", "--templates", "plain", "--split", "shapes")
    assert rows["map"].keys() == {"things", "stuff", "seen", "unseen"}
    assert "were trained on" not in capsys.readouterr().err


def test_eval_other_vocabulary(world, stages, tmp_path, capsys):
    """Another data set with its own names; seen = shares a word with a class that was trained."""
    data.write_shapes(tmp_path, data.TASKS["shapes"].vocabulary, 2, 6, 1)
    result = eval_here("--ckpt", world / "A", "--data", tmp_path, "--task", "shapes")
    names = data.TASKS["shapes"].vocabulary.names
    unseen = [name for name in names if WORDS.names.index(name) in UNSEEN]
    assert unseen == ["brown dots"] and result.numbers["PQ_unseen_st"] == result.numbers["PQ_unseen"]
    assert {name for name, _ in result.per_class} <= set(names)


# ---- prediction --------------------------------------------------------------------------------------------
@pytest.fixture
def photo(val, tmp_path):
    Image.fromarray(val[0].image.permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_predict_prompts_json(world, stages, photo, tmp_path):
    names = "; stuff: ".join((", ".join(WORDS.names[:25]), ", ".join(WORDS.names[25:])))
    words = ["--prompts", names, "--background", "none", "--embeddings"]
    predict_here(photo, "--ckpt", world / "B", *words, "--out", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"][0]["segments_info"]
    assert rows and (tmp_path / "out" / "photo.overlay.png").exists()
    for row in rows:
        assert row["name"] in WORDS.names and row["area"] > 0
        assert all(0 <= row[key] <= 1 for key in ("score", "score_in", "score_out", "presence"))
        assert np.linalg.norm(row["embedding"]) == pytest.approx(1, abs=1e-4) and len(row["embedding"]) == 64


def test_export_of_an_open_model(world, stages, val, tmp_path):
    """Runs elsewhere with the same numbers on pictures like those of training: one-word prompts were NaN."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    images = torch.stack([val[i].image for i in range(6)])
    for words in ([], ["--prompts", "red ring", "--background", "none"]):
        args = predict.parser().parse_args(["--ckpt", str(world / "A"), *words])
        model, path = predict.load_model(args), tmp_path / f"{len(words)}.onnx"
        assert predict.export(model, path) < 1e-3
        with torch.no_grad():
            want = model.eval()(images)[-1]
        got = runtime.InferenceSession(str(path)).run(None, {"images": images.numpy()})
        for ours, theirs in zip(want, got, strict=True):
            torch.testing.assert_close(torch.from_numpy(theirs), ours, atol=1e-3, rtol=1e-4)


def tiny_model():
    return eomt.EoMT(eomt.ViT(8, 1, 1, 8, (2, 2)), 8, 2, 1)


def test_export_that_gives_nan_is_told(tmp_path, monkeypatch):
    """max([1e-5, nan]) is 1e-5 in Python: the check passed over what it was for."""
    eomt.save(tmp_path / "m.safetensors", tiny_model(), task="shapes")
    model = eomt.load(tmp_path / "m.safetensors")

    def broken(images):
        masks, classes = model(images)[-1]
        return masks, classes * math.nan

    monkeypatch.setattr(torch.export, "load", lambda path: SimpleNamespace(module=lambda: broken))
    assert math.isnan(predict.export(model, tmp_path / "m.pt2"))
    with pytest.raises(ValueError, match=r"m\.pt2: gives NaN .*; "):
        predict_here("--ckpt", tmp_path / "m.safetensors", "--export", tmp_path / "m.pt2")


@pytest.mark.parametrize("size", [(1500, 1), (1, 1500), (3, 900), (64, 64)])
def test_pictures_of_thin_photos(size, tmp_path):
    """One pixel wide: a width of 0 ended the training; one high: 990008 x 896 took 6.7 GB."""
    model = tiny_model()
    model.meta |= dict(kind="panoptic", size=32, names=list("abcdefgh"), thing=[True] * 8)
    image, masks = torch.full((3, *size), 99, dtype=torch.uint8), np.ones((1, *size), bool)
    sample = data.Sample(image, data.Target.from_masks(masks, [2], [False], [1.0]), "x.jpg", 1)
    predict.draw_comparison(model.eval(), [sample], tmp_path / "x.png")
    width, height = Image.open(tmp_path / "x.png").size
    assert height == 224 and 3 * 50 < width < 3 * 1000


@pytest.mark.parametrize("mode, kind", [("I;16", "png"), ("I;16", "tiff"), ("I", "tiff"), ("F", "tiff")])
def test_predict_deep_pictures_are_refused(tmp_path, mode, kind):
    """Pillow's RGB of 16 bits is white from 256 on."""
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    path = tmp_path / f"x.{kind}"
    Image.fromarray((np.arange(64).reshape(8, 8) * 1000).astype(dtype)).save(path)
    with pytest.raises(ValueError, match=rf"^{path}: more than 8 bits a channel .*; convert it to 8 bits$"):
        predict.open_image(path)


def test_predict_opens_every_kind_of_8_bits(tmp_path):
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        Image.new(mode, (6, 4)).save(tmp_path / "x.png")
        assert predict.open_image(tmp_path / "x.png").shape == (3, 4, 6)
    picture = Image.new("RGB", (6, 4))
    (exif := picture.getexif())[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert predict.open_image(tmp_path / "turned.jpg").shape == (3, 6, 4)
    (tmp_path / "folder.jpg").mkdir()
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"  # for Ghostscript
    cases = {"empty.jpg": b"", "script.jpg": script, "cut.jpg": b"\xff\xd8\xff\xe0", "folder.jpg": None}
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"^{tmp_path / name}: ") as error:
            predict.open_image(tmp_path / name)
        assert "\n" not in str(error.value) and (content is None or "not a picture" in str(error.value))


@pytest.mark.parametrize("names, ids", [
    (("000139", "000285"), [139, 285]), (("a", "b", "1"), [0, 1, 2]), (("1", "01", "7"), [0, 1, 2]),
    (("\u00b2", "5"), [0, 1]), (("\u0663", "4"), [3, 4]), (("5", "x"), [0, 1])])
def test_predict_image_ids_are_unique(tmp_path, names, ids):
    """Numbers of the names if every name has its own, else those of the row."""
    eomt.save(tmp_path / "m.safetensors", tiny_model(), task="shapes")
    for name in names:
        Image.new("RGB", (20, 30)).save(tmp_path / f"{name}.jpg")
    paths = [tmp_path / f"{name}.jpg" for name in names]
    predict_here(*paths, "--ckpt", tmp_path / "m.safetensors", "--out", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"]
    assert [row["image_id"] for row in rows] == ids
    assert [row["image"] for row in rows] == [path.name for path in paths]


def test_predict_background_takes_masks(world, stages, photo, tmp_path):
    """What a distractor wins is void: with the whole vocabulary behind one prompt, only it is left."""
    (tmp_path / "words.txt").write_text(
        ", ".join(WORDS.names[1:25]) + "\nstuff: " + ", ".join(WORDS.names[25:])
    )
    areas = {}
    for background in ("none", tmp_path / "words.txt"):
        out = tmp_path / str(background).replace("/", "_")
        predict_here(
            photo, "--ckpt", world / "A", "--prompts", "red disc", "--background", background, "--out", out
        )
        rows = json.loads((out / "predictions.json").read_text())["annotations"][0]["segments_info"]
        assert {row["name"] for row in rows} <= {"red disc"}
        areas[str(background)] = sum(row["area"] for row in rows)
    assert areas[str(tmp_path / "words.txt")] < areas["none"] or areas["none"] == 0


def test_set_classes_no_recompile(world, stages, val):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = eomt.load(world / "A"), CompileCounter()
    image = val[0].image[None]
    with torch.no_grad():
        plain = model(image)[-1].classes
        model.compile(backend=counter)
        torch.testing.assert_close(model(image)[-1].classes, plain)
        frames = counter.frame_count
        assert frames > 0
        for names in (["red disc", "blue bar"], ["green ring", "gray dots", "white cross"]):
            model.set_classes(names)
            assert model(image)[-1].classes.shape == (1, 12, len(names) + 1)
    assert counter.frame_count == frames and model.meta["names"] == names
    torch._dynamo.reset()


@pytest.mark.parametrize("isolate", [True, False])
def test_training_step_is_one_graph(isolate):
    """Nothing in training falls out of a compiled model; fullgraph raises where something would."""
    torch.manual_seed(0)
    tower = siglip2.VisionTower(16, 32, 3, 2, 8, 2)
    head = siglip2.OpenVocabHead(16, torch.randn(3, 16), torch.arange(3), [True] * 3, 4.7, -16.0)
    model = eomt.OpenVocabEoMT(tower, head, 4, 2, isolate=isolate)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    torch._dynamo.reset()
    for mask_prob in (torch.tensor([1.0, 0.5]), None):  # while masks are annealed, and after
        arguments = images, mask_prob, torch.rand(2, 2, 4)
        want = model(*arguments)
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(*arguments)
        torch.testing.assert_close([p.classes for p in got], [p.classes for p in want])
        torch.testing.assert_close([p.masks for p in got], [p.masks for p in want])
    torch._dynamo.reset()


def test_fused_layers_need_isolate(world, stages):
    """Joint attention has no place for them: they would be left out unsaid, and stop two ranks."""
    begin = ["--quick", "--stage", "C", "--data", "x", "--no-isolate"]
    with pytest.raises(ValueError, match="^--fuse-last 3: only with --isolate; give --fuse-last 1$"):
        train.make_open(train.parse(begin)[0], WORDS, None)
    words = [*TINY, "--stage", "C", "--no-isolate", "--fuse-last", 1, "--data", world / "data", "--steps", 2]
    two = Run(world / "C2", *words, "--encoder-weights", world / "tower", "--out", world / "C2", ranks=2)
    assert two.wait() == [0, 0], two.text()


def test_set_classes_takes_the_templates_of_each_kind(world, stages, monkeypatch):
    """Stuff and Mandarin words have their own; a hyphen is no reason to glue two words."""
    asked, real = [], siglip2.text_rows
    monkeypatch.setattr(siglip2, "text_rows", lambda *words: asked.append(words[2]) or real(*words))
    model = eomt.load(world / "A")
    model.meta["template"] = "default"
    model.set_classes(["road", "t-shirt", "\u732b"], [False, True, True])
    words = vocab.Vocabulary("", ["road", "t-shirt", "\u732b"], [1, 2, 3], [False, True, True])
    assert asked == [vocab.prompts(words, vocab.LANGUAGES)]
    assert "the road background" in asked[0][0][0] and "t shirt" in asked[0][1][0][0]
    assert all("\u732b" in text and not re.search("[a-z]", text) for text in asked[0][2][0])
    for names in ("cat", ["cat", "dog", "cat"]):
        with pytest.raises(ValueError, match="^names .*: give a list of different names, and a `thing` for "):
            model.set_classes(names)
    with pytest.raises(ValueError, match="and a `thing` for each$"):
        model.set_classes(["cat", "dog"], [True])


def test_set_classes_keeps_the_calibration_of_no_class(world, stages, tmp_path):
    """What a file says of its head is what the head does, also after another vocabulary."""
    model = eomt.load(world / "A")
    values = dict(alpha=0.1, beta=0.3, temp_in=0.9, temp_out=1.1)
    model.meta["calibration"] = values | dict(class_bias=[0.5, *[0.0] * 33], bias=0.2, reject=-3.0)
    model.class_head.calibrate(**model.meta["calibration"])
    model.set_classes(["red disc", "blue bar"])
    assert model.meta["calibration"] == values
    eomt.save(tmp_path / "two.safetensors", model, **model.meta)
    again, image = eomt.load(tmp_path / "two.safetensors"), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(again(image)[-1].classes, model(image)[-1].classes)


def test_set_classes_cache_identity(world, stages, tmp_path):
    model, cache = eomt.load(world / "A"), tmp_path / "rows.safetensors"
    rows = []
    for _ in range(2):
        model.set_classes(["red disc", "blue bar"], cache=cache)
        rows.append(model.class_head.rows.clone())
    assert torch.equal(*rows) and cache.exists()
    assert torch.allclose(rows[0][0], eomt.load(world / "A").class_head.rows[0], atol=1e-6)  # as in training


# ---- mistakes ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def other_tower(tmp_path_factory):
    """Another SigLIP 2: right files, other weights."""
    folder = tmp_path_factory.mktemp("other")
    train.pretrain_toy(folder, WORDS, 1, 3, say=lambda text: None)
    return folder


def test_mistakes_one_line(world, stages, other_tower, tmp_path, photo):
    (tmp_path / "split.json").write_text('["red ring", "purple disc"]')
    here = ["--data", world / "data"]
    new = ["--stage", "A", *here, "--encoder-weights", world / "tower", "--out", tmp_path / "x", "--steps", 1]
    words = ["--prompts", "red disc"]
    cases = [
        (train_here, [*new, "--split", tmp_path / "split.json"], "purple disc: unknown class of shapes_open"),
        (train_here, ["--stage", "D"], "--stage D: unknown"),
        (train_here, ["--stage", "A", "--encoder", "dinov2_small"], "not for --stage A"),
        (train_here, [*new, "--distill-feat", 1], "use --lora"),
        (train_here, [*new, "--no-train-heads"], "nothing is left to train"),
        (train_here, [*new, "--query-blocks", "both"], "--query-blocks both; one of copy, shared"),
        (train_here, ["--stage", "B", *here, "--init", world / "A", "--split", "ovp_val"], "has shapes"),
        (train_here, ["--stage", "A", *here, "--init", world / "B"], "use --lora"),
        (train_here, ["MODEL.BACKBONE.LORA.RANK_ATTN", "16"], "this is --lora-rank-attn here"),
        (eval_here, ["--ckpt", world / "A", "--ov-temp", "warm"], "--ov-temp warm"),
        (eval_here, ["--ckpt", world / "A", "--ov-pool", "max"], "--ov-pool max: unknown"),
        (eval_here, ["--ckpt", world / "A", "--sweep", "lr=1,2"], "write ov-bias"),
        (predict_here, [photo, "--ckpt", world / "A", "--prompts", ""], "empty prompt"),
        (predict_here, [photo, "--ckpt", world / "A", "--prompts", "a,,b"], "empty prompt"),
        (
            predict_here,
            [photo, "--ckpt", world / "A", *words, "--text-weights", other_tower, "--background", "none"],
            "the text tower of another SigLIP 2",
        ),
    ]
    for script, argv, part in cases:
        with pytest.raises(ValueError) as error:
            script(*argv)
        assert part in str(error.value) and "\n" not in str(error.value), (argv, str(error.value))


@pytest.mark.parametrize("flag,word", [
    ("--ov-temp", "a,b"), ("--ov-reject", "x"), ("--ov-class-bias", "no.json")])
def test_calibration_is_refused_before_the_training(world, tmp_path, flag, word):
    here = ["--data", world / "data", "--encoder-weights", world / "tower", "--out", tmp_path / "run"]
    with pytest.raises((ValueError, OSError), match=word):
        train_here("--stage", "A", *here, "--steps", 1, flag, word)
    assert not (tmp_path / "run").exists()


def test_lora_clamped_and_no_init_say_so(world, tmp_path, capsys):
    train_here(
        "--stage",
        "B",
        "--data",
        world / "data",
        "--encoder-weights",
        world / "tower",
        "--steps",
        1,
        "--lora-last-n",
        9,
        "--out",
        tmp_path / "run",
    )
    text = capsys.readouterr().out
    assert "notice: --lora-last-n 9: the tower has 4 blocks" in text
    assert len(re.findall(r"^stage B without --init: starts from", text, re.M)) == 1


def test_tokenizer_with_other_settings(world, tmp_path):
    """Padding, truncation and bos that a file asks for are overruled; other pad and eos ids are refused."""
    from tokenizers import Tokenizer

    model = Tokenizer.from_file(str(world / "tower" / "tokenizer.json"))
    model.enable_padding(direction="left", pad_id=5, length=9)
    model.enable_truncation(2)
    model.save(str(tmp_path / "tokenizer.json"))
    ours, theirs = (
        siglip2.Tokenizer(path, 4)(["a red ring", "dots"]) for path in (world / "tower", tmp_path)
    )
    assert torch.equal(ours, theirs)
    text = (world / "tower" / "tokenizer.json").read_text().replace('"<eos>"', '"</s>"')
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="ids 0, 1 are <pad>, </s>"):
        train_here(
            "--stage",
            "A",
            "--data",
            world / "data",
            "--encoder-weights",
            world / "tower",
            "--tokenizer",
            tmp_path,
            "--out",
            tmp_path / "x",
        )


# ---- the command line keeps its promises -------------------------------------------------------------------
def test_tokenizer_of_a_larger_vocabulary(world):
    text = siglip2.TextTower(*siglip2.TOY, vocab=8, length=4)
    with pytest.raises(ValueError, match="the tower knows 8; give its own"):
        siglip2.embed_text(text, siglip2.Tokenizer(world / "tower", 4), [[["a white cross"]]])


def test_seed_words_name_real_flags():
    flags = set(train.parser()._option_string_actions)
    for word, flag in train.SEED_WORDS.items():
        assert set(re.findall(r"--[\w-]+", flag)) <= flags, (word, flag)


def log_records(raw):
    """Records of a W&B log: LevelDB's blocks of 32 KB after 7 bytes; each part has crc, length, kind."""
    at, record = 7, b""
    while at + 7 <= len(raw):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        record += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_offline_has_the_keys_of_metrics(world, tmp_path):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    out = tmp_path / "run"
    rows = train_here(
        "--stage",
        "A",
        "--data",
        world / "data",
        "--encoder-weights",
        world / "tower",
        "--steps",
        2,
        "--out",
        out,
        "--wandb",
        "--wandb-mode",
        "offline",
        "--wandb-name",
        "try",
        "--wandb-tags",
        "a,b",
        "--wandb-watch",
    )
    [path] = out.glob("wandb/offline-run-*/run-*.wandb")
    history, tags = {}, []
    for chunk in log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(chunk)
        for item in record.history.item:
            key = item.key or ".".join(item.nested_key)
            history[key] = json.loads(item.value_json)
        tags += list(record.run.tags)
    want = {key for row in rows for key in row} - {"step"}
    assert want <= history.keys() and {"a", "b"} <= set(tags)
    assert history["PQ_unseen"] == pytest.approx(rows[-1]["PQ_unseen"])


# ---- The procedural world at full length: bounds that both seeds of its design passed ----------------------
@pytest.mark.slow
def test_quick_stage_a_meets_its_bounds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg, origin = train.parse(["--quick", "--stage", "A", "--workers", "0"])
    assert train.run(cfg, origin) == 0
    model, val = eomt.load(cfg.out), data.SegmentDataset(cfg.data, "shapes_open", "val")
    head, unseen, thing = model.class_head, model.meta["unseen"], torch.tensor(vocab.SHAPES_OPEN.thing)

    # zero-shot: which of 25 things does an image show?
    images, visible = train.toy_scenes(vocab.SHAPES_OPEN, 300, 9, 1)
    with torch.no_grad():
        pooled = model.encoder.head(model.encoder((images.float() / 255 - model.mean) / model.std))  # (n, C)
    logits = (pooled @ head.rows.T).masked_fill(~thing[head.owner], -torch.inf)  # (n, R)
    true = (visible & thing).float().argmax(1)
    right = head.owner[logits.argmax(1)] == true
    assert right[head.seen[true]].float().mean() > 0.5

    regions = eval_here("--ckpt", cfg.out, "--gt-masks")
    assert regions["map"]["stuff"] > 90 and regions["map"]["things"] > 40
    assert max(regions["mean"].values()) < 10

    whole = eval_here("--ckpt", cfg.out).numbers
    inside = eval_here("--ckpt", cfg.out, "--ov-alpha", 0, "--ov-beta", 0).numbers
    assert whole["PQ_seen"] > 40 and whole["PQ_unseen"] > max(25, 1.3 * inside["PQ_unseen"])
    rows, at = head.rows.clone(), [int((head.owner == k).nonzero()) for k in unseen]
    rows[at] = head.rows[at[1:] + at[:1]]
    head.set_classes(rows, head.owner, head.seen)
    assert whole["PQ_unseen"] > 5 * evaluation.evaluate(model, val).numbers["PQ_unseen"]
