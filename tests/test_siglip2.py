"""SigLIP 2 towers against transformers, text rules, masked pooling against one head per region, classes."""
# SPDX-License-Identifier: MIT
import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import siglip2
from siglip2 import OpenVocabHead, TextTower, Tokenizer, VisionTower, canonical, embed_text, load, map_pool

ATOL = 1e-4  # absolute, fp32: spec of the towers
WORDS = "a photo of the red cat dog zebra in scene patch background grass couch sofa 一张 猫 的 照片"


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- Towers against transformers -------------------------------------------------------------------------
SMALL = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
WIDE = dict(hidden_size=144, intermediate_size=200, num_hidden_layers=2, num_attention_heads=2)  # head 72


def peer(family, vision, text, folder):
    """A random transformers model, every parameter moved off its initial 0 or 1, saved in `folder`."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        vision_config=vision, text_config=dict(vocab_size=60, projection_size=vision["hidden_size"]) | text)
    model = getattr(transformers, f"{family}Model")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return model


def hidden_states(tower, images):
    x, _ = tower.embed(images)
    states = [x]
    for block in tower.blocks:
        states.append(block(states[-1]))
    return states


def compare(theirs, tower, text, images, ids, **inputs):
    """Hidden states, pooled vector, text vector and logits within ATOL."""
    scores = theirs(input_ids=ids, **inputs)
    vision = theirs.vision_model(**inputs, output_hidden_states=True)
    for ours, peers in zip(hidden_states(tower, images), vision.hidden_states, strict=True):
        torch.testing.assert_close(ours, peers, atol=ATOL, rtol=0)
    tokens = tower(images)
    torch.testing.assert_close(tokens, vision.last_hidden_state, atol=ATOL, rtol=0)
    torch.testing.assert_close(tower.head(tokens), vision.pooler_output, atol=ATOL, rtol=0)
    torch.testing.assert_close(text(ids), theirs.text_model(ids).pooler_output, atol=ATOL, rtol=0)
    head = OpenVocabHead(tower.width, text(ids), torch.arange(len(ids)), [True] * len(ids),
                         text.logit_scale, text.logit_bias)
    region = map_pool(tower, tokens, torch.zeros(len(tokens), 1, tokens.shape[1]))
    torch.testing.assert_close(head.out_logits(region)[:, 0], scores.logits_per_image, atol=ATOL, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("size", [SMALL, WIDE], ids=["head12", "head72"])
@pytest.mark.parametrize("shape", [(32, 32), (48, 24)], ids=["native", "resized"])
def test_parity_fixed_resolution(tmp_path, size, shape):
    theirs = peer("Siglip", size | dict(image_size=32, patch_size=8), size, tmp_path)
    heads = size["num_attention_heads"]
    tower, text = load(tmp_path, "vision", heads=heads), load(tmp_path, "text", heads=heads)
    assert (tower.width, tower.patch, tower.prefix, tower.naflex) == (size["hidden_size"], 8, 0, False)
    images, ids = rand(2, 3, *shape), torch.arange(192).view(3, 64) % 60
    compare(theirs, tower, text, images, ids, pixel_values=images, interpolate_pos_encoding=shape != (32, 32))


@torch.no_grad()
@pytest.mark.parametrize("size", [SMALL, WIDE], ids=["head12", "head72"])
@pytest.mark.parametrize("grid", [(4, 4), (3, 6), (8, 2)])
def test_parity_naflex(tmp_path, size, grid):
    theirs = peer("Siglip2", size | dict(num_patches=16, patch_size=8), size, tmp_path)
    heads = size["num_attention_heads"]
    tower, text = load(tmp_path, "vision", heads=heads), load(tmp_path, "text", heads=heads)
    assert tower.naflex and tower.patch == 8
    images, ids = rand(2, 3, 8 * grid[0], 8 * grid[1]), torch.arange(192).view(3, 64) % 60
    flat = images.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).permute(0, 2, 4, 3, 5, 1).reshape(2, -1, 192)
    compare(theirs, tower, text, images, ids, pixel_values=flat, spatial_shapes=torch.tensor([grid, grid]),
            pixel_attention_mask=torch.ones(2, grid[0] * grid[1]))


@torch.no_grad()
def test_parity_naflex_processor(tmp_path):
    """The same photo through transformers' NaFlex image processor, padding tokens included."""
    numpy = pytest.importorskip("numpy")
    theirs = peer("Siglip2", SMALL | dict(num_patches=16, patch_size=8), SMALL, tmp_path)
    from transformers import Siglip2ImageProcessorPil

    photo = (rand(40, 72, 3).sigmoid() * 255).byte().numpy().astype(numpy.uint8)
    inputs = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=50)(photo, return_tensors="pt")
    peers = theirs.vision_model(**inputs).pooler_output
    h, w = inputs["spatial_shapes"][0].tolist()
    assert h * w < 50 and h != w
    patches = inputs["pixel_values"][0, : h * w].reshape(h, w, 8, 8, 3)
    image = patches.permute(4, 0, 2, 1, 3).reshape(1, 3, 8 * h, 8 * w)
    tower = load(tmp_path, "vision", heads=4)
    torch.testing.assert_close(tower.head(tower(image)), peers, atol=ATOL, rtol=0)


