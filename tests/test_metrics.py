"""metrics.py against pycocotools, hotcoco, plain definitions over pixel sets, and its own merge."""
# SPDX-License-Identifier: MIT
import contextlib
import io
import json
import math
import pickle
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import metrics
from metrics import (
    AP_NAMES,
    MaskAP,
    MeanIoU,
    PanopticQuality,
    polygons_to_mask,
    rle_counts,
    rle_decode,
    rle_encode,
)

COCO_DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco"
needs_coco = pytest.mark.skipif(not COCO_DATA.is_dir(), reason="no sample of COCO here")


# ----------------------------------------------------------------------------------------------------------
# Made data


def ellipse(rng, height, width, smallest=2.0):
    """A wavy blob anywhere, also partly or wholly outside: bool (H,W)."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    y, x = y - rng.uniform(-5, height + 5), x - rng.uniform(-5, width + 5)
    radius = np.exp(rng.uniform(np.log(smallest), np.log(max(height, width, 9) / 3)))
    wave = 1 + 0.3 * np.sin(rng.integers(1, 9) * np.arctan2(y, x))
    return np.hypot(y, x * rng.uniform(0.5, 2)) < radius * wave


def moved(rng, mask):
    """The mask shifted a little, with a few pixels flipped."""
    mask = np.roll(mask, rng.integers(-3, 4, 2), (0, 1))
    return mask ^ (rng.random(mask.shape) < rng.choice([0, 0.001, 0.05]))


def scene(rng, num_classes, size=(90, 110), objects=6, detections=20):
    """One image: overlapping objects, some crowds, some areas not their pixels; noisy tied detections."""
    truth = [ellipse(rng, *size) for _ in range(objects)]
    labels = rng.integers(0, num_classes, objects)
    masks, found = [], []
    for _ in range(detections):
        k = int(rng.integers(0, objects + 1))
        near = k < objects and rng.random() < 0.7
        masks.append(moved(rng, truth[k]) if near else ellipse(rng, *size))
        found.append(labels[k] if near else rng.integers(0, num_classes))
    area = np.array([m.sum() for m in truth]) * rng.choice([1.0, 1.0, 0.8, 7.0], objects) if objects else []
    return (
        {"masks": masks, "scores": rng.random(detections).round(1), "labels": np.array(found, np.int64)},
        {"masks": truth, "labels": labels, "crowd": rng.random(objects) < 0.2, "area": area},
    )


def coded(side):
    return {**side, "masks": [rle_encode(mask) for mask in side["masks"]]}


def scenes(seed=0, images=12, num_classes=3):
    rng = np.random.default_rng(seed)
    counts = [(6, 20), (0, 5), (5, 0), (1, 1), (0, 0), (12, 60)]
    out = [scene(rng, num_classes, (90, 110), *counts[i % len(counts)]) for i in range(images)]
    out.append(scene(rng, 1, (90, 110), 4, 150))  # more than 100 detections of one class
    return out


def ap_of(images, num_classes=3):
    metric = MaskAP(num_classes)
    for i, (detections, truth) in enumerate(images):
        metric.update(detections, truth, f"{i:06d}")
    return metric.compute()


def coco_tables(images, num_classes):
    """The images as COCO's dict of the ground truth and list of results (RLE)."""
    truth, results, frames = [], [], []
    for i, (detections, objects) in enumerate(images):
        detections, objects = (side if isinstance((side["masks"] or [{}])[0], dict) else coded(side)
                               for side in (detections, objects))
        columns = (objects[key] for key in ("masks", "labels", "crowd", "area"))
        for mask, label, crowd, area in zip(*columns, strict=True):
            truth.append({"id": len(truth) + 1, "image_id": i, "category_id": int(label), "area": float(area),
                          "bbox": [0, 0, 1, 1], "iscrowd": int(crowd), "segmentation": mask})
        columns = (detections[key] for key in ("masks", "labels", "scores"))
        for mask, label, score in zip(*columns, strict=True):
            results.append({"image_id": i, "category_id": int(label), "score": float(score),
                            "segmentation": mask})
        height, width = ([m["size"] for m in (*objects["masks"], *detections["masks"])] or [(1, 1)])[0]
        frames.append({"id": i, "height": int(height), "width": int(width)})
    categories = [{"id": k, "name": str(k)} for k in range(num_classes)]
    return {"images": frames, "annotations": truth, "categories": categories, "info": {}}, results


def official_ap(images, num_classes=3):
    """pycocotools' twelve numbers and the seconds its evaluation took, index and area included."""
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    dataset, results = coco_tables(images, num_classes)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dataset
        start = time.perf_counter()
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        seconds = time.perf_counter() - start
        evaluation.summarize()
    return evaluation.stats, seconds


# ----------------------------------------------------------------------------------------------------------
# RLE and polygons


def odd_masks():
    rng = np.random.default_rng(1)
    shapes = [(1, 1), (1, 9), (9, 1), (37, 53), (64, 64), (480, 640)]
    masks = [rng.random(shape) < p for shape in shapes for p in (0.0, 0.03, 0.5, 1.0)]
    masks += [ellipse(rng, *shape) for shape in shapes for _ in range(5)]
    corner = np.zeros((300, 400), bool)
    corner[-1, -1] = True  # one run of more than 2**15, then one of 1
    return masks + [corner, ~corner, np.ascontiguousarray(corner.T).T]


def test_rle_roundtrip_in_all_forms():
    for mask in odd_masks():
        code, counts = rle_encode(mask), rle_counts(mask)
        assert counts.sum() == mask.size and counts[1::2].sum() == mask.sum()
        for form in (code["counts"], code["counts"].encode(), counts.tolist()):
            back = rle_decode({"size": list(mask.shape), "counts": form})
            assert back.dtype == bool and (back == mask).all()


def test_rle_equals_pycocotools():
    official = pytest.importorskip("pycocotools.mask")
    for mask in odd_masks():
        theirs = official.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert rle_encode(mask) == {"size": theirs["size"], "counts": theirs["counts"].decode()}
        assert (rle_decode(theirs) == mask).all()
        assert (rle_decode({"size": mask.shape, "counts": rle_counts(mask)}) == mask).all()


def test_rle_of_uint8_and_of_views():
    mask = ellipse(np.random.default_rng(2), 40, 60)
    assert rle_encode(mask.astype(np.uint8)) == rle_encode(mask)
    assert rle_encode(mask[::2, ::-1]) == rle_encode(mask[::2, ::-1].copy())


