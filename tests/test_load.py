"""Foreign, damaged and hostile weight files: each loads with a note, or ends in one line."""

# SPDX-License-Identifier: MIT
import json
import os
import re
import struct
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import eomt
import eval as evaluation
import lora
import siglip2
import train

from .test_eomt import hf_state, zoo_state
from .test_resume import STEPS, Run
from .test_train import shapes  # noqa: F401 (fixture)

LINE = re.compile(r"[^\n]+?: [^\n]+; [^\n]+")


def tiny(classes=5, queries=7, width=64, depth=4, swiglu=False):
    torch.manual_seed(0)
    return eomt.EoMT(eomt.ViT(width, depth, 1, 16, (4, 4), swiglu=swiglu), classes, queries, 2)


def open_model():
    owner = torch.tensor([0, 0, 1, 2, 3, 3, 4])
    head = siglip2.OpenVocabHead(64, torch.randn(7, 32), owner, [True, True, True, False, False], 0.0, 0.0)
    model = eomt.OpenVocabEoMT(siglip2.VisionTower(64, 128, 3, 2, 16, 4), head, 6, 2, True, "copy", 3)
    model.adapt(2, 2, 4)
    return model


def line_of(work):
    """The one line of a refusal."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        work()
    assert LINE.fullmatch(str(caught.value)), caught.value
    return str(caught.value)


# ---- what loads, and what is said about it -----------------------------------------------------------------
@pytest.mark.parametrize(
    "kind,words",
    [
        ("zoo", ["network."]),
        ("parallel", ["module.", "network."]),
        ("compiled", ["_orig_mod.", "network."]),
        ("lightning", ["network."]),
        ("hugging", ["Hugging Face names"]),
        ("bf16", ["bfloat16 made float32"]),
        ("half", ["float16 made float32"]),
        ("double", ["float64 made float32"]),
    ],
)
def test_foreign_spelling_loads_and_says(tmp_path, capsys, kind, words):
    model = tiny().eval()
    zoo = zoo_state(model, 2)
    cast = {"bf16": torch.bfloat16, "half": torch.float16, "double": torch.float64}.get(kind)
    state = {
        "parallel": {f"module.{k}": v for k, v in zoo.items()},
        "compiled": {k.replace("network.", "network._orig_mod.", 1): v for k, v in zoo.items()},
        "lightning": {"state_dict": zoo, "epoch": 3, "hyper_parameters": {"lr": 1e-4}},
        "hugging": hf_state(model) | {"attn_mask_probs": torch.zeros(2)},
    }.get(kind, {k: v.to(cast) if cast and v.is_floating_point() else v for k, v in zoo.items()})
    torch.save(state, tmp_path / "m.bin")
    got = eomt.load(tmp_path / "m.bin")
    for key, value in model.state_dict().items():
        want = value.to(cast).float() if cast else value
        assert got.state_dict()[key].dtype == torch.float32 and torch.equal(got.state_dict()[key], want), key
    said = capsys.readouterr().err
    assert said.startswith(f"note: {tmp_path}/m.bin: ") and said.count("\n") == 1
    assert all(word in said for word in words), said


@pytest.mark.parametrize("made", [tiny, lambda: tiny().bfloat16(), open_model], ids=["eomt", "bf16", "open"])
def test_load_takes_the_tensors_of_the_file(tmp_path, made):
    """Into memory of their own, in fp32, without a random start: the file may change afterwards."""
    model, file = made(), tmp_path / "w.safetensors"
    eomt.save(file, model)
    before = torch.get_rng_state()
    loaded = eomt.load(file)
    if "open" in loaded.config:
        lora.merge(model.encoder)
    else:
        assert torch.equal(torch.get_rng_state(), before)
    file.write_bytes(bytes(file.stat().st_size))
    want = model.state_dict()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, want[key].float() if value.is_floating_point() else want[key]), key
        assert not value.is_floating_point() or value.dtype == torch.float32, key
    assert {p.requires_grad for p in loaded.upscale.parameters()} == {True}


def test_load_leaves_odd_strides_behind(tmp_path):
    """A pickle keeps the strides of transposed weights, which a float8 product on CUDA refuses."""
    model = tiny()
    model.meta = {"size": 64}
    odd = {key: value.mT.contiguous().mT if value.ndim > 1 else value
           for key, value in model.state_dict().items()}
    assert not odd["mask_head.0.weight"].is_contiguous()
    torch.save(odd, tmp_path / "w.bin")
    assert all(value.is_contiguous() for value in eomt.load(tmp_path / "w.bin").state_dict().values())


def test_our_own_file_says_nothing(tmp_path, capsys):
    for model in (tiny(), open_model()):
        eomt.save(tmp_path / "m.safetensors", model, size=64)
        eomt.load(tmp_path / "m.safetensors")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("made", [tiny, open_model], ids=["eomt", "open"])
def test_our_own_header_with_prefixed_names(tmp_path, capsys, made, prefix):
    """What wrappers put before the names goes, as without a header; the same tensor twice does not load."""
    header_file(tmp_path / "m.safetensors", made(), lambda header: header)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        header, state = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    want = eomt.load(tmp_path / "m.safetensors").state_dict()
    for inner in ("", "_orig_mod."):  # a compiled part of the model
        named = {f"{prefix}{key.replace('encoder.', 'encoder.' + inner, 1)}": v for key, v in state.items()}
        save_file(named, tmp_path / "p.safetensors", header)
        got = eomt.load(tmp_path / "p.safetensors").state_dict()
        assert all(torch.equal(got[key], value) for key, value in want.items())
        assert capsys.readouterr().err.startswith(f"note: {tmp_path}/p.safetensors: {prefix.split('.')[0]}.")
    save_file(named | {"q.weight": state["q.weight"] + 1}, tmp_path / "p.safetensors", header)
    assert "p.safetensors" in line_of(lambda: eomt.load(tmp_path / "p.safetensors"))


# ---- tensors that do not fit -------------------------------------------------------------------------------
def put(key, change):
    return lambda state: state | {key: change(state[key])}


def drop(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


TENSORS = {
    "transposed": (
        put("encoder.blocks.1.mlp.fc1.weight", lambda v: v.mT.contiguous()),
        ["encoder.blocks.1.mlp.fc1.weight", "(64, 256)", "(256, 64)"],
    ),
    "other head": (
        put("class_head.weight", lambda v: v[:3].clone()),
        ["class_head.weight", "(3, 64)", "(6, 64)"],
    ),
    "other width": (put("encoder.norm.weight", lambda v: v[:32].clone()), ["its header describes no model"]),
    "quantised": (
        put("encoder.blocks.0.attn.proj.weight", lambda v: (v * 100).to(torch.int8)),
        ["encoder.blocks.0.attn.proj.weight holds torch.int8, the model wants torch.float32"],
    ),
    "boolean": (put("q.weight", lambda v: v > 0), ["q.weight holds torch.bool"]),
    "nan": (put("q.weight", lambda v: v * torch.nan), ["m.safetensors!q.weight: NaN or Inf in 1 tensor(s)"]),
    "inf": (put("mask_head.0.bias", lambda v: v + torch.inf), ["m.safetensors!mask_head.0.bias: NaN or Inf"]),
    "missing": (drop("mask_head.2.bias"), ["missing mask_head.2.bias"]),
    "no norm": (drop("encoder.norm.weight"), ["its header describes no model", "encoder.norm.weight"]),
    "extra": (lambda state: state | {"extra.weight": torch.zeros(2)}, ["unexpected extra.weight"]),
    "empty tensor": (put("q.weight", lambda v: v[:0].clone()), ["q.weight", "(0, 64)", "(7, 64)"]),
    "scalar": (put("q.weight", lambda v: v[0, 0].clone()), ["q.weight", "()", "(7, 64)"]),
    "nothing": (lambda state: {}, ["its header describes no model"]),
}


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_tensors_one_line(tmp_path, name):
    change, words = TENSORS[name]
    eomt.save(tmp_path / "m.safetensors", tiny())
    header = json.dumps(dict(config=dict(encoder=tiny().encoder.config, **tiny().config), meta={}))
    save_file(change(dict(tiny().state_dict())), tmp_path / "m.safetensors", {"nanoeomt": header})
    text = line_of(lambda: eomt.load(tmp_path / "m.safetensors"))
    assert str(tmp_path / "m.safetensors") in text and all(word in text for word in words), text


def without(state, word):
    return {k: v for k, v in state.items() if word not in k}


def test_keys_that_do_not_fit_say_how_they_were_read(tmp_path):
    """Whose names the reader took them for, the first of each kind of fault, and what to try."""
    model, path = tiny(), tmp_path / "m.bin"
    zoo, hugging, scales = zoo_state(model, 2), hf_state(model), "missing encoder.blocks.0.ls1; missing "
    encoder = {k.removeprefix("encoder."): v for k, v in model.state_dict().items() if k[:8] == "encoder."}
    more = {"head.weight": torch.zeros(9, 64), "blocks.7.norm1.weight": torch.zeros(64)}

    def load_encoder(path):
        eomt.load_encoder(eomt.ViT(64, 4, 1, 16, (4, 4), swiglu=True), path)

    for state, read, words in (
        (without(zoo, ".ls"), eomt.load, [scales, "and 5 more; read with upstream EoMT's names: "]),
        (without(hugging, "norm2"), eomt.load, ["and 9 more; read with Hugging Face's names: "]),
        (without(hugging, "predictor.w"), eomt.load, ["missing class_head.weight; read with Hugging Face"]),
        (without(encoder, ".ls") | more, load_encoder, [scales, "; unexpected blocks.7.norm1.weight; "]),
        (encoder, load_encoder, ["m.bin: blocks.0.mlp.fc1.weight has shape (256, 64), the model wants ("]),
        (encoder, load_encoder, ["and 5 more; read with timm's names: "]),
        (
            {f"model.{k}": v for k, v in zoo.items()},
            eomt.load,
            ["upstream EoMT, timm or Hugging Face (86 keys, e.g. model.network.encoder.backbone.cls_token)"],
        ),
    ):
        torch.save(state, path)
        text = line_of(lambda read=read: read(path))
        assert text.startswith(f"{path}: ") and all(word in text for word in words), text
    text = line_of(lambda: eomt.fill(tiny(classes=9), model.state_dict(), "m"))
    assert "class_head.weight has shape (6, 64), the model wants (10, 64)" in text
    assert "read with this program's names: " in text


@pytest.mark.parametrize("key", ["extra.weight", "decoder.q.weight", "lm_head.weight"])
def test_encoder_file_with_other_tensors(tmp_path, key):
    """Heads that such files are known to hold are left; any other key is an error, as everywhere."""
    model, path = tiny(), tmp_path / "m.bin"
    encoder = {k.removeprefix("encoder."): v for k, v in model.state_dict().items() if k[:8] == "encoder."}
    known = {"head.weight": torch.zeros(9, 64), "mask_token": torch.zeros(1, 64)}
    for state in (encoder, encoder | known, model.state_dict(), zoo_state(model, 2), hf_state(model)):
        vit = eomt.ViT(64, 4, 1, 16, (4, 4))
        torch.save(state, path)
        eomt.load_encoder(vit, path)
        assert torch.equal(vit.norm.weight, model.encoder.norm.weight)
        torch.save(state | {key: torch.zeros(3)}, path)
        text = line_of(lambda vit=vit: eomt.load_encoder(vit, path))
        assert text.startswith(f"{path}: unexpected {key}; "), text


@pytest.mark.parametrize("rope", [None, 100.0])
@pytest.mark.parametrize(
    "key,values",
    [
        ("image_size", ["big", [], ["64", "64"], {}, 64.5, -1, 0, True]),
        ("num_blocks", ["2", [2], 1.5, -1]),
        ("num_attention_heads", ["1", [1], 1.5, {}, 0]),
        ("layer_norm_eps", ["small", [1e-6], {}]),
    ],
)
def test_config_json_of_wrong_types(tmp_path, rope, key, values):
    """Edited by hand: one line names file, key and what was wanted; null and nothing are as if not there."""
    model, path = tiny(), tmp_path / "hf" / "config.json"
    if rope:
        model = eomt.EoMT(eomt.ViT(64, 4, 1, 16, (4, 4), rope=rope, eps=1e-5), 5, 7, 2)
    eomt.save(tmp_path / "hf", model, format="hf")
    good = json.loads(path.read_text())
    for value in values:
        path.write_text(json.dumps(good | {key: value}))
        text = line_of(lambda: eomt.load(tmp_path / "hf"))
        assert f"{path}!{key}: " in text and "number" in text and "wanted" in text, text
    path.write_text(json.dumps(good | {"layer_norm_eps": 0}))
    assert eomt.load(tmp_path / "hf").encoder.config["eps"] == 0
    path.write_text(json.dumps(good | {key: None}))
    assert eomt.load(tmp_path / "hf").encoder.config["heads"] == 1
    for content in ("3", '"x"', "null", "[]"):
        path.write_text(content)
        assert str(path) in line_of(lambda: eomt.load(tmp_path / "hf"))


@pytest.mark.parametrize("key,word", [("num_attention_heads", "9 heads"), ("num_blocks", "take 1 to 4")])
def test_config_json_that_its_tensors_contradict(tmp_path, key, word):
    eomt.save(tmp_path / "hf", tiny(), format="hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: 9}))
    text = line_of(lambda: eomt.load(tmp_path / "hf"))
    assert text.startswith(f"{tmp_path / 'hf'}") and word in text, text


def test_block_without_a_number(tmp_path):
    torch.save(tiny().state_dict() | {"encoder.blocks.x.norm1.weight": torch.ones(64)}, tmp_path / "m.bin")
    assert "unexpected encoder.blocks.x.norm1.weight" in line_of(lambda: eomt.load(tmp_path / "m.bin"))


def test_encoder_without_registers_names_those_with(tmp_path):
    """The plain DINOv2 files lack the register tokens of EoMT's encoders; without any they do load."""
    state = {k.removeprefix("encoder."): v for k, v in tiny().state_dict().items() if k[:8] == "encoder."}
    torch.save(without(state, "reg_token"), tmp_path / "m.bin")
    text = line_of(lambda: eomt.load_encoder(eomt.ViT(64, 4, 1, 16, (4, 4)), tmp_path / "m.bin"))
    for word in ("m.bin: ", "facebook/dinov2-with-registers-", "vit_*_patch14_reg4_dinov2"):
        assert word in text, text
    bare = eomt.ViT(64, 4, 1, 16, (4, 4), registers=0)
    eomt.load_encoder(bare, tmp_path / "m.bin")
    assert torch.equal(bare.blocks[3].mlp.fc1.weight, state["blocks.3.mlp.fc1.weight"])


