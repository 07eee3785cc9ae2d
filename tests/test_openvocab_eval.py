"""Open vocabulary beyond the trained classes: COCO's names trained, ADE20K's and Cityscapes' evaluated."""
# SPDX-License-Identifier: MIT
import json
import re
import sys
import zipfile
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

from .test_siglip2_ov import eval_here, predict_here, train_here
from .test_tasks import SHARED, encoded, write

# What the procedural shapes stand for: in each table the same words, under other numbers.
COCO = ("person", "car", "bed", "bus", "book", "road", "sea", "mountain-merged")
ADE = ("person", "car", "bed", "bus", "book", "road, route", "sea", "mountain, mount")
CITY = ("person", "car", None, "bus", None, "road", None, None)


def words_tokenizer(folder):
    """tokenizer.json that knows every English word of our tables, and Mandarin character by character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    texts = [siglip2.canonical(text) for table in vocab.VOCABULARIES.values() for name in vocab.TEMPLATES
             for synonyms in vocab.prompts(table, vocab.LANGUAGES, name) for row in synonyms for text in row]
    split = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(),
                                     pre_tokenizers.Split(Regex("[\u4e00-\u9fff]"), "isolated")])
    pieces = (piece for text in texts for piece, _ in split.pre_tokenize_str(text))
    ids = {word: k for k, word in enumerate(dict.fromkeys(["<pad>", "<eos>", "<unk>", *pieces]))}
    model = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    model.pre_tokenizer = split
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    return len(ids)


def write_tower(folder):
    """A SigLIP 2 of the toy's size with random weights, whose text rows are sums of their words."""
    torch.manual_seed(0)
    vision, _ = train.toy_towers(4)
    width, hidden, _, heads = siglip2.TOY
    text = siglip2.TextTower(width, hidden, 1, heads, words_tokenizer(folder), 12)
    with torch.no_grad():
        text.positions.zero_()
        text.tokens.weight[: siglip2.EOS + 1] = 0
    siglip2.save(folder, vision, text)


def rename(root, table, names):
    """The procedural world's categories become classes of `table`, in its COCO zips."""
    new = {k + 1: table.ids[table.names.index(name)] for k, name in enumerate(names)}
    rows = zip(table.ids, table.names, table.thing, strict=True)
    categories = [dict(id=i, name=n, isthing=int(thing)) for i, n, thing in rows]
    for archive in ("annotations_trainval2017.zip", "panoptic_annotations_trainval2017.zip"):
        with zipfile.ZipFile(root / archive) as file:
            members = {name: file.read(name) for name in file.namelist()}
        for member in [m for m in members if m.endswith(".json")]:
            content = json.loads(members[member])
            for note in content["annotations"]:
                for row in note.get("segments_info", [note]):
                    row["category_id"] = new[row["category_id"]]
            members[member] = json.dumps(content | dict(categories=categories))
        write(root / archive, members)


def scenes(count=6):
    """(photo, map of segments 1.., class of each segment) of the procedural world, without crowds."""
    rng = np.random.default_rng(5)
    while count:
        image, index, segments = data.draw_scene(rng, vocab.SHAPES, range(8))
        if not any(crowd for _, crowd in segments):
            count -= 1
            yield image, index, [k for k, _ in segments]


def write_ade(root):
    root.mkdir()
    things = [k for k, thing in enumerate(vocab.ADE20K.thing) if thing]
    members, instances = {}, {}
    for split in ("training", "validation"):
        for i, (image, index, classes) in enumerate(scenes()):
            k = np.array([vocab.ADE20K.names.index(ADE[c]) for c in classes])
            number = np.array([n if j in things else 0 for n, j in enumerate(k, 1)])
            red = np.array([things.index(j) + 1 if j in things else 0 for j in k])
            rgb = [np.append(0, column)[index] for column in (red, number, 0 * number)]
            name = f"{split}/ADE_{i:08d}"
            members[f"ADEChallengeData2016/images/{name}.jpg"] = encoded(image, "JPEG")
            members[f"ADEChallengeData2016/annotations/{name}.png"] = encoded(
                np.append(0, k + 1).astype(np.uint8)[index])
            instances[f"annotations_instance/{name}.png"] = encoded(np.stack(rgb, -1).astype(np.uint8))
    write(root / "ADEChallengeData2016.zip", members)
    write(root / "annotations_instance.zip", instances)


def write_city(root):
    root.mkdir()
    table, images, labels = vocab.CITYSCAPES, {}, {}
    for split in ("train", "val"):
        for i, (image, index, classes) in enumerate(scenes()):
            ids = [table.ids[table.names.index(CITY[c])] if CITY[c] else 0 for c in classes]
            stem = f"{split}/town/town_{i:06d}_000019"
            images[f"leftImg8bit/{stem}_leftImg8bit.png"] = encoded(image)
            labels[f"gtFine/{stem}_gtFine_labelIds.png"] = encoded(np.append(0, ids).astype(np.uint8)[index])
    write(root / "leftImg8bit_trainvaltest.zip", images)
    write(root / "gtFine_trainvaltest.zip", labels)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tower of random weights, data under the names of three sets, Stage A on COCO's 133 without 37."""
    root = tmp_path_factory.mktemp("openvocab")
    write_tower(root / "tower")
    data.write_shapes(root / "coco", vocab.SHAPES, 96, 8, seed=3)
    rename(root / "coco", vocab.COCO_PANOPTIC, COCO)
    write_ade(root / "ade")
    write_city(root / "city")
    rows = train_here("--stage", "A", "--task", "coco_panoptic", "--split", "ovp_val", "--steps", 150,
                      "--data", root / "coco", "--encoder-weights", root / "tower", "--batch-size", 16,
                      "--log-every", 50, "--out", root / "A")
    return SimpleNamespace(root=root, ckpt=root / "A", rows=rows)


