"""P-Tuning v2: keys and values of a trained prefix stand before every sequence, as PyTorch computes it."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from glm_models import reference
from golden_cases import V1
from golden_sets import OPS
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from chatglm_ov import ChatGLMError, OVChatGLMForCausalLM, convert
from chatglm_ov.calibration import run
from chatglm_ov.calibration.text import Calibration
from chatglm_ov.checkpoint.reader import Checkpoint
from chatglm_ov.generation.cache import CACHE_NAME
from chatglm_ov.models.chatglm import RESIDUAL_SCALE
from chatglm_ov.presets import config_json
from chatglm_ov.runtime.kv_cache import BlockLayout

P = 5
FORMATS = ("alone", "with a projection", "in the checkpoint")
SIZES = {"hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 2, "num_attention_heads": 4, "kv_channels": 16}
NAMES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.dense.weight": "self_attn.o_proj.weight",
    "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
    "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
}


def encoder(kind: str, features: int, length: int = P) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors of a prefix encoder, and its rows [length, features]."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    name = "transformer.prefix_encoder."
    if kind != "with a projection":
        rows = random(length, features)
        return {f"{name}embedding.weight": rows}, rows
    layers = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.Tanh(), torch.nn.Linear(32, features))
    for parameter in layers.parameters():
        parameter.data = random(*parameter.shape) * 0.3
    embedding = random(length, 24)
    stored = {f"{name}trans.{key}": value for key, value in layers.state_dict().items()}
    return {f"{name}embedding.weight": embedding, **stored}, layers(embedding).detach()


def placed(kind: str, checkpoint: Path, tensors: dict[str, torch.Tensor], pre_seq_len: int = P) -> dict[str, Path]:
    """Put the tensors where a training puts them; what conversion has to be told."""
    config = checkpoint / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pre_seq_len": pre_seq_len}))
    if kind == "in the checkpoint":
        file = checkpoint / "model.safetensors"
        save_file({**load_file(file), **tensors}, file)
        return {}
    tuned = checkpoint.parent / "tuned"
    tuned.mkdir()
    torch.save(tensors, tuned / "pytorch_model.bin")
    return {"p_tuning": tuned}


def model_of(checkpoint: Path, ops: str, options: dict[str, Path], *loading: str) -> OVChatGLMForCausalLM:
    convert(checkpoint, checkpoint.parent / ops, ("f32",), ops, progress=False, **options)
    return OVChatGLMForCausalLM.from_pretrained(checkpoint.parent / ops, "f32", *(loading or ("f32",)))


# ChatGLM2 and ChatGLM3: transformers' GLM has the same mathematics.


def chatglm2_checkpoint(folder: Path, seq_length: int = 64) -> tuple[Path, torch.nn.Module]:
    original = reference("glm", vocab_size=160, max_position_embeddings=64, rms_norm_eps=1e-5)
    weights, stored = original.state_dict(), {}
    for i in range(2):
        ours, theirs = f"transformer.encoder.layers.{i}", f"model.layers.{i}"
        stored |= {f"{ours}.{name}": weights[f"{theirs}.{other}"] for name, other in NAMES.items()}
        for kind in ("weight", "bias"):
            parts = [weights[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            stored[f"{ours}.self_attention.query_key_value.{kind}"] = torch.cat(parts)
    stored["transformer.embedding.word_embeddings.weight"] = weights["model.embed_tokens.weight"]
    stored["transformer.encoder.final_layernorm.weight"] = weights["model.norm.weight"]
    stored["transformer.output_layer.weight"] = weights["lm_head.weight"]
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    fields = config_json("chatglm3-6b", **SIZES, padded_vocab_size=160, seq_length=seq_length)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder, original


IDS = torch.randint(2, 160, (1, 9), generator=torch.Generator().manual_seed(0))


def tuned(folder: Path, length: int = P, **options: int) -> tuple[Path, dict[str, Path]]:
    """A checkpoint with a prefix that was trained for it, and what conversion has to be told."""
    checkpoint, _ = chatglm2_checkpoint(folder / "checkpoint", **options)
    tensors, _ = encoder("alone", 2 * 2 * 2 * 16, length)
    return checkpoint, placed("alone", checkpoint, tensors, length)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("ops", OPS)
def test_chatglm2(ops, kind, tmp_path):
    checkpoint, original = chatglm2_checkpoint(tmp_path / "checkpoint")
    tensors, rows = encoder(kind, 2 * 2 * 2 * 16)
    model = model_of(checkpoint, ops, placed(kind, checkpoint, tensors))
    past = rows.reshape(1, P, 4, 2, 16).permute(2, 0, 3, 1, 4)
    ids, cache = IDS, DynamicCache()
    for layer in range(2):
        cache.update(past[2 * layer], past[2 * layer + 1], layer)
    with torch.no_grad():
        wanted = original(
            ids, **{CACHE_NAME: cache}, position_ids=torch.arange(9)[None], attention_mask=torch.ones(1, P + 9).long()
        ).logits
    check_sequences(model, ids, wanted)
    # A row on its own is the row in a padded batch, and beams begin with the prefix too.
    two = torch.cat([torch.zeros(1, 2, dtype=torch.int64), ids[:, :7]], 1)
    mask = torch.tensor([[0, 0] + [1] * 7, [1] * 9])
    batch = model(torch.cat([two, ids]), attention_mask=mask).logits
    torch.testing.assert_close(batch[1:], wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(batch[:1, 2:], wanted[:, :7], rtol=0, atol=1e-4)
    # The cache is read without the prefix.
    keys, _ = model.session.request.cached(0)
    assert keys.shape[2] == 9


def check_sequences(model: OVChatGLMForCausalLM, ids: torch.Tensor, wanted: torch.Tensor) -> None:
    for _ in range(2):
        torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=1e-4)
    count = ids.shape[1]
    output = model(ids[:, : count - 2])
    parts = [output.logits]
    for at in (count - 2, count - 1):
        output = model(ids[:, at : at + 1], past_key_values=output.past_key_values)
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=0, atol=1e-4)
    output.past_key_values.crop(count - 1)
    again = model(ids[:, count - 1 :], past_key_values=output.past_key_values).logits
    torch.testing.assert_close(again, wanted[:, -1:], rtol=0, atol=1e-4)
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    alone = model.generate(ids, **greedy)
    assert torch.equal(model.generate(ids, reuse_cache=True, **greedy), alone)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **greedy), alone)
    beams = model.generate(ids, num_beams=3, num_return_sequences=3, **greedy)
    assert len(beams) == 3


# ChatGLM-6B


def chatglm_logits(weights: dict[str, torch.Tensor], fields: dict, ids: torch.Tensor, past: torch.Tensor):
    """Logits [1, N, V] (model-family 3.1, 3.4, 3.5, 3.8) with past [2 layers, 1, heads, P, D] before all."""
    hidden, heads, layers = (fields[name] for name in ("hidden_size", "num_attention_heads", "num_layers"))
    dim, count = hidden // heads, ids.shape[1]
    start = int((ids[0] == fields["bos_token_id"]).nonzero()[0])
    place = int((ids[0] == fields["gmask_token_id"]).nonzero()[0])
    at = torch.arange(count)
    positions = torch.stack([torch.where(at < start, at, place), torch.clamp(at - start + 1, min=0)])
    inv_freq = (1 / 10000.0 ** (torch.arange(0, dim // 2, 2).float() / (dim // 2))).half().float()
    seen = (at[:, None] >= at) | (at < start)
    seen = torch.cat([torch.ones(count, past.shape[3], dtype=torch.bool), seen], 1)

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, (hidden,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def rotated(x):
        """x [N, heads, D], each half of the dims by its row of positions."""
        parts = []
        for half, row in zip(x.chunk(2, -1), positions, strict=True):
            angle = (row[:, None].float() * inv_freq).repeat(1, 2)[:, None]
            a, b = half.chunk(2, -1)
            parts.append(half * angle.cos() + torch.cat([-b, a], -1) * angle.sin())
        return torch.cat(parts, -1)

    x = weights["transformer.word_embeddings.weight"][ids[0]]
    for i in range(layers):
        layer = f"transformer.layers.{i}"
        u = norm(x, f"{layer}.input_layernorm")
        q, k, v = linear(u, f"{layer}.attention.query_key_value").reshape(count, heads, 3 * dim).chunk(3, -1)
        q, k, v = (each.transpose(0, 1) for each in (rotated(q), rotated(k), v))
        k, v = torch.cat([past[2 * i][0], k], 1), torch.cat([past[2 * i + 1][0], v], 1)
        scores = (q @ k.transpose(1, 2) / sqrt(dim)).masked_fill(~seen, -torch.inf)
        context = (scores.softmax(-1) @ v).transpose(0, 1).reshape(count, hidden)
        y = RESIDUAL_SCALE * u + linear(context, f"{layer}.attention.dense")
        w = norm(y, f"{layer}.post_attention_layernorm")
        inner = torch.nn.functional.gelu(linear(w, f"{layer}.mlp.dense_h_to_4h"), approximate="tanh")
        x = RESIDUAL_SCALE * w + linear(inner, f"{layer}.mlp.dense_4h_to_h")
    return (norm(x, "transformer.final_layernorm") @ weights["lm_head.weight"].T)[None]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("ops", OPS)
def test_chatglm(ops, kind, tmp_path):
    fields = json.loads((V1.checkpoint / "config.json").read_text())
    with Checkpoint.open(V1.checkpoint) as stored:
        weights = {name: torch.from_numpy(stored[name].read()) for name in stored.names}
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(fields))
    save_file({name: tensor.clone() for name, tensor in weights.items()}, checkpoint / "model.safetensors")
    heads, layers = fields["num_attention_heads"], fields["num_layers"]
    dim = fields["hidden_size"] // heads
    tensors, rows = encoder(kind, 2 * layers * fields["hidden_size"])
    past = rows.reshape(1, P, 2 * layers, heads, dim).permute(2, 0, 3, 1, 4)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, fields["gmask_token_id"], fields["bos_token_id"], 11, 12]])
    none = past[:, :, :, :0]
    plain = model_of(checkpoint, ops, {})
    torch.testing.assert_close(plain(ids).logits, chatglm_logits(weights, fields, ids, none), rtol=0, atol=1e-4)
    options = placed(kind, checkpoint, tensors)
    convert(checkpoint, tmp_path / "tuned-ov", ("f32",), ops, progress=False, **options)
    model = OVChatGLMForCausalLM.from_pretrained(tmp_path / "tuned-ov", "f32", "f32")
    wanted = chatglm_logits(weights, fields, ids, past)
    assert (wanted - chatglm_logits(weights, fields, ids, none)).abs().max() > 0.01
    check_sequences(model, ids, wanted)


@pytest.mark.parametrize("kv_cache_format", ["bf16", "int8"])
def test_other_caches_hold_a_rounded_prefix(kv_cache_format, tmp_path):
    checkpoint, options = tuned(tmp_path)
    model = model_of(checkpoint, "fused", options)
    rounded = OVChatGLMForCausalLM.from_pretrained(tmp_path / "fused", "f32", kv_cache_format=kv_cache_format)
    wanted, got = model(IDS).logits, rounded(IDS).logits
    # Keys and values to 8 bits, in two layers.
    assert (got - wanted).square().mean().sqrt() < 4 * 2**-8 * wanted.square().mean().sqrt()
    assert not torch.equal(got, wanted)


@given(
    st.sampled_from(["f32", "bf16", "int8"]), st.integers(1, 3), st.integers(1, 70), st.sampled_from([4, 16, 20, 64])
)
def test_blocks_are_what_is_read_back(element_type, groups, tokens, dim):
    layout = BlockLayout(element_type, groups, dim)
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((2, groups, tokens, dim), np.float32)
    key[0, 0] = 0
    blocks = layout.encode(key, value)
    assert blocks.shape == (-(-tokens // 32), groups, layout.block_bytes)
    for stored, array in zip(layout.decode(blocks), (key, value), strict=True):
        step = {"f32": 0, "bf16": 2**-8 * np.abs(array), "int8": np.abs(array).max(-1, keepdims=True) / 254}
        assert (np.abs(stored[:, :tokens] - array) <= step[element_type] * 1.001).all()


def test_a_new_sequence_gives_the_rows_of_the_last_one_back(tmp_path):
    checkpoint, options = tuned(tmp_path, seq_length=4096)
    model = model_of(checkpoint, "fused", options)
    model(torch.full((32, 9), 5))
    cache = model.session.request.cache
    assert cache.rows == 32
    model(torch.full((1, 3000), 5), logits_to_keep=1)
    assert cache.rows == 1


def test_a_prefix_longer_than_a_cache_begins_with(tmp_path):
    checkpoint, options = tuned(tmp_path, 300)
    fused, stock = (model_of(checkpoint, ops, options)(IDS).logits for ops in ("fused", "stock"))
    torch.testing.assert_close(fused, stock, rtol=0, atol=1e-4)


def test_a_beginning_that_is_interrupted(tmp_path, monkeypatch):
    """One layer has the prefix: nothing goes on behind it."""
    checkpoint, options = tuned(tmp_path)
    model = model_of(checkpoint, "stock", options)
    wanted = model(IDS).logits
    request = model.session.request
    cache, infer_request = request.cache, request.infer_request
    begin_with = cache.begin_with

    def interrupted(keys, values, *others):
        begin_with(keys[:1], values[:1], *others)
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "begin_with", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(IDS)
    assert request.infer_request is not infer_request
    torch.testing.assert_close(model(IDS).logits, wanted, rtol=0, atol=1e-5)


def test_what_goes_through_the_cache_is_not_scaled_beside_a_prefix(tmp_path, monkeypatch):
    """AWQ would divide the values that the weights make, and not those of the prefix."""
    seen: list[tuple[int, ...]] = []

    def ones(weight, *_):
        seen.append(tuple(weight.shape))
        return torch.ones(weight.shape[1])

    monkeypatch.setattr(run, "column_scales", ones)
    monkeypatch.setattr("chatglm_ov.conversion.convert._sequences", lambda *_: [np.arange(2, 40)])
    checkpoint, _ = chatglm2_checkpoint(tmp_path / "checkpoint")
    calibration = Calibration(("awq",), tokens=512)
    for name, count in (("plain", 8), ("tuned", 6)):
        options = {}
        if name == "tuned":
            tensors, _ = encoder("alone", 2 * 2 * 2 * 16)
            options = placed("alone", checkpoint, tensors)
        seen.clear()
        convert(checkpoint, tmp_path / f"{name}-ov", ("int4",), progress=False, calibration=calibration, **options)
        # Of four weights a layer, all but that behind attention, [64, 64].
        assert len(seen) == count
        assert ((64, 64) in seen) == (name == "plain")


# Bad input


def spoiled(change) -> dict[str, torch.Tensor]:
    tensors, _ = encoder("with a projection", 2 * 2 * 2 * 16)
    change(tensors)
    return tensors


NAME = "transformer.prefix_encoder."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}trans.2.bias"), "trans.2.bias: missing"),
        (lambda t: t.pop(f"{NAME}embedding.weight"), "embedding.weight: missing"),
        (lambda t: t.update({f"{NAME}other": torch.zeros(1)}), "other"),
        (lambda t: t.update({f"{NAME}trans.0.weight": torch.zeros(32, 23)}), "trans.0.weight"),
        (lambda t: t.update({f"{NAME}trans.2.weight": torch.zeros(128, 31)}), "trans.2.weight"),
        (lambda t: t[f"{NAME}embedding.weight"].fill_(float("nan")), "embedding.weight"),
        (lambda t: t.update({f"{NAME}embedding.weight": torch.zeros(5, 24, dtype=torch.int8)}), "int8"),
        (lambda t: [t.pop(name) for name in list(t)], "prefix_encoder"),
    ],
)
def test_wrong_encoders_are_told(change, message, tmp_path):
    checkpoint, _ = chatglm2_checkpoint(tmp_path / "checkpoint")
    tensors = spoiled(change) or {"other.weight": torch.zeros(2, 2)}
    with pytest.raises(ChatGLMError) as error:
        convert(checkpoint, tmp_path / "out", progress=False, **placed("alone", checkpoint, tensors))
    assert all(word in str(error.value) for word in message.split(": "))
    assert not (tmp_path / "out").exists()


def test_encoders_for_other_shapes_are_told(tmp_path):
    checkpoint, _ = chatglm2_checkpoint(tmp_path / "checkpoint")
    tensors, _ = encoder("alone", 2 * 3 * 2 * 16)
    with pytest.raises(ChatGLMError, match="keys and values of 2 layers"):
        convert(checkpoint, tmp_path / "out", progress=False, **placed("alone", checkpoint, tensors))


def test_a_prefix_that_is_nowhere_is_told(tmp_path):
    checkpoint, options = tuned(tmp_path)
    with pytest.raises(ChatGLMError, match="pre_seq_len"):
        convert(checkpoint, tmp_path / "out", progress=False)
    convert(checkpoint, tmp_path / "out", ("f32",), progress=False, **options)
    (tmp_path / "out" / "prefix.safetensors").unlink()
    with pytest.raises(ChatGLMError, match=r"prefix\.safetensors"):
        OVChatGLMForCausalLM.from_pretrained(tmp_path / "out")


def test_a_prefix_with_other_values_alone_is_another_one(tmp_path):
    checkpoint, options = tuned(tmp_path)
    folder = convert(checkpoint, tmp_path / "out", ("f32",), progress=False, **options)
    tensors, rows = encoder("alone", 2 * 2 * 2 * 16)
    rows.view(P, 2, 2, 2, 16)[:, :, 1] += 1
    torch.save(tensors, options["p_tuning"] / "pytorch_model.bin")
    with pytest.raises(ChatGLMError, match="trained prefix is another one"):
        convert(checkpoint, folder, ("bf16",), add=True, progress=False, **options)


def test_a_prefix_file_of_another_type_is_told(tmp_path):
    checkpoint, options = tuned(tmp_path)
    convert(checkpoint, tmp_path / "out", ("f32",), progress=False, **options)
    path = tmp_path / "out" / "prefix.safetensors"
    save_file({name: values.half() for name, values in load_file(path).items()}, path)
    with pytest.raises(ChatGLMError, match=r"keys is float16 \[2, 2, 5, 16\], expected float32"):
        OVChatGLMForCausalLM.from_pretrained(tmp_path / "out")
