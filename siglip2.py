"""SigLIP 2 towers, text rows and open-vocabulary classes for masks.

In: a SigLIP 2 checkpoint (safetensors), a Gemma tokenizer, prompts; images normalised with mean = std = 0.5.
Out: patch tokens, image and region embeddings, a text row per synonym, class logits (B,Q,K+1), void LAST.

    vision, text = load("siglip2-large", "vision"), load("siglip2-large", "text")
    rows, owner = embed_text(text, Tokenizer("siglip2-large"), [[["a cat"]], [["a dog"], ["a puppy"]]])
    head = OpenVocabHead(vision.width, rows, owner, [True, False], text.logit_scale, text.logit_bias).eval()
    region = map_pool(vision, patches, mask_logits)  # (B,N,C), (B,Q,N) -> unit vectors (B,Q,C)
    classes = head(queries, region)                  # (B,Q,C) -> (B,Q,K+1); softmax gives the probabilities
"""
# SPDX-License-Identifier: MIT
import hashlib
import json
import math
import os
import string
from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {  # width, hidden width of the MLPs, depth, heads of both towers, from the checkpoints' config.json
    "base": (768, 3072, 12, 12), "large": (1024, 4096, 24, 16), "so400m": (1152, 4304, 27, 16),
    "giant-opt": (1536, 6144, 40, 16),  # its text tower is so400m's with out=1536
}
TOY = (64, 256, 4, 4)  # of the procedural world; train.py pretrains it
EPS = 1e-6  # of every LayerNorm
PAD, EOS, LENGTH = 0, 1, 64  # Gemma's ids; SigLIP 2 was trained on exactly 64 text tokens