class Keep(list):
    """An export that keeps every (result, sample)."""

    def __call__(self, *pair):
        self.append(pair)

    def finish(self, rank):
        pass


@pytest.fixture
def kept(world, monkeypatch):
    """Function: a task and its folder -> the evaluation's numbers and all (result, sample)."""

    def evaluate(task, folder, *argv):
        keep = Keep()
        monkeypatch.setattr(evaluation, "open_exports", lambda args, task: [keep])
        result = eval_here("--ckpt", world.ckpt, "--task", task, "--data", world.root / folder, *argv)
        return result, keep

    return evaluate


def present(names, table):
    """Class indices of `table` in the scenes, in order of `names`."""
    return [table.names.index(name) if name else None for name in names]


# ---- COCO -> ADE20K, -> Cityscapes -------------------------------------------------------------------------
def test_trained_on_coco_names(world):
    config, _, meta = eomt.read(world.ckpt)
    assert config["num_classes"] == 133 and len(meta["seen"]) == 96 and meta["split"] == "ovp_val"
    assert [r["loss"] for r in world.rows if "loss" in r][-1] < 0.85 * world.rows[0]["loss"]


def test_ade20k_panoptic_against_brute_force(kept):
    result, pairs = kept("ade20k_panoptic", "ade")
    classes, quality = present(ADE, vocab.ADE20K), {}
    for k in range(150):
        total, tp, wrong, missed = 0.0, 0, 0, 0
        for (found, _), (_, index, members) in zip(pairs, scenes(), strict=True):
            ids, void = found.ids.numpy(), index == 0
            mine = [ids == s + 1 for s, label in enumerate(found.labels.tolist()) if label == k]
            true = [index == t for t, c in enumerate(members, 1) if classes[c] == k and (index == t).any()]
            if not vocab.ADE20K.thing[k]:
                true = [np.any(true, 0)] if true else []
            ious = [[(m & t).sum() / ((m | t) & ~(m & void)).sum() for t in true] for m in mine]
            ious = np.array(ious).reshape(len(mine), len(true))
            hits = ious > 0.5
            total, tp, missed = total + ious[hits].sum(), tp + hits.sum(), missed + len(true) - hits.sum()
            wrong += sum((m & void).sum() / m.sum() <= 0.5 and not hit.any()
                         for m, hit in zip(mine, hits, strict=True))
        if tp + wrong + missed:
            quality[k] = 100 * total / (tp + wrong / 2 + missed / 2)
    assert result.numbers["PQ"] == pytest.approx(np.mean(list(quality.values())), abs=1e-6)
    seen = vocab.overlap(vocab.COCO_PANOPTIC, vocab.ADE20K, vocab.split(vocab.COCO_PANOPTIC, "ovp_val")[0])[0]
    assert result.numbers["PQ_seen"] == pytest.approx(np.mean([q for k, q in quality.items() if k in seen]))
    assert result.numbers["PQ_seen"] > 10


def counted(pairs, labels, count):
    """IoU in percent of every class from pixel counts, nan where it is in neither map; labels -1: ignored."""
    inter, union = np.zeros(count), np.zeros(count)
    for (found, _), label in zip(pairs, labels, strict=True):
        mine = np.where(label < 0, -1, found.numpy())
        for k in range(count):
            inter[k] += ((mine == k) & (label == k)).sum()
            union[k] += ((mine == k) | (label == k)).sum()
    return np.where(union, 100 * inter / union.clip(1), np.nan)


@pytest.mark.parametrize("task,folder,names", [("ade20k_semantic", "ade", ADE),
                                               ("cityscapes_semantic", "city", CITY)])
def test_semantic_against_brute_force(world, kept, task, folder, names):
    result, pairs = kept(task, folder)
    table = data.TASKS[task].vocabulary
    classes = [-1 if k is None else k for k in present(names, table)]
    labels = [np.array([-1, *(classes[c] for c in members)])[index] for _, index, members in scenes()]
    iou = counted(pairs, labels, len(table.names))
    assert result.numbers["mIoU"] == pytest.approx(np.nanmean(iou), abs=1e-6) and result.numbers["mIoU"] > 5
    trained = vocab.split(vocab.COCO_PANOPTIC, "ovp_val")[0]
    groups = vocab.overlap(vocab.COCO_PANOPTIC, table, trained)
    for name, members in zip(("seen", "unseen"), groups, strict=True):
        assert result.numbers[f"mIoU_{name}"] == pytest.approx(np.nanmean(iou[list(members)]), abs=1e-6)
    assert "bus" in [table.names[k] for k in members]  # held out under COCO's name, so unseen here


