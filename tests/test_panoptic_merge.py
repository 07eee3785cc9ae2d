"""kernels/panoptic_merge.py: torch path and Triton kernel (interpreted, compiled ahead of time, on a GPU)
against two F.interpolate; `eomt.panoptic` and `eomt.instance` against brute force.

Interpreting needs TRITON_INTERPRET=1 before triton is imported, so `test_interpreter_all_cases` runs the
tests marked `interpreted` in a process of their own.
"""
# SPDX-License-Identifier: MIT
import importlib
import importlib.util
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import eomt
from kernels import panoptic_merge, restored
from kernels.choose import INTERPRET, triton

from .conftest import run_interpreted

merge_module = importlib.import_module("kernels.panoptic_merge")  # the package exports a function
SHIPPED = merge_module.TILE

ROOT = Path(__file__).resolve().parents[1]
NEAR = 1e-5  # a pixel may fall either way where two scores, or a probability and the threshold, are that near
interpreted = pytest.mark.skipif(not INTERPRET, reason="test_interpreter_all_cases runs it")
compiled = pytest.mark.skipif(bool(INTERPRET), reason="wants the compiler or the plain torch path")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# queries, mask, window, content, size
SHAPES = [
    (3, (4, 4), (16, 16), (16, 16), (1, 1)),  # a photo of one pixel
    (4, (10, 10), (40, 40), (1, 40), (1, 1500)),  # a strip, 1 row of the window
    (4, (10, 10), (40, 40), (40, 1), (150, 1)),
    (7, (10, 12), (40, 48), (40, 31), (53, 41)),  # padding on the right, upscaling
    (7, (10, 12), (40, 48), (23, 48), (17, 35)),  # padding at the bottom, downscaling
    (5, (10, 12), (40, 48), (40, 48), (40, 48)),  # one resize, no padding
    (5, (16, 16), (64, 64), (64, 43), (64, 43)),  # one resize, padding
    (1, (9, 7), (36, 28), (30, 28), (61, 57)),  # one query
    (33, (8, 8), (32, 32), (32, 24), (30, 27)),  # many
    (3, (33, 29), (16, 14), (13, 14), (26, 28)),  # a window smaller than the masks
]


@pytest.fixture(autouse=True)
def path(monkeypatch):
    """Tests of the interpreter force Triton, the rest starts from an unset environment."""
    torch.manual_seed(0)
    if INTERPRET:
        monkeypatch.setenv("EOMT_KERNELS", "triton")
        monkeypatch.setattr(merge_module, "TILE", dict(merge_module.TILE, BH=32, BW=128))  # fewer programs
    else:
        monkeypatch.delenv("EOMT_KERNELS", raising=False)


def smooth(queries, mask):
    """Logits (k,mh,mw) of a few soft blobs each, between about -9 and 9."""
    return 4 * F.interpolate(torch.randn(1, queries, 4, 4), mask, mode="bicubic")[0]


def parts(queries, mask):
    """Logits (k,mh,mw) that are above 0 where the query is the highest: they share the image."""
    fields = smooth(queries, mask)
    return 3 * (fields - fields.topk(2, 0).values.mean(0))


def two_resizes(masks, window, content, size):
    up = F.interpolate(masks[None].float(), window, mode="bilinear")[..., :content[0], :content[1]]
    return F.interpolate(up, size, mode="bilinear")[0]


def check(got, masks, scores, window, content, size, threshold=0.5, near=NEAR):
    """Owner and areas of the definition, but for pixels near a tie; the areas fit the owners. Near pixels."""
    owner, areas = got
    k = len(masks)
    assert owner.dtype == torch.int32 and areas.dtype == torch.int64
    assert owner.shape == tuple(size) and areas.shape == (3, k)
    prob = two_resizes(masks, window, content, size).sigmoid()
    value = prob * scores.float()[:, None, None]
    best, first = value.max(0)
    on = prob >= threshold
    want = torch.where(on.gather(0, first[None])[0], first, k)
    second = value.scatter(0, first[None], -1.0).amax(0)
    unsure = (best - second).abs() < near
    edge = (prob - threshold).abs() < near
    wrong = owner != want
    assert not (wrong & ~unsure & ~edge.gather(0, first[None])[0]).any()
    assert torch.equal(areas[2], owner.flatten().long().bincount(minlength=k + 1)[:k])
    assert areas[1].sum() == owner.numel() and (areas[2] <= areas[1]).all()
    assert ((areas[0] - on.sum((1, 2))).abs() <= edge.sum((1, 2))).all()
    won = first.flatten().bincount(minlength=k)
    assert ((areas[1] - won).abs() <= unsure.sum()).all()
    return (unsure | edge.any(0)).sum().item()


def case(shape, dtype=torch.float32):
    queries, mask, window, content, size = shape
    return smooth(queries, mask).to(dtype), 0.8 + 0.2 * torch.rand(queries), window, content, size


