"""config.json of every released model, and what is said of a wrong one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from golden_sets import GOLDENS
from hypothesis import given
from hypothesis import strategies as st

from chatglm_ov.config import ChatGLM2Config, ChatGLMConfig, load_config, parse_config, read_config_json
from chatglm_ov.errors import ChatGLMError

# As published, without auto_map.
CHATGLM = json.loads("""{"_name_or_path": "THUDM/chatglm-6b", "architectures": ["ChatGLMModel"], "bos_token_id": 130004,
"eos_token_id": 130005, "mask_token_id": 130000, "gmask_token_id": 130001, "pad_token_id": 3, "hidden_size": 4096,
"inner_hidden_size": 16384, "layernorm_epsilon": 1e-05, "max_sequence_length": 2048, "model_type": "chatglm",
"num_attention_heads": 32, "num_layers": 28, "position_encoding_2d": true, "torch_dtype": "float16",
"transformers_version": "4.23.1", "use_cache": true, "vocab_size": 130528}""")
CHATGLM2 = json.loads("""{"_name_or_path": "THUDM/chatglm2-6b", "model_type": "chatglm",
"architectures": ["ChatGLMModel"], "add_bias_linear": false, "add_qkv_bias": true,
"apply_query_key_layer_scaling": true, "apply_residual_connection_post_layernorm": false,
"attention_dropout": 0.0, "attention_softmax_in_fp32": true,
"bias_dropout_fusion": true, "ffn_hidden_size": 13696, "fp32_residual_connection": false, "hidden_dropout": 0.0,
"hidden_size": 4096, "kv_channels": 128, "layernorm_epsilon": 1e-05, "multi_query_attention": true,
"multi_query_group_num": 2, "num_attention_heads": 32, "num_layers": 28, "original_rope": true,
"padded_vocab_size": 65024, "post_layer_norm": true, "quantization_bit": 0, "pre_seq_len": null,
"prefix_projection": false, "rmsnorm": true, "seq_length": 32768, "use_cache": true, "torch_dtype": "float16",
"transformers_version": "4.27.1", "tie_word_embeddings": false, "eos_token_id": 2, "pad_token_id": 0}""")
CHATGLM3 = {**CHATGLM2, "_name_or_path": "THUDM/chatglm3-6b", "transformers_version": "4.30.2", "seq_length": 8192}
GLM4 = {
    **{name: value for name, value in CHATGLM3.items() if name not in ("quantization_bit", "pre_seq_len")},
    "_name_or_path": "THUDM/glm-4-9b-chat",
    "layernorm_epsilon": 1.5625e-07,
    "num_layers": 40,
    "num_hidden_layers": 40,
    "padded_vocab_size": 151552,
    "vocab_size": 151552,
    "rope_ratio": 500,
    "seq_length": 131072,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2",
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
}


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


EARLY = {
    **without(CHATGLM, "mask_token_id", "gmask_token_id", "pad_token_id"),
    "vocab_size": 150528,
    "bos_token_id": 150004,
    "eos_token_id": 150005,
}


@dataclass(frozen=True)
class Facts:
    """What the rest of the package asks of a configuration."""

    num_layers: int
    num_key_value_heads: int
    vocab_rows: int
    max_positions: int | None
    layernorm_epsilon: float
    rope: tuple[str, float] | None = None


RELEASED = {
    "chatglm-6b": (CHATGLM, Facts(28, 32, 130528, None, 1e-5)),
    "chatglm-6b, early": (EARLY, Facts(28, 32, 150528, None, 1e-5)),
    "chatglm2-6b": (CHATGLM2, Facts(28, 2, 65024, 32768, 1e-5, ("position", 1))),
    "chatglm2-6b-32k": (
        {**CHATGLM2, "_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio": 16},
        Facts(28, 2, 65024, 32768, 1e-5, ("position", 16)),
    ),
    "chatglm3-6b": (CHATGLM3, Facts(28, 2, 65024, 8192, 1e-5, ("base", 1))),
    "chatglm3-6b-32k": (
        {**CHATGLM3, "_name_or_path": "THUDM/chatglm3-6b-32k", "rope_ratio": 50, "seq_length": 32768},
        Facts(28, 2, 65024, 32768, 1e-5, ("base", 50)),
    ),
    "chatglm3-6b-128k": (
        {**CHATGLM3, "_name_or_path": "THUDM/chatglm3-6b-128k", "rope_ratio": 500, "seq_length": 131072},
        Facts(28, 2, 65024, 131072, 1e-5, ("base", 500)),
    ),
    "codegeex2-6b": (
        {
            **without(CHATGLM3, "pad_token_id"),
            "_name_or_path": "THUDM/codegeex2-6b",
            "interleaved_qkv": False,
            "rotary_percent": 0.5,
            "torch_dtype": "bfloat16",
        },
        Facts(28, 2, 65024, 8192, 1e-5, ("position", 1)),
    ),
    "glm-4-9b-chat": (GLM4, Facts(40, 2, 151552, 131072, 1.5625e-07, ("base", 500))),
    "glm-4-9b-chat-1m": (
        {**GLM4, "multi_query_group_num": 4, "rope_ratio": 10000, "seq_length": 1048576, "attn_implementation": "sdpa"},
        Facts(40, 4, 151552, 1048576, 1.5625e-07, ("base", 10000)),
    ),
    "codegeex4-all-9b": (
        {**GLM4, "_name_or_path": "THUDM/codegeex4-all-9b"},
        Facts(40, 2, 151552, 131072, 1.5625e-07, ("base", 500)),
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models(name):
    fields, facts = RELEASED[name]
    config = parse_config(fields)
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (4096, 32, 128)
    assert config.num_layers == facts.num_layers
    assert config.num_key_value_heads == facts.num_key_value_heads
    assert config.vocab_rows == facts.vocab_rows
    assert config.max_positions == facts.max_positions
    assert config.layernorm_epsilon == facts.layernorm_epsilon
    assert config.eos_token_id == fields["eos_token_id"]
    assert config.pad_token_id == fields.get("pad_token_id")
    if facts.rope is None:
        assert config.architecture == "chatglm"
    else:
        assert config.architecture == "chatglm2"
        assert (config.rope_ratio_meaning, config.rope_ratio) == facts.rope


def test_first_generation_special_ids():
    current, early = parse_config(CHATGLM), parse_config(EARLY)
    assert (current.mask_token_id, current.gmask_token_id) == (130000, 130001)
    assert (early.mask_token_id, early.gmask_token_id) == (150000, 150001)
    assert parse_config({**CHATGLM, "gmask_token_id": 7}).gmask_token_id == 7


def test_head_is_tied_as_the_original_ties_it():
    """transformers ties unless the file says otherwise, and the first generation lets it."""
    assert parse_config(CHATGLM).tie_word_embeddings
    assert not parse_config({**CHATGLM, "tie_word_embeddings": False}).tie_word_embeddings
    assert not parse_config(CHATGLM3).tie_word_embeddings
    assert not parse_config(without(CHATGLM3, "tie_word_embeddings")).tie_word_embeddings


def test_without_multi_query_attention_every_head_has_its_keys():
    assert parse_config({**CHATGLM3, "multi_query_attention": False}).num_key_value_heads == 32


@pytest.mark.parametrize(
    ("name", "version", "explicit", "meaning"),
    [
        ("THUDM/chatglm2-6b-32k", "4.27.1", None, "position"),
        ("/models/ChatGLM2-6B-32k", "4.44.0", None, "position"),
        ("chatglm-2-6b-32k", "4.44.0", None, "position"),
        ("tiny-random", "4.27.1", None, "position"),
        ("tiny-random", "4.29.2", None, "position"),
        ("tiny-random", "4.30.2", None, "base"),
        ("THUDM/chatglm3-6b-32k", "4.27.4", None, "base"),
        ("THUDM/glm-4-9b-chat", "4.27.1", None, "base"),
        (None, None, None, "base"),
        ("THUDM/chatglm2-6b-32k", "4.27.1", "base", "base"),
        ("THUDM/chatglm3-6b-32k", "4.30.2", "position", "position"),
    ],
)
def test_rope_ratio_meaning(name, version, explicit, meaning):
    told = {"_name_or_path": name, "transformers_version": version, "rope_ratio_meaning": explicit, "rope_ratio": 16}
    fields = without(CHATGLM2, "_name_or_path", "transformers_version")
    fields |= {key: value for key, value in told.items() if value is not None}
    assert parse_config(fields).rope_ratio_meaning == meaning


@pytest.mark.parametrize("golden", GOLDENS, ids=str)
def test_golden_configs(golden):
    config = load_config(golden.checkpoint)
    keys = golden["p5_final_k0"]
    heads, dim = (keys.shape[1], keys.shape[3]) if golden.folder.name.startswith("glm4") else keys.shape[2:]
    assert (config.num_key_value_heads, config.head_dim) == (heads, dim)
    assert config.vocab_rows == golden["p5_dec_logits"].shape[-1]
    assert isinstance(config, ChatGLMConfig if "v1" in golden.folder.name else ChatGLM2Config)


WRONG = [
    (CHATGLM3, "hidden_size", 0, "greater than 0"),
    (CHATGLM3, "hidden_size", "4096", "a valid integer"),
    (CHATGLM3, "num_layers", True, "a valid integer"),
    (CHATGLM3, "num_layers", 28.5, "a valid integer"),
    (CHATGLM3, "num_attention_heads", None, "a valid integer"),
    (CHATGLM3, "layernorm_epsilon", float("nan"), "a finite number"),
    (CHATGLM3, "layernorm_epsilon", -1e-5, "greater than 0"),
    (CHATGLM3, "rope_ratio", float("inf"), "a finite number"),
    (CHATGLM3, "rope_ratio", 0, "greater than 0"),
    (CHATGLM3, "rope_ratio_meaning", "both", "'position' or 'base'"),
    (CHATGLM3, "eos_token_id", "2", "a valid integer or a valid list"),
    (CHATGLM3, "add_bias_linear", True, "False"),
    (CHATGLM3, "rmsnorm", False, "True"),
    (CHATGLM3, "post_layer_norm", False, "True"),
    (CHATGLM3, "original_rope", False, "True"),
    (CHATGLM3, "apply_residual_connection_post_layernorm", True, "False"),
    (CHATGLM3, "quantization_bit", 3, "0, 4 or 8"),
    (CHATGLM3, "pre_seq_len", -1, "greater than or equal to 0"),
    (CHATGLM3, "multi_query_group_num", 3, "a divisor of num_attention_heads 32"),
    (CHATGLM3, "kv_channels", 126, "a multiple of 4"),
    (CHATGLM, "position_encoding_2d", False, "True"),
    (CHATGLM, "bos_token_id", "<sop>", "a valid integer"),
    (CHATGLM, "quantization_bit", "8", "0, 4 or 8"),
    (CHATGLM, "pre_seq_len", "128", "a valid integer"),
    (CHATGLM, "hidden_size", 4100, "a multiple of num_attention_heads 32"),
]


@pytest.mark.parametrize(("fields", "field", "value", "wanted"), WRONG, ids=lambda value: str(value)[:20])
def test_wrong_field_is_named(fields, field, value, wanted, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({**fields, field: value}))
    with pytest.raises(ChatGLMError) as error:
        load_config(tmp_path)
    assert str(error.value) == f"{tmp_path / 'config.json'}: {field} is {error.value.seen}, expected {wanted}"
    assert error.value.seen in (repr(value), value)


@pytest.mark.parametrize(
    ("fields", "name"),
    [(CHATGLM, name) for name in ("hidden_size", "num_layers", "num_attention_heads", "vocab_size", "bos_token_id")]
    + [(CHATGLM2, name) for name in ("hidden_size", "num_layers", "ffn_hidden_size")],
    ids=str,
)
def test_missing_field_is_named(fields, name):
    with pytest.raises(ChatGLMError, match=rf"^config\.json: {name} is missing, expected a value$"):
        parse_config(without(fields, name))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen2", "hidden_size": 8}, "model_type is 'qwen2', expected 'chatglm'"),
        ({"hidden_size": 8}, "model_type is None, expected 'chatglm'"),
        ({"model_type": "chatglm", "hidden_size": 8}, "padded_vocab_size / inner_hidden_size is missing"),
    ],
    ids=["other", "none", "neither"],
)
def test_unknown_architecture(fields, message):
    with pytest.raises(ChatGLMError, match=message):
        parse_config(fields)


def test_unknown_fields_are_left_alone():
    assert parse_config({**CHATGLM3, "some_new_field": {"a": [1]}, "num_hidden_layers": 999}) == parse_config(CHATGLM3)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"{", r"config\.json: contents is not JSON"),
        (b"", r"config\.json: contents is not JSON"),
        (b"\x80\x02}q\x00.", r"config\.json: contents is not JSON"),
        (b"[1]", r"config\.json: contents is a JSON list, expected a JSON object"),
        (None, r"config\.json is missing, expected a file"),
    ],
    ids=["cut off", "empty", "binary", "list", "no file"],
)
def test_unreadable_file_is_named(contents, message, tmp_path: Path):
    if contents is not None:
        (tmp_path / "config.json").write_bytes(contents)
    with pytest.raises(ChatGLMError, match=message) as error:
        read_config_json(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(ChatGLMError, match=r"nowhere: folder is missing, expected a folder with config\.json"):
        read_config_json(tmp_path / "nowhere")
    with pytest.raises(ChatGLMError, match=r"expected a folder with config\.json \(download it first\)"):
        read_config_json("THUDM/chatglm3-6b")


scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2)
)


@given(st.sampled_from([CHATGLM, EARLY, CHATGLM2, GLM4]), st.data())
def test_any_value_is_taken_or_named_in_one_line(fields, data):
    name = data.draw(st.sampled_from(sorted(fields)))
    try:
        config = parse_config({**fields, name: data.draw(values)})
    except ChatGLMError as error:
        assert "\n" not in str(error)
        assert str(error).startswith("config.json: ")
    else:
        assert config.head_dim * config.num_attention_heads > 0
