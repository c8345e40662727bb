"""What a calibration works on, and what that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from chatglm_ov.calibration.text import calibrated_formats
from chatglm_ov.config import ArchitectureConfig
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.models import architecture, graph_shapes
from chatglm_ov.weight_formats import WeightFormat
from chatglm_ov.weights.choices import FormatChoices, matrix_formats

INT8_ROWS = 8192
"""Rows of an int8 weight that are chosen at once."""

CALIBRATION_LIBRARIES_BYTES = 300_000_000
"""Anonymous memory of torch and of OpenVINO's compiler beyond that of any conversion."""


def calibrated_weights(
    config: ArchitectureConfig, choices: FormatChoices, weight_formats: Sequence[str], methods: Sequence[str]
) -> dict[str, dict[str, WeightFormat]]:
    """The weights that a calibration chooses, by model format and name: int4 ones, and with GPTQ int8 ones too. Raises
    ChatGLMError where the choices leave none."""
    names = calibrated_formats(methods)
    chosen = {}
    for model in (name for name in weight_formats if name in names):
        formats = matrix_formats(config, choices, model)
        if not config.tie_word_embeddings:
            del formats[architecture(config).EMBEDDING]  # which is looked up, not multiplied
        chosen[model] = {name: fmt for name, fmt in formats.items() if fmt.name in names}
    found = {model: formats for model, formats in chosen.items() if formats}
    if not found:
        kept = "layer_formats and lm_head_format that leave a weight"
        raise ChatGLMError("convert", "calibration", "+".join(methods), f"{kept} in {' or '.join(names)}")
    return found


def disk_bytes(config: ArchitectureConfig, chosen: Mapping[str, Mapping[str, WeightFormat]]) -> int:
    """Bytes of the files with what is chosen, which are there until the models are written."""
    shapes = graph_shapes(config)
    return sum(fmt.nbytes(shapes[name]) for formats in chosen.values() for name, fmt in formats.items())


def memory_bytes(config: ArchitectureConfig, chosen: Mapping[str, Mapping[str, WeightFormat]], tokens: int) -> int:
    """The larger need of two phases. A weight is chosen: activations of the text (the residual twice, the input of the
    layer), the second moments [K, K] of that input and their factor, three copies of the weight, of int8 of some rows,
    and its codes. A layer, but not the LM head, is run: the same activations, its output, three copies of the
    weight."""
    shapes = graph_shapes(config)
    needs = [0]
    for name, fmt in ((name, fmt) for formats in chosen.values() for name, fmt in formats.items()):
        rows, columns = shapes[name]
        values = tokens * (2 * config.hidden_size + columns)
        at_once = min(rows, INT8_ROWS) if fmt.name == "int8" else rows
        needs.append(4 * (values + 3 * at_once * columns + 2 * columns**2) + rows * columns)
        if rows != config.vocab_rows:
            needs.append(4 * (values + tokens * rows + 3 * rows * columns))
    return CALIBRATION_LIBRARIES_BYTES + max(needs)
