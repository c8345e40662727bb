"""What a calibration works on, and what that takes."""

from __future__ import annotations

from chatglm_ov.config import ArchitectureConfig
from chatglm_ov.models import architecture, graph_shapes
from chatglm_ov.weights.choices import FormatChoices
from chatglm_ov.weights.formats import WeightFormat

LIBRARIES_BYTES = 300_000_000
"""Anonymous memory of torch and of OpenVINO's compiler beyond that of any conversion."""


def int4_weights(config: ArchitectureConfig, choices: FormatChoices) -> dict[str, WeightFormat]:
    """The weights of an int4 model that are int4, by name."""
    module = architecture(config)
    shapes = {name: shape for name, shape in graph_shapes(config).items() if len(shape) == 2}
    head = module.LM_HEAD if module.LM_HEAD in shapes else module.EMBEDDING
    columns = shapes.pop(head)[1]
    shapes.pop(module.EMBEDDING, None)
    formats = {name: choices.linear("int4", name, shape[1]) for name, shape in shapes.items()}
    formats[head] = choices.lm_head("int4", columns)
    return {name: fmt for name, fmt in formats.items() if fmt.name == "int4"}


def disk_bytes(config: ArchitectureConfig, choices: FormatChoices) -> int:
    """Of the files of what is chosen, which are there until the model is written."""
    shapes = graph_shapes(config)
    return sum(fmt.nbytes(shapes[name]) for name, fmt in int4_weights(config, choices).items())


def memory_bytes(config: ArchitectureConfig, choices: FormatChoices, tokens: int) -> int:
    """The larger of two moments. A layer's inputs are summed up and a weight chosen: the values of the text (the
    residual twice, the input of the layer), the weight three times, the second moments of its input four times over.
    A layer, but not the LM head, is run: the same values, what it makes, and its weight as read, as a constant and as
    laid out."""
    shapes = graph_shapes(config)
    needs = [0]
    for name in int4_weights(config, choices):
        rows, columns = shapes[name]
        values = tokens * (2 * config.hidden_size + columns)
        needs.append(4 * (values + 3 * rows * columns + 4 * columns**2))
        if rows != config.vocab_rows:
            needs.append(4 * (values + tokens * rows + 3 * rows * columns))
    return LIBRARIES_BYTES + max(needs)
