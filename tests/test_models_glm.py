"""`glm` and `glm4` against transformers' own classes, in float32."""

from __future__ import annotations

import copy
import json
import logging
from collections import Counter
from math import log, pi
from pathlib import Path

import numpy as np
import pytest
import torch
from glm_models import EDGE, KINDS, TINY, reference, saved
from golden_sets import rounds_to_bf16
from safetensors.torch import load_file, save_file

from chatglm_ov import OVChatGLMForCausalLM, convert
from chatglm_ov.checkpoint import fields as checkpoint_fields
from chatglm_ov.checkpoint.model_weights import model_weights
from chatglm_ov.checkpoint.reader import Checkpoint
from chatglm_ov.config import parse_config
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.models import graph_shapes
from chatglm_ov.presets import config_json
from chatglm_ov.rope_scaling import RopeScaling, rotary_frequencies

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS = {
    "plain": {},
    "edge": EDGE,
    "no bias": {"attention_bias": False, "num_key_value_heads": 4},
    "yarn": {"rope_scaling": YARN},
    # transformers 4.48 takes max_position_embeddings for the trained length in any case.
    "yarn, own factor": {
        "rope_scaling": {
            **YARN,
            "original_max_position_embeddings": TINY["max_position_embeddings"],
            "attention_factor": 0.9,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        }
    },
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "base": {"rope_theta": 5e6},
}
IDS = torch.randint(2, TINY["vocab_size"], (1, 100), generator=torch.Generator().manual_seed(0))


def converted(checkpoint: Path, output: Path, ops: str, **options) -> OVChatGLMForCausalLM:
    convert(checkpoint, output, ("f32",), ops, progress=False, **options)
    return OVChatGLMForCausalLM.from_pretrained(output, "f32", "f32")