def test_ade20k_instance_against_pycocotools(kept):
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    from pycocotools import mask as rle

    def packed(mask):
        return rle.encode(np.asfortranarray(mask.astype(np.uint8)))

    result, pairs = kept("ade20k_instance", "ade")
    table, notes, found = vocab.ADE20K_INSTANCE, [], []
    classes = [table.names.index(name) if name in table.names else None for name in ADE]
    for i, ((mine, _), (_, index, members)) in enumerate(zip(pairs, scenes(), strict=True)):
        notes += [dict(image_id=i, category_id=classes[c], iscrowd=0, segmentation=packed(index == t),
                       area=int((index == t).sum()), bbox=[0, 0, 1, 1])
                  for t, c in enumerate(members, 1) if classes[c] is not None and (index == t).any()]
        found += [dict(image_id=i, category_id=k, score=score, segmentation=packed(m)) for m, k, score in
                  zip(mine.masks.numpy(), mine.labels.tolist(), mine.scores.tolist(), strict=True)]
    for n, note in enumerate(notes):
        note["id"] = n + 1
    truth = coco.COCO()
    images = [dict(id=i, height=64, width=64) for i in range(len(pairs))]
    categories = [dict(id=k, name=name) for k, name in enumerate(table.names)]
    truth.dataset = dict(images=images, annotations=notes, categories=categories)
    truth.createIndex()
    official = cocoeval.COCOeval(truth, truth.loadRes(found), "segm")
    official.evaluate(), official.accumulate(), official.summarize()
    assert result.numbers["AP"] == pytest.approx(100 * official.stats[0], abs=1e-4)
    assert result.numbers["AP"] > 10
    assert {"AP_seen", "AP_unseen"} <= result.numbers.keys() and len(result.per_class) == 100


def test_words_decide_what_is_found(world):
    """With the rows of two classes swapped, these two are lost and found as each other; the others stay."""
    args = evaluation.parser().parse_args(["--ckpt", str(world.ckpt), "--task", "ade20k_semantic",
                                           "--data", str(world.root / "ade")])
    model = evaluation.load_model(args)
    task, root = evaluation.open_task(model, args)
    val = data.SegmentDataset(root, task, "val")
    evaluation.open_options(model, val, args)
    right, head = dict(evaluation.evaluate(model, val).per_class), model.class_head
    a, b = present(("person", "book"), vocab.ADE20K)
    owner = torch.where(head.owner == a, b, torch.where(head.owner == b, a, head.owner))
    head.set_classes(head.rows, owner, head.seen)
    wrong = dict(evaluation.evaluate(model, val).per_class)
    assert right["person"] > 20 and right["book"] > 20 and wrong["person"] < 10 and wrong["book"] < 10
    assert wrong["mountain, mount"] == pytest.approx(right["mountain, mount"], abs=1)


def test_post_processing_takes_log_probabilities(world):
    """Void is last; instance scores are those of classes alone, over as many pairs as it keeps."""
    model = eomt.load(world.ckpt)
    image = torch.from_numpy(next(scenes())[0]).permute(2, 0, 1)
    with torch.no_grad():
        masks, classes = (tensor[0] for tensor in model(image[None])[-1])
    torch.testing.assert_close(classes.exp().sum(-1), torch.ones(12), atol=1e-5, rtol=0)
    assert (classes[:, -1].exp() > 0.5).any() and (classes[:, -1].exp() < 0.5).any()  # void for some queries
    found = eomt.segment(model, [image], "instance")[0]
    big = torch.nn.functional.interpolate(masks[None], (64, 64), mode="bilinear")[0]
    inside = big > 0
    quality = (big.sigmoid() * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1e-6)
    prob = classes[:, :-1].exp()
    rows = prob.flatten().topk(100).indices
    best = (prob.flatten() * quality.repeat_interleave(133))[rows].max()
    assert found.scores[0] == pytest.approx(best.item(), rel=1e-4) and len(found.scores) == 100
    labels = eomt.segment(model, [image], "semantic")[0]
    assert labels.shape == (64, 64) and labels.max() < 133
    whole = eomt.segment(model, [image], "panoptic")[0]
    assert whole.labels.max() < 133 and len(whole.labels) >= 1


@pytest.mark.skipif(not SHARED.exists(), reason="real samples are not here")
def test_real_ade20k_sample(world, kept):
    keep, table = kept("ade20k_semantic", SHARED / "ade20k"), vocab.ADE20K
    result, pairs = keep
    with zipfile.ZipFile(SHARED / "ade20k" / "ADEChallengeData2016.zip") as file:
        names = [f"ADEChallengeData2016/annotations/validation/{s.name[:-4]}.png" for _, s in pairs]
        labels = [np.asarray(Image.open(file.open(name))).astype(int) - 1 for name in names]
    iou = counted(pairs, labels, len(table.names))
    assert result.images == 3 and result.numbers["mIoU"] == pytest.approx(np.nanmean(iou), abs=1e-6)


# ---- words at evaluation and prediction --------------------------------------------------------------------
def loaded(world, *argv):
    """The model that eval.py would evaluate with these options."""
    args = evaluation.parser().parse_args(["--ckpt", str(world.ckpt), "--data", str(world.root / "coco"),
                                           *map(str, argv)])
    model = evaluation.load_model(args)
    evaluation.open_task(model, args)
    return model


