"""bench.py: each subject prints tables and JSON without a GPU, and what it compares does the same work."""
# SPDX-License-Identifier: MIT
import argparse
import importlib.util
import json
import sys

import pytest
import torch
from PIL import features

import bench
import eomt
from kernels import ahead


def run_bench(monkeypatch, capsys, tmp_path, *words):
    """Text and rows of `python bench.py WORDS --json ...`, run in this process."""
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["bench.py", *words, "--json", str(path)])
    bench.main()
    return capsys.readouterr().out, json.loads(path.read_text())


def measured(result, case):
    """{name: row} of the one case whose title holds the words."""
    titles = {row["case"] for row in result["rows"] if case in row["case"]}
    assert len(titles) == 1, titles
    return {row["name"]: row for row in result["rows"] if row["case"] in titles}


def check_tables(text, result):
    """Every row of the JSON is a line of a Markdown table with its header's number of cells."""
    lines = text.splitlines()
    assert lines[0].startswith("command: python bench.py ") and lines[1].startswith("gpu: ")
    assert lines[2] == f"torch: {torch.__version__}" and lines[3].startswith("triton: ")
    assert lines[4].startswith("cpu: ") and lines[4].endswith(f"zlib {features.version('zlib')}")
    assert lines[5].startswith("rivals: ") and result["rivals"] == lines[5].removeprefix("rivals: ")
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) - 2 * sum(line.startswith("|---") for line in tables) == len(result["rows"])
    widths = [line.count("|") for line in tables]
    assert set(widths) <= {8, 9}  # rivals, ahead of time
    for row in result["rows"]:
        if "median" in row:
            assert 0 < row["p20"] <= row["median"] <= row["p80"] and row["samples"] >= 2
            assert f"| {row['name']} | {1e3 * row['median']:.4g} (" in text


cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="these are the rows of a machine without a GPU")


@cpu
def test_bench_kernels(monkeypatch, capsys, tmp_path):
    text, result = run_bench(monkeypatch, capsys, tmp_path, "kernels", "--quick")
    check_tables(text, result)
    rivals = ["ours", "mask expanded over heads (upstream)", "mask[:, None]", "split SDPA"]
    for case in ("forward, tiny", "forward + backward, tiny 64", "mask + forward + backward"):
        rows = measured(result, f"attention, {case}")
        assert list(rows)[:4] == rivals and rows["FlexAttention"]["note"] == "CUDA only"
        assert rows["ours"]["ours_over_it"] == 1
        for name in rivals:  # all compute the same attention
            assert rows[name]["error"] < 1e-5 and rows[name]["unit"] == "GFLOP/s" and rows[name]["rate"] > 0
    merge = measured(result, "merge of 20 queries")
    assert list(merge) == ["ours", "two F.interpolate"] and merge["two F.interpolate"]["error"] < 1e-4
    for case in ("forward, tiny", "forward + backward, tiny"):
        rows = measured(result, f"upscale, {case}")
        assert list(rows) == ["ours", "modules"] and rows["modules"]["ours_over_it"] > 0
        assert rows["modules"]["error"] < 1e-5  # backward: of all gradients
    masks = measured(result, "from logits")
    assert masks["ours"]["error"] == masks["mask[:, None]"]["error"] == 0  # all bits
    assert "GPU rows were not run" in text
    if ahead.triton:
        compiled = [row for row in result["rows"] if row["case"] == "ahead of time"]
        assert [row["arch"] for row in compiled] == ["sm_90", "sm_80"]
        assert all(row["spilled bytes"] == 0 and row["registers"] > 60 for row in compiled)
        assert compiled[0]["HGMMA"] > 0 and compiled[1]["HMMA"] > 0


