"""eomt.py against transformers' EoMT, and its own properties."""
# SPDX-License-Identifier: MIT
import json
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eomt
from eomt import ENCODERS, EoMT, ViT, anneal, anneal_windows, load, load_encoder, save
from kernels.fp8_linear import Fp8Linear

ATOL = 1e-4  # on mask logits of size ~20; a relative tolerance would hide a wrong LayerNorm eps


def transformers():
    sys.modules.setdefault("torchvision", None)  # one of another torch breaks the import; none is needed
    return pytest.importorskip("transformers")


def normalised(images):
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (eomt.IMAGENET_MEAN, eomt.IMAGENET_STD))
    return (images.float() / 255 - mean) / std


def images(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def randomise(model, seed=0):
    """Weights large enough for mask logits of a realistic size, every tensor its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "lambda" in name or ".ls" in name or ("norm" in name and name.endswith("weight")):
                p.copy_(1 + 0.1 * noise)
            elif p.ndim == 1 or "token" in name or "pos" in name:
                p.copy_(0.3 * noise)
            elif "query" in name or name.endswith("q.weight"):
                p.copy_(noise)
            else:
                p.copy_(noise * 1.3 / p[0].numel() ** 0.5)
    return model


def hf_eomt(tmp_path, patch=16, side=64, swiglu=False, depth=4, blocks=2, width=64, heads=2, **more):
    """A small transformers Eomt with random weights, and the same loaded by us from its saved folder."""
    t = transformers()
    config = t.EomtConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, image_size=side,
        patch_size=patch, num_blocks=blocks, num_queries=7, use_swiglu_ffn=swiglu,
        num_upscale_blocks=2 if patch == 16 else 1, num_labels=5, **more)
    config._attn_implementation = "eager"
    theirs = randomise(t.EomtForUniversalSegmentation(config)).eval()
    theirs.save_pretrained(tmp_path)
    return theirs, load(tmp_path)


def compare(theirs, ours, pixels, mask_prob=None):
    with torch.no_grad():
        want = theirs(pixel_values=normalised(pixels))
        got = ours(pixels, mask_prob)[-1]
    assert want.masks_queries_logits.std() > 3  # large enough for the absolute tolerance to mean something
    torch.testing.assert_close(got.masks, want.masks_queries_logits, rtol=0, atol=ATOL)
    torch.testing.assert_close(got.classes, want.class_queries_logits, rtol=0, atol=ATOL)


# ---- parity ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("patch,side,gate", [(16, 64, 0), (14, 70, 0), (16, 96, 1), (8, 32, 0)])
def test_parity_unmasked(tmp_path, patch, side, gate):
    theirs, ours = hf_eomt(tmp_path, patch, side, bool(gate))
    theirs.attn_mask_probs.fill_(0)
    compare(theirs, ours, images(2, 3, side, side))


@pytest.mark.parametrize("patch,side", [(16, 96), (14, 84), (8, 48)])
def test_parity_masked(tmp_path, patch, side):
    theirs, ours = hf_eomt(tmp_path, patch, side)
    pixels = images(2, 3, side, side)
    compare(theirs, ours, pixels, torch.ones(2))
    unmasked, masked = ours(pixels)[-1], ours(pixels, torch.ones(2))[-1]
    assert (unmasked.masks - masked.masks).abs().max() > 1e-2  # the masks do something here


def test_parity_masked_open_after_masked(tmp_path):
    """A block with P = 0 after one with P > 0 is open; transformers re-uses the old mask there, so it is told
    to drop every query (probability just above 0) instead."""
    theirs, ours = hf_eomt(tmp_path, side=96, depth=4, blocks=3)
    theirs.attn_mask_probs.copy_(torch.tensor([1.0, 1e-12, 1e-12]))
    torch.manual_seed(0)
    compare(theirs, ours, images(2, 3, 96, 96), torch.tensor([1.0, 0.0, 0.0]))


def test_parity_all_predictions_and_gradients(tmp_path):
    theirs, ours = hf_eomt(tmp_path)
    theirs.train(), ours.train()
    pixels = images(2, 3, 64, 64)
    seen = []
    predict = theirs.predict
    theirs.predict = lambda x: seen.append(predict(x)) or seen[-1]
    theirs(pixel_values=normalised(pixels))
    got = ours(pixels, torch.ones(2))
    assert len(got) == len(seen) == 3
    for (want_masks, want_classes), prediction in zip(seen, got, strict=True):
        torch.testing.assert_close(prediction.masks, want_masks, rtol=0, atol=ATOL)
        torch.testing.assert_close(prediction.classes, want_classes, rtol=0, atol=ATOL)
    loss = lambda pairs: sum((m.sin().mean() + c.sin().mean()) for m, c in pairs)  # noqa: E731
    loss(seen).backward(), loss(got).backward()
    want = {k: p.grad for k, p in theirs.named_parameters() if p.grad is not None}
    state, _ = eomt._rename(want, "gradients")
    missing = [k for k, p in ours.named_parameters() if k not in state]
    assert not missing
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, state[name].reshape(p.shape), rtol=1e-3, atol=1e-5)


def test_parity_rectangular(tmp_path):
    """Peers take only the size they were built for; other sides must equal a peer with those positions."""
    theirs, ours = hf_eomt(tmp_path, side=64)
    theirs.attn_mask_probs.fill_(0)
    table = eomt.resample_positions(ours.encoder.pos_embed, (4, 4), (6, 3))  # (1, 18, C)
    theirs.embeddings.position_embeddings = torch.nn.Embedding.from_pretrained(table[0].detach())
    theirs.embeddings.position_ids = torch.arange(18)[None]
    theirs.grid_size = (6, 3)
    compare(theirs, ours, images(2, 3, 96, 48))


def hf_dinov3(t, seed=0):
    """A small transformers EomtDinov3 with random weights."""
    config = t.EomtDinov3Config(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, image_size=96,
        patch_size=16, num_blocks=2, num_queries=7, num_labels=5, num_register_tokens=4, layer_norm_eps=1e-5)
    config._attn_implementation = "eager"
    return randomise(t.EomtDinov3ForUniversalSegmentation(config), seed).eval()


@pytest.mark.parametrize("masked", [False, True])
def test_parity_dinov3(tmp_path, masked):
    t = transformers()
    theirs = hf_dinov3(t)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert ours.meta["size"] == 96  # no position table says it, config.json does
    theirs.attn_mask_probs.fill_(float(masked))
    compare(theirs, ours, images(2, 3, 96, 96), torch.ones(2) if masked else None)


def zoo_state(model, blocks):
    """A model-zoo style state dict (upstream's names) from one of our models."""
    state = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"\.ls([12])$", r".ls\1.gamma", key)
        key = key.replace("encoder.patch_embed.", "encoder.patch_embed.proj.")
        key = key.replace("encoder.", "encoder.backbone.")
        state[f"network.{key}"] = value
    state["network.attn_mask_probs"] = torch.ones(blocks)
    state["network.encoder.pixel_mean"] = torch.tensor(eomt.IMAGENET_MEAN).reshape(1, 3, 1, 1)
    state["network.encoder.pixel_std"] = torch.tensor(eomt.IMAGENET_STD).reshape(1, 3, 1, 1)
    state["criterion.empty_weight"] = torch.ones(model.config["num_classes"] + 1)
    return state


def test_zoo_vit_large_equals_transformers(tmp_path):
    """The published layout: 366 keys, ViT-L; 160 px keep it small."""
    t = transformers()
    side = 160
    ours = randomise(EoMT(ViT(**ENCODERS["dinov2_large"], grid=(10, 10)), 133))
    state = zoo_state(ours, 4)
    assert len(state) == 366
    path = tmp_path / "coco_panoptic_eomt_large.bin"
    torch.save(state, path)
    loaded = load(path)
    assert loaded.config == dict(num_classes=133, num_queries=200, num_blocks=4)
    theirs = t.EomtForUniversalSegmentation(t.EomtConfig(image_size=side, num_labels=133)).eval()
    theirs.load_state_dict(hf_state(ours), strict=False)
    theirs.attn_mask_probs.fill_(0)
    compare(theirs, loaded, images(1, 3, side, side))


HF_NAMES = (
    ("encoder.blocks.", "layers."), ("encoder.norm", "layernorm"), ("class_head", "class_predictor"),
    ("attn.proj", "attention.out_proj"), ("ls1", "layer_scale1.lambda1"), ("ls2", "layer_scale2.lambda1"),
    ("encoder.patch_embed", "embeddings.patch_embeddings.projection"),
    ("encoder.cls_token", "embeddings.cls_token"), ("encoder.reg_token", "embeddings.register_tokens"),
    ("mask_head.0", "mask_head.fc1"), ("mask_head.2", "mask_head.fc2"), ("mask_head.4", "mask_head.fc3"),
)


def hf_state(model):
    """transformers' new spelling, from the table of the specification (written apart from the reader's)."""
    out = {}
    for key, value in model.state_dict().items():
        if ".attn.qkv." in key:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                name = key.replace("encoder.blocks.", "layers.").replace("attn.qkv", f"attention.{part}_proj")
                out[name] = piece
            continue
        for a, b in HF_NAMES:
            key = key.replace(a, b)
        if key.startswith("upscale."):
            key = key.replace("upscale.", "upscale_block.block.").replace(".norm.", ".layernorm2d.")
        if key == "q.weight":
            key = "query.weight"
        if key == "encoder.pos_embed":
            key, value = "embeddings.position_embeddings.weight", value[0]
        out[key] = value
    return out


def test_load_spellings_agree(tmp_path):
    """Zoo, Lightning (module. and _orig_mod. inside), HF safetensors and old giant names: one model, with the
    number of query blocks that each says in its own way."""
    from safetensors.torch import save_file

    model = randomise(EoMT(ViT(64, 4, 1, 16, (4, 4), swiglu=True, ffn=170), 5, 7, 2)).eval()
    zoo, hf = zoo_state(model, 2), hf_state(model)
    fc1, fc2 = re.compile(r"mlp\.fc1"), re.compile(r"mlp\.fc2")
    old = {fc1.sub("mlp.weights_in", fc2.sub("mlp.weights_out", key)): value for key, value in hf.items()}
    new = {k: v for k, v in hf.items() if ".mlp." not in k}
    for k, v in hf.items():
        if ".mlp.fc1." in k:
            new[k.replace("fc1", "gate_proj")], new[k.replace("fc1", "up_proj")] = v.chunk(2)
        elif ".mlp.fc2." in k:
            new[k.replace("fc2", "down_proj")] = v
    torch.save(zoo, tmp_path / "zoo.bin")
    compiled = {k.replace("network.", "network._orig_mod.", 1): v for k, v in zoo.items()}
    torch.save({"state_dict": compiled, "epoch": 3}, tmp_path / "light.ckpt")
    old["attn_mask_probs"] = torch.zeros(2)
    torch.save({f"module.{k}": v for k, v in old.items()}, tmp_path / "old.bin")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text('{"num_blocks": 2, "num_attention_heads": 1}')
    save_file({k: v.contiguous() for k, v in new.items()}, tmp_path / "new" / "model.safetensors")
    pixels = images(1, 3, 64, 64)
    want = model(pixels)[-1]
    for name in ("zoo.bin", "light.ckpt", "old.bin", "new"):
        got = load(tmp_path / name)
        assert got.config == model.config and got.encoder.config == model.encoder.config, name
        for a, b in zip(got(pixels)[-1], want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    torch.save(hf, tmp_path / "silent.bin")  # nothing says it: the default of the depth
    assert load(tmp_path / "silent.bin").num_blocks == eomt.default_num_blocks(4) == 1
    (tmp_path / "new" / "config.json").write_text('{"num_blocks": 0, "num_attention_heads": 1}')
    assert load(tmp_path / "new").num_blocks == 1


@pytest.mark.parametrize("kind", ["altered", "missing", "extra", "shape"])
def test_load_names_the_key(tmp_path, kind):
    model = EoMT(ViT(64, 4, 1, 16, (4, 4)), 5, 7, 2)
    state = zoo_state(model, 2)
    key = "network.encoder.backbone.blocks.2.mlp.fc1.weight"
    value = state.pop(key)
    name = {"altered": key + "x", "extra": "network.extra", "missing": None, "shape": key}[kind]
    if kind == "extra":
        state[key] = value
    if name:
        state[name] = value.mT[:, :7] if kind == "shape" else value
    torch.save(state, tmp_path / "m.bin")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "m.bin")
    text = str(error.value)
    assert "\n" not in text and "m.bin" in text
    assert (name or "encoder.blocks.2.mlp.fc1.weight") in text
    if kind == "shape":
        assert str(tuple(value.shape)) in text


@pytest.mark.parametrize("gone", ["blocks.0.mlp.fc2.weight", "blocks.", "class_head.weight"])
def test_load_names_what_the_shapes_need(tmp_path, gone):
    """Without these the sizes of the model cannot even be known: still one line with the file."""
    state = zoo_state(EoMT(ViT(64, 4, 1, 16, (4, 4)), 5, 7, 2), 2)
    torch.save({k: v for k, v in state.items() if gone not in k}, tmp_path / "m.bin")
    with pytest.raises(ValueError, match=rf"m\.bin: missing .*{re.escape(gone)}"):
        load(tmp_path / "m.bin")


def test_load_parts_missing_or_doubled(tmp_path):
    state = hf_state(EoMT(ViT(64, 4, 1, 16, (4, 4)), 5, 7, 2))
    key = "layers.1.attention.k_proj.bias"
    torch.save({**state, f"module.{key}": state[key]}, tmp_path / "twice.bin")
    with pytest.raises(ValueError, match=r"twice.bin!module.layers.1.*the same tensor as layers.1"):
        load(tmp_path / "twice.bin")
    del state[key]  # only DINOv3 may lack it
    torch.save(state, tmp_path / "gap.bin")
    with pytest.raises(ValueError, match=r"gap.bin!.*blocks.1.attn.qkv.bias is not whole: q, v of q, k, v"):
        load(tmp_path / "gap.bin")


def fake_hub(tmp_path, monkeypatch):
    """huggingface_hub whose repositories are folders tmp_path/hub/OWNER/NAME; returns what it has fetched."""
    fetched = []

    def snapshot_download(name, allow_patterns):
        if not (tmp_path / "hub" / name).exists():
            raise FileNotFoundError(name)
        snapshot = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / "0a512b"
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in sorted((tmp_path / "hub" / name).iterdir()):
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                fetched.append(file.name)
                shutil.copy(file, snapshot / file.name)
        return str(snapshot)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    return fetched


@pytest.mark.parametrize("kind", ["ours", "sharded", "pickle", "both", "neither"])
def test_load_huggingface_files(tmp_path, monkeypatch, kind):
    """A repository may hold model.safetensors alone, an index and its parts, or a pickle, fetched last."""
    from safetensors.torch import save_file

    model, folder = tiny().eval(), tmp_path / "hub" / "someone/small"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("not asked for")
    state, shards = model.state_dict(), [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    if kind == "sharded":
        for shard, keys in zip(shards, (list(state)[::2], list(state)[1::2]), strict=True):
            save_file({key: state[key] for key in keys}, folder / shard)
        weight_map = {key: shards[k % 2] for k, key in enumerate(state)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (folder / "config.json").write_text('{"num_blocks": 2, "num_attention_heads": 2}')
    if kind in ("pickle", "both"):
        torch.save(state, folder / "pytorch_model.bin")
    if kind in ("ours", "both"):
        save(folder / "model.safetensors", model, size=32)
    fetched = fake_hub(tmp_path, monkeypatch)
    if kind == "neither":
        with pytest.raises(FileNotFoundError, match="someone/small: .*no weights.*; download ") as error:
            load("someone/small")
        assert "\n" not in str(error.value)
        return
    assert torch.equal(load("someone/small").state_dict()["q.weight"], state["q.weight"])
    want = {"ours": ["model.safetensors"], "both": ["model.safetensors"], "pickle": ["pytorch_model.bin"],
            "sharded": ["config.json", *shards, "model.safetensors.index.json"]}
    assert fetched == want[kind]


def test_load_huggingface_name(tmp_path, monkeypatch):
    """A repository's name is downloaded, and its config.json is read as in a folder."""
    theirs, ours = hf_eomt(tmp_path / "hub" / "someone/small", heads=4)
    fake_hub(tmp_path, monkeypatch)
    got = load("someone/small")
    assert got.encoder.config["heads"] == 4  # 64 wide: 1 by the rule of 64
    assert torch.equal(got.q.weight, ours.q.weight)
    with pytest.raises(FileNotFoundError, match="someone/else: .*not fetched from Hugging Face"):
        load("someone/else")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="not fetched from Hugging Face .ModuleNotFoundError"):
        load("someone/small")


@pytest.mark.parametrize("encoder", [
    dict(patch=16, grid=(6, 6)),
    dict(patch=8, grid=(6, 6), swiglu=True, ffn=176),  # two thirds of 4 * 64, up to a multiple of 8
    dict(patch=16, grid=(6, 6), rope=100.0, eps=1e-5, ffn=200)])
def test_save_hf_loads_in_transformers(tmp_path, encoder):
    t = transformers()
    ours = randomise(EoMT(ViT(64, 4, 2, registers=3, **encoder), 5, 7, 2)).eval()
    ours.meta = {"names": ["a", "b", "c", "d", "e"]}
    save(tmp_path / "out", ours, format="hf")
    kind = t.EomtDinov3ForUniversalSegmentation if "rope" in encoder else t.EomtForUniversalSegmentation
    theirs, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info  # missing, unexpected, mismatched keys, error messages
    assert theirs.config.id2label == dict(enumerate("abcde")) and theirs.config.label2id["c"] == 2
    compare(theirs.eval(), ours, images(2, 3, 6 * encoder["patch"], 6 * encoder["patch"]))
    again = load(tmp_path / "out")
    assert again.config == ours.config and again.encoder.config == ours.encoder.config
    for key, value in again.state_dict().items():
        used = value != 0 if key.endswith("qkv.bias") else ...  # DINOv3's keys have none
        assert torch.equal(value[used], ours.state_dict()[key][used])


@pytest.mark.parametrize("encoder", [
    dict(grid=(4, 5)), dict(swiglu=True, ffn=170), dict(ffn=100), dict(rope=100.0, swiglu=True)])
def test_save_hf_refuses(tmp_path, encoder):
    with pytest.raises(ValueError, match="transformers has no Eomt like this"):
        save(tmp_path / "out", EoMT(ViT(64, 2, 1, **{"grid": (4, 4), **encoder}), 5, 7, 1), format="hf")
    assert not (tmp_path / "out").exists()


def dinov3_zoo_state(model):
    """A transformers EomtDinov3 under the names of upstream's zoo files, constants included."""
    state = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"^embeddings\.", "encoder.backbone.patch_embed.", key)
        key = re.sub(r"^layers\.", "encoder.backbone.blocks.", key)
        key = re.sub(r"^layernorm\.", "encoder.backbone.norm.", key)
        key = re.sub(r"^mask_head\.fc([123])", lambda m: f"mask_head.{2 * int(m[1]) - 2}", key)
        key = key.replace("upscale_block.block.", "upscale.").replace("layernorm2d", "norm")
        key = key.replace("query.", "q.").replace("class_predictor", "class_head")
        state[key if key.startswith("criterion") else f"network.{key}"] = value.clone()
    state["network.encoder.pixel_mean"] = torch.tensor(eomt.IMAGENET_MEAN).reshape(1, 3, 1, 1)
    state["network.encoder.pixel_std"] = torch.tensor(eomt.IMAGENET_STD).reshape(1, 3, 1, 1)
    return state


def dinov3_base(t, folder, **more):
    sizes = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256)
    base = t.DINOv3ViTModel(t.DINOv3ViTConfig(**{**sizes, **more}, patch_size=16, num_register_tokens=4))
    randomise(base, seed=1).save_pretrained(folder)
    return base.state_dict()


