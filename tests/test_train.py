"""train.py: settings, schedules, groups, checkpoints, the quick run end to end."""

# SPDX-License-Identifier: MIT
import json
import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eomt
import eval as evaluation
import predict
import train
import vocab

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "--quick",
    "--steps",
    "4",
    "--batch-size",
    "4",
    "--num-points",
    "64",
    "--log-every",
    "1",
    "--save-every",
    "2",
    "--eval-limit",
    "4",
    "--num-queries",
    "6",
]


SERVER = multiprocessing.get_context("forkserver")  # its processes begin with the modules imported
SERVER.set_forkserver_preload(["train", "eval", "predict"])


def script(argv, cwd, environment, folder):
    """What `python argv[0] ...` does, with what it says in two files."""
    for number in (1, 2):
        os.dup2(os.open(folder / str(number), os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def run(name, *argv, cwd=".", env=None):
    """A script as a user runs it; its exit code and what it said."""
    with tempfile.TemporaryDirectory() as folder:
        words = [str(ROOT / name), *map(str, argv)]
        process = SERVER.Process(target=script, args=(words, cwd, env or {}, Path(folder)))
        process.start()
        process.join(300)
        process.kill()
        said = {word: Path(folder, str(n)).read_text() for n, word in ((1, "stdout"), (2, "stderr"))}
    return SimpleNamespace(returncode=process.exitcode, **said)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A small procedural data set as official zips."""
    root = tmp_path_factory.mktemp("shapes")
    data.write_shapes(root, data.TASKS["shapes"].vocabulary, 24, 7, seed=1)
    return root


@pytest.fixture(scope="session")
def short_run(shapes, tmp_path_factory):
    """Four steps from start to end, in this process's manner but as its own process."""
    out = tmp_path_factory.mktemp("runs") / "short"
    done = run("train.py", *TINY, "--data", shapes, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_profile_splits_the_step(shapes, tmp_path):
    """The parts add up to the time of a step, and the trace is one that Chrome opens."""
    done = run("train.py", *TINY, "--profile", "--data", shapes, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    parts = ("rest", "data", "forward", "loss", "backward", "optimiser")
    for row in [row for row in rows if "loss" in row][1:]:  # the first one makes caches
        seconds = [row[f"ms_{part}"] / 1e3 for part in parts]
        assert min(seconds[1:]) > 0 and 0.8 < sum(seconds) * row["img_s"] / 4 < 1.25, row
    assert re.search(r"^step 4/4 .* ms_data \d+\.\d .* ms_optimiser \d+\.\d$", done.stdout, re.M), done.stdout
    assert len(json.loads((tmp_path / "run" / "trace-0.json").read_text())["traceEvents"]) > 1000


def test_profile_after_an_evaluation(shapes, tmp_path):
    """Its time, and the steps between the last line and it, are in no part of the steps that follow."""
    flags = ["--steps", 9, "--log-every", 5, "--eval-every", 4, "--save-every", 9]
    done = run("train.py", *TINY, *flags, "--profile", "--data", shapes, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert [row["step"] for row in rows] == [5, 9]
    for row in rows:  # both are of one step
        seconds = sum(value for key, value in row.items() if key.startswith("ms_")) / 1e3
        assert 0.8 < seconds * row["img_s"] / 4 < 1.25, row


def test_profile_of_a_run_shorter_than_its_trace(shapes, tmp_path):
    """A profiler left open at the end of the process crashed it."""
    done = run("train.py", *TINY, "--profile", "--steps", 2, "--data", shapes, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr


# ---- settings ----------------------------------------------------------------------------------------------
def test_parse_precedence(tmp_path):
    cfg, origin = train.parse(["--task", "ade20k_semantic", "--encoder", "dinov2_base", "--lr", "3e-4"])
    assert (cfg.size, cfg.num_queries, cfg.epochs, cfg.color_jitter, cfg.lr) == (512, 100, 31, True, 3e-4)
    assert origin["size"] == "task" and origin["lr"] == "flag" and origin["encoder_weights"] == "encoder"
    (tmp_path / "config.json").write_text(
        json.dumps(
            dict(config=dict(task="ade20k_semantic", size=640, lr=1e-5, scale=[0.5, 1.5], out="other"))
        )
    )
    cfg, origin = train.parse(["--config", str(tmp_path / "config.json"), "--lr", "2e-4"])
    assert (cfg.task, cfg.size, cfg.lr, cfg.scale) == ("ade20k_semantic", 640, 2e-4, (0.5, 1.5))
    assert origin["size"] == "config" and cfg.out.startswith("runs/ade20k_semantic")


def test_parse_spellings():
    cfg, _ = train.parse(["--batch_size", "8", "--no-masked-attn", "--scale", "0.5,1", "--num-points=12"])
    assert (cfg.batch_size, cfg.masked_attn, cfg.scale, cfg.num_points) == (8, False, (0.5, 1.0), 12)


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--batchsize", "3"], "did you mean --batch-size"),
        (["--task", "coco"], "--task coco: unknown"),
        (["--encoder", "vit"], "--encoder vit: unknown"),
        (["--data.batch_size", "4"], "--batch-size"),
        (["--model.ckpt_path", "x"], "--init"),
        (["stray"], "unrecognized arguments"),
    ],
)
def test_parse_mistakes_one_line(argv, words):
    with pytest.raises(ValueError) as error:
        train.parse(argv)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_parse_no_abbreviations():
    with pytest.raises(ValueError, match="unrecognized arguments"):
        train.parse(["--batch", "3"])


def test_split_batch():
    cfg, _ = train.parse(["--batch-size", "16"])
    assert train.split_batch(cfg, 4) == 1 and cfg.device_batch_size == 4
    cfg.device_batch_size = 2
    assert train.split_batch(cfg, 4) == 2
    cfg.device_batch_size = 3
    with pytest.raises(ValueError, match="1, 2, 4 fit"):
        train.split_batch(cfg, 4)
    with pytest.raises(ValueError, match="1, 2, 4, 8, 16 ranks fit"):
        train.split_batch(cfg, 3)


# ---- schedules and groups ----------------------------------------------------------------------------------
def test_lr_two_stage_warmup():
    at = lambda step, part: train.lr_at(step, 10000, part, (500, 1000))  # noqa: E731
    assert at(0, "head") == 0 and at(250, "head") == 0.5 and at(500, "head") == 1
    assert at(499, "encoder") == 0 and at(1000, "encoder") == 0.5 and at(1500, "encoder") == 1
    assert at(10000, "head") == 0 and at(10000, "encoder") == 0
    assert abs(at(5250, "head") - 0.5**0.9) < 1e-12 and abs(at(5750, "encoder") - 0.5**0.9) < 1e-12


def test_param_groups_layer_decay():
    cfg, _ = train.parse(["--encoder", "dinov2_small"])
    model = train.make_model(cfg, data.TASKS["coco_panoptic"].vocabulary)
    groups = train.param_groups(model, cfg)
    owner = {id(p): g for g in groups for p in g["params"]}
    assert len(owner) == len(list(model.parameters())) == sum(len(g["params"]) for g in groups)
    factor = lambda p: (owner[id(p)]["part"], round(owner[id(p)]["factor"], 10))  # noqa: E731
    assert factor(model.encoder.blocks[11].ls1) == ("encoder", 1) and factor(model.encoder.norm.weight) == (
        "encoder",
        1,
    )
    assert factor(model.encoder.blocks[3].mlp.fc1.weight) == ("encoder", round(0.8**8, 10))
    for p in (model.encoder.pos_embed, model.encoder.cls_token, model.encoder.patch_embed.weight):
        assert factor(p) == ("encoder", round(0.8**11, 10))
    assert factor(model.q.weight) == ("head", 1) and len(groups) == 13
    cfg.llrd_query_blocks = False  # DINOv3: the last num_blocks blocks at the base rate
    base = [g for g in train.param_groups(model, cfg) if g["part"] == "encoder" and g["factor"] == 1][0]
    assert sum(p is model.encoder.blocks[9].ls1 for p in base["params"]) == 1


def test_slot_seed_does_not_depend_on_split():
    """Slots of a global batch of 8: 1 rank, 2 ranks x 2 parts, 4 ranks: the same set, no two alike."""

    def slots(world, device_batch):
        parts = 8 // world // device_batch
        return sorted(
            (m * world + r) * device_batch + i
            for r in range(world)
            for m in range(parts)
            for i in range(device_batch)
        )

    assert slots(1, 8) == slots(2, 2) == slots(4, 2) == list(range(8))
    seeds = {train.slot_seed(s, step, slot) for s in range(3) for step in range(20) for slot in range(16)}
    assert len(seeds) == 3 * 20 * 16


# ---- a run -------------------------------------------------------------------------------------------------
def test_run_folder(short_run):
    out, stdout = short_run
    names = {p.name for p in out.iterdir()}
    assert {
        ".lock",
        "config.json",
        "log.txt",
        "metrics.jsonl",
        "summary.json",
        "best",
        "curves.png",
        "pq_per_class.png",
        "viz",
        "step-00000002",
        "step-00000004",
    } == names
    assert {p.name for p in (out / "step-00000004").iterdir()} == {
        "model.safetensors",
        "resume.pt",
        "meta.json",
    }
    assert re.search(
        r"step 4/4 loss \d+\.\d{4} mask \S+ dice \S+ class \S+ lr \S+ grad \S+ img/s \S+ mem 0.0GB eta "
        r"0:00:00",
        stdout,
    )
    assert re.search(r"^PQ \d+\.\d\d PQ_th \S+ PQ_st \S+ .*images 7 in \S+ s$", stdout, re.M)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4] and "PQ" in rows[-1]
    assert Image.open(out / "viz" / "step_00000004.png").size[0] > 500
    model = eomt.load(out)
    assert model.meta["task"] == "shapes" and model.meta["step"] == 4 and model.meta["names"][0] == "red disc"
    assert json.loads((out / "config.json").read_text())["config"]["batch_size"] == 4


def test_run_file_modes_follow_umask(short_run):
    mask = os.umask(0)
    os.umask(mask)
    for path in (short_run[0] / "step-00000004").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_eval_command_repeats_training_number(short_run, shapes, tmp_path):
    out, stdout = short_run
    done = run(
        "eval.py",
        "--ckpt",
        out,
        "--data",
        shapes,
        "--save-panoptic",
        tmp_path / "pan",
        "--workers",
        0,
        "--out",
        tmp_path / "numbers.json",
    )
    assert done.returncode == 0, done.stderr
    cut = lambda text: re.search(r"^(PQ .*) in ", text, re.M).group(1)  # noqa: E731
    assert cut(done.stdout) == cut(stdout)
    assert json.loads((tmp_path / "numbers.json").read_text())["images"] == 7
    rows = json.loads((tmp_path / "pan.json").read_text())["annotations"]
    assert len(rows) == 7 and all((tmp_path / "pan" / row["file_name"]).exists() for row in rows)
    for row in rows:
        ids = np.asarray(Image.open(tmp_path / "pan" / row["file_name"])).astype(int) @ [1, 256, 65536]
        assert set(np.unique(ids)) - {0} == {s["id"] for s in row["segments_info"]}
        assert all((ids == s["id"]).sum() == s["area"] for s in row["segments_info"])


def test_eval_partial_and_refusals(short_run, shapes, tmp_path):
    out, _ = short_run
    done = run("eval.py", "--ckpt", out, "--data", shapes, "--limit", 3, "--workers", 0)
    assert "images 3" in done.stdout and "(partial)" in done.stdout
    for flags, said in ((["--limit", -3], "--limit -3, --workers 2: below 0; give 0 or more"),
                        (["--size", -16], "--size -16: no multiple of the patch size 8"),
                        (["--out", tmp_path / "no" / "x.json"], "not a file in a folder that is there;")):
        done = run("eval.py", "--ckpt", out, "--data", shapes, *flags)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and said in done.stderr
    done = run("eval.py", "--ckpt", tmp_path / "nothing", "--data", shapes)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "PQ" not in done.stdout


def test_predict_command(short_run, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 120, 3), np.uint8)).save(
        tmp_path / "a.png"
    )
    Image.new("L", (64, 50)).save(tmp_path / "b.jpg")
    done = run("predict.py", tmp_path, "--ckpt", short_run[0], "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "a.overlay.png",
        "a.png",
        "b.overlay.png",
        "b.png",
        "predictions.json",
    }
    assert Image.open(tmp_path / "out" / "a.overlay.png").size == (120, 80)
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"]) == 2
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:200])
    done = run("predict.py", tmp_path / "cut.jpg", "--ckpt", short_run[0], "--out", tmp_path / "out")
    assert done.returncode == 1 and re.fullmatch(r"error: .*cut\.jpg: cannot be decoded.*\n", done.stderr)
    (tmp_path / "aa.jpg").write_bytes(b"")
    done = run("predict.py", tmp_path, "--ckpt", short_run[0], "--out", tmp_path / "rest")
    line = r"error: .*aa\.jpg: 0 bytes, not a pic.* \(and 1 more of 4 images\)\n"  # and the others are there
    assert done.returncode == 1 and re.fullmatch(line, done.stderr)
    assert "aa.jpg: 0 bytes" in done.stdout and "cut.jpg: cannot be decoded" in done.stdout  # each is named
    rows = json.loads((tmp_path / "rest" / "predictions.json").read_text())["annotations"]
    assert [row["image"] for row in rows] == ["a.png", "b.jpg"] and (tmp_path / "rest" / "b.png").exists()
    done = run("predict.py", tmp_path, "--ckpt", short_run[0], "--out", tmp_path / "a.png")
    assert (done.returncode, done.stderr) == (1, f"error: {tmp_path / 'a.png'}: file exists\n")