@cpu
def test_bench_model(monkeypatch, capsys, tmp_path):
    pytest.importorskip("transformers")
    text, result = run_bench(monkeypatch, capsys, tmp_path, "model", "--quick", "--batch", "1", "3")
    check_tables(text, result)
    for batch in (1, 3):
        rows = measured(result, f"network, tiny 64, batch {batch},")
        assert rows["ours"]["error"] < 1e-5 and rows["transformers Eomt"]["error"] < 1e-5
        assert rows["ours, compiled"]["note"] == "CUDA only"
    after = measured(result, "post-processing")
    assert after["transformers"]["error"] == 0 and after["transformers"]["ours_over_it"] > 0  # all pixels
    assert set(measured(result, "pre-processing")) == {"ours", "transformers"}


@cpu
def test_bench_train(monkeypatch, capsys, tmp_path):
    pytest.importorskip("transformers")
    text, result = run_bench(monkeypatch, capsys, tmp_path, "train", "--quick")
    check_tables(text, result)
    assert measured(result, "set loss")["transformers Mask2FormerLoss"]["error"] < 0.1
    rows = measured(result, "training step")
    names = [name.split(",")[0] for name in rows]
    assert names == ["whole", "data", "forward", "loss", "backward", "optimiser"]
    shares = [int(name.split(", ")[1].removesuffix(" %")) for name in list(rows)[1:]]
    assert 85 <= sum(shares) <= 115
    rows = measured(result, "forward + loss + backward, tiny")
    assert rows["transformers Eomt"]["ours_over_it"] > 0
    assert rows["transformers Eomt"]["error"] < 0.01  # other random points make 4e-4


@cpu
def test_bench_data(monkeypatch, capsys, tmp_path):
    text, result = run_bench(monkeypatch, capsys, tmp_path, "data", "--quick")
    check_tables(text, result)
    for case in ("crops of 64 without jitter", "crops of 64 with jitter"):
        rows = measured(result, case)
        assert list(rows) == ["ours", "mask by mask"] and rows["ours"]["unit"] == "image/s"
        assert rows["ours"]["rate"] == pytest.approx(2 / rows["ours"]["median"])


@cpu
def test_bench_metrics(monkeypatch, capsys, tmp_path):
    pytest.importorskip("pycocotools")
    pytest.importorskip("hotcoco")
    text, result = run_bench(monkeypatch, capsys, tmp_path, "metrics", "--quick")
    check_tables(text, result)
    for case, rivals in (("PQ", {"hotcoco", "panopticapi"}), ("mask AP", {"pycocotools", "hotcoco"}),
                         ("mIoU", {"hotcoco", "torchmetrics"})):
        rows = measured(result, case)
        assert set(rows) == {"ours"} | rivals
        for name, row in rows.items():  # torchmetrics divides in float32
            assert "note" in row or row["error"] < (1e-6 if name == "torchmetrics" else 1e-9), (case, name)
        assert "error" in rows["hotcoco"]
    assert ("note" in rows["torchmetrics"]) == (importlib.util.find_spec("torchmetrics") is None)


@cpu
def test_bench_metrics_without_rivals(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "optional", lambda name: None)
    text, result = run_bench(monkeypatch, capsys, tmp_path, "metrics", "--quick")
    check_tables(text, result)
    notes = {row["name"]: row["note"] for row in result["rows"] if row["name"] != "ours"}
    names = ("hotcoco", "panopticapi", "torchmetrics", "pycocotools")
    assert notes == dict.fromkeys(names, "not installed")
    assert all(f"| {name} | not installed |" in text for name in names)


@cpu
def test_bench_without_rivals_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "optional", lambda name: None)
    text, result = run_bench(monkeypatch, capsys, tmp_path, "model", "--quick")
    check_tables(text, result)
    assert result["triton"] == "not installed"
    for case, name in (("network", "transformers Eomt"), ("post-processing", "transformers")):
        rows = measured(result, case)
        assert rows[name]["note"] == "not installed" and rows["ours"]["median"] > 0
    assert "| transformers Eomt | not installed |" in text