def subtract_base(state, base):
    """What upstream publishes: the fine-tuned minus the base encoder."""
    delta = dict(state)
    for key, value in base.items():
        key = re.sub(r"^(model\.)?layer\.", "blocks.", re.sub(r"^embeddings\.", "patch_embed.", key))
        if "mask_token" not in key:
            delta[f"network.encoder.backbone.{key}"] = state[f"network.encoder.backbone.{key}"] - value
    return delta


@pytest.mark.parametrize("factor", [None, 0.7, 1.1])
def test_load_dinov3_delta(tmp_path, factor):
    """base + file equals transformers' model, whichever way the norms moved: both, down (decay), up."""
    t = transformers()
    theirs, base = hf_dinov3(t), dinov3_base(t, tmp_path / "base")
    for name, p in theirs.named_parameters():
        key = "norm.weight" if name == "layernorm.weight" else name.replace("layers.", "model.layer.")
        if factor and key in base and re.search(r"norm[12]?\.weight$", key):
            p.data = base[key] * factor
    delta = subtract_base(dinov3_zoo_state(theirs), base)
    if factor == 1.1:  # only what never changes shows it then
        delta["network.encoder.pixel_mean"] = delta["network.encoder.pixel_std"] = torch.zeros(1, 3, 1, 1)
    torch.save(delta, tmp_path / "delta.bin")
    theirs.attn_mask_probs.fill_(0)
    ours = load(tmp_path / "delta.bin", base=tmp_path / "base")
    assert ours.config == dict(num_classes=5, num_queries=7, num_blocks=2)
    compare(theirs, ours, images(2, 3, 96, 96))
    with pytest.raises(ValueError, match="delta.bin: differences to an encoder") as error:
        load(tmp_path / "delta.bin")
    assert "\n" not in str(error.value) and "facebook/dinov3" in str(error.value)


