"""Panoptic quality, mean IoU and mask AP with the official definitions, and COCO's run-length masks.

In: per image, id or class maps with segment lists, or masks with scores and labels (numpy or CPU tensors).
Out: dicts of plain numbers, 0..1. Ranks exchange state() and give all of them to merge(): the result does not
depend, to the last bit, on how the images were split.

    metric = PanopticQuality(thing=[True, False])
    metric.update(pred_map, [{"id": 1, "category_id": 0}], true_map, [{"id": 7, "category_id": 0}], "a.png")
    metric.compute()["PQ"]
"""
# SPDX-License-Identifier: MIT
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np


def _ranges(start, length):
    """Numbers start, start + 1, ... of ranges (N,) of the given lengths, one range after the other, int64."""
    return np.arange(int(np.sum(length))) + np.repeat(start + length - np.cumsum(length), length)


# ----------------------------------------------------------------------------------------------------------
# Run-length masks. COCO's RLE is column-major: counts of 0s and 1s in turn, the first one of 0s. Compressed,
# a count (from the fourth on: its difference from the count two before) is a little-endian row of 5-bit
# groups, as character 48 + group, + 32 if more groups follow; the last group's highest bit is the sign.


def rle_counts(mask: np.ndarray) -> np.ndarray:
    """Uncompressed COCO counts, int64 (R,), of a mask (H,W) of bool or 0/1 integers."""
    flat = np.asarray(mask).astype(bool, copy=False).T.reshape(-1)  # (W*H,)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    head = [0, 0] if flat[:1].any() else [0]  # a mask that starts with a 1 has zero 0s before it
    return np.diff(np.concatenate((head, edges, [flat.size])))


def _pack_counts(counts):
    """The compressed form, bytes, of int64 counts (R,)."""
    value = counts.copy()
    value[3:] -= counts[1:-2]
    level = np.arange(8)  # 8 groups of 5 bits hold any count below 2**39
    rest = value[:, None] >> (5 * level)  # (R, 8)
    # a group is the last one when all above it only repeats its sign bit
    last = np.argmax(rest >> 4 == np.where(value < 0, -1, 0)[:, None], axis=1)[:, None]  # (R, 1)
    return ((rest & 31) + 32 * (level < last) + 48)[level <= last].astype(np.uint8).tobytes()


def rle_encode(mask: np.ndarray) -> dict:
    """Compressed COCO RLE {"size": [H, W], "counts": str} of a mask (H,W) of bool or 0/1 integers."""
    return {"size": list(np.shape(mask)), "counts": _pack_counts(rle_counts(mask)).decode("ascii")}


def _read_counts(rles, what):
    """Counts of N RLE dicts in a row, integers (R,), and where those of each begin and end (N+1,)."""
    texts = [rle["counts"].encode() if isinstance(rle["counts"], str) else rle["counts"] for rle in rles]
    texts = [text if isinstance(text, bytes) else _pack_counts(np.asarray(text, np.int64)) for text in texts]
    code = np.frombuffer(b"".join(texts), np.uint8) - np.uint8(48)  # wraps: foreign characters exceed 63
    stop, more = np.cumsum(list(map(len, texts))), code >> 5  # more: 1 where another group of a count follows
    if not all(texts) or code.max() > 63 or more[stop - 1].any():
        raise ValueError(f"{what}: RLE counts are cut or have foreign characters; write them by rle_encode")
    value = (code ^ 16).astype(np.int16) - 16  # the last group of a count with its sign,
    value[1:] = value[1:] << 5 * more[:-1] | (code & 31 * more)[:-1]  # and the one before it; few have others
    end, deep, group = np.flatnonzero(more == 0), np.flatnonzero(more[2:] < (more[1:-1] & more[:-2])) + 2, 2
    counts, place = value.take(end).astype(np.int64), np.searchsorted(end, deep)
    while len(deep) and group < 8:
        counts[place] = counts[place] * 32 + (code[deep - group] & 31)
        group, left = group + 1, more[deep - group - 1] > 0
        deep, place = deep[left], place[left]
    first = np.append(0, np.searchsorted(end, stop))  # (N+1,)
    # undo the differences: running sums of every other count, less their values where each string begins
    three = first[:-1][np.diff(first) > 2]
    counts[three + 2] -= counts[three]  # the third count is no difference
    for odd in (0, 1):
        start = (first + 1 - odd) // 2  # (N+1,)
        total = np.cumsum(np.append(0, counts[odd::2]))  # (1+R/2,)
        np.subtract(total[1:], np.repeat(total[start[:-1]], np.diff(start)), out=counts[odd::2])
    filled, pixels = np.add.reduceat(counts, first[:-1]), [math.prod(rle["size"]) for rle in rles]
    if counts.min() < 0 or (filled != pixels).any():
        raise ValueError(f"{what}: RLE counts fill {filled} of {pixels} pixels; give the size as [H, W]")
    return counts, first