@pytest.mark.parametrize("spelling", ["zoo", "hugging"])
def test_foreign_tensors_of_impossible_shapes(tmp_path, spelling):
    """No axis, one, an empty one, one more: whatever the tensor, one line with the file."""
    model, path = eomt.EoMT(eomt.ViT(64, 1, 1, 16, (4, 4)), 5, 7, 1), tmp_path / "m.bin"
    state = zoo_state(model, 1) if spelling == "zoo" else hf_state(model)
    changes = [torch.sum, torch.flatten, lambda t: t[:0] if t.ndim else t, lambda t: t[None],
               lambda t: t[..., :0] if t.ndim else t]
    loaded = set()  # what may differ: the positions' number, constants, tensors that are what they were
    for key, value in state.items():
        for change in changes:
            torch.save(state | {key: change(value)}, path)
            try:
                eomt.load(path)
                loaded |= {key} if change(value).shape != value.shape else set()
            except ValueError as error:
                assert LINE.fullmatch(str(error)) and str(path) in str(error), (key, error)
    assert all(re.search("pos|pixel|empty_weight|probs|q.weight|query", key) for key in loaded), loaded


# ---- headers that lie --------------------------------------------------------------------------------------
def lie(**changes):
    def change(header):
        for path, value in changes.items():
            *outer, last = path.split("__")
            place = header
            for key in outer:
                place = place[key]
            place[last] = value
            if value is None:
                del place[last]
        return header

    return change