def test_sizes_parameters_and_head_sizes():
    counts, heads = {}, {}
    with torch.device("meta"):
        for name, size in siglip2.SIZES.items():
            counts[name] = sum(p.numel() for p in VisionTower(*size).parameters()) / 1e6
            heads[name] = size[0] // size[3]
        text = TextTower(*siglip2.SIZES["so400m"], out=1536)
    assert heads == {"base": 64, "large": 64, "so400m": 72, "giant-opt": 96}
    # 93M, 316M, 428M and 1.16B are the image towers of the published checkpoints, MAP head included
    assert {name: round(count) for name, count in counts.items()} == {
        "base": 93, "large": 316, "so400m": 428, "giant-opt": 1163}
    assert text.head.weight.shape == (1536, 1152) and text.tokens.weight.shape == (256000, 1152)


@torch.no_grad()
def test_tower_any_grid_and_attend_argument():
    torch.manual_seed(0)
    tower = VisionTower(24, 40, 2, 2, patch=4, grid=4).eval()
    x, grid = tower.embed(rand(1, 3, 20, 12))
    assert grid == (5, 3) and x.shape == (1, 15, 24)
    calls = []

    def attend(q, k, v):
        calls.append((q.shape, k.stride() == q.stride()))
        return F.scaled_dot_product_attention(q, k, v)

    assert torch.equal(tower.blocks[0](x, tower.attention(grid, attend)), tower.blocks[0](x))
    assert calls == [((1, 2, 15, 12), True)]
    both = tower(torch.cat([rand(1, 3, 16, 16), rand(1, 3, 16, 16, seed=1)]))
    torch.testing.assert_close(both[1:], tower(rand(1, 3, 16, 16, seed=1)), atol=1e-6, rtol=0)


@torch.no_grad()
def test_split_lets_queries_attend_to_patches():
    """The seam of isolate mode: query rows that see [queries | patches] equal those of the joint block."""
    torch.manual_seed(0)
    block = VisionTower(24, 40, 1, 2, patch=4, grid=4).blocks[0]
    queries, patches = rand(1, 3, 24), rand(1, 16, 24, seed=1)
    joint = block(torch.cat([queries, patches], 1))[:, :3]
    _, key, value = block.attn.split(block.norm1(patches))

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, torch.cat([k, key], 2), torch.cat([v, value], 2))

    torch.testing.assert_close(block(queries, attend), joint, atol=1e-6, rtol=0)


# ---- Checkpoints -----------------------------------------------------------------------------------------
@pytest.fixture
def checkpoint(tmp_path):
    """A small checkpoint in Hugging Face's names without transformers, and its tensors."""
    width, tensors = 24, {}

    def linear(name, rows, columns):
        tensors[f"{name}.weight"] = rand(rows, columns, seed=len(tensors))
        tensors[f"{name}.bias"] = rand(rows, seed=len(tensors))

    def norm(name):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = torch.ones(width), torch.zeros(width)

    for part, final in (("vision_model", "post_layernorm"), ("text_model", "final_layer_norm")):
        for i in range(2):
            layer = f"{part}.encoder.layers.{i}"
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                linear(f"{layer}.self_attn.{name}", width, width)
            linear(f"{layer}.mlp.fc1", 40, width)
            linear(f"{layer}.mlp.fc2", width, 40)
            norm(f"{layer}.layer_norm1")
            norm(f"{layer}.layer_norm2")
        norm(f"{part}.{final}")
    tensors["vision_model.embeddings.patch_embedding.weight"] = rand(width, 3, 4, 4)
    tensors["vision_model.embeddings.patch_embedding.bias"] = rand(width)
    tensors["vision_model.embeddings.position_embedding.weight"] = rand(16, width)
    head = "vision_model.head"
    tensors[f"{head}.probe"] = rand(1, 1, width)
    tensors[f"{head}.attention.in_proj_weight"] = rand(3 * width, width)
    tensors[f"{head}.attention.in_proj_bias"] = rand(3 * width)
    linear(f"{head}.attention.out_proj", width, width)
    linear(f"{head}.mlp.fc1", 40, width)
    linear(f"{head}.mlp.fc2", width, 40)
    norm(f"{head}.layernorm")
    tensors["text_model.embeddings.token_embedding.weight"] = rand(50, width)
    tensors["text_model.embeddings.position_embedding.weight"] = rand(64, width)
    linear("text_model.head", 32, width)
    tensors["logit_scale"], tensors["logit_bias"] = torch.tensor([4.7]), torch.tensor([-15.9])
    return tmp_path, tensors