HUB = "models--tue-mps--{}/snapshots/3f512a640/pytorch_model.bin"


@pytest.mark.parametrize("name,side", [
    ("ade20k_semantic_eomt_large_512_dinov3.bin", 512), ("coco-1280.ckpt", 1280), ("base_640_2x.bin", 640),
    ("cityscapes_1024/pytorch_model.bin", 1024), (HUB.format("coco_panoptic_eomt_large_1280_dinov3"), 1280),
    ("a_1280/b_512.bin", 512), ("a_1280/b/c.bin", None), ("delta.bin", None), ("eomt_15120.bin", None),
    ("large_500.bin", None), (HUB.format("eomt"), None)])
def test_load_size_of_a_rope_model_is_said(tmp_path, capsys, name, side):
    """No position table tells the size: the published number in the name is taken, else 640, and said."""
    model = tiny(patch=16, rope=100.0, eps=1e-5)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), tmp_path / name)
    size, why = side or 640, "from its name" if side else "its name has none"
    wanted = (f"notice: {tmp_path / name} does not say its size; taken as {size} x {size} ({why}); "
              "give --size if that is wrong\n")
    got = load(tmp_path / name)
    assert got.meta["size"] == size and got.encoder.config["grid"] == [size // 16] * 2
    assert capsys.readouterr().err == wanted
    if name.endswith("pytorch_model.bin"):  # the folder's name does as well
        assert load((tmp_path / name).parent).meta["size"] == size


def test_load_size_of_a_rope_model_by_its_repository(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "hub" / "tue-mps/ade20k_semantic_eomt_large_512_dinov3"
    folder.mkdir(parents=True)
    torch.save(tiny(patch=16, rope=100.0, eps=1e-5).state_dict(), folder / "pytorch_model.bin")
    fake_hub(tmp_path, monkeypatch)
    assert load("tue-mps/ade20k_semantic_eomt_large_512_dinov3").meta["size"] == 512
    assert "dinov3 does not say its size; taken as 512 x 512 (from its name)" in capsys.readouterr().err


def test_load_size_that_a_file_says(tmp_path, capsys):
    """A position table, a config.json, our header: whatever the name, nothing is guessed and nothing said."""
    rope = tiny(patch=16, rope=100.0, eps=1e-5)
    save(tmp_path / "hf_512", rope, format="hf")
    save(tmp_path / "m_512.safetensors", rope, size=96)
    torch.save(tiny(patch=16).state_dict(), tmp_path / "positions_512.bin")
    torch.save({k[8:]: v for k, v in rope.state_dict().items() if k[:8] == "encoder."}, tmp_path / "base.bin")
    sizes = [load(tmp_path / name).meta["size"]
             for name in ("hf_512", "m_512.safetensors", "positions_512.bin")]
    load_encoder(rope.encoder, tmp_path / "base.bin")  # a training run has its own size
    assert sizes == [64, 96, 64] and "notice" not in capsys.readouterr().err


def test_load_dinov3_delta_mistakes(tmp_path):
    t = transformers()
    theirs, base = hf_dinov3(t), dinov3_base(t, tmp_path / "base")
    dinov3_base(t, tmp_path / "other", num_hidden_layers=3)
    state = dinov3_zoo_state(theirs)
    torch.save(state, tmp_path / "whole.ckpt")  # upstream's own checkpoint: same spelling, but weights
    assert torch.equal(load(tmp_path / "whole.ckpt").encoder.norm.weight, theirs.layernorm.weight)
    with pytest.raises(ValueError, match="whole.ckpt: weights, not differences"):
        load(tmp_path / "whole.ckpt", base=tmp_path / "base")
    save(tmp_path / "m.safetensors", tiny())
    with pytest.raises(ValueError, match="m.safetensors: weights, not differences"):
        load(tmp_path / "m.safetensors", base=tmp_path / "base")
    torch.save(subtract_base(state, base), tmp_path / "delta.bin")
    with pytest.raises(ValueError, match=r"other: encoder.blocks.3.* is missing or of another shape"):
        load(tmp_path / "delta.bin", base=tmp_path / "other")


@pytest.mark.parametrize("side", [70, [70, 70]])
def test_load_dinov2_encoder_from_transformers(tmp_path, side):
    t = transformers()
    config = t.Dinov2WithRegistersConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=1, patch_size=14, image_size=side,
        num_register_tokens=4)
    theirs = randomise(t.Dinov2WithRegistersModel(config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = ViT(64, 3, 1, 14, (5, 5)).eval()
    load_encoder(ours, tmp_path)
    pixels = torch.randn(2, 3, 70, 70)
    x, grid = ours.embed(pixels)
    for block in ours.blocks:
        x = block(x, ours.attention(grid))
    want = theirs(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(ours.norm(x), want, rtol=0, atol=ATOL)
    resampled = ViT(64, 3, 1, 16, (8, 8))  # the published models: patch 14 -> 16, 37x37 -> the task's grid
    load_encoder(resampled, tmp_path)
    torch.testing.assert_close(resampled.blocks[1].attn.qkv.weight, ours.blocks[1].attn.qkv.weight)


def test_load_dinov3_encoder_from_transformers(tmp_path):
    t = transformers()
    config = t.DINOv3ViTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256, patch_size=16,
        image_size=64, num_register_tokens=4)
    theirs = randomise(t.DINOv3ViTModel(config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = ViT(64, 3, 2, 16, (4, 6), rope=100.0, eps=1e-5).eval()
    load_encoder(ours, tmp_path)
    pixels = torch.randn(2, 3, 64, 96)
    x, grid = ours.embed(pixels)
    for block in ours.blocks:
        x = block(x, ours.attention(grid))
    torch.testing.assert_close(ours.norm(x), theirs(pixel_values=pixels).last_hidden_state, rtol=0, atol=ATOL)


def test_resample_patch_keeps_embedding():
    """What FlexiViT promises: a patch resized up has the same embedding under the resampled kernel."""
    kernel, patch = torch.randn(9, 3, 14, 14, dtype=torch.double).split([8, 1])
    bigger = torch.nn.functional.interpolate(patch, (16, 16), mode="bicubic", antialias=True)
    want = torch.einsum("ochw,bchw->bo", kernel, patch)
    got = torch.einsum("ochw,bchw->bo", eomt.resample_patch(kernel, 16), bigger)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# ---- properties --------------------------------------------------------------------------------------------
def tiny(num_queries=6, num_blocks=2, patch=8, **encoder):
    torch.manual_seed(0)
    return randomise(EoMT(ViT(32, 3, 2, patch, (4, 4), **encoder), 3, num_queries, num_blocks)).eval()


def test_forward_batched_equals_single():
    model, pixels = tiny(), images(3, 3, 32, 48)
    batched = model(pixels, torch.ones(2))[-1].masks
    for i in range(3):
        single = model(pixels[i:i + 1], torch.ones(2))[-1].masks[0]
        torch.testing.assert_close(single, batched[i], rtol=0, atol=1e-5)


def test_forward_number_of_predictions():
    model, pixels = tiny(), images(1, 3, 32, 32)
    assert len(model(pixels)) == 1 and len(model(pixels, torch.ones(2))) == 3
    model.train()
    assert len(model(pixels)) == 3 and model(pixels)[0].masks.shape == (1, 6, 8, 8)


def test_forward_annealing_is_per_query():
    """noise decides query by query: without its mask in the last block one query changes, and no other."""
    model, pixels = tiny(), images(1, 3, 64, 96)
    prob, noise = torch.tensor([0.0, 0.5]), torch.zeros(1, 2, 6)
    *_, before, kept = model(pixels, prob, noise)
    small = torch.nn.functional.interpolate(before.masks, (8, 12), mode="bilinear")[0]
    query = (small <= 0).flatten(1).sum(1).argmax().item()  # the query that loses most by its mask
    noise[0, 1, query] = 0.9
    dropped = model(pixels, prob, noise)[-1]
    changed = ((kept.classes - dropped.classes)[0].abs() > 1e-6).any(-1).nonzero()[:, 0].tolist()
    assert changed == [query]


def test_forward_one_query_one_block_no_registers():
    model = EoMT(ViT(32, 2, 1, 8, (2, 2), registers=0), 3, 1, 1)
    assert model.encoder.prefix == 1
    assert model(images(2, 3, 16, 24), torch.ones(1))[-1].masks.shape == (2, 1, 4, 6)


@pytest.mark.parametrize("num_blocks", [99, 4, 0, -1])
def test_num_blocks_outside_the_encoder(num_blocks):
    with pytest.raises(ValueError) as error:
        tiny(num_blocks=num_blocks)
    assert str(error.value) == f"num_blocks {num_blocks}: the encoder has depth 3; take 1 to 3"
    assert tiny(num_blocks=3).num_blocks == 3 and tiny(num_blocks=None).num_blocks == 1


def test_fallback_equals_kernels(monkeypatch):
    """eomt.py copied alone gives the same numbers as with kernels/ beside it."""
    import importlib.util

    monkeypatch.setitem(sys.modules, "kernels", None)
    spec = importlib.util.spec_from_file_location("eomt_alone", eomt.__file__)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert alone.pack_mask is not eomt.pack_mask
    model = tiny()
    other = alone.EoMT(alone.ViT(32, 3, 2, 8, (4, 4)), 3, 6, 2).eval()
    other.load_state_dict(model.state_dict())
    pixels, prob, noise = images(2, 3, 32, 40), torch.tensor([0.7, 0.4]), torch.rand(2, 2, 6)
    for atol in (1e-6, 1e-5):
        a, b = model(pixels, prob, noise)[-1], other(pixels, prob, noise)[-1]
        torch.testing.assert_close(a.masks, b.masks, rtol=0, atol=atol)
        model, other = eomt.accelerate(model), alone.accelerate(other)  # for the second time


def test_anneal_reproduces_published_windows():
    """COCO panoptic ViT-L, 12 epochs: the steps that upstream's configuration states."""
    windows = anneal_windows(88692, 4)  # 12 * 7391
    starts, ends = [14782, 29564, 44346, 59128], [29564, 44346, 59128, 73910]
    for (start, end), want_start, want_end in zip(windows, starts, ends, strict=True):
        assert abs(start - want_start) <= 0.5 and abs(end - want_end) <= 0.5
    assert anneal(0, windows) == [1.0] * 4 and anneal(80000, windows) == [0.0] * 4
    half = anneal((14782 + 29564) // 2, windows)
    assert abs(half[0] - 0.5 ** 0.9) < 1e-9 and half[1:] == [1.0] * 3


def test_save_load_round_trip(tmp_path):
    model = tiny()
    save(tmp_path / "m.safetensors", model, size=32, classes=["a", "b", "c"], step=7)
    again = load(tmp_path / "m.safetensors")
    assert again.meta == {"size": 32, "classes": ["a", "b", "c"], "step": 7}
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


def test_load_refuses_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (exec, ("raise SystemExit('payload ran')",))

    torch.save({"network.q.weight": Payload()}, tmp_path / "evil.bin")
    with pytest.raises(ValueError, match="refused: holds code"):
        load(tmp_path / "evil.bin")


@pytest.mark.parametrize("content,what", [
    (b"", "empty"), (b"<!DOCTYPE html><html>", "HTML"), (b"garbage" * 50, "damaged"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs")])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_load_faults_one_line(tmp_path, content, what, suffix):
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load(path)
    assert what in str(error.value) and "\n" not in str(error.value) and str(path) in str(error.value)


def test_load_is_not_fooled_by_its_own_length(tmp_path):
    """A safetensors file begins with the length of its header: 0x3c20 reads " <", as an HTML page may."""
    model = tiny()
    save(tmp_path / "m.safetensors", model, pad="")
    length = int.from_bytes((tmp_path / "m.safetensors").read_bytes()[:8], "little")
    save(tmp_path / "m.safetensors", model, pad="." * (0x3c20 - length))
    assert (tmp_path / "m.safetensors").read_bytes()[:3] == b" <\0"
    assert torch.equal(load(tmp_path / "m.safetensors").q.weight, model.q.weight)


def test_load_faults_nan_cut_missing(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.q.weight[0, 0] = float("nan")
    save(tmp_path / "nan.safetensors", model)
    with pytest.raises(ValueError, match=r"nan.safetensors!q.weight: NaN"):
        load(tmp_path / "nan.safetensors")
    data = (tmp_path / "nan.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:len(data) // 2])
    with pytest.raises(ValueError, match="cut or damaged"):
        load(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load(tmp_path / "none.bin")
    with pytest.raises(FileNotFoundError, match="no checkpoint in this folder"):
        load(tmp_path)


# ---- post-processing ---------------------------------------------------------------------------------------
def logits(seed=0, queries=12, classes=5, side=16):
    """Masks (Q,s,s) of blobs that share the image, two queries for some, and confident classes (Q,K+1)."""
    g = torch.Generator().manual_seed(seed)
    places = torch.randn(1, queries, 4, 4, generator=g)
    places[0, queries * 2 // 3:] = places[0, :queries - queries * 2 // 3]  # rivals for the same place
    places += 0.2 * torch.randn(places.shape, generator=g)
    field = torch.nn.functional.interpolate(places, (side, side), mode="bicubic")[0]
    masks = 9 * (field - field.topk(3, 0).values[2]) - 1
    return masks, torch.randn(queries, classes + 1, generator=g) * 6


def brute_panoptic(masks, classes, window, content, size, thing):
    """The definition, pixel by pixel: (class or -1, segment key) maps."""
    F = torch.nn.functional
    up = F.interpolate(masks[None], window, mode="bilinear")[:, :, :content[0], :content[1]]
    prob = F.interpolate(up, size, mode="bilinear")[0].sigmoid()
    score, label = classes.softmax(-1).max(-1)
    keep = [q for q in range(len(score)) if label[q] < classes.shape[-1] - 1 and score[q] > 0.8]
    out = torch.full(size, -1)
    key = torch.full(size, -1)
    if not keep:
        return out, key
    owner = torch.stack([score[q] * prob[q] for q in keep]).argmax(0)
    for k, q in enumerate(keep):
        mine, own = owner == k, prob[q] >= 0.5
        if not (mine & own).any() or mine.sum() / own.sum() < 0.8:
            continue
        out[mine & own] = label[q]
        key[mine & own] = q if thing[label[q]] else 1000 + label[q]
    return out, key


@pytest.mark.parametrize("seed", range(6))
def test_panoptic_equals_brute_force(seed):
    masks, classes = logits(seed)
    thing = [True, True, False, False, True]
    window, content, size = (64, 64), (64, 43), (50, 33)
    got = eomt.panoptic(masks, classes, window, content, size, thing)
    want, key = brute_panoptic(masks, classes, window, content, size, thing)
    found = torch.cat([torch.tensor([-1]), got.labels])[got.ids.long()]
    assert torch.equal(found, want)
    assert len(set(key[key >= 0].tolist())) == len(got.labels) == got.ids.max() > 0
    pairs = set(zip(got.ids[key >= 0].tolist(), key[key >= 0].tolist(), strict=True))
    assert len(pairs) == len(got.labels)  # one segment of ours for one of theirs


def test_panoptic_nothing_kept():
    masks, classes = logits()
    got = eomt.panoptic(masks, torch.zeros_like(classes), (64, 64), (64, 64), (10, 10), [True] * 5)
    assert got.ids.sum() == 0 and len(got.labels) == 0


def test_instance_top_scores():
    masks, classes = logits(queries=30)
    got = eomt.instance(masks, classes, (64, 64), (64, 64), (40, 40), top=20)
    assert got.masks.shape == (20, 40, 40) and (got.scores.diff() <= 0).all()
    prob = classes.softmax(-1)[:, :-1]
    best = prob.flatten().topk(20).indices
    up = torch.nn.functional.interpolate(masks[None], (64, 64), mode="bilinear")
    up = torch.nn.functional.interpolate(up, (40, 40), mode="bilinear")[0]
    want = []
    for flat in best.tolist():
        x = up[flat // 5]
        want.append((prob.flatten()[flat] * x.sigmoid()[x > 0].sum() / ((x > 0).sum() + 1e-6)).item())
    torch.testing.assert_close(got.scores, torch.tensor(sorted(want, reverse=True)))


def test_segment_sizes_and_determinism():
    model = tiny()
    model.meta = {"size": 32, "thing": [True, True, False]}
    photos = [images(3, *size, seed=i) for i, size in enumerate([(20, 57), (32, 32), (1, 90), (70, 9)])]
    results = eomt.segment(model, photos, "panoptic", batch=3)
    assert [tuple(r.ids.shape) for r in results] == [(20, 57), (32, 32), (1, 90), (70, 9)]
    single = eomt.segment(model, photos[1:2], "panoptic")[0]
    assert torch.equal(single.ids, results[1].ids)
    assert eomt.segment(model, photos, "semantic")[0].shape == (20, 57)
    assert eomt.segment(model, photos[:1], "instance")[0].masks.shape[1:] == (20, 57)


def test_segment_fills_batches_of_a_compiled_model():
    """Its CUDA graphs know one size: 3 photos, and 7 windows, arrive in fours, with the same results."""
    model, sizes = tiny(), []
    model.meta = {"size": 32, "thing": [True, True, False]}
    photos = [images(3, *size, seed=i) for i, size in enumerate([(20, 57), (32, 32), (32, 200)])]
    kinds = ("panoptic", "instance", "semantic")
    want = [eomt.segment(model, photos, kind) for kind in kinds]
    model.meta["batch"] = 4
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    for kind, before in zip(kinds, want, strict=True):
        for a, b in zip(eomt.segment(model, photos, kind), before, strict=True):
            torch.testing.assert_close(a, b)
    assert set(sizes) == {4}


def test_accelerate_without_fp8_rounds_only_on_cpu():
    """Also where DINOv3's unused key bias is folded in."""
    for encoder in ({}, dict(rope=100.0)):
        model, pixels = tiny(**encoder), images(2, 3, 32, 32)
        want = model(pixels)[-1]
        for a, b in zip(eomt.accelerate(model)(pixels)[-1], want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("encoder", [{}, dict(rope=100.0), dict(swiglu=True)])
def test_accelerate_fp8_is_near(encoder):
    """Every linear layer of the blocks, none outside, and logits off by a few percent."""
    model, pixels = tiny(**encoder), images(2, 3, 32, 32)
    want = model(pixels)[-1]
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    eomt.accelerate(model, fp8=True)
    fast = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    assert linear - fast == {"class_head", "mask_head.0", "mask_head.2", "mask_head.4"}
    for a, b in zip(model(pixels)[-1], want, strict=True):
        assert 1e-3 < (a - b).norm() / b.norm() < 0.15


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("batch", [0, 4])
def test_gpu_accelerate_equals_autocast(batch):
    model = tiny().cuda()
    model.meta = {"size": 32, "thing": [True, True, False]}
    first, second = ([images(3, 20, 57, seed=s), images(3, 32, 32, seed=s + 1)] for s in (0, 2))
    turns = [first, second] * 2  # a CUDA graph is replayed from the third call on
    want = [eomt.segment(model, photos, "instance") for photos in turns]
    eomt.accelerate(model, batch=batch)
    for got, true in zip([eomt.segment(model, photos, "instance") for photos in turns], want, strict=True):
        for a, b in zip(got, true, strict=True):
            torch.testing.assert_close(a.scores, b.scores, rtol=2e-2, atol=1e-3)


def test_accelerate_on_a_gpu_is_bf16_and_cuda_graphs(monkeypatch):
    """Weights that say they are on one: no linear layer is left for autocast to convert at every call.
    With a batch size the model is compiled, and the graphs know where a call begins."""

    class Far(torch.nn.Parameter):
        is_cuda = property(lambda self: True)

    steps, asked = [], []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append(1))
    for batch in (0, 4):
        model = tiny()
        model.compile = lambda **options: asked.append(options)
        linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        for module in linears:
            module.weight = Far(module.weight.detach())
        eomt.accelerate(model, batch=batch)
        assert {p.dtype for module in linears for p in module.parameters()} == {torch.bfloat16}
    assert asked == [dict(mode="reduce-overhead")] and model.meta["batch"] == 4
    other = tiny()  # the bf16 weights want the GPU's autocast
    for other.meta in ({}, dict(batch=4)):
        eomt._network(other, images(3, 3, 32, 32), None)
    assert steps == [1]


def test_recompute_same_gradients():
    """Bit by bit, and far fewer tensors are kept for backward."""
    gradients, kept = [], []
    for recompute in (False, True):
        model, sizes = tiny().train(), []
        model.recompute = recompute

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            predictions = model(images(2, 3, 32, 48), torch.ones(2), torch.full((2, 2, 6), 0.5))
        sum((p.masks.square().mean() + p.classes.square().mean()) for p in predictions).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        kept.append(sum(sizes))
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())
    assert kept[1] < 0.6 * kept[0], kept


def test_semantic_windows_average():
    """Long image: every window's class scores, averaged where they overlap, against a plain loop."""
    model = tiny()
    photo = images(3, 32, 75)
    got = eomt.segment(model, [photo], "semantic", (32, 32))[0]
    starts = [int(j * (32 - 21 / 2)) for j in range(3)]  # n = ceil(75 / 32) = 3, overlap 96 - 75 = 21
    assert starts[-1] + 32 == 75
    total, hits = torch.zeros(3, 32, 75), torch.zeros(75)
    with torch.no_grad():
        for s in starts:
            total[:, :, s:s + 32] += eomt.semantic(*model(photo[None, :, :, s:s + 32])[-1], (32, 32))[0]
            hits[s:s + 32] += 1
    want = total / hits
    assert torch.equal(got, want.argmax(0))


def test_segment_does_not_import_the_compiler():
    """Only a compiled model needs its CUDA graphs: a second of the first picture."""
    code = ("import sys, torch, eomt; model = eomt.EoMT(eomt.ViT(16, 1, 2, 8, (2, 2)), 3, 2, 1).eval(); "
            "eomt.segment(model, [torch.zeros(3, 9, 9, dtype=torch.uint8)], 'instance', (16, 16)); "
            "sys.exit('torch._inductor.cudagraph_trees' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(eomt.__file__).parent).returncode == 0


def test_semantic_covers_every_column(monkeypatch):
    """7 windows and a bit: upstream's float starts leave the last column without a score (0 / 0)."""
    def network(model, crops, mask_prob):
        classes = torch.tensor([[0.0, 9.0, 0.0]]).expand(len(crops), 1, 3)  # class 1 of 2
        return eomt.Prediction(torch.full((len(crops), 1, 2, 2), 9.0), classes)

    monkeypatch.setattr(eomt, "_network", network)
    got = eomt.segment(tiny(), [images(3, 640, 4481)], "semantic", (640, 640))[0]
    assert (got == 1).all()


def test_semantic_divides_by_the_number_of_windows(monkeypatch):
    """Columns 2 and 3 of the scaled image lie in two windows; resized back, column 3 mixes 1 and 2."""
    def network(model, crops, mask_prob):
        bright = torch.where(crops[:, 0] > 127, 9.0, -9.0)  # (n, 4, 4)
        classes = torch.tensor([[0.5, 1e-9, 0.5], [1e-9, 0.8, 0.2]]).log()  # dark is class 0, bright class 1
        return eomt.Prediction(torch.stack([-bright, bright], 1), classes.expand(len(crops), 2, 3))

    monkeypatch.setattr(eomt, "_network", network)
    photo = torch.zeros(3, 8, 12, dtype=torch.uint8)
    photo[:, :, 4:] = 255
    got = eomt.segment(tiny(), [photo], "semantic", (4, 4))[0]
    assert torch.equal(got, (photo[0] > 0).long())  # 0.75 * 0.5 > 0.25 * 0.8, but not > 0.25 * 1.6


def test_semantic_strip_in_bounded_memory(monkeypatch):
    """A strip of 1x1500 at window height is cut; where nothing is cut the answer does not change."""
    model, largest = tiny(), []
    resize = eomt.resize
    monkeypatch.setattr(eomt, "resize", lambda *a: largest.append(max(a[1])) or resize(*a))
    got = eomt.segment(model, [images(3, 1, 150), images(3, 150, 1)], "semantic", (32, 32))
    assert got[0].shape == (1, 150) and got[1].shape == (150, 1)
    assert max(largest) <= 8 * 32


@pytest.mark.parametrize("kind", ["panoptic", "instance", "semantic"])
@pytest.mark.parametrize("rope", [None, 100.0])
def test_segment_edge_cases(kind, rope):
    """No image, one pixel, one class, train mode, bf16: all work, and only bf16 may move the numbers."""
    torch.manual_seed(0)
    model = randomise(EoMT(ViT(32, 3, 2, 8, (4, 4), rope=rope), 1, 6, 2)).eval()
    model.meta = {"size": 32, "thing": [True]}
    assert eomt.segment(model, [], kind) == []
    photos = [images(3, 1, 1), images(3, 40, 33)]
    results = eomt.segment(model, photos, kind)
    flat = [r if kind == "semantic" else r[0] for r in results]
    assert [tuple(f.shape[-2:]) for f in flat] == [(1, 1), (40, 33)]
    model.train()
    for a, b in zip(eomt.segment(model, photos, kind), flat, strict=True):
        assert torch.equal(a if kind == "semantic" else a[0], b)
    assert model.training
    model.bfloat16()
    for a, b in zip(eomt.segment(model, photos, kind), flat, strict=True):
        assert (a if kind == "semantic" else a[0]).shape[-2:] == b.shape[-2:]
    if kind != "semantic":
        assert a.scores.dtype == torch.float32


def test_segment_says_what_is_wrong():
    model, photo = tiny(), images(3, 20, 30)
    with pytest.raises(ValueError, match=r"window: .* no size; give .*") as error:  # built by hand
        eomt.segment(model, [photo], "instance")
    assert "\n" not in str(error.value)
    assert len(eomt.segment(model, [photo], "instance", (32, 32))) == 1
    model.meta = {"size": 32}
    with pytest.raises(ValueError, match="kind stuff: unknown"):
        eomt.segment(model, [photo], "stuff")
    with pytest.raises(ValueError, match="thing: not one bool for each of 3 classes"):
        eomt.segment(model, [photo], "panoptic")
    with pytest.raises(ValueError, match="thing: not one bool for each of 3 classes"):
        eomt.segment(model, [photo], "panoptic", thing=[True, False])
    with pytest.raises(ValueError, match="36x36 pixels do not split into patches of 8"):
        eomt.segment(model, [photo], "instance", (36, 36))
    with pytest.raises(AssertionError, match="uint8"):  # 0..1 floats would silently become black
        eomt.segment(model, [torch.rand(3, 32, 32)], "instance")


# ---- post-processing against transformers' ---------------------------------------------------------------
def hf_processor(side, **more):
    transformers()
    module = pytest.importorskip("transformers.models.eomt.image_processing_pil_eomt")
    return module.EomtImageProcessorPil(
        size={"shortest_edge": side, "longest_edge": None if more.get("do_split_image") else side},
        do_rescale=False, do_normalize=False, **more)


def outputs(masks, classes, offsets=None):
    return SimpleNamespace(masks_queries_logits=masks, class_queries_logits=classes, patch_offsets=offsets)


SIZES = [(64, 64), (50, 33), (33, 50), (48, 90), (100, 64)]  # both round the scaled sides alike


@pytest.mark.parametrize("seed", range(3))
def test_panoptic_equals_transformers(seed):
    masks, classes = logits(seed, queries=30)
    thing = [True, True, False, False, True]
    for size in SIZES:
        window = (64, 64)
        want, = hf_processor(64).post_process_panoptic_segmentation(
            outputs(masks[None], classes[None]), [size], stuff_classes=[2, 3])
        got = eomt.panoptic(masks, classes, window, eomt.fit(size, window), size, thing)
        assert torch.equal(got.ids.long() - 1, want["segmentation"].long())
        assert [s["label_id"] for s in want["segments_info"]] == got.labels.tolist() and len(got.labels) > 1
        scores = torch.tensor([s["score"] for s in want["segments_info"]])
        torch.testing.assert_close(got.scores, scores, rtol=0, atol=1e-6)


def test_panoptic_keeps_a_share_of_exactly_four_fifths():
    """Upstream drops what is below 0.8, transformers what is not above it."""
    masks = torch.full((2, 1, 10), 1.0)
    masks[1], masks[1, :, 8:] = -9.0, 3.0  # takes 2 of the 10 pixels of the first
    classes = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
    got = eomt.panoptic(masks, classes, (1, 10), (1, 10), (1, 10), [True, True])
    assert got.ids.tolist() == [[1] * 8 + [2] * 2]


def test_instance_equals_transformers():
    """They paint the mask of each query with its best class into one map; these pairs are among ours."""
    masks, classes = logits(queries=10)
    for size in SIZES:
        want, = hf_processor(64).post_process_instance_segmentation(
            outputs(masks[None], classes[None]), [size], threshold=0.05)
        got = eomt.instance(masks, classes, (64, 64), eomt.fit(size, (64, 64)), size, top=50)
        painted = torch.full(size, -1.0)
        for row in want["segments_info"]:
            same = (got.labels == row["label_id"]) & ((got.scores - row["score"]).abs() < 1e-6)
            assert same.sum() == 1
            painted[got.masks[same][0]] = row["id"]
        assert torch.equal(painted, want["segmentation"]) and painted.max() > 3


def test_segment_equals_transformers_pipeline():
    """Their preprocessing, our network, their post-processing, on photos of several shapes."""
    model = tiny(num_queries=1)  # random queries would all overlap and void each other
    model.meta = {"size": 64, "thing": [True, True, False]}
    with torch.no_grad():
        model.class_head.bias[1] = 50.0
    for i, size in enumerate(SIZES):
        photo = images(3, *size, seed=i)
        processor = hf_processor(64, do_pad=True)
        pixels = processor(photo, return_tensors="pt")["pixel_values"]
        prediction = model(pixels)[-1]
        want, = processor.post_process_panoptic_segmentation(
            outputs(*prediction), [size], threshold=0.8, stuff_classes=[2])
        got, = eomt.segment(model, [photo], "panoptic")
        assert torch.equal(got.ids.long() - 1, want["segmentation"].long())
        assert got.labels.tolist() == [1] and 0.1 < got.ids.float().mean() < 0.9


def test_semantic_equals_transformers_pipeline():
    model = tiny()
    for i, size in enumerate([(32, 75), (75, 32), (48, 60), (61, 50), (32, 32), (20, 100)]):
        photo = images(3, *size, seed=i)
        processor = hf_processor(32, do_split_image=True)
        inputs = processor(photo, return_tensors="pt")
        offsets = [tuple(row.tolist()) for row in inputs["patch_offsets"]]
        prediction = model(inputs["pixel_values"])[-1]
        want, = processor.post_process_semantic_segmentation(
            outputs(*prediction, offsets), [size], size={"shortest_edge": 32, "longest_edge": None})
        got, = eomt.segment(model, [photo], "semantic", (32, 32))
        assert (got == want).float().mean() > 0.999  # ties alone may fall either way


def test_fit_rounds_as_upstream():
    """transformers cuts the long side off instead: 640 becomes 639 by 1e-14 for one size in 17."""
    assert eomt.fit((200, 233), (640, 640)) == (549, 640)
    assert eomt.fit((427, 640), (640, 640)) == (427, 640)


@pytest.mark.parametrize("kind", ["panoptic", "instance", "semantic"])
def test_segment_of_images_that_are_fitted_already(kind):
    """Evaluation's data processes do it; strips are left alone, as they are cut first."""
    model, sizes = tiny(), [(48, 60), (90, 31), (5, 70), (32, 32)]
    photos = [images(3, *size, seed=i) for i, size in enumerate(sizes)]
    ready = [eomt.fitted(photo, (32, 32), kind) for photo in photos]
    assert [photo.shape == other.shape for photo, other in zip(photos, ready, strict=True)] == [
        False, False, kind == "semantic", True]
    every = dict(kind=kind, window=(32, 32), thing=[True, False, True])
    want, got = eomt.segment(model, photos, **every), eomt.segment(model, ready, **every, sizes=sizes)
    for one, other, size in zip(want, got, sizes, strict=True):
        pairs = [(one, other)] if kind == "semantic" else zip(one, other, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert (other if kind == "semantic" else other[0]).shape[-2:] == size


# ---- checkpoint folders ------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["{", "[]", '{"sha256": 3}', "{}", '{"sha256": {"model.safetensors": "0"}}'])
def test_find_passes_over_damage(tmp_path, text, capsys):
    for name in ("step-00000010", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"x")
    (tmp_path / "best" / "meta.json").write_text(text)
    assert eomt.find(tmp_path).parent.name == "step-00000010"
    assert "warning" in capsys.readouterr().err
    with pytest.raises(ValueError, match="best"):
        eomt.find(tmp_path / "best")


def test_read_broken_config_json(tmp_path):
    hf_eomt(tmp_path)
    (tmp_path / "config.json").write_text('{"num_blocks": 2,')
    with pytest.raises(ValueError, match="config.json: damaged JSON"):
        eomt.read(tmp_path)


def test_find_prefers_best_then_newest(tmp_path):
    for name in ("step-00000010", "step-00000200", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"x")
    assert eomt.find(tmp_path).parent.name == "best"
    (tmp_path / "best" / "model.safetensors").unlink()
    assert eomt.find(tmp_path).parent.name == "step-00000200"
    assert eomt.find(tmp_path / "step-00000010").parent.name == "step-00000010"


def test_header_is_json(tmp_path):
    from safetensors import safe_open

    save(tmp_path / "m.safetensors", tiny(), task="shapes")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        header = json.loads(file.metadata()["nanoeomt"])
    assert header["meta"]["task"] == "shapes" and header["config"]["encoder"]["patch"] == 8


def test_rope_scale_is_for_training_alone():
    """DINOv3's stretched coordinates equal transformers' rescale in training and vanish at evaluation."""
    modeling = transformers().models.dinov3_vit.modeling_dinov3_vit
    model = tiny(rope=100.0)
    pixels, scale = images(1, 3, 32, 48), 1.7
    plain = model(pixels)[-1].masks
    model.encoder.rope_scale.fill_(scale)
    assert torch.equal(model(pixels)[-1].masks, plain)
    model.train()
    assert (model(pixels)[-1].masks - plain).abs().max() > 1e-2
    centres = modeling.get_patches_center_coordinates(4, 6, torch.float32, torch.device("cpu")) * scale
    inverse = 1 / 100.0 ** torch.arange(0, 1, 4 / 16)
    want = (2 * torch.pi * centres[:, :, None] * inverse).flatten(1).tile(2)
    torch.testing.assert_close(eomt.rope_angles((4, 6), 16, 100.0, "cpu") * scale, want)
