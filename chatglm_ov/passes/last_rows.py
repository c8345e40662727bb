"""Rows whose logits nobody wants, left out in a model that is about to be compiled.

A graph of fused operations takes the last `logits_to_keep` rows before the LM head; one of stock operations is made to.
What lies before it in a fused graph, back to the attention of the last layer, has no other reader, and is computed for
those rows only: in a prompt for one row, which saves most of a layer.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset15 as ops

from chatglm_ov.lowering.graph import LOGITS_TO_KEEP, graph_input, last_rows
from chatglm_ov.lowering.operations import attributes_of, operation

ROW_BY_ROW = ("FullyConnected", "Norm", "Add")
"""Operations whose rows of results are made of the same rows of their inputs."""


def add_logits_to_keep(model: ov.Model) -> None:
    """Change `model` in place, whose logits are a MatMul of stock operations: the input is added that tells of how many
    rows they are wanted. One that has it already is left alone."""
    if any(node.get_friendly_name() == LOGITS_TO_KEEP for node in model.get_parameters()):
        return
    count = graph_input(LOGITS_TO_KEEP, [1], np.int64)
    head = model.get_results()[0].input_value(0).get_node()
    head.input(0).replace_source_output(last_rows(head.input_value(0), count).output(0))
    model.add_parameters([count])
    model.validate_nodes_and_infer_types()


def take_last_rows_early(model: ov.Model) -> None:
    """Change `model` in place, whose only Slice is the one before the LM head."""
    nodes = model.get_ordered_ops()
    for cut in [node for node in nodes if node.get_type_name() == "Slice"]:
        (wanted,) = (node for node in model.get_parameters() if node.get_friendly_name() == LOGITS_TO_KEEP)
        taken = _Taken(ops.convert(wanted, "i32"), _read_by(nodes, cut))
        rows = taken.rows(cut.input_value(0))
        for target in cut.output(0).get_target_inputs():
            target.replace_source_output(rows)


def _read_by(nodes: list[ov.Node], cut: ov.Node) -> set[str]:
    """Names of the operations whose results are for `cut` alone, directly or by way of others of them."""
    found = {cut.get_name()}
    for node in reversed(nodes):
        if node.get_type_name() in ROW_BY_ROW:
            readers = {target.get_node().get_name() for target in node.output(0).get_target_inputs()}
            if readers and readers <= found:
                found.add(node.get_name())
    return found


class _Taken:
    """Values with the last `count` rows only. inside: names of the operations that are made again for them."""

    def __init__(self, count: ov.Node, inside: set[str]):
        self._count = count
        self._inside = inside
        self._values: dict[tuple[str, int], ov.Output] = {}

    def rows(self, value: ov.Output) -> ov.Output:
        key = value.get_node().get_name(), value.get_index()
        if key not in self._values:
            node = value.get_node()
            inside = node.get_name() in self._inside
            self._values[key] = (self._again(node) if inside else operation("LastRows", [value, self._count])).output(0)
        return self._values[key]

    def _again(self, node: ov.Node) -> ov.Node:
        inputs = [self.rows(value) if _has_rows(value) else value for value in node.input_values()]
        if node.get_type_name() == "Add":
            return ops.add(*inputs)
        made = operation(node.get_type_name(), inputs, **attributes_of(node))
        made.set_friendly_name(node.get_friendly_name())
        return made


def _has_rows(value: ov.Output) -> bool:
    return value.get_node().get_type_name() != "Constant"