def rle_decode(rle: Mapping, name: str = "RLE") -> np.ndarray:
    """Mask, bool (H,W) in column-major memory, of a COCO RLE dict (counts as str, bytes or list of ints).

    Raises ValueError, starting with `name`, for broken strings and counts that do not fill the size."""
    counts, _ = _read_counts([rle], name)
    return np.repeat(np.arange(len(counts)) % 2 > 0, counts).reshape(rle["size"][::-1]).T  # (H, W)


# ----------------------------------------------------------------------------------------------------------
# Polygons. The official rasteriser walks the outline on a grid five times finer; where the walk passes the
# centre of a pixel column it toggles that column from there down. Any other fill gives other pixels.


def _outline(polygon):
    """All points u, v (int64) that the closed outline of a polygon (P,2) visits on the fine grid in order."""
    point = np.trunc(5 * polygon + 0.5).astype(np.int64)  # (P, 2)
    step = np.roll(point, -1, axis=0) - point  # (P, 2)
    steep = abs(step[:, 1]) > abs(step[:, 0])
    row, major = np.arange(len(point)), steep.astype(np.int64)
    run, rise = step[row, major], step[row, 1 - major]  # along the longer axis and along the other
    # rounding depends on the direction: each edge is computed from its end with the lower major coordinate
    low = np.where((run < 0)[:, None], point + step, point)  # (P, 2)
    slope = rise / np.where(run == 0, 1, run)
    edge = np.repeat(row, abs(run) + 1)
    t = _ranges(np.zeros_like(run), abs(run) + 1)
    t = np.where(run[edge] < 0, abs(run)[edge] - t, t)
    along = low[row, major][edge] + t
    across = np.trunc(low[row, 1 - major][edge] + slope[edge] * t + 0.5).astype(np.int64)
    return np.where(steep[edge], across, along), np.where(steep[edge], along, across)