def test_templates_and_languages_at_evaluation(world):
    """On the trained classes too: other rows, the same seen classes; nothing given, nothing changes."""
    plain = loaded(world)
    assert len(plain.class_head.rows) == sum(map(len, vocab.prompts(vocab.COCO_PANOPTIC)))
    vild = loaded(world, "--templates", "vild14")
    assert vild.class_head.rows.shape == plain.class_head.rows.shape
    texts = vocab.prompts(vocab.COCO_PANOPTIC, ("en",), "vild14")
    assert len(texts[0][0]) == 14
    want, *_ = siglip2.text_rows(world.root / "tower", "", texts)
    assert torch.equal(vild.class_head.rows, want)
    assert not torch.allclose(want, plain.class_head.rows, atol=1e-3)
    both = loaded(world, "--languages", "en,zh")
    assert len(both.class_head.rows) == sum(map(len, vocab.COCO_PANOPTIC.synonyms))
    for model in (vild, both):
        assert torch.equal(model.class_head.seen, plain.class_head.seen)
    with pytest.raises(ValueError, match="languages!de: unknown language"):
        loaded(world, "--languages", "de")


@pytest.fixture
def photo(tmp_path):
    """The first of six, alone in their folder."""
    (tmp_path / "photos").mkdir()
    for i, (image, _, _) in enumerate(scenes()):
        Image.fromarray(image).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos" / "0.png"


def test_predict_mandarin_prompts(world, photo, tmp_path, monkeypatch):
    """Typed in Mandarin: its own templates and rows; a word of a trained class makes it seen."""
    out = tmp_path / "out"
    calls, swap = [], eomt.OpenVocabEoMT.set_classes
    monkeypatch.setattr(eomt.OpenVocabEoMT, "set_classes",
                        lambda self, *given: calls.append(given) or swap(self, *given))
    words = "人|person，书|book、猫头鹰；stuff：山|mountain，海|sea"
    predict_here(photo.parent, "--ckpt", world.ckpt, "--prompts", words, "--background", "none", "--out", out)
    names, thing, texts, seen, *_ = calls[0]
    assert names == ("人", "书", "猫头鹰", "山", "海") and thing == (True, True, True, False, False)
    assert seen == [True, True, False, True, True]
    assert texts[0] == [["一张人的照片。", "场景中的人。"], ["a person"]] and len(texts[2]) == 1
    images = json.loads((out / "predictions.json").read_text())["annotations"]
    found = {row["name"] for image in images for row in image["segments_info"]}
    assert found and found <= set(names)


@pytest.mark.parametrize("background,extra", [("coco", 133 - 2), ("ade", 150 - 2), ("none", 0), ("FILE", 3)])
def test_predict_backgrounds(world, photo, tmp_path, monkeypatch, background, extra):
    """Distractors are classes after the prompts, minus what matches one; no mask of theirs is shown."""
    if background == "FILE":
        background = tmp_path / "words.txt"
        background.write_text("# mine\nbed, a red car\nstuff: mountain, sea\n")
    seen, swap = [], eomt.OpenVocabEoMT.set_classes
    monkeypatch.setattr(eomt.OpenVocabEoMT, "set_classes",
                        lambda self, names, *rest: seen.append(list(names)) or swap(self, names, *rest))
    predict_here(photo, "--ckpt", world.ckpt, "--prompts", "car, person", "--background", background,
                 "--out", tmp_path / "out")
    assert seen[0][:2] == ["car", "person"] and len(seen[0]) == 2 + extra
    assert "person" not in seen[0][2:] and "a red car" not in seen[0][2:]
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"][0]["segments_info"]
    assert {row["name"] for row in rows} <= {"car", "person"}


