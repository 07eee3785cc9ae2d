"""eval.py: masks counted on the device, and counting in a thread while the model goes on."""
# SPDX-License-Identifier: MIT
import json
import os
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eomt
import eval as evaluation
import metrics
import predict
import vocab


class Far(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


def scene(rng, detections, objects, height=41, width=53, num_classes=3):
    """(Instances, Sample): overlapping boxes, some crowds, some areas not their pixels, tied scores."""

    def boxes(count):
        out = torch.zeros(count, height, width, dtype=torch.bool)
        for mask in out:
            y, x = rng.integers(0, height), rng.integers(0, width)
            mask[y:y + rng.integers(1, height), x:x + rng.integers(1, width)] = True
        return out

    truth, found = boxes(objects), boxes(detections)
    labels = rng.integers(0, num_classes, objects)
    for k in range(0, detections if objects else 0, 2):  # half of them lie close to an object
        found[k] = truth[k % objects].roll(int(rng.integers(-2, 3)), 1)
    guess = rng.integers(0, num_classes, detections)
    guess[::2] = labels[np.arange(0, detections, 2) % objects] if objects else guess[::2]
    area = truth.flatten(1).sum(1).numpy() * rng.choice([1.0, 1.0, 7.5], objects)
    target = data.Target.from_masks(truth.numpy(), labels, rng.random(objects) < 0.3, area)
    scores = torch.from_numpy(rng.random(detections).round(1)).float()
    result = eomt.Instances(found, torch.from_numpy(guess), scores)
    return result, data.Sample(torch.zeros(3, height, width, dtype=torch.uint8), target, "x.jpg", 1)


def state_of(pairs, change=lambda masks: masks):
    metric = metrics.MaskAP(3)
    for i, (result, sample) in enumerate(pairs):
        result = result._replace(masks=change(result.masks))
        evaluation.add_instance(metric, result, sample._replace(name=f"{i:03}"))
    return metric.state(), metric.compute()


def assert_same_states(pairs, change):
    (host, numbers), (device, same) = state_of(pairs), state_of(pairs, change)
    assert host.keys() == device.keys()
    for key, value in host.items():
        assert value.dtype == device[key].dtype and (value == device[key]).all(), key
    assert numbers == same and len(host["pair_iou"]) > 20 and 0.05 < numbers["AP"] < 0.95


def scenes():
    rng = np.random.default_rng(0)
    counts = [(20, 6), (0, 5), (5, 0), (0, 0), (1, 1), (100, 12)]
    return [scene(rng, *counts[i % len(counts)]) for i in range(18)]


def test_instances_counted_by_products_give_the_same_state():
    def far(masks):
        assert masks.device.type == "cpu"
        return masks.as_subclass(Far)

    assert_same_states(scenes(), far)


@pytest.mark.gpu
def test_instances_counted_on_the_gpu_give_the_same_state():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert_same_states(scenes(), lambda masks: masks.cuda())


def test_masks_of_a_gpu_never_come_to_the_host(monkeypatch):
    moved = []
    monkeypatch.setattr(Far, "cpu", lambda self: moved.append(self.numel()) or torch.Tensor.cpu(self))
    monkeypatch.setattr(metrics.MaskAP, "update", None)
    result, sample = scene(np.random.default_rng(1), 50, 6)
    evaluation.add_instance(metrics.MaskAP(3), result._replace(masks=result.masks.as_subclass(Far)), sample)
    assert moved and max(moved) <= 50 * 6


@pytest.mark.parametrize("chunk", [1, 7, 100, 41 * 53, 10**6])
def test_overlaps_in_chunks(chunk):
    masks = [scene(np.random.default_rng(seed), count, 0)[0].masks for seed, count in ((2, 9), (3, 4))]
    a, b = (mask.flatten(1).long() for mask in masks)
    area, other, shared = evaluation.overlaps(*masks, chunk)
    assert (area == a.sum(1)).all() and (other == b.sum(1)).all() and (shared == a @ b.T).all()
    assert shared.dtype == area.dtype == other.dtype == torch.int64
    empty = evaluation.overlaps(masks[0][:0], masks[1], chunk)
    assert [tuple(x.shape) for x in empty] == [(0,), (4,), (0, 4)]


def test_overlaps_are_exact_beyond_float32():
    big = torch.ones(1, 4200, 4100, dtype=torch.bool)  # more than 2**24 pixels
    other = big.clone()
    other[0, 0, :3] = False
    area, true_area, shared = evaluation.overlaps(other, big)
    assert true_area.item() == big.numel() and area.item() == shared.item() == big.numel() - 3


# ---- Counting in a thread ----------------------------------------------------------------------------------
class Odd(Exception):
    """A fault that nothing else raises."""


def run(monkeypatch, images, segment, **options):
    """evaluate() of a semantic model whose segment() is given, over made images of one class map each."""
    rng = np.random.default_rng(4)
    samples = []
    for k in range(images):
        ids = torch.from_numpy(rng.integers(1, 4, (1, 8, 9), np.uint8))
        target = data.Target(ids, torch.zeros(3, dtype=torch.int64), torch.arange(1, 4), torch.arange(3),
                             torch.zeros(3, dtype=torch.bool), torch.ones(3).double())
        samples.append(data.Sample(torch.full((3, 8, 9), k, dtype=torch.uint8), target, f"{k:03}.jpg", k))
    model = eomt.EoMT(eomt.ViT(8, 1, 1, 8, (2, 2)), 3, 2, 1)
    model.meta = dict(kind="semantic", names=["a", "b", "c"], thing=[False] * 3, size=16)
    monkeypatch.setattr(eomt, "segment", segment)
    return evaluation.evaluate(model, samples, **options), samples


def guess(model, images, kind, **_):
    """A third of the pixels right."""
    seeds = [torch.Generator().manual_seed(int(image[0, 0, 0])) for image in images]
    return [torch.randint(0, 3, (8, 9), generator=seed) for seed in seeds]


def test_thread_counts_every_image_once_and_in_order(monkeypatch):
    seen, threads = [], set()

    def export(result, sample):
        seen.append((sample.name, int(sample.image[0, 0, 0]), result.sum().item()))
        threads.add(threading.get_ident())

    result, samples = run(monkeypatch, 11, guess, exports=(export,))
    assert [name for name, _, _ in seen] == [sample.name for sample in samples] and result.images == 11
    assert all(total == guess(None, [sample.image], "")[0].sum() for (_, _, total), sample in
               zip(seen, samples, strict=True))
    assert len(threads) == 1 and threading.get_ident() not in threads
    metric = metrics.MeanIoU(3)
    for sample in samples:
        evaluation.add_semantic(metric, guess(None, [sample.image], "")[0], sample)
    assert result.numbers["mIoU"] == 100 * metric.compute()["mIoU"]
    assert not any("ThreadPool" in thread.name for thread in threading.enumerate())


def test_thread_counts_while_the_model_works(monkeypatch):
    spans = {"model": [], "count": []}

    def spend(kind):
        began = time.perf_counter()
        time.sleep(0.03)
        spans[kind].append((began, time.perf_counter()))

    def segment(*args, **_):
        spend("model")
        return guess(*args)

    run(monkeypatch, 8, segment, exports=(lambda result, sample: spend("count"),))
    both = sum(max(0, min(b, d) - max(a, c)) for a, b in spans["model"] for c, d in spans["count"])
    assert both > 0.5 * 7 * 0.03  # 7 of 8 counts lie beside the next call of the model
    assert all(count[0] >= model[1] for model, count in zip(spans["model"], spans["count"], strict=True))


def test_images_are_resized_in_the_data_processes(monkeypatch):
    here, seen = os.getpid(), []

    def resize(image, size):
        return torch.full((3, *size), int(os.getpid() != here), dtype=torch.uint8)

    def segment(model, images, kind, sizes, **_):
        seen.extend((tuple(x.shape), x.min().item(), size) for x, size in zip(images, sizes, strict=True))
        return guess(model, images, kind)

    monkeypatch.setattr(eomt, "resize", resize)
    run(monkeypatch, 3, segment, workers=1)
    assert seen == [((3, 16, 18), 1, (8, 9))] * 3


def test_thread_is_never_two_batches_behind(monkeypatch):
    alive, most, called = weakref.WeakSet(), [], []

    def segment(*args, **_):
        results = guess(*args)
        called.append(len(called))
        alive.update(results)
        most.append(len(alive))
        return results

    def slow(result, sample):
        time.sleep(0.02)
        assert len(called) - 1 <= int(sample.image[0, 0, 0]) + 1

    run(monkeypatch, 10, segment, exports=(slow,))
    assert max(most) <= 3  # the one counted, the one that waits, the new one


@pytest.mark.parametrize("images", [1, 2, 9])
def test_thread_fault_stops_the_evaluation(monkeypatch, images):
    called = []

    def segment(*args, **_):
        called.append(1)
        return guess(*args)

    def fault(result, sample):
        raise Odd(sample.name)

    with pytest.raises(Odd, match="000.jpg"):
        run(monkeypatch, images, segment, exports=(fault,))
    assert len(called) <= 2  # the model saw one batch more at most


def test_model_fault_stops_the_thread(monkeypatch):
    called = []

    def segment(*args, **_):
        called.append(1)
        if len(called) == 3:
            raise Odd("model")
        return guess(*args)

    with pytest.raises(Odd, match="model"):
        run(monkeypatch, 9, segment)
    assert len(called) == 3 and not any("ThreadPool" in thread.name for thread in threading.enumerate())


def test_empty_share_of_a_rank(monkeypatch):
    gather = lambda states, state: states.__setitem__(slice(None), [state])  # noqa: E731
    monkeypatch.setattr(evaluation.dist, "all_gather_object", gather)
    result, _ = run(monkeypatch, 1, guess, rank=1, world=2)
    assert result.images == 1 and np.isnan(result.numbers["mIoU"])


@pytest.mark.parametrize("kind", ["panoptic", "semantic"])
def test_exports_of_one_name_in_two_folders(tmp_path, kind):
    task = data.TASKS["shapes" if kind == "panoptic" else "ade20k_semantic"]
    export, ids = evaluation.Export(str(tmp_path / "out"), task), torch.ones(4, 4, dtype=torch.int32)
    for k, name in enumerate(("a/1.jpg", "b/1.jpg", "2.v1.jpg")):
        panoptic = eomt.Panoptic(ids, torch.tensor([k]), torch.ones(1))
        export(panoptic if kind == "panoptic" else ids.long() * k, data.Sample(None, None, name, k))
    export.finish(0)
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in tmp_path.glob("out/**/*.png")) == [
        "2.v1.png", "a/1.png", "b/1.png"]
    if kind == "panoptic":
        rows = json.loads((tmp_path / "out.json").read_text())["annotations"]
        assert [row["file_name"] for row in rows] == ["a/1.png", "b/1.png", "2.v1.png"]