def polygons_to_mask(polygons: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """Mask, bool (H,W), of the union of polygons, each [x0, y0, x1, y1, ...]: the pixels pycocotools gives.
    Raises ValueError for an odd number of coordinates, fewer than three points, or one beyond 1e6 pixels."""
    mask = np.zeros((height, width), bool)  # (H, W)
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon has {len(polygon)} coordinates; give x, y of at least three points")
        if not np.abs(polygon).max() < 1e6:  # its outline is walked pixel by pixel
            raise ValueError("a polygon has a coordinate that is no number below 1e6; give pixels")
        u, v = _outline(np.asarray(polygon, np.float64).reshape(-1, 2))
        turn = np.flatnonzero(u[1:] != u[:-1]) + 1
        x = (np.minimum(u[turn], u[turn - 1]) + 0.5) / 5 - 0.5
        y = np.clip((np.minimum(v[turn], v[turn - 1]) + 0.5) / 5 - 0.5, 0, height)
        inside = (np.floor(x) == x) & (x >= 0) & (x <= width - 1)
        if not inside.any():
            continue
        x, y = x[inside].astype(np.int64), np.ceil(y[inside]).astype(np.int64)
        # a closed outline crosses a column an even number of times, so nothing leaves the bounding box
        left, top, columns, rows = x.min(), y.min(), np.ptp(x) + 1, np.ptp(y)
        count = np.bincount((x - left) * (rows + 1) + y - top, minlength=columns * (rows + 1))
        count = count.astype(np.uint8).reshape(columns, rows + 1)[:, :-1]  # (columns, rows)
        parity = np.add.accumulate(count, axis=1, dtype=np.uint8) & 1  # (columns, rows)
        mask[top:top + rows, left:left + columns] |= parity.T.view(bool)
    return mask


# ---- Label maps are piecewise constant: counts are over runs of equal (a, b), never over pixels ------------


def _sum_by(key, amount, shape):
    """Sums of amount per flat key, int64 of the given shape; bincount adds in float64, exact below 2**53."""
    return np.bincount(key, amount, math.prod(shape)).astype(np.int64).reshape(shape)


def _joint_runs(a, b, image):
    """Values of two maps (H,W) on each run where both are constant, and its length: three int64 (R,)."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.ndim != 2 or not a.size or {a.dtype.kind, b.dtype.kind} - set("iub"):
        raise ValueError(f"{image}: prediction map {a.shape} {a.dtype} and true map {b.shape} {b.dtype} do "
                         "not fit; give two integer maps of the size of the image")
    a, b = a.reshape(-1), b.reshape(-1)
    change = a[1:] != a[:-1]
    change |= b[1:] != b[:-1]
    start = np.concatenate(([0], np.flatnonzero(change) + 1))
    return a[start].astype(np.int64), b[start].astype(np.int64), np.diff(start, append=a.size)


def _check_classes(label, num_classes, what):
    """Raises ValueError when a label is outside 0..K-1."""
    wrong = label[(label < 0) | (label >= num_classes)]
    if len(wrong):
        raise ValueError(f"{what} has class {wrong[0]}; give class indices 0..{num_classes - 1}")


class MeanIoU:
    """Mean intersection over union of class maps; pixels whose true label is `ignore` do not count."""

    def __init__(self, num_classes: int, ignore: int = 255):
        self.ignore = ignore
        self.confusion = np.zeros((num_classes, num_classes), np.int64)  # (K true, K predicted)
        self.images = 0

    def update(self, pred_map: np.ndarray, true_map: np.ndarray, image: str = "(unnamed image)") -> None:
        """Adds one image: integer class maps (H,W). Raises ValueError for unequal maps, unknown classes."""
        pred, true, length = _joint_runs(pred_map, true_map, image)
        pred, true, length = (x[true != self.ignore] for x in (pred, true, length))
        num_classes = len(self.confusion)
        _check_classes(pred, num_classes, f"{image}: the prediction map")
        _check_classes(true, num_classes, f"{image}: the true map (where {self.ignore} is ignored)")
        self.confusion += _sum_by(true * num_classes + pred, length, self.confusion.shape)  # (K, K)
        self.images += 1

    def per_class(self) -> list[dict]:
        """A row per class: class, IoU (nan where neither map ever holds the class)."""
        hit = np.diag(self.confusion)
        union = self.confusion.sum(0) + self.confusion.sum(1) - hit
        iou = np.where(union > 0, hit / np.maximum(union, 1), np.nan)
        return [{"class": k, "IoU": value} for k, value in enumerate(iou.tolist())]

    def compute(self) -> dict[str, float]:
        """mIoU leaves out classes absent from both maps (nan without any); mIoU_upstream counts them as 0."""
        iou = np.array([row["IoU"] for row in self.per_class()])
        found, pixels = iou[~np.isnan(iou)], self.confusion.sum()
        return {"mIoU": float(found.mean()) if len(found) else math.nan,
                "mIoU_upstream": float(found.sum() / len(iou)),
                "pixel_accuracy": float(np.trace(self.confusion) / pixels) if pixels else math.nan,
                "classes": len(found), "images": self.images}

    def state(self) -> dict[str, np.ndarray]:
        """All that merge() needs, as integer arrays."""
        return {"confusion": self.confusion.copy(), "images": np.array(self.images)}

    def merge(self, states: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Becomes the sum of the given states; give those of all ranks, this one's included."""
        self.confusion = np.sum([state["confusion"] for state in states], axis=0)  # (K, K)
        self.images = sum(int(state["images"]) for state in states)


class _Parts:
    """PQ and AP keep what each image gave, a list of dicts of arrays, and add up only at the end."""

    def state(self) -> dict[str, np.ndarray]:
        """All that merge() needs: the arrays of all images, concatenated."""
        return {key: np.concatenate([part[key] for part in self.parts]) for key in self.parts[0]}

    def merge(self, states: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Becomes the sum of the given states; give those of all ranks, this one's included."""
        self.parts = list(states)


def _segment_rows(segments, value, num_classes, what):
    """Row (R,) of each id (R,) of a map in its list of segments, from 1, void is row 0; and the classes (S,).

    Raises ValueError for an id that is doubled or missing on either side and for unknown classes."""
    label = np.array([segment["category_id"] for segment in segments], np.int64)
    _check_classes(label, num_classes, f"{what} list")
    ids = np.array([0] + [segment["id"] for segment in segments], np.int64)
    order = np.argsort(ids)
    ordered = ids[order]
    if (ordered[1:] == ordered[:-1]).any():
        raise ValueError(f"{what} list has an id twice or 0, the void: {ids[1:].tolist()}; renumber them")
    place = np.minimum(np.searchsorted(ordered, value), len(ids) - 1)
    unknown = value[ordered[place] != value]
    if len(unknown):
        raise ValueError(f"{what} map has id {unknown[0]}, which no segment has; list every id of the map")
    absent = ids[np.bincount(order[place], minlength=len(ids)) == 0]
    if absent.any():
        raise ValueError(f"{what} segment {absent[absent != 0][0]} has no pixel in the map; leave it out")
    return order[place], label


class PanopticQuality(_Parts):
    """Panoptic quality with panopticapi's definition; `thing` (K,) tells things from stuff."""

    def __init__(self, thing: Sequence[bool]):
        self.thing = np.asarray(thing, bool)
        self.parts = [dict.fromkeys(("iou", "matched", "missed", "wrong", "images"), np.zeros(0, np.int64))]

    def update(self, pred_map: np.ndarray, pred_segments: Sequence[Mapping], true_map: np.ndarray,
               true_segments: Sequence[Mapping], image: str = "(unnamed image)") -> None:
        """Adds one image: integer id maps (H,W), 0 = void, and segments as in COCO panoptic JSON: id,
        category_id (class index 0..K-1), for the truth iscrowd (or 0) and area (or its pixels in the map).

        Raises ValueError for ids missing on either side or doubled, unknown categories, an area below 1."""
        pred, true, length = _joint_runs(pred_map, true_map, image)
        shape = len(true_segments) + 1, len(pred_segments) + 1
        true_row, true_class = _segment_rows(true_segments, true, len(self.thing), f"{image}: the true")
        pred_row, pred_class = _segment_rows(pred_segments, pred, len(self.thing), f"{image}: the prediction")
        shared = _sum_by(true_row * shape[1] + pred_row, length, shape)  # (1+T, 1+S) pixels, 0: void
        crowd = np.array([segment.get("iscrowd", 0) for segment in true_segments], bool)
        area = np.array([s.get("area", shared[t].sum()) for t, s in enumerate(true_segments, 1)], np.float64)
        if (area < 1).any():
            raise ValueError(f"{image}: a true segment has area {area.min():g}; give its number of pixels")

        size, void, inter = shared[:, 1:].sum(0), shared[0, 1:], shared[1:, 1:]  # (S,), (S,), (T, S)
        iou = inter / (size + area[:, None] - inter - void)  # (T, S); prediction on void is forgiven
        match = (iou > 0.5) & (true_class[:, None] == pred_class) & ~crowd[:, None]  # (T, S)
        # an unmatched prediction is forgiven when more than half of it is on void and the crowd of its class;
        # of several crowds of a class the official code knows the last one only
        crowd_row = np.zeros(len(self.thing), np.int64)
        crowd_row[true_class[crowd]] = np.flatnonzero(crowd) + 1
        row = crowd_row[pred_class]
        forgiven = void + np.where(row > 0, shared[row, np.arange(1, shape[1])], 0)
        self.parts.append({"iou": iou[match], "matched": true_class[np.nonzero(match)[0]],
                           "images": np.array([1]), "missed": true_class[~match.any(1) & ~crowd],
                           "wrong": pred_class[~match.any(0) & (forgiven / size <= 0.5)]})

    def per_class(self) -> list[dict]:
        """A row per class: class, thing, PQ, SQ, RQ (nan if neither true nor predicted), TP, FP, FN."""
        state, rows = self.state(), []
        for k, th in enumerate(self.thing.tolist()):
            iou = state["iou"][state["matched"] == k]
            tp, fp, fn = len(iou), *(int(np.count_nonzero(state[key] == k)) for key in ("wrong", "missed"))
            total, weight = math.fsum(iou), tp + fp / 2 + fn / 2  # fsum rounds once: order does not matter
            pq, sq, rq = (total / weight, total / max(tp, 1), tp / weight) if weight else (math.nan,) * 3
            rows.append({"class": k, "thing": th, "PQ": pq, "SQ": sq, "RQ": rq, "TP": tp, "FP": fp, "FN": fn})
        return rows

    def compute(self, groups: Mapping[str, Sequence[int]] | None = None) -> dict[str, float]:
        """PQ, SQ, RQ averaged over the classes true or predicted anywhere, and their number `classes`; also
        with _th and _st for things and stuff and _NAME for groups {NAME: class indices}; nan for no class."""
        rows = self.per_class()
        sets = {"": range(len(rows)), "_th": np.flatnonzero(self.thing), "_st": np.flatnonzero(~self.thing)}
        sets |= {f"_{name}": members for name, members in (groups or {}).items()}
        result = {}
        for name, members in sets.items():
            _check_classes(np.array(members, np.int64), len(rows), f"group {name}")
            kept = [rows[k] for k in members if not math.isnan(rows[k]["PQ"])]
            for key in ("PQ", "SQ", "RQ"):
                result[key + name] = math.fsum(row[key] for row in kept) / len(kept) if kept else math.nan
            result["classes" + name] = len(kept)
        return result | {"images": len(self.state()["images"])}


# ----------------------------------------------------------------------------------------------------------
# Mask AP. An image is reduced at once to its detections, its objects and the few pairs of one class with IoU
# >= 0.5; the greedy match then runs over all images together, one step per rank of detections.

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # float64: in float32, pairs on a threshold change sides
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
AREA_RANGES = np.array([[0, 1e5**2], [0, 32**2], [32**2, 96**2], [96**2, 1e5**2]])  # closed on both sides
MAX_DETECTIONS = 100  # per class and image; AR1 and AR10 look at the first 1 and 10
AP_NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
            "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")


def _count_bits(masks, what):
    """Areas, int64 (N,), of masks (H,W) or RLE dicts, and a function (i, j) -> pixels that pairs share (P,).
    Packed to bits, masks are counted exactly at any size, and faster here than by float32 products."""
    masks = [rle_decode(mask, what) if isinstance(mask, dict) else np.asarray(mask) for mask in masks]
    size = max((mask.size for mask in masks), default=0)
    packed = np.zeros((len(masks), -(-size // 64) * 8), np.uint8)  # (N, bytes), in whole 64-bit words
    for row, mask in zip(packed, masks, strict=True):
        row[:-(-size // 8)] = np.packbits(mask.reshape(-1))
    bits = packed.view(np.uint64)  # (N, words)

    def shared(i, j):
        return [np.bitwise_count(bits[a] & bits[b]).sum(dtype=np.int64) for a, b in zip(i, j, strict=True)]
    return np.bitwise_count(bits).sum(1, dtype=np.int64), shared


def _count_runs(rles, what):
    """As _count_bits for RLE dicts, from their runs alone."""
    counts, first = _read_counts(rles, what)
    line = np.cumsum(counts)  # all masks of one size on one line: where its runs end, of 0s and 1s in turn
    pixels = line[-1] // len(rles)
    np.negative(counts[1::2], out=counts[1::2])
    zeros_less_ones = np.add.reduceat(counts, first[:-1]) * (1 - 2 * (first[:-1] & 1))
    runs = [line[a:b - (b - a) % 2] for a, b in itertools.pairwise(first.tolist())]  # begin, end, begin, ...

    def shared(i, j):
        both = np.stack((i, j), 1).reshape(-1)  # (2 * P,)
        parts = [runs[mask] for mask in both.tolist()]
        size = np.array(list(map(len, parts)))
        # the pairs one after the other on a new line, the two masks of a pair in the same place
        edge = np.concatenate(parts) + np.repeat((np.arange(len(both)) // 2 - both) * pixels, size)
        begin, end = (np.sort(edge[side::2], kind="stable") for side in (0, 1))  # merges: parts are sorted
        width = np.maximum(end[:-1] - begin[1:], 0)  # after k + 1 begins, before the kth end: both masks are
        return np.add.reduceat(np.append(width, 0), (np.cumsum(size) - size)[::2] // 2)
    return (pixels - zeros_less_ones) // 2, shared


def _match(table, ignored):
    """COCO's greedy match for all thresholds and area ranges at once: found and void, bool (D,10,4).

    Each detection, best score first, takes the free object of highest IoU (the last of equals), any real one
    before an ignored one (G,4); crowds stay free. void marks the matches with ignored objects."""
    rank, crowd = table["det_rank"], table["true_crowd"]
    found = np.zeros((len(rank), len(IOU_THRESHOLDS), len(AREA_RANGES)), bool)  # (D, 10, 4)
    void, taken = found.copy(), np.zeros((len(crowd), *found.shape[1:]), bool)  # (D, 10, 4), (G, 10, 4)
    det, true, iou = table["pair_det"], table["pair_true"], table["pair_iou"]
    order = np.lexsort((true, iou, det, rank[det]))
    det, true, iou = det[order], true[order], iou[order]
    bounds = np.flatnonzero(np.diff(rank[det], prepend=-1, append=MAX_DETECTIONS))
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):  # detections of one rank never compete
        d, g, n = det[start:stop], true[start:stop], stop - start
        able = (iou[start:stop, None] >= IOU_THRESHOLDS)[:, :, None] & (~taken[g] | crowd[g, None, None])
        place = np.arange(1, n + 1)[:, None] + n * ~ignored[g]  # (n, 4); the highest wins
        first = np.flatnonzero(np.diff(d, prepend=-1))
        best = np.maximum.reduceat(np.where(able, place[:, None], 0), first, axis=0)  # (detections, 10, 4)
        who, t, a = np.nonzero(best)
        winner = g[(best[who, t, a] - 1) % n]
        taken[winner, t, a] = True
        found[d[first[who]], t, a] = True
        void[d[first[who]], t, a] = ignored[winner, a]
    return found, void


def _precision(hit, wrong, objects):
    """Precision (A,10,101) at each recall threshold, of hits and errors (A,10,n) by falling score."""
    tp, fp = np.cumsum(hit, axis=2), np.cumsum(wrong, axis=2)  # (A, 10, n)
    best = np.maximum.accumulate((tp / (tp + fp + np.spacing(1)))[..., ::-1], axis=2)[..., ::-1]
    best = np.append(best, np.zeros((len(tp), 10, 1)), axis=2)  # (A, 10, n+1); 0: recall never reached
    needed = np.stack([np.searchsorted(np.arange(n + 1) / n, RECALL_THRESHOLDS) for n in objects])  # (A, 101)
    # one search for all rows: row t counts from t * (objects + 1), so that the rows make one rising sequence
    row, span = np.arange(tp.shape[0] * 10).reshape(-1, 10, 1), objects.max() + 1
    place = np.searchsorted((tp + row * span).reshape(-1), needed[:, None] + row * span)  # (A, 10, 101)
    return np.take_along_axis(best, place - row * tp.shape[2], axis=2)


class MaskAP(_Parts):
    """COCO mask average precision and recall: the 12 numbers of COCOeval."""

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        ints = "det_label det_rank det_area det_score true_label true_area pair_det pair_true pair_iou"
        self.parts = [dict.fromkeys(ints.split(), np.zeros(0, np.int64)) | {
            "images": np.zeros(0, str), "num": np.zeros((0, 3), np.int64), "true_crowd": np.zeros(0, bool)}]

    def update(self, detections: Mapping, truth: Mapping, image: str) -> None:
        """Adds one image. detections: masks, scores (D,), labels (D,); truth: masks, labels (G,), and if not
        False and pixels, crowd (G,), area (G,). masks: bool (N,H,W) or a list of RLE dicts or masks (H,W).
        Equal scores are ordered by `image`: name images as COCO does, by ids with leading zeros.

        Raises ValueError for masks that do not fit their labels or each other, and for unknown classes."""
        label, true_label = np.asarray(detections["labels"]), np.asarray(truth["labels"])
        crowd = np.asarray(truth.get("crowd", np.zeros(len(true_label))), bool)
        split, masks = len(detections["masks"]), [*detections["masks"], *truth["masks"]]
        counts, wanted = (split, len(masks) - split), (len(label), len(true_label))
        if counts != wanted:
            raise ValueError(f"{image}: {counts} detected and true masks have {wanted} labels; give one each")
        coded = [isinstance(mask, dict) for mask in masks]
        sizes = {tuple(m["size"] if code else np.shape(m)) for m, code in zip(masks, coded, strict=True)}
        if len(sizes) > 1:
            raise ValueError(f"{image}: masks have the sizes {sorted(sizes)}; give all in the image's size")
        pixels, shared = (_count_runs if masks and all(coded) else _count_bits)(masks, image)
        area, true_area = np.split(pixels, [split])
        # count only the pairs of one class whose areas do not exclude an IoU of 0.5
        low, high = np.minimum(area[:, None], true_area), np.maximum(area[:, None], true_area)  # (D, G)
        d, g = np.nonzero((label[:, None] == true_label) & (low > 0) & (crowd | (2 * low >= high)))
        overlap = np.zeros(low.shape)  # (D, G)
        overlap[d, g] = shared(d, split + g) if len(d) else 0
        self.update_overlaps({**detections, "pixels": area}, {**truth, "pixels": true_area}, overlap, image)

    def update_overlaps(self, detections: Mapping, truth: Mapping, overlap: np.ndarray, image: str) -> None:
        """As update with masks counted elsewhere, on a GPU say: `pixels` (D,) and (G,) instead of masks, and
        the shared pixels, overlap (D,G), at least of the pairs of one class."""
        label, area = np.asarray(detections["labels"], np.int64), np.asarray(detections["pixels"])
        true_label, pixels = np.asarray(truth["labels"], np.int64), np.asarray(truth["pixels"], np.float64)
        score = np.asarray(detections["scores"], np.float64)
        crowd = np.asarray(truth.get("crowd", np.zeros(len(true_label))), bool)
        true_area = np.asarray(truth.get("area", pixels), np.float64)
        assert len(score) == len(area) == len(label) and len(crowd) == len(true_area) == len(pixels), image
        _check_classes(label, self.num_classes, f"{image}: a detection")
        _check_classes(true_label, self.num_classes, f"{image}: an object")
        if not np.isfinite(score).all():
            raise ValueError(f"{image}: a score is not finite; look at the model's class logits")
        order = np.lexsort((-score, label))  # the rank of a detection counts within its class
        rank = np.arange(len(order)) - np.searchsorted(label[order], label[order])
        order, rank = order[rank < MAX_DETECTIONS], rank[rank < MAX_DETECTIONS]
        label, score, area, overlap = label[order], score[order], area[order], np.asarray(overlap)[order]
        union = np.where(crowd, area[:, None], area[:, None] + pixels - overlap)  # (D, G)
        iou = overlap / np.maximum(union, 1)  # (D, G)
        d, g = np.nonzero((label[:, None] == true_label) & (iou >= IOU_THRESHOLDS[0]))
        self.parts.append({
            "images": np.array([image]), "num": np.array([[len(d), len(label), len(true_label)]]),
            "det_label": label, "det_rank": rank, "det_area": area, "det_score": score,
            "true_label": true_label, "true_crowd": crowd, "true_area": true_area,
            "pair_det": d, "pair_true": g, "pair_iou": iou[d, g]})

    def _table(self) -> dict[str, np.ndarray]:
        """The state in order of image names, with pairs that point into the whole table, not their image."""
        state = self.state()
        order = np.argsort(state["images"], kind="stable")
        names, times = np.unique(state["images"], return_counts=True)
        if (times > 1).any():
            raise ValueError(f"{names[times > 1][0]}: counted more than once; update with each image once")
        table = {}
        for kind, count in zip(("pair", "det", "true"), state["num"].T, strict=True):
            row = _ranges((np.cumsum(count) - count)[order], count[order])
            table |= {key: value[row] for key, value in state.items() if key.startswith(kind + "_")}
        for kind, count in zip(("det", "true"), state["num"][order, 1:].T, strict=True):
            table[f"pair_{kind}"] += np.repeat(np.cumsum(count) - count, state["num"][order, 0])
        return table

    def _curves(self) -> tuple[np.ndarray, np.ndarray]:
        """Precision (4 sizes,K,10,101), recall (6,K,10: AR1, AR10, 4 sizes); nan without object."""
        table = self._table()
        low, high = AREA_RANGES.T  # (4,)
        area, true_area = table["det_area"][:, None], table["true_area"][:, None]
        ignored = (true_area < low) | (true_area > high) | table["true_crowd"][:, None]  # (G, 4)
        found, void = _match(table, ignored)
        hit, wrong = found & ~void, ~found & ((area >= low) & (area <= high))[:, None]  # (D, 10, 4)
        precision = np.full((4, self.num_classes, 10, 101), np.nan)
        recall = np.full((6, self.num_classes, 10), np.nan)
        for k in np.unique(table["true_label"][~ignored[:, 0]]):  # the first range holds the others
            rows = np.flatnonzero(table["det_label"] == k)
            rows = rows[np.argsort(-table["det_score"][rows], kind="stable")]
            objects = np.count_nonzero(~ignored[table["true_label"] == k], axis=0)  # (4,)
            some = np.flatnonzero(objects)
            hits, errors = (np.ascontiguousarray(x[rows].T[some]) for x in (hit, wrong))  # (A, 10, n)
            precision[some, k] = _precision(hits, errors, objects[some])
            recall[some + 2, k] = hits.sum(2) / objects[some, None]
            for n, most in enumerate((1, 10)):
                recall[n, k] = hits[0][:, table["det_rank"][rows] < most].sum(1) / objects[0]
        return precision, recall

    def per_class(self) -> list[dict]:
        """Rows of class, AP (nan without an object)."""
        return [{"class": k, "AP": float(curve.mean())} for k, curve in enumerate(self._curves()[0][0])]

    def compute(self) -> dict[str, float]:
        """The numbers AP_NAMES as COCOeval gives them: -1 where no class has an object of the size."""
        (whole, *sized), recall = self._curves()
        values = zip(AP_NAMES, (whole, whole[:, 0], whole[:, 5], *sized, *recall), strict=True)
        return {name: -1.0 if np.isnan(x).all() else float(np.nanmean(x)) for name, x in values}
