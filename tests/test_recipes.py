"""All 23 published recipes come out of three axes: task, encoder, size (and twice the epochs)."""
# SPDX-License-Identifier: MIT
import pytest

import data
import eomt
import train

# What each recipe of the model zoo trains with. V2 / V3: DINOv2 / DINOv3 rows of optimiser and warm-up.
V2 = dict(lr=1e-4, llrd=0.8, llrd_query_blocks=True, warmup=(500, 1000), first_window=(), rope_rescale=1.0)
V3 = dict(lr=2e-4, llrd=0.8, llrd_query_blocks=False, warmup=(2000, 3000), first_window=(), rope_rescale=2.0)
EARLY = dict(first_window=(0, 3000))
COCO = dict(num_queries=200, scale=(0.1, 2.0), color_jitter=False)
ADE = dict(num_queries=200, scale=(0.1, 2.0), color_jitter=True, epochs=31)
SEMANTIC = dict(num_queries=100, scale=(0.5, 2.0), color_jitter=True)
RECIPES = [
    # task, encoder, size, epochs flag, blocks, fields
    ("coco_panoptic", "dinov2_small", 640, 0, 3, V2 | COCO | dict(epochs=12)),
    ("coco_panoptic", "dinov2_small", 640, 24, 3, V2 | COCO | dict(epochs=24)),
    ("coco_panoptic", "dinov2_base", 640, 0, 3, V2 | COCO | dict(epochs=12)),
    ("coco_panoptic", "dinov2_base", 640, 24, 3, V2 | COCO | dict(epochs=24)),
    ("coco_panoptic", "dinov2_large", 640, 0, 4, V2 | COCO | dict(epochs=12)),
    ("coco_panoptic", "dinov2_large", 1280, 0, 4, V2 | COCO | dict(epochs=12)),
    ("coco_panoptic", "dinov2_giant", 640, 0, 5, V2 | COCO | dict(epochs=12)),
    ("coco_panoptic", "dinov2_giant", 1280, 0, 5, V2 | COCO | dict(epochs=12)),
    ("coco_instance", "dinov2_large", 640, 0, 4, V2 | COCO | dict(epochs=12)),
    ("coco_instance", "dinov2_large", 1280, 0, 4, V2 | COCO | dict(epochs=12)),
    ("ade20k_panoptic", "dinov2_large", 640, 0, 4, V2 | ADE),
    ("ade20k_panoptic", "dinov2_large", 1280, 0, 4, V2 | ADE),
    ("ade20k_panoptic", "dinov2_giant", 640, 0, 5, V2 | ADE),
    ("ade20k_panoptic", "dinov2_giant", 1280, 0, 5, V2 | ADE),
    ("ade20k_semantic", "dinov2_large", 512, 0, 4, V2 | SEMANTIC | dict(epochs=31)),
    ("cityscapes_semantic", "dinov2_large", 1024, 0, 4, V2 | SEMANTIC | dict(epochs=107)),
    ("coco_panoptic", "dinov3_small", 640, 24, 3, V3 | COCO | EARLY | dict(epochs=24)),
    ("coco_panoptic", "dinov3_base", 640, 24, 3, V3 | COCO | EARLY | dict(epochs=24)),
    ("coco_panoptic", "dinov3_large", 640, 0, 4, V3 | COCO | EARLY | dict(epochs=12)),
    ("coco_panoptic", "dinov3_large", 1280, 0, 4, V3 | COCO | EARLY | dict(epochs=12)),
    ("coco_instance", "dinov3_large", 640, 0, 4, V3 | COCO | dict(epochs=12)),
    ("coco_instance", "dinov3_large", 1280, 0, 4, V3 | COCO | dict(epochs=12)),
    ("ade20k_semantic", "dinov3_large", 512, 0, 4, V3 | SEMANTIC | EARLY | dict(epochs=16, llrd=1.0)),
]
SHARED = dict(batch_size=16, weight_decay=0.05, clip_norm=0.01, num_points=12544, masked_attn=True)
DEFAULT_SIZE = dict(
    coco_panoptic=640, coco_instance=640, ade20k_panoptic=640, ade20k_semantic=512, cityscapes_semantic=1024
)


def test_recipes_are_all_of_the_zoo():
    assert len(RECIPES) == 23 == len({row[:4] for row in RECIPES})


@pytest.mark.parametrize("task,encoder,size,epochs,blocks,fields", RECIPES)
def test_recipe_fields(task, encoder, size, epochs, blocks, fields):
    argv = ["--task", task, "--encoder", encoder]
    argv += ["--size", str(size)] if size != DEFAULT_SIZE[task] else []
    argv += ["--epochs", str(epochs)] if epochs else []
    cfg, _ = train.parse(argv)
    got = {key: getattr(cfg, key) for key in fields | SHARED}
    assert got == fields | SHARED and cfg.size == size
    assert eomt.default_num_blocks(eomt.ENCODERS[encoder]["depth"]) == blocks


# Windows as the published configuration files state them, and the total steps they imply.
@pytest.mark.parametrize("total,blocks,starts,ends", [
    (88692, 4, [14782, 29564, 44346, 59128], [29564, 44346, 59128, 73910]),  # COCO, 12 epochs
    (19902, 3, [3317, 8292, 13268], [6634, 11609, 16585]),  # Cityscapes, 107 epochs, 3 blocks
    (39120, 4, [6520, 13040, 19560, 26080], [13040, 19560, 26080, 32600]),  # ADE20K, 31
])  # fmt: skip
def test_recipe_windows_to_half_a_step(total, blocks, starts, ends):
    windows = eomt.anneal_windows(total, blocks)
    for (start, end), want_start, want_end in zip(windows, starts, ends, strict=True):
        assert abs(start - want_start) <= 0.5 and abs(end - want_end) <= 0.5


@pytest.mark.parametrize(
    "task,published", [("coco_panoptic", 88692), ("ade20k_semantic", 39120), ("cityscapes_semantic", 19902)]
)
def test_recipe_total_steps(task, published):
    """floor(images / 16) a epoch; the files' own totals differ by how their loader dealt the last batch."""
    steps = int(data.TASKS[task].epochs * (data.TASKS[task].images // 16))
    assert abs(steps - published) / published < 0.006


def test_recipe_first_window_replaces_the_formula():
    cfg, _ = train.parse(["--encoder", "dinov3_large", "--steps", "88692", "--device-batch-size", "16"])
    with_row = train.anneal_windows(cfg, 4)
    assert with_row[0] == (0, 3000) and with_row[1:] == eomt.anneal_windows(88692, 4)[1:]
