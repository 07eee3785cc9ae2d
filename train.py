"""Trains EoMT: data zips in, a run folder with checkpoints, numbers and pictures out.

    python train.py --quick                                             # procedural data, CPU, minutes
    python train.py --task coco_panoptic --encoder dinov2_large --data /coco
    torchrun --nproc_per_node=4 train.py --task coco_panoptic --encoder dinov2_large --data /coco
    python train.py --quick --stage A && python train.py --quick --stage B --init runs/quick-A
    python train.py --task coco_panoptic --data /coco --dry-run         # the resolved recipe, then stop

One process and N processes run the same lines. Settings: default < task < encoder < stage < --config < flag.
`--stage A|B|C` trains SigLIP2-EoMT: heads on the frozen tower, then LoRA, then more LoRA and fused layers.
User mistakes end with one line `error: ...` and exit code 1.
"""
# SPDX-License-Identifier: MIT
import argparse
import atexit
import dataclasses
import datetime
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import eomt
import eval as evaluation
import lora
import predict
import siglip2
import vocab
from losses import NotFinite, SetLoss, feature_distill, itc_distill, set_norm, sigmoid_contrastive


# ---- Settings ----------------------------------------------------------------------------------------------
def setting(default, phrase, least=0, most=10**9, among=()):
    """A field with its words in --help and the smallest and largest number, or all the words, it may be."""
    phrase += f": {', '.join(among)}" if among else ""
    return dataclasses.field(default=default, metadata={"help": phrase, "limits": (least, most, among)})


@dataclasses.dataclass
class Config:
    # what is trained
    task: str = setting("coco_panoptic", f"auto (look at --data), {', '.join(data.TASKS)}")
    encoder: str = setting("dinov2_large", "siglip2_base, _large, _so400m, _giant with --stage, else one of "
                           f"{', '.join(eomt.ENCODERS)}")
    data: str = setting("", "folder with the official zips (or the same unpacked)")
    out: str = setting("", "run folder; default runs/<task>_<encoder>_<size>")
    init: str = setting("", "start from this EoMT checkpoint (run folder, file or Hugging Face name)")
    base: str = setting("", "DINOv3 encoder that --init is a delta to")
    load_class_head: bool = setting(True, "take the class head of --init; never when classes differ")
    encoder_weights: str = setting("", "pretrained encoder (file, folder, Hugging Face name), or `random`")
    # model
    size: int = setting(640, "side of the square training crop in pixels", 1)
    num_queries: int = setting(200, "segmentation queries", 1)
    num_blocks: int = setting(0, "last blocks that see the queries; 0 = the published number", -math.inf)
    masked_attn: bool = setting(True, "masked attention in training, annealed away")
    first_window: tuple[float, ...] = setting((), "start,end step of annealing in the first block")
    # recipe
    epochs: float = setting(12, "passes over the training images")
    steps: int = setting(0, "optimiser steps; 0 = epochs * floor(images / batch size)")
    batch_size: int = setting(16, "images a step, over all ranks and accumulation", 1)
    device_batch_size: int = setting(0, "images one rank handles at once; 0 = its whole share")
    lr: float = setting(1e-4, "AdamW learning rate of heads and final norm", most=math.inf)
    weight_decay: float = setting(0.05, "on every parameter")
    clip_norm: float = setting(0.01, "gradient norm is clipped to this", most=math.inf)
    llrd: float = setting(0.8, "layer-wise decay: block i gets lr * llrd^(depth - 1 - i)")
    llrd_query_blocks: bool = setting(True, "decay in the last num_blocks blocks too")
    rope_rescale: float = setting(1.0, "RoPE coordinates are stretched by up to this factor, one a step", 1)
    warmup: tuple[float, ...] = setting((500, 1000), "steps of warm-up: heads, then encoder")
    scale: tuple[float, ...] = setting((0.1, 2.0), "range of the random resize")
    color_jitter: bool = setting(False, "random brightness, contrast, saturation, hue")
    num_points: int = setting(12544, "points of the mask losses", 1)
    # open vocabulary
    stage: str = setting("", "A, B or C of SigLIP2-EoMT; empty: EoMT with closed classes")
    text_weights: str = setting("", "SigLIP 2 checkpoint with the text tower; default --encoder-weights")
    tokenizer: str = setting("", "tokenizer.json or .model; default in the folder of the text tower")
    languages: str = setting("en", "of the class names: en, zh or en,zh")
    templates: str = setting("default", f"prompts of the class names: {', '.join(vocab.TEMPLATES)}")
    split: str = setting("", f"classes kept unseen: {', '.join(vocab.SPLITS)} or a JSON file; empty: none")
    split_policy: str = setting("void", "unseen segments, or every image with one", among=("void", "drop"))
    freeze_backbone: bool = setting(True, "the tower itself is not trained")
    lora: bool = setting(False, "adapters in the tower's last blocks")
    lora_last_n: int = setting(12, "blocks with adapters", 1)
    lora_rank_attn: int = setting(16, "rank of the adapters of q, k and v")
    lora_rank_ffn: int = setting(32, "rank of the adapters of fc1 and fc2")
    train_heads: bool = setting(True, "everything but the tower is trained")
    distill_feat: float = setting(0.0, "weight of 1 - cosine to the tower without adapters")
    distill_itc: float = setting(0.0, "weight of image-text distillation on true regions")
    isolate: bool = setting(True, "patches do not see the queries")
    query_blocks: str = setting("copy", "blocks of the query rows with --isolate", among=("copy", "shared"))
    query_init: str = setting("learnable", "queries", among=("learnable", "text", "text+learnable"))
    fuse_last: int = setting(1, "layers whose tokens make the mask features")
    ov_pool: str = setting("map", "region embedding", among=("map", "value", "mean"))
    ov_alpha: float = setting(0.4, "weight of the region classifier for seen classes")
    ov_beta: float = setting(0.8, "the same for unseen classes")
    ov_temp: str = setting("1", "temperature of both classifiers, `in,out`, or auto")
    ov_bias: float = setting(0.0, "subtracted from the logits of seen classes", -math.inf)
    ov_class_bias: str = setting("", "auto (by training frequency) or a JSON list, one number a class")
    ov_reject: str = setting("", "energy below which a mask is void, or auto")
    pretrain_steps: int = setting(2000, "of the toy tower that --quick makes", 1)
    wandb: bool = setting(False, "log to Weights & Biases too")
    wandb_project: str = setting("nanoeomt", "W&B project")
    wandb_name: str = setting("", "W&B run name; default the name of --out")
    wandb_group: str = setting("", "W&B group")
    wandb_tags: str = setting("", "W&B tags with commas")
    wandb_notes: str = setting("", "W&B notes")
    wandb_mode: str = setting("online", "W&B mode", among=("online", "offline", "disabled"))
    wandb_resume: str = setting("allow", "W&B's resume", among=("allow", "must", "never", "auto"))
    wandb_watch: bool = setting(False, "W&B histograms of weights and gradients")
    # machine
    amp: str = setting("bf16", "autocast on CUDA; fp16 scales gradients", among=("bf16", "fp16", "off"))
    compile: bool = setting(True, "torch.compile the model on CUDA")
    recompute: bool = setting(False, "backward makes the blocks' inner values again: less memory, more time")
    deterministic: bool = setting(False, "only repeatable kernels, an error where there is none")
    workers: int = setting(4, "data processes a rank; 0 = in this one")
    seed: int = setting(0, "everything random follows from it", most=2**63 - 1)
    timeout: float = setting(1800, "seconds a rank waits for the others before the run ends")
    # run
    log_every: int = setting(50, "steps between log lines", 1)
    save_every: int = setting(1000, "steps between checkpoints", 1)
    eval_every: int = setting(0, "steps between evaluations; 0 = at the end only")
    eval_limit: int = setting(0, "validation images of the evaluations in training; 0 = all")
    resume: bool = setting(False, "continue the run in --out")
    overwrite: bool = setting(False, "replace the run in --out")
    max_bad: int = setting(20, "undecodable training images after which the run stops")
    skip_nonfinite: int = setting(0, "steps with NaN or Inf that may be skipped before the run stops")
    quick: bool = setting(False, "tiny model on procedural data, minutes on a CPU")
    config: str = setting("", "config.json of a run, taken before the flags")
    dry_run: bool = setting(False, "print the resolved settings and stop")
    profile: bool = setting(False, "time of the parts of a step in each log line, trace-RANK.json of two")
    debug: bool = setting(False, "show the traceback of an error")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, (least, most, among) = getattr(self, field.name), field.metadata["limits"]
            many = value if isinstance(value, tuple) else (value,)
            found = [x for x in many if isinstance(x, int | float)]
            bad = {f"give {least} or more": any(not x >= least for x in found),  # so is NaN
                   f"give {most} or less": any(x > most for x in found),
                   "give two numbers: a,b": many is value and len(value) not in (2, len(field.default)),
                   f"one of {', '.join(among)}": among and value not in among}
            for advice in (text for text, so in bad.items() if so):
                raise ValueError(f"--{field.name.replace('_', '-')} {value}; {advice}")