@pytest.mark.parametrize("code", [
    {"size": [4, 5], "counts": "52"}, {"size": [4, 5], "counts": [4]}, {"size": [4, 5], "counts": [25, -5]},
    {"size": [4, 5], "counts": ""}, {"size": [4, 5], "counts": []}, {"size": [4, 5], "counts": "T"},
    {"size": [4, 5], "counts": "d0\xff"}, {"size": [5, 5], "counts": rle_encode(np.eye(4, 5))["counts"]},
])
def test_rle_broken_is_refused(code):
    with pytest.raises(ValueError, match="; .*(size|rle_encode)"):
        rle_decode(code)


def test_rle_counts_of_all_sizes_together():
    # counts of one to eight groups, strings of one count, of odd and of even numbers of them, in one reading
    rng, rles, expected = np.random.default_rng(22), [], []
    for n in [1, 1, 2, 3, 3, 1, 4, 5, 40, 41, 1] + rng.integers(1, 60, 60).tolist():
        counts = (2.0 ** rng.uniform(0, rng.choice([3, 9, 20, 36]), n)).astype(np.int64) - 1
        rles.append({"size": [1, int(counts.sum())], "counts": metrics._pack_counts(counts)})
        expected.append(counts)
    for some in (slice(None), slice(3, 9), slice(0, 1), slice(5, 6)):
        counts, first = metrics._read_counts(rles[some], "x")
        assert (counts == np.concatenate(expected[some])).all()
        assert np.diff(first).tolist() == [len(c) for c in expected[some]] and first[0] == 0


def test_rle_equals_pycocotools_on_long_counts():
    official = pytest.importorskip("pycocotools.mask")
    counts = [0, 3, 700_000, 5, 40_000_000, 1, 2, 900]  # steps of up to six groups, up and down
    theirs = official.frPyObjects({"size": [1, sum(counts)], "counts": counts}, 1, sum(counts))
    assert metrics._read_counts([theirs], "x")[0].tolist() == counts
    area = metrics._count_runs([theirs] * 3, "x")[0]
    assert area.tolist() == [int(official.area(theirs))] * 3


def test_rle_of_endless_groups_is_refused():
    with pytest.raises(ValueError, match="RLE counts"):
        rle_decode({"size": [4, 5], "counts": "P" * 100_000 + "4"})


def test_overlaps_of_rle_equal_pixels():
    rng = np.random.default_rng(23)
    masks = [mask for mask in (ellipse(rng, 37, 50) for _ in range(60)) if mask.any()]
    masks += [moved(rng, mask) for mask in masks] + [np.ones((37, 50), bool)]
    masks += [rng.random((37, 50)) < p for p in (0.001, 0.5, 0.999)]
    masks = [mask for mask in masks if mask.any()]
    area, shared = metrics._count_runs([rle_encode(mask) for mask in masks], "x")
    assert area.tolist() == [mask.sum() for mask in masks]
    i, j = (x.reshape(-1) for x in np.indices((len(masks), len(masks))))
    flat = np.array(masks).reshape(len(masks), -1).astype(int)
    assert (shared(i, j) == (flat @ flat.T)[i, j]).all()
    pick = rng.integers(0, len(i), 5)
    assert (shared(i[pick], j[pick]) == (flat @ flat.T)[i, j][pick]).all()


def random_polygon(rng, height, width):
    points, margin = int(rng.integers(3, 12)), float(rng.choice([0, 0, 1, 20]))
    xy = rng.uniform(-margin, [width + margin, height + margin], (points, 2)) * rng.choice([0.1, 1.0, 1.0])
    if rng.random() < 0.3:
        xy = xy.round()  # whole coordinates hit the rounding ties
    if rng.random() < 0.3:
        xy = np.repeat(xy, rng.integers(1, 3, points), 0)  # doubled points: edges of length zero
    return xy.reshape(-1).tolist()


def test_polygons_equal_pycocotools():
    official = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(3)
    for _ in range(1500):
        height, width = rng.integers(1, 90, 2)
        polygons = [random_polygon(rng, height, width) for _ in range(rng.integers(1, 4))]
        theirs = official.decode(official.merge(official.frPyObjects(polygons, int(height), int(width))))
        assert (polygons_to_mask(polygons, int(height), int(width)) == theirs).all(), polygons


@needs_coco
def test_polygons_equal_pycocotools_on_real_annotations():
    official = pytest.importorskip("pycocotools.mask")
    count = 0
    with zipfile.ZipFile(COCO_DATA / "annotations_trainval2017.zip") as archive:
        for member in ("train", "val"):
            data = json.loads(archive.read(f"annotations/instances_{member}2017.json"))
            size = {image["id"]: (image["height"], image["width"]) for image in data["images"]}
            for annotation in data["annotations"]:
                shape, form = size[annotation["image_id"]], annotation["segmentation"]
                theirs = official.frPyObjects(form, *shape)
                if annotation["iscrowd"]:
                    assert (rle_decode(form) == official.decode(theirs)).all()
                else:
                    assert (polygons_to_mask(form, *shape) == official.decode(official.merge(theirs))).all()
                count += 1
    assert count > 500


def test_polygons_union_square_and_errors():
    square = [1, 1, 4, 1, 4, 4, 1, 4]
    mask = polygons_to_mask([square, [6, 6, 9, 6, 9, 9, 6, 9], square], 10, 12)
    assert mask.shape == (10, 12) and mask.sum() == 18 and mask[1:4, 1:4].all() and mask[6:9, 6:9].all()
    assert not polygons_to_mask([], 3, 4).any()
    assert not polygons_to_mask([[-9, -9, -5, -9, -5, -5]], 3, 4).any()
    for worst in (float("nan"), float("inf"), 1e9):
        with pytest.raises(ValueError, match="no number below 1e6"):
            polygons_to_mask([[1, 1, worst, 1, 30, 40]], 5, 5)
    for bad in ([1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]):
        with pytest.raises(ValueError, match="at least three points"):
            polygons_to_mask([bad], 5, 5)


# ----------------------------------------------------------------------------------------------------------
# Panoptic quality