def fault_of(monkeypatch, capsys, *words):
    """The one line, without `error: `, that `python bench.py WORDS` ends with; its exit code is 1."""
    monkeypatch.setattr(sys, "argv", ["bench.py", *words])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize("words, fault", [
    (["model", "--quick", "--size", "100"], "--size 100: no multiple of the patch size; take a"),
    (["kernels", "--quick", "--size", "64", "100"], "--size 100: no multiple of the patch size; take a mul"),
    (["train", "--quick", "--size", "100"], "--size 100: no multiple of the patch size; take a"),
    (["data", "--quick", "--data", "/nowhere"], "/nowhere"),
    (["metrics", "--quick", "--json", "/nowhere/rows.json"], "/nowhere/rows.json: no such file"),
    (["model", "--size", "big"], "argument --size: invalid int value: 'big'; --help"),
    (["model", "--batch", "0"], "--size, --batch, --threads: numbers from 1 on"),
    (["model", "--sise", "9"], "unrecognized arguments: --sise 9"),
    ([], "the following arguments are required: subject"),
])
def test_bench_mistakes_are_one_line(monkeypatch, capsys, words, fault):
    assert fault_of(monkeypatch, capsys, *words).startswith(fault)


def test_bench_unknown_subject(monkeypatch, capsys):
    line = fault_of(monkeypatch, capsys, "speed")
    assert "'speed'" in line and all(subject in line for subject in bench.SUBJECTS)


@pytest.mark.parametrize("fault", [RuntimeError("no room\nat all"), MemoryError()])
def test_bench_faults_of_the_machine_are_one_line(monkeypatch, capsys, tmp_path, fault):
    """Memory that is not there ended in a traceback; with --debug it still does."""

    def case(run):
        raise fault

    monkeypatch.setitem(bench.SUBJECTS, "metrics", ([], [case], *bench.SUBJECTS["metrics"][2:]))
    words = ["metrics", "--quick", "--json", str(tmp_path / "rows.json")]
    assert fault_of(monkeypatch, capsys, *words) in ("no room", "MemoryError")
    assert not list(tmp_path.iterdir())  # no empty file either
    monkeypatch.setattr(sys, "argv", ["bench.py", "metrics", "--quick", "--debug"])
    with pytest.raises(type(fault)):
        bench.main()


@pytest.mark.parametrize("encoder, size, tera", [
    ("dinov2_large", 640, 1.336), ("dinov2_large", 1280, 8.29), ("dinov2_giant", 640, 4.52),
    ("dinov2_giant", 1280, 25.4)])