def test_predict_another_task(world, photo, tmp_path):
    predict_here(photo, "--ckpt", world.ckpt, "--task", "ade20k_panoptic", "--out", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"][0]["segments_info"]
    assert rows and {row["name"] for row in rows} <= set(vocab.ADE20K.names)
    assert {row["category_id"] for row in rows} <= set(vocab.ADE20K.ids)


@pytest.fixture
def calibrated(world, tmp_path):
    """A checkpoint whose training had --ov-alpha, --ov-beta, --ov-temp and what is of its classes alone."""
    model = eomt.load(world.ckpt)
    kept = dict(alpha=0.1, beta=0.6, temp_in=2.0, temp_out=3.0)
    calibration = kept | dict(bias=2.0, class_bias=[0.01 * k for k in range(133)], reject=-1e9)
    eomt.save(tmp_path / "ov.safetensors", model, **model.meta | dict(calibration=calibration))
    return tmp_path / "ov.safetensors", kept


def test_prompts_keep_the_calibration(calibrated):
    """predict.py --prompts fell back to the defaults, where eval.py kept the checkpoint's."""
    path, kept = calibrated
    words = ["--ckpt", str(path), "--prompts", "car, zebra; stuff: road", "--background", "none"]
    head = predict.load_model(predict.parser().parse_args(words)).class_head
    assert head.kept == kept and not head.shift.any() and head.reject == -np.inf


@torch.no_grad()
def test_scores_of_each_classifier_are_tempered(calibrated):
    """score_in and score_out are what the two say in the ensemble: alpha 0 or 1 makes it one of them."""
    model = eomt.load(calibrated[0])
    image, head = torch.from_numpy(next(scenes())[0]).permute(2, 0, 1), model.class_head
    head.calibrate(temp_in=1.5, temp_out=3.0)
    output = model(image[None])[-1].classes[0]  # (Q, K+1)
    result, rows = predict.segment_open(model, image)
    assert rows
    for weight, column in ((0.0, "score_in"), (1.0, "score_out")):
        head.calibrate(alpha=weight, beta=weight, temp_in=1.5, temp_out=3.0)
        alone = model(image[None])[-1].classes[0]  # (Q, K+1)
        for label, score, row in zip(result.labels, result.scores, rows, strict=True):
            query = (output[:, label].exp() - score).abs().argmin()
            assert row[column] == pytest.approx(alone[query, :-1].softmax(-1)[label].item(), rel=1e-3)


@pytest.mark.parametrize("argv, line", [
    (["--task", "ade20k_semantic", "--embeddings"], "--embeddings: .* panoptic.*; "),
    (["--task", "ade20k_instance", "--embeddings"], "--embeddings: .* panoptic.*; "),
    (["--task", "ade20k_semantic", "--prompts", "cat"], "--task ade20k_semantic: .*--prompts.*; "),
    (["--task", "ade20k_panoptic", "--prompts", "cat"], "--task ade20k_panoptic: .*--prompts.*; ")])
def test_predict_options_without_effect_are_refused(world, argv, line):
    """Passed over in silence: --prompts are panoptic whatever --task says, others have no rows to add to."""
    with pytest.raises(ValueError, match=f"^{line}"):
        predict_here("x.jpg", "--ckpt", world.ckpt, *argv)


def test_set_classes_of_nothing(world):
    with pytest.raises(ValueError, match="prompts: no class; give at least one"):
        eomt.load(world.ckpt).set_classes([])


# ---- options of the original recipe ------------------------------------------------------------------------
def made(world, stage, *argv):
    """Settings and model of a stage in training mode, on random heads and, so that they count, adapters."""
    cfg, _ = train.parse(["--quick", "--stage", stage, "--task", "coco_panoptic", "--split", "ovp_val",
                          "--batch-size", "4", "--num-points", "64", *map(str, argv)])
    cfg.encoder_weights, cfg.steps = str(world.root / "tower"), 10
    model = train.make_open(cfg, vocab.COCO_PANOPTIC, None).train()
    for adapter in lora.adapters(model).values():
        torch.nn.init.normal_(adapter.B, std=0.1, generator=torch.Generator().manual_seed(0))
    return cfg, model


def losses(world, *argv):
    """Of the first step of a stage, and what masks the model was given."""
    cfg, model = made(world, *argv)
    trainer, given = train.Trainer(cfg, model, torch.device("cpu")), []
    model.register_forward_pre_hook(lambda module, inputs: given.append(inputs[1]))
    images = data.SegmentDataset(world.root / "coco", "coco_panoptic", "train", data.Augment(64, (1.0, 1.0)),
                                 set(range(133)) - set(vocab.split(vocab.COCO_PANOPTIC, cfg.split)[0]))
    part = data.collate([images[(0, i)] for i in range(4)])
    norm, _ = trainer.agree([part], SimpleNamespace(signal=0))
    return trainer.backward(0, 0, part, norm), given[0]


def ranks(model):
    """{block: (rank of q, k, v, rank of fc1, 0 where there is none)}"""
    found = lora.adapters(model.encoder.blocks)
    return {block: tuple(found[name].A.shape[1] if (name := f"{block}.{leaf}") in found else 0
                         for leaf in ("attn.qkv", "mlp.fc1"))
            for block in sorted({int(name.split(".")[0]) for name in found})}


FREEZE, LORA = "MODEL.BACKBONE.FREEZE ", "MODEL.BACKBONE.LORA."
MODELS = [  # original spelling and value, ours, what shows it in the model
    (FREEZE + "False", "A --no-freeze-backbone", lambda m: m.encoder.positions.requires_grad, True),
    (FREEZE + "True", "A --freeze-backbone", lambda m: m.encoder.positions.requires_grad, False),
    (LORA + "ENABLED True", "A --lora --lora-last-n 1", ranks, {3: (16, 32)}),
    (LORA + "ENABLED False", "B --no-lora --train-heads --distill-feat 0 --distill-itc 0", ranks, {}),
    (LORA + "LAST_N_LAYERS 3", "B --lora-last-n 3", lambda m: list(ranks(m)), [1, 2, 3]),
    (LORA + "LAYERS_LAST_N 1", "B --lora-last-n 1", lambda m: list(ranks(m)), [3]),
    (LORA + "RANK_ATTN 4", "B --lora-rank-attn 4", ranks, {2: (4, 32), 3: (4, 32)}),
    (LORA + "RANK_FFN 5", "B --lora-rank-ffn 5", ranks, {2: (16, 5), 3: (16, 5)}),
    (LORA + "RANK 8", "B --lora-rank-attn 8 --lora-rank-ffn 8 --lora-last-n 8", ranks,
     dict.fromkeys(range(4), (8, 8))),
    ("MODEL.QUERY_INIT text", "A --query-init text", lambda m: m.centres.norm(dim=1).min() > 0.5, True),
    ("MODEL.OPEN_VOCAB.MULTILINGUAL True", "A --languages en,zh", lambda m: len(m.class_head.rows),
     sum(map(len, vocab.COCO_PANOPTIC.synonyms))),
    ("OPEN_VOCAB_SPLIT padding_119_14", "A --split padding_119_14", lambda m: m.class_head.num_seen, 119),
]


@pytest.mark.parametrize("word,ours,probe,value", MODELS, ids=[row[0] for row in MODELS])
def test_original_option_of_the_model(world, word, ours, probe, value):
    _, model = made(world, *ours.split())
    assert probe(model) == value
    refused(word, [part for part in ours.split() if part.startswith("--")][0].replace("--no-", "--"))


def refused(word, flag):
    """The original spelling, with its value after a space or =, is answered with our flag, in one line."""
    for argv in (word.split(), [word.replace(" ", "=")]):
        with pytest.raises(ValueError) as error:
            train.parse(["--stage", "B", *argv])
        assert flag in str(error.value) and "is " in str(error.value) and "\n" not in str(error.value)


def test_original_options_all_answered(capsys):
    for word, flag in train.SEED_WORDS.items():
        refused(f"{word} 1", flag.split()[0])
    for word, flag in evaluation.ORIGINAL.items():
        with pytest.raises(ValueError, match=f"this is {flag} here"):
            evaluation.parse([word, "1"])
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    text = capsys.readouterr().out
    for word in ("MODEL.BACKBONE.LORA.RANK_ATTN", "OPEN_VOCAB_SPLIT", "--model.ckpt_path"):
        assert re.search(rf"^  {re.escape(word)} +--[a-z]", text, re.M), word


def test_original_option_of_distillation(world):
    """Weights scale their own terms and nothing else; 0 and 0 leave the teacher out."""
    one, _ = losses(world, "B", "--distill-feat", 1, "--distill-itc", 0.1)
    two, _ = losses(world, "B", "--distill-feat", 3, "--distill-itc", 0.2)
    none, _ = losses(world, "B", "--distill-feat", 0, "--distill-itc", 0)
    assert one["feat"] > 1e-3 and two["feat"] == pytest.approx(3 * one["feat"].item(), rel=1e-5)
    assert one["itc"] > 1e-3 and two["itc"] == pytest.approx(2 * one["itc"].item(), rel=1e-5)
    assert "feat" not in none and none["mask"] == one["mask"] == two["mask"]
    refused("MODEL.LOSS.DISTILL.FEAT_ALIGN 1.0", "--distill-feat")
    refused("LOSS.DISTILL.ITC_WEIGHT 0.1", "--distill-itc")


def test_original_option_of_masked_attention(world):
    (held, given), (free, none) = losses(world, "A"), losses(world, "A", "--no-masked-attn")
    assert given.tolist() == [1, 1] and none is None and held["mask"] != free["mask"]
    refused("--model.network.masked_attn_enabled False", "--no-masked-attn")


CALIBRATIONS = [["--ov-temp", "2"], ["--ov-temp", "1,3"], ["--ov-temp", "auto"], ["--ov-bias", "2"],
                ["--ov-reject", "1e9"], ["--ov-reject", "auto"], ["--ov-alpha", "0"], ["--ov-beta", "0"],
                ["--ov-pool", "value"], ["--ov-pool", "mean"], ["--ov-class-bias", "auto"],
                ["--ov-class-bias", "FILE"]]


@pytest.mark.parametrize("argv", CALIBRATIONS, ids=" ".join)
def test_calibration_option_changes_the_classes(world, tmp_path, argv):
    """Against the default: every option moves probabilities, none makes them infinite."""
    if argv[1] == "FILE":
        argv = [argv[0], tmp_path / "bias.json"]
        argv[1].write_text(json.dumps([3.0] + [0.0] * 132))
    images = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image, _, _ in scenes()])
    found = []
    for more in ([], argv):
        args = evaluation.parser().parse_args(["--ckpt", str(world.ckpt), *map(str, more)])
        model = evaluation.load_model(args)
        task, root = evaluation.open_task(model, args)
        evaluation.open_options(model, data.SegmentDataset(root, task, "val"), args)
        with torch.no_grad():
            found.append(model(images)[-1].classes)
    assert found[1].isfinite().all() and (found[0] - found[1]).abs().max() > 1e-3
    if argv[1] == "1e9":
        assert (found[1].argmax(-1) == 133).all()  # nothing is energetic enough: all void
    if "bias.json" in str(argv[1]):
        gain = (found[1] - found[0])[..., 0] - (found[1] - found[0])[..., 1]
        torch.testing.assert_close(gain, torch.full_like(gain, 3.0), atol=1e-3, rtol=0)  # of person alone


