"""Low-rank adapters (LoRA) on the linear layers of a tower's last blocks: add, switch off, merge, save.

In: an nn.ModuleList of blocks whose linears are named qkv (or q_proj, k_proj, v_proj), fc1, fc2; the ranks.
Out: the same model with `LoRALinear` in their place; state dicts of the adapters alone, a few MB.

    tower.requires_grad_(False)
    add(tower.blocks, last_n=12, rank_attn=16, rank_ffn=32)
    optimizer = torch.optim.AdamW(parameters(tower))
    with torch.no_grad(), disabled(tower):
        teacher = tower(images)                             # the same tower without its adapters
    save_file(state_dict(tower), "adapters.safetensors")    # load(tower, state) reads them back
    merge(tower)                                            # plain linears again, the same numbers
"""
# SPDX-License-Identifier: MIT
import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION = {"qkv": 3, "q_proj": 1, "k_proj": 1, "v_proj": 1}  # linear's name -> adapters that share its rows
FFN = {"fc1": 1, "fc2": 1}


class LoRALinear(nn.Module):
    """base(x) + alpha / rank * B (A x), base frozen.

    A fused qkv linear has `parts` = 3 adapters, for q, k and v: peft's numbers on three separate linears,
    where one adapter over the fused rows would make them share A. The A's are stacked: x is read once.
    A starts kaiming-uniform over the true fan-in, U(-1/sqrt(in), 1/sqrt(in)), as in peft; B starts at 0.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, parts: int = 1):
        super().__init__()
        if rank < 1 or base.out_features % parts:
            raise ValueError(f"LoRA: rank {rank}, {base.out_features} rows in {parts} parts; give a rank > 0")
        self.base, self.scale, self.enabled = base.requires_grad_(False), alpha / rank, True
        bound = 1 / math.sqrt(base.in_features)  # kaiming_uniform_(a=sqrt(5)) written out
        like = dict(device=base.weight.device, dtype=torch.float32)
        shape = parts, rank, base.in_features
        self.A = nn.Parameter(torch.empty(shape, **like).uniform_(-bound, bound))  # (parts, rank, in)
        self.B = nn.Parameter(torch.zeros(parts, base.out_features // parts, rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        """x (...,in) -> (...,out). The frozen weight asks for no gradient: no dW, x kept for A alone."""
        y = self.base(x)  # (..., out)
        if not self.enabled:
            return y
        low = F.linear(x, self.A.flatten(0, 1).to(x.dtype))  # (..., parts*rank)
        low = low.unflatten(-1, self.A.shape[:2])  # (..., parts, rank)
        delta = torch.einsum("...pr,por->...po", low, self.B.to(low.dtype))  # (..., parts, out/parts)
        return torch.add(y, delta.flatten(-2), alpha=self.scale)

    def delta(self) -> Tensor:
        """What the adapter adds to the base's weight, fp32 (out,in)."""
        return self.scale * (self.B.float() @ self.A.float()).flatten(0, 1)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """Every adapter of the model under its module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add(blocks: nn.ModuleList, last_n: int, rank_attn: int, rank_ffn: int) -> None:
    """Puts adapters into the last `last_n` blocks, in place; rank 0 leaves that kind of layer alone.

    alpha = 2 rank. Freezes the adapted linears only; the rest of the tower is the caller's to freeze. Raises
    ValueError where there is nothing to adapt: no such block, no rank, no linear layer of a known name.
    """
    if adapters(blocks):
        raise ValueError("LoRA: these blocks already have adapters; merge them, or load into them")
    if not 1 <= last_n <= len(blocks):
        raise ValueError(f"LoRA: last_n {last_n}: there are {len(blocks)} blocks; take 1 to {len(blocks)}")
    if min(rank_attn, rank_ffn) < 0 or rank_attn == rank_ffn == 0:
        raise ValueError(f"LoRA: rank_attn {rank_attn}, rank_ffn {rank_ffn}: 0 leaves a kind of layer alone; "
                         "take 1 or more for one of them")
    adapted = blocks[-last_n:]
    linears = {name: module for name, module in adapted.named_modules() if isinstance(module, nn.Linear)}
    found = dict.fromkeys(name.rpartition(".")[2] for name in linears)  # each name once, in order
    for kind, rank, names in (("rank_attn", rank_attn, ATTENTION), ("rank_ffn", rank_ffn, FFN)):
        if rank and not names.keys() & found.keys():
            raise ValueError(f"LoRA: {kind} {rank}: looks for linear layers named {', '.join(names)}, found "
                             f"{', '.join(found) or 'none'}; rename them, or take {kind} 0")
    ranks = dict.fromkeys(ATTENTION, rank_attn) | dict.fromkeys(FFN, rank_ffn)
    for name, base in linears.items():
        leaf = name.rpartition(".")[2]
        if rank := ranks.get(leaf):
            adapted.set_submodule(name, LoRALinear(base, rank, 2 * rank, (ATTENTION | FFN)[leaf]))


@torch.no_grad()
def merge(model: nn.Module) -> int:
    """Folds every adapter into its base weight and puts the plain linear back; returns how many it was."""
    found = adapters(model)
    if "" in found:
        raise ValueError("LoRA: merge: this is an adapter, its place is not known; give the model it is in")
    for name, adapter in found.items():
        adapter.base.weight += adapter.delta()  # summed in fp32
        model.set_submodule(name, adapter.base)
    return len(found)


@contextlib.contextmanager
def disabled(model: nn.Module):
    """Inside, the model is its frozen self, bit for bit: the distillation teacher without a second copy."""
    before = [(adapter, adapter.enabled) for adapter in adapters(model).values()]
    for adapter, _ in before:
        adapter.enabled = False
    try:
        yield model
    finally:
        for adapter, enabled in before:
            adapter.enabled = enabled


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The A's and B's of every adapter, in module order."""
    return [weight for adapter in adapters(model).values() for weight in (adapter.A, adapter.B)]


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters alone: `<module>.A` (parts,rank,in) and `<module>.B` (parts,out/parts,rank)."""
    return {f"{name}.{kind}": adapter.get_parameter(kind).detach()
            for name, adapter in adapters(model).items() for kind in "AB"}


@torch.no_grad()
def load(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies `state_dict`'s tensors into the adapters; ValueError lists all missing, extra or misshapen."""
    own = state_dict(model)
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
              for name in own if name in state and state[name].shape != own[name].shape]
    if missing or extra or shapes:
        raise ValueError(f"LoRA: {len(missing)} missing {missing}, {len(extra)} unexpected {extra}, "
                         f"{len(shapes)} of another shape {shapes}; add adapters of the saved ranks")
    for name, value in own.items():
        value.copy_(state[name])


@torch.no_grad()
def grow(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies saved adapters into these, which may be more or of a higher rank: the same numbers, for what is
    new has B = 0. ValueError where one has no place."""
    own = state_dict(model)
    for name, value in state.items():
        axis = 1 if name.endswith(".A") else 2  # of the rank
        if name not in own or own[name].shape[axis] < value.shape[axis]:
            found = own[name].shape[axis] if name in own else "none"
            raise ValueError(f"LoRA: {name} has rank {value.shape[axis]}, here {found}; take the same last_n "
                             "and ranks, or more")
        own[name].narrow(axis, 0, value.shape[axis]).copy_(value)