WEIGHTS = {"dinov2": "facebook/dinov2-with-registers-{}",
           "dinov3": "facebook/dinov3-vit{0[0]}16-pretrain-lvd1689m"}  # the size's first letter
DINOV3 = dict(lr=2e-4, llrd_query_blocks=False, warmup=(2000, 3000), rope_rescale=2.0)  # as published
DINOV3_TASKS = {"coco_panoptic": dict(first_window=(0, 3000)),
                "ade20k_semantic": dict(first_window=(0, 3000), llrd=1.0, epochs=16)}
QUICK = dict(task="shapes", encoder="tiny", data="runs/shapes", out="runs/quick", encoder_weights="random",
             lr=2e-3, steps=330, warmup=(20, 0), llrd=1.0, clip_norm=0.1, num_points=1024, workers=0,
             log_every=30, save_every=110, eval_every=110, eval_limit=64)
TOY_BATCH, TOY_LR, TOY_SIDE, TOY_PATCH, TOY_LENGTH = 32, 2e-3, 64, 8, 4  # pixels; tokens: a red ring <eos>
# SigLIP 2 towers: size, side of the position table, patch, published checkpoint.
TOWERS = {"siglip2_base": (siglip2.SIZES["base"], 32, 16, "google/siglip2-base-patch16-512"),
          "siglip2_large": (siglip2.SIZES["large"], 32, 16, "google/siglip2-large-patch16-512"),
          "siglip2_so400m": (siglip2.SIZES["so400m"], 32, 16, "google/siglip2-so400m-patch16-512"),
          "siglip2_giant": (siglip2.SIZES["giant-opt"], 24, 16, "google/siglip2-giant-opt-patch16-384"),
          "siglip2_toy": (siglip2.TOY, TOY_SIDE // TOY_PATCH, TOY_PATCH, "runs/toy-tower")}
LORA = dict(lora=True, train_heads=False, distill_feat=1.0, distill_itc=0.1, warmup=(0, 500), llrd=1.0)
STAGES = {"A": dict(freeze_backbone=True, lora=False, train_heads=True),
          "B": LORA | dict(lora_last_n=12, lora_rank_attn=16, lora_rank_ffn=32),
          "C": LORA | dict(lora_last_n=16, lora_rank_attn=16, lora_rank_ffn=48, fuse_last=3)}
QUICK_OPEN = QUICK | dict(task="shapes_open", encoder="siglip2_toy", data="runs/shapes-open", split="shapes",
                          encoder_weights="runs/toy-tower", templates="plain", size=TOY_SIDE,
                          scale=(1.0, 1.0), batch_size=32, num_queries=12, num_points=512, steps=800,
                          save_every=400, eval_every=0, out="runs/quick-A")
QUICK_LORA = QUICK_OPEN | dict(steps=100, lr=5e-4, warmup=(0, 20), save_every=100, lora_last_n=2)
QUICKS = {"": QUICK, "A": QUICK_OPEN, **{x: QUICK_LORA | dict(out=f"runs/quick-{x}") for x in "BC"}}
NAMES = [*Config.__annotations__]
# Settings that only a stage reads, the split of classes apart.
OPEN = {*NAMES[NAMES.index("text_weights"):NAMES.index("wandb")]} - {"split", "split_policy"}
# Settings of where and how a run runs: they may differ between a run and its resumption.
MACHINE = {*NAMES[NAMES.index("wandb"):]} - {"seed", "quick"}
MACHINE |= {name for name in OPEN if name.startswith("ov_")} | {"text_weights", "tokenizer"}
MACHINE |= {"data", "out", "init", "base", "load_class_head", "encoder_weights", "device_batch_size"}
# Option names of the recipe this project grew from -> ours.
SEED_WORDS = {
    "OUTPUT_DIR": "--out", "OPEN_VOCAB_SPLIT": "--split", "DATASETS.OPEN_VOCAB_SPLIT": "--split",
    "--data.path": "--data", "--data.batch_size": "--batch-size (the total of all devices)",
    "--model.ckpt_path": "--init", "--model.load_ckpt_class_head": "--no-load-class-head",
    "--model.network.masked_attn_enabled": "--no-masked-attn", "MODEL.QUERY_INIT": "--query-init",
    "MODEL.BACKBONE.FREEZE": "--freeze-backbone", "MODEL.BACKBONE.LORA.LAST_N_LAYERS": "--lora-last-n",
    "MODEL.BACKBONE.LORA.ENABLED": "--lora", "MODEL.BACKBONE.LORA.LAYERS_LAST_N": "--lora-last-n",
    "MODEL.BACKBONE.LORA.RANK_ATTN": "--lora-rank-attn", "MODEL.BACKBONE.LORA.RANK_FFN": "--lora-rank-ffn",
    "MODEL.BACKBONE.LORA.RANK": "--lora-rank-attn and --lora-rank-ffn",
    "MODEL.LOSS.DISTILL.FEAT_ALIGN": "--distill-feat", "MODEL.LOSS.DISTILL.ITC_WEIGHT": "--distill-itc",
    "MODEL.OPEN_VOCAB.TEMP": "--ov-temp", "MODEL.OPEN_VOCAB.MULTILINGUAL": "--languages en,zh",
    "MODEL.OPEN_VOCAB.CALIBRATION_BIAS": "--ov-bias", "MODEL.OPEN_VOCAB.ENERGY_REJECT_THR": "--ov-reject",
    "LOGGING.WANDB.ENABLED": "--wandb", "LOGGING.WANDB.WATCH.ENABLED": "--wandb-watch"}
SEED_WORDS |= {f"LOGGING.WANDB.{word.upper()}": f"--wandb-{word}"
               for word in ("project", "name", "group", "tags", "notes", "mode", "resume")}


def encoder_row(encoder: str, task: str) -> dict:
    """What an encoder changes in a recipe."""
    family, _, size = encoder.partition("_")
    if encoder in TOWERS:  # queries join the last 4 blocks of every size
        return dict(encoder_weights=TOWERS[encoder][3], num_blocks=4 if size != "toy" else 2, size=512)
    if family not in WEIGHTS:
        return dict(encoder_weights="random")  # nobody has published any
    row = dict(encoder_weights=WEIGHTS[family].format(size))
    return row | DINOV3 | DINOV3_TASKS.get(task, {}) if family == "dinov3" else row


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part)


def parser() -> argparse.ArgumentParser:
    """One flag per Config field: --some-name (or --some_name), --x / --no-x, lists with commas."""
    rows = [f"  {word:<40}{flag}" for word, flag in SEED_WORDS.items()]
    top = data.Arguments(usage="%(prog)s [options]; --help lists them", description=__doc__.split("\n")[0],
                         conflict_handler="resolve", formatter_class=argparse.RawDescriptionHelpFormatter,
                         argument_default=argparse.SUPPRESS,  # what was not given is not there
                         epilog="\n".join(["original recipe -> here:", *rows]))
    for field in dataclasses.fields(Config):
        flag, kind, phrase = f"--{field.name.replace('_', '-')}", field.type, field.metadata["help"]
        phrase += "" if field.default == "" else f" (default: {field.default})"
        value = dict(type=kind if kind in (int, float, str) else numbers, metavar=field.name.upper())
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else value
        top.add_argument(flag, help=phrase, **how)
    return top


def read_config(path: str) -> dict:
    """The settings in the config.json of a run."""
    try:
        stored = dict(json.loads(Path(path).read_text())["config"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a run's config.json; give RUN/config.json") from None
    kinds = {bool: ("true or false", bool), int: ("a whole number", int), float: ("a number", int, float),
             str: ("a text", str), tuple[float, ...]: ("a list of numbers", list)}
    for key, value in stored.items():
        if key not in Config.__annotations__:
            raise ValueError(f"{path}!{key}: there is no such setting; remove it, or give another --config")
        wanted, *fits = kinds[Config.__annotations__[key]]
        items = value if type(value) is list else []
        if type(value) not in fits or not all(type(item) in (int, float) for item in items):
            raise ValueError(f"{path}!{key}: {json.dumps(value)}; give {wanted}")
        stored[key] = tuple(value) if type(value) is list else value
    return stored


def parse(argv: list[str]) -> tuple[Config, dict[str, str]]:
    """Command line -> resolved Config, and where each value that is not a default came from."""
    top = parser()
    # --some_name=x_y -> --some-name=x_y; options with a dot are names of other projects and stay
    words = [re.sub(r"^--[\w-]+(?=$|=)", lambda name: name[0].replace("_", "-"), word) for word in argv]
    flags, unknown = top.parse_known_args(words)
    if unknown:
        name = unknown[0].split("=")[0]
        for word in {name, f"MODEL.{name}"} & SEED_WORDS.keys():
            raise ValueError(f"{unknown[0]}: this is {SEED_WORDS[word]} here; see --help")
        top.error(f"unrecognized arguments: {unknown[0]}")
    given = vars(flags)
    if given.get("resume") and given.get("overwrite"):
        raise ValueError("--resume continues the run in --out, --overwrite replaces it; give one of these")
    stored = read_config(given["config"]) if given.get("config") else {}
    follows = dict(steps="epochs", device_batch_size="batch_size")  # computed, if the latter is given now
    old = {"overwrite", "config", *(() if given.get("resume") else ("resume", "out"))}
    old |= {k for k in follows if follows[k] in given}
    stored = {k: v for k, v in stored.items() if k not in old}
    stage = given.get("stage", stored.get("stage", ""))
    if stage not in ("", *STAGES):
        raise ValueError(f"--stage {stage}: unknown; one of {', '.join(STAGES)}")
    for key in (key for key in given if key in OPEN and not stage and given[key] != getattr(Config, key)):
        raise ValueError(f"--{key.replace('_', '-')} {given[key]}: only for a stage; give --stage A, B or C")
    recipe = STAGES[stage] | dict(encoder="siglip2_large") if stage else {}
    quick = QUICKS[stage] if given.get("quick", stored.get("quick")) else {}
    axes = vars(Config()) | recipe | quick | stored | given
    task, encoder = data.find_task(axes["data"], axes["task"]), axes["encoder"]
    fits = TOWERS if stage else eomt.ENCODERS
    if encoder not in fits:
        known = f"not for --stage {stage or '(none)'}" if encoder in TOWERS | eomt.ENCODERS else "unknown"
        raise ValueError(f"--encoder {encoder}: {known}; one of {', '.join(fits)}")
    layers = [("task", dict(num_queries=task.queries, epochs=task.epochs, size=task.size, scale=task.scale,
                            color_jitter=task.color_jitter)),
              ("encoder", encoder_row(encoder, task.name)),
              ("stage", recipe), ("quick", quick), ("config", stored), ("flag", given)]
    cfg = Config(**{key: value for _, layer in layers for key, value in layer.items()})
    depth = TOWERS[encoder][0][2] if stage else eomt.ENCODERS[encoder]["depth"]
    if not 0 <= cfg.num_blocks <= depth:
        raise ValueError(f"--num-blocks {cfg.num_blocks}: {encoder} has {depth}; give 0 to {depth}")
    if cfg.rope_rescale != 1 and (stage or "rope" not in eomt.ENCODERS[encoder]):
        raise ValueError(f"--rope-rescale {cfg.rope_rescale}: {encoder} has no RoPE; give 1")
    cfg.out = cfg.out or f"runs/{task.name}_{encoder}_{cfg.size}"
    return cfg, {key: name for name, layer in layers for key in layer}


def split_batch(cfg: Config, world: int) -> int:
    """Images one rank handles at once; fills device_batch_size, returns the number of accumulation parts."""
    def divisors(size):
        return ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
    if cfg.batch_size % world:
        raise ValueError(f"--batch-size {cfg.batch_size} does not split over {world} ranks; "
                         f"{divisors(cfg.batch_size)} ranks fit, or a multiple of {world}")
    share = cfg.batch_size // world
    cfg.device_batch_size = cfg.device_batch_size or share
    if share % cfg.device_batch_size:
        raise ValueError(f"--device-batch-size {cfg.device_batch_size} does not divide the {share} images of "
                         f"a rank; {divisors(share)} fit")
    return share // cfg.device_batch_size


def shorten_warmup(cfg: Config, origin: dict):
    """A warm-up that nobody gave takes a quarter of the steps where it would take more than half of them."""
    if 2 * sum(cfg.warmup) > cfg.steps and origin.get("warmup") not in ("flag", "config", "quick"):
        share = cfg.steps / 4 / sum(cfg.warmup)
        cfg.warmup, origin["warmup"] = tuple(int(length * share) for length in cfg.warmup), "computed"


# ---- Model, optimiser, schedules: pure functions of the settings and the step ------------------------------
def make_model(cfg: Config, vocabulary) -> eomt.EoMT:
    """The model of the settings with random weights, seeded."""
    torch.manual_seed(cfg.seed)
    row = {"patch": 16} | eomt.ENCODERS[cfg.encoder]
    with torch.device("meta" if cfg.dry_run else "cpu"):  # counting parameters needs no memory
        encoder = eomt.ViT(**row, grid=(cfg.size // row["patch"],) * 2)
        return eomt.EoMT(encoder, len(vocabulary.names), cfg.num_queries, cfg.num_blocks or None)


def read_start(cfg: Config):
    """(config, state, meta) of the checkpoint that a stage continues or starts from, or None."""
    path = cfg.out if cfg.resume and run_steps(Path(cfg.out)) else cfg.init
    if not path or not cfg.stage:
        return None
    found = eomt.read(path)
    if "open" not in found[0]:
        raise ValueError(f"{path}: made without --stage; leave it out, or give a run of --stage A, B or C")
    return found


def inherit(cfg: Config, origin: dict, start, vocabulary):
    """What a later stage takes over from the checkpoint it starts from, where no flag says otherwise."""
    if not start:
        return
    config, _, meta = start
    kept = dict(config["open"], num_queries=config["num_queries"], num_blocks=config["num_blocks"],
                size=meta["size"], templates=meta["template"], ov_pool=config["open"]["pool"],
                **{key: meta[key] for key in ("encoder", "split", "split_policy", "languages")})
    path, now = cfg.init or cfg.out, vars(cfg)
    for key in (key for key in kept if key in now and key != "fuse_last" and now[key] != kept[key]):
        if origin.get(key) != "flag":
            setattr(cfg, key, kept[key])
            origin[key] = "init"
        elif key not in ("size", "split_policy", "ov_pool"):  # another stage may have its own
            raise ValueError(f"--{key.replace('_', '-')} {now[key]}: {path} has {kept[key]}; leave it out, "
                             "or train Stage A anew")
    if meta["names"] != list(vocabulary.names):
        raise ValueError(f"{path}: its {len(meta['names'])} classes are not those of {cfg.task}; give the "
                         "task it was trained on")


def make_tower(cfg: Config) -> siglip2.VisionTower:
    """The tower of --encoder with its pretrained weights, or random ones."""
    sizes, grid, patch, _ = TOWERS[cfg.encoder]
    if cfg.dry_run or cfg.encoder_weights == "random":
        with torch.device("meta" if cfg.dry_run else "cpu"):
            return siglip2.VisionTower(*sizes, patch, grid, reach=int(sizes == siglip2.TOY))
    tower = siglip2.load(siglip2.fetch(cfg.encoder_weights), "vision")
    if (tower.config["width"], tower.config["depth"]) != (sizes[0], sizes[2]):
        raise ValueError(f"{cfg.encoder_weights}: width {tower.width}, {len(tower.blocks)} blocks, but "
                         f"{cfg.encoder} has {sizes[0]}, {sizes[2]}; give its checkpoint")
    return tower


def make_text(cfg: Config, vocabulary, width: int):
    """Text rows (R,C), owner (R,), logit scale and bias: from the text tower, used once and freed."""
    if cfg.dry_run or cfg.encoder_weights == "random" and not cfg.text_weights:
        count = len(vocabulary.names)
        return torch.randn(count, width), torch.arange(count), torch.tensor([4.7]), torch.tensor([-16.0])
    words = vocab.prompts(vocabulary, cfg.languages.split(","), cfg.templates)
    weights = cfg.text_weights or cfg.encoder_weights
    text = siglip2.text_rows(weights, cfg.tokenizer, words, data.cache_dir() / "text_rows.safetensors")
    if text[0].shape[1] != width:
        raise ValueError(f"{weights}: its text tower makes rows of width {text[0].shape[1]}, the image tower "
                         f"of {cfg.encoder} has {width}; give the text tower of the same SigLIP 2")
    return text


def make_open(cfg: Config, vocabulary, start) -> eomt.OpenVocabEoMT:
    """The model of a stage: tower, text rows and heads in place, what is not trained frozen."""
    if cfg.fuse_last > 1 and not cfg.isolate and not cfg.resume:  # older runs have them, in vain
        raise ValueError(f"--fuse-last {cfg.fuse_last}: only with --isolate; give --fuse-last 1")
    torch.manual_seed(cfg.seed)
    config, state, _ = start or ({}, {}, {})
    if start:
        tower = siglip2.VisionTower(**config["encoder"])
        text = [state[f"class_head.{name}"] for name in ("rows", "owner", "logit_scale", "logit_bias")]
    else:
        tower = make_tower(cfg)
        text = make_text(cfg, vocabulary, tower.width)
    seen = torch.zeros(len(vocabulary.names), dtype=torch.bool)
    seen[list(vocab.split(vocabulary, cfg.split)[0])] = True
    torch.manual_seed(cfg.seed)  # the same heads whatever the tower drew
    head = siglip2.OpenVocabHead(tower.width, *text[:2], seen, *text[2:])
    model = eomt.OpenVocabEoMT(tower, head, cfg.num_queries, cfg.num_blocks or None, cfg.isolate,
                               cfg.query_blocks, cfg.fuse_last, cfg.query_init, cfg.ov_pool)
    if cfg.query_init != "learnable":
        model.centres.copy_(siglip2.centres(text[0][head.seen_rows], cfg.num_queries))
    if start:
        plain = {k.replace(".base.", "."): v for k, v in state.items() if not k.endswith((".A", ".B"))}
        skip = () if cfg.load_class_head else ("class_head.",)
        skip += () if "fuse" in plain and model.fuse is not None else ("fuse",)  # layers new to it start at 0
        eomt.fill(model, plain, cfg.init or cfg.out, skip=skip)
    freeze(model, cfg, state)
    return model


def freeze(model: eomt.OpenVocabEoMT, cfg: Config, state: dict):
    """Leaves trainable what the stage trains, and grows adapters on those of the stage before."""
    tower = not cfg.freeze_backbone and not cfg.lora
    for name, p in model.named_parameters():  # the queries of `--query-init text` are frozen already
        trains = tower if name.startswith("encoder.") else cfg.train_heads
        p.requires_grad_(p.requires_grad and trains or name == "fuse")
    model.encoder.head.requires_grad_(False)  # pools regions in evaluation, takes no part in the losses
    model.distil = bool(cfg.distill_feat or cfg.distill_itc)
    adapters = {key: value for key, value in state.items() if key.endswith((".A", ".B"))}
    if cfg.lora:
        depth = len(model.encoder.blocks)
        if cfg.lora_last_n > depth:
            print(f"notice: --lora-last-n {cfg.lora_last_n}: the tower has {depth} blocks; all get adapters")
        model.adapt(min(cfg.lora_last_n, depth), cfg.lora_rank_attn, cfg.lora_rank_ffn)
        lora.grow(model, adapters)
    elif adapters:
        raise ValueError(f"{cfg.init or cfg.out}: its adapters would be lost without --lora; use --lora")
    elif model.distil:
        raise ValueError("--distill-feat, --distill-itc: the teacher is the tower less adapters; use --lora")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("nothing is left to train; use --lora, --train-heads or --no-freeze-backbone")


def load_start(model: eomt.EoMT, cfg: Config, say):
    """Weights a run starts from: --init, else --encoder-weights. What is left out is said, name by name."""
    if not cfg.init:
        if cfg.task == "ade20k_panoptic":
            say("notice: the published recipe starts from COCO panoptic weights; give them as --init")
        if cfg.encoder_weights != "random":
            eomt.load_encoder(model.encoder, cfg.encoder_weights)
            say(f"encoder from {cfg.encoder_weights}")
        return
    config, state, meta = eomt.read(cfg.init, cfg.base or None)
    if "num_classes" not in config:
        raise ValueError(f"{cfg.init}: an encoder without heads; give it to --encoder-weights")
    made = [name for name, row in eomt.ENCODERS.items()
            if all(row.get(key) == config["encoder"].get(key) for key in ("width", "depth", "rope"))]
    if "open" in config:
        made = [f"{meta['encoder']} --stage {meta['stage']}"]
    if made and cfg.encoder not in made:
        raise ValueError(f"{cfg.init}: made with --encoder {made[0]}, this run has --encoder {cfg.encoder}; "
                         f"give --encoder {made[0]}, or another --init")
    skip, there, here = (), config["num_classes"], model.config["num_classes"]
    other = meta.get("names", model.meta.get("names")) != model.meta.get("names")
    if there != here or other or not cfg.load_class_head:
        skip += ("class_head.",)
        say(f"class head not loaded: {there} classes there, {here} here" + ", other names" * other)
    if config["num_queries"] != model.config["num_queries"]:
        skip += ("q.",)
        say(f"queries not loaded: {config['num_queries']} there, {model.config['num_queries']} here")
    if (key := "encoder.pos_embed") in state:
        grid = tuple(config["encoder"]["grid"])
        state[key] = eomt.resample_positions(state[key], grid, model.encoder.grid)  # (1, h*w, C)
    eomt.fill(model, state, cfg.init, meta.get("origin"), skip)
    say(f"weights from {cfg.init}")


def param_groups(model: torch.nn.Module, cfg: Config) -> list[dict]:
    """AdamW groups by (part, lr multiplier). Block i of the encoder gets llrd^(depth-1-i); tokens, positions
    and patch embedding get block 0's; final norm and everything outside the encoder get 1."""
    depth, groups = len(model.encoder.blocks), {}
    for name, p in [(name, p) for name, p in model.named_parameters() if p.requires_grad]:
        part, factor = ("encoder" if name.startswith("encoder.") else "head"), 1.0
        if part == "encoder" and not name.startswith("encoder.norm."):
            index = int(name.split(".")[2]) if name.startswith("encoder.blocks.") else 0
            if cfg.llrd_query_blocks or index < depth - model.num_blocks:
                factor = cfg.llrd ** (depth - 1 - index)
        groups.setdefault((part, factor), []).append(p)
    return [dict(params=params, part=part, factor=factor) for (part, factor), params in groups.items()]


def lr_at(step: int, total: int, part: str, warmup: tuple[float, ...]) -> float:
    """Learning-rate multiplier: heads warm up while the encoder waits, then the encoder; each then decays to
    0 at `total` with power 0.9 (upstream's two-stage schedule)."""
    start, length = (0, warmup[0]) if part == "head" else warmup
    end = start + length
    if step < end:
        return max(0, step - start) / max(1, length)
    return (1 - min(1.0, (step - end) / max(1, total - end))) ** 0.9


def anneal_windows(cfg: Config, num_blocks: int) -> list[tuple[float, float]]:
    """(start, end) steps of mask annealing per query block, the first one from the recipe if it has one."""
    windows = eomt.anneal_windows(cfg.steps, num_blocks)
    return [cfg.first_window, *windows[1:]] if cfg.first_window else windows


def slot_seed(seed: int, step: int, slot: int) -> int:
    """Seed of one image's randomness: its place in the global batch, not the rank or part that handles it."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {slot}".encode(), digest_size=7).digest())


# ---- Checkpoints of a run: one folder, whole or not there --------------------------------------------------
def save_checkpoint(folder: Path, model, kept, cfg, step, meta, resumable=True):
    """Writes `folder` beside itself, syncs it, renames it into place. `kept`: what else has a state."""
    temporary = folder.parent / f".tmp-{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        eomt.save(temporary / "model.safetensors", model, step=step, **meta)
        if cfg.lora:
            eomt.save_adapters(temporary / "adapters.safetensors", model)
        if resumable:
            with open(temporary / "resume.pt", "wb") as file:  # torch's own writer does not say what failed
                torch.save(dict(step=step) | {name: one.state_dict() for name, one in kept.items()}, file)
        sums = {p.name: eomt.sha256(p) for p in sorted(temporary.iterdir())}
        record = dict(config=dataclasses.asdict(cfg), images=meta.get("images", {}), step=step, sha256=sums)
        record["own_sha256"] = hashlib.sha256(json.dumps(record).encode()).hexdigest()
        (temporary / "meta.json").write_text(json.dumps(record, indent=1))
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of the file's OSError
        shutil.rmtree(temporary, ignore_errors=True)
        reason = data.one_line(error if isinstance(error, OSError) else error.__context__ or error)
        raise OSError(f"{folder}: cannot be written ({reason}); make room or give another --out; the "
                      "checkpoints before it are whole") from error
    if folder.exists():  # best/ is replaced: the old one goes only when the new one is whole
        old = folder.parent / f".old-{folder.name}"
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(temporary, folder)
    _sync(folder.parent)
    shutil.rmtree(folder.parent / f".old-{folder.name}", ignore_errors=True)


def _sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def run_steps(out: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first."""
    return sorted((p for p in out.glob("step-*") if p.name[5:].isdigit()), key=lambda p: -int(p.name[5:]))


def prune(out: Path, step: int, keep=2):
    """After the save at `step`: the newest `keep` stay. Later ones are damaged: a resume passed them over.
    Renamed first: what a kill leaves of a half-removed folder must not look like a checkpoint."""
    steps = run_steps(out)
    later = [path for path in steps if int(path.name[5:]) > step]
    for path in later + steps[len(later) + keep:]:
        os.rename(path, out / f".tmp-{path.name}")
        shutil.rmtree(out / f".tmp-{path.name}", ignore_errors=True)


def tidy(out: Path):
    """Removes the litter of a killed save."""
    for path in out.glob(".tmp-*"):
        path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    for path in out.glob(".old-*"):  # killed between the two renames: the old one is the only one
        final = out / path.name.removeprefix(".old-")
        shutil.rmtree(path, ignore_errors=True) if final.exists() else os.rename(path, final)


def resume(out: Path, model, kept, cfg, say) -> int:
    """Loads the newest checkpoint whose sums are right; returns its step, 0 where there is none."""
    for folder in (folders := run_steps(out)):
        fault = eomt.damaged(folder) if (folder / "meta.json").exists() else f"{folder}!meta.json: missing"
        if fault:
            say(f"warning: {fault}; taking the one before")
            continue
        record, images = json.loads((folder / "meta.json").read_text()), model.meta.get("images", {})
        stored = record.get("config", {}) | record.get("images", images)  # of which older runs say nothing
        now = json.loads(json.dumps(dataclasses.asdict(cfg) | images))
        changes = [f"{k} {stored.get(k)} -> {now[k]}"
                   for k in now if k not in MACHINE and now[k] != stored.get(k)]
        if changes:
            raise ValueError(f"{folder}: the run was started with other settings: {', '.join(changes)}; "
                             "use the same, or another --out")
        eomt.fill(model, eomt.read(folder)[1], folder)
        state = eomt.unpickle(folder / "resume.pt")
        if not isinstance(state, dict) or state.keys() != {"step", *kept}:
            raise ValueError(f"{folder}!resume.pt: not what train.py writes; remove this checkpoint")
        for name in (name for name in kept if state[name]):  # a scaler that was not in use has none
            kept[name].load_state_dict(state[name])
        say(f"resumed {folder}")
        return state["step"]
    if folders:
        raise ValueError(f"{out}: none of its checkpoints is whole; give another --out, or --overwrite")
    say(f"{out}: no checkpoint to go on from; starts at step 0")
    return 0


def claim(out: Path, cfg: Config):
    """Refuses to mix two runs in one folder."""
    used = out.is_dir() and any(p.name == "config.json" or p.name.startswith("step-") for p in out.iterdir())
    ours = (out / "log.txt").exists()  # a model of others has a config.json, too
    replaces = used and ours and cfg.overwrite and not cfg.resume
    if used and not replaces and (cfg.overwrite or not cfg.resume):
        what = "already holds a run" if ours or not cfg.overwrite else "no run of train.py"
        raise ValueError(f"{out}: {what}; --resume continues it, --overwrite replaces it; give one of these")
    out.mkdir(parents=True, exist_ok=True)
    lock(out)
    for path in (p for p in out.iterdir() if replaces and p.name != ".lock"):  # NFS keeps what is open
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (out / "log.txt").touch()


def lock(out: Path):
    """Until this process ends no other one may train in `out`, where the file system has locks."""
    file = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o666)  # no data process inherits this kind of lock
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError | PermissionError):  # not a file system without locks
            raise ValueError(f"{out}: another process trains there; end it, or give another --out; if none "
                             f"is left, as after a crash of another machine, remove {out}/.lock") from None


def replace(path: Path, text: str):  # a small file that is always whole, the old one or the new one
    data.write_atomically(path, lambda file: file.write(text.encode()))


# ---- Log and pictures --------------------------------------------------------------------------------------
class Log:
    """Rank 0's voice: stdout and log.txt, metrics.jsonl, curves.png; Weights & Biases where asked for."""

    def __init__(self, out: Path, rank: int):
        self.out, self.rank, self.wandb = out, rank, None

    def start_wandb(self, cfg: Config, model, facts: dict):
        """Settings and facts of data and model go up at once, then what metrics.jsonl gets, by its keys."""
        if self.rank or not cfg.wandb:
            return
        mark = self.out / "wandb_id"  # a resumed run goes on in its own curves
        if not mark.exists():
            mark.write_text(os.urandom(8).hex())
        tags = [tag for tag in cfg.wandb_tags.split(",") if tag]
        try:
            import wandb
        except Exception as error:  # one that does not fit its protobuf raises anything
            raise ValueError(f"--wandb: {data.one_line(error)}; pip install --upgrade wandb") from error
        try:
            self.wandb = wandb.init(
                project=cfg.wandb_project, name=cfg.wandb_name or self.out.name, id=mark.read_text(),
                group=cfg.wandb_group or None, tags=tags, notes=cfg.wandb_notes or None, mode=cfg.wandb_mode,
                resume=cfg.wandb_resume, dir=str(self.out), config=dataclasses.asdict(cfg) | facts)
        except wandb.Error as error:
            raise ValueError(f"--wandb: {data.one_line(error)} Or: --wandb-mode offline --resume") from error
        if cfg.wandb_watch:
            self.wandb.watch(model, log="all", log_freq=cfg.log_every)

    def say(self, text: str):
        if self.rank == 0:
            print(text, flush=True)
            with open(self.out / "log.txt", "a") as file:
                file.write(text + "\n")

    def record(self, **values):
        if self.rank == 0:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(evaluation.as_json(values) + "\n")
        if self.wandb:
            self.wandb.log(values, step=values["step"])

    def rewind(self, step: float):
        """Drops the rows after `step`, which will be made again, and damaged ones, as a kill leaves one."""
        path, kept = self.out / "metrics.jsonl", []
        for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
            try:
                row = json.loads(line)
                kept += [evaluation.as_json(row) + "\n"] if row["step"] <= step else []
            except (ValueError, TypeError, LookupError, RecursionError):
                self.say(f"warning: {path}: line {number} is damaged; it is left out")
        replace(path, "".join(kept))

    def summary(self) -> dict:
        """What the last evaluation left; nothing where a power cut has damaged it."""
        try:
            return dict(json.loads((self.out / "summary.json").read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return {}

    def draw_curves(self):
        """The losses, learning rate and headline number over steps."""
        rows = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        keys = ("loss", "mask", "dice", "class", "lr", "PQ", "mIoU", "AP")
        series = {key: [(row["step"], row[key]) for row in rows if row.get(key) is not None] for key in keys}
        predict.draw_chart({key: points for key, points in series.items() if points}, self.out / "curves.png")


def describe(cfg, origin, model, images, world):
    """The lines of --dry-run and of every start: settings with their origin, counts, steps."""
    for field in dataclasses.fields(cfg):
        value, where = getattr(cfg, field.name), origin.get(field.name)
        if where or value != field.default:
            print(f"  {field.name} = {value}  ({where or 'computed'})")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    parts = cfg.batch_size // cfg.device_batch_size // world
    print(f"  parameters: {trained:,} trained, {frozen:,} frozen; steps {cfg.steps}; {images} images; "
          f"batch {cfg.batch_size} = {world} rank(s) x {cfg.device_batch_size} x {parts} part(s)")


# ---- Ranks and signals -------------------------------------------------------------------------------------
class Stop:
    """SIGTERM, SIGINT and SIGUSR1 ask for a checkpoint and an end at the next step; a second ends at once.
    Within a second it is the same one: a terminal and torchrun both hand it on."""

    def __init__(self):
        self.signal, self.since = 0, 0.0
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(name, self)

    def __call__(self, number, frame):
        if self.signal and time.monotonic() - self.since > 1:
            os._exit(self.code())
        if not self.signal:
            self.signal, self.since = number, time.monotonic()

    def code(self) -> int:
        return 130 if self.signal == signal.SIGINT else 143


def start_ranks(timeout: float) -> tuple[int, int, torch.device]:
    """(rank, world, device) from torchrun's variables; one process without them."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:  # gloo carries the small host-side agreements, NCCL the gradients
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                timeout=datetime.timedelta(seconds=timeout))
    return rank, world, device


def total(values: torch.Tensor, world: int) -> torch.Tensor:
    """Sum of a small CPU tensor over ranks."""
    if world > 1:
        dist.all_reduce(values)
    return values


# ---- Training ----------------------------------------------------------------------------------------------
class Profile:
    """--profile: the seconds of each part of a step, and a Chrome trace of the third and fourth step.
    It waits for the device after each part, so that the whole takes a little longer than without it."""

    def __init__(self, device: torch.device, path: Path):
        self.seconds, self.since, self.cuda = {}, time.perf_counter(), device.type == "cuda"
        self.trace = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=1),
            on_trace_ready=lambda trace: trace.export_chrome_trace(str(path)))
        self.trace.start()
        atexit.register(self.trace.stop)  # open at the end of the process, in a run of few steps, it crashes

    def __call__(self, part: str, steps: int = 0) -> dict[str, float]:
        """The time since the last call went into `part`. With `steps`, what they took so far: milliseconds a
        step of each part, as `ms_<part>`; then it begins anew."""
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0) + now - self.since
        self.since = now
        if part == "optimiser":
            self.trace.step()
        found, self.seconds = self.seconds, {} if steps else self.seconds
        return {f"ms_{part}": 1e3 * seconds / steps for part, seconds in found.items()} if steps else {}


class Trainer:
    """A model, its optimiser and its data; `fit` is the story of this file."""

    def __init__(self, cfg, model, device, rank=0, world=1, log=None, sets=None):
        self.cfg, self.raw, self.model, self.device = cfg, model, model, device
        self.rank, self.world, self.log, self.sets = rank, world, log, sets
        self.accumulate, model.recompute = split_batch(cfg, world), cfg.recompute
        classes = model.class_head.num_seen if cfg.stage else model.config["num_classes"]
        self.criterion = SetLoss(classes, cfg.num_points)
        self.windows = anneal_windows(cfg, model.num_blocks)
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(param_groups(model, cfg), cfg.lr, weight_decay=cfg.weight_decay,
                                           fused=True)
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
        self.cast = torch.autocast(device.type, dtypes[cfg.amp], enabled=cuda and cfg.amp != "off")
        self.scaler = torch.amp.GradScaler(enabled=cuda and cfg.amp == "fp16")
        self.kept = dict(optimizer=self.optimizer, scaler=self.scaler)
        self.best, self.bad, self.skipped = -1.0, set(), 0  # best: nan, None after a resume, is below all
        self.done, self.missed, self.fault, self.pending = 0, False, "", None
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.lap = Profile(device, log.out / f"trace-{rank}.json") if cfg.profile else lambda *_: {}

    def wrap(self):
        """Compilation and ranks, after the weights are loaded."""
        if self.cfg.compile and self.device.type == "cuda":
            self.raw.compile()
            self.evaluate = torch.compiler.set_stance("force_eager")(self.evaluate)  # graphs keep their batch
        if self.world > 1:
            self.model = DistributedDataParallel(self.raw, gradient_as_bucket_view=True)

    def agree(self, parts, stop) -> tuple[torch.Tensor, bool]:
        """What all ranks know before a step: loss totals (2,), and whether one of them was told to stop."""
        norm = sum(set_norm(part.targets, self.cfg.num_queries) for part in parts)
        faults = {fault for part in parts for fault in part.faults}
        alone = self.launcher not in (None, os.getppid())  # a killed torchrun sends its ranks no signal
        row = torch.tensor([*norm, bool(stop.signal) or alone, len(faults)], dtype=torch.float64)
        *norm, stopping, found = total(row, self.world)
        for fault in sorted(set().union(*evaluation.gather(faults)) - self.bad if found else ()):
            self.bad.add(fault)
            if self.rank == 0:
                print(f"warning: {fault}; another image takes its place", file=sys.stderr, flush=True)
        return torch.stack(norm), bool(stopping)

    def backward(self, step, index, part, norm) -> dict[str, torch.Tensor]:
        """Forward, loss and backward of part `index` of the batch; its losses, detached."""
        cfg = self.cfg
        first = (index * self.world + self.rank) * cfg.device_batch_size
        seeds = [slot_seed(cfg.seed, step, first + i) for i in range(len(part.names))]
        prob = eomt.anneal(step, self.windows) if cfg.masked_attn else []
        mask_prob = torch.tensor(prob).to(self.device, non_blocking=True) if any(prob) else None
        shape = self.raw.num_blocks, cfg.num_queries
        noise = [torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        noise = torch.stack(noise).to(self.device, non_blocking=True)  # (B, num_blocks, Q)
        targets = part.targets
        if cfg.stage:  # unseen classes have no column: they are in no target and no negative
            column = self.raw.class_head.column
            targets = [dataclasses.replace(target, labels=column[target.labels]) for target in targets]
        self.model.require_backward_grad_sync = index == self.accumulate - 1  # what DDP's no_sync() sets
        with self.cast:
            predictions = self.model(part.images, mask_prob, noise)
        self.lap("forward")
        try:
            losses = self.criterion(predictions, targets, norm, seeds, part.names)
        except NotFinite as error:  # NaN: this rank takes part in the exchange, all ranks see the same
            self.fault = str(error).split(";")[0]
            loss = sum(p.masks.sum() + p.classes.sum() for p in predictions) * torch.nan
            losses = dict.fromkeys(("loss", "mask", "dice", "class"), loss)
        self.settle()  # its copy has waited for the step before
        if self.cfg.stage and self.raw.distil:
            losses = self.distill(losses, predictions[-1], targets, norm)
        self.lap("loss")
        self.scaler.scale(losses["loss"] * self.world).backward()  # DDP averages shares of a sum
        self.lap("backward")
        return {key: value.detach() for key, value in losses.items()}

    def distill(self, losses, last, targets, norm) -> dict[str, torch.Tensor]:
        """Adds how far the adapted tower went from itself: patch by patch, and among texts on true regions.
        This part's share of the mean over all patches and regions of the step."""
        cfg, model, head = self.cfg, self.raw, self.raw.class_head
        share = len(targets) / cfg.batch_size
        terms = {"feat": cfg.distill_feat * share * feature_distill(last.student, last.teacher)}
        grid = tuple(side // model.encoder.patch for side in targets[0].ids.shape[1:])
        rows = []
        for i, target in enumerate(targets):
            z = siglip2.grid_logits(target.masks(), grid)[None]  # (1, T, h*w)
            both = torch.stack([last.student[i], last.teacher[i]])  # (2, h*w, C)
            rows.append(siglip2.map_pool(model.encoder, both, z.expand(2, -1, -1), mode=model.pool))
        student, teacher = torch.cat(rows, 1)  # (R, C) each
        owner, labels = head.column[head.owner[head.seen_rows]], torch.cat([t.labels for t in targets])
        itc = itc_distill(student, teacher, head.rows[head.seen_rows], labels, owner, head.logit_scale.exp(),
                          head.logit_bias)
        terms["itc"] = cfg.distill_itc * itc * len(labels) / norm[0].clamp(min=1).to(itc, non_blocking=True)
        return losses | {name: term.detach() for name, term in terms.items()} | {
            "loss": losses["loss"] + sum(terms.values())}

    def step(self, step, parts, norm) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """One optimiser step: this rank's losses and the gradient norm before clipping."""
        cfg = self.cfg
        for group in self.optimizer.param_groups:
            group["lr"] = cfg.lr * group["factor"] * lr_at(step, cfg.steps, group["part"], cfg.warmup)
        if cfg.rope_rescale != 1:
            draw = torch.rand((), generator=torch.Generator().manual_seed(slot_seed(cfg.seed, step, -1)))
            self.raw.encoder.rope_scale.fill_(cfg.rope_rescale ** (2 * draw.item() - 1))  # log-uniform
        rows = [self.backward(step, i, part, norm) for i, part in enumerate(parts)]
        losses = {key: sum(row[key] for row in rows) for key in rows[0]}
        self.scaler.unscale_(self.optimizer)
        gradient = torch.nn.utils.clip_grad_norm_(self.raw.parameters(), cfg.clip_norm)
        finite = (losses["loss"] if self.scaler.is_enabled() else gradient).isfinite()
        if not self.scaler.is_enabled():  # the fused update leaves the weights alone, without our asking here
            self.optimizer.found_inf = 1 - finite.float()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        finite, names = finite.to("cpu", non_blocking=True), [name for part in parts for name in part.names]
        copied = torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None
        self.pending, self.fault = (copied, finite, step, losses, gradient, names, self.fault), ""
        self.lap("optimiser")
        return losses, gradient

    def settle(self):
        """Looks at the verdict on the last step, when it costs no wait. One with NaN or Inf left the weights
        alone; more than allowed end the run. The same on all ranks, since DDP has summed the gradients; under
        fp16, where the scaler skips gradients that overflow, the losses of all ranks decide."""
        if not self.pending:
            return
        (copied, finite, step, losses, gradient, names, fault), self.pending = self.pending, None
        if copied:  # no copy of the matcher's has waited where a step logs, or has no segment at all
            copied.synchronize()
        bad = 1 - finite.float()
        if not (total(bad, self.world) if self.scaler.is_enabled() else bad):
            return
        self.skipped += 1
        text = fault or ", ".join(f"{key} {value:.4g}" for key, value in losses.items())
        mine = (bool(losses["loss"].isfinite()), f"rank {self.rank}: {text}, images {', '.join(names)}")
        rows = evaluation.gather(mine)
        guilty = [text for good, text in rows if not good] or [text for _, text in rows]
        fault = f"step {step + 1}: not finite, gradient {gradient:.4g} ({', '.join(guilty)})"
        if self.skipped > self.cfg.skip_nonfinite:
            raise ValueError(f"{fault}; lower --lr, or allow some with --skip-nonfinite")
        self.log.say(f"warning: {fault}; step skipped")

    def report(self, done, losses, gradient, seconds, steps):
        """The line of a log step; the losses are summed over ranks, each holds its share."""
        cfg = self.cfg
        values = total(torch.stack([value.cpu().double() for value in losses.values()]), self.world).tolist()
        losses = dict(zip(losses, values, strict=True))
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        memory = torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0
        eta = datetime.timedelta(seconds=int((cfg.steps - done) * seconds / steps))
        speed = steps * cfg.batch_size / seconds
        parts = self.lap("rest", steps)
        text = " ".join(f"{key} {value:.4f}" for key, value in losses.items())
        more = f" bad {len(self.bad)}" * bool(self.bad) + "".join(f" {k} {v:.1f}" for k, v in parts.items())
        self.log.say(f"step {done}/{cfg.steps} {text} lr {lr:.1e} grad {gradient:.2f} img/s {speed:.1f} "
                     f"mem {memory:.1f}GB eta {eta}{more}")
        self.log.record(step=done, **losses, lr=lr, grad=float(gradient), img_s=speed, **parts)

    def save(self, step):
        if self.rank == 0:
            folder = self.log.out / f"step-{step:08d}"
            save_checkpoint(folder, self.raw, self.kept, self.cfg, step, self.raw.meta)
            prune(self.log.out, step)

    def due(self, done: int, every: int) -> bool:
        """Whether what comes every so many steps, 0 = at the end only, follows step `done`."""
        return done == self.cfg.steps or bool(every) and done % every == 0

    def evaluate(self, step):
        """Validation on all ranks; rank 0 writes its line and pictures, and best/ when it is."""
        cfg, model, out = self.cfg, self.raw, self.log.out
        limit = 0 if step == cfg.steps else cfg.eval_limit
        if cfg.stage:
            evaluation.calibrate(model, self.sets["val"], cfg)
        result = evaluation.evaluate(model, self.sets["val"], self.rank, self.world, cfg.workers, limit)
        self.log.say(evaluation.line(result))
        self.log.record(step=step, **result.numbers)
        if self.rank == 0:
            model.eval()  # the pictures: an open vocabulary has other classes in training
            if not result.partial and (self.best is None or not result.numbers[result.headline] <= self.best):
                self.best = result.numbers[result.headline]
                save_checkpoint(out / "best", model, self.kept, cfg, step, model.meta, resumable=False)
            summary = dict(step=step, best=self.best, bad=len(self.bad), **result.numbers)
            replace(out / "summary.json", evaluation.as_json(summary, indent=1))
            (out / "viz").mkdir(exist_ok=True)
            predict.draw_comparison(model, self.sets["val"], out / "viz" / f"step_{step:08d}.png")
            predict.draw_bars(result.per_class, out / f"{result.headline.lower()}_per_class.png")
            self.log.draw_curves()
        model.train()

    def fit(self, first: int, stop: Stop) -> int:
        """Steps first..cfg.steps; the exit code."""
        cfg, self.done = self.cfg, first
        batches = data.staged(data.loader(
            self.sets["train"], cfg.batch_size, cfg.steps, cfg.seed, first, self.rank, self.world,
            cfg.device_batch_size, cfg.workers, pin=self.device.type == "cuda"), self.device)
        if self.missed:  # killed after the save and before the end of the evaluation
            self.evaluate(first)
        self.raw.train()
        self.lap("rest", 1)  # what a start takes
        began, since = time.time(), first
        for step in range(first, cfg.steps):
            self.lap("rest")
            parts = [next(batches) for _ in range(self.accumulate)]
            self.lap("data")
            norm, stopping = self.agree(parts, stop)
            if stopping or len(self.bad) > cfg.max_bad:
                self.save(step)
                evaluation.gather(None)  # where one rank ends, torchrun ends the one that saves
                if len(self.bad) > cfg.max_bad:
                    raise ValueError(f"{cfg.data}: {len(self.bad)} undecodable training images, --max-bad is "
                                     f"{cfg.max_bad}; repair what data.py --decode names, then --resume")
                self.log.say(f"stopped by a signal at step {step}; continue with --resume")
                return stop.code()
            losses, gradient = self.step(step, parts, norm)
            self.done = done = step + 1
            reports, saves, judges = (
                self.due(done, every) for every in (cfg.log_every, cfg.save_every, cfg.eval_every))
            if reports or saves or judges:
                self.settle()
            if reports:
                self.report(done, losses, gradient, time.time() - began, done - since)
                began, since = time.time(), done
            if saves or judges:  # a signal is answered after the evaluation
                self.save(done)
            if judges:
                self.evaluate(done)
                self.lap("rest", 1)  # in no line, as the steps between the last one and here
                began, since = time.time(), done
        return 0


# ---- The SigLIP 2 of the procedural world ------------------------------------------------------------------
# Its pretraining sees no mask, but every name: the situation of a real SigLIP 2. What makes it learn in
# minutes: patches that see only their neighbours (else the words are right for images and wrong for regions),
# positions that start as sines, one object an image at first, y = +1 wherever a caption is true.
def toy_tokenizer(texts: list[str], folder: Path) -> int:
    """tokenizer.json with one id a word; returns the number of ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = dict.fromkeys(["<pad>", "<eos>", "<unk>", *" ".join(texts).split()])
    model = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    return len(words)


def toy_scenes(vocabulary, count: int, seed: int, things: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 (n,3,64,64) of 1 to `things` things, and which classes are visible, bool (n,K)."""
    rng, classes, images, visible = np.random.default_rng((seed, things)), len(vocabulary.names), [], []
    for _ in range(count):
        image, index, segments = data.draw_scene(rng, vocabulary, range(classes), TOY_SIDE, things)
        images.append(image)
        visible.append(np.isin(np.arange(classes), [segments[t - 1][0] for t in np.unique(index) if t]))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(visible))


def toy_towers(ids: int) -> tuple[siglip2.VisionTower, siglip2.TextTower]:
    """Both towers with the starts that matter: sines as positions, nothing in <pad> and <eos>."""
    width, hidden, depth, heads = siglip2.TOY
    grid = TOY_SIDE // TOY_PATCH
    vision = siglip2.VisionTower(*siglip2.TOY, TOY_PATCH, grid, reach=1)
    text = siglip2.TextTower(width, hidden, depth // 2, heads, ids, TOY_LENGTH)
    waves = 2 ** torch.linspace(-1, math.log2(grid), width // 4)
    angle = torch.arange(grid)[:, None] * math.pi / grid * waves  # (grid, C/4)
    axis = torch.cat([angle.sin(), angle.cos()], 1)  # (grid, C/2)
    table = torch.cat([axis[:, None].expand(-1, grid, -1), axis.expand(grid, -1, -1)], -1)  # (grid, grid, C)
    with torch.no_grad():
        vision.positions.copy_(0.5 * table.flatten(0, 1))
        vision.head.probe.normal_(std=0.02)
        text.positions.normal_(std=0.02)
        text.tokens.weight[: siglip2.EOS + 1] = 0
        text.logit_bias.fill_(-5)
    return vision, text


def pretrain_toy(folder: str | Path, vocabulary, steps: int = 2000, seed: int = 0, say=print) -> None:
    """Trains the pair with SigLIP's sigmoid loss and writes `folder`; about 90 ms a step on one core."""
    torch.manual_seed(seed)
    rng, folder = np.random.default_rng(seed), Path(folder)
    texts, true = vocab.captions(vocabulary)
    vision, text = toy_towers(toy_tokenizer(texts, folder))
    ids, true = siglip2.Tokenizer(folder, TOY_LENGTH)(texts), torch.tensor(true).float()  # (n, L), (K, n)
    worlds = [toy_scenes(vocabulary, min(4000, TOY_BATCH * steps), seed, things) for things in (1, 3)]
    weights = [*vision.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(weights, TOY_LR, (0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TOY_LR, steps, pct_start=0.1)
    for step in range(steps):
        images, visible = worlds[2 * step >= steps]
        pick = torch.from_numpy(rng.integers(len(images), size=TOY_BATCH))
        batch = images[pick].float() / 127.5 - 1  # (B, 3, 64, 64)
        batch = torch.where(torch.rand(TOY_BATCH, 1, 1, 1) < 0.5, batch, batch.flip(-1))
        positive = visible[pick].float() @ true > 0  # (B, n)
        rows = vision.head(vision(batch))  # (B, C)
        loss = sigmoid_contrastive(rows, text(ids), positive, text.logit_scale.exp(), text.logit_bias)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            say(f"toy tower: step {step + 1}/{steps} loss {loss:.3f}")
    siglip2.save(folder, vision, text)


# ---- The run -----------------------------------------------------------------------------------------------
def open_data(cfg: Config, task, rank: int, begin) -> dict[str, data.SegmentDataset]:
    """The two splits. First the procedural world and the toy tower are made where --quick finds none."""
    if not cfg.data:
        raise ValueError("--data is missing; give the folder that holds the data set's zips, or use --quick")
    seen, _ = vocab.split(task.vocabulary, cfg.split)
    worlds = {QUICK["data"]: (1024, 128, 0), QUICK_OPEN["data"]: (2048, 300, 0, seen)}
    if rank == 0 and cfg.data in worlds and not (Path(cfg.data) / "val2017.zip").exists():
        data.write_shapes(cfg.data, task.vocabulary, *worlds[cfg.data])
    toy = cfg.quick and not begin and cfg.encoder_weights == QUICK_OPEN["encoder_weights"]
    if rank == 0 and toy and (Path(cfg.encoder_weights) / "model.safetensors").exists():
        print(f"notice: {cfg.encoder_weights} is there and used as it is; delete it to make a new one")
    elif rank == 0 and toy:
        pretrain_toy(cfg.encoder_weights, vocab.SHAPES_OPEN, cfg.pretrain_steps, cfg.seed)
    evaluation.gather(None)  # all find both
    transform = data.Augment(cfg.size, cfg.scale, cfg.color_jitter)
    hidden = set(range(len(task.vocabulary.names))) - set(seen)
    return dict(train=data.SegmentDataset(cfg.data, task, "train", transform, hidden, cfg.split_policy),
                val=data.SegmentDataset(cfg.data, task, "val"))


def open_model(cfg: Config, task, rank: int, sets, begin) -> eomt.OpenVocabEoMT:
    """The model of a stage, and in its meta what evaluation and prediction need beside the weights."""
    model = make_open(cfg, task.vocabulary, begin)
    if rank == 0 and cfg.stage != "A" and not begin:
        heads = "which train too" if cfg.train_heads else "which stay so without --train-heads"
        print(f"stage {cfg.stage} without --init: starts from {cfg.encoder_weights} and random heads, "
              f"{heads}; give a run of the stage before as --init")
    elif rank == 0 and begin:
        print(f"stage {cfg.stage} starts from {cfg.init or cfg.out}")
    seen, unseen = vocab.split(task.vocabulary, cfg.split)
    texts = dict(text=cfg.text_weights or cfg.encoder_weights, tokenizer=cfg.tokenizer)
    model.meta = {key: begin[2][key] for key in texts} if begin else texts
    model.meta |= dict(stage=cfg.stage, encoder=cfg.encoder, split=cfg.split, split_policy=cfg.split_policy,
                       languages=cfg.languages, template=cfg.templates, thresholds=evaluation.THRESHOLDS,
                       trained=[dataclasses.asdict(task.vocabulary), list(seen)], seen=list(seen),
                       unseen=list(unseen), ov={key: getattr(cfg, key) for key in evaluation.OV_KEYS},
                       counts=sets["train"].class_counts().tolist() if sets else [])
    if sets:  # what calibration would refuse after the training is refused now
        plain = {key: "1" for key in ("ov_temp", "ov_reject") if vars(cfg)[key] == "auto"}
        evaluation.calibrate(model, None, dataclasses.replace(cfg, **plain))
    return model


def start(trainer: Trainer) -> int:
    """Weights of the first step, and its number; a full or read-only disk is found now, not in an hour."""
    cfg, log, model, notes = trainer.cfg, trainer.log, trainer.raw, []
    if not cfg.stage and not (cfg.resume and run_steps(log.out)):
        load_start(model, cfg, notes.append)
    evaluation.gather(None)  # an old run goes when all ranks have their weights, which may lie in it
    if trainer.rank == 0:
        claim(log.out, cfg)
        tidy(log.out)
    evaluation.gather(None)  # a resume looks into what is tidy
    first = resume(log.out, model, trainer.kept, cfg, log.say) if cfg.resume else 0
    for note in notes:
        log.say(note)
    if cfg.resume:
        summary = log.summary()
        trainer.best = summary.get("best", -1.0)
        trainer.missed = first > 0 and trainer.due(first, cfg.eval_every) and summary.get("step") != first
    if trainer.rank == 0:
        log.rewind(first if cfg.resume else math.inf)
        trial = log.out / ".tmp-trial"
        save_checkpoint(trial, model, trainer.kept, cfg, first, model.meta)
        shutil.rmtree(trial)
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        sha = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        record = dict(config=dataclasses.asdict(cfg), argv=sys.argv, git=sha, torch=torch.__version__)
        replace(log.out / "config.json", json.dumps(record, indent=1))
    return first


def run(cfg: Config, origin: dict) -> int:
    """Everything between the settings and the exit code."""
    rank, world, device = start_ranks(cfg.timeout)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if cfg.quick and device.type == "cpu":
        torch.set_num_threads(1)  # as fast for a tiny model, and steady on a busy machine
    split_batch(cfg, world)
    cfg.workers = min(cfg.workers, os.cpu_count() or 1)
    task = data.find_task(cfg.data, cfg.task)
    begin = read_start(cfg)
    inherit(cfg, origin, begin, task.vocabulary)
    sets = None if cfg.dry_run else open_data(cfg, task, rank, begin)
    images = len(sets["train"]) if sets else task.images or cfg.batch_size
    cfg.steps = cfg.steps or max(1, int(cfg.epochs * max(1, images // cfg.batch_size)))
    shorten_warmup(cfg, origin)
    model = open_model(cfg, task, rank, sets, begin) if cfg.stage else make_model(cfg, task.vocabulary)
    if cfg.size % (patch := model.encoder.patch):
        raise ValueError(f"--size {cfg.size} is no multiple of the patch size {patch}; "
                         f"take {max(1, cfg.size // patch) * patch}")
    if rank == 0:
        describe(cfg, origin, model, images, world)
    if cfg.dry_run:
        return 0
    digests = {split: hashlib.sha256(one.source.names).hexdigest()[:8] for split, one in sets.items()}
    model.meta |= dict(task=cfg.task, kind=task.kind, size=cfg.size, data=cfg.data, cwd=os.getcwd(),
                       images={f"{split} images": f"{len(sets[split])} (names {digest})"
                               for split, digest in digests.items()},
                       **{key: list(getattr(task.vocabulary, key)) for key in ("names", "ids", "thing")})
    trainer = Trainer(cfg, model.to(device), device, rank, world, Log(out := Path(cfg.out), rank), sets)
    first, began = start(trainer), time.time()
    trainer.wrap()
    trainer.log.start_wandb(cfg, model, dict(train_images=images, val_images=len(sets["val"]),
                                             parameters=sum(p.numel() for p in model.parameters())))
    try:
        code = trainer.fit(first, Stop())
    except RuntimeError as error:  # where another rank has died or hangs: how far this one came
        if world == 1:
            raise
        raise RuntimeError(f"rank {rank} after step {trainer.done}: {data.one_line(error)}; see the other "
                           "lines, then --resume") from error
    if trainer.log.wandb:
        trainer.log.wandb.finish(code)
    if code == 0:
        trainer.log.say(f"done in {time.time() - began:.0f} s: {out}/best, {out}/curves.png, {out}/viz\n"
                        f"next: python eval.py --ckpt '{out}'    python predict.py --ckpt '{out}' IMAGE")
    return code


def main():
    try:
        code = data.command(lambda argv: run(*parse(argv)), sys.argv[1:])
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code)  # not through the interpreter's end: other ranks may wait in a collective
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
