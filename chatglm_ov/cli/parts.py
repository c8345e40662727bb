"""What the weights of a graph are stored in, part by part of the model."""

from __future__ import annotations

from typing import Any

import openvino as ov

from chatglm_ov.config import ArchitectureConfig
from chatglm_ov.models import architecture, graph_shapes, lm_head_name

PARTS = ("embedding", "attention", "mlp", "lm_head", "norms")
_MARKS = {"attention": "attention", "self_attn": "attention", "mlp": "mlp"}
_STOCK = {"f32": "f32", "bf16": "bf16", "i8": "int8", "u4": "int4"}
"""Formats by the element type of a weight that OpenVINO's own operations read."""


def weight_parts(model: ov.Model, config: ArchitectureConfig) -> dict[str, dict[str, Any]]:
    """Bytes of each part with its scales and biases, and by format the number of its weights. An embedding that is the
    LM head too is counted as that."""
    module = architecture(config)
    shapes = graph_shapes(config)
    known = set(shapes)
    found: dict[str, dict[str, Any]] = {part: {"bytes": 0, "formats": {}} for part in PARTS}
    for node in model.get_ordered_ops():
        name = node.get_friendly_name()
        weight = name if name in known else name.rpartition(".")[0]
        if node.get_type_name() != "Constant" or weight not in known:
            continue
        part = found[_part(module.EMBEDDING, lm_head_name(config), weight)]
        part["bytes"] += node.get_byte_size()
        if name == weight and len(shapes[name]) == 2:
            label = _label(node)
            part["formats"][label] = part["formats"].get(label, 0) + 1
    return {name: part for name, part in found.items() if part["bytes"]}


def _part(embedding: str, lm_head: str, name: str) -> str:
    if name == lm_head:
        return "lm_head"
    if name == embedding:
        return "embedding"
    if "norm" in name:
        return "norms"
    return next((part for mark, part in _MARKS.items() if f"{mark}." in name), "norms")


def _label(constant: ov.Node) -> str:
    """Format of a weight, with the columns that share a scale in int4."""
    shape, kind = constant.get_output_shape(0), constant.get_element_type().get_type_name()
    if kind != "u8":
        return f"int4 in groups of {shape[-1]}" if kind == "u4" else _STOCK[kind]
    readers = (target.get_node().get_attributes() for target in constant.output(0).get_target_inputs())
    attributes = next(attributes for attributes in readers if "format" in attributes)
    group = f" in groups of {attributes['group_size']}" if attributes["format"] == "int4" else ""
    return attributes["format"] + group