@pytest.mark.parametrize("name", ["/tmp/x/y.jpg", "../../x.jpg", "a/../../x.jpg"])
@pytest.mark.parametrize("kind", ["shapes", "ade20k_semantic"])
def test_exports_stay_in_their_folder(tmp_path, kind, name):
    export, ids = evaluation.Export(str(tmp_path / "a/b/out"), data.TASKS[kind]), torch.ones(4, 4).int()
    result = eomt.Panoptic(ids, torch.tensor([1]), torch.ones(1)) if kind == "shapes" else ids.long()
    with pytest.raises(ValueError, match="leads out of .*/a/b/out; rename it"):
        export(result, data.Sample(None, None, name, 1))
    assert not list(tmp_path.rglob("*.png"))


def test_equal_scores_are_ordered_by_image_id():
    """As in pycocotools; a file name says nothing, and two images may share one."""
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, :4] = True
    one = torch.zeros(1, dtype=torch.long)
    right = eomt.Instances(mask, one, torch.ones(1))
    true = data.Target.from_masks(mask.numpy(), [0], [False], [32.0])
    empty = data.Target.from_masks(mask[:0].numpy(), [], [], [])
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    for names in (("b.jpg", "a.jpg"), ("a.jpg", "a.jpg")):
        metric = metrics.MaskAP(1)
        for target, name, number in zip((true, empty), names, (9, 10), strict=True):
            evaluation.add_instance(metric, right, data.Sample(image, target, name, number))
        assert metric.compute()["AP"] == pytest.approx(1.0)