def test_model_flops_equal_the_published_arithmetic(encoder, size, tera):
    with torch.device("meta"):
        vit = eomt.ViT(**{"patch": 16, **eomt.ENCODERS[encoder]}, grid=(size // 16,) * 2)
        model = eomt.EoMT(vit, 133)
    assert bench.model_flops(model, size) / 1e12 == pytest.approx(tera, rel=2e-3)
    more = bench.model_flops(model, size, 3) - bench.model_flops(model, size, 1)
    one = bench.model_flops(model, size, 2) - bench.model_flops(model, size, 1)
    assert more == 2 * one > 0


def test_network_rows_run_each_network_once_a_call(monkeypatch, tmp_path):
    """A rival that is called twice looks half as fast."""
    pytest.importorskip("transformers")
    captured, forwards = {}, []
    monkeypatch.setattr(bench, "compare", lambda run, case, calls, *rest, **more: captured.update(calls))
    bench.bench_network(plain_run(encoder="tiny", folder=tmp_path), 64, 2)
    networks = "EoMT", "EomtForUniversalSegmentation"

    def count(module, args, out):
        if type(module).__name__ in networks:
            forwards.append(type(module).__name__)

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        for name, network in zip(("ours", "transformers Eomt"), networks, strict=True):
            forwards.clear()
            with torch.no_grad():
                masks, classes = captured[name](0)
            assert forwards == [network] and masks.shape == (2, 20, 16, 16) and classes.shape == (2, 20, 134)
    finally:
        hook.remove()


def plain_run(**more):
    return argparse.Namespace(quick=True, cuda=False, device=torch.device("cpu"), rows=[], data=None, **more)


def test_compare_takes_ratios_within_a_round(monkeypatch, capsys):
    """A machine that slows down in the middle changes no ratio; the table holds what the rows hold."""
    speed, seen = {"ours": 0.002, "half": 0.004}, []

    def clock(run, call, first, repeat=1):
        seen.append((call.__name__, first, repeat))
        return speed[call.__name__] * (5 if len(seen) > 4 else 1), None

    def ours(i):
        return i

    def half(i):
        print("a rival that talks")
        return 1

    monkeypatch.setattr(bench, "clock", clock)
    run = plain_run()
    bench.compare(run, "case", {"ours": ours, "gone": "not installed", "half": half}, 4e9, "GFLOP/s",
                  error=lambda got, ours: (got - ours) / 4)
    first, gone, second = run.rows
    assert (first["ours_over_it"], second["ours_over_it"], gone["note"]) == (1, 0.5, "not installed")
    assert first["error"] == 0 and second["error"] == 0.25 and second["floor_percent"] is None
    assert first["rate"] == pytest.approx(4 / first["median"]) and first["median"] == pytest.approx(0.01)
    assert [name for name, _, _ in seen[2:]] == ["ours", "half"] * 3  # in turn
    assert [repeat for _, _, repeat in seen[2:4]] == [10, 5]  # 20 ms each
    assert [first for name, first, _ in seen[2:] if name == "ours"] == [0, 10, 20]  # other inputs every time
    text = capsys.readouterr().out
    assert "| half | 20 (10.4 / 20) | 0.50 | 200 GFLOP/s | - | - | 2.5e-01 |" in text and "talks" not in text


def test_clock_measures_all_calls():
    seen = []
    seconds, peak = bench.clock(plain_run(), lambda i: (seen.append(i), sum(range(20000))), 3, 4)
    assert seen == [3, 4, 5, 6] and 0 < seconds < 1 and peak is None


def test_mask_by_mask_does_what_the_loader_does(tmp_path):
    """The rival's crop is ours: same window, picture within rounding, same segments."""
    bench.data.write_shapes(tmp_path, bench.vocab.SHAPES, 6, 1, size=150)
    augment = bench.data.Augment(64, (1.2, 2.4))  # never below 1/2, from where on JPEGs are decoded smaller
    dataset = bench.data.SegmentDataset(tmp_path, "shapes", "train", augment)
    theirs = [bench.mask_by_mask(dataset, (0, i, 0)) for i in range(6)]
    compared = 0
    for i, (image, masks) in enumerate(theirs):
        ours = dataset[0, i, 0]
        difference = (ours.image.int() - image.int()).abs()
        assert image.dtype == torch.uint8 and difference.max() <= 2 and difference.float().mean() < 0.3
        if len(masks) == len(ours.target.labels):  # a crowd is kept by the rival alone
            compared += 1
            assert (masks.sum(0) == ours.target.masks().sum(0)).float().mean() > 0.98
    assert compared >= 4


def test_ahead_lists_every_shipped_configuration():
    names = [(name, arch) for name, arch, _, _ in ahead.jobs()]
    assert len(names) == len(set(names))
    for word, count in ((" hd ", 3 * 7), ("pack_mask", 1), ("upscale", 3 * 5)):
        assert sum(word in name for name, _ in names) == 2 * count, word
    assert {arch for _, arch in names} == {80, 90} and ("pack_mask", 90) in names
    # Triton 3.10 will not fuse unless told
    assert all(constants["enable_fp_fusion"] and constants["num_stages"] and constants["num_warps"]
               for *_, constants in ahead.jobs())
