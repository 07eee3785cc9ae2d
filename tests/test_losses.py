# SPDX-License-Identifier: MIT
import itertools
import math
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from losses import (
    SetLoss,
    feature_distill,
    itc_distill,
    match,
    sample_points,
    sample_segments,
    set_norm,
    sigmoid_contrastive,
    uncertain_points,
)


class Prediction(NamedTuple):
    masks: Tensor
    classes: Tensor


@dataclass
class Target:
    ids: Tensor
    layer: Tensor
    value: Tensor
    labels: Tensor

    def masks(self):
        return self.ids[self.layer] == self.value[:, None, None]  # (T, H, W)

    def take(self, index):
        return Target(self.ids, self.layer[index], self.value[index], self.labels[index])


def make_target(count, classes, size=(24, 20), layers=2, seed=0):
    """Random id maps in which segments cover blobs, lie in several layers and have values up to 255."""
    g = torch.Generator().manual_seed(seed)
    layer = torch.arange(count) % layers
    value = (torch.randperm(255, generator=g) + 1)[:count]
    coarse = torch.randint(0, count + 2, (layers, -(-size[0] // 4), -(-size[1] // 4)), generator=g)
    lut = torch.zeros(layers, count + 2, dtype=torch.uint8)
    lut[layer, torch.arange(count)] = value.to(torch.uint8)
    ids = torch.stack([row[c] for row, c in zip(lut, coarse, strict=True)])
    ids = ids.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, : size[0], : size[1]].contiguous()
    return Target(ids, layer, value, torch.randint(0, classes, (count,), generator=g))


def make_predictions(layers, batch, queries, classes, size=(9, 7), seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, queries, *size), (batch, queries, classes + 1)
    return [
        Prediction(*[(3 * torch.randn(s, generator=g, dtype=dtype)).requires_grad_() for s in shapes])
        for _ in range(layers)
    ]


def gradients(loss, predictions):
    leaves = [x for p in predictions for x in p]
    return torch.autograd.grad(loss, leaves)


def read(maps, points, dtype=torch.float64):
    """Plain grid_sample of (R,h,w) at (R,S,2)."""
    grid = 2 * points.to(dtype)[:, :, None] - 1
    return F.grid_sample(maps.to(dtype)[:, None], grid, align_corners=False)[:, 0, :, 0]


def draws(seed, layers, count, points, oversample=3.0, importance=0.75):
    """The random numbers of one image, in the order in which SetLoss promises to draw them."""
    g = torch.Generator().manual_seed(seed)
    uniform = points - int(importance * points)
    shapes = (points, 2), (layers * count, int(points * oversample), 2), (layers * count, uniform, 2)
    return [torch.rand(s, generator=g) for s in shapes]


# ------------------------------------------------------------------------------------------ points


def test_sample_points_grid_sample():
    maps = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    points = torch.rand(3, 50, 2)
    ours, theirs = sample_points(maps, points), read(maps, points)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weight = torch.randn_like(ours)
    a, b = (torch.autograd.grad((x * weight).sum(), maps)[0] for x in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    shared = sample_points(maps, points[0])
    torch.testing.assert_close(shared, read(maps, points[:1].expand(3, -1, -1)), rtol=0, atol=1e-12)


def test_sample_points_half_pixel_value():
    maps = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])
    points = torch.tensor([[[0.25, 0.25], [0.75, 0.25], [0.5, 0.5], [0.0, 0.0], [1.0, 1.0]]])
    torch.testing.assert_close(sample_points(maps, points)[0], torch.tensor([1.0, 3.0, 4.0, 0.25, 1.75]))


def test_sample_points_deterministic_path():
    maps = torch.randn(4, 6, 3, dtype=torch.float64, requires_grad=True)
    points = torch.cat([torch.rand(4, 40, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0]]).expand(4, 2, 2)], 1)
    weight = torch.randn(4, 42, dtype=torch.float64)
    plain = sample_points(maps, points)
    torch.use_deterministic_algorithms(True)
    try:
        exact = sample_points(maps, points)
        (grad,) = torch.autograd.grad((exact * weight).sum(), maps)
        names = set()
        node = exact.grad_fn
        while node is not None:
            names.add(node.name())
            node = node.next_functions[0][0] if node.next_functions else None
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any("GridSampler" in name for name in names)
    torch.testing.assert_close(exact, plain, rtol=0, atol=1e-12)
    (wanted,) = torch.autograd.grad((plain * weight).sum(), maps)
    torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(24, 20), (13, 17), (1, 1), (1, 9)])