# ---- Mistakes of the command line: one line, before any image ----------------------------------------------
@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(checkpoint of a tiny untrained panoptic model, its procedural data: 3 validation images)."""
    root = tmp_path_factory.mktemp("tiny")
    data.write_shapes(root / "data", vocab.SHAPES, 2, 3)
    model = eomt.EoMT(eomt.ViT(8, 1, 1, 8, (2, 2)), 8, 2, 1)
    eomt.save(root / "tiny.safetensors", model, task="shapes", data=str(root / "data"))
    return root / "tiny.safetensors", root / "data"


@pytest.fixture
def said(monkeypatch, capsys, tiny):
    """Function (script, *argv): what main() says of a mistake. It ends in one line, before the model runs."""

    def answer(script, *argv):
        def segment(*args, **_):
            raise AssertionError("the model ran")

        monkeypatch.setattr(eomt, "segment", segment)
        monkeypatch.setattr(sys, "argv", ["x.py", *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            script.main()
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 1 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0].removeprefix("error: ")

    return answer


@pytest.mark.parametrize("words, line", [
    (["--size", "big"], "argument --size: invalid int value: 'big'; --help lists the options"),
    (["--sise=64"], "unrecognized arguments: --sise=64; did you mean --size?"),
    (["--size", "-8"], "--size -8: no multiple of the patch size 8; give one")])
@pytest.mark.parametrize("script", [evaluation, predict])
def test_mistyped_words_are_one_line(said, tiny, script, words, line):
    assert said(script, "--ckpt", tiny[0], *words) == line
    line = "the following arguments are required: --ckpt; --help lists the options"
    assert said(script, "--size", "8") == line


@pytest.mark.parametrize("script", [evaluation, predict])
def test_task_auto_is_in_the_help_and_taken(monkeypatch, capsys, tiny, tmp_path, script):
    assert "--task TASK auto" in " ".join(script.parser().format_help().split())
    Image.new("RGB", (20, 30)).save(tmp_path / "a.jpg")
    more = ["--workers", 0] if script is evaluation else [tmp_path / "a.jpg", "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["x.py", "--ckpt", str(tiny[0]), "--task", "auto", *map(str, more)])
    script.main()
    assert capsys.readouterr().out


@pytest.mark.parametrize("place", ["/proc/x", "/dev/null/x"])
def test_places_that_cannot_be_written_are_found_first(said, tiny, place):
    begin = ["--ckpt", tiny[0], "--workers", 0]
    assert said(evaluation, *begin, "--save-panoptic", place).startswith(f"{place}: no")
    assert said(evaluation, *begin, "--save-panoptic", tiny[0]) == f"{tiny[0]}: file exists"
    line = said(evaluation, *begin, "--out", f"{place}/x.json")
    assert line == f"--out {place}/x.json: not a file in a folder that is there; give another"
    assert said(evaluation, *begin, "--out", "/proc/x.json") == "/proc/x.json: no such file or directory"
    line = said(evaluation, *begin, "--limit", "-4")
    assert line == "--limit -4, --workers 0: below 0; give 0 or more"


@pytest.mark.parametrize("save", [[], ["--save-panoptic", "p"]])
def test_no_file_stays_of_an_evaluation_that_failed(said, tiny, tmp_path, monkeypatch, save):
    def fail(*args):
        raise ValueError("no luck")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "open_options", fail)
    assert said(evaluation, "--ckpt", tiny[0], "--out", "x.json", *save) == "no luck"
    assert not list(tmp_path.glob("*.json"))


def test_files_beside_the_pictures_are_found_first(tmp_path):
    """FOLDER.json beside a FOLDER that is there; the results of instances, a folder for one."""
    (tmp_path / "x.json").mkdir()
    with pytest.raises(IsADirectoryError, match="x.json"):
        evaluation.Export(str(tmp_path / "x"), data.TASKS["coco_panoptic"])
    for place in ("/proc/x.json", "/dev/null/x.json", tmp_path):
        with pytest.raises(OSError, match=f"/proc/x.json|/dev/null|{tmp_path}"):
            evaluation.Export(str(place), data.TASKS["coco_instance"])


def test_one_place_for_two_files_is_refused(said, tiny, tmp_path):
    file = tmp_path / "p.json"
    line = said(evaluation, "--ckpt", tiny[0], "--save-panoptic", tmp_path / "p", "--out", file)
    assert line == f"--out {file}: --save-panoptic writes there too; give another file"


def test_export_into_the_current_folder(monkeypatch, tmp_path):
    """`--save-panoptic .` writes the JSON beside the folder; it failed after the whole evaluation."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    evaluation.Export(".", data.TASKS["shapes"]).finish(0)
    assert json.loads((tmp_path / "here.json").read_text()) == dict(annotations=[])


