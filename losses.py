"""Set losses of mask classification, and the distillation losses of the open-vocabulary stages.

In:  predictions of every supervised block (mask logits, class logits) and the target of each image: an object
     with `ids` uint8 (L,H,W) id maps, 0 = nothing, and `layer`, `value`, `labels` int64 (T,). Segment t is
     `ids[layer[t]] == value[t]`, of class `labels[t]`. No 0/1 mask is ever made: points are read off the ids.
Out: a dict of scalar losses, equal to Mask2Former's on the same random points.

    # of 0/1 masks (T,H,W), which may overlap: each its own layer (disjoint ones can share a layer, up to 255)
    target = SimpleNamespace(ids=masks.to(torch.uint8), layer=torch.arange(len(masks)),
                             value=torch.ones(len(masks), dtype=torch.int64), labels=labels)
    # predictions: a list of records with `masks` (B,Q,h,w), `classes` (B,Q,K+1), no-object last; B targets
    criterion = SetLoss(num_classes=133)
    losses = criterion(model(images), targets)          # {"loss", "mask", "dice", "class"}
    losses["loss"].backward()
"""
# SPDX-License-Identifier: MIT
import math
import mmap

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn


def _chunk(device: torch.device) -> int:
    """Points worked on at once: 0.6 GB at the peak, however many segments there are; most need one round.

    Fewer on CPU, for its caches, and as malloc maps buffers above 32 MB afresh each time: 0.6 of the speed.
    """
    return 1 << (19 if device.type == "cpu" else 24)


def _wide(x: Tensor) -> Tensor:
    """Lift half precision to float32; float64 stays, so that tests can be tight."""
    return x if x.dtype == torch.float64 else x.float()


def _plain(x: Tensor) -> torch.autocast:
    """Context in which autocast does not turn our fp32 matrix products into bf16 ones."""
    return torch.autocast(x.device.type, enabled=False)


# ------------------------------------------------------------------------------------------------------------
# Points