def test_sample_segments_grid_sample(size):
    target = make_target(7, 3, size, layers=3)
    target.ids[0, 0, 0] = target.value[0]  # a segment on the corner, where zero padding counts
    edge = torch.tensor([[x, y] for x in (0.0, 0.5, 1.0) for y in (0.0, 0.5, 1.0)], dtype=torch.float64)
    points = torch.cat([torch.rand(7, 300, 2, dtype=torch.float64), edge.expand(7, -1, -1)], 1)
    ours = sample_segments(target.ids, target.layer, target.value, points)
    wanted = read(target.masks(), points)
    assert wanted.max() > 0
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)
    shared = sample_segments(target.ids, target.layer, target.value, points[0])
    torch.testing.assert_close(shared, read(target.masks(), points[:1].expand(7, -1, -1)), rtol=0, atol=1e-12)
    single = sample_segments(target.ids, target.layer, target.value, points.float())
    torch.testing.assert_close(single.double(), wanted, rtol=0, atol=1e-5)


def test_sample_segments_value_255_and_same_value_in_two_layers():
    ids = torch.zeros(2, 4, 4, dtype=torch.uint8)
    ids[0, :2], ids[1, :, 3] = 255, 255
    layer, value = torch.tensor([0, 1]), torch.tensor([255, 255])
    points = torch.rand(2, 64, 2, dtype=torch.float64)
    wanted = read(ids == 255, points)
    torch.testing.assert_close(sample_segments(ids, layer, value, points), wanted, rtol=0, atol=1e-12)
    assert (wanted[0] != wanted[1]).any()