def test_numbers_that_are_none_are_null(tiny, tmp_path, monkeypatch, capsys):
    """NaN is no JSON."""
    result = evaluation.Result(dict(PQ=1.5, PQ_unseen=float("nan")), "PQ", [], 3, 1.0, False)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: result)
    evaluation.run(evaluation.parse(["--ckpt", str(tiny[0]), "--out", str(tmp_path / "x.json")]))
    assert json.loads((tmp_path / "x.json").read_text()) == dict(PQ=1.5, PQ_unseen=None, images=3)


def test_data_of_the_training_is_gone(said, tiny, tmp_path):
    config, state, meta = eomt.read(tiny[0])
    model = eomt.build(config)
    eomt.save(tmp_path / "moved.safetensors", model, **meta | dict(data="runs/shapes"))
    line = said(evaluation, "--ckpt", tmp_path / "moved.safetensors")
    assert line.startswith("--data is missing, and that of the training, runs/shapes, is not there; give the")


@pytest.mark.parametrize("mode", ["--sweep", "--gt-masks", "--save-semantic"])
def test_options_that_would_be_passed_over_are_refused(said, tiny, tmp_path, mode):
    words = [mode] if mode == "--gt-masks" else [mode, "ov-bias=0,1"]
    line = said(evaluation, "--ckpt", tiny[0], *words, "--save-panoptic", tmp_path / "p")
    assert line == f"argument --save-panoptic: not allowed with argument {mode}; --help lists the options"