# ---- Towers ------------------------------------------------------------------------------------------------
class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)  # fused: one GEMM, and strided views for the attention kernel
        self.proj = nn.Linear(width, width)

    def split(self, x):
        """Tokens (B,N,C) -> q, k, v, each (B,nh,N,hd): also how other rows get to attend to these tokens."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x, attend):
        return self.proj(attend(*self.split(x)).transpose(1, 2).flatten(2))  # (B, N, C)


def mlp(width, hidden):
    gelu = nn.GELU(approximate="tanh")  # erf instead moves the logits by 7e-4
    return nn.Sequential(OrderedDict(fc1=nn.Linear(width, hidden), gelu=gelu, fc2=nn.Linear(hidden, width)))


class Block(nn.Module):
    def __init__(self, width, hidden, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, EPS)
        self.mlp = mlp(width, hidden)

    def forward(self, x, attend=F.scaled_dot_product_attention):
        x = x + self.attn(self.norm1(x), attend)  # (B, N, C)
        return x + self.mlp(self.norm2(x))  # (B, N, C)


class MapHead(nn.Module):
    """Attention pooling by one learned query, the probe; in parts, because `map_pool` re-weights them."""

    def __init__(self, width, hidden, heads):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, width) / math.sqrt(width))
        self.attn = Attention(width, heads)
        self.norm = nn.LayerNorm(width, EPS)
        self.mlp = mlp(width, hidden)

    def scores(self, x):
        """Tokens (B,N,C) -> attention logits of the probe (B,N,nh), up to a constant the softmax ignores."""
        wq, wk, _ = self.attn.qkv.weight.unflatten(0, (3, self.attn.heads, -1))  # each (nh, hd, C)
        q = wq @ self.probe[0, 0] + self.attn.qkv.bias.unflatten(0, (3, *wq.shape[:2]))[0]  # (nh, hd)
        return x @ torch.einsum("hd,hdc->ch", q, wk) / math.sqrt(q.shape[-1])  # (B, N, nh)

    def values(self, x):
        """Tokens (B,N,C) -> values (B,N,nh,hd)."""
        value = F.linear(x, self.attn.qkv.weight.chunk(3)[2], self.attn.qkv.bias.chunk(3)[2])  # (B, N, C)
        return value.unflatten(-1, (self.attn.heads, -1))

    def finish(self, pooled):
        """Attention-weighted values (...,C) -> embedding (...,C), not normalised."""
        pooled = self.attn.proj(pooled)  # (..., C)
        return pooled + self.mlp(self.norm(pooled))

    def forward(self, x):
        weights = self.scores(x).softmax(1)  # (B, N, nh)
        return self.finish(torch.einsum("bnh,bnhd->bhd", weights, self.values(x)).flatten(1))  # (B, C)


def resize_positions(table: Tensor, grid: tuple[int, int], naflex: bool) -> Tensor:
    """Square table (G*G,C) -> (h*w,C): bicubic (fixed resolution) or bilinear with antialias (NaFlex)."""
    side = math.isqrt(len(table))
    if tuple(grid) == (side, side):
        return table
    x = table.float().T.unflatten(1, (side, side))[None]  # (1, C, G, G); CPUs have no bf16 antialias
    x = F.interpolate(x, grid, mode="bilinear" if naflex else "bicubic", antialias=naflex)  # (1, C, h, w)
    return x[0].flatten(1).T.to(table.dtype)


class VisionTower(nn.Module):
    """SigLIP 2's image tower with eomt.py's encoder interface, plus its MAP head. Any H and W the patch
    divides will do, as NaFlex needs; `grid` is the side of the position table, `naflex` how it is resized.
    `reach` > 0 lets a patch see only others so many patches away, as toy towers need to stay local."""

    mean, std, prefix = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0

    def __init__(self, width, hidden, depth, heads, patch=16, grid=16, naflex=False, reach=0):
        super().__init__()
        self.config = dict(width=width, hidden=hidden, depth=depth, heads=heads, patch=patch, grid=grid,
                           naflex=naflex, reach=reach)
        self.width, self.patch, self.naflex, self.reach = width, patch, naflex, reach
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(torch.randn(grid * grid, width) / math.sqrt(width))
        self.blocks = nn.ModuleList(Block(width, hidden, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, EPS)
        self.head = MapHead(width, hidden, heads)

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Normalised images (B,3,H,W) -> tokens (B,h*w,C) and the patch grid (h,w)."""
        x = self.patch_embed(images)  # (B, C, h, w)
        grid = tuple(x.shape[-2:])
        return x.flatten(2).mT + resize_positions(self.positions, grid, self.naflex), grid

    def attention(self, grid, attend=F.scaled_dot_product_attention):
        """The attention of one forward pass: `attend`, limited by `reach`; positions are added in `embed`."""
        if not self.reach:
            return attend
        axes = (torch.arange(side, device=self.positions.device) for side in grid)
        at = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)  # (N, 2)
        near = (at[:, None] - at).abs().amax(-1) <= self.reach  # (N, N)
        return partial(_attend_near, near, attend)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B,3,H,W) -> tokens after the final norm (B,N,C); `head` makes of them (B,C)."""
        x, grid = self.embed(images)  # (B, N, C)
        attend = self.attention(grid)
        for block in self.blocks:
            x = block(x, attend)  # (B, N, C)
        return self.norm(x)


def _attend_near(near, attend, q, k, v):
    """Patches, the last rows, see near patches and all rows before these; those rows as `attend` says."""
    start = k.shape[2] - len(near)
    near = F.pad(near, (start, 0), value=True)  # (h*w, start+h*w)
    patches = F.scaled_dot_product_attention(q[:, :, start:], k, v, attn_mask=near)  # (B, nh, h*w, hd)
    return torch.cat([attend(q[:, :, :start], k, v), patches], 2) if start else patches


class TextTower(nn.Module):
    """SigLIP 2's text tower. It carries the pair's logit_scale (a logarithm) and logit_bias."""

    def __init__(self, width, hidden, depth, heads, vocab=256000, length=LENGTH, out=None):
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Parameter(torch.randn(length, width) / math.sqrt(width))
        self.blocks = nn.ModuleList(Block(width, hidden, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, EPS)
        self.head = nn.Linear(width, out or width)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(10.0)]))  # both starts: SigLIP paper, alg. 1
        self.logit_bias = nn.Parameter(torch.tensor([-10.0]))

    def forward(self, ids: Tensor) -> Tensor:
        """Ids int64 (n,L) -> embeddings (n,out), not normalised: of the last position, padding or not."""
        assert ids.shape[1] == len(self.positions), f"ids {tuple(ids.shape)}, L is {len(self.positions)}"
        x = self.tokens(ids) + self.positions  # (n, L, C)
        for block in self.blocks:
            x = block(x)  # (n, L, C), no mask: SigLIP attends to padding too
        return self.head(self.norm(x[:, -1]))


# ---- Checkpoints -------------------------------------------------------------------------------------------
RENAMES = (  # ours -> Hugging Face's, applied in this order
    ("patch_embed.", "embeddings.patch_embedding."), ("positions", "embeddings.position_embedding.weight"),
    ("tokens.", "embeddings.token_embedding."), ("blocks.", "encoder.layers."),
    ("head.attn.qkv.", "head.attention.in_proj_"), ("head.attn.proj.", "head.attention.out_proj."),
    ("head.norm.", "head.layernorm."), (".attn.proj.", ".self_attn.out_proj."), (".attn.", ".self_attn."),
    (".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."),
)
PARTS = {  # the final norm's name there; what else a file holds; our names, whose shapes give the sizes
    "vision": ("post_layernorm.", ("text_model.", "logit_scale", "logit_bias"), ("patch_embed.weight",)),
    "text": ("final_layer_norm.", ("vision_model.",), ("tokens.weight", "head.weight")),
}


def load(path: str | Path, part: str, heads: int | None = None) -> VisionTower | TextTower:
    """The "vision" or "text" tower of a safetensors file or Hugging Face folder (one file or shards), fp32.

    Sizes come from the tensors, but `heads` of widths outside SIZES. ValueError lists all that do not fit.
    """
    final, others, names = PARTS[part]
    found, said = {}, {}
    for file in _files(Path(path)):
        tensors, header = _read(file, others)
        said |= header
        found |= {key.removeprefix(f"{part}_model."): value for key, value in tensors.items()}  # bare or not
    keys = [_foreign(name, final)[0] for name in ("positions", "blocks.0.mlp.fc1.weight", *names)]
    _check_keys(path, part, [key for key in keys if key not in found], [])
    positions, fc1, first, *last = (found[key] for key in keys)
    known = {width: nh for width, _, _, nh in SIZES.values()}.get(positions.shape[1])
    heads = heads or int(said.get("heads", 0)) or known
    if heads is None:
        raise ValueError(f"{path}!{part}: width {positions.shape[1]} is no SigLIP 2 size; give heads=")
    depth = 1 + max(int(key.split(".")[2]) for key in found if key.startswith("encoder.layers."))
    sizes = (positions.shape[1], len(fc1), depth, heads)
    with torch.device("meta"):  # the file's tensors become the parameters: no second copy, no random start
        if part == "text":
            tower = TextTower(*sizes, len(first), len(positions), len(last[0]))
        else:
            naflex = first.ndim == 2  # (C, ph*pw*3), where fixed resolution has (C, 3, ph, pw)
            patch = math.isqrt(first.shape[1] // 3) if naflex else first.shape[2]
            tower = VisionTower(*sizes, patch, math.isqrt(len(positions)), naflex, int(said.get("reach", 0)))
            if naflex:
                found[keys[2]] = first.unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2)  # (C, 3, ph, pw)
    wanted = {name: _foreign(name, final) for name in tower.state_dict()}
    flat = {key for keys in wanted.values() for key in keys}
    _check_keys(path, part, sorted(flat - found.keys()), sorted(found.keys() - flat))
    tower.load_state_dict({name: torch.cat([found[key] for key in keys]) for name, keys in wanted.items()},
                          assign=True)
    return tower.eval()


def save(folder: str | Path, vision: VisionTower, text: TextTower):
    """Both towers as `folder`/model.safetensors with a SigLIP 2 checkpoint's names, which `load` reads."""
    from safetensors.torch import save_file
    state = {}
    for part, tower in (("vision", vision), ("text", text)):
        for name, value in tower.state_dict().items():
            keys, root = _foreign(name, PARTS[part][0]), "" if name.startswith("logit_") else f"{part}_model."
            if name == "patch_embed.weight" and tower.naflex:
                value = value.permute(0, 2, 3, 1).flatten(1)  # (C, ph*pw*3)
            state |= {root + key: v.clone() for key, v in zip(keys, value.chunk(len(keys)), strict=True)}
    Path(folder).mkdir(parents=True, exist_ok=True)
    header = {"format": "pt", "heads": str(vision.config["heads"]), "reach": str(vision.reach)}
    save_file(state, Path(folder, "model.safetensors"), header)