# ---- both paths: forced Triton under the interpreter, torch otherwise ----

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merge_against_two_resizes(shape, dtype):
    arguments = case(shape, dtype)
    near = check(panoptic_merge(*arguments), *arguments)
    assert near <= 0.01 * shape[4][0] * shape[4][1] + 1  # the check must not be empty


def test_merge_exact_ties_go_to_the_first():
    """Twice the same query, a flat map on the threshold, saturated probabilities."""
    masks = smooth(3, (8, 8))
    masks, scores = torch.cat([masks, masks]), torch.tensor([0.9, 0.8, 0.7] * 2)
    owner, areas = panoptic_merge(masks, scores, (32, 32), (32, 20), (41, 23))
    assert set(owner.unique().tolist()) <= {0, 1, 2, 6} and areas[1, 3:].sum() == 0
    assert torch.equal(areas[0, :3], areas[0, 3:])
    flat = torch.stack([torch.zeros(8, 8), torch.full((8, 8), -1e-4), torch.zeros(8, 8)])
    owner, areas = panoptic_merge(flat, torch.ones(3), (32, 32), (32, 20), (41, 23))
    assert (owner == 0).all() and areas.tolist() == [[943, 0, 943], [943, 0, 0], [943, 0, 0]]
    owner, areas = panoptic_merge(torch.tensor([50.0, 90.0])[:, None, None].expand(2, 8, 8), torch.ones(2),
                                  (32, 32), (32, 32), (5, 5))
    assert (owner == 0).all()
    owner, areas = panoptic_merge(torch.full((2, 8, 8), -85.0), torch.ones(2), (32, 32), (32, 32), (5, 5))
    assert (owner == 2).all() and areas.tolist() == [[0, 0], [25, 0], [0, 0]]


def test_merge_threshold_and_void():
    arguments = case(SHAPES[3])
    for threshold in (0.3, 0.7, 1.1):
        got = panoptic_merge(*arguments, mask_threshold=threshold)
        check(got, *arguments, threshold=threshold)
    assert (got[0] == 7).all() and got[1][0].sum() == 0  # above 1 nothing is inside, and all are still won
    assert got[1][1].sum() == got[0].numel()


def test_merge_is_repeatable_and_takes_strides_and_gradients():
    masks, *rest = case(SHAPES[4])
    want = panoptic_merge(masks, *rest)
    wide = torch.full((7, 24, 22), float("nan"))
    wide[:, 3:13, 5:17] = masks
    column = torch.full((7, 3), float("nan"))
    column[:, 1] = rest[0]
    turned = masks.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    for other, scores in ((masks, rest[0]), (wide[:, 3:13, 5:17], column[:, 1]), (turned, rest[0])):
        got = panoptic_merge(other, scores, *rest[1:])
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert not got[1].requires_grad


def test_merge_a_mask_without_numbers_leaves_the_bounds_alone():
    masks, *rest = case(SHAPES[4])
    masks[2] = float("nan")
    owner, areas = panoptic_merge(masks, *rest)
    assert 0 <= owner.min() and owner.max() <= 7 and areas[1].sum() == owner.numel() and areas[0, 2] == 0


@pytest.mark.parametrize("change, member", [
    (dict(masks=torch.zeros(4, 4)), r"masks: torch.float32 \(4, 4\)"),
    (dict(masks=torch.zeros(2, 4, 4, dtype=torch.int32)), "masks: torch.int32"),
    (dict(masks=torch.zeros(0, 4, 4), scores=torch.zeros(0)), r"masks: torch.float32 \(0, 4, 4\)"),
    (dict(scores=torch.zeros(3)), r"scores: torch.float32 \(3,\); pass one float for each of 2"),
    (dict(scores=torch.zeros(2, dtype=torch.int64)), "scores: torch.int64"),
    (dict(window=(16,)), r"window: \(16,\)"),
    (dict(size=(0, 5)), r"size: \(0, 5\)"),
    (dict(content=(17, 16)), r"content: \(17, 16\) is not inside the window \(16, 16\)"),
])
def test_merge_errors_are_one_line(change, member):
    given = dict(masks=torch.zeros(2, 4, 4), scores=torch.ones(2), window=(16, 16), content=(16, 16),
                 size=(5, 5))
    with pytest.raises(ValueError, match=rf"kernels/panoptic_merge\.py!{member}") as fault:
        panoptic_merge(**given | change)
    assert "\n" not in str(fault.value)


# ---- plain torch ----

