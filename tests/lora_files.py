"""LoRA folders for the tests, written in PEFT's format without PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."
PEFT_FIELDS: dict[str, object] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "tiny-random",
    "bias": "none",
    "ensure_weight_tying": False,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.1,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "target_modules": ["query_key_value", "dense"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}
"""adapter_config.json as a recent PEFT writes it, with its defaults."""


def low_rank(module: str, shape: tuple[int, int], rank: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """lora_A [rank, in] and lora_B [out, rank] of a linear layer [out, in], by the names in the file."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(rank, shape[1], generator=generator) * 0.05,
        f"{PREFIX}{module}.lora_B.weight": torch.randn(shape[0], rank, generator=generator) * 0.05,
    }


def write_lora(
    folder: Path, tensors: Mapping[str, torch.Tensor], file: str = "adapter_model.safetensors", **fields: object
) -> Path:
    """fields: those of adapter_config.json that are not as in PEFT_FIELDS."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**PEFT_FIELDS, **fields}))
    if file.endswith(".bin"):
        torch.save(dict(tensors), folder / file)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)
    return folder