def fetch(name: str | Path) -> Path:
    """A local path as it is; else a Hugging Face repository's weights and tokenizer, downloaded."""
    if Path(name).exists() or str(name).count("/") != 1:
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(str(name), allow_patterns=["*.safetensors*", "*.json", "tokenizer*"]))
    except (ImportError, OSError, ValueError) as error:  # not installed; offline; not there
        raise FileNotFoundError(f"{name}: no such folder, and not fetched from Hugging Face "
                                f"({type(error).__name__}); download it and give its path") from None


def _foreign(name, final):
    """Our parameter name -> the checkpoint's names whose rows, stacked, make it."""
    if name.startswith("norm."):
        return [name.replace("norm.", final)]
    for ours, theirs in RENAMES:
        name = name.replace(ours, theirs)
    return [name.replace(".qkv.", f".{part}_proj.") for part in "qkv"] if ".qkv." in name else [name]


def _check_keys(path, part, missing, unexpected):
    if missing or unexpected:
        raise ValueError(f"{path}!{part}: {len(missing)} missing {missing}, {len(unexpected)} unexpected "
                         f"{unexpected}; give a SigLIP 2 checkpoint that has the {part} tower")


def _read(file, skip=()):
    """Tensors of a safetensors file, fp32, but those whose name starts with one of `skip`; its header."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(file, "pt") as tensors:
            keys = [key for key in tensors.keys() if not key.startswith(skip)]
            return {key: tensors.get_tensor(key).float() for key in keys}, tensors.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file}: no safetensors file ({error}); delete it and get it again") from None


def _files(path):
    """The safetensors files of a file or folder."""
    index = path / "model.safetensors.index.json"
    try:
        shards = json.loads(index.read_text())["weight_map"] if index.is_file() else {"": "model.safetensors"}
        files = [path] if path.is_file() else [path / name for name in sorted(set(shards.values()))]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{index}: no list of weight files ({str(error)[:80]!r}); get it again") from None
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise FileNotFoundError(f"{path}: no {', '.join(absent)}; give a SigLIP 2 file or whole folder")
    return files


# ---- Text --------------------------------------------------------------------------------------------------
def canonical(text: str) -> str:
    """Lower-case, `_` to space, no ASCII punctuation, single spaces: as big_vision's zero-shot evaluation."""
    text = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    return " ".join(text.lower().split())