def panoptic_scene(rng, num_classes, size=(60, 70), crowds=True):
    """True and predicted id maps with void, several crowds of a class and areas that are not pixel counts."""
    true_map, pred_map = np.zeros(size, np.int64), np.zeros(size, np.int64)
    true, pred = [], []
    for n in range(int(rng.integers(0, 9))):
        mask = ellipse(rng, *size, smallest=6)
        true_map[mask] = 1000 * n + 7
        true.append({"id": 1000 * n + 7, "category_id": int(rng.integers(0, num_classes)),
                     "iscrowd": int(crowds and rng.random() < 0.3)})
    kept = [s for s in true if (true_map == s["id"]).any()]
    for segment in kept:
        if rng.random() < 0.9:
            segment["area"] = int((true_map == segment["id"]).sum() * rng.choice([1, 1, 1, 1.1])) + 1
    for n in range(int(rng.integers(0, 11))):
        copy = len(kept) and rng.random() < 0.7
        source = kept[int(rng.integers(0, len(kept)))] if copy else None
        mask = moved(rng, true_map == source["id"]) if copy else ellipse(rng, *size, smallest=6)
        pred_map[mask] = n + 1
        label = source["category_id"] if copy and rng.random() < 0.8 else int(rng.integers(0, num_classes))
        pred.append({"id": n + 1, "category_id": label})
    order = rng.permutation(len(kept))
    return pred_map, [s for s in pred if (pred_map == s["id"]).any()], true_map, [kept[i] for i in order]


def slow_pq_image(pred_map, pred, true_map, true):
    """Matches (class, IoU), missed and wrong classes by the definition: sets of pixels and loops."""
    inside = {("t", s["id"]): set(np.flatnonzero(true_map == s["id"])) for s in true}
    inside |= {("p", s["id"]): set(np.flatnonzero(pred_map == s["id"])) for s in pred}
    void, used, matches, crowd = set(np.flatnonzero(true_map == 0)), set(), [], {}
    for t in true:
        theirs = inside["t", t["id"]]
        if t.get("iscrowd"):
            crowd[t["category_id"]] = theirs
            continue
        for p in pred:
            mine = inside["p", p["id"]]
            shared = len(mine & theirs)
            iou = shared / (len(mine) + t.get("area", len(theirs)) - shared - len(mine & void))
            if t["category_id"] == p["category_id"] and iou > 0.5:
                matches.append((t["category_id"], iou))
                used |= {("t", t["id"]), ("p", p["id"])}
    missed = [t["category_id"] for t in true if not t.get("iscrowd") and ("t", t["id"]) not in used]
    wrong = []
    for p in pred:
        mine = inside["p", p["id"]]
        forgiven = len(mine & void) + len(mine & crowd.get(p["category_id"], set()))
        if ("p", p["id"]) not in used and not forgiven / len(mine) > 0.5:
            wrong.append(p["category_id"])
    return matches, missed, wrong


def test_pq_equals_the_definition_on_random_scenes():
    rng = np.random.default_rng(4)
    images = [panoptic_scene(rng, 3) for _ in range(150)]
    metric = PanopticQuality([True, False, True])
    for image in images:
        metric.update(*image)
    found = [slow_pq_image(*image) for image in images]
    matches, missed, wrong = ([x for image in found for x in image[n]] for n in range(3))
    rows = metric.per_class()
    for k, row in enumerate(rows):
        iou = [value for label, value in matches if label == k]
        tp, fp, fn = len(iou), wrong.count(k), missed.count(k)
        assert min(tp, fp, fn) > 20  # the scenes exercise every branch
        assert (row["TP"], row["FP"], row["FN"]) == (tp, fp, fn)
        assert abs(row["SQ"] - sum(iou) / tp) < 1e-12
        assert abs(row["PQ"] - sum(iou) / (tp + fp / 2 + fn / 2)) < 1e-12
        assert abs(row["PQ"] - row["SQ"] * row["RQ"]) < 1e-12
    result = metric.compute({"seen": [0, 1], "odd": [2]})
    assert result["images"] == 150 and result["classes"] == 3 and result["classes_th"] == 2
    for key, members in {"": [0, 1, 2], "_th": [0, 2], "_st": [1], "_seen": [0, 1], "_odd": [2]}.items():
        for name in ("PQ", "SQ", "RQ"):
            assert abs(result[name + key] - np.mean([rows[k][name] for k in members])) < 1e-12


def square_map(*ids):
    """A 4x10 map whose columns hold the ids."""
    return np.tile(np.array(ids), (4, 1))


def one_image(pred, pred_segments, true, true_segments, thing=(True, False)):
    metric = PanopticQuality(thing)
    segments = [[dict(zip(("id", "category_id", "iscrowd", "area"), s, strict=False)) for s in side]
                for side in (pred_segments, true_segments)]
    metric.update(square_map(*pred), segments[0], square_map(*true), segments[1], "frame.png")
    return metric


def counts_of(metric, k=0):
    row = metric.per_class()[k]
    return row["TP"], row["FP"], row["FN"]


def test_pq_match_needs_more_than_half():
    half = one_image([1] * 5 + [2] * 5, [(1, 0), (2, 1)], [3] * 10, [(3, 0)])
    assert counts_of(half) == (0, 1, 1) and counts_of(half, 1) == (0, 1, 0)
    more = one_image([1] * 6 + [2] * 4, [(1, 0), (2, 1)], [3] * 10, [(3, 0)])
    assert counts_of(more) == (1, 0, 0) and more.per_class()[0]["PQ"] == 0.6
    other = one_image([1] * 6 + [2] * 4, [(1, 1), (2, 1)], [3] * 10, [(3, 0)])
    assert counts_of(other) == (0, 0, 1)  # the right pixels under the wrong class


def test_pq_void_is_forgiven_in_the_truth_but_not_in_the_prediction():
    true_void = one_image([1] * 10, [(1, 0)], [0] * 5 + [3] * 5, [(3, 0)])
    assert true_void.per_class()[0]["PQ"] == 1.0
    pred_void = one_image([1] * 6 + [0] * 4, [(1, 0)], [3] * 10, [(3, 0)])
    assert pred_void.per_class()[0]["PQ"] == 0.6
    unmatched = one_image([1] * 10, [(1, 0)], [0] * 5 + [3] * 5, [(3, 1)])
    assert counts_of(unmatched) == (0, 1, 0)  # exactly half on void is not more than half
    assert counts_of(one_image([1] * 10, [(1, 0)], [0] * 6 + [3] * 4, [(3, 1)])) == (0, 0, 0)


def test_pq_crowds():
    # a crowd is never matched or missed; predictions of its class that lie on it are forgiven, others are not
    assert counts_of(one_image([1] * 10, [(1, 0)], [3] * 10, [(3, 0, 1)])) == (0, 0, 0)
    assert counts_of(one_image([1] * 10, [(1, 1)], [3] * 10, [(3, 0, 1)]), 1) == (0, 1, 0)
    two = [3] * 6 + [4] * 4  # of two crowds the last one in the list counts
    assert counts_of(one_image([1] * 10, [(1, 0)], two, [(3, 0, 1), (4, 0, 1)])) == (0, 1, 0)
    assert counts_of(one_image([1] * 10, [(1, 0)], two, [(4, 0, 1), (3, 0, 1)])) == (0, 0, 0)