HEADERS = {
    "depth": lie(config__encoder__depth=10**9),
    "width": lie(config__encoder__width=10**7),
    "no depth": lie(config__encoder__depth=None),
    "text": lie(config__encoder__width="64"),
    "heads 0": lie(config__encoder__heads=0),
    "heads": lie(config__encoder__heads=7),
    "queries": lie(config__num_queries=10**12),
    "classes": lie(config__num_classes=10**12),
    "negative": lie(config__num_queries=-1),
    "blocks": lie(config__num_blocks=99),
    "no encoder": lie(config__encoder=None),
    "no config": lie(config=None),
    "no meta": lie(meta=None),
    "list": lambda header: [1, 2],
    "number": lambda header: 3,
    "config list": lie(config=[1]),
    "meta text": lie(meta="x"),
    "unknown key": lie(config__encoder__surprise=1),
    "grid": lie(config__encoder__grid=[10**6, 10**6]),
    "grid text": lie(config__encoder__grid="ab"),
    "patch": lie(config__encoder__patch=0),
    "registers": lie(config__encoder__registers=10**13),
    "ffn": lie(config__encoder__ffn=10**12),
}
OPEN_HEADERS = {
    "rows": lie(config__open__rows=10**12),
    "text_width": lie(config__open__text_width=10**12),
    "classes": lie(config__num_classes=10**12),
    "adapters": lie(config__open__adapters={"rank": 3}),
    "rank": lie(config__open__adapters__rank_attn=10**12),
    "fuse": lie(config__open__fuse_last=10**9),
    "blocks": lie(config__open__query_blocks="none"),
    "no open": lie(config__open=None),
    "open list": lie(config__open=[1]),
}


