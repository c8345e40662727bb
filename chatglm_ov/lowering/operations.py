"""Graph nodes of the native library's operations."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import openvino as ov
from openvino.utils.node_factory import NodeFactory

from chatglm_ov.native import library_path, native


@cache
def _factory() -> NodeFactory:
    factory = NodeFactory("opset15")
    factory.add_extension(library_path())
    return factory


def operation(name: str, inputs: Iterable[ov.Node | ov.Output], **attributes: Any) -> ov.Node:
    """A node of the operation `name`, with the version of the layouts that it reads."""
    outputs = [value.output(0) if isinstance(value, ov.Node) else value for value in inputs]
    return _factory().create(name, outputs, {**attributes, "packing_version": native().PACKING_VERSION})


def attributes_of(node: ov.Node) -> dict[str, Any]:
    """What `operation` takes to make another one of the kind."""
    return {name: value for name, value in node.get_attributes().items() if name != "packing_version"}