def test_overwrite_leaves_models_of_others_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    for flags, said in (({}, "already holds a run"), ({"overwrite": True}, "no run of train.py")):
        advice = "--resume continues it, --overwrite replaces it; give one of these"
        with pytest.raises(ValueError, match=f"{said}; {advice}$"):
            train.claim(tmp_path, train.Config(**flags))
    (tmp_path / ".lock").touch()  # other programs have locks, too
    with pytest.raises(ValueError, match="no run of train.py"):
        train.claim(tmp_path, train.Config(overwrite=True))
    assert len(list(tmp_path.iterdir())) == 3
    (tmp_path / "log.txt").touch()
    train.claim(tmp_path, train.Config(overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "log.txt"]  # before its first words


def test_overwrite_never_removes_the_open_lock(tmp_path):
    """On NFS an open file that is removed stays under another name, and its folder cannot be removed."""
    run, link = tmp_path / "run", tmp_path / "link"
    (tmp_path / "precious").mkdir()
    train.claim(run, train.Config())
    lock = (run / ".lock").stat().st_ino
    for out in (run, link):
        (run / "step-00000001").mkdir()
        (run / "log.txt").write_text("old")
        (run / "viz").symlink_to(tmp_path / "precious")
        link.is_symlink() or link.symlink_to(run)
        train.claim(out, train.Config(overwrite=True))
        assert sorted(path.name for path in run.iterdir()) == [".lock", "log.txt"]
        assert (run / ".lock").stat().st_ino == lock and not (run / "log.txt").read_text()
    assert link.is_symlink() and (tmp_path / "precious").exists()


def test_overwrite_removes_the_old_run_only_for_one_that_starts(short_run, shapes, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(short_run[0], out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for flags, words in ((("--init", "/no/such"), "no such checkpoint"),
                         (("--encoder-weights", "/no/such.bin"), "/no/such.bin")):
        done = run("train.py", *TINY, "--data", shapes, "--out", out, "--overwrite", *flags)
        assert done.returncode == 1 and words in done.stderr, done.stderr
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = run("train.py", *TINY, "--data", shapes, "--out", out, "--overwrite", "--init", out)
    assert done.returncode == 0 and f"weights from {out}" in done.stdout, done.stderr
    assert f"weights from {out}" in (out / "log.txt").read_text()
    assert not set(before) - {path for path in out.rglob("*") if path.is_file()}


def trainer(shapes, out, *flags):
    """A Trainer of a tiny run in this process, and what to call it with."""
    cfg, origin = train.parse([*TINY, "--workers", "0", "--data", str(shapes), "--out", str(out), *flags])
    return lambda: train.run(cfg, origin)


def test_pictures_that_fail_lose_no_checkpoint(shapes, tmp_path, monkeypatch, capsys):
    """What is drawn after an evaluation comes after what is kept of it."""
    monkeypatch.setattr(predict, "draw_comparison", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer(shapes, tmp_path, "--eval-every", "3", "--eval-limit", "0")()
    assert (tmp_path / "best" / "model.safetensors").exists()
    assert json.loads((tmp_path / "summary.json").read_text())["step"] == 3
    assert [path.name for path in train.run_steps(tmp_path)] == ["step-00000003", "step-00000002"]


def test_rows_that_are_there_stay(shapes, tmp_path, capsys):
    """Only a resume makes rows again. A run in a folder whose checkpoints were moved away adds to them, as it
    does to log.txt."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 9, "loss": 1.0}\n{"st\n')
    (tmp_path / "log.txt").write_text("old\n")
    assert trainer(shapes, tmp_path)() == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [9, 1, 2, 3, 4, 4] and (tmp_path / "log.txt").read_text().startswith("old\n")
    assert "metrics.jsonl: line 2 is damaged" in capsys.readouterr().out


def test_best_that_is_no_number(shapes, tmp_path, monkeypatch):
    """A score of NaN is null in the files, and the next number is better, also after a resume."""
    monkeypatch.setattr(predict, "draw_comparison", lambda *_: None)
    scores = iter([float("nan"), 5.0, float("nan")])

    def score(*_):
        return evaluation.Result(dict(PQ=next(scores)), "PQ", [("a", float("nan"))], 7, 1.0, False)

    def written():
        text = (tmp_path / "summary.json").read_text()
        return json.loads(text, parse_constant=lambda word: pytest.fail(word))

    monkeypatch.setattr(evaluation, "evaluate", score)
    assert trainer(shapes, tmp_path)() == 0
    assert (written()["step"], written()["best"], written()["PQ"]) == (4, None, None)
    (tmp_path / "summary.json").write_text('{"step": 2, "best": null}')  # killed before the last evaluation
    assert trainer(shapes, tmp_path, "--resume")() == 0
    assert written()["best"] == written()["PQ"] == 5.0


def test_config_of_a_checkpoint_alone(short_run):
    """best/ and step-*/ may be all that is left of a run: their meta.json has its settings, too."""
    for folder in (short_run[0] / "best", train.run_steps(short_run[0])[0]):
        assert train.read_config(folder / "meta.json") == train.read_config(short_run[0] / "config.json")


def test_resume_of_a_config_goes_on_in_its_folder(short_run, tmp_path):
    config = str(short_run[0] / "config.json")
    assert train.parse(["--config", config, "--resume"])[0].out == str(short_run[0])
    assert train.parse(["--config", config, "--resume", "--out", "x"])[0].out == "x"
    assert train.parse(["--config", config])[0].out != str(short_run[0])  # another run of the same settings


def test_bad_images_are_counted_once(shapes, tmp_path, monkeypatch, capsys):
    """One that comes with every epoch is one; one more than --max-bad ends the run, which can go on."""
    bad, item = {"a.jpg"}, data.SegmentDataset.__getitem__

    def broken(self, key):
        sample = item(self, key)
        return sample._replace(faults=[f"{name}: cut" for name in sorted(bad)]) if self.transform else sample

    monkeypatch.setattr(data.SegmentDataset, "__getitem__", broken)
    begin = trainer(shapes, tmp_path, "--max-bad", "1")
    assert begin() == 0
    said = capsys.readouterr()
    assert "bad 1" in said.out and "bad 2" not in said.out and said.err.count("a.jpg") == 1
    assert json.loads((tmp_path / "summary.json").read_text())["bad"] == 1
    bad.add("b.jpg")
    with pytest.raises(ValueError, match="2 undecodable training images, --max-bad is 1; .* --resume$"):
        trainer(shapes, tmp_path, "--max-bad", "1", "--overwrite")()
    assert train.run_steps(tmp_path)  # what was trained until then


def test_small_data_trains_its_epochs(shapes, tmp_path, capsys):
    """Fewer images than the batch: an epoch is a step, as many as were asked for."""
    argv = ["--task", "shapes", "--encoder", "tiny", "--data", shapes, "--batch-size", "50", "--epochs", "5"]
    cfg, origin = train.parse([*map(str, argv), "--num-points", "16", "--workers", "0", "--eval-limit", "1",
                               "--out", str(tmp_path), "--device-batch-size", "1", "--size", "32"])
    assert train.run(cfg, origin) == 0 and cfg.steps == 5
    capsys.readouterr()


def test_unseen_classes_are_those_of_the_split(monkeypatch):
    """ovcoco_48_17 passes over 15 things: they are in neither group of the numbers."""
    flags = ["--data", "x", "--task", "coco_panoptic", "--stage", "A", "--split", "ovcoco_48_17", "--dry-run"]
    cfg, _ = train.parse(flags)
    model = train.open_model(cfg, data.TASKS["coco_panoptic"], 0, None, None)
    groups = evaluation.split_groups(model.meta | dict(thing=vocab.COCO_PANOPTIC.thing,
                                                       names=vocab.COCO_PANOPTIC.names))
    assert (len(groups["seen"]), len(groups["unseen"]), len(groups["unseen_th"])) == (101, 17, 17)


def test_ade_panoptic_is_told_where_it_starts_from(monkeypatch):
    said = []
    cfg, _ = train.parse(["--data", "x", "--task", "ade20k_panoptic", "--encoder-weights", "random"])
    train.load_start(None, cfg, said.append)
    assert len(said) == 1 and "--init" in said[0] and "COCO panoptic" in said[0]


def test_existing_run_is_kept(short_run, shapes):
    out, _ = short_run
    before = (out / "step-00000004" / "model.safetensors").read_bytes()
    done = run("train.py", *TINY, "--data", shapes, "--out", out)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "--resume" in done.stderr
    assert (out / "step-00000004" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--data", "/nowhere"], "/nowhere"),
        (["--batch-size", "5", "--device-batch-size", "2"], "fit"),
        (["--size", "60"], "multiple of the patch size"),
        (["--init", "/no/such"], "no such checkpoint"),
        (["--resume", "--seed", "5"], "seed 0 -> 5"),
    ],
)
def test_mistakes_one_line_exit_1(short_run, shapes, tmp_path, argv, words):
    out = short_run[0] if "--resume" in argv else tmp_path / "run"
    done = run("train.py", *TINY, "--data", shapes, "--out", out, *argv)
    assert done.returncode == 1 and words in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_dry_run_needs_no_data():
    done = run("train.py", "--task", "coco_panoptic", "--encoder", "dinov2_small", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "steps 88704" in done.stdout or "steps 88692" in done.stdout
    assert re.search(r"parameters: [\d,]+ trained, 0 frozen", done.stdout)
    cfg, _ = train.parse(["--encoder", "dinov2_giant", "--dry-run"])  # 20 s and 5 GB if it were made
    assert all(p.is_meta for p in train.make_model(cfg, vocab.SHAPES).parameters())


def test_init_from_other_classes(short_run, shapes, tmp_path):
    """A class head of another size and other queries are left out, each with a line; the rest is taken."""
    model = eomt.load(short_run[0])
    state = model.state_dict()
    other = eomt.EoMT(eomt.ViT(**model.encoder.config), 30, 9, model.num_blocks)
    own = other.state_dict()
    other.load_state_dict({k: v if own[k].shape == v.shape else own[k] for k, v in state.items()})
    eomt.save(tmp_path / "other.safetensors", other)
    done = run(
        "train.py",
        *TINY,
        "--data",
        shapes,
        "--out",
        tmp_path / "run",
        "--init",
        tmp_path / "other.safetensors",
        "--steps",
        1,
        "--lr",
        0,
    )
    assert done.returncode == 0, done.stderr
    assert "class head not loaded: 30 classes there, 8 here" in done.stdout
    assert "queries not loaded: 9 there, 6 here" in done.stdout
    got = eomt.load(tmp_path / "run").state_dict()
    for key, value in state.items():
        same = torch.equal(got[key], value)
        assert same or key.startswith(("class_head.", "q.")), key


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_images_go_to_a_gpu_from_pinned_memory(device, monkeypatch):
    """A copy from other memory is not made beside the work."""
    trainer, asked = object.__new__(train.Trainer), {}
    trainer.cfg, _ = train.parse(["--quick", "--steps", "3"])
    train.split_batch(trainer.cfg, 1)
    trainer.rank, trainer.world, trainer.missed, trainer.lap = 0, 1, False, lambda *_: {}
    trainer.device, trainer.raw = SimpleNamespace(type=device), torch.nn.Identity()
    trainer.sets = {"train": range(32)}
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *words, **options: asked.update(options) or [])
    monkeypatch.setattr(data, "staged", lambda batches, to: asked.update(to=to) or list(batches))
    assert trainer.fit(3, SimpleNamespace(signal=0)) == 0
    assert asked["pin_memory"] == (device == "cuda") and asked["to"] is trainer.device


def test_masks_are_left_out_once_all_are_annealed(monkeypatch):
    """From the end of the last window on no mask is made; before it, in each block."""
    cfg, _ = train.parse("--quick --steps 120 --num-blocks 2 --batch-size 2 --num-points 32".split())
    model = train.make_model(cfg, vocab.SHAPES).train()
    trainer, packed, pack = train.Trainer(cfg, model, torch.device("cpu")), [], eomt.pack_mask
    monkeypatch.setattr(eomt, "pack_mask", lambda *words: packed.append(1) or pack(*words))
    target = data.Target.from_masks(np.ones((1, 64, 64), bool), [0])
    images, made = torch.zeros(2, 3, 64, 64, dtype=torch.uint8), []
    part = SimpleNamespace(images=images, targets=[target] * 2, names="ab")
    for step in (0, 99, 100):  # the windows: 20 to 40, 80 to 100
        packed.clear()
        trainer.backward(step, 0, part, torch.ones(2))
        made.append(len(packed))
    assert made == [2, 2, 0]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_verdict_on_a_step_is_read_after_its_copy(device):
    """On CUDA the copy to the host may still be under way when `settle` comes: it waits for the event."""
    trainer = object.__new__(train.Trainer)
    trainer.world, trainer.scaler = 1, torch.amp.GradScaler(enabled=False)
    trainer.cfg, trainer.skipped, trainer.rank = SimpleNamespace(skip_nonfinite=0), 0, 0
    finite = torch.tensor(device == "cpu")
    copied = SimpleNamespace(synchronize=lambda: finite.fill_(True)) if device == "cuda" else None
    row = {"loss": torch.tensor(1.0)}, torch.tensor(1.0), ["a.jpg"], ""
    trainer.pending = copied, finite, 3, *row
    trainer.settle()
    assert trainer.pending is None and trainer.skipped == 0
    trainer.pending = None, torch.tensor(False), 3, *row
    with pytest.raises(ValueError, match="step 4: not finite"):
        trainer.settle()


def test_evaluation_leaves_the_training_graph_its_batch(monkeypatch):
    """Other batch sizes in between made the graph after the end of masking one of any batch size."""
    sizes, compile_ = [], torch.nn.Module.compile

    def note(graph, inputs):
        sizes.append([x if isinstance(x, torch.SymInt) else len(x) for x in inputs
                      if isinstance(x, torch.SymInt) or x.dtype == torch.uint8])
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_(self, backend=note))
    trainer, images = object.__new__(train.Trainer), torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    monkeypatch.setattr(train.Trainer, "evaluate", lambda self: self.raw.eval()(images))
    trainer.cfg, trainer.world = SimpleNamespace(compile=True), 1
    trainer.device = SimpleNamespace(type="cuda")
    trainer.raw = eomt.EoMT(eomt.ViT(16, 2, 2, 8, (2, 2)), 3, 2, 1)
    torch._dynamo.reset()
    trainer.wrap()
    for mask_prob in (torch.ones(1), None):
        trainer.raw.train()(images[:2], mask_prob, torch.rand(2, 1, 2))
        trainer.evaluate()
    torch._dynamo.reset()
    assert sizes == [[2], [2]]


def test_nonfinite_stops_and_keeps_weights(shapes, tmp_path):
    """An exploding loss ends the run with one line naming the images; the last checkpoint is whole."""
    done = run(
        "train.py",
        *TINY,
        "--data",
        shapes,
        "--out",
        tmp_path / "run",
        "--lr",
        "1e30",
        "--warmup",
        "0,0",
        "--clip-norm",
        "1e30",
        "--save-every",
        "1",
        "--steps",
        "30",
    )
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and ("not finite" in line or "NaN" in line) and ".jpg" in line
    steps = train.run_steps(tmp_path / "run")
    assert steps and eomt.damaged(steps[0]) is None
    assert all(v.isfinite().all() for v in eomt.read(steps[0])[1].values())


@pytest.mark.parametrize("name", ["m.onnx", "m.pt2"])
def test_export_is_checked(short_run, tmp_path, name):
    """The file is written, runs at another batch size, and gives the model's logits."""
    if name.endswith("onnx"):
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
    done = run("predict.py", "--ckpt", short_run[0], "--export", tmp_path / name)
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"at most (\S+)", done.stdout).group(1)) < 1e-4
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        want = eomt.load(short_run[0])(images)[-1].masks
    if name.endswith("onnx"):
        got = runtime.InferenceSession(str(tmp_path / name)).run(None, {"images": images.numpy()})[0]
    else:
        got = torch.export.load(tmp_path / name).module()(images)[0].detach()
    torch.testing.assert_close(torch.as_tensor(got), want, rtol=0, atol=1e-4)


# ---- what somebody new types ------------------------------------------------------------------------------
def answer(*argv):
    """(exit code, lines on stderr) of a script."""
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines()


def test_help_names_the_defaults():
    text = re.sub(r"\s+", " ", train.parser().format_help())
    assert "None" not in text and "(default: coco_panoptic)" in text and "(default: 0.0001)" in text
    assert len(train.parser().format_usage().splitlines()) == 1


@pytest.mark.parametrize("script", ["train.py", "eval.py", "predict.py"])
def test_mistyped_options_are_answered_in_one_line(script):
    code, lines = answer(script, "--size", "big", *(["--ckpt", "x"] if script != "train.py" else []))
    assert (code, len(lines)) == (1, 1), lines
    assert lines[0].startswith("error: argument --size: invalid int value: 'big'; ") and "--help" in lines[0]


@pytest.mark.parametrize("words,least", [
    *(([flag, "-1"], 0) for flag in ("--lr", "--steps", "--epochs", "--workers", "--eval-every")),
    *(([f"--{name}", "0"], 1) for name in ("size", "num-queries", "num-points", "log-every", "save-every")),
    (["--lora-last-n", "0", "--stage", "B"], 1),
    (["--batch-size", "0"], 1), (["--batch-size", "-4"], 1), (["--device-batch-size", "-2"], 0),
    (["--lr", "nan"], 0), (["--epochs", "nan"], 0)])
def test_numbers_too_small_are_refused(words, least):
    with pytest.raises(ValueError, match=rf"^{words[0]} {words[1]}(\.0)?; give {least} or more$"):
        train.parse(["--data", "x", *words])
    train.parse(["--data", "x", "--stage", "A", "--ov-bias", "-1"])  # the one that may be negative


@pytest.mark.parametrize("words,most", [
    (["--seed", 2**63], 2**63 - 1), (["--seed", 2**64], 2**63 - 1), (["--epochs", "inf"], 10**9),
    (["--scale", "inf,1"], 10**9), (["--timeout", "inf"], 10**9)])
def test_numbers_too_large_are_refused(words, most):
    with pytest.raises(ValueError, match=rf"^{words[0]} .*; give {most} or less$"):
        train.parse(["--data", "x", *map(str, words)])
    train.parse(["--data", "x", "--seed", str(2**63 - 1), "--clip-norm", "inf"])  # not clipped at all


@pytest.mark.parametrize("words,advice", [
    (["--warmup", "-1,5"], "give 0 or more"), (["--warmup", "5"], "give two numbers: a,b$"),
    (["--scale", "1,2,3"], "give two numbers: a,b$"), (["--first-window", "7"], "give two numbers: a,b$")])
def test_pairs_of_numbers(words, advice):
    with pytest.raises(ValueError, match=rf"^{words[0]} \(.*\); {advice}"):
        train.parse(["--data", "x", words[0] + "=" + words[1]])
    train.parse(["--data", "x", "--first-window", "0,3000", "--scale", "2,1", "--warmup", "0,0"])


@pytest.mark.parametrize("words", [["--lora"], ["--languages", "zh"], ["--ov-bias=-1"], ["--fuse-last", "3"]])
def test_flags_of_the_stages_need_one(words):
    with pytest.raises(ValueError, match=rf"^{words[0].split('=')[0]} .*: .*; give --stage A, B or C$"):
        train.parse(["--data", "x", *words])
    train.parse(["--data", "x", "--stage", "B", *words])
    train.parse(["--data", "x", "--no-lora", "--fuse-last", "1", "--split", "ovp_val"])  # as it is anyway


@pytest.mark.parametrize("flag", ["--amp", "--split-policy", "--query-blocks", "--query-init", "--ov-pool",
                                  "--wandb-mode", "--wandb-resume"])
def test_unknown_words_are_refused(flag):
    with pytest.raises(ValueError, match=rf"^{flag} foo; one of \w+, "):
        train.parse(["--data", "x", "--stage", "A", flag, "foo"])


@pytest.mark.parametrize("content", [b"\xff\xd8", b"[]", b"{}", b"{", b"3", b'{"config": [1]}', None])
def test_config_that_is_none(content, tmp_path):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match="x.json: not a run's config.json; give RUN/config.json"):
        train.parse(["--config", str(tmp_path / "x.json")])
    with pytest.raises(ValueError, match=f"^{tmp_path}: not a run's config.json; give RUN/config.json"):
        train.parse(["--config", str(tmp_path)])


def test_config_with_a_setting_that_is_none(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(dict(config=dict(lr=1, bogus=3))))
    with pytest.raises(ValueError, match="x.json!bogus: there is no such setting; remove it, or "):
        train.parse(["--config", str(tmp_path / "x.json")])


@pytest.mark.parametrize("key,value,wanted", [
    ("size", "big", "a whole number"), ("size", 6.5, "a whole number"), ("size", True, "a whole number"),
    ("lr", [1], "a number"), ("lr", None, "a number"), ("compile", 1, "true or false"),
    ("out", {}, "a text"), ("task", ["shapes"], "a text"), ("data", 3, "a text"),
    ("scale", 2, "a list of numbers"), ("scale", [1, "2"], "a list of numbers")])
def test_config_with_a_value_of_another_type(key, value, wanted, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(dict(config={key: value})))
    with pytest.raises(ValueError) as error:
        train.parse(["--config", str(tmp_path / "x.json")])
    assert str(error.value) == f"{tmp_path}/x.json!{key}: {json.dumps(value)}; give {wanted}"


def test_config_of_a_run_fits_its_types(short_run):
    cfg, _ = train.parse(["--config", str(short_run[0] / "config.json")])
    assert (cfg.steps, cfg.scale, cfg.first_window) == (4, (0.8, 1.25), ())


@pytest.mark.parametrize("flags,depth", [(("--encoder", "tiny"), 5), (("--encoder", "dinov2_large"), 24),
                                         (("--stage", "A", "--encoder", "siglip2_so400m"), 27)])
@pytest.mark.parametrize("number", ["99", "-1"])
def test_num_blocks_that_the_encoder_has_not(flags, depth, number):
    line = f"^--num-blocks {number}: {flags[-1]} has {depth}; give 0 to {depth}$"
    with pytest.raises(ValueError, match=line):
        train.parse([*flags, "--num-blocks", number])


def test_rope_is_stretched_only_where_there_is_one():
    for flags in (["--encoder", "tiny"], ["--stage", "A", "--encoder", "siglip2_base"]):
        with pytest.raises(ValueError, match=rf"^--rope-rescale 2.0: {flags[-1]} has no RoPE; give 1$"):
            train.parse([*flags, "--rope-rescale", "2"])
    with pytest.raises(ValueError, match="^--rope-rescale 0.0; give 1 or more$"):
        train.parse(["--encoder", "dinov3_small", "--rope-rescale", "0"])
    assert train.parse(["--encoder", "dinov3_small"])[0].rope_rescale == 2


def test_resume_and_overwrite_together_are_refused_before_the_work():
    for flags in (["--resume", "--overwrite"], ["--quick", "--overwrite", "--resume"]):
        with pytest.raises(ValueError, match="^--resume continues the run in --out, --overwrite replaces it; "
                           "give one of these$"):
            train.parse(["--data", "x", *flags])


def test_resume_and_overwrite_together_remove_nothing(tmp_path):
    for name in ("config.json", "log.txt"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="already holds a run; --resume continues it, --overwrite"):
        train.claim(tmp_path, train.Config(resume=True, overwrite=True))
    assert len(list(tmp_path.iterdir())) == 2


# ---- checkpoints that are not of this run ------------------------------------------------------------------
@pytest.fixture(scope="module")
def stage_run(tmp_path_factory):
    """A checkpoint of Stage A with random weights."""
    cfg, _ = train.parse(["--quick", "--stage", "A", "--encoder-weights", "random"])
    model = train.make_open(cfg, vocab.SHAPES_OPEN, None)
    path = tmp_path_factory.mktemp("stage") / "model.safetensors"
    eomt.save(path, model, stage="A", encoder=cfg.encoder)
    return path


def refused_start(work, *flags):
    """What `work(model, cfg, print)` or `work(cfg)` says of --init."""
    cfg, _ = train.parse([*map(str, flags)])
    with pytest.raises(ValueError) as error:
        work(cfg) if cfg.stage else work(train.make_model(cfg, vocab.SHAPES), cfg, print)
    return str(error.value)


def test_init_of_another_encoder_names_both(short_run, stage_run):
    """Where the keys would be listed otherwise; a stage's run is none without --stage."""
    words = "{}: made with --encoder {}, this run has --encoder {}; give --encoder {}, or another --init"
    told = refused_start(train.load_start, "--encoder", "dinov2_small", "--size", 64, "--init", short_run[0])
    assert told == words.format(short_run[0], "tiny", "dinov2_small", "tiny")
    told = refused_start(train.load_start, "--quick", "--init", stage_run)
    made = "siglip2_toy --stage A"
    assert told == words.format(stage_run, made, "tiny", made)


def test_stage_that_starts_from_a_run_without_one(short_run):
    for flags in (["--init", short_run[0]], ["--resume", "--out", short_run[0]]):
        told = refused_start(train.read_start, "--quick", "--stage", "A", *flags)
        advice = "leave it out, or give a run of --stage A, B or C"
        assert told == f"{short_run[0]}: made without --stage; {advice}"


def test_adapters_are_not_lost_unsaid(tmp_path):
    """The message names the run, also where --resume found it."""
    cfg, _ = train.parse(["--quick", "--stage", "A", "--encoder-weights", "random", "--out", str(tmp_path)])
    model = train.make_open(cfg, vocab.SHAPES_OPEN, None)
    with pytest.raises(ValueError, match=f"^{tmp_path}: its adapters would be lost without --lora; use"):
        train.freeze(model, cfg, {"encoder.blocks.0.attn.qkv.A": None})


def test_toy_tower_that_is_there_is_said(tmp_path, monkeypatch, capsys):
    """Whatever --seed and --pretrain-steps made it: one line, and how to get a new one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.QUICK_OPEN, "data", "small")
    data.write_shapes("small", vocab.SHAPES_OPEN, 2, 1)
    line = "notice: runs/toy-tower is there and used as it is; delete it to make a new one\n"
    for said in (0, 1):
        cfg, _ = train.parse(["--quick", "--stage", "A", "--pretrain-steps", "1", "--seed", str(said)])
        train.open_data(cfg, data.TASKS["shapes_open"], 0, None)
        assert capsys.readouterr().out.count(line) == said


def test_wandb_that_refuses_is_one_line(tmp_path, monkeypatch):
    class Error(Exception):
        pass

    def init(**settings):
        raise Error("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Error=Error, init=init))
    cfg, _ = train.parse(["--quick", "--wandb"])
    line = r"^--wandb: No API key .* log in\. Or: --wandb-mode offline --resume$"
    with pytest.raises(ValueError, match=line):
        train.Log(tmp_path, 0).start_wandb(cfg, None, {})


@pytest.mark.parametrize("fault", [TypeError, AttributeError, type("VersionError", (Exception,), {})])
def test_wandb_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch, fault):
    """A package that does not fit its protobuf raises what it likes; none of it is about training."""
    (tmp_path / "wandb.py").write_text("import broken_protobuf\nbroken_protobuf.start()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)

    def start():
        raise fault("Descriptors cannot be created directly.\nDowngrade it.")

    monkeypatch.setitem(sys.modules, "broken_protobuf", SimpleNamespace(start=start))
    cfg, _ = train.parse(["--quick", "--wandb"])
    line = r"^--wandb: Descriptors cannot be created directly\.; pip install --upgrade wandb$"
    with pytest.raises(ValueError, match=line):
        train.Log(tmp_path, 0).start_wandb(cfg, None, {})


# ---- what follows from the settings ------------------------------------------------------------------------
def test_encoder_that_nobody_published_starts_random():
    cfg, origin = train.parse(["--data", "x", "--encoder", "tiny"])
    assert cfg.encoder_weights == "random" and origin["encoder_weights"] == "encoder"


def test_resume_without_a_run_says_so(tmp_path):
    said = []
    assert train.resume(tmp_path, None, None, None, said.append) == 0
    assert len(said) == 1 and "no checkpoint to go on from; starts at step 0" in said[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="^--device cuda: torch finds no GPU; use --device cpu$"):
        eomt.load(tmp_path, "cuda")


def test_folders_named_like_pictures_are_not_predicted(tmp_path):
    (tmp_path / "a.jpg").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "b.jpg")
    assert predict.expand([str(tmp_path)]) == [tmp_path / "b.jpg"]


def test_short_trainings_are_not_all_warmup(shapes, tmp_path, capsys):
    """A warm-up that nobody gave leaves three quarters of the steps; a given one stays."""
    argv = ["--task", "shapes", "--encoder", "tiny", "--data", shapes, "--batch-size", "4", "--dry-run"]
    for more, wanted in (((), (8, 16)), (("--warmup", "500,1000"), (500, 1000))):
        cfg, origin = train.parse([*map(str, argv), "--steps", "100", *more])
        assert train.run(cfg, origin) == 0 and cfg.warmup == wanted
    cfg, origin = train.parse([*map(str, argv), "--steps", "4000"])
    assert train.run(cfg, origin) == 0 and cfg.warmup == (500, 1000)
    capsys.readouterr()


def test_config_keeps_nothing_that_follows_from_a_flag(tmp_path):
    stored = dict(steps=77, epochs=2.0, batch_size=16, device_batch_size=16)
    (tmp_path / "config.json").write_text(json.dumps(dict(config=stored)))
    begin = ["--data", "x", "--config", str(tmp_path / "config.json")]
    cfg, _ = train.parse(begin)
    assert (cfg.steps, cfg.device_batch_size) == (77, 16)
    cfg, _ = train.parse([*begin, "--batch-size", "4"])
    assert (cfg.steps, cfg.batch_size, cfg.device_batch_size) == (77, 4, 0)
    cfg, _ = train.parse([*begin, "--epochs", "3"])
    assert (cfg.steps, cfg.epochs) == (0, 3)
