"""Adapters against peft, and what Stage B stands on: it starts as the base and merges to the same numbers."""
# SPDX-License-Identifier: MIT
import copy
import math

import pytest
import torch
from torch import nn

import lora
from siglip2 import VisionTower


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return VisionTower(width=24, hidden=40, depth=3, heads=2, patch=4, grid=4).eval().requires_grad_(False)


def images(count=2):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def trained(tower, **kw):
    """The tower with adapters whose B is no longer zero."""
    lora.add(tower.blocks, **{"last_n": 2, "rank_attn": 4, "rank_ffn": 3} | kw)
    generator = torch.Generator().manual_seed(2)
    for adapter in lora.adapters(tower).values():
        adapter.B.data.normal_(generator=generator)
    return tower


def test_add_layers_and_ranks(tower):
    lora.add(tower.blocks, 2, 4, 3)
    found = lora.adapters(tower)
    layers = ("attn.qkv", "mlp.fc1", "mlp.fc2")
    assert set(found) == {f"blocks.{i}.{layer}" for i in (1, 2) for layer in layers}
    qkv, fc2 = found["blocks.1.attn.qkv"], found["blocks.2.mlp.fc2"]
    assert qkv.A.shape == (3, 4, 24) and qkv.B.shape == (3, 24, 4)
    assert fc2.A.shape == (1, 3, 40) and fc2.B.shape == (1, 24, 3)
    assert all(adapter.scale == 2 for adapter in found.values())  # alpha = 2 rank


def test_add_rank_zero_and_separate_projections(tower):
    lora.add(tower.blocks, 1, 4, 0)
    assert list(lora.adapters(tower)) == ["blocks.2.attn.qkv"]
    block = linears("q_proj", "k_proj", "v_proj", "out_proj")
    lora.add(nn.ModuleList([block]), 1, 2, 0)
    assert list(lora.adapters(block)) == ["q_proj", "k_proj", "v_proj"]


def linears(*names):
    return nn.ModuleDict({name: nn.Linear(8, 8) for name in names})


@pytest.mark.parametrize("names, attn, ffn, words", [
    (("query", "key", "value", "dense"), 2, 0, "rank_attn 2: looks for linear layers named qkv, q_proj, "
     "k_proj, v_proj, found query, key, value, dense; "),
    (("qkv", "w12", "w3"), 2, 4, "rank_ffn 4: looks for linear layers named fc1, fc2, found qkv, w12, w3; "),
    ((), 0, 4, "rank_ffn 4: looks for linear layers named fc1, fc2, found none; "),
])
def test_add_says_which_names_it_looks_for(names, attn, ffn, words):
    """A tower of another library would be trained without the adapters that were asked for."""
    blocks = nn.ModuleList([linears(*names), linears(*names)])
    before = [type(module) for module in blocks.modules()]
    with pytest.raises(ValueError) as error:
        lora.add(blocks, 2, attn, ffn)
    assert f"LoRA: {words}" in str(error.value) and "\n" not in str(error.value)
    assert [type(module) for module in blocks.modules()] == before  # refused before anything is changed


@pytest.mark.parametrize("last_n, attn, ffn, words", [
    (16, 2, 2, "last_n 16: there are 3 blocks; take 1 to 3"),
    (0, 2, 2, "last_n 0: there are 3 blocks; take 1 to 3"),
    (-1, 2, 2, "last_n -1: there are 3 blocks; take 1 to 3"),
    (2, 0, 0, "rank_attn 0, rank_ffn 0: "),
    (2, -4, 4, "rank_attn -4, rank_ffn 4: "),
])
def test_add_refuses_numbers_that_adapt_nothing(tower, last_n, attn, ffn, words):
    with pytest.raises(ValueError, match=f"LoRA: {words}"):
        lora.add(tower.blocks, last_n, attn, ffn)
    assert not lora.adapters(tower)


def test_add_twice(tower):
    lora.add(tower.blocks, 3, 2, 2)
    with pytest.raises(ValueError, match="already have adapters"):
        lora.add(tower.blocks, 1, 2, 2)


def test_start_equals_base_bitwise(tower):
    base = tower(images())
    lora.add(tower.blocks, 3, 4, 4)
    assert torch.equal(tower(images()), base)


def test_start_distribution_is_kaiming_over_true_fan_in():
    torch.manual_seed(0)
    adapter = lora.LoRALinear(nn.Linear(400, 600), 16, 32, parts=3)
    bound = 1 / math.sqrt(400)
    assert adapter.A.abs().max() <= bound and adapter.A.abs().max() > 0.99 * bound
    assert adapter.A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not adapter.B.any()


def test_disabled_equals_base_bitwise_and_restores(tower):
    base = tower(images())
    trained(tower)
    on = tower(images())
    assert (on - base).abs().max() > 0.1
    with lora.disabled(tower):
        assert torch.equal(tower(images()), base)
        with lora.disabled(tower):
            pass
        assert torch.equal(tower(images()), base)  # the inner exit must not switch them on again
    assert torch.equal(tower(images()), on)
    with pytest.raises(RuntimeError), lora.disabled(tower):
        raise RuntimeError
    assert torch.equal(tower(images()), on)


def test_merge_same_numbers_and_plain_linears(tower):
    names = list(tower.state_dict())
    trained(tower)
    on = tower(images())
    assert lora.merge(tower) == 6
    assert list(tower.state_dict()) == names and type(tower.blocks[2].attn.qkv) is nn.Linear
    torch.testing.assert_close(tower(images()), on, atol=2e-5, rtol=0)
    assert lora.merge(tower) == 0