def test_pq_uses_the_area_of_the_json():
    assert one_image([1] * 10, [(1, 0)], [3] * 10, [(3, 0, 0, 80)]).per_class()[0]["FN"] == 1
    assert abs(one_image([1] * 10, [(1, 0)], [3] * 10, [(3, 0, 0, 50)]).compute()["PQ"] - 0.8) < 1e-15


def test_pq_groups_without_classes_are_nan():
    result = one_image([1] * 10, [(1, 0)], [3] * 10, [(3, 0)], thing=(True, False)).compute({"unseen": [1]})
    assert result["PQ"] == result["PQ_th"] == 1.0 and result["classes"] == 1
    assert math.isnan(result["PQ_st"]) and math.isnan(result["SQ_unseen"]) and result["classes_unseen"] == 0
    empty = PanopticQuality([True, False]).compute()
    assert math.isnan(empty["PQ"]) and empty["images"] == empty["classes"] == 0
    with pytest.raises(ValueError, match="group _unseen has class 2; "):
        PanopticQuality([True, False]).compute({"unseen": [1, 2]})
    blank = one_image([0] * 10, [], [0] * 10, [])
    assert math.isnan(blank.compute()["PQ"]) and blank.compute()["images"] == 1


@pytest.mark.parametrize(("args", "words"), [
    (([1] * 10, [], [3] * 10, [(3, 0)]), "prediction map has id 1, which no segment has"),
    (([1] * 10, [(1, 0)], [3] * 5 + [4] * 5, [(3, 0)]), "true map has id 4, which no segment has"),
    (([1] * 10, [(1, 0), (9, 0)], [3] * 10, [(3, 0)]), "prediction segment 9 has no pixel"),
    (([1] * 10, [(1, 0)], [3] * 10, [(3, 0), (8, 1)]), "true segment 8 has no pixel"),
    (([1] * 10, [(1, 2)], [3] * 10, [(3, 0)]), "prediction list has class 2"),
    (([1] * 10, [(1, 0)], [3] * 10, [(3, -1)]), "true list has class -1"),
    (([1] * 10, [(1, 0), (1, 1)], [3] * 10, [(3, 0)]), "prediction list has an id twice"),
    (([0] * 10, [(0, 0)], [3] * 10, [(3, 0)]), "prediction list has an id twice or 0"),
    (([-1] * 10, [(1, 0)], [3] * 10, [(3, 0)]), "prediction map has id -1"),
    (([1] * 10, [(1, 0)], [3] * 10, [(3, 0, 0, 0)]), "area 0"),
])
def test_pq_faults_name_the_image(args, words):
    with pytest.raises(ValueError, match=f"^frame.png: .*{words}.*; "):
        one_image(*args)


@pytest.mark.parametrize(("pred", "true"), [
    (np.zeros((4, 5), int), np.zeros((5, 4), int)), (np.zeros((4, 5)), np.zeros((4, 5), int)),
    (np.zeros((0, 5), int), np.zeros((0, 5), int)), (np.zeros((1, 4, 5), int), np.zeros((1, 4, 5), int)),
])
def test_maps_that_do_not_fit_are_refused(pred, true):
    with pytest.raises(ValueError, match="frame.png: .*; give two integer maps"):
        PanopticQuality([True]).update(pred, [], true, [], "frame.png")
    with pytest.raises(ValueError, match="frame.png: .*; give two integer maps"):
        MeanIoU(3).update(pred, true, "frame.png")