def header_file(path, model, change):
    config = dict(encoder=model.encoder.config, **model.config)
    if "open" in config:
        rows, width = model.class_head.rows.shape
        config["open"] = dict(config["open"], rows=rows, text_width=width, adapters=model.adapters)
    header = change(json.loads(json.dumps(dict(config=config, meta=dict(size=64)))))
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, path, {"nanoeomt": json.dumps(header)}
    )


def test_headers_that_lie_one_line(tmp_path):
    """Each is refused at once, without the memory that it asks for."""
    path = tmp_path / "m.safetensors"
    for model, table in ((tiny(), HEADERS), (open_model(), OPEN_HEADERS)):
        for name, change in table.items():
            header_file(path, model, change)
            began = time.monotonic()
            with pytest.raises(ValueError) as caught:
                eomt.load(path)
            assert LINE.fullmatch(str(caught.value)) and time.monotonic() - began < 5, (name, caught.value)
        header_file(path, model, lambda header: header)
        eomt.load(path)


def test_open_tables_that_lie(tmp_path):
    """Owners beyond the classes would index past the end of a table."""
    path = tmp_path / "m.safetensors"
    for owner in ([0, 0, 1, 2, 3, 3, 9], [0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 2, 3, 3, 4]):
        model = open_model()
        model.class_head.owner = torch.tensor(owner)
        header_file(path, model, lambda header: header)
        assert "header describes no model" in line_of(lambda: eomt.load(path))