class Tokenizer:
    """Gemma BPE from tokenizer.json or tokenizer.model (file or folder) with SigLIP 2's settings forced:
    canonical text, no bos, eos last (truncation keeps it), right padding with 0 to exactly `length` ids."""

    def __init__(self, path: str | Path, length: int = LENGTH):
        files = Path(path), Path(path, "tokenizer.json"), Path(path, "tokenizer.model")
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{path}: no tokenizer.json or tokenizer.model; give SigLIP 2's folder")
        self.length = length
        if file.suffix == ".json":
            from tokenizers import Tokenizer as Backend
            model = Backend.from_file(str(file))
            model.no_padding()
            model.no_truncation()
            name = model.id_to_token
            self.pieces = lambda text: model.encode(text, add_special_tokens=False).ids
        else:
            from sentencepiece import SentencePieceProcessor
            model = SentencePieceProcessor(model_file=str(file))
            name = model.id_to_piece
            self.pieces = lambda text: model.encode(text, add_bos=False, add_eos=False)
        if (name(PAD), name(EOS)) != ("<pad>", "<eos>"):
            raise ValueError(f"{file}: ids 0, 1 are {name(PAD)}, {name(EOS)}; give Gemma's, <pad>, <eos>")

    def encode(self, text: str) -> list[int]:
        """Lower-cased text, punctuation kept, as exactly `length` ids."""
        ids = self.pieces(text.lower())[: self.length - 1] + [EOS]
        return ids + [PAD] * (self.length - len(ids))

    def __call__(self, texts: list[str]) -> Tensor:
        """Texts, any case and punctuation -> int64 (n,length)."""
        return torch.tensor([self.encode(canonical(text)) for text in texts])


