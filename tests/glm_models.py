"""Tiny models of transformers' own classes with random weights: the reference for `glm` and `glm4`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

TINY = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": [1],
}
KINDS = {"glm": "Glm", "glm4": "Glm4"}
EDGE = {"attention_bias": False, "partial_rotary_factor": 1.0, "tie_word_embeddings": True}


@cache
def _reference(kind: str, fields: tuple[tuple[str, Any], ...], seed: int) -> PreTrainedModel:
    name = KINDS[kind]
    if not hasattr(transformers, f"{name}ForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}ForCausalLM")
    config = getattr(transformers, f"{name}Config")(**{**TINY, **{k: _thawed(v) for k, v in fields}})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    if config.tie_word_embeddings:
        model.tie_weights()
    return model


def reference(kind: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """The model of transformers, float32. `fields` of config.json go over TINY."""
    return _reference(kind, tuple((name, _frozen(value)) for name, value in fields.items()), seed)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """Its checkpoint folder, as transformers writes it."""
    model.save_pretrained(folder)
    return folder


def _frozen(value: Any) -> Any:
    return tuple(value.items()) if isinstance(value, dict) else value


def _thawed(value: Any) -> Any:
    return dict(value) if isinstance(value, tuple) else value