def _locate(points: Tensor, height: int, width: int, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cell of each point in a map with a border of one pixel: flat index of its top-left corner, fractions.

    Rows of the map lie `stride` apart. Points in [0, 1] have corners in 0..height x 0..width: no bounds test.
    """
    # Without align_corners pixel k has its centre at k + 0.5; the border shifts it by 1. In place: 3x on CPU.
    x = (points[..., 0] * width).add_(0.5)  # (..., S)
    y = (points[..., 1] * height).add_(0.5)  # (..., S)
    column, row = x.floor(), y.floor()  # (..., S) each
    return torch.add(column.long(), row.long(), alpha=stride), x.sub_(column), y.sub_(row)


def _sample_by_gather(maps: Tensor, points: Tensor) -> Tensor:
    """`sample_points` whose backward is repeatable on CUDA, for four times the memory."""
    _, height, width = maps.shape
    stride = width + 2
    index, fx, fy = _locate(points, height, width, stride)  # (R, S) each
    flat = F.pad(maps, (1, 1, 1, 1)).flatten(1)  # (R, (h+2)*(w+2))
    a, b, c, d = (flat.gather(1, index + offset) for offset in (0, 1, stride, stride + 1))  # (R, S) each
    return torch.lerp(torch.lerp(a, b, fx), torch.lerp(c, d, fx), fy)  # (R, S)


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Read maps at points: bilinear, zero outside, align_corners False.

    maps float (R,h,w); points (R,S,2), or (S,2) for all maps, as (x, y) in [0, 1]. Returns (R,S) in the maps'
    dtype, with a gradient for the maps, repeatable to the bit under `torch.use_deterministic_algorithms`.
    """
    points = points.to(maps.dtype)
    # On CUDA grid_sample has no deterministic backward, and raises when one is asked for.
    if maps.requires_grad and torch.are_deterministic_algorithms_enabled():
        return _sample_by_gather(maps, points.expand(len(maps), -1, 2))
    grid = (2 * points).sub_(1).expand(len(maps), -1, 2)[:, :, None]  # (R, S, 1, 2)
    # One channel per row of the batch, not one row with R channels: 3.5 times as fast on CPU.
    return F.grid_sample(maps[:, None], grid, align_corners=False)[:, 0, :, 0]  # (R, S)


def sample_segments(ids: Tensor, layer: Tensor, value: Tensor, points: Tensor) -> Tensor:
    """Read the 0/1 masks of segments at points, straight from id maps, exactly as `sample_points` would.

    ids uint8 (L,H,W); layer, value int64 (R,), value >= 1: mask r is `ids[layer[r]] == value[r]`; points
    float (R,S,2), or (S,2) for all segments, as (x, y) in [0, 1]. Returns (R,S) in the points' dtype: the
    weight of those of a point's four neighbours that carry the segment's value.
    """
    _, height, width = ids.shape
    edged = F.pad(ids, (1, 1, 1, 1))  # (L, H+2, W+2); 0 belongs to no segment, so this is the zero padding
    top, bottom = edged[:, :-1], edged[:, 1:]  # (L, H+1, W+2)
    neighbours = top[..., :-1], top[..., 1:], bottom[..., :-1], bottom[..., 1:]
    square = torch.stack(neighbours, -1)  # (L, H+1, W+1, 4)
    square = square.view(torch.int32).flatten()  # (L*(H+1)*(W+1),); one word, so one gather for the four
    index, fx, fy = _locate(points, height, width, width + 1)  # (R, S) or (S,) each
    index = index + layer[:, None] * ((height + 1) * (width + 1))  # (R, S)
    corners = square.index_select(0, index.flatten()).view(torch.uint8).view(*index.shape, 4)  # (R, S, 4)
    inside = corners == value.to(torch.uint8)[:, None, None]  # (R, S, 4)
    a, b, c, d = (hit.to(points.dtype) for hit in inside.unbind(-1))  # (R, S) each
    return torch.lerp(torch.lerp(a, b, fx), torch.lerp(c, d, fx), fy)  # (R, S)


@torch.no_grad()
def uncertain_points(logits: Tensor, num_points: int, oversample: float, importance: float,
                     generator: torch.Generator | None = None) -> Tensor:
    """Draw points for each mask: of `oversample` times too many those nearest to logit 0, and uniform ones.

    logits (R,h,w) -> points float32 (R,num_points,2), the first int(importance * num_points) uncertain.
    """
    keep, many, parts = int(importance * num_points), int(oversample * num_points), []
    for part in logits.split(max(1, _chunk(logits.device) // many)):
        count = len(part)
        points = torch.rand(count, many, 2, generator=generator, device=part.device)  # (R', oversample*S, 2)
        doubt = _wide(sample_points(part, points)).abs()  # (R', oversample*S)
        # Their bits, taken for integers, have the same order; topk needs 2/3 of the time for these on CPU.
        doubt = doubt.view(torch.int64 if doubt.dtype == torch.float64 else torch.int32)
        index = doubt.topk(keep, dim=1, largest=False, sorted=False).indices  # (R', keep)
        hard = points.gather(1, index[..., None].expand(-1, -1, 2))  # (R', keep, 2)
        easy = torch.rand(count, num_points - keep, 2, generator=generator, device=part.device)
        parts.append(torch.cat([hard, easy], 1))  # (R', S, 2)
    return torch.cat(parts)  # (R, S, 2)


# ------------------------------------------------------------------------------------------------------------
# Matching


def _pair_costs(logits: Tensor, truth: Tensor) -> Tensor:
    """Mask (binary cross-entropy) and dice cost of every logit row against every target row.

    logits (R,S), truth (T,S) in [0, 1] -> (2,R,T). BCE(x, t) = softplus(x) - x t: one matrix product each.
    """
    bce = (F.softplus(logits).sum(1)[:, None] - (truth @ logits.T).T) / logits.shape[1]  # (R, T)
    prob = logits.sigmoid()  # (R, S)
    dice = 1 - (2 * (truth @ prob.T).T + 1) / (prob.sum(1)[:, None] + truth.sum(1) + 1)  # (R, T)
    return torch.stack([bce, dice])


class NotFinite(ValueError):
    """The model's logits hold NaN or infinity."""


def _name(names: list[str] | None, i: int) -> str:
    return names[i] if names else f"image {i} of the batch"


def _assign(costs: Tensor, targets: list, shape: tuple[int, int, int], names: list[str] | None) -> Tensor:
    """Cheapest one-to-one assignment for each layer and image.

    costs float32 (sum of L*Q*T_i,) on the CPU: a block (L,Q,T_i) for each image; shape: (L, Q, K). Returns
    int64 (3,L,N) as `match`.
    """
    *rows, num_classes = shape
    sizes = [(*rows, len(target.labels)) for target in targets]
    parts = costs.split([math.prod(size) for size in sizes])
    blocks = [part.view(size) for part, size in zip(parts, sizes, strict=True)]  # B x (L, Q, T_i)
    for i, block in enumerate(blocks):
        if block.isneginf().any():
            found = ", ".join(map(str, sorted(set(targets[i].labels.tolist()))))
            raise ValueError(
                f"{_name(names, i)}: labels {found} of {num_classes} classes: they are 0 to "
                f"{num_classes - 1}; map them to the model's classes, or leave these segments out"
            )
    bad = [i for i, block in enumerate(blocks) if not block.isfinite().all()]
    if bad:
        raise NotFinite(
            f"{', '.join(_name(names, i) for i in bad)}: the matching cost is NaN or infinite, so the "
            "model's logits are; lower the learning rate, and look at these images and at the last gradient "
            "norm"
        )
    pairs = []
    for i, block in enumerate(blocks):
        found = [linear_sum_assignment(cost) for cost in block]
        query, target = (torch.stack([torch.as_tensor(x) for x in side]) for side in zip(*found, strict=True))
        pairs.append(torch.stack([torch.full_like(query, i), query, target]))  # (3, L, min(T_i, Q))
    return torch.cat(pairs, 2)  # (3, L, N)


@torch.no_grad()
def match(predictions: list, targets: list, points: list[Tensor], mask_weight: float = 5.0,
          dice_weight: float = 5.0, class_weight: float = 2.0, names: list[str] | None = None) -> Tensor:
    """Match queries and segments one to one at the smallest total cost, for all layers and images at once.

    predictions: L records with masks (B,Q,h,w) and classes (B,Q,K+1) logits; points: for each image float
    (S,2), shared by its queries, segments and layers. Returns int64 (3,L,N) on the logits' device: image,
    query, segment of each pair; N = sum of min(T_i, Q), images in order, queries ascending. Costs are
    float32, and the device is waited for once. A cost that is NaN or infinite raises NotFinite with the
    images' names, a label outside 0..K-1 ValueError.
    """
    device, costs = points[0].device, []
    queries, num_classes = predictions[0].masks.shape[1], predictions[0].classes.shape[-1] - 1
    step = max(1, _chunk(device) // (queries * len(points[0])))  # layers at a time
    with _plain(points[0]):
        for i, (target, where) in enumerate(zip(targets, points, strict=True)):
            truth = sample_segments(target.ids, target.layer, target.value, where.float())  # (T, S)
            parts = []
            for k in range(0, len(predictions), step):
                maps = [p.masks[i] for p in predictions[k : k + step]]  # step x (Q, h, w)
                maps = maps[0] if step == 1 else torch.cat(maps)  # (step*Q, h, w)
                parts.append(_pair_costs(sample_points(maps.float(), where), truth))
            bce, dice = torch.cat(parts, 1)  # (L*Q, T) each
            prob = torch.cat([p.classes[i] for p in predictions]).float().softmax(-1)  # (L*Q, K+1)
            labels = target.labels.clamp(0, num_classes - 1)  # (T,)
            cost = mask_weight * bce + dice_weight * dice - class_weight * prob[:, labels]  # (L*Q, T)
            # A label of no class must not index anything on a GPU, and asking about it would be a wait: it
            # gets a cost that no logits can have (theirs are finite, NaN or +inf), which the host looks for.
            costs.append(cost.masked_fill(labels != target.labels, -math.inf).flatten())
    shape = len(predictions), queries, num_classes
    pairs = _assign(torch.cat(costs).cpu(), targets, shape, names)  # (3, L, N); the one device-to-host copy
    return pairs.to(device, non_blocking=True)


# ------------------------------------------------------------------------------------------------------------
# The loss of a set of masks


def set_norm(targets: list, num_queries: int, no_object: float = 0.1) -> Tensor:
    """Totals that `SetLoss` divides by; known beforehand, as the matcher always makes min(T_i, Q) pairs.

    Returns float64 (2,) on the CPU: number of pairs, and sum of the class weights over all queries. Sum it
    over ranks and accumulation steps and give it to `SetLoss` as `norm`.
    """
    pairs = sum(min(len(target.labels), num_queries) for target in targets)
    unmatched = len(targets) * num_queries - pairs
    return torch.tensor([pairs, pairs + no_object * unmatched], dtype=torch.float64)


def _check(predictions: list, targets: list, num_classes: int, names: list[str] | None):
    """Raise ValueError where shapes or dtypes do not fit: what the host knows without a wait."""
    shape = predictions[0].masks.shape
    for k, prediction in enumerate(predictions):
        masks, classes = tuple(prediction.masks.shape), tuple(prediction.classes.shape)
        if len(shape) != 4 or masks != shape or classes != (len(targets), shape[1], num_classes + 1):
            raise ValueError(
                f"prediction {k}: masks {masks}, class logits {classes} for {len(targets)} targets; wanted "
                f"(B, Q, h, w), the same everywhere, and (B, Q, {num_classes} classes + 1)"
            )
    h, w = shape[2:]
    for i, target in enumerate(targets):
        fields = {name: getattr(target, name) for name in ("ids", "layer", "value", "labels")}
        ids, *rows = fields.values()
        flat = all(row.dtype == torch.int64 and row.dim() == 1 and len(row) == len(rows[0]) for row in rows)
        if ids.dtype != torch.uint8 or ids.dim() != 3 or not flat:
            found = ", ".join(f"{name} {value.dtype} {tuple(value.shape)}" for name, value in fields.items())
            raise ValueError(
                f"{_name(names, i)}: {found}; wanted ids uint8 (L, H, W), the others int64 (T,) of one length"
            )
        height, width = ids.shape[1:]
        if abs(height * w - width * h) >= max(height, width):  # more than the rounding of a pixel
            raise ValueError(
                f"{_name(names, i)}: id maps of {height}x{width} for mask logits of {h}x{w}, another shape; "
                "cut, pad and resize them as the image"
            )


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros as `like` is. From 32 MB on a CPU they are private memory, of which the system gives a page when
    it is written to; reading finds one page of zeros everywhere."""
    size = math.prod(shape) * like.element_size()
    if like.device.type == "cpu" and size > 1 << 25:  # malloc maps these afresh too, but new_zeros writes
        return torch.frombuffer(mmap.mmap(-1, size, access=mmap.ACCESS_COPY), dtype=like.dtype).view(shape)
    return like.new_zeros(shape)


class _Matched(torch.autograd.Function):
    """Masks of L layers, (B,Q,h,w) each, at image, query int64 (L,N) -> (L,N,h,w).

    No pair may be there twice: backward writes where torch's own sorts and adds up. Most masks are in none.
    """

    @staticmethod
    def forward(image, query, *masks):
        return torch.stack([mask[image[k], query[k]] for k, mask in enumerate(masks)])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.shape = inputs[2].shape

    @staticmethod
    def backward(ctx, grad):
        image, query = ctx.saved_tensors
        grads = [_zeros(ctx.shape, grad) for _ in grad]  # L x (B, Q, h, w)
        for k, rows in enumerate(grad):
            grads[k][image[k], query[k]] = rows
        return None, None, *grads


class SetLoss(nn.Module):
    """Mask2Former's loss over all supervised predictions of EoMT, handled together.

    Each layer is matched by itself; then binary cross-entropy and dice on `num_points` points of every
    matched mask, and cross-entropy on the class of every query, where unmatched queries are no-object (index
    `num_classes`).

    Open vocabulary: classes that must not be trained have no column. Give `num_classes` = number of seen
    classes, class logits (B,Q,seen+1) and labels in 0..seen-1; unseen rows then take no part, not even as
    negatives.
    """

    def __init__(
        self,
        num_classes: int,
        num_points: int = 12544,  # 112 x 112, as all other numbers here: Mask2Former
        oversample: float = 3.0,
        importance: float = 0.75,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        class_weight: float = 2.0,
        no_object: float = 0.1,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.num_points, self.oversample, self.importance = num_points, oversample, importance
        self.mask_weight, self.dice_weight, self.class_weight = mask_weight, dice_weight, class_weight
        self.no_object = no_object

    def forward(
        self,
        predictions: list,
        targets: list,
        norm: Tensor | None = None,
        seeds: list[int] | None = None,
        names: list[str] | None = None,
    ) -> dict[str, Tensor]:
        """Loss of L predictions (masks (B,Q,h,w), classes (B,Q,K+1) logits, any float dtype) for B targets.

        norm: (2,) of `set_norm` for the WHOLE step, all ranks and accumulation parts; the results are then
        parts of a sum, so add up gradients (a DDP mean needs a factor of the world size). None: this batch's
        own totals. seeds: one integer per image, from which all its random points come, whatever else is in
        the batch. None: the global generator. names: of the images, for errors. Returns 0-dim tensors,
        weighted and summed over layers: "loss" with gradient; "mask", "dice", "class" without.
        """
        device = predictions[0].masks.device
        queries = predictions[0].masks.shape[1]
        _check(predictions, targets, self.num_classes, names)
        if seeds is None:
            generators = [None] * len(targets)
        else:
            generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        sizes = [min(len(target.labels), queries) for target in targets]  # pairs of each image in a layer
        if norm is None:
            norm = set_norm(targets, queries, self.no_object)
        points = [torch.rand(self.num_points, 2, generator=g, device=device) for g in generators]  # (S, 2)
        weights = self.mask_weight, self.dice_weight, self.class_weight
        pairs = match(predictions, targets, points, *weights, names)  # (3, L, N)
        with _plain(points[0]):
            bce, dice = self._masks(predictions, targets, pairs, sizes, generators)
            label = self._classes(predictions, targets, pairs, sizes)
        num_pairs, class_total = norm.to(device=device, dtype=label.dtype, non_blocking=True)
        terms = {
            "mask": self.mask_weight * bce / num_pairs.clamp(min=1),
            "dice": self.dice_weight * dice / num_pairs.clamp(min=1),
            "class": self.class_weight * label / class_total,
        }
        return {"loss": sum(terms.values()), **{name: term.detach() for name, term in terms.items()}}

    def _masks(self, predictions: list, targets: list, pairs: Tensor, sizes: list[int],
               generators: list) -> tuple[Tensor, Tensor]:
        """Sums of binary cross-entropy (mean over points) and dice over all pairs of all layers.

        sizes: number of pairs of each image in a layer.
        """
        image, query, segment = pairs  # (L, N) each
        # (L, N, h, w); only matched masks are copied and lifted to fp32
        logits = _wide(_Matched.apply(image, query, *(p.masks for p in predictions)))
        parts = logits.detach().split(sizes, 1), segment.split(sizes, 1)
        where, truth = [], []
        for target, g, part, index in zip(targets, generators, *parts, strict=True):
            rows, index = part.flatten(0, 1), index.flatten()  # (L*n, h, w), (L*n,)
            points = uncertain_points(rows, self.num_points, self.oversample, self.importance, g)
            hit = sample_segments(target.ids, target.layer[index], target.value[index], points)  # (L*n, S)
            where.append(points.unflatten(0, part.shape[:2]))  # (L, n, S, 2)
            truth.append(hit.unflatten(0, part.shape[:2]))
        where = torch.cat(where, 1).flatten(0, 1)  # (L*N, S, 2)
        truth = torch.cat(truth, 1).flatten(0, 1).to(logits.dtype)  # (L*N, S)
        x = sample_points(logits.flatten(0, 1), where)  # (L*N, S)
        bce = F.binary_cross_entropy_with_logits(x, truth, reduction="sum") / self.num_points
        prob = x.sigmoid()  # (L*N, S)
        dice = 1 - (2 * (prob * truth).sum(1) + 1) / (prob.sum(1) + truth.sum(1) + 1)  # (L*N,)
        return bce, dice.sum()

    def _classes(self, predictions: list, targets: list, pairs: Tensor, sizes: list[int]) -> Tensor:
        """Sum over all queries of all layers of the weighted cross-entropy."""
        logits = _wide(torch.stack([p.classes for p in predictions]))  # (L, B, Q, K+1)
        truth = torch.full(logits.shape[:3], self.num_classes, device=logits.device)  # (L, B, Q)
        image, query, segment = pairs  # (L, N) each
        parts = zip(targets, segment.split(sizes, 1), strict=True)
        labels = torch.cat([target.labels[index] for target, index in parts], 1)  # (L, N)
        layer = torch.arange(len(logits), device=logits.device)[:, None]  # (L, 1)
        truth[layer, image, query] = labels
        loss = F.cross_entropy(logits.flatten(0, 2), truth.flatten(), reduction="none")  # (L*B*Q,)
        return (loss * torch.where(truth.flatten() == self.num_classes, self.no_object, 1.0)).sum()


# ------------------------------------------------------------------------------------------------------------
# Distillation and image-text losses


def feature_distill(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over patches of 1 - cosine of student and teacher tokens (B,N,C); no gradient for the teacher."""
    return 1 - F.cosine_similarity(_wide(student), _wide(teacher.detach()), dim=-1).mean()


def sigmoid_contrastive(image_rows: Tensor, text_rows: Tensor, positive: Tensor, scale: Tensor | float,
                        bias: Tensor | float) -> Tensor:
    """SigLIP's loss: a yes-or-no question for every image and text, summed over texts, mean over images.

    image_rows (R,C) and text_rows (T,C), made unit here; positive bool (R,T): every pair that is true, so
    several per row are fine; logits are scale * cosine + bias (scale = exp of the stored logit_scale). No
    rows: 0.
    """
    with _plain(image_rows):
        cosine = F.normalize(_wide(image_rows), dim=-1) @ F.normalize(_wide(text_rows), dim=-1).T  # (R, T)
        logits = scale * cosine + bias  # (R, T)
        return F.softplus(torch.where(positive, -logits, logits)).sum() / max(1, len(logits))


def itc_distill(student: Tensor, teacher: Tensor, text: Tensor, labels: Tensor, text_labels: Tensor,
                scale: Tensor | float, bias: Tensor | float, temperature: float = 0.07) -> Tensor:
    """Keep regions where the teacher has them among the texts, and near every text of their own class.

    student, teacher (R,C): embeddings of the same ground-truth regions, made unit here, no gradient for the
    teacher; text (T,C): rows of SEEN classes only, as every other row is a negative; labels int64 (R,),
    text_labels int64 (T,): classes. Returns KL(teacher || student) of the softmax over texts at
    `temperature`, mean over regions, plus `sigmoid_contrastive` with all texts of a region's class positive.
    No regions: 0.
    """
    with _plain(student):
        rows = F.normalize(_wide(text), dim=-1)  # (T, C)
        both = F.normalize(_wide(torch.stack([student, teacher.detach()])), dim=-1)  # (2, R, C)
        ours, theirs = (both @ rows.T / temperature).log_softmax(-1)  # (R, T) each
        divergence = F.kl_div(ours, theirs, reduction="sum", log_target=True) / max(1, len(student))
    positive = labels[:, None] == text_labels  # (R, T)
    return divergence + sigmoid_contrastive(student, text, positive, scale, bias)
