"""Small checkpoints with random weights under the names that the pages use for the released ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from command_line import make_checkpoint
from tokenizer_cases import DATA, fast_folder, small_folder

from chatglm_ov.presets import PRESETS, config_json

_BLOCKS = {"hidden_size": 128, "num_attention_heads": 4}

# Sizes by the field that tells the layouts apart, for the vocabularies of `_add_tokenizer`.
SIZES: dict[str, dict[str, Any]] = {
    "inner_hidden_size": {
        **_BLOCKS,
        "num_layers": 2,
        "inner_hidden_size": 256,
        "vocab_size": 2048,
        "mask_token_id": 1600,
        "gmask_token_id": 1601,
        "bos_token_id": 1604,
        "eos_token_id": 1605,
    },
    "ffn_hidden_size": {
        **_BLOCKS,
        "num_layers": 2,
        "ffn_hidden_size": 192,
        "kv_channels": 32,
        "padded_vocab_size": 512,
    },
    "intermediate_size": {
        **_BLOCKS,
        "num_hidden_layers": 2,
        "intermediate_size": 192,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "eos_token_id": [400, 407, 409],
        "pad_token_id": 400,
    },
}
TIKTOKEN = {"padded_vocab_size": 1536, "eos_token_id": [1500, 1507, 1509], "pad_token_id": 1500}
TEMPLATES = {"glm-edge": "edge", "glm-4-9b-0414": "0414", "glm-4-32b-0414": "0414", "glm-z1": "z1"}


def write_page_checkpoint(preset: str, folder: Path) -> None:
    """A checkpoint of the preset's fields but for the sizes, with a tokenizer of its kind."""
    fields = PRESETS[preset]
    sizes = next(sizes for field, sizes in SIZES.items() if field in fields)
    if fields.get("padded_vocab_size", 0) > 100_000:
        sizes = {**sizes, **TIKTOKEN}
    make_checkpoint(folder, config_json(preset, **sizes))
    _add_tokenizer(preset, folder)


def _add_tokenizer(preset: str, folder: Path) -> None:
    fields = PRESETS[preset]
    if "inner_hidden_size" in fields:
        shutil.copytree(DATA / "tokenizer_v1", folder, dirs_exist_ok=True)
    elif fields["model_type"] != "chatglm":
        fast_folder(folder, next((name for start, name in TEMPLATES.items() if preset.startswith(start)), ""))
    elif fields["padded_vocab_size"] > 100_000:
        shutil.copytree(DATA / "tokenizer_glm4", folder, dirs_exist_ok=True)
    else:
        small_folder(folder, "chatglm3" if "chatglm3" in preset else "chatglm2")