@compiled
@pytest.mark.parametrize("size", [(480, 640), (427, 1201), (1000, 37), (90, 90)])
def test_restored_blocks_equal_two_resizes(size, monkeypatch):
    """Rounding alone differs, whatever the blocks, at the size of real photos."""
    masks = torch.randn(3, 80, 80)
    window, content = (320, 320), eomt.fit(size, (320, 320))
    want, bound = two_resizes(masks, window, content, size), 5e-6
    for strip, block in ((1 << 21, 1 << 18), (40000, 5000), (1, 1)):
        if size != (90, 90) and block == 1:
            continue
        monkeypatch.setattr(merge_module, "_STRIP", strip)
        monkeypatch.setattr(merge_module, "_BLOCK", block)
        got, hits = torch.full_like(want, float("nan")), torch.zeros_like(want)
        for where, logits in restored(masks, window, content, size):
            got[where] = logits
            hits[where] += 1
        assert (hits == 1).all() and (got - want).abs().max() <= bound


@compiled
def test_reference_at_photo_size():
    arguments = case((20, (160, 160), (640, 640), (427, 640), (500, 749)))
    check(panoptic_merge(*arguments), *arguments)


def lonely_eomt(path, text):
    """eomt.py as a file copied elsewhere, without kernels."""
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("lonely_eomt", path)
    module, found = importlib.util.module_from_spec(spec), sys.modules["kernels"]
    sys.modules["kernels"] = None  # importing it raises ImportError
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules["kernels"] = found
    assert module.panoptic_merge is not panoptic_merge and eomt.panoptic_merge is panoptic_merge
    return module


@compiled
def test_eomt_copied_alone_gives_the_same(tmp_path):
    lonely = lonely_eomt(tmp_path / "eomt.py", (ROOT / "eomt.py").read_text())
    for shape in SHAPES:
        arguments = case(shape)
        check(lonely.panoptic_merge(*arguments), *arguments)
        classes = 8 * torch.randn(len(arguments[0]), 6)
        got, want = (m.instance(arguments[0], classes, *arguments[2:], top=30) for m in (eomt, lonely))
        assert torch.equal(got.labels, want.labels) and (got.masks == want.masks).float().mean() > 0.999
        torch.testing.assert_close(got.scores, want.scores, rtol=0, atol=1e-5)


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that an operator returned."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@compiled
def test_large_photo_makes_no_map_per_query():
    """6 MP, 40 queries: one (k, H, W) map of floats would have 960 MB."""
    size, window = (2000, 3000), (64, 64)
    masks, classes = parts(40, (16, 16)), 30 * torch.randn(40, 4)
    content = eomt.fit(size, window)
    with Largest() as largest:
        ids = eomt.panoptic(masks, classes, window, content, size, [True, True, False]).ids
    assert ids.max() > 3 and largest.bytes <= 4 * ids.numel()
    size = (500, 3000)
    with Largest() as largest:
        eomt.instance(masks, classes, window, eomt.fit(size, window), size, top=20)
    assert largest.bytes <= 20 * size[0] * size[1]


# ---- the whole of eomt.panoptic and eomt.instance against the definition in plain Python ----

def mixed(at, new, old):
    """(source, weight) twice for place `at` of a bilinear resize."""
    place = max((at + 0.5) * old / new - 0.5, 0.0)
    low = int(place)
    return (low, 1 - (place - low)), (min(low + 1, old - 1), place - low)


def plain_prob(mask, window, content, size):
    """Rows of probabilities of one query; mask is a list of rows."""
    def axis(k):
        length = (len(mask), len(mask[0]))[k]
        return [[(m, a * b) for w, a in mixed(at, size[k], content[k])
                 for m, b in mixed(w, window[k], length)] for at in range(size[k])]

    across = axis(1)
    logits = [[sum(a * b * mask[y][x] for y, a in down for x, b in columns) for columns in across]
              for down in axis(0)]
    return [[1 / (1 + math.exp(-x)) for x in row] for row in logits]


def plain_panoptic(masks, classes, window, content, size, thing):
    """ids as rows, labels."""
    score, label = (t.tolist() for t in classes.double().softmax(-1).max(-1))
    keep = [q for q in range(len(score)) if label[q] < classes.shape[1] - 1 and score[q] > 0.8]
    prob = {q: plain_prob(masks[q].tolist(), window, content, size) for q in keep}
    pixels = [(y, x) for y in range(size[0]) for x in range(size[1])]
    owner = {(y, x): max(keep, key=lambda q, y=y, x=x: score[q] * prob[q][y][x]) for y, x in pixels}
    ids, labels, stuff = [[0] * size[1] for _ in range(size[0])], [], {}
    for q in keep:
        mine = [p for p in pixels if owner[p] == q]
        final = [(y, x) for y, x in mine if prob[q][y][x] >= 0.5]
        if not final or len(mine) / sum(prob[q][y][x] >= 0.5 for y, x in pixels) < 0.8:
            continue
        number = stuff.get(label[q])
        if number is None:
            labels.append(label[q])
            number = len(labels)
            if not thing[label[q]]:
                stuff[label[q]] = number
        for y, x in final:
            ids[y][x] = number
    return ids, labels


