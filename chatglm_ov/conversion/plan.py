"""What a conversion will read, write and need, from the shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from chatglm_ov.checkpoint.reader import Checkpoint
from chatglm_ov.config import ArchitectureConfig
from chatglm_ov.models import architecture, graph_shapes, lm_head_name
from chatglm_ov.system.sizes import size
from chatglm_ov.weights.choices import DEFAULT_CHOICES, FormatChoices, matrix_formats
from chatglm_ov.weights.packing import layout_of
from chatglm_ov.weights.store import BLOCK_BYTES, stored_as

if TYPE_CHECKING:
    from chatglm_ov.calibration.text import Calibration

LIBRARIES_BYTES = 300_000_000
"""Anonymous memory of Python with OpenVINO, numpy, and torch for .bin checkpoints."""
BLOCKS_IN_MEMORY = 5
"""A block of rows as stored, in float32, and what int4 makes of it on the way."""


@dataclass(frozen=True)
class Plan:
    """What a conversion will read and need. Sizes in bytes."""

    config: ArchitectureConfig
    weight_formats: tuple[str, ...]
    read_bytes: int
    disk_bytes: int
    memory_bytes: int

    def __str__(self) -> str:
        formats = ", ".join(self.weight_formats)
        return (
            f"{self.config.architecture}, {self.config.num_layers} layers: {formats}. "
            f"Reads {size(self.read_bytes)}, writes {size(self.disk_bytes)}, "
            f"needs about {size(self.memory_bytes)} of memory."
        )


def make_plan(
    config: ArchitectureConfig,
    weights: Checkpoint,
    weight_formats: Sequence[str],
    ops: str,
    choices: FormatChoices = DEFAULT_CHOICES,
    calibration: Calibration | None = None,
    more_bytes: int = 0,
    calibration_tokens: int = 0,
) -> Plan:
    """weights: as `model_weights` gives them. ops: fused or stock. more_bytes: of other files that are written.
    calibration_tokens: those of the calibration's text. Memory is the interpreter with its libraries and a few blocks
    of rows, or what a calibration needs. Raises ChatGLMError for choices that this model has no use for."""
    shapes = graph_shapes(config)
    _check_choices(config, choices)
    formats = tuple(dict.fromkeys(weight_formats))
    read = sum(weights.nbytes(name) for name in shapes) * len(formats)
    disk = more_bytes + sum(_stored_bytes(config, weights, name, ops, choices) for name in formats)
    largest = max(4 * prod(shape) for shape in shapes.values())
    memory = BLOCKS_IN_MEMORY * min(largest, BLOCK_BYTES)
    if calibration is not None:
        from chatglm_ov.calibration.needs import calibrated_weights, disk_bytes, memory_bytes

        chosen = calibrated_weights(config, choices, formats, calibration.methods)
        disk += disk_bytes(config, chosen)
        memory = max(memory, memory_bytes(config, chosen, calibration_tokens))
    return Plan(config, formats, read, disk, LIBRARIES_BYTES + memory)


def _check_choices(config: ArchitectureConfig, choices: FormatChoices) -> None:
    tables = (architecture(config).EMBEDDING, lm_head_name(config))
    shapes = graph_shapes(config)
    choices.check_layers([name for name, shape in shapes.items() if len(shape) == 2 and name not in tables])
    if config.tie_word_embeddings:
        choices.check_tied()


def _stored_bytes(
    config: ArchitectureConfig, weights: Checkpoint, weight_format: str, ops: str, choices: FormatChoices
) -> int:
    formats = matrix_formats(config, choices, weight_format, weights.dtype)
    looked_up = None if config.tie_word_embeddings else architecture(config).EMBEDDING
    total = 0
    for name, shape in graph_shapes(config).items():
        if name not in formats:
            total += 4 * shape[0]
            continue
        fmt = stored_as(weights[name], formats[name])
        row_by_row = ops == "stock" or name == looked_up
        total += fmt.nbytes(shape) if row_by_row else layout_of(fmt, *shape).bytes
    return total