def write(path, tensors):
    from safetensors.torch import save_file

    path.parent.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def assert_same_tower(ours, other):
    wanted = other.state_dict()
    assert list(ours.state_dict()) == list(wanted)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_load_file_folder_shards_and_bare(checkpoint):
    folder, tensors = checkpoint
    vision = load(write(folder / "one" / "model.safetensors", tensors), "vision", heads=2)
    assert not vision.training and all(p.requires_grad and not p.is_meta for p in vision.parameters())
    assert torch.equal(vision.blocks[1].attn.qkv.weight[24:48],
                       tensors["vision_model.encoder.layers.1.self_attn.k_proj.weight"])
    text = load(folder / "one", "text", heads=2)
    assert (len(text.tokens.weight), text.head.out_features) == (50, 32)
    assert text.logit_scale.item() == pytest.approx(4.7) and text.logit_bias.item() == pytest.approx(-15.9)

    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in shards.items():
        write(folder / "two" / file, {key: tensors[key] for key in keys})
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (folder / "two" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_tower(load(folder / "two", "vision", heads=2), vision)
    assert_same_tower(load(folder / "two", "text", heads=2), text)

    prefix = "vision_model."
    bare = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    assert_same_tower(load(write(folder / "bare.safetensors", bare), "vision", heads=2), vision)
    half = {key: value.bfloat16() for key, value in tensors.items()}
    half = load(write(folder / "half.safetensors", half), "vision", heads=2)
    assert half.norm.weight.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("naflex, kind", [(False, 4), (True, 2)])
def test_save_keeps_the_kind_of_tower(tmp_path, naflex, kind):
    """A NaFlex tower is told from others by its 2-d kernel; saved, it became one of fixed resolution."""
    torch.manual_seed(0)
    vision = VisionTower(24, 40, 2, 2, patch=4, grid=4, naflex=naflex).eval()
    siglip2.save(tmp_path, vision, TextTower(24, 40, 1, 2, 20, 8))
    again = load(tmp_path, "vision")
    assert_same_tower(again, vision)
    assert again.config == vision.config and torch.equal(again(rand(1, 3, 24, 8)), vision(rand(1, 3, 24, 8)))
    tensors, _ = siglip2._read(tmp_path / "model.safetensors")
    assert tensors["vision_model.embeddings.patch_embedding.weight"].ndim == kind


def fails(error, *args, **kw):
    """The message of the one-line error that `load` must raise."""
    with pytest.raises(error) as caught:
        load(*args, **kw)
    assert "\n" not in str(caught.value) and ";" in str(caught.value)
    return str(caught.value)


def test_load_lists_every_missing_and_unexpected_key(checkpoint):
    folder, tensors = checkpoint
    gone = ["vision_model.encoder.layers.0.self_attn.k_proj.bias", "vision_model.head.probe"]
    bad = {key: value for key, value in tensors.items() if key not in gone}
    bad["vision_model.extra"] = torch.ones(1)
    message = fails(ValueError, write(folder / "bad.safetensors", bad), "vision", heads=2)
    assert "2 missing" in message and "1 unexpected ['extra']" in message
    assert all(key.removeprefix("vision_model.") in message for key in gone)
    only = {key: value for key, value in tensors.items() if key.startswith("vision")}
    assert "head.weight" in fails(ValueError, write(folder / "only.safetensors", only), "text", heads=2)
    scale = {key: value for key, value in tensors.items() if key != "logit_scale"}
    assert "logit_scale" in fails(ValueError, write(folder / "scale.safetensors", scale), "text", heads=2)


def test_load_wrong_files(checkpoint):
    folder, tensors = checkpoint
    assert "no model.safetensors" in fails(FileNotFoundError, folder / "nowhere", "vision")
    index = {"weight_map": {"x": "gone.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "no gone.safetensors" in fails(FileNotFoundError, folder, "vision")
    for content in ("{", "[]", "null", '{"a": 1}', '{"weight_map": {"x": 3}}', '{"weight_map": ["x"]}', "\0"):
        (folder / "model.safetensors.index.json").write_text(content)
        assert f"{folder}/model.safetensors.index.json: no list" in fails(ValueError, folder, "vision")
    (folder / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "no safetensors file" in fails(ValueError, folder / "pointer.safetensors", "vision")
    assert "give heads=" in fails(ValueError, write(folder / "x.safetensors", tensors), "vision")


# ---- Text ------------------------------------------------------------------------------------------------
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    """A Gemma-like BPE whose file asks for all that is wrong: bos, no eos, left padding, truncation at 5."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, normalizers, processors, trainers

    model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    model.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, initial_alphabet=list(".,!-CAT"))
    model.train_from_iterator([WORDS] * 5, trainer)
    model.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    model.enable_truncation(5)
    model.enable_padding(direction="left", pad_id=3, length=9)
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS, "a photo of a cat.", "!,-"] * 20),
        model_prefix=str(folder / "tokenizer"), vocab_size=80, model_type="bpe",
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        add_dummy_prefix=False, minloglevel=2)
    return folder / "tokenizer.model"


@pytest.fixture(params=["json_file", "model_file"])
def tokenizer(request):
    return Tokenizer(request.getfixturevalue(request.param))


def test_tokenizer_forces_settings(tokenizer):
    ids = tokenizer(["a photo of a cat", "A Photo_of\ta  CAT!!", "a photo of a cat. " * 40])
    assert ids.shape == (3, 64) and ids.dtype == torch.int64
    assert torch.equal(ids[0], ids[1])
    length = ids[0].tolist().index(1)
    assert length >= 5 and 2 not in ids  # not cut at 5, no bos
    assert (ids[0, length + 1:] == 0).all()  # right padding
    assert (ids[2, :63] > 1).all() and ids[2, 63] == 1  # truncation keeps eos
    assert tokenizer(["", "..."]).tolist() == [[1] + [0] * 63] * 2
    assert tokenizer(["猫"])[0, 0] > 3


def test_tokenizer_encode_keeps_punctuation(tokenizer):
    """Published ids of 'a photo of a cat.' have its full stop; prompts lose it, as in zero-shot tests."""
    plain, stop = tokenizer.encode("a photo of a Cat"), tokenizer.encode("a photo of a cat.")
    end = plain.index(1)
    assert stop[:end] == plain[:end] and stop[end + 1] == 1 and stop[end] != 1
    assert tokenizer(["a photo of a cat."]).tolist() == [plain]


def test_tokenizer_length_folder_and_wrong_files(json_file, tmp_path):
    assert Tokenizer(json_file.parent, length=4)(["a photo of the cat"]).shape == (1, 4)
    with pytest.raises(FileNotFoundError, match="no tokenizer.json or tokenizer.model; give"):
        Tokenizer(tmp_path)
    other = json_file.read_text().replace('"<eos>"', '"</s>"')
    (tmp_path / "tokenizer.json").write_text(other)
    with pytest.raises(ValueError, match="ids 0, 1 are <pad>, </s>; give Gemma's"):
        Tokenizer(tmp_path)


def test_canonical_against_transformers():
    """The rule of SigLIP's own tokenizer; `_` becomes a space first, as in big_vision's evaluation."""
    pytest.importorskip("transformers")
    from transformers.models.siglip.tokenization_siglip import SiglipTokenizer

    state = SimpleNamespace(do_lower_case=True)
    state.remove_punctuation = lambda text: SiglipTokenizer.remove_punctuation(state, text)
    for text in ("A Photo of a {}.", " T-shirt,  (red)\n", "tree's; \u72d7\u3002", "100%\tWool!"):
        assert canonical(text) == SiglipTokenizer.canonicalize_text(state, text), text
    assert canonical("Traffic_Light") == "traffic light" and canonical("T-shirt") == "tshirt"


@pytest.fixture
def text_tower():
    torch.manual_seed(0)
    return TextTower(width=24, hidden=40, depth=2, heads=2, vocab=200, out=32).eval()


PROMPTS = [[["a photo of a cat.", "a cat in the scene."]], [["a couch"], ["a sofa", "the sofa"]]]


def test_text_last_position_and_padding(text_tower):
    ids = torch.randint(0, 200, (1, 64))
    moved = ids.clone()
    moved[0, 63] += 1
    assert not torch.equal(text_tower(ids), text_tower(moved % 200))
    early = ids.clone()
    early[0, 0] = (early[0, 0] + 1) % 200
    assert not torch.equal(text_tower(ids), text_tower(early))  # full attention, no causal mask
    with pytest.raises(AssertionError):
        text_tower(ids[:, :10])


@torch.no_grad()
def test_embed_text_rows(text_tower, json_file):
    tokenizer = Tokenizer(json_file)
    rows, owner = embed_text(text_tower, tokenizer, PROMPTS)
    assert rows.shape == (3, 32) and owner.tolist() == [0, 1, 1] and not rows.requires_grad
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    unit = F.normalize(text_tower(tokenizer(PROMPTS[0][0])), dim=-1)
    torch.testing.assert_close(rows[0], F.normalize(unit.mean(0), dim=0), atol=1e-6, rtol=0)
    for bad in ([[]], [[["a cat"]], [[]]]):
        with pytest.raises(ValueError, match=f"class {len(bad) - 1}.*; give"):
            embed_text(text_tower, tokenizer, bad)


def test_embed_text_cache(text_tower, json_file, tmp_path, monkeypatch):
    tokenizer, cache = Tokenizer(json_file), tmp_path / "rows.safetensors"
    calls, forward = [], text_tower.forward
    monkeypatch.setattr(text_tower, "forward", lambda ids: calls.append(len(ids)) or forward(ids))
    rows, _ = embed_text(text_tower, tokenizer, PROMPTS, cache)
    again, owner = embed_text(text_tower, tokenizer, PROMPTS, cache)
    assert calls == [2, 1, 2] and torch.equal(again, rows) and owner.tolist() == [0, 1, 1]
    # the same canonical strings hit under any spelling and class order; a new template misses
    turned, _ = embed_text(text_tower, tokenizer, [[["A couch!"]], PROMPTS[0]], cache)
    assert torch.equal(turned, rows[[1, 0]])
    assert len(calls) == 3
    more, _ = embed_text(text_tower, tokenizer, PROMPTS + [[["a zebra"]]], cache)
    assert len(calls) == 4 and torch.equal(more[:3], rows)
    with torch.no_grad():
        text_tower.tokens.weight[199, 0] += 1e-6  # not even a token of the prompts, yet another tower
    embed_text(text_tower, tokenizer, PROMPTS, cache)
    assert calls[4:] == [2, 1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.safetensors"]
    cache.write_text("broken")
    with pytest.raises(ValueError, match="no safetensors file.*; delete it"):
        embed_text(text_tower, tokenizer, PROMPTS, cache)


# ---- Masked MAP pooling ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    tower = VisionTower(48, 80, 1, 4, patch=4, grid=6).eval().requires_grad_(False)
    for value in tower.head.parameters():
        value.add_(rand(*value.shape) * 0.2)
    return tower


def per_region(tower, x, masks):
    """torch's own multi-head attention, once per region, on the tokens its key mask lets through."""
    head = tower.head
    attention = nn.MultiheadAttention(tower.width, head.attn.heads, batch_first=True).eval()
    attention.in_proj_weight.data, attention.in_proj_bias.data = head.attn.qkv.weight, head.attn.qkv.bias
    attention.out_proj = head.attn.proj
    out = torch.zeros(*masks.shape[:2], tower.width)
    with torch.no_grad():
        for b in range(len(x)):
            for q in range(masks.shape[1]):
                r, _ = attention(head.probe, x[b:b + 1], x[b:b + 1], key_padding_mask=~masks[b, q][None])
                out[b, q] = F.normalize(r + head.mlp(head.norm(r)), dim=-1)[0, 0]
    return out


def test_map_pool_equals_head_per_region(tower):
    x, masks = rand(2, 36, 48), rand(2, 7, 36, seed=1) > 0.5
    masks[0, 0], masks[0, 1] = False, True
    masks[0, 0, 5] = True  # one patch; then all of them
    ours = map_pool(tower, x, torch.where(masks, 30.0, -30.0), gamma=30)
    torch.testing.assert_close(ours, per_region(tower, x, masks), atol=1e-6, rtol=0)


def test_map_pool_gamma_limits(tower):
    x, z = rand(2, 36, 48), rand(2, 5, 36, seed=1)
    image = F.normalize(tower.head(x), dim=-1)[:, None].expand(2, 5, 48)
    torch.testing.assert_close(map_pool(tower, x, torch.full_like(z, 25.0)), image, atol=1e-6, rtol=0)
    torch.testing.assert_close(map_pool(tower, x, z, gamma=0.0), image, atol=1e-6, rtol=0)
    torch.testing.assert_close(map_pool(tower, x, z, gamma=1e-7), image, atol=1e-6, rtol=0)
    hard = per_region(tower, x, z > 0)
    torch.testing.assert_close(map_pool(tower, x, z, gamma=1e6), hard, atol=1e-6, rtol=0)
    assert (map_pool(tower, x, z) - image).abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["map", "value", "mean"])
def test_map_pool_formula_soft_masks(tower, mode):
    """The three modes by their definitions in fp64, with (B,nh,Q,N) weights written out."""
    x, z, gamma = rand(2, 36, 48), rand(2, 5, 36, seed=1) * 5, 3.0
    weights = F.logsigmoid(gamma * z.double())[:, None]  # (B, 1, Q, N)
    head = tower.head.double()
    q = F.linear(head.probe[0, 0], head.attn.qkv.weight[:48], head.attn.qkv.bias[:48]).view(4, 12)
    k, v = F.linear(x.double(), head.attn.qkv.weight[48:], head.attn.qkv.bias[48:]).chunk(2, -1)
    k, v = (t.unflatten(-1, (4, 12)).transpose(1, 2) for t in (k, v))  # (B, nh, N, hd)
    e = torch.einsum("hd,bhnd->bhn", q, k)[:, :, None] / math.sqrt(12) * (mode == "map")
    r = head.attn.proj(((e + weights).softmax(-1) @ v).transpose(1, 2).flatten(2))
    wanted = F.normalize(r + head.mlp(head.norm(r)), dim=-1)
    if mode == "mean":
        wanted = F.normalize(weights[:, 0].softmax(-1) @ x.double(), dim=-1)
    tower.head.float()
    torch.testing.assert_close(map_pool(tower, x, z, gamma, mode).double(), wanted, atol=1e-6, rtol=0)


def test_map_pool_gradient_to_tokens_not_masks(tower):
    x, z = rand(1, 36, 48).requires_grad_(), rand(1, 5, 36, seed=1).requires_grad_()
    map_pool(tower, x, z)[..., 0].sum().backward()
    assert z.grad is None and x.grad.abs().sum() > 0


def test_map_pool_far_from_the_probe_stays_finite(tower):
    """A mask on two patches that get e^-50 of the probe's attention, an empty mask, bf16 under autocast."""
    x = rand(1, 36, 48)
    e = tower.head.scores(x)
    low = e[0].amax(-1).topk(2, largest=False).indices
    sharp = x * (50 / (e.amax(1) - e[0, low]).max())
    z = torch.full((1, 2, 36), -100.0)
    z[0, 0, low] = 100
    ours = map_pool(tower, sharp, z)
    torch.testing.assert_close(ours[:, :1], per_region(tower, sharp, z[:, :1] > 0), atol=1e-5, rtol=0)
    assert ours.isfinite().all() and map_pool(tower, 10 * sharp, z).isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        rough = map_pool(tower, x.bfloat16(), rand(1, 3, 36))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, map_pool(tower, x, rand(1, 3, 36)), atol=2e-2, rtol=0)


class PoolAndCombine(nn.Module):
    """What predict.py exports of this file: regions of masks, and classes of one-word vocabularies."""

    def __init__(self, tower, head):
        super().__init__()
        self.tower, self.head = tower, head

    def forward(self, x, z, l_in, l_out):
        return map_pool(self.tower, x, z), self.head.combine(l_in, l_out)


def test_map_pool_and_combine_in_onnx(tower, tmp_path):
    """Log(Sigmoid(x)), which logsigmoid became there, is -inf from -20 on: an unsure mask was NaN."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    head = make_head(unit(1, 48), torch.tensor([0]), [True])
    z = torch.cat([torch.full((1, 1, 36), -60.0) + rand(1, 1, 36), rand(1, 3, 36) * 40], 1)  # (1, 4, 36)
    inputs = rand(1, 36, 48), z, rand(1, 4, 2), torch.tensor([[[-120.0], [-30], [0], [30]]])
    net, path = PoolAndCombine(tower, head).eval(), tmp_path / "m.onnx"
    with torch.no_grad():
        want = net(*inputs)
        torch.onnx.export(torch.export.export(net, inputs), (), path, verbose=False)
    session = runtime.InferenceSession(str(path))
    names = [node.name for node in session.get_inputs()]
    got = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    for ours, theirs in zip(want, got, strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours, atol=1e-5, rtol=1e-5)


def test_map_pool_speed_against_per_region():
    torch.manual_seed(0)
    tower = VisionTower(192, 768, 1, 6, patch=4, grid=16).eval().requires_grad_(False)
    x, z = rand(1, 256, 192), rand(1, 100, 256)

    def best(function):
        times = []
        for _ in range(4):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times)

    assert best(lambda: per_region(tower, x, z > 0)) > 20 * best(lambda: map_pool(tower, x, z))


# ---- Class logits ----------------------------------------------------------------------------------------
OWNER = torch.tensor([0, 0, 1, 2, 3, 3, 4])  # 7 rows of 5 classes, two of them with a synonym
SEEN = torch.tensor([True, False, True, True, False])


def make_head(rows=None, owner=OWNER, seen=SEEN, scale=50.0, bias=-10.0):
    torch.manual_seed(0)
    rows = unit(7, 16) if rows is None else rows
    return OpenVocabHead(12, rows, owner, seen, math.log(scale), bias).eval()


def unit(*shape, seed=0):
    return F.normalize(rand(*shape, seed=seed), dim=-1)


def test_head_combine_formula():
    """The spec's formula in probabilities and fp64, against the log-space one."""
    head = make_head()
    head.calibrate(alpha=0.3, beta=0.7, temp_in=1.3, temp_out=0.8, bias=0.4, class_bias=torch.arange(5.0) / 9)
    l_in, l_out = rand(2, 3, 6).double() * 4, rand(2, 3, 5, seed=1).double() * 4
    full = (l_in / 1.3).softmax(-1)
    p_in, p_void = full[..., :5] / full[..., :5].sum(-1, keepdim=True), full[..., 5:]
    p_out = (l_out / 0.8).softmax(-1)
    w = torch.tensor([0.3, 0.7, 0.3, 0.3, 0.7]).double()
    shift = torch.arange(5).double() / 9 - 0.4 * SEEN
    p = p_in ** (1 - w) * p_out ** w * shift.exp()
    p_void = p_void * (1 - 0.5 * p_out.amax(-1, keepdim=True))
    wanted = torch.cat([p / p.sum(-1, keepdim=True) * (1 - p_void), p_void], -1)
    torch.testing.assert_close(head.combine(l_in, l_out).exp(), wanted, atol=1e-7, rtol=0)
    assert head.combine(l_in, l_out).shape == (2, 3, 6)


def test_head_forward_eval_is_log_probability():
    head = make_head()
    out = head(rand(2, 3, 12), unit(2, 3, 16))
    assert out.shape == (2, 3, 6)
    torch.testing.assert_close(out.exp().sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(out.softmax(-1), out.exp())  # a softmax over Prediction.classes is harmless


def test_head_alpha_beta_zero_is_in_vocabulary_only():
    head = make_head()
    queries, region = rand(1, 3, 12), unit(1, 3, 16)
    head.calibrate(alpha=0.0, beta=0.0)
    known = head(queries, region)[..., :5].log_softmax(-1)
    torch.testing.assert_close(known, head.in_logits(queries)[..., :5].log_softmax(-1), atol=1e-5, rtol=0)
    head.calibrate(alpha=1.0, beta=1.0)
    known = head(queries, region)[..., :5].log_softmax(-1)
    torch.testing.assert_close(known, head.out_logits(region).log_softmax(-1), atol=1e-5, rtol=0)


def test_head_finite_at_extremes():
    head = make_head(scale=1e4)
    for reject in (-math.inf, 1e9):
        head.calibrate(reject=reject)
        l_in = torch.tensor([[[100.0, 0, 0, 0, 0, -100], [-100.0, 0, 0, 0, 0, 100], [0] * 6]])
        assert head.combine(l_in, torch.tensor([[[1e4, 0, 0, 0, 0], [-1e4] * 5, [0] * 5]])).isfinite().all()


def test_head_permutation_equivariance():
    order = torch.tensor([3, 0, 4, 2, 1])  # new class j is old class order[j]
    head, queries, region = make_head(), rand(1, 4, 12), unit(1, 4, 16)
    head.calibrate(bias=0.5)
    before = head(queries, region)
    rows = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    head.set_classes(head.rows[rows], order.argsort()[OWNER[rows]], SEEN[order])
    head.calibrate(bias=0.5)
    torch.testing.assert_close(head(queries, region)[..., :5], before[..., order], atol=1e-5, rtol=0)
    torch.testing.assert_close(head(queries, region)[..., 5], before[..., 5], atol=1e-5, rtol=0)


def test_head_synonym_max():
    head, region = make_head(), unit(1, 6, 16)
    single = 50 * region @ head.rows.T - 10
    wanted = torch.stack([single[..., OWNER == k].amax(-1) for k in range(5)], -1)
    torch.testing.assert_close(head.out_logits(region), wanted, atol=1e-4, rtol=0)
    # a second synonym elsewhere, or the first one again, never lowers a class or moves another
    head.set_classes(torch.cat([head.rows, unit(1, 16, seed=5)]), F.pad(OWNER, (0, 1), value=2), SEEN)
    moved = head.out_logits(region)
    assert (moved[..., 2] >= wanted[..., 2] - 1e-4).all() and (moved[..., 2] > wanted[..., 2] + 1).any()
    torch.testing.assert_close(moved[..., [0, 1, 3, 4]], wanted[..., [0, 1, 3, 4]], atol=1e-4, rtol=0)


def test_head_training_seen_columns_only():
    head = make_head().train()
    queries = rand(2, 3, 12)
    logits = head(queries)
    assert logits.shape == (2, 3, 4) and head.column.tolist() == [0, -1, 1, 2, -1]
    full = head.eval().in_logits(queries)
    torch.testing.assert_close(logits, full[..., [0, 2, 3, 5]], atol=1e-5, rtol=0)
    head.train()
    assert head.log_scale.exp().item() == pytest.approx(1 / 0.07)
    head.log_scale.data.fill_(9)
    assert head(queries).abs().max() <= 100 + 1e-3


def test_head_unseen_rows_no_gradient_no_negative():
    head = make_head().train()
    head.rows = head.rows.clone().requires_grad_()
    labels = head.column[torch.tensor([0, 2, 3, 0, 2, 3])]
    F.cross_entropy(head(rand(2, 3, 12)).flatten(0, 1), labels).backward()
    unseen = ~SEEN[OWNER]
    assert unseen.sum() == 2 and not head.rows.grad[unseen].any()
    assert set(OWNER[head.rows.grad.any(1)].tolist()) == {0, 2, 3}  # each class through its best synonym
    assert all(value.grad.any() for value in head.parameters())
    before = head(rand(2, 3, 12)).detach()
    head.rows = torch.where(unseen[:, None], unit(7, 16, seed=9), head.rows.detach())
    assert torch.equal(head(rand(2, 3, 12)), before)  # an unseen row is no negative either


def test_head_one_word_vocabulary_rejects_noise():
    """A softmax over one class is 1 for anything: only the presence may pull a query out of void."""
    word = unit(1, 16)
    head = make_head(word, torch.tensor([0]), [True], scale=100.0, bias=-15.0)
    l_in = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])  # p_void 0.73 for both
    noise = F.normalize(unit(1, 1, 16, seed=3) - unit(1, 1, 16, seed=3) @ word.T * word, dim=-1)  # cosine 0
    out = head.combine(l_in, head.out_logits(torch.cat([word[None], noise], 1))).exp()
    assert out[0, 0, 0] > 0.6 and out[0, 1, 1] > 0.7
    head = make_head(torch.cat([word, -word, unit(1, 16, seed=4)]), torch.arange(3), [True] * 3, bias=-99.0)
    assert head.combine(torch.tensor([[[0.0, 0, 0, 2]]]), head.out_logits(word[None])).argmax() == 3


def test_head_bias_moves_seen_only():
    head, queries, region = make_head(), rand(1, 50, 12), unit(1, 50, 16)
    before = head(queries, region)
    head.calibrate(bias=2.0)
    after = head(queries, region)
    gap = (after - before)[..., :5] - (after - before)[..., 1:2]  # against an unseen class
    torch.testing.assert_close(gap, (-2.0 * SEEN).expand_as(gap), atol=1e-4, rtol=0)
    torch.testing.assert_close(after[..., 5], before[..., 5])
    unseen = [(~SEEN[out[..., :5].argmax(-1)]).sum() for out in (before, after)]
    assert unseen[1] > unseen[0]


def test_head_bias_on_all_classes_is_refused():
    for seen in ([True] * 5, [False] * 5):
        head = make_head(seen=seen)
        head.calibrate(bias=0.0)
        if seen[0]:
            with pytest.raises(ValueError, match="ov-bias 1.0.*all 5 classes.*; use it"):
                head.calibrate(bias=1.0)
        with pytest.raises(ValueError, match="^ov-class-bias: equal for all 5 classes"):
            head.calibrate(class_bias=torch.ones(5))


@pytest.mark.parametrize("name, value", [
    ("alpha", math.nan), ("alpha", -0.1), ("alpha", 1.5), ("beta", math.nan), ("beta", 2.0),
    ("bias", math.nan), ("bias", math.inf)])
def test_head_calibrate_refuses_what_no_mask_survives(name, value):
    """They were taken in silence, and every class of every mask became NaN."""
    with pytest.raises(ValueError, match=f"^ov-{name} {value}: [^\n]+; give ") as error:
        make_head().calibrate(**{name: value})
    assert "\n" not in str(error.value)
    make_head().calibrate(alpha=0, beta=1, bias=-3)


def test_head_energy_rejection():
    head = make_head()
    region = torch.cat([head.rows[None, [0, 3]], -F.normalize(head.rows.sum(0), dim=0)[None, None]], 1)
    l_out, queries = head.out_logits(region), rand(1, 3, 12)
    energy = head.energy(l_out)
    torch.testing.assert_close(energy, l_out.logsumexp(-1) - math.log(5))
    assert energy[0, 2] < energy[0, :2].min() - 5
    before = head(queries, region)
    head.calibrate(reject=float(energy[0, :2].min()) - 1)
    after = head(queries, region)
    assert torch.equal(after[0, :2], before[0, :2])
    assert after.isfinite().all() and after[0, 2].argmax() == 5 and after[0, 2, 5].exp() > 0.999
    torch.testing.assert_close(after[0, 2].exp().sum(), torch.tensor(1.0))


def test_head_saved_with_its_vocabulary():
    head, other = make_head(), make_head(unit(7, 16, seed=8), seen=[False, True, True, False, True])
    assert {"rows", "owner", "seen", "logit_scale", "logit_bias"} <= set(head.state_dict())
    other.load_state_dict(head.state_dict())
    queries, region = rand(1, 3, 12), unit(1, 3, 16)
    assert torch.equal(other(queries, region), head(queries, region))
    assert torch.equal(other.train()(queries), head.train()(queries))
    assert torch.equal(other.column, head.column)


def test_head_set_classes_changes_size():
    head = make_head()
    head.set_classes(unit(3, 16), torch.tensor([0, 1, 1]), [True, False])
    assert head(rand(1, 4, 12), unit(1, 4, 16)).shape == (1, 4, 3)
    with pytest.raises(AssertionError):
        head.set_classes(rand(2, 16), torch.tensor([0, 2]), [True, True, True])


def test_head_set_classes_keeps_what_is_of_no_class():
    """New words go on with the checkpoint's alpha, beta and temperatures; biases and the energy go."""
    head = make_head()
    kept = dict(alpha=0.1, beta=0.9, temp_in=2.0, temp_out=3.0)
    head.calibrate(**kept, bias=0.4, class_bias=torch.arange(5.0), reject=-5.0)
    head.set_classes(unit(3, 16), torch.tensor([0, 1, 1]), [True, False])
    assert head.kept == kept and head.reject == -math.inf and not head.shift.any()
    other, queries, region = make_head(), rand(1, 4, 12), unit(1, 4, 16)
    other.set_classes(head.rows, head.owner, head.seen)
    other.calibrate(**head.kept)
    assert torch.equal(head(queries, region), other(queries, region))
    head.calibrate()
    assert head.kept == dict(alpha=0.4, beta=0.8, temp_in=1.0, temp_out=1.0) == make_head().kept


def test_head_bf16_autocast_keeps_fp32_cosines():
    head = make_head(scale=110.0)
    region = unit(1, 4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        ours = head.out_logits(region)
    wanted = 110 * (region[0].double() @ head.rows[2].double()) - 10  # class 1 has one row
    torch.testing.assert_close(ours[0, :, 1].double(), wanted, atol=1e-3, rtol=0)


def test_fit_temperature_minimises_nll():
    logits = rand(400, 6)
    labels = torch.distributions.Categorical(logits=logits).sample()
    best = siglip2.fit_temperature(logits * 7, labels)

    def nll(t):
        return F.cross_entropy(logits * 7 / t, labels)

    assert 4 < best < 12 and nll(best) <= min(nll(best * 0.97), nll(best * 1.03), nll(1.0))


def test_frequency_bias():
    counts = torch.tensor([10.0, 0, 30, 60, 0])
    bias = siglip2.frequency_bias(counts, SEEN)
    torch.testing.assert_close(bias[SEEN], -torch.log(torch.tensor([0.1, 0.3, 0.6])))
    torch.testing.assert_close(bias[~SEEN], bias[SEEN].mean().expand(2))


def test_head_wants_an_owner_for_every_row():
    with pytest.raises(AssertionError, match=r"\[4, 12\]\), tensor\(\[0, 1, 1\]\)"):
        make_head(torch.randn(4, 12), torch.tensor([0, 1, 1]), [True, False])
