"""Whether an IR is the model that config.json describes: who changes one of them by hand is told where they differ."""

from __future__ import annotations

from pathlib import Path

import openvino as ov

from chatglm_ov.config import ArchitectureConfig
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.lowering.graph import CACHE
from chatglm_ov.lowering.operations import attributes_of


def check_fits(model: ov.Model, config: ArchitectureConfig, xml: Path) -> None:
    """Raises ChatGLMError for another number of layers, heads, dims of a head or rows of the LM head."""
    wanted = {
        "layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocabulary": config.vocab_rows,
    }
    for name, seen in _shapes(model).items():
        if seen != wanted[name]:
            raise ChatGLMError(xml, name, seen, f"{wanted[name]}, as config.json has it")


def _shapes(model: ov.Model) -> dict[str, int]:
    """What the graph tells of the names above; a stock one does not tell all of them."""
    states = {variable.info.variable_id: variable.info.data_shape for variable in model.get_variables()}
    caches = {name: shape for name, shape in states.items() if name.startswith(CACHE)}
    told = {"layers": len({name.removeprefix(CACHE).partition(".")[0] for name in caches})}
    for node in model.get_ops():
        if node.get_type_name() == "MultiHeadAttention":
            heads = attributes_of(node)
            told |= {name: heads[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")}
            break
    else:
        for shape in caches.values():
            told |= _lengths({"num_key_value_heads": shape[1], "head_dim": shape[3]})
    return told | _lengths({"vocabulary": model.outputs[0].partial_shape[-1]})


def _lengths(dims: dict[str, ov.Dimension]) -> dict[str, int]:
    return {name: dim.get_length() for name, dim in dims.items() if dim.is_static}