@pytest.mark.parametrize("text", ["[1, 2]", json.dumps([None] * 133), json.dumps(["a"] * 133), "{}", "x",
                                  json.dumps(dict.fromkeys(range(133), 0.0)), json.dumps("1" * 133),
                                  json.dumps([float("nan")] * 133)])
def test_class_bias_that_is_none(world, tmp_path, text):
    (tmp_path / "bias.json").write_text(text)
    with pytest.raises(ValueError, match="not a JSON list of 133 numbers"):
        eval_here("--ckpt", world.ckpt, "--ov-class-bias", tmp_path / "bias.json")


@pytest.mark.parametrize("words, line", [
    (["--ov-temp", "0"], "--ov-temp 0: not above 0; "),
    (["--ov-temp", "1,-1"], "--ov-temp 1,-1: not above 0; "),
    (["--ov-temp", "nan"], "--ov-temp nan: not auto, nor numbers"),
    (["--sweep", "ov-temp=1,0"], "--ov-temp 0.0: not above 0; "),
    (["--sweep", "ov-bias=0,a"], "--sweep ov-bias 0,a: not auto, nor numbers"),
    (["--sweep", "ov-bias=0", "--out", "x.json"], "--out x.json: --sweep writes no file; ")])
def test_numbers_that_make_no_sense_are_refused(world, words, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        eval_here("--ckpt", world.ckpt, *words)
    assert str(error.value).startswith(line) and not list(tmp_path.iterdir())


def test_sweep_with_masked_attention(world, capsys):
    """--masked-attn holds for a sweep as for single evaluations; it was passed over in silence."""
    one = eval_here("--ckpt", world.ckpt, "--masked-attn", "--ov-bias", "1").numbers
    assert eval_here("--ckpt", world.ckpt, "--masked-attn", "--sweep", "ov-bias=0,1").numbers == one
    assert eval_here("--ckpt", world.ckpt, "--sweep", "ov-bias=0,1").numbers != one


@pytest.mark.parametrize("swept", ["ov_alpha=0,1", "ov-beta=0,1", "ov-temp=0.1,5", "ov-reject=-1e9,1e9"])
def test_sweep_of_every_option(world, capsys, swept):
    flag, values = swept.replace("_", "-").split("=")
    eval_here("--ckpt", world.ckpt, "--sweep", swept)
    rows = re.findall(rf"^{flag} (\S+): PQ_all ([\d.]+)", capsys.readouterr().out, re.M)
    assert [float(row[0]) for row in rows] == [float(value) for value in values.split(",")]
    for value, quality in rows:
        assert float(quality) == round(eval_here("--ckpt", world.ckpt, f"--{flag}={value}").numbers["PQ"], 2)
    assert flag != "ov-reject" or float(rows[0][1]) > float(rows[1][1]) == 0


def test_wandb_options_reach_wandb(world, monkeypatch, tmp_path):
    calls, run = {}, SimpleNamespace(watch=lambda *a, **k: calls.update(watch=k), log=lambda *a, **k: None,
                                     finish=lambda code: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **k: calls.update(k) or run))
    given = dict(project="p", name="n", group="g", notes="some words", mode="offline", resume="never")
    flags = [part for key, value in given.items() for part in (f"--wandb-{key}", value)]
    train_here("--stage", "A", "--task", "coco_panoptic", "--data", world.root / "coco", "--init", world.ckpt,
               "--steps", 1, "--batch-size", 2, "--out", tmp_path / "run", "--wandb", "--wandb-tags", "a,b",
               "--wandb-watch", *flags)
    assert calls.items() >= given.items() and calls["tags"] == ["a", "b"] and "watch" in calls
    assert calls["config"]["split"] == "ovp_val" and calls["config"]["train_images"] == 96


