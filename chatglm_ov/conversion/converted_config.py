"""config.json on the way from a checkpoint to a converted folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatglm_ov.checkpoint.fields import checkpoint_fields
from chatglm_ov.checkpoint.prequantized import CONFIG_FIELDS
from chatglm_ov.config import ArchitectureConfig, GlmConfig, config_class, read_config_json
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.weights.ir import FORMAT_VERSION

log = logging.getLogger(__name__)


def given_fields(
    source: Path,
    rope_ratio_meaning: str | None = None,
    rope_theta: float | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Contents of config.json with what the caller knows better."""
    if is_converted(source):
        raise ChatGLMError(source, "checkpoint", "a converted folder", "the folder that it was made of")
    fields = checkpoint_fields(source)
    given = {"rope_ratio_meaning": rope_ratio_meaning, "rope_theta": rope_theta, "rope_scaling": rope_scaling}
    described = config_class(fields, source / "config.json")
    for name, value in given.items():
        if value is None:
            continue
        if name not in described.model_fields:
            raise ChatGLMError("convert", name, value, f"not given: {described.architecture} models have none")
        if name == "rope_scaling" and not isinstance(value, Mapping):
            raise ChatGLMError("convert", name, value, 'an object such as {"rope_type": "yarn", "factor": 4.0}')
        if isinstance(value, Mapping):
            # The object that it replaces may say more than how it scales.
            before = fields.get("rope_scaling") or fields.get("rope_parameters")
            kept = before if isinstance(before, dict) else {}
            value = {key: kept[key] for key in ("rope_theta", "partial_rotary_factor") if key in kept} | {**value}
        fields[name] = value
        # What stands in an object goes before what stands beside it.
        for other in ("rope_parameters", "rope_scaling"):
            if isinstance(fields.get(other), dict) and other != name:
                fields[other] = {key: part for key, part in fields[other].items() if key != name}
    return fields


def warn_of_doubtful_base(config: ArchitectureConfig) -> None:
    """The published files of GLM-4-9B-chat-hf have lost the factor of their rotary base (model-family 1.3)."""
    if config.architecture != "glm" or not isinstance(config, GlmConfig):
        return
    if config.max_position_embeddings >= 131072 and config.rope_theta == 10000:
        trained = "1e8" if config.max_position_embeddings > 131072 else "5e6"
        log.warning(
            "rope_theta is 10000 in config.json, which is what transformers computes with; the same weights in their "
            "original layout were trained with %s. --rope-theta %s converts with that.",
            trained,
            trained,
        )


def is_converted(folder: Path) -> bool:
    """Whether that is what `convert` writes, or was once."""
    try:
        return "chatglm_ov" in read_config_json(folder)
    except ChatGLMError:
        return False


def converted_fields(fields: dict[str, Any], config: ArchitectureConfig, ops: str) -> dict[str, Any]:
    """config.json of a converted folder: without the pointers to remote code and the checkpoint's own quantization,
    with our marker."""
    kept = {key: value for key, value in fields.items() if key not in ("auto_map", *CONFIG_FIELDS)}
    if hasattr(config, "rope_ratio_meaning"):
        kept["rope_ratio_meaning"] = config.rope_ratio_meaning
    if not kept.get("pre_seq_len"):
        kept.pop("pre_seq_len", None)
    kept["chatglm_ov"] = {"format_version": FORMAT_VERSION, "architecture": config.architecture, "ops": ops}
    return kept
