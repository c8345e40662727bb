"""Norms made by the operation behind them, and residuals added by the norm before them, in a model that is about to be
compiled.

Two operations fewer a block save a pass over the values of a prompt and, where the operations of a layer do not run as
one (chains.py), up to half a per cent of a token on two cores.
"""

from __future__ import annotations

import openvino as ov

from chatglm_ov.lowering.operations import attributes_of, operation


def fuse_norms(model: ov.Model) -> None:
    """Change `model` in place: each FullyConnected that is the only reader of a Norm normalizes its rows itself."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "FullyConnected":
            continue
        norm = node.input_value(0).get_node()
        if _is_read_once(node.input_value(0)) and not _adds(norm):
            _fuse(norm, node)


def fuse_residuals(model: ov.Model) -> None:
    """Change `model` in place: each Norm whose only reader is an Add adds the other value itself. So nothing of
    OpenVINO's lies between the operations of a layer in `glm4`."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Add":
            continue
        values = node.input_values()
        norms = [i for i, value in enumerate(values) if _is_read_once(value) and not _adds(value.get_node())]
        if norms:
            norm, residual = values[norms[0]].get_node(), values[1 - norms[0]]
            made = operation("Norm", [*norm.input_values(), residual], **{**attributes_of(norm), "residual": 1})
            made.set_friendly_name(node.get_friendly_name())
            for target in node.output(0).get_target_inputs():
                target.replace_source_output(made.output(0))


def _is_read_once(value: ov.Output) -> bool:
    return value.get_node().get_type_name() == "Norm" and len(value.get_target_inputs()) == 1


def _adds(norm: ov.Node) -> bool:
    return bool(attributes_of(norm)["residual"])


def _fuse(norm: ov.Node, node: ov.Node) -> None:
    x, *weights = norm.input_values()
    made = attributes_of(norm)
    attributes = {**attributes_of(node), "norm": made["kind"], "norm_eps": made["eps"]}
    fused = operation("FullyConnected", [x, *node.input_values()[1:], *weights], **attributes)
    fused.set_friendly_name(node.get_friendly_name())
    for target in node.output(0).get_target_inputs():
        target.replace_source_output(fused.output(0))