def test_merge_of_an_adapter_itself():
    """It has no parent to put the plain linear into; torch's words were of a target name."""
    adapter = lora.LoRALinear(nn.Linear(4, 4), 2, 4)
    weight = adapter.base.weight.clone()
    with pytest.raises(ValueError, match=r"^LoRA: merge: [^\n]+; give "):
        lora.merge(adapter)
    assert torch.equal(adapter.base.weight, weight)


def test_state_dict_adapters_alone(tower):
    fresh = copy.deepcopy(tower)
    state = lora.state_dict(trained(tower))
    assert len(state) == 12 and all(name[-2:] in (".A", ".B") for name in state)
    lora.add(fresh.blocks, 2, 4, 3)
    lora.load(fresh, state)
    assert torch.equal(fresh(images()), tower(images()))
    other = VisionTower(width=24, hidden=40, depth=3, heads=2, patch=4, grid=4)
    lora.add(other.blocks, 1, 5, 3)
    with pytest.raises(ValueError, match="(?s)6 unexpected.*blocks.1.attn.qkv.A.*2 of another shape"):
        lora.load(other, state)
    assert "\n" not in str(pytest.raises(ValueError, lora.load, other, state).value)


def test_gradients_adapters_only(tower):
    lora.add(tower.blocks, 2, 4, 3)
    adapter = lora.LoRALinear(nn.Linear(3, 4), 1, 2)
    assert {name for name, weight in adapter.named_parameters() if weight.requires_grad} == {"A", "B"}
    tower(images()).square().sum().backward()
    with_grad = {id(weight) for weight in tower.parameters() if weight.grad is not None}
    assert with_grad == {id(weight) for weight in lora.parameters(tower)} and len(with_grad) == 12
    assert all(adapter.B.grad.abs().sum() > 0 for adapter in lora.adapters(tower).values())


def test_backward_no_gradient_of_frozen_weight(tower):
    """The frozen GEMM is asked for dx only, and nothing below the first adapter runs backward."""
    lora.add(tower.blocks, 1, 4, 3)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
        loss = tower(images()).sum()
    products = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.__name__.startswith(("mm", "addmm", "bmm")):
                products.append(tuple(out.shape))
            return out

    with Count():
        loss.backward()
    assert (72, 24) not in products and (24, 72) not in products  # dW of qkv
    assert (40, 24) not in products and (24, 40) not in products  # dW of fc1 and fc2
    assert (12, 24) in products or (24, 12) in products  # dA of qkv


def test_bf16_base_keeps_fp32_adapters(tower):
    tower = trained(tower.bfloat16())
    tower(images().bfloat16()).sum().backward()
    assert all(weight.dtype == weight.grad.dtype == torch.float32 for weight in lora.parameters(tower))


@pytest.mark.parametrize("leaf", ["fc1", "qkv"])
def test_numbers_against_peft(tower, leaf):
    """Output and gradients of peft's LoRA; for the fused qkv, of three of them on three separate linears."""
    peft = pytest.importorskip("peft")
    base = tower.blocks[0].mlp.fc1 if leaf == "fc1" else tower.blocks[0].attn.qkv
    parts = 1 if leaf == "fc1" else 3
    theirs = nn.ModuleDict({f"linear{i}": nn.Linear(24, len(base.weight) // parts) for i in range(parts)})
    for i in range(parts):
        theirs[f"linear{i}"].weight.data.copy_(base.weight.chunk(parts)[i])
        theirs[f"linear{i}"].bias.data.copy_(base.bias.chunk(parts)[i])
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(theirs))
    peft.inject_adapter_in_model(config, theirs)
    ours = lora.LoRALinear(base, 4, 8, parts)
    for i, layer in enumerate(theirs.values()):
        layer.lora_B["default"].weight.data.normal_()
        ours.A.data[i].copy_(layer.lora_A["default"].weight)
        ours.B.data[i].copy_(layer.lora_B["default"].weight)
    x, weight = torch.randn(2, 5, 24), torch.randn(2, 5, len(base.weight))
    mine, peers = ours(x), torch.cat([layer(x) for layer in theirs.values()], -1)
    torch.testing.assert_close(mine, peers, atol=1e-5, rtol=0)
    (mine * weight).sum().backward()
    (peers * weight).sum().backward()
    for i, layer in enumerate(theirs.values()):
        torch.testing.assert_close(ours.A.grad[i], layer.lora_A["default"].weight.grad, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.B.grad[i], layer.lora_B["default"].weight.grad, atol=1e-4, rtol=0)
    for layer in theirs.values():
        layer.merge()
    merged = torch.cat([layer.base_layer.weight for layer in theirs.values()])
    torch.testing.assert_close(base.weight + ours.delta(), merged, atol=1e-6, rtol=0)


def test_start_distribution_against_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    theirs = nn.ModuleDict({"linear": nn.Linear(300, 50)})
    peft.inject_adapter_in_model(peft.LoraConfig(r=64, target_modules=["linear"]), theirs)
    ours = lora.LoRALinear(nn.Linear(300, 50), 64, 128)
    peers = theirs["linear"].lora_A["default"].weight
    levels = torch.linspace(0, 1, 11)
    gap = (ours.A.flatten().quantile(levels) - peers.flatten().quantile(levels)).abs().max()
    assert gap < 0.05 * peers.abs().max()