def test_uncertain_points_are_the_nearest_to_zero():
    logits = torch.randn(5, 8, 8)
    torch.manual_seed(3)
    ours = uncertain_points(logits, 40, 3.0, 0.75)
    torch.manual_seed(3)
    candidates, uniform = torch.rand(5, 120, 2), torch.rand(5, 10, 2)
    doubt = read(logits, candidates).abs()
    assert ours.shape == (5, 40, 2)
    torch.testing.assert_close(ours[:, 30:], uniform, rtol=0, atol=0)
    kept = read(logits, ours[:, :30]).abs().sort(1).values
    torch.testing.assert_close(kept, doubt.sort(1).values[:, :30], rtol=0, atol=1e-6)
    flat = {tuple(p) for p in candidates.flatten(0, 1).tolist()}
    assert all(tuple(p) in flat for p in ours[:, :30].flatten(0, 1).tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_uncertain_points_of_half_logits(dtype):
    """An odd number of candidates, whose rounded values alone tell which are near zero."""
    logits = torch.randn(5, 8, 8).to(dtype)
    torch.manual_seed(3)
    ours = uncertain_points(logits, 41, 3.0, 0.75)
    torch.manual_seed(3)
    doubt = read(logits.float(), torch.rand(5, 123, 2)).abs()
    kept = read(logits.float(), ours[:, :30]).abs().sort(1).values
    torch.testing.assert_close(kept, doubt.sort(1).values[:, :30], rtol=0, atol=2e-2)


def test_uncertain_points_in_chunks(monkeypatch):
    monkeypatch.setattr(losses, "_chunk", lambda device: 250)  # two masks of 120 candidates at a time
    logits = torch.randn(5, 8, 8)
    torch.manual_seed(3)
    ours = uncertain_points(logits, 40, 3.0, 0.75)
    torch.manual_seed(3)
    wanted = torch.cat([uncertain_points(part, 40, 3.0, 0.75) for part in logits.split(2)])
    torch.testing.assert_close(ours, wanted, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------ matching


def cost_by_hand(logits, truth, prob, label):
    """Cost of one query and one segment, in Python floats."""
    sigmoid = [1 / (1 + math.exp(-x)) for x in logits]
    bce = sum(-(t * math.log(s) + (1 - t) * math.log(1 - s)) for s, t in zip(sigmoid, truth, strict=True))
    overlap = sum(s * t for s, t in zip(sigmoid, truth, strict=True))
    dice = 1 - (2 * overlap + 1) / (sum(sigmoid) + sum(truth) + 1)
    return 5 * bce / len(truth) + 5 * dice - 2 * prob[label]


@pytest.mark.parametrize("queries, count", [(4, 3), (3, 4), (1, 2), (3, 3)])
def test_match_brute_force(queries, count):
    predictions, target = make_predictions(2, 1, queries, 3), make_target(count, 3)
    points = torch.rand(30, 2)
    pairs = match(predictions, [target], [points])
    assert pairs.shape == (3, 2, min(queries, count)) and not pairs[0].any()
    truth = read(target.masks(), points.expand(count, -1, -1)).tolist()
    for prediction, got in zip(predictions, pairs[1:].unbind(1), strict=True):
        logits = read(prediction.masks[0].detach(), points.expand(queries, -1, -1)).tolist()
        prob = prediction.classes[0].softmax(-1).tolist()
        cost = [[cost_by_hand(logits[q], truth[t], prob[q], target.labels[t]) for t in range(count)]
                for q in range(queries)]
        n = min(queries, count)
        options = [
            list(zip(q, t, strict=True))
            for q in itertools.combinations(range(queries), n)
            for t in itertools.permutations(range(count), n)
        ]
        best = min(options, key=lambda pairs, cost=cost: sum(cost[q][t] for q, t in pairs))
        assert [tuple(pair) for pair in got.T.tolist()] == best


@pytest.mark.parametrize("chunk", [1, 10**9])
def test_match_mask2former(monkeypatch, chunk):
    module = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    monkeypatch.setattr(losses, "_chunk", lambda device: chunk)  # layer by layer, and all layers at once
    predictions = make_predictions(3, 3, 12, 5, seed=1)
    targets = [make_target(count, 5, seed=count) for count in (4, 15, 1)]
    points = [torch.rand(100, 2) for _ in targets]
    pairs = match(predictions, targets, points)
    matcher = module.Mask2FormerHungarianMatcher(cost_class=2.0, cost_mask=5.0, cost_dice=5.0, num_points=100)
    for prediction, ours in zip(predictions, pairs.unbind(1), strict=True):
        queue = [p[None] for p in points]
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *shape, queue=queue, **_: queue.pop(0))
            theirs = matcher(
                *(x.detach() for x in prediction), [t.masks() for t in targets], [t.labels for t in targets]
            )
        wanted = [torch.stack([torch.full_like(q, i), q, t]) for i, (q, t) in enumerate(theirs)]
        assert torch.equal(ours, torch.cat(wanted, 1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_match_nan_names_the_images(bad):
    predictions, targets = make_predictions(3, 3, 6, 4), [make_target(3, 4, seed=i) for i in range(3)]
    with torch.no_grad():
        predictions[1].masks[2, 3] = bad
        predictions[2].classes[0, 1, 0] = float("nan")
    names = ["train.zip!a.jpg", "train.zip!b.jpg", "train.zip!c.jpg"]
    with pytest.raises(ValueError) as error:
        SetLoss(4, num_points=32)(predictions, targets, names=names)
    text = str(error.value)
    assert text.startswith("train.zip!a.jpg, train.zip!c.jpg: ") and "b.jpg" not in text
    assert "NaN" in text and "; " in text and "\n" not in text
    with pytest.raises(ValueError, match="image 0 of the batch, image 2 of the batch: "):
        SetLoss(4, num_points=32)(predictions, targets)


def wrong(batch=2, **change):
    """Predictions and targets of which the last is another."""
    predictions, targets = make_predictions(2, 2, 6, 4), [make_target(3, 4, seed=i) for i in range(batch)]
    for name, alter in change.items():
        if name in ("masks", "classes"):
            predictions[1] = predictions[1]._replace(**{name: alter(getattr(predictions[1], name))})
        else:
            targets[1] = replace(targets[1], **{name: alter(getattr(targets[1], name))})
    return predictions, targets


def put(*values):
    return lambda _: torch.tensor(values)


FAULTS = {
    "label of no-object": (dict(labels=put(0, 4, 1)), "b.jpg: labels 0, 1, 4 of 4 classes: they are 0 to 3"),
    "label far out": (dict(labels=put(0, 255, 1)), "b.jpg: labels 0, 1, 255 of 4 classes: they are 0 to 3"),
    "negative label": (dict(labels=put(0, -1, 1)), "b.jpg: labels -1, 0, 1 of 4 classes: they are 0 to 3"),
    "float labels": (dict(labels=put(0.0, 1.0, 1.0)), "b.jpg: .*, labels torch.float32 (3,); wanted ids"),
    "too few labels": (dict(labels=put(0, 1)), "b.jpg: .*, labels torch.int64 (2,); wanted ids uint8"),
    "too few layers": (dict(layer=lambda t: t[:2]), "b.jpg: .*, layer torch.int64 (2,), value torch.int64 ("),
    "too few values": (dict(value=lambda t: t[:2]), "b.jpg: .*, value torch.int64 (2,), labels torch.int64 "),
    "one map, not L": (dict(ids=lambda t: t[0]), "b.jpg: ids torch.uint8 (24, 20), "),
    "wide ids": (dict(ids=lambda t: t.long()), "b.jpg: ids torch.int64 (2, 24, 20), "),
    "another shape": (dict(ids=lambda t: t[:, :12]), "b.jpg: id maps of 12x20 for mask logits of 9x7, "),
    "fewer classes": (dict(classes=lambda t: t[..., :3]), "prediction 1: masks (2, 6, 9, 7), class logits "
                      "(2, 6, 3) for 2 targets; wanted (B, Q, h, w), the same everywhere, and (B, Q, 4 cl"),
    "more classes": (dict(classes=lambda t: torch.cat([t, t], -1)), "prediction 1: .* (2, 6, 10) for 2 "),
    "fewer queries": (dict(masks=lambda t: t[:, :5]), "prediction 1: masks (2, 5, 9, 7), class logits (2, 6"),
    "smaller masks": (dict(masks=lambda t: t[..., :5]), "prediction 1: masks (2, 6, 9, 5), "),
    "flat masks": (dict(masks=lambda t: t.flatten(2)), "prediction 1: masks (2, 6, 63), "),
    "more targets": (dict(batch=3), "prediction 0: masks (2, 6, 9, 7), class logits (2, 6, 5) for 3 targets"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_set_loss_says_what_does_not_fit(fault):
    """One line instead of an index error, or of a CUDA assertion that ends the process."""
    change, words = FAULTS[fault]
    predictions, targets = wrong(**change)
    with pytest.raises(ValueError) as error:
        SetLoss(4, num_points=32)(predictions, targets, names=["a.jpg", "b.jpg", "c.jpg"])
    text = str(error.value)
    assert re.match(re.escape(words).replace(r"\.\*", ".*"), text) and "; " in text and "\n" not in text, text
    assert not isinstance(error.value, losses.NotFinite)  # which train.py takes for numbers gone wrong


# ------------------------------------------------------------------------------------------ set loss


def oracle_loss(module, predictions, targets, seeds, points, classes, monkeypatch):
    """Mask2FormerLoss of every layer on the points that our seeds give: its terms, summed over layers."""
    from transformers import Mask2FormerConfig

    oracle = module.Mask2FormerLoss(Mask2FormerConfig(num_labels=classes, train_num_points=points), {})
    layers, queries = len(predictions), predictions[0].masks.shape[1]
    counts = [min(queries, len(t.labels)) for t in targets]
    own = [draws(s, layers, n, points) for s, n in zip(seeds, counts, strict=True)]
    total = {"loss_mask": 0, "loss_dice": 0, "loss_cross_entropy": 0}
    for k, prediction in enumerate(predictions):
        queue = [shared[None] for shared, _, _ in own]
        for part in (1, 2):  # candidates of all images, then uniform points of all images
            rows = [d[part].unflatten(0, (layers, n))[k] for d, n in zip(own, counts, strict=True)]
            queue.append(torch.cat(rows))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *shape, queue=queue, **_: queue.pop(0))
            terms = oracle(*prediction, [t.masks().float() for t in targets], [t.labels for t in targets])
        assert not queue
        total = {name: total[name] + terms[name] for name in total}
    return total


@pytest.mark.parametrize("layers, counts", [(1, (4,)), (3, (5, 1, 8)), (2, (14, 3))])
def test_set_loss_mask2former(monkeypatch, layers, counts):
    """Value of each term and gradients, also with more segments (14) than queries (10)."""
    module = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    classes, queries, points, seeds = 6, 10, 60, [11, 12, 13][: len(counts)]
    predictions = make_predictions(layers, len(counts), queries, classes, seed=5)
    targets = [make_target(n, classes, seed=n) for n in counts]
    norm = set_norm(targets, queries)
    norm[0] = sum(counts)  # the oracle divides by the number of segments, not of pairs
    ours = SetLoss(classes, num_points=points)(predictions, targets, norm=norm, seeds=seeds)
    theirs = oracle_loss(module, predictions, targets, seeds, points, classes, monkeypatch)
    terms = {"mask": 5 * theirs["loss_mask"], "dice": 5 * theirs["loss_dice"]}
    terms["class"] = 2 * theirs["loss_cross_entropy"]
    for name, wanted in terms.items():
        torch.testing.assert_close(ours[name], wanted.detach(), rtol=1e-5, atol=1e-5)
    total = sum(terms.values())
    torch.testing.assert_close(ours["loss"], total, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(ours["loss"], predictions), gradients(total, predictions), strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_set_loss_brute_force():
    """Written out with loops over layers, images, pairs and points, in float64."""
    layers, queries, classes, points, seeds = 2, 3, 2, 12, [7, 8, 9]
    predictions = make_predictions(layers, 3, queries, classes, dtype=torch.float64)
    targets = [make_target(2, classes, seed=1), make_target(0, classes), make_target(5, classes, seed=2)]
    got = SetLoss(classes, num_points=points)(predictions, targets, seeds=seeds)
    bce = dice = label = weights = 0.0
    for i, (target, seed) in enumerate(zip(targets, seeds, strict=True)):
        n = min(queries, len(target.labels))
        shared, candidates, uniform = draws(seed, layers, n, points)
        one = [Prediction(p.masks[i : i + 1], p.classes[i : i + 1]) for p in predictions]
        pairs = match(one, [target], [shared])
        for k, prediction in enumerate(predictions):
            goal = [classes] * queries
            for j, (q, t) in enumerate(pairs[1:, k].T.tolist()):
                goal[q] = int(target.labels[t])
                logits = prediction.masks[i, q].detach()[None]
                tried = candidates.unflatten(0, (layers, n))[k, j]
                order = read(logits, tried[None])[0].abs().argsort()
                where = torch.cat([tried[order[:9]], uniform.unflatten(0, (layers, n))[k, j]])[None]
                x, y = read(logits, where)[0].tolist(), read(target.masks()[t][None], where)[0].tolist()
                sigmoid = [1 / (1 + math.exp(-a)) for a in x]
                both = zip(sigmoid, y, strict=True)
                bce += sum(-(b * math.log(s) + (1 - b) * math.log(1 - s)) for s, b in both) / points
                overlap = sum(s * b for s, b in zip(sigmoid, y, strict=True))
                dice += 1 - (2 * overlap + 1) / (sum(sigmoid) + sum(y) + 1)
            for q, c in enumerate(goal):
                weight = 0.1 if c == classes else 1.0
                label -= weight * prediction.classes[i, q].log_softmax(-1)[c].item()
                weights += weight
    wanted = {"mask": 5 * bce / 5, "dice": 5 * dice / 5, "class": 2 * label / (weights / layers)}
    for name, value in wanted.items():
        assert abs(got[name].item() - value) < 1e-5 * abs(value), name
    assert abs(got["loss"].item() - sum(wanted.values())) < 1e-4
    assert got["loss"].requires_grad and not got["mask"].requires_grad


def test_set_norm_counts():
    targets = [make_target(n, 3) for n in (2, 0, 9)]
    pairs, weight = set_norm(targets, 5, 0.1).tolist()
    assert pairs == 7 and abs(weight - (7 + 0.8)) < 1e-12
    assert set_norm(targets[1:2], 5, 0.1).tolist() == [0, 0.5]


def split_gradients(parts, predictions, targets, norm, seeds):
    """Sum of the gradients of the batch cut into `parts`."""
    criterion, start, total = SetLoss(4, num_points=50), 0, 0.0
    for size in parts:
        cut = slice(start, start + size)
        part = [Prediction(p.masks[cut], p.classes[cut]) for p in predictions]
        total = total + criterion(part, targets[cut], norm=norm, seeds=seeds[cut])["loss"]
        start += size
    return [total.detach(), *gradients(total, predictions)]


def test_set_loss_does_not_depend_on_the_split():
    predictions = make_predictions(3, 4, 8, 4, dtype=torch.float64)
    targets = [make_target(n, 4, seed=n) for n in (3, 0, 11, 1)]
    norm, seeds = set_norm(targets, 8), [5, 6, 7, 8]
    whole = split_gradients([4], predictions, targets, norm, seeds)
    for parts in ([2, 2], [1, 1, 1, 1], [1, 3]):
        for a, b in zip(whole, split_gradients(parts, predictions, targets, norm, seeds), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    alone = SetLoss(4, num_points=50)(predictions, targets, seeds=seeds)["loss"]
    torch.testing.assert_close(alone, whole[0], rtol=1e-12, atol=0)  # norm=None is this batch's set_norm
    other = split_gradients([4], predictions, targets, norm, [5, 6, 7, 9])
    assert (other[0] - whole[0]).abs() > 1e-6


def test_set_loss_permuted_targets():
    predictions, target = make_predictions(2, 1, 9, 4, dtype=torch.float64), make_target(6, 4)
    run = SetLoss(4, num_points=50)
    a = run(predictions, [target], seeds=[3])["loss"]
    b = run(predictions, [target.take(torch.tensor([4, 0, 5, 3, 1, 2]))], seeds=[3])["loss"]
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_set_loss_permuted_queries():
    """The matcher sees the same points, so the same pairs; those of the loss are drawn in another order."""
    predictions, target = make_predictions(2, 1, 9, 4), make_target(5, 4)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    shuffled = [Prediction(p.masks[:, order], p.classes[:, order]) for p in predictions]
    run = SetLoss(4, num_points=20000, oversample=1.0, importance=0.0)
    a, b = (run(queries, [target], seeds=[7]) for queries in (predictions, shuffled))
    torch.testing.assert_close(a["class"], b["class"])
    torch.testing.assert_close(a["loss"], b["loss"], rtol=0.02, atol=0)


@pytest.mark.parametrize(
    "layers, queries, counts", [(3, 5, (0, 0)), (1, 1, (0,)), (2, 1, (3, 0)), (2, 4, (9, 0, 2))]
)
def test_set_loss_empty_and_crowded(layers, queries, counts):
    predictions = make_predictions(layers, len(counts), queries, 3)
    targets = [make_target(n, 3, seed=n) for n in counts]
    result = SetLoss(3, num_points=40)(predictions, targets)
    assert all(value.isfinite() and value.shape == () for value in result.values())
    grads = gradients(result["loss"], predictions)
    for mask, label in zip(grads[::2], grads[1::2], strict=True):
        assert mask.isfinite().all() and label.isfinite().all() and label.abs().sum() > 0
        for i, count in enumerate(counts):
            assert int(mask[i].flatten(1).any(1).sum()) == min(count, queries)
    if not any(counts):
        assert result["mask"] == 0 and result["dice"] == 0
        goal = torch.full((len(counts) * queries,), 3)
        wanted = sum(2 * F.cross_entropy(p.classes.flatten(0, 1), goal) for p in predictions)
        torch.testing.assert_close(result["class"], wanted.detach())


def test_set_loss_bf16_equals_fp32_of_the_same_numbers(monkeypatch):
    """Costs, losses and gradients, under autocast as well."""
    costs, assign = [], losses._assign
    monkeypatch.setattr(losses, "_assign", lambda *args: costs.append(args[0]) or assign(*args))
    single = make_predictions(2, 2, 8, 4)
    half = [Prediction(*(x.detach().bfloat16().requires_grad_() for x in p)) for p in single]
    lifted = [Prediction(*(x.detach().float().requires_grad_() for x in p)) for p in half]
    targets, run = [make_target(n, 4, seed=n) for n in (3, 5)], SetLoss(4, num_points=100)
    wanted = run(lifted, targets, seeds=[1, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = [run(p, targets, seeds=[1, 2]) for p in (half, lifted)]
    assert torch.equal(costs[0], costs[1]) and torch.equal(costs[0], costs[2])
    for result in got:
        assert result["loss"].dtype == torch.float32
        assert all(torch.equal(result[name], wanted[name]) for name in wanted)
    for a, b in zip(gradients(got[0]["loss"], half), gradients(wanted["loss"], lifted), strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, rtol=1e-2, atol=1e-6)


class Watch(TorchDispatchMode):
    """Counts calls that a device would have to be waited for, launches, and the largest tensor made."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.wait, self.launches, self.largest = [], 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name.split("::")[1] in self.waits:
            self.wait.append(func._schema.name)
        self.launches += not func.is_view
        if isinstance(out, Tensor) and not func.is_view:
            self.largest = max(self.largest, out.numel())
        return out


def test_set_loss_waits_for_the_device_once(monkeypatch):
    """One copy to the host, and nothing else whose result the host would need, in forward and backward."""
    predictions, targets = make_predictions(5, 4, 8, 4), [make_target(n, 4, seed=n) for n in (3, 0, 9, 2)]
    copies = []

    def copy(self):
        copies.append(self.shape)
        return self

    # The assignment itself works on the host's costs: it may look at numbers, so it is left out.
    monkeypatch.setattr(losses, "_assign", lambda *_: fixed_pairs(targets, 5, 8))
    with monkeypatch.context() as patch, Watch() as watch:
        patch.setattr(Tensor, "cpu", copy)
        for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(Tensor, name, lambda self, name=name: pytest.fail(f"Tensor.{name} waits"))
        SetLoss(4, num_points=32)(predictions, targets, seeds=[1, 2, 3, 4])["loss"].backward()
    assert copies == [(5 * 8 * (3 + 0 + 9 + 2),)]
    assert watch.wait == []


def fixed_pairs(targets, layers, queries):
    """Some valid matching, as `_assign` returns it."""
    parts = []
    for i, target in enumerate(targets):
        n = torch.arange(min(queries, len(target.labels))).expand(layers, -1)
        parts.append(torch.stack([torch.full_like(n, i), n, n]))
    return torch.cat(parts, 2)


@pytest.mark.gpu
def test_set_loss_waits_for_the_device_once_cuda(recwarn):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    predictions = make_predictions(5, 4, 8, 4)
    predictions = [Prediction(*(x.detach().cuda().requires_grad_() for x in p)) for p in predictions]
    targets = [make_target(n, 4, seed=n) for n in (3, 0, 9, 2)]
    targets = [Target(t.ids.cuda(), t.layer.cuda(), t.value.cuda(), t.labels.cuda()) for t in targets]
    run = SetLoss(4, num_points=64)
    run(predictions, targets)["loss"].backward()
    recwarn.clear()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        run(predictions, targets, seeds=[1, 2, 3, 4])["loss"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # not "synchroniz" alone: torch warns once that this mode does not see all of them
    assert len([w for w in recwarn if "called a synchronizing" in str(w.message)]) == 1


def test_set_loss_launches_and_memory(monkeypatch):
    """A few hundred launches for 5 layers of 4 images (upstream: 1340), and no (T,H,W) stack of masks."""
    predictions = make_predictions(5, 4, 30, 6, size=(8, 8))
    targets = [make_target(30, 6, size=(256, 256), layers=1, seed=i) for i in range(4)]
    monkeypatch.setattr(losses, "_assign", lambda *_: fixed_pairs(targets, 5, 30))  # runs on the host
    with Watch() as watch:
        SetLoss(6, num_points=64)(predictions, targets)
    assert watch.launches < 500, watch.launches
    assert watch.largest < 30 * 256 * 256 / 4, watch.largest


@pytest.mark.parametrize("side", [4, 512])  # 512: gradients of more than 32 MB
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_matched_masks_and_their_gradient(side, dtype):
    """As torch's own indexing gives them; what is in no pair has exact zeros, and memory of its own."""
    image, query = torch.tensor([[0, 0, 1], [1, 0, 1]]), torch.tensor([[3, 0, 2], [5, 1, 0]])
    layers = [torch.randn(2, 20, side, side, dtype=dtype, requires_grad=True) for _ in range(2)]
    weight = torch.randn(2, 3, side, side, dtype=dtype)
    want = torch.stack([masks[image[k], query[k]] for k, masks in enumerate(layers)])
    got = losses._Matched.apply(image, query, *layers)
    assert torch.equal(got, want)
    wanted = torch.autograd.grad((want * weight).sum(), layers)
    for _ in range(2):
        found = torch.autograd.grad((got * weight).sum(), layers, retain_graph=True)
        assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(found, wanted, strict=True))
        for gradient in found:
            gradient.fill_(1)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_large_zeros_are_private_memory():
    """Shared memory would be given out for reading too, and a fork would write into its parent's."""
    zeros = losses._zeros((9, 1 << 20), torch.zeros(1))
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights = line.split()[:2]
        start, stop = (int(end, 16) for end in span.split("-"))
        if start <= zeros.data_ptr() < stop:
            assert rights == "rw-p"
            break
    else:
        pytest.fail("not in the list of maps")
    assert not zeros.any()


@pytest.mark.slow
def test_set_loss_speed_mask2former():
    """5 layers, batch 4, 200 queries, 20 segments, all points: at most half the oracle's time on CPU."""
    module = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    from transformers import Mask2FormerConfig

    predictions = make_predictions(5, 4, 200, 133, size=(160, 160))
    targets = [make_target(20, 133, size=(640, 640), layers=1, seed=i) for i in range(4)]
    masks, labels = [t.masks().float() for t in targets], [t.labels for t in targets]
    oracle, ours = module.Mask2FormerLoss(Mask2FormerConfig(num_labels=133), {}), SetLoss(133)
    aux = [{"masks_queries_logits": p.masks, "class_queries_logits": p.classes} for p in predictions[1:]]

    def seconds(run):
        start = time.process_time()
        gradients(run(), predictions)
        return time.process_time() - start

    times = [
        (
            seconds(lambda: ours(predictions, targets)["loss"]),
            seconds(lambda: sum(oracle(*predictions[0], masks, labels, aux).values())),
        )
        for _ in range(3)
    ]
    us, them = (min(column) for column in zip(*times, strict=True))
    print(f"set loss {1e3 * us:.0f} ms, Mask2FormerLoss {1e3 * them:.0f} ms, ratio {us / them:.2f}")
    assert us <= 0.5 * them


# ------------------------------------------------------------------------------------------ distillation


def unit(rows):
    return [[a / math.sqrt(sum(b * b for b in row)) for a in row] for row in rows.tolist()]


def test_feature_distill_by_hand():
    student = torch.randn(2, 3, 4, requires_grad=True)
    teacher = torch.randn(2, 3, 4, requires_grad=True)
    loss = feature_distill(student, teacher)
    pairs = zip(unit(student.flatten(0, 1)), unit(teacher.flatten(0, 1)), strict=True)
    wanted = sum(1 - sum(a * b for a, b in zip(*pair, strict=True)) for pair in pairs) / 6
    assert abs(loss.item() - wanted) < 1e-6
    loss.backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
    assert feature_distill(3 * student, student).abs() < 1e-6
    assert feature_distill(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def contrastive_by_hand(image, text, positive, scale, bias):
    total = 0.0
    for u, truth in zip(unit(image), positive.tolist(), strict=True):
        for v, yes in zip(unit(text), truth, strict=True):
            logit = scale * sum(a * b for a, b in zip(u, v, strict=True)) + bias
            total += math.log1p(math.exp(-logit if yes else logit))
    return total / len(image)


def test_sigmoid_contrastive_by_hand():
    image, text, positive = torch.randn(3, 5), torch.randn(4, 5), torch.rand(3, 4) > 0.5
    wanted = contrastive_by_hand(image, text, positive, 8.0, -2.0)
    got = sigmoid_contrastive(image, text, positive, torch.tensor(8.0), torch.tensor(-2.0))
    assert abs(got.item() - wanted) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert abs(sigmoid_contrastive(image, text, positive, 8.0, -2.0).item() - wanted) < 1e-5


def test_sigmoid_contrastive_siglip():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipConfig(
        text_config={**small, "vocab_size": 11, "max_position_embeddings": 6, "projection_size": 8},
        vision_config={**small, "image_size": 8, "patch_size": 4},
    )
    model = transformers.SiglipModel(config).eval()
    with torch.no_grad():
        out = model(
            input_ids=torch.randint(0, 11, (5, 6)), pixel_values=torch.randn(5, 3, 8, 8), return_loss=True
        )
        scale, bias = model.logit_scale.exp(), model.logit_bias
        own = torch.eye(5, dtype=torch.bool)
        ours = sigmoid_contrastive(out.image_embeds, out.text_embeds, own, scale, bias)
    torch.testing.assert_close(ours, out.loss.reshape(()), rtol=1e-5, atol=1e-5)


def test_itc_distill_by_hand():
    student, teacher, text = torch.randn(3, 5), torch.randn(3, 5), torch.randn(4, 5)
    labels, text_labels = torch.tensor([2, 0, 2]), torch.tensor([0, 2, 1, 2])  # class 2 has two synonyms
    positive = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [0, 1, 0, 1]]).bool()

    def softmax(row):
        weights = [math.exp(sum(a * b for a, b in zip(row, t, strict=True)) / 0.07) for t in unit(text)]
        return [w / sum(weights) for w in weights]

    kl = 0.0
    for s, t in zip(unit(student), unit(teacher), strict=True):
        kl += sum(b * math.log(b / a) for a, b in zip(softmax(s), softmax(t), strict=True)) / 3
    wanted = kl + contrastive_by_hand(student, text, positive, 6.0, -1.0)
    got = itc_distill(student, teacher, text, labels, text_labels, 6.0, -1.0)
    assert abs(got.item() - wanted) < 1e-4 * wanted


def test_itc_distill_gradient_only_for_the_student():
    student, teacher = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    text, labels = torch.randn(4, 5), torch.tensor([0, 3, 1])
    itc_distill(student, teacher, text, labels, torch.arange(4), 6.0, -1.0).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
    none = torch.zeros(0, 5, requires_grad=True)
    loss = itc_distill(none, none, text, labels[:0], torch.arange(4), 6.0, -1.0)
    loss.backward()
    assert loss.item() == 0 and none.grad.shape == (0, 5)


def test_target_of_the_docstring_is_the_masks():
    """The recipe for 0/1 masks, also overlapping ones and none."""
    recipe = re.search(r"    (target = .*?labels=labels\))", losses.__doc__, re.S)[1]
    for count in (3, 0):
        masks = torch.rand(count, 8, 12) > 0.5  # (T, H, W)
        scope = dict(torch=torch, SimpleNamespace=SimpleNamespace, masks=masks, labels=torch.arange(count))
        exec(recipe, scope)
        target, points = scope["target"], torch.rand(50, 2)
        hit = losses.sample_segments(target.ids, target.layer, target.value, points)
        torch.testing.assert_close(hit, losses.sample_points(masks.float(), points), rtol=0, atol=1e-6)
        prediction = SimpleNamespace(masks=torch.randn(1, 5, 2, 3), classes=torch.randn(1, 5, 4))
        assert losses.SetLoss(3, num_points=16)([prediction], [target])["loss"].isfinite()