# ---- stages ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", "ABC")
def test_dry_run_counts_are_those_of_the_built_model(world, stage, capsys):
    argv = ["--quick", "--stage", stage, "--task", "coco_panoptic", "--split", "ovp_val", "--dry-run"]
    cfg, origin = train.parse([*argv, "--lora-last-n", "3"])
    assert train.run(cfg, origin) == 0
    said = re.search(r"parameters: ([\d,]+) trained, ([\d,]+) frozen", capsys.readouterr().out).groups()
    cfg, model = made(world, stage, "--lora-last-n", 3)
    trainer = train.Trainer(cfg, model, torch.device("cpu"))
    trained = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    every = sum(p.numel() for p in model.parameters())
    assert [int(text.replace(",", "")) for text in said] == [trained, every - trained]


def test_later_stage_inherits(world, tmp_path, capsys):
    """Without flags: encoder, templates and policy of Stage A; other templates are refused."""
    begin = ["--quick", "--stage", "B", "--task", "coco_panoptic", "--data", world.root / "coco", "--init"]

    def inherited(*argv):
        cfg, origin = train.parse([*map(str, begin), str(world.ckpt), "--dry-run", *argv])
        assert train.run(cfg, origin) == 0
        return cfg

    config, state, meta = eomt.read(world.ckpt)
    model = eomt.build(config)
    eomt.fill(model, state, world.ckpt)
    eomt.save(tmp_path / "drop.safetensors", model, **meta | dict(split_policy="drop", encoder="siglip2_toy"))
    cfg = inherited()
    assert (cfg.templates, cfg.split_policy, cfg.split) == ("plain", "void", "ovp_val")
    cfg, origin = train.parse([*map(str, begin), str(tmp_path / "drop.safetensors"), "--dry-run"])
    assert train.run(cfg, origin) == 0 and cfg.split_policy == "drop"
    assert inherited("--split-policy", "drop").split_policy == "drop"
    for flag, value in (("--templates", "vild14"), ("--encoder", "siglip2_base"), ("--languages", "zh")):
        with pytest.raises(ValueError, match=f"{flag} {value}: .* has .*; leave it out"):
            inherited(flag, value)