def write_panoptic(folder, name, images, categories):
    """The images as COCO panoptic JSON and PNGs, as the official evaluators read them."""
    (folder / name).mkdir()
    annotations = []
    for i, (id_map, segments) in enumerate(images):
        rgb = np.stack([id_map % 256, id_map // 256 % 256, id_map // 65536], -1).astype(np.uint8)
        Image.fromarray(rgb).save(folder / name / f"{i}.png")
        annotations.append({"image_id": i, "file_name": f"{i}.png", "segments_info": segments})
    frames = [{"id": i, "file_name": f"{i}.jpg", "height": m.shape[0], "width": m.shape[1]}
              for i, (m, _) in enumerate(images)]
    data = {"images": frames, "annotations": annotations, "categories": categories}
    (folder / f"{name}.json").write_text(json.dumps(data))
    return str(folder / f"{name}.json")


def hotcoco_pq(tmp_path, images, thing):
    panoptic = pytest.importorskip("hotcoco").panoptic
    categories = [{"id": k, "name": str(k), "isthing": int(t)} for k, t in enumerate(thing)]
    for _, _, true_map, true in images:
        for segment in true:
            segment.setdefault("area", int((true_map == segment["id"]).sum()))
            segment.setdefault("iscrowd", 0)
    for k, name in ((2, "true"), (0, "pred")):
        write_panoptic(tmp_path, name, [image[k:k + 2] for image in images], categories)
    with contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        result = panoptic.pq_compute(str(tmp_path / "true.json"), str(tmp_path / "pred.json"))
    return result, time.perf_counter() - start


def assert_pq_equal(result, theirs):
    for group, key in (("All", ""), ("Things", "_th"), ("Stuff", "_st")):
        for name in ("PQ", "SQ", "RQ"):
            assert abs(result[name + key] - theirs[group][name.lower()]) < 1e-9, (group, name)
        assert result["classes" + key] == theirs[group]["n"]


def test_pq_equals_hotcoco_on_random_scenes(tmp_path):
    rng = np.random.default_rng(5)
    images = [panoptic_scene(rng, 6) for _ in range(60)]
    thing = [True, True, False, True, False, False]
    theirs, _ = hotcoco_pq(tmp_path, images, thing)
    metric = PanopticQuality(thing)
    for image in images:
        metric.update(*image)
    assert_pq_equal(metric.compute(), theirs)


def real_panoptic_scenes():
    """Real COCO panoptic truth, with predictions made from it by shifting, dropping and relabelling."""
    rng = np.random.default_rng(6)
    with zipfile.ZipFile(COCO_DATA / "panoptic_annotations_trainval2017.zip") as archive:
        data = json.loads(archive.read("annotations/panoptic_val2017.json"))
        inner = zipfile.ZipFile(io.BytesIO(archive.read("annotations/panoptic_val2017.zip")))
    index = {c["id"]: k for k, c in enumerate(data["categories"])}
    images = []
    for annotation in data["annotations"]:
        png = io.BytesIO(inner.read("panoptic_val2017/" + annotation["file_name"]))
        true_map = np.array(Image.open(png), np.int64) @ [1, 256, 65536]
        true = [{**s, "category_id": index[s["category_id"]]} for s in annotation["segments_info"]]
        pred_map = np.roll(true_map, rng.integers(-9, 10, 2), (0, 1))
        pred = []
        for segment in true:
            mine = pred_map == segment["id"]
            if rng.random() < 0.1:
                pred_map[mine] = 0
            elif mine.any():
                label = int(rng.integers(0, len(index))) if rng.random() < 0.1 else segment["category_id"]
                pred.append({"id": segment["id"], "category_id": label})
        images.append((pred_map, pred, true_map, true))
    return images, [bool(c["isthing"]) for c in data["categories"]]


@needs_coco
def test_pq_equals_hotcoco_on_real_annotations(tmp_path):
    images, thing = real_panoptic_scenes()
    theirs, _ = hotcoco_pq(tmp_path, images, thing)
    metric = PanopticQuality(thing)
    for image in images:
        metric.update(*image)
    assert_pq_equal(metric.compute(), theirs)
    assert 0.2 < metric.compute()["PQ"] < 0.95
    perfect = PanopticQuality(thing)
    for _, _, true_map, true in images:
        if not any(segment["iscrowd"] for segment in true):
            perfect.update(true_map, true, true_map, true)
    assert perfect.compute()["RQ"] == 1.0 and perfect.compute()["images"] > 10


# ----------------------------------------------------------------------------------------------------------
# Mean IoU


def label_map(rng, size, num_classes, pieces=60, dtype=np.uint8):
    out = np.zeros(size, dtype)
    for _ in range(pieces):
        y, x = rng.integers(0, size[0]), rng.integers(0, size[1])
        h, w = rng.integers(1, max(2, size[0] // 2)), rng.integers(1, max(2, size[1] // 2))
        out[y:y + h, x:x + w] = rng.integers(0, num_classes)
    return out


def test_miou_equals_pixel_counting():
    rng = np.random.default_rng(7)
    metric, table = MeanIoU(7), np.zeros((7, 7), int)
    for dtype in (np.uint8, np.int32, np.int64):
        true, pred = label_map(rng, (50, 61), 5, dtype=dtype), label_map(rng, (50, 61), 6)
        true[rng.random(true.shape) < 0.2] = 255
        metric.update(pred, true)
        np.add.at(table, (true[true != 255], pred[true != 255]), 1)
    assert (metric.confusion == table).all()
    iou = [table[k, k] / (table[k].sum() + table[:, k].sum() - table[k, k]) for k in range(6)]
    result = metric.compute()
    assert table[5].sum() == 0 and iou[5] == 0  # 5 is predicted but absent: counts as 0; 6 is out
    assert abs(result["mIoU"] - np.mean(iou)) < 1e-12 and result["classes"] == 6 and result["images"] == 3
    assert abs(result["mIoU_upstream"] - np.sum(iou) / 7) < 1e-12
    assert abs(result["pixel_accuracy"] - np.trace(table) / table.sum()) < 1e-12
    assert math.isnan(metric.per_class()[6]["IoU"])


def test_miou_equals_hotcoco():
    semantic = pytest.importorskip("hotcoco").semantic
    rng = np.random.default_rng(8)
    ours, theirs = MeanIoU(19), semantic.SemanticEval(19)
    for _ in range(8):
        true, pred = label_map(rng, (130, 200), 19), label_map(rng, (130, 200), 19)
        true[rng.random(true.shape) < 0.1] = 255
        ours.update(pred, true)
        theirs.update(true, pred)
    assert (ours.confusion == theirs.confusion().astype(np.int64)).all()
    assert abs(ours.compute()["mIoU"] - theirs.report()["metrics"]["mIoU"]) < 1e-12
    assert abs(ours.compute()["pixel_accuracy"] - theirs.report()["metrics"]["aAcc"]) < 1e-12


def test_miou_empty_and_all_ignored():
    metric = MeanIoU(3)
    assert math.isnan(metric.compute()["mIoU"]) and metric.compute()["mIoU_upstream"] == 0
    metric.update(np.zeros((4, 4), np.uint8), np.full((4, 4), 255, np.uint8))
    assert math.isnan(metric.compute()["mIoU"]) and metric.compute()["images"] == 1


@pytest.mark.parametrize(("pred", "true", "words"), [
    (3, 0, "prediction map has class 3"), (255, 0, "prediction map has class 255"),
    (0, 3, "true map .* has class 3"), (0, -1, "true map .* has class -1"),
])
def test_miou_unknown_class_names_the_image(pred, true, words):
    maps = np.zeros((2, 4, 4), np.int64)
    maps[0, 1, 1], maps[1, 2, 2] = pred, true
    with pytest.raises(ValueError, match=f"frame.png: .*{words}; give class indices 0..2"):
        MeanIoU(3).update(*maps, "frame.png")


# ----------------------------------------------------------------------------------------------------------
# Mask AP


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("form", ["dense", "rle", "mixed"])
def test_ap_equals_pycocotools(seed, form):
    images = scenes(seed)
    official, _ = official_ap(images)
    if form != "dense":
        images = [(coded(d) if form == "rle" or i % 2 else d, coded(t)) for i, (d, t) in enumerate(images)]
    ours = ap_of(images)
    assert tuple(ours) == AP_NAMES and len(official) == 12
    np.testing.assert_allclose(list(ours.values()), official, rtol=0, atol=1e-12)
    assert 0.02 < ours["AP"] < 0.9  # neither trivial


def test_ap_equals_hotcoco():
    hotcoco = pytest.importorskip("hotcoco")
    images = scenes(9)
    truth, results = coco_tables(images, 3)
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = hotcoco.COCO(truth)
        evaluation = hotcoco.COCOeval(dataset, dataset.load_res(results), "segm")
        evaluation.run()
    np.testing.assert_allclose(list(ap_of(images).values()), evaluation.stats, rtol=0, atol=1e-9)


def test_ap_from_rle_with_empty_runs():
    rng, images = np.random.default_rng(21), scenes(21)

    def padded(side):
        out = []
        for mask in side["masks"]:
            counts = rle_counts(mask).tolist()
            for _ in range(5):  # a run cut in two by an empty run of the other kind
                at = int(rng.integers(0, len(counts)))
                cut = int(rng.integers(0, counts[at] + 1))
                counts[at:at + 1] = [cut, 0, counts[at] - cut]
            out.append({"size": list(mask.shape), "counts": counts + [0] * int(rng.integers(0, 3))})
        return {**side, "masks": out}

    assert ap_of([(padded(d), padded(t)) for d, t in images]) == ap_of(images)


def strip(length, width=200):
    """A 10 x width mask of the first `length` columns."""
    return np.tile(np.arange(width) < length, (10, 1))


def test_ap_threshold_is_float64_and_reached_by_equality():
    # an IoU of exactly 0.6 (120 of 200 columns) reaches the threshold 0.6 only where both round alike
    for length in (100, 110, 120, 130, 140, 150, 160, 170, 180, 190):
        images = [({"masks": [strip(length)], "scores": [0.5], "labels": [0]},
                   {"masks": [strip(200)], "labels": [0], "crowd": [False], "area": [2000]})]
        expected = np.mean(length / 200 >= metrics.IOU_THRESHOLDS)
        assert abs(ap_of(images, 1)["AP"] - expected) < 1e-12
        official, _ = official_ap(images, 1)
        assert abs(official[0] - expected) < 1e-12


def bars(rng, count):
    """Masks of 32 rows and whole 16-pixel columns: equal IoUs, IoUs on thresholds, areas 32**2, 96**2."""
    start, length = 16 * rng.integers(0, 3, count), rng.choice([16, 32, 48, 64, 80, 288], count)
    column = np.arange(336)
    return [np.tile((column >= a) & (column < a + n), (32, 1)) for a, n in zip(start, length, strict=True)]


@pytest.mark.parametrize("seed", range(6))
def test_ap_equals_pycocotools_where_everything_ties(seed):
    rng, images = np.random.default_rng(100 + seed), []
    for _ in range(12):
        d, g = int(rng.integers(0, 9)), int(rng.integers(0, 7))
        found = {"masks": bars(rng, d), "scores": rng.integers(0, 3, d) / 2, "labels": rng.integers(0, 2, d)}
        truth = {"masks": bars(rng, g), "labels": rng.integers(0, 2, g), "crowd": rng.random(g) < 0.2,
                 "area": rng.choice([900, 1024, 5000, 9216, 9999], g)}
        images.append((found, truth))
    official, _ = official_ap(images, 2)
    np.testing.assert_allclose(list(ap_of(images, 2).values()), official, rtol=0, atol=1e-12)
    images = [(coded(d), coded(t)) for d, t in images]
    np.testing.assert_allclose(list(ap_of(images, 2).values()), official, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_ap_equals_pycocotools_in_crowds(seed):
    # most objects are crowds, and detections lie inside several of them
    rng, images = np.random.default_rng(200 + seed), []
    for _ in range(10):
        detections, truth = scene(rng, 2, (70, 80), int(rng.integers(1, 9)), 40)
        truth["crowd"] = rng.random(len(truth["labels"])) < 0.7
        for k in range(0, 40, 3):
            crowd = truth["masks"][int(rng.integers(0, len(truth["masks"])))]
            detections["masks"][k] = crowd & ellipse(rng, 70, 80, 15)
        images.append((detections, truth))
    official, _ = official_ap(images, 2)
    np.testing.assert_allclose(list(ap_of(images, 2).values()), official, rtol=0, atol=1e-12)
    coded_images = [(coded(d), coded(t)) for d, t in images]
    assert ap_of(coded_images, 2) == ap_of(images, 2)


def test_ap_of_equal_overlaps_takes_the_last_object():
    # the first detection has IoU 0.8 with both objects, the second one only fits strip(80)
    detections = {"masks": [strip(100), strip(60)], "scores": [0.9, 0.8], "labels": [0, 0]}
    for lengths, recall in (((125, 80), 0.5), ((80, 125), 1.0)):
        truth = {"masks": [strip(n) for n in lengths], "labels": [0, 0], "crowd": [0, 0], "area": [900, 900]}
        images = [(detections, truth)]
        np.testing.assert_allclose(list(ap_of(images, 1).values()), official_ap(images, 1)[0], atol=1e-12)
        assert ap_of(images, 1)["AP50"] == pytest.approx(recall, abs=0.01)


def test_ap_crowd_takes_many_and_costs_nothing():
    truth = {"masks": [strip(150), ~strip(150)], "labels": [0, 0], "crowd": [1, 0], "area": [1500, 500]}
    detections = {"masks": [strip(20), strip(30), strip(40), ~strip(150)], "scores": [0.9, 0.8, 0.7, 0.6],
                  "labels": [0] * 4}
    assert ap_of([(detections, truth)], 1)["AP"] == pytest.approx(1.0, abs=1e-12)
    plain = ap_of([(detections, {**truth, "crowd": [False, False]})], 1)
    assert plain["AP"] < 0.2


def test_ap_area_ranges_are_closed_and_use_the_json():
    for area, small, medium in ((1024, 1.0, 1.0), (1025, -1.0, 1.0), (1023, 1.0, -1.0)):
        images = [({"masks": [strip(150)], "scores": [0.5], "labels": [0]},
                   {"masks": [strip(150)], "labels": [0], "crowd": [0], "area": [area]})]
        result = ap_of(images, 1)
        sizes = [result[f"AP_{size}"] for size in ("small", "medium", "large")]
        assert sizes == pytest.approx([small, medium, -1.0])
        np.testing.assert_allclose(list(result.values()), official_ap(images, 1)[0], atol=1e-12)


def test_ap_counts_images_without_truth():
    hit = ({"masks": [strip(150)], "scores": [0.5], "labels": [0]},
           {"masks": [strip(150)], "labels": [0], "crowd": [0], "area": [1500]})
    false = ({"masks": [strip(150)], "scores": [0.9], "labels": [0]},
             {"masks": [], "labels": [], "crowd": [], "area": []})
    assert ap_of([hit], 1)["AP"] == pytest.approx(1.0)
    assert ap_of([hit, false], 1)["AP"] == pytest.approx(0.5)


def test_ap_order_of_equal_scores_is_that_of_the_names():
    rng = np.random.default_rng(10)
    images = [scene(rng, 2, (50, 60), 3, 12) for _ in range(8)]
    for detections, _ in images:
        detections["scores"] = np.full(12, 0.5)
    official, _ = official_ap(images, 2)
    shuffled, reverse = MaskAP(2), MaskAP(2)
    for i in rng.permutation(8):
        shuffled.update(*images[i], f"{i:012d}")
        reverse.update(*images[i], f"{9 - i:012d}")
    np.testing.assert_allclose(list(shuffled.compute().values()), official, atol=1e-12)
    assert abs(reverse.compute()["AP"] - official[0]) > 1e-6


def test_ap_defaults_empty_metric_and_empty_images():
    assert set(MaskAP(3).compute().values()) == {-1.0}
    metric = MaskAP(3)
    metric.update({"masks": [], "scores": [], "labels": []}, {"masks": [], "labels": []}, "a")
    assert set(metric.compute().values()) == {-1.0}
    blank = np.zeros((2, 10, 200), bool)
    twice = {"masks": blank, "scores": [0.1, 0.2], "labels": [0, 1]}
    metric.update(twice, {"masks": blank[1:], "labels": [0]}, "b")
    assert metric.compute()["AP"] == 0.0  # an empty mask matches nothing, not even another empty one
    same = {"masks": [strip(9)], "labels": [2]}
    metric.update({**same, "scores": [1]}, same, "c")
    assert metric.compute()["AP_small"] == pytest.approx(0.5)


def test_ap_is_exact_beyond_float32():
    # more than 2**24 shared pixels: sums of ones in float32 stop counting there
    big = np.ones((4200, 4100), bool)
    other = big.copy()
    other[0, :3] = False
    metric = MaskAP(1)
    metric.update({"masks": [other], "scores": [0.5], "labels": [0]}, {"masks": [big], "labels": [0]}, "a")
    assert metric.state()["pair_iou"][0] == (big.size - 3) / big.size


def test_ap_from_overlaps_counted_elsewhere():
    images = scenes(11)
    metric = MaskAP(3)
    for i, (detections, truth) in enumerate(images):
        a, b = (torch.tensor(np.array(side["masks"], bool).reshape(len(side["masks"]), 90 * 110))
                for side in (detections, truth))
        overlap = a.float() @ b.float().T
        sides = ({k: v for k, v in s.items() if k != "masks"} for s in (detections, truth))
        counted = [{**s, "pixels": m.sum(1).float()} for s, m in zip(sides, (a, b), strict=True)]
        metric.update_overlaps(*counted, overlap, f"{i:06d}")
    assert metric.compute() == ap_of(images)


def test_tensors_are_accepted():
    detections, truth = scene(np.random.default_rng(12), 2, (40, 50), 3, 8)
    tensors = [{k: torch.as_tensor(np.array(v)) for k, v in side.items()} for side in (detections, truth)]
    assert ap_of([tensors], 2) == ap_of([(detections, truth)], 2)
    pred_map, pred, true_map, true = panoptic_scene(np.random.default_rng(13), 3)
    a, b = PanopticQuality([True] * 3), PanopticQuality([True] * 3)
    a.update(pred_map, pred, true_map, true)
    b.update(torch.from_numpy(pred_map), pred, torch.from_numpy(true_map).int(), true)
    assert str(a.per_class()) == str(b.per_class())


@pytest.mark.parametrize(("change", "words"), [
    (lambda d, t: d.update(labels=[0, 5, 1]), "a detection has class 5"),
    (lambda d, t: t.update(labels=[-1]), "an object has class -1"),
    (lambda d, t: d.update(scores=[0.1, math.nan, 0.3]), "score is not finite"),
    (lambda d, t: d.update(masks=d["masks"][:2]), "masks have .* labels"),
    (lambda d, t: t.update(masks=[np.ones((9, 9), bool)]), "masks have the sizes"),
    (lambda d, t: t.update(masks=[{"size": [10, 200], "counts": "oo"}]), "RLE counts are cut"),
    (lambda d, t: (d.update(coded(d)), t.update(masks=[{"size": [10, 200], "counts": "1"}])), "counts fill"),
])
def test_ap_faults_name_the_image(change, words):
    detections = {"masks": [strip(5), strip(50), strip(90)], "scores": [0.5, 0.4, 0.3], "labels": [0, 1, 1]}
    truth = {"masks": [strip(50)], "labels": [1]}
    change(detections, truth)
    with pytest.raises(ValueError, match=f"^frame.png: .*{words}.*; "):
        MaskAP(2).update(detections, truth, "frame.png")


def test_ap_image_counted_twice_is_refused():
    metric, image = MaskAP(3), scenes(0)[0]
    metric.update(*image, "000000000139")
    metric.merge([metric.state(), metric.state()])
    with pytest.raises(ValueError, match="000000000139: counted more than once"):
        metric.compute()


def real_instances():
    """Real COCO instances, and detections made from them by shifting, dropping and relabelling."""
    rng, tables = np.random.default_rng(14), []
    with zipfile.ZipFile(COCO_DATA / "annotations_trainval2017.zip") as archive:
        for member in ("train", "val"):
            tables.append(json.loads(archive.read(f"annotations/instances_{member}2017.json")))
    labels = {c["id"]: k for k, c in enumerate(tables[0]["categories"])}
    images = []
    for image in tables[0]["images"] + tables[1]["images"]:
        mine = [a for table in tables for a in table["annotations"] if a["image_id"] == image["id"]]
        shape = image["height"], image["width"]
        forms = [a["segmentation"] for a in mine]
        masks = [rle_decode(f) if isinstance(f, dict) else polygons_to_mask(f, *shape) for f in forms]
        label = np.array([labels[a["category_id"]] for a in mine], np.int64)
        source = rng.integers(0, len(mine), 2 * len(mine)) if mine else []
        shift = [rng.integers(-4, 5, 2) for _ in source]
        detections = {"masks": [np.roll(masks[s], d, (0, 1)) for s, d in zip(source, shift, strict=True)],
                      "labels": np.array([label[s] if rng.random() < 0.9 else 0 for s in source], np.int64),
                      "scores": rng.random(len(source)).round(2)}
        truth = {"masks": masks, "labels": label, "crowd": np.array([a["iscrowd"] for a in mine], bool),
                 "area": np.array([a["area"] for a in mine])}
        images.append((detections, truth))
    return images, len(labels)


@needs_coco
def test_ap_equals_pycocotools_on_real_annotations():
    images, num_classes = real_instances()
    official, _ = official_ap(images, num_classes)
    ours = ap_of(images, num_classes)
    np.testing.assert_allclose(list(ours.values()), official, rtol=0, atol=1e-12)
    assert ap_of([(coded(d), coded(t)) for d, t in images], num_classes) == ours
    assert 0.1 < ours["AP"] < 0.9 and sum(truth["crowd"].sum() for _, truth in images) > 5


# ----------------------------------------------------------------------------------------------------------
# Ranks


def updates(kind):
    rng = np.random.default_rng(15)
    if kind == "pq":
        return lambda: PanopticQuality([True, False, True]), [panoptic_scene(rng, 3) for _ in range(30)]
    if kind == "ap":
        return lambda: MaskAP(3), [(*image, f"{i:03d}") for i, image in enumerate(scenes(16))]
    return lambda: MeanIoU(5), [(label_map(rng, (40, 50), 5), label_map(rng, (40, 50), 5)) for _ in range(20)]


@pytest.mark.parametrize("kind", ["pq", "ap", "miou"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 40])
def test_merge_equals_one_process_to_the_bit(kind, ranks):
    make, images = updates(kind)
    whole = make()
    for image in images:
        whole.update(*image)
    rng = np.random.default_rng(ranks)
    parts = [make() for _ in range(ranks)]  # more ranks than images: some stay empty
    for i in rng.permutation(len(images)):
        parts[int(rng.integers(0, ranks))].update(*images[i])
    states = [pickle.loads(pickle.dumps(part.state())) for part in parts]
    assert all(isinstance(value, np.ndarray) for state in states for value in state.values())
    merged = make()
    merged.merge(states[::-1])
    assert repr(merged.compute()) == repr(whole.compute())  # repr: nan equals nan, floats to the last bit
    tree = make()
    tree.merge([merged.state()])
    assert repr(tree.compute()) == repr(whole.compute())
    if kind != "ap":
        assert repr(merged.per_class()) == repr(whole.per_class())


@pytest.mark.parametrize("kind", ["pq", "ap", "miou"])
def test_merge_then_update_goes_on(kind):
    make, images = updates(kind)
    whole, first, second = make(), make(), make()
    for image in images:
        whole.update(*image)
    for image in images[:7]:
        first.update(*image)
    before = repr(first.compute())
    second.merge([first.state()])
    for image in images[7:]:
        second.update(*image)
    assert repr(second.compute()) == repr(whole.compute())
    assert repr(first.compute()) == before  # a state shares nothing with the metric it came from


# ----------------------------------------------------------------------------------------------------------
# Speed: only ratios within one run, with room for a busy machine


def best_of(function, times=3):
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def ap_load(images, seed=17, num_classes=80):
    """Images with 30 masks and 8 objects of 480x640, all as RLE."""
    rng = np.random.default_rng(seed)
    blobs = [ellipse(rng, 480, 640, 20) for _ in range(60)]
    out = []
    for _ in range(images):
        truth = [blobs[k] for k in rng.integers(0, 60, 8)]
        labels = rng.integers(0, num_classes, 8)
        source = rng.integers(0, 8, 30)
        found = [np.roll(truth[k], rng.integers(-9, 10, 2), (0, 1)) for k in source]
        out.append((coded({"masks": found, "scores": rng.random(30), "labels": labels[source]}),
                    coded({"masks": truth, "labels": labels, "crowd": rng.random(8) < 0.1,
                           "area": np.array([m.sum() for m in truth])})))
    return out


def test_speed_of_ap_from_rle():
    images = ap_load(60)
    official, theirs = min((official_ap(images, 80) for _ in range(2)), key=lambda pair: pair[1])
    np.testing.assert_allclose(list(ap_of(images, 80).values()), official, atol=1e-12)
    assert best_of(lambda: ap_of(images, 80), 5) < theirs / 4  # 6-7 in quiet, 8 on 500 images


def test_speed_of_ap_from_rle_of_large_regions():
    # masks over the whole image with 6 times the runs of real ones, few classes, few pairs
    rng, images, codes = np.random.default_rng(24), [], []
    for seed in range(10):
        noise = torch.randn(1, 8, 7, 9, generator=torch.Generator().manual_seed(seed))
        region = torch.nn.functional.interpolate(noise, (480, 640), mode="bicubic")[0].argmax(0).numpy()
        codes += [rle_encode(region == k) for k in range(8)]
    for _ in range(25):
        masks, label = [codes[k] for k in rng.integers(0, 80, 38)], rng.integers(0, 20, 38)
        images.append(({"masks": masks[:30], "scores": rng.random(30), "labels": label[:30]},
                       {"masks": masks[30:], "labels": label[30:], "crowd": np.zeros(8, bool),
                        "area": np.array([rle_counts(rle_decode(mask))[1::2].sum() for mask in masks[30:]])}))
    official, theirs = min((official_ap(images, 20) for _ in range(3)), key=lambda pair: pair[1])
    np.testing.assert_allclose(list(ap_of(images, 20).values()), official, atol=1e-12)
    assert best_of(lambda: ap_of(images, 20), 5) < theirs / 3  # 5 in quiet


def test_speed_of_miou():
    semantic = pytest.importorskip("hotcoco").semantic
    rng = np.random.default_rng(18)
    maps = [(label_map(rng, (1024, 2048), 19, 300), label_map(rng, (1024, 2048), 19, 300)) for _ in range(6)]
    ours, theirs = MeanIoU(19), semantic.SemanticEval(19)
    mine = best_of(lambda: [ours.update(p, t) for p, t in maps])
    assert mine < 2 * best_of(lambda: [theirs.update(t, p) for p, t in maps])  # 0.7 in quiet
    by_pixels = best_of(lambda: [np.bincount(t.ravel().astype(np.int64) * 19 + p.ravel()) for p, t in maps])
    assert mine < by_pixels / 2


def test_speed_of_pq(tmp_path):
    rng = np.random.default_rng(19)
    images = []
    for _ in range(16):
        true_map = label_map(rng, (480, 640), 16, 30, np.int32)
        pred_map = np.roll(true_map, rng.integers(-9, 10, 2), (0, 1))
        ids = [int(i) for i in np.unique(true_map) if i]
        lists = [[{"id": i, "category_id": i % 5} for i in ids] for _ in range(2)]
        images.append((pred_map, lists[0], true_map, lists[1]))

    def ours():
        metric = PanopticQuality([True] * 5)
        for image in images:
            metric.update(*image)
        return metric.compute()

    def by_pixels():
        for pred_map, _, true_map, _ in images:
            np.unique(true_map.astype(np.int64) * 2**24 + pred_map, return_counts=True)

    seconds = best_of(ours)
    assert seconds < best_of(by_pixels) / 3  # 10 or more in quiet
    theirs, their_seconds = hotcoco_pq(tmp_path, images, [True] * 5)
    assert abs(ours()["PQ"] - theirs["All"]["pq"]) < 1e-9
    assert seconds < 3 * their_seconds  # 0.3-0.5 in quiet; theirs reads PNGs too, on all cores


def test_speed_of_rle():
    official = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(20)
    masks = [ellipse(rng, 480, 640, 40) for _ in range(40)]
    codes = [rle_encode(mask) for mask in masks]
    theirs = best_of(lambda: [official.decode(code) for code in codes], 7)
    assert best_of(lambda: [rle_decode(code) for code in codes], 7) < 2 * theirs  # 0.5 in quiet
    theirs = best_of(lambda: [official.encode(np.asfortranarray(mask.view(np.uint8))) for mask in masks], 7)
    assert best_of(lambda: [rle_encode(mask) for mask in masks], 7) < 3 * theirs  # 0.6 in quiet