def raw_safetensors(header: bytes, length=None, data=b"\0" * 64):
    return struct.pack("<Q", len(header) if length is None else length) + header + data


RAW = {
    "length beyond the end": raw_safetensors(b"{}", 10**6),
    "length of the universe": raw_safetensors(b"{}", 2**63),
    "no json": raw_safetensors(b"{{{{"),
    "offsets beyond": raw_safetensors(b'{"q.weight":{"dtype":"F32","shape":[4,4],"data_offsets":[0,4096]}}'),
    "offsets backwards": raw_safetensors(b'{"q.weight":{"dtype":"F32","shape":[4,4],"data_offsets":[64,0]}}'),
    "shape lies": raw_safetensors(b'{"q.weight":{"dtype":"F32","shape":[4096,4096],"data_offsets":[0,64]}}'),
    "shape overflows": raw_safetensors(
        b'{"q.weight":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,64]}}'
    ),
    "unknown dtype": raw_safetensors(b'{"q.weight":{"dtype":"Q9","shape":[4,4],"data_offsets":[0,64]}}'),
    "our header no json": raw_safetensors(
        b'{"__metadata__":{"nanoeomt":"{"},"q.weight":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64]}}'
    ),
    "our header deep": raw_safetensors(
        b'{"__metadata__":{"nanoeomt":"'
        + b"[" * 200000
        + b'"},"q.weight":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64]}}'
    ),
    "deep": raw_safetensors(b"[" * 100000),
    "7 bytes": b"\1\0\0\0\0\0\0",
}


@pytest.mark.parametrize("name", RAW)
def test_raw_bytes_that_lie(tmp_path, name):
    path = tmp_path / "m.safetensors"
    path.write_bytes(RAW[name])
    assert str(path) in line_of(lambda: eomt.load(path))