@torch.no_grad()
def embed_text(tower: TextTower, tokenizer: Tokenizer, prompts: list[list[list[str]]],
               cache: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Prompts per class, per synonym -> unit rows fp32 (R,C_t), one a synonym, and their class int64 (R,).

    A row is the normalised mean of its prompts' unit embeddings. `cache` is a safetensors file of rows named
    by the sha256 of (all tower weights, the prompts' token ids); rows it lacks are computed and added.
    """
    from safetensors.torch import save_file
    weights = hashlib.sha256()  # about 1 s per GB
    for name, value in tower.state_dict().items():
        weights.update(name.encode() + value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    rows = _read(cache)[0] if cache and Path(cache).is_file() else {}
    cached, picked = len(rows), []
    if not prompts:
        raise ValueError("prompts: no class; give at least one")
    for k, synonyms in enumerate(prompts):
        if not synonyms or not all(synonyms):
            raise ValueError(f"prompts: class {k} has no synonym or one without prompts; give one")
        for ids in map(tokenizer, synonyms):  # (n, L)
            if ids.max() >= (known := tower.tokens.num_embeddings):
                raise ValueError(f"tokenizer: makes id {ids.max()}, the tower knows {known}; give its own")
            key = hashlib.sha256(weights.digest() + ids.numpy().tobytes()).hexdigest()
            if key not in rows:  # synonym by synonym: a row does not depend on what else is missing
                units = F.normalize(tower(ids.to(tower.positions.device)).float(), dim=-1)  # (n, C_t)
                rows[key] = F.normalize(units.mean(0), dim=0).cpu()  # (C_t,)
            picked.append((rows[key], k))
    if cache and len(rows) > cached:
        save_file(rows, f"{cache}.{os.getpid()}.tmp")
        os.replace(f"{cache}.{os.getpid()}.tmp", cache)
    return torch.stack([row for row, _ in picked]), torch.tensor([k for _, k in picked])


def text_rows(weights: str | Path, tokenizer: str | Path, prompts: list[list[list[str]]],
              cache: str | Path | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Text tower of a checkpoint, used once, freed -> rows (R,C_t), owner (R,), logit_scale, logit_bias."""
    tower = load(fetch(weights), "text")
    reader = Tokenizer(fetch(tokenizer or weights), len(tower.positions))
    return *embed_text(tower, reader, prompts, cache), tower.logit_scale.detach(), tower.logit_bias.detach()


# ---- Regions and classes -----------------------------------------------------------------------------------
def grid_logits(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Exact masks bool (T,H,W) -> mask logits (T,h*w) of the share of every patch they cover."""
    return F.adaptive_avg_pool2d(masks.float(), grid).flatten(1).logit(0.02)  # (T, h*w)


def map_pool(tower: VisionTower, patches: Tensor, mask_logits: Tensor, gamma=4.0, mode="map") -> Tensor:
    """Tokens after the final norm (B,N,C), mask logits (B,Q,N) -> unit region embeddings fp32 (B,Q,C).

    "map": the MAP head with softmax_n(e_hn + log sigmoid(gamma z_qn)); gamma 0 is the image embedding,
    infinite the head on the hard mask. "value": e = 0. "mean": mask average of x. z gets no gradient.
    """
    assert mode in ("map", "value", "mean"), mode
    head = tower.head
    with torch.autocast(patches.device.type, enabled=False):
        x = patches.to(head.probe.dtype)
        log_mask = -F.softplus(-gamma * mask_logits.detach().float())  # (B, Q, N); logsigmoid is -inf in ONNX
        mask = (log_mask - log_mask.amax(-1, keepdim=True)).exp()  # (B, Q, N), 1 at the best patch
        if mode == "mean":
            return F.normalize(mask @ x.float(), dim=-1)
        # exp(e + log m) = m exp(e): masks meet values in ONE matmul, and no (B,nh,Q,N) exists. The floor of
        # -60 keeps the denominator in fp32's range for a mask whose patches the probe ignores.
        e = head.scores(x).float()  # (B, N, nh)
        e = (e - e.amax(1, keepdim=True)).clamp(min=-60) if mode == "map" else torch.zeros_like(e)
        weight = e.exp()[..., None]  # (B, N, nh, 1)
        packed = torch.cat([weight * head.values(x).float(), weight], -1)  # (B, N, nh, hd+1)
        pooled = (mask @ packed.flatten(2)).unflatten(-1, packed.shape[2:])  # (B, Q, nh, hd+1)
        pooled = (pooled[..., :-1] / pooled[..., -1:]).flatten(2)  # (B, Q, C)
        return F.normalize(head.finish(pooled.to(x.dtype)).float(), dim=-1)


def class_similarity(vectors: Tensor, rows: Tensor, owner: Tensor, num_classes: int) -> Tensor:
    """Vectors (...,C_t), rows (R,C_t), the rows' class (R,) -> cosine of the best synonym (...,K), fp32."""
    with torch.autocast(vectors.device.type, enabled=False):  # bf16 cosines times 100 are half a logit off
        cosine = F.normalize(vectors.float(), dim=-1) @ F.normalize(rows.float(), dim=-1).T  # (..., R)
    best = cosine.new_full((*cosine.shape[:-1], num_classes), -1.0)  # (..., K)
    return best.scatter_reduce(-1, owner.expand_as(cosine), cosine, "amax", include_self=False)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T, to 1 %, that minimises cross_entropy(logits / T, labels); logits (n,K), labels (n,)."""
    return min(torch.logspace(-2, 2, 401).tolist(), key=lambda t: F.cross_entropy(logits / t, labels).item())


def frequency_bias(counts: Tensor, seen: Tensor) -> Tensor:
    """Training segments a class (K,), seen (K,) -> logit adjustment (K,): -log frequency, unseen the mean."""
    bias = -(counts.clamp(min=1) / counts[seen].sum()).log()
    return torch.where(seen, bias, bias[seen].mean())


@torch.no_grad()
def centres(rows: Tensor, count: int, rounds: int = 20) -> Tensor:
    """k-means of text rows (R,C_t) -> (count,C_t), repeated where there are fewer rows than centres."""
    if len(rows) <= count:
        return rows.repeat(-(-count // len(rows)), 1)[:count]
    centre = rows[torch.linspace(0, len(rows) - 1, count).long()].clone()  # (count, C_t)
    for _ in range(rounds):
        nearest = torch.cdist(rows, centre).argmin(1)  # (R,)
        for k in nearest.unique().tolist():
            centre[k] = rows[nearest == k].mean(0)
    return centre


class OpenVocabHead(nn.Module):
    """A trained classifier of query tokens and SigLIP 2's own of region embeddings, combined.

    Training: queries (B,Q,C) -> logits (B,Q,S+1) over the S seen classes and void; `column` (K,) int64 is
    each class's column, -1 where unseen: an unseen row is no target, no negative, and gets no gradient.
    Eval: queries, region (B,Q,C_t) -> log-probabilities (B,Q,K+1), void last. The vocabulary, rows (R,C_t)
    and owner (R,) of `embed_text` and seen (K,), is in buffers and so in the checkpoint.
    """

    def __init__(self, width, rows, owner, seen, logit_scale, logit_bias):
        super().__init__()
        out = rows.shape[1]
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
                                 nn.Linear(width, out))
        self.void = nn.Parameter(torch.randn(out) / math.sqrt(out))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's start
        for name, value in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
            self.register_buffer(name, torch.as_tensor(value).detach().float().reshape(()).clone())
        self.kept = {}  # of `calibrate`, by a new vocabulary
        self.set_classes(rows, owner, seen)
        self.register_load_state_dict_post_hook(lambda m, _: m.set_classes(m.rows, m.owner, m.seen))

    def set_classes(self, rows: Tensor, owner: Tensor, seen) -> None:
        """Swaps the vocabulary; of the calibration only `kept` goes on: the rest is of the old classes."""
        seen = torch.as_tensor(seen, dtype=torch.bool).to(self.void.device)
        assert len(rows) == len(owner) and {*owner.tolist()} == {*range(len(seen))}, f"{rows.shape}, {owner}"
        rows, owner, self.num_seen = rows.to(seen.device).float(), owner.to(seen.device), int(seen.sum())
        for name, value in (("rows", rows), ("owner", owner), ("seen", seen)):
            self.register_buffer(name, value)
        self.register_buffer("column", torch.where(seen, seen.cumsum(0) - 1, -1), persistent=False)  # (K,)
        self.register_buffer("seen_rows", seen[owner].nonzero()[:, 0], persistent=False)
        self.calibrate(**self.kept)

    def calibrate(self, alpha=0.4, beta=0.8, temp_in=1.0, temp_out=1.0, bias=0.0, class_bias=0.0,
                  reject=-math.inf) -> None:
        """Weights of the region classifier on seen (alpha) and unseen (beta) classes, temperatures, `bias`
        off the seen classes, class_bias (K,) on all, energy under which a mask is void."""
        for key, value, low, top in (("alpha", alpha, 0, 1), ("beta", beta, 0, 1), ("bias", bias, -999, 999)):
            if not low <= value <= top:  # nor is nan
                raise ValueError(f"ov-{key} {value}: out of range; give a number from {low} to {top}")
        shift = torch.as_tensor(class_bias, device=self.seen.device) - bias * self.seen.float()  # (K,)
        if shift.any() and (shift == shift[0]).all():
            raise ValueError(f"{f'ov-bias {bias}' if bias else 'ov-class-bias'}: equal for all {len(shift)} "
                             "classes, which softmax ignores; use it where some get more than others")
        self.register_buffer("shift", shift, persistent=False)
        self.kept = dict(alpha=alpha, beta=beta, temp_in=temp_in, temp_out=temp_out)
        self.alpha, self.beta, self.temp_in, self.temp_out, self.reject = *self.kept.values(), reject

    def in_logits(self, queries: Tensor) -> Tensor:
        """Tokens (B,Q,C) -> trained logits of classes (in training: of seen ones) and void (B,Q,K+1)."""
        rows, owner, count = self.rows, self.owner, len(self.seen)
        if self.training:
            rows, owner, count = rows[self.seen_rows], self.column[owner[self.seen_rows]], self.num_seen
        rows, owner = torch.cat([rows, self.void[None]]), F.pad(owner, (0, 1), value=count)  # R+1 rows
        cosine = class_similarity(self.mlp(queries), rows, owner, count + 1)  # (B, Q, K+1)
        return self.log_scale.exp().clamp(max=100) * cosine  # 100: CLIP's ceiling

    def out_logits(self, region: Tensor) -> Tensor:
        """Unit region embeddings (B,Q,C_t) -> SigLIP 2's logits (B,Q,K); their sigmoid is the presence."""
        cosine = class_similarity(region, self.rows, self.owner, len(self.seen))  # (B, Q, K)
        return self.logit_scale.exp() * cosine + self.logit_bias

    def energy(self, l_out: Tensor) -> Tensor:
        """(B,Q,K) -> T (logsumexp(l/T) - log K) (B,Q): low where no class fits."""
        return self.temp_out * ((l_out / self.temp_out).logsumexp(-1) - math.log(l_out.shape[-1]))

    def combine(self, l_in: Tensor, l_out: Tensor) -> Tensor:
        """`in_logits` (B,Q,K+1), `out_logits` (B,Q,K) -> finite log-probabilities (B,Q,K+1), void last."""
        l_in = (l_in / self.temp_in).log_softmax(-1)  # (B, Q, K+1)
        void, known = l_in[..., -1:], l_in[..., :-1].logsumexp(-1, keepdim=True)  # log of p_void, 1 - p_void
        p_out = (l_out / self.temp_out).log_softmax(-1)  # (B, Q, K)
        weight = torch.where(self.seen, self.alpha, self.beta)  # (K,)
        p = (1 - weight) * (l_in[..., :-1] - known) + weight * p_out + self.shift  # (B, Q, K)
        # A softmax over one to three classes is near 1 for anything: there only presence says "an object".
        best = (p_out if len(self.seen) >= 4 else -F.softplus(-l_out)).amax(-1, keepdim=True)  # (B, Q, 1)
        known = torch.logaddexp(known, void + best - math.log(2))  # 1 - p_void (1 - best / 2)
        void = void + torch.log1p(-0.5 * best.exp())  # (B, Q, 1)
        rejected = self.energy(l_out)[..., None] < self.reject  # (B, Q, 1)
        known = known.masked_fill(rejected, math.log(1e-6))
        void = void.masked_fill(rejected, math.log1p(-1e-6))
        return torch.cat([p.log_softmax(-1) + known, void], -1)

    def forward(self, queries: Tensor, region: Tensor | None = None) -> Tensor:
        l_in = self.in_logits(queries)  # (B, Q, K+1)
        return l_in if self.training else self.combine(l_in, self.out_logits(region))