# ---- The same of predict.py --------------------------------------------------------------------------------
@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize("place", ["/proc/x", "/dev/null/x", "/proc"])
def test_predict_out_that_cannot_be_written_is_found_first(said, tiny, picture, place):
    assert said(predict, "--ckpt", tiny[0], picture, "--out", place).startswith(place)


def test_no_list_stays_of_a_prediction_that_failed(said, tiny, picture, monkeypatch):
    def fail(*args):
        raise RuntimeError("no luck")

    monkeypatch.setattr(predict, "open_image", fail)
    assert said(predict, "--ckpt", tiny[0], picture, "--out", picture.parent / "out") == "no luck"
    assert not list((picture.parent / "out").iterdir())


def test_predict_never_writes_over_its_images(said, tiny, picture):
    """With --out in the photos' folder the id map NAME.png took the place of the photo NAME.png."""
    before = picture.read_bytes()
    line = said(predict, "--ckpt", tiny[0], picture, "--out", picture.parent)
    assert line.startswith(f"{picture}: its a.png would replace {picture}, or its result; give another --out")
    assert picture.read_bytes() == before
    other = picture.with_suffix(".jpg")
    Image.new("RGB", (20, 30)).save(other)
    line = said(predict, "--ckpt", tiny[0], picture, other, "--out", picture.parent / "out")
    assert line.startswith(f"{other}: its a.png would replace {picture}, or its result; give another --out")


def test_predict_globs_pass_over_folders(picture):
    (picture.parent / "empty.png").mkdir()
    assert predict.expand([str(picture.parent / "*")]) == [picture]


def test_predict_embeddings_of_closed_classes(said, tiny, picture):
    line = said(predict, "--ckpt", tiny[0], picture, "--embeddings")
    assert line == f"{tiny[0]}: has closed classes; --prompts and --embeddings need a --stage run"


@pytest.mark.parametrize("place", ["m.foo", "m", "no/m.pt2"])
def test_export_mistakes_are_found_before_the_export(said, tiny, tmp_path, monkeypatch, place):
    monkeypatch.setattr(torch.export, "export", None)
    line = said(predict, "--ckpt", tiny[0], "--export", tmp_path / place)
    assert line.startswith(f"--export {tmp_path / place}: end the name in .onnx or .pt2, in a folder that")
