"""config.json of the released models, to make checkpoints and models of their shapes without a download."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from chatglm_ov.errors import ChatGLMError

_CHATGLM: dict[str, Any] = {
    "_name_or_path": "THUDM/chatglm-6b",
    "architectures": ["ChatGLMModel"],
    "bos_token_id": 130004,
    "eos_token_id": 130005,
    "mask_token_id": 130000,
    "gmask_token_id": 130001,
    "pad_token_id": 3,
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "layernorm_epsilon": 1e-05,
    "max_sequence_length": 2048,
    "model_type": "chatglm",
    "num_attention_heads": 32,
    "num_layers": 28,
    "position_encoding_2d": True,
    "torch_dtype": "float16",
    "transformers_version": "4.23.1",
    "use_cache": True,
    "vocab_size": 130528,
}

_CHATGLM2: dict[str, Any] = {
    "_name_or_path": "THUDM/chatglm2-6b",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 13696,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 32768,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.27.1",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

_CHATGLM3 = {**_CHATGLM2, "_name_or_path": "THUDM/chatglm3-6b", "transformers_version": "4.30.2", "seq_length": 8192}

_CODEGEEX2 = {
    **_CHATGLM2,
    "_name_or_path": "THUDM/codegeex2-6b",
    "interleaved_qkv": False,
    "rotary_percent": 0.5,
    "seq_length": 8192,
    "torch_dtype": "bfloat16",
}
del _CODEGEEX2["pad_token_id"]

_GLM4 = {
    **_CHATGLM3,
    "_name_or_path": "THUDM/glm-4-9b-chat",
    "classifier_dropout": None,
    "layernorm_epsilon": 1.5625e-07,
    "num_layers": 40,
    "num_hidden_layers": 40,
    "padded_vocab_size": 151552,
    "vocab_size": 151552,
    "rope_ratio": 500,
    "seq_length": 131072,
    "torch_dtype": "bfloat16",
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
}

_GLM = {
    "_name_or_path": "THUDM/glm-4-9b-chat-hf",
    "architectures": ["GlmForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 13696,
    "max_position_embeddings": 131072,
    "model_type": "glm",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "pad_token_id": 151329,
    "rms_norm_eps": 1.5625e-07,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.47.0.dev0",
    "use_cache": True,
    "vocab_size": 151552,
}

_GLM_EDGE = {
    **_GLM,
    "_name_or_path": "THUDM/glm-edge-1.5b-chat",
    "attention_bias": False,
    "eos_token_id": [59246, 59253, 59255],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 8192,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 59246,
    "partial_rotary_factor": 1.0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "vocab_size": 59264,
}

_GLM4_0414 = {
    **_GLM,
    "_name_or_path": "THUDM/GLM-4-9B-0414",
    "architectures": ["Glm4ForCausalLM"],
    "max_position_embeddings": 32768,
    "model_type": "glm4",
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "transformers_version": "4.52.0.dev0",
}

_GLM4_32B_0414 = {
    **_GLM4_0414,
    "_name_or_path": "THUDM/GLM-4-32B-0414",
    "attention_bias": False,
    "hidden_size": 6144,
    "intermediate_size": 23040,
    "num_attention_heads": 48,
    "num_hidden_layers": 61,
}


def _variant(base: dict[str, Any], name: str, **fields: Any) -> dict[str, Any]:
    return {**base, "_name_or_path": name, **fields}


PRESETS: dict[str, dict[str, Any]] = {
    "chatglm-6b": _CHATGLM,
    "chatglm2-6b": _CHATGLM2,
    # Here rope_ratio divides the position; in all later models it multiplies the rotary base.
    "chatglm2-6b-32k": _variant(_CHATGLM2, "THUDM/chatglm2-6b-32k", rope_ratio=16),
    "chatglm3-6b": _CHATGLM3,
    "chatglm3-6b-32k": _variant(_CHATGLM3, "THUDM/chatglm3-6b-32k", rope_ratio=50, seq_length=32768),
    "chatglm3-6b-128k": _variant(_CHATGLM3, "THUDM/chatglm3-6b-128k", rope_ratio=500, seq_length=131072),
    "codegeex2-6b": _CODEGEEX2,
    "glm-4-9b-chat": _GLM4,
    "glm-4-9b-chat-1m": _variant(
        _GLM4, "THUDM/glm-4-9b-chat-1m", multi_query_group_num=4, rope_ratio=10000, seq_length=1048576
    ),
    "codegeex4-all-9b": _variant(_GLM4, "THUDM/codegeex4-all-9b"),
    "glm-4-9b-chat-hf": _GLM,
    "glm-4-9b-chat-1m-hf": _variant(
        _GLM, "THUDM/glm-4-9b-chat-1m-hf", num_key_value_heads=4, max_position_embeddings=1048576
    ),
    "glm-edge-1.5b-chat": _GLM_EDGE,
    "glm-edge-4b-chat": _variant(
        _GLM_EDGE,
        "THUDM/glm-edge-4b-chat",
        hidden_size=3072,
        intermediate_size=8192,
        num_attention_heads=24,
        num_hidden_layers=40,
        num_key_value_heads=6,
        tie_word_embeddings=False,
    ),
    "glm-4-9b-0414": _GLM4_0414,
    "glm-z1-9b-0414": _variant(_GLM4_0414, "THUDM/GLM-Z1-9B-0414"),
    "glm-4-32b-0414": _GLM4_32B_0414,
    "glm-z1-32b-0414": _variant(_GLM4_32B_0414, "THUDM/GLM-Z1-32B-0414"),
}

# Fields that some files hold twice.
_COPIES = {"num_layers": "num_hidden_layers", "padded_vocab_size": "vocab_size"}


def layers_field(preset: str) -> str:
    """Name of the field that holds the number of layers."""
    return "num_layers" if "num_layers" in PRESETS.get(preset, {}) else "num_hidden_layers"


def config_json(preset: str, **overrides: Any) -> dict[str, Any]:
    """Contents of the config.json of a released model, without `auto_map`, with some fields replaced.

    `overrides` are fields as in the file. Raises ChatGLMError for an unknown preset.
    """
    if preset not in PRESETS:
        raise ChatGLMError("preset", "name", repr(preset), f"one of {', '.join(PRESETS)}")
    fields = {**PRESETS[preset], **overrides}
    for source, copy in _COPIES.items():
        if source in overrides and copy in fields:
            fields[copy] = overrides.get(copy, overrides[source])
    return deepcopy(fields)
