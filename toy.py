"""A SigLIP 2 of the procedural world: tiny towers, pretrained on images and captions in CPU minutes.

In: a vocabulary of colour-and-shape names that data.py can draw, a number of steps, a seed.
Out: a folder with model.safetensors and tokenizer.json as a SigLIP 2 checkpoint has them.

    pretrain("runs/toy-tower", vocab.SHAPES_OPEN)   # what `train.py --quick --stage A` does first

No mask is seen here, but every name is: the situation of a real SigLIP 2. What makes it learn in minutes:
patches that see only their neighbours (else the words are right for images and wrong for regions), positions
that start as sines, one object an image at first, every caption a column and y = +1 wherever it is true.
"""

# SPDX-License-Identifier: MIT
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import siglip2
import vocab
from losses import sigmoid_contrastive

BATCH, LR = 32, 2e-3
SIDE, PATCH, LENGTH = 64, 8, 4  # pixels of a scene and of a patch; text tokens: "a red ring" and <eos>


def captions(vocabulary) -> tuple[list[str], Tensor]:
    """All full names and all bare words (n), and bool (K,n): of which class is which one true?"""
    names = [texts[0][0] for texts in vocab.prompts(vocabulary, templates="plain")]
    words = list(dict.fromkeys(word for name in vocabulary.names for word in name.split()))
    true = [
        [k == j for j in range(len(names))] + [word in name.split() for word in words]
        for k, name in enumerate(vocabulary.names)
    ]
    return names + words, torch.tensor(true)


def write_tokenizer(texts: list[str], folder: Path) -> int:
    """tokenizer.json with one id a word; returns the number of ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = dict.fromkeys(["<pad>", "<eos>", "<unk>", *" ".join(texts).split()])
    model = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    return len(words)


def scenes(vocabulary, count: int, seed: int, things: int) -> tuple[Tensor, Tensor]:
    """Images uint8 (n,3,64,64) of 1 to `things` things, and which classes are visible, bool (n,K)."""
    rng, classes, images, visible = np.random.default_rng((seed, things)), len(vocabulary.names), [], []
    for _ in range(count):
        image, index, segments = data.draw_scene(rng, vocabulary, range(classes), SIDE, things)
        images.append(image)
        there = [segments[t - 1][0] for t in np.unique(index) if t]
        visible.append(np.isin(np.arange(classes), there))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(visible))


def towers(ids: int) -> tuple[siglip2.VisionTower, siglip2.TextTower]:
    """Both towers with the starts that matter: sines as positions, nothing in <pad> and <eos>."""
    width, hidden, depth, heads = siglip2.TOY
    grid = SIDE // PATCH
    vision = siglip2.VisionTower(*siglip2.TOY, PATCH, grid, reach=1)
    text = siglip2.TextTower(width, hidden, depth // 2, heads, ids, LENGTH)
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


def pretrain(folder: str | Path, vocabulary, steps: int = 2000, seed: int = 0, say=print) -> None:
    """Trains the pair with SigLIP's sigmoid loss and writes `folder`; about 90 ms a step on one core."""
    torch.manual_seed(seed)
    rng, folder = np.random.default_rng(seed), Path(folder)
    texts, true = captions(vocabulary)
    vision, text = towers(write_tokenizer(texts, folder))
    ids = siglip2.Tokenizer(folder, LENGTH)(texts)  # (n, LENGTH)
    worlds = [scenes(vocabulary, min(4000, BATCH * steps), seed, things) for things in (1, 3)]
    weights = [*vision.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(weights, LR, (0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=0.1)
    for step in range(steps):
        images, visible = worlds[2 * step >= steps]
        pick = torch.from_numpy(rng.integers(len(images), size=BATCH))
        batch = images[pick].float() / 127.5 - 1  # (B, 3, 64, 64)
        batch = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, batch, batch.flip(-1))
        positive = visible[pick].float() @ true.float() > 0  # (B, n)
        rows = vision.head(vision(batch))  # (B, C)
        loss = sigmoid_contrastive(rows, text(ids), positive, text.logit_scale.exp(), text.logit_bias)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            say(f"toy tower: step {step + 1}/{steps} loss {loss:.3f}")
    siglip2.save(folder, vision, text)