def test_stage_without_class_head(world):
    """--no-load-class-head: the trained classifier starts anew, everything else is Stage A's."""
    heads = []
    for argv in ([], ["--no-load-class-head"]):
        cfg, origin = train.parse(["--quick", "--stage", "B", "--task", "coco_panoptic", "--init",
                                   str(world.ckpt), *argv])
        begin = train.read_start(cfg)
        train.inherit(cfg, origin, begin, vocab.COCO_PANOPTIC)
        heads.append(train.make_open(cfg, vocab.COCO_PANOPTIC, begin))
    old, new = heads
    assert torch.equal(old.q.weight, new.q.weight) and torch.equal(old.class_head.rows, new.class_head.rows)
    assert not torch.equal(old.class_head.mlp[0].weight, new.class_head.mlp[0].weight)
    refused("--model.load_ckpt_class_head False", "--no-load-class-head")


def test_own_classes_then_prompts(world, photo, tmp_path):
    """A stage on a user's own COCO file: its words are seen ones when they come back as prompts."""
    data.write_shapes(tmp_path / "own", vocab.SHAPES, 8, 2, seed=3)
    names = ("apple", "pear", "mug", "fork", "spoon", "lawn", "sky", "sand")
    own = vocab.Vocabulary("own", names, range(1, 9), vocab.SHAPES.thing)
    rename(tmp_path / "own", own, names)
    train_here("--stage", "A", "--task", "auto", "--split", "", "--data", tmp_path / "own", "--steps", 1,
               "--encoder-weights", world.root / "tower", "--batch-size", 2, "--out", tmp_path / "run")
    model = eomt.load(tmp_path / "run")
    assert model.meta["names"] == list(names)
    args = SimpleNamespace(ckpt="x", prompts="apple, zebra; stuff: lawn", background="none", text_weights="",
                           tokenizer="")
    predict.set_prompts(model, args)
    assert model.class_head.seen.tolist() == [True, False, True]
    result = eval_here("--ckpt", tmp_path / "run", "--task", "ade20k_semantic", "--data", world.root / "ade")
    assert result.images == 6


def test_paths_of_the_training_from_another_folder(tmp_path, monkeypatch):
    """Relative ones count from where they are used, as the rest of a project that was moved, else from where
    the training was started; a later stage takes them over."""
    home, names = tmp_path / "home", ["red apple", "sky"]
    write_tower(home / "tower")
    data.write_shapes(home / "coco", vocab.SHAPES, 4, 2)
    monkeypatch.chdir(home)
    flags = ["--task", "shapes", "--split", "", "--steps", 1, "--batch-size", 2, "--data", "coco"]
    train_here("--stage", "A", *flags, "--encoder-weights", "tower", "--tokenizer", "tower/tokenizer.json",
               "--out", "A")
    monkeypatch.chdir(tmp_path)
    eomt.load("home/A").set_classes(names)
    assert eval_here("--ckpt", "home/A").images == 2
    train_here("--stage", "B", *flags[:-1], home / "coco", "--init", "home/A", "--out", "B")
    monkeypatch.chdir(tmp_path.parent)
    eomt.load(tmp_path / "B").set_classes(names)
    home.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    eomt.load("A").set_classes(names)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="^tower: "):
        eomt.load("moved/A").set_classes(names)


@pytest.mark.skipif(not SHARED.exists(), reason="real samples are not here")
def test_real_coco_sample(world, tmp_path, capsys):
    """Stage A, B, evaluation and prompts on real photos with all 133 classes."""
    coco, small = SHARED / "coco", ["--steps", 1, "--batch-size", 2, "--num-queries", 6]
    train_here("--stage", "A", "--task", "coco_panoptic", "--split", "ovp_val", "--data", coco,
               "--encoder-weights", world.root / "tower", *small, "--out", tmp_path / "A")
    rows = train_here("--stage", "B", "--task", "coco_panoptic", "--data", coco, *small[:4], "--init",
                      tmp_path / "A", "--out", tmp_path / "B")
    assert np.isfinite(rows[0]["loss"]) and rows[0]["feat"] == pytest.approx(0, abs=1e-6)
    counts = data.SegmentDataset(coco, "coco_panoptic", "train").class_counts()
    meta = eomt.read(tmp_path / "B")[2]
    assert meta["counts"] == counts.tolist() and len(meta["seen"]) == 96 and meta["stage"] == "B"
    result = eval_here("--ckpt", tmp_path / "B", "--split", "ovp_val", "--ov-class-bias", "auto")
    assert result.images == 28 and {"PQ_seen", "PQ_unseen", "hPQ"} <= result.numbers.keys()
    with zipfile.ZipFile(coco / "val2017.zip") as file:
        (tmp_path / "street.jpg").write_bytes(file.read(file.namelist()[-1]))
    predict_here(tmp_path / "street.jpg", "--ckpt", tmp_path / "B", "--out", tmp_path / "out",
                 "--prompts", "red car, zebra|zebras; stuff: grass")
    image, = json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"]
    assert {row["name"] for row in image["segments_info"]} <= {"red car", "zebra", "grass"}
