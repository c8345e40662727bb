"""The model that a conversion starts from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatglm_ov.checkpoint.lora import with_lora
from chatglm_ov.checkpoint.model_weights import model_weights
from chatglm_ov.checkpoint.prequantized import open_checkpoint
from chatglm_ov.checkpoint.reader import Checkpoint
from chatglm_ov.checkpoint.trained_prefix import TrainedPrefix, has_prefix, read_prefix
from chatglm_ov.config import ArchitectureConfig
from chatglm_ov.errors import ChatGLMError


@dataclass(frozen=True)
class SourceModel:
    """A checkpoint folder that is open, with what the options of a conversion add to it."""

    folder: Path
    config: ArchitectureConfig
    fields: dict[str, Any]
    """Contents of config.json, with what the options know better."""
    weights: Checkpoint
    """As `model_weights` gives them, a LoRA merged."""
    prefix: TrainedPrefix | None
    lora: str | None
    """Name of the folder that is merged."""


@contextmanager
def opened_model(
    folder: Path, fields: dict[str, Any], config: ArchitectureConfig, lora: Path | None, p_tuning: Path | None
) -> Iterator[SourceModel]:
    """fields: contents of config.json, `config`: what is parsed of them. lora: the folder of an adapter. p_tuning: the
    folder of a prefix encoder, where the checkpoint does not hold it. Raises ChatGLMError for tensors that do not fit
    the model."""
    with open_checkpoint(folder, fields) as stored, with_lora(stored, lora, config) as merged:
        weights = model_weights(config, merged)
        prefix = _trained_prefix(config, stored, p_tuning)
        fields = fields | {"pre_seq_len": None if prefix is None else prefix.length}
        yield SourceModel(folder, config, fields, weights, prefix, None if lora is None else lora.resolve().name)


def _trained_prefix(config: ArchitectureConfig, weights: Checkpoint, folder: Path | None) -> TrainedPrefix | None:
    """The prefix in `folder`, or, without a folder, that of the checkpoint itself; None if it has none."""
    if folder is not None:
        with Checkpoint.open(folder) as tuned:
            if not has_prefix(tuned):
                raise ChatGLMError(folder, "prefix_encoder", "missing", "the tensors of a P-Tuning v2")
            return read_prefix(tuned, config)
    if has_prefix(weights):
        return read_prefix(weights, config)
    if config.pre_seq_len:
        wanted = "0, or the folder with the trained prefix encoder: --p-tuning"
        raise ChatGLMError(weights.folder / "config.json", "pre_seq_len", config.pre_seq_len, wanted)
    return None