@pytest.mark.parametrize("kind", KINDS)
def test_layers_run_as_few_operations(kind, tmp_path):
    """One, also in `glm4`, where what the norms behind a sub-layer give is added to the residual."""
    ours = converted(saved(reference(kind), tmp_path / "checkpoint"), tmp_path / "fused", "fused")
    count = Counter(node.get_type_name() for node in ours.compiled.model.get_ops())
    names = ("Chain", "FullyConnected", "LastRows", "MultiHeadAttention", "Norm", "EmbeddingRows")
    assert [count[name] for name in names] == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind, variant, tmp_path):
    original = reference(kind, **VARIANTS[variant])
    checkpoint = saved(original, tmp_path / "checkpoint")
    with torch.no_grad():
        wanted = original(IDS).logits
    for ops in ("stock", "fused"):
        ours = converted(checkpoint, tmp_path / ops, ops)
        torch.testing.assert_close(ours(IDS).logits, wanted, rtol=0, atol=1e-4)
        # The prompt in two parts, then token by token.
        output = ours(IDS[:, :60])
        parts = [output.logits]
        for start, end in ((60, 97), (97, 98), (98, 100)):
            output = ours(IDS[:, start:end], past_key_values=output.past_key_values)
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_left_padded_rows_are_those_of_transformers(kind, tmp_path):
    original = reference(kind)
    checkpoint = saved(original, tmp_path / "checkpoint")
    mask = torch.ones_like(IDS)
    mask[0, :37] = 0
    ids, masks = torch.cat([IDS, IDS.flip(1)]), torch.cat([mask, torch.ones_like(mask)])
    positions = (masks.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        wanted = original(ids, attention_mask=masks, position_ids=positions).logits
    for ops in ("stock", "fused"):
        logits = converted(checkpoint, tmp_path / ops, ops)(ids, attention_mask=masks).logits
        torch.testing.assert_close(logits[masks == 1], wanted[masks == 1], rtol=0, atol=1e-4)


def test_both_spellings_of_rope_are_one():
    """transformers 4 has the fields beside each other, 5 in one object."""
    fields = config_json("glm-4-9b-0414")
    older = {**fields, "rope_theta": 5e6, "partial_rotary_factor": 1.0, "rope_scaling": {**YARN}}
    del older["rope_scaling"]["rope_type"]
    older["rope_scaling"]["type"] = "yarn"
    newer = {name: value for name, value in fields.items() if name not in ("rope_theta", "partial_rotary_factor")}
    newer["rope_parameters"] = {**YARN, "rope_theta": 5e6, "partial_rotary_factor": 1.0}
    assert parse_config(older) == parse_config(newer)
    assert parse_config(older).rope_scaling.factor == 4.0
    # As in transformers 5, the object goes before what stands beside it.
    assert parse_config({**newer, "rope_theta": 7.0}).rope_theta == 5e6
    assert parse_config({**fields, "rope_theta": 7.0, "rope_scaling": {**YARN, "rope_theta": 9.0}}).rope_theta == 9.0
    # And an object of 4 goes before all of that of 5, whose base is then the default one.
    both = parse_config({**newer, "rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    assert (both.rope_scaling.rope_type, both.rope_scaling.factor) == ("linear", 2.0)
    assert (both.rope_theta, both.partial_rotary_factor) == (10000.0, 0.5)
    plain = {**newer, "rope_parameters": {"rope_type": "default", "rope_theta": 3.0, "partial_rotary_factor": 0.5}}
    assert parse_config(plain).rope_scaling is None
    assert parse_config(plain).rope_theta == 3.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type is 'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "rope_scaling.factor is 0.5"),
        ({"rope_scaling": {"factor": 4.0, "rope_type": 3}}, "rope_scaling.rope_type is 3"),
        ({"rope_parameters": [1]}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 1e300}}, "rope_scaling.factor is 1e+300"),
        ({"rope_theta": 1e300}, "rope_theta is 1e+300"),
        ({"partial_rotary_factor": 0.01}, "partial_rotary_factor"),
        ({"partial_rotary_factor": None}, "partial_rotary_factor is None"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ({"head_dim": 6}, "head_dim is 6"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ChatGLMError) as error:
        parse_config({**config_json("glm-4-9b-chat-hf"), **fields})
    assert message in str(error.value).replace(" = ", " is ")


def test_head_dim_may_be_null():
    fields = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": None}
    assert parse_config(config_json("glm-4-9b-0414", **fields)).head_dim == 16


def test_head_dim_that_is_left_out_is_that_of_transformers_config():
    fields = config_json("glm-4-9b-chat-hf", hidden_size=4096, num_attention_heads=16)
    fields.pop("head_dim", None)
    assert parse_config(fields).head_dim == 128


def test_the_trained_length_may_stand_beside_the_scaling():
    fields = config_json("glm-4-9b-0414", original_max_position_embeddings=4096)
    scaled = parse_config({**fields, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    assert scaled.rope_scaling.original_max_position_embeddings == 4096
    scaled = parse_config({**fields, "rope_scaling": YARN})
    assert scaled.rope_scaling.original_max_position_embeddings == 64


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_may_be_longer_than_the_model_was_made_for(kind, tmp_path):
    """As with transformers, whose `glm` and `glm4` have no table of positions, and which warn of it."""
    original = reference(kind, max_position_embeddings=32)
    ours = converted(saved(original, tmp_path / "checkpoint"), tmp_path / "out", "fused")
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, original(IDS).logits, rtol=0, atol=1e-4)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(IDS[:, :20], **options), original.generate(IDS[:, :20], **options))
    assert ours.compiled.config.max_positions == 32 and ours.compiled.config.position_limit is None


def test_options_replace_what_stands_in_an_object(tmp_path):
    original = reference("glm", rope_theta=3e4)
    checkpoint = saved(original, tmp_path / "checkpoint")
    fields = json.loads((checkpoint / "config.json").read_text())
    object_of_5 = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 3e4, "partial_rotary_factor": 0.5}
    (checkpoint / "config.json").write_text(json.dumps({**fields, "rope_parameters": object_of_5}))
    with pytest.raises(ChatGLMError, match="rope_type"):
        converted(checkpoint, tmp_path / "refused", "stock")
    linear = {"rope_type": "linear", "factor": 2.0}
    ours = converted(checkpoint, tmp_path / "out", "stock", rope_theta=5e6, rope_scaling=linear)
    with torch.no_grad():
        wanted = reference("glm", rope_theta=5e6, rope_scaling=linear)(IDS).logits
    torch.testing.assert_close(ours(IDS).logits, wanted, rtol=0, atol=1e-4)
    ours = converted(checkpoint, tmp_path / "scaled", "stock", rope_scaling=linear)
    with torch.no_grad():
        wanted = reference("glm", rope_theta=3e4, rope_scaling=linear)(IDS).logits
    torch.testing.assert_close(ours(IDS).logits, wanted, rtol=0, atol=1e-4)
    with pytest.raises(ChatGLMError, match="rope_scaling is"):
        converted(checkpoint, tmp_path / "list", "stock", rope_scaling=[1])


def test_positions_grow_with_the_scaling():
    assert parse_config(config_json("glm-4-9b-0414")).max_positions == 32768
    scaled = config_json("glm-4-9b-0414", rope_scaling={**YARN, "original_max_position_embeddings": 32768})
    assert parse_config(scaled).max_positions == 131072
    scaled["max_position_embeddings"] = 131072
    assert parse_config(scaled).max_positions == 131072
    # They are never fewer than those that are told.
    scaled = config_json("glm-4-9b-0414", rope_scaling=YARN)
    assert parse_config(scaled).max_positions == 32768


@pytest.mark.parametrize("rope_type", ["yarn", "linear", "ntk"])
def test_scaling_is_an_option_of_conversion(rope_type, tmp_path):
    checkpoint = saved(reference("glm"), tmp_path / "checkpoint")
    long = torch.randint(2, TINY["vocab_size"], (1, 300), generator=torch.Generator().manual_seed(1))
    scaled = converted(checkpoint, tmp_path / "scaled", "fused", rope_scaling={"rope_type": rope_type, "factor": 4.0})
    assert scaled.config.max_position_embeddings == 1024
    assert torch.isfinite(scaled(long).logits).all()
    if rope_type != "ntk":  # transformers has only the variant that follows the length of the text
        with torch.no_grad():
            scaling = {"rope_type": rope_type, "factor": 4.0, "original_max_position_embeddings": 256}
            wanted = reference("glm", rope_scaling=scaling)(long).logits
        torch.testing.assert_close(scaled(long).logits, wanted, rtol=0, atol=2e-4)


def test_ntk_keeps_the_fastest_pair_and_slows_the_slowest_down():
    plain, _ = rotary_frequencies(10000.0, 64)
    scaled, factor = rotary_frequencies(10000.0, 64, RopeScaling(rope_type="ntk", factor=8.0))
    assert factor == 1.0
    np.testing.assert_allclose(plain / scaled, np.geomspace(1, 8, 32), rtol=1e-5)


def yarn(trained: int = 4096, **fields) -> tuple[np.ndarray, float]:
    """Frequencies of 32 pairs, and the factor of cosines and sines."""
    return rotary_frequencies(1e4, 64, RopeScaling(rope_type="yarn", factor=4.0, **fields), trained)


def test_yarn_takes_the_trained_length_of_the_scaling():
    told, _ = yarn(32768, original_max_position_embeddings=4096)
    np.testing.assert_array_equal(told, yarn(4096)[0])
    assert not np.array_equal(told, yarn(32768)[0])


def test_the_ramp_of_yarn_may_lie_between_whole_pairs():
    low, high = (64 * log(4096 / (turns * 2 * pi)) / (2 * log(1e4)) for turns in (32, 1))
    plain, _ = rotary_frequencies(1e4, 64)
    ramp = np.clip((np.arange(32) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(yarn(truncate=False)[0], plain * (1 - ramp) + plain / 4 * ramp, rtol=1e-5)


def test_the_attention_factor_of_yarn_is_of_two_scales_or_of_none():
    assert [yarn(**fields)[1] for fields in ({}, {"mscale": 2.0}, {"mscale_all_dim": 2.0})] == [0.1 * log(4) + 1] * 3
    assert yarn(mscale=2.0, mscale_all_dim=0.5)[1] == (0.2 * log(4) + 1) / (0.05 * log(4) + 1)


def test_a_doubtful_base_is_told_and_can_be_replaced(tmp_path, caplog):
    original = reference("glm", max_position_embeddings=131072)
    checkpoint = saved(original, tmp_path / "checkpoint")
    with caplog.at_level(logging.WARNING, "chatglm_ov"):
        converted(checkpoint, tmp_path / "plain", "stock")
    assert "--rope-theta 5e6" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "chatglm_ov"):
        ours = converted(checkpoint, tmp_path / "other", "stock", rope_theta=5e6)
    assert not caplog.text
    with torch.no_grad():
        wanted = reference("glm", max_position_embeddings=131072, rope_theta=5e6)(IDS).logits
    torch.testing.assert_close(ours(IDS).logits, wanted, rtol=0, atol=1e-4)


def test_scaling_as_an_option_keeps_what_else_the_object_says(tmp_path):
    rope = {"rope_theta": 5e6, "partial_rotary_factor": 1.0}
    checkpoint = saved(reference("glm"), tmp_path / "checkpoint")
    fields = json.loads((checkpoint / "config.json").read_text())
    fields = {name: value for name, value in fields.items() if name not in ("rope_parameters", *rope)}
    (checkpoint / "config.json").write_text(json.dumps({**fields, "rope_scaling": {"rope_type": "default", **rope}}))
    linear = {"rope_type": "linear", "factor": 2.0}
    ours = converted(checkpoint, tmp_path / "out", "stock", rope_scaling=linear)
    with torch.no_grad():
        wanted = reference("glm", **rope, rope_scaling=linear)(IDS).logits
    torch.testing.assert_close(ours(IDS).logits, wanted, rtol=0, atol=1e-4)


def store_head(checkpoint: Path, added: float) -> None:
    """Beside the embedding, and its last row differs from that by so much."""
    weights = load_file(checkpoint / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    head[-1, 0] += added
    save_file({**weights, "lm_head.weight": head}, checkpoint / "model.safetensors")


@pytest.mark.parametrize("added", [0, 1])
def test_a_head_that_is_called_tied_is_looked_at_to_its_end(added, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_fields, "_ROWS", 8)
    checkpoint = saved(reference("glm", **EDGE), tmp_path / "checkpoint")
    store_head(checkpoint, added)
    assert checkpoint_fields.checkpoint_fields(checkpoint)["tie_word_embeddings"] == (not added)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_is_stored_is_used_though_it_is_called_tied(kind, tmp_path, caplog):
    original = reference(kind)
    checkpoint = saved(original, tmp_path / "checkpoint")
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    with torch.no_grad():
        wanted = original(IDS).logits
    for ops in ("stock", "fused"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "chatglm_ov"):
            ours = converted(checkpoint, tmp_path / ops, ops)
        assert "lm_head.weight differs from the embedding" in caplog.text
        torch.testing.assert_close(ours(IDS).logits, wanted, rtol=0, atol=1e-4)


def test_a_head_that_is_the_embedding_is_stored_once(tmp_path, caplog):
    checkpoint = saved(reference("glm", **EDGE), tmp_path / "checkpoint")
    store_head(checkpoint, 0)
    with torch.no_grad():
        wanted = reference("glm", **EDGE)(IDS).logits
    with caplog.at_level(logging.WARNING, "chatglm_ov"):
        ours = converted(checkpoint, tmp_path / "out", "fused")
    assert not caplog.text and ours.compiled.config.tie_word_embeddings
    torch.testing.assert_close(ours(IDS).logits, wanted, rtol=0, atol=1e-4)


def test_what_an_architecture_has_not_cannot_be_set(data, tmp_path):
    checkpoint = data / "golden" / "v1" / "v1_tiny" / "checkpoint"
    with pytest.raises(ChatGLMError, match="rope_scaling"):
        convert(checkpoint, tmp_path / "out", rope_scaling={"rope_type": "yarn", "factor": 2.0})
    with pytest.raises(ChatGLMError, match="rope_theta"):
        convert(checkpoint, tmp_path / "out", rope_theta=5e6)
    assert not (tmp_path / "out").exists()


def test_stacked_weights_have_the_rows_in_order(tmp_path):
    checkpoint = saved(reference("glm"), tmp_path / "checkpoint")
    config = parse_config(json.loads((checkpoint / "config.json").read_text()))
    with Checkpoint.open(checkpoint) as stored:
        weights = model_weights(config, stored)
        assert {name: weights.shape(name) for name in weights.names} == graph_shapes(config)
        layer = "model.layers.1.self_attn"
        for kind in ("weight", "bias"):
            whole = np.concatenate([stored[f"{layer}.{part}_proj.{kind}"].read() for part in "qkv"])
            stacked = weights[f"{layer}.qkv_proj.{kind}"]
            np.testing.assert_array_equal(stacked.read(), whole)
            rows = np.array([127, 0, 64, 63, 96, 95, 5])
            np.testing.assert_array_equal(stacked.rows(rows), whole[rows])
            np.testing.assert_array_equal(stacked.rows(slice(60, 100)), whole[60:100])


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_shapes_are_told_by_the_name_in_the_file(kind, tmp_path):
    checkpoint = saved(reference(kind), tmp_path / "checkpoint")
    fields = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**fields, "num_key_value_heads": 4}))
    with pytest.raises(ChatGLMError, match=r"self_attn\.k_proj"):
        convert(checkpoint, tmp_path / "out", progress=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4"])
def test_fused_operations_compute_what_stock_ones_do(kind, weight_format, tmp_path):
    checkpoint = saved(reference(kind), tmp_path / "checkpoint")
    logits = {}
    for ops in ("stock", "fused"):
        convert(checkpoint, tmp_path / ops, (weight_format,), ops, progress=False)
        logits[ops] = OVChatGLMForCausalLM.from_pretrained(tmp_path / ops, inference_precision="f32")(IDS).logits
    error = (logits["fused"] - logits["stock"]).square().mean().sqrt() / logits["stock"].square().mean().sqrt()
    # The same weights. Activations are rounded to 8 bits, in bf16, or to 16 at 8 linear layers and the head.
    assert error < (2**-8 * 3 if rounds_to_bf16(weight_format) else 2**-12)


def test_lora_of_query_and_value_is_merged_before_they_are_stacked(tmp_path):
    original = reference("glm")
    checkpoint = saved(original, tmp_path / "checkpoint")
    generator = torch.Generator().manual_seed(5)
    adapter, merged = {}, copy.deepcopy(original)
    for i, layer in enumerate(merged.model.layers):
        for name in ("q_proj", "v_proj"):
            weight = getattr(layer.self_attn, name).weight
            a = torch.randn(4, weight.shape[1], generator=generator)
            b = torch.randn(weight.shape[0], 4, generator=generator) * 0.1
            weight.data += 0.5 * b @ a
            for part, matrix in (("A", a), ("B", b)):
                adapter[f"base_model.model.model.layers.{i}.self_attn.{name}.lora_{part}.weight"] = matrix
    (tmp_path / "lora").mkdir()
    save_file(adapter, tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2}))
    with torch.no_grad():
        wanted = merged(IDS).logits
        assert (wanted - original(IDS).logits).abs().max() > 0.1
    ours = converted(checkpoint, tmp_path / "out", "fused", lora=tmp_path / "lora")
    torch.testing.assert_close(ours(IDS).logits, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("ops", "tokens"), [("stock", 6144), ("fused", 32768)])
def test_long_prompts_in_pieces_are_those_of_transformers(ops, tokens, tmp_path):
    """Linear memory in both: transformers' attention here is torch's, which holds no score matrix either."""
    sizes = {"max_position_embeddings": tokens, "num_attention_heads": 2, "num_key_value_heads": 1}
    original = reference("glm", **sizes)
    ours = converted(saved(original, tmp_path / "checkpoint"), tmp_path / "out", ops)
    ids = torch.randint(2, TINY["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(3))
    pieces: list[int] = []
    ours.prompt_progress = lambda done, total: pieces.append(done)
    with torch.no_grad():
        wanted = original(ids).logits[:, -8:]
    torch.testing.assert_close(ours(ids, logits_to_keep=8).logits, wanted, rtol=0, atol=1e-3)
    assert pieces == list(range(512, tokens + 1, 512))