def test_every_cut_and_many_flips(tmp_path):
    """A file cut anywhere never loads; a byte flipped in its header never ends in a traceback."""
    model = eomt.EoMT(eomt.ViT(16, 2, 2, 8, (2, 2)), 3, 2, 1)
    eomt.save(tmp_path / "whole.safetensors", model)
    torch.save(zoo_state(model, 1), tmp_path / "whole.bin")
    for suffix in ("safetensors", "bin"):
        content, path = (tmp_path / f"whole.{suffix}").read_bytes(), tmp_path / f"cut.{suffix}"
        for size in [*range(1, 64, 7), *range(64, len(content) - 1, len(content) // 30), len(content) - 1]:
            path.write_bytes(content[:size])
            line_of(lambda path=path: eomt.load(path))
    content = (tmp_path / "whole.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for at in range(0, end, end // 150):
        path = tmp_path / "flip.safetensors"
        path.write_bytes(content[:at] + bytes([content[at] ^ 2]) + content[at + 1 :])
        try:
            eomt.load(path)
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error) and str(path) in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "3",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../other.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "model.safetensors.index.json"}}',
        "[" * 100000,
        '{"weight_map": {"a": "gone.safetensors"}}',
        "{}",
    ],
)
def test_index_that_lies(tmp_path, text):
    """Shards are files beside the index: no other folder, no index of indexes."""
    (tmp_path / "m").mkdir()
    save_file({"q.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "m" / "model.safetensors.index.json").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        eomt.load(tmp_path / "m")
    assert "\n" not in str(caught.value) and str(tmp_path / "m") in str(caught.value)


def test_other_contents(tmp_path):
    """Real files of other projects: an encoder, a text tower, a list, an optimiser, an empty dictionary."""
    model = tiny()
    encoder = {k: v for k, v in model.state_dict().items() if k.startswith("encoder.")}
    for content, words in (
        (encoder, "an encoder without heads"),
        ({"text_model.embeddings.w": torch.zeros(2)}, "no EoMT"),
        ([torch.zeros(2)], "other things than tensors"),
        (torch.zeros(2), "other things than tensors"),
        (torch.optim.AdamW(model.parameters()).state_dict(), "other things than tensors"),
        ({}, "no EoMT"),
        ({"state_dict": {"q.weight": [1.0]}}, "other things than tensors"),
        ({3: torch.zeros(2)}, ""),
    ):
        torch.save(content, tmp_path / "m.bin")
        assert words in line_of(lambda: eomt.load(tmp_path / "m.bin")), content


def test_eval_prints_no_score_and_training_does_not_begin(shapes, tmp_path):  # noqa: F811
    """The scripts: exit 1, one error line, no traceback, no score, no step."""
    header_file(tmp_path / "lies.safetensors", tiny(), HEADERS["depth"])
    (tmp_path / "page.bin").write_bytes(b"<html>404</html>")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.bin")
    eomt.save(tmp_path / "classes.safetensors", tiny(), size=64)
    for name in ("lies.safetensors", "page.bin", "other.bin", "classes.safetensors", "none.bin"):
        run = Run(
            tmp_path / "eval",
            "--ckpt",
            tmp_path / name,
            "--data",
            shapes,
            "--task",
            "shapes",
            "--workers",
            0,
            main=evaluation.main,
        )
        assert run.wait() == [1] and "PQ" not in run.text(), run.text()
        assert re.fullmatch(rf"(note: [^\n]+\n)?error: [^\n]*{name}[^\n]*; [^\n]*\n", run.text()), run.text()
    for flag, name in (
        ("--init", "lies.safetensors"),
        ("--encoder-weights", "other.bin"),
        ("--init", "page.bin"),
    ):
        run = Run(
            tmp_path / "t",
            *STEPS,
            "--data",
            shapes,
            "--out",
            tmp_path / "t",
            "--overwrite",
            flag,
            tmp_path / name,
            main=train.main,
        )
        assert run.wait() == [1] and "step 1/" not in run.text() and "Traceback" not in run.text(), run.text()
        assert re.match(rf"error: [^\n]*{name}", run.text().splitlines()[-1]), run.text()


@pytest.mark.parametrize("name", ["model", "model.pt", "model.safetensors"])
def test_saved_weights_load_under_any_name(tmp_path, name):
    """What `save` wrote without .safetensors was "cut or damaged" to `load`."""
    model = eomt.EoMT(eomt.ViT(16, 2, 2, 8, (2, 2)), 3, 2, 1)
    eomt.save(tmp_path / name, model, size=16)
    again = eomt.load(tmp_path / name)
    assert again.meta["size"] == 16 and torch.equal(again.q.weight, model.q.weight)


@pytest.mark.parametrize("fault", [PermissionError, FileNotFoundError])
def test_training_folder_of_another_user(tmp_path, monkeypatch, fault):
    """A checkpoint from /root or another's home loads where one may not look in there."""
    model, stat = eomt.EoMT(eomt.ViT(16, 2, 2, 8, (2, 2)), 3, 2, 1), os.stat

    def closed(path, **options):
        if str(path).startswith("/closed"):
            raise fault(path)
        return stat(path, **options)

    paths = dict(data="set", text="/closed/tower", tokenizer="")
    eomt.save(tmp_path / "model.safetensors", model, size=16, cwd="/closed/work", **paths)
    monkeypatch.setattr(os, "stat", closed)
    meta = eomt.load(tmp_path / "model.safetensors").meta
    assert {key: meta[key] for key in paths} == paths