@pytest.mark.parametrize("seed, window, content, size", [
    (0, (32, 32), (32, 21), (29, 18)), (1, (32, 32), (17, 32), (20, 41)), (2, (32, 32), (32, 32), (32, 32)),
    (3, (32, 24), (32, 24), (50, 11)), (4, (32, 32), (1, 32), (1, 90))])
def test_panoptic_equals_brute_force(seed, window, content, size):
    torch.manual_seed(seed)
    masks, classes = parts(9, (8, window[1] // 4)), 20 * torch.randn(9, 4)
    thing = [True, False, False]
    got = eomt.panoptic(masks, classes, window, content, size, thing)
    ids, labels = plain_panoptic(masks, classes, window, content, size, thing)
    assert got.ids.dtype == torch.int32 and got.ids.tolist() == ids and got.labels.tolist() == labels
    assert len(labels) >= 2 and {0, 1} <= set(got.ids.unique().tolist())
    score = classes.softmax(-1).amax(-1)
    assert all(s in score for s in got.scores)


@compiled
def test_instance_equals_brute_force():
    """Several classes of one query, a query without a pixel, more pairs than queries."""
    window, content, size = (32, 32), (32, 21), (29, 18)
    masks, classes = smooth(6, (8, 8)), torch.randn(6, 4)
    masks[3] = -5.0
    got = eomt.instance(masks, classes, window, content, size, top=15)
    prob = [torch.tensor(plain_prob(mask.tolist(), window, content, size)) for mask in masks]
    rows = classes.softmax(-1)[:, :-1].tolist()
    pairs = [(p, q, k) for q, row in enumerate(rows) for k, p in enumerate(row)]
    want = []
    for p, q, k in sorted(pairs, reverse=True)[:15]:
        mask = prob[q] > 0.5
        want.append((p * prob[q][mask].mean().item() if mask.any() else 0.0, k, mask))
    want.sort(key=lambda row: -row[0])
    assert got.labels.tolist()[:10] == [k for _, k, _ in want][:10]
    torch.testing.assert_close(got.scores, torch.tensor([score for score, _, _ in want]), rtol=0, atol=1e-6)
    for mask, (score, _, expected) in zip(got.masks, want, strict=True):
        assert torch.equal(mask, expected) or score == 0


# ---- Triton: interpreted, compiled ahead of time, on a GPU ----

@interpreted
def test_interpreted_library_op_passes_opcheck():
    masks, scores, *rest = case(SHAPES[0])
    for dtype in (torch.float32, torch.bfloat16):
        masks = masks.to(dtype)
        torch.library.opcheck(torch.ops.nanoeomt.panoptic_merge, (masks, scores, *map(list, rest), 0.5))


@interpreted
def test_interpreted_equals_torch_path_with_the_shipped_tile(monkeypatch):
    monkeypatch.setattr(merge_module, "TILE", SHIPPED)
    for shape in SHAPES[3], SHAPES[5]:
        arguments = case(shape)
        got = panoptic_merge(*arguments)
        monkeypatch.setenv("EOMT_KERNELS", "torch")
        want = panoptic_merge(*arguments)
        monkeypatch.setenv("EOMT_KERNELS", "triton")
        assert (got[0] != want[0]).float().mean() <= 1e-3
        torch.testing.assert_close(got[1], want[1], rtol=0, atol=2)


@interpreted
def test_interpreted_refuses_float64():
    with pytest.raises(ValueError, match=r"panoptic_merge\.py!EOMT_KERNELS: dtype torch.float64 is none of"):
        panoptic_merge(*case(SHAPES[3], torch.float64))


@pytest.mark.skipif(triton is None or bool(INTERPRET), reason="the interpreter comes with triton")
def test_interpreter_all_cases():
    run_interpreted(__file__, 45)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu_equals_two_resizes_and_repeats(dtype):
    for shape in (*SHAPES, (20, (160, 160), (640, 640), (427, 640), (801, 1200))):
        masks, scores, *rest = case(shape, dtype)
        arguments = masks.cuda(), scores.cuda(), *rest
        got, again = panoptic_merge(*arguments), panoptic_merge(*arguments)
        check(got, *arguments, near=1e-4)  # the resizes round their places by what the compiler fuses
        assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])


@pytest.mark.gpu
@gpu
def test_gpu_panoptic_waits_twice():
    """Besides the number of kept queries and the areas only indices go up, to a GPU that is idle then."""
    masks, classes = smooth(30, (40, 40)).cuda(), (20 * torch.randn(30, 6)).cuda()
    arguments = masks, classes, (160, 160), (120, 160), (333, 444), [True] * 5
    eomt.panoptic(*arguments)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            eomt.panoptic(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(caught) <= 3, [str(w.message) for w in caught]
