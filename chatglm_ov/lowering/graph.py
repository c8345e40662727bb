"""What both lowerings build from OpenVINO's own operations.

Letters in shapes as in `chatglm_ov.lowering`.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import openvino as ov
import openvino.opset15 as ops
from openvino.op.util import Variable, VariableInfo

from chatglm_ov.checkpoint.reader import Checkpoint
from chatglm_ov.lowering import Rotary

CACHE = "past_key_values."
"""Variables of a layer's cache begin with this and the number of the layer."""

LOGITS_TO_KEEP = "logits_to_keep"
"""Input i64 [1]: of how many of the last positions there are logits."""


def i64(*values: int) -> ov.Node:
    """A constant vector."""
    return ops.constant(np.array(values, dtype=np.int64))


def scalar(value: int) -> ov.Node:
    return ops.constant(np.int64(value))


def graph_input(name: str, shape: list[int], element_type: Any) -> ov.Node:
    """A parameter that is an input of that name."""
    node = ops.parameter(shape, element_type, name=name)
    node.output(0).get_tensor().set_names({name})
    return node


def last_rows(x: ov.Node | ov.Output, count: ov.Node) -> ov.Node:
    """The last `count` i64 [1] positions of x [B, L, features], 0 meaning all of them."""
    return ops.slice(x, ops.negative(count), i64(np.iinfo(np.int64).max), i64(1), i64(1))


class WeightParts(Protocol):
    """What a lowering to OpenVINO's own operations asks of `chatglm_ov.weights.store.WeightStore`."""

    checkpoint: Checkpoint

    def linear(self, name: str, rows: np.ndarray | None = None) -> dict[str, ov.Node]: ...

    def embedding(self, name: str) -> dict[str, ov.Node]: ...

    def lm_head(self, name: str) -> dict[str, ov.Node]: ...

    def vector(self, name: str, rows: np.ndarray | None = None) -> ov.Node: ...


class GraphLowering:
    """A model under construction: its inputs, its state, and the words that need no operation of ours."""

    def __init__(self, weights: WeightParts):
        self.weights = weights
        self._parameters: list[ov.Node] = []
        self._sinks: list[ov.Node] = []

    def inputs(self, rotary: Rotary, *, prefix: bool = False) -> None:
        rows = rotary.inv_freq.shape[0]
        position_shape = [-1, -1] if rows == 1 else [-1, rows, -1]
        self.input_ids = self.input("input_ids", [-1, -1], np.int64)
        self.attention_mask = self.input("attention_mask", [-1, -1], np.int64)
        self.position_ids = self.input("position_ids", position_shape, np.int64)
        self.beam_idx = self.input("beam_idx", [-1], np.int32)
        self.prefix_length = self.input("prefix_length", [-1], np.int64) if prefix else None

    def input(self, name: str, shape: list[int], element_type: Any) -> ov.Node:
        node = graph_input(name, shape, element_type)
        self._parameters.append(node)
        return node

    def add(self, x: ov.Node, y: ov.Node) -> ov.Node:
        return ops.add(x, y)

    def _angle_rows(self, rotary: Rotary) -> list[ov.Node]:
        """Angles f32 [B, L, n] of each row of positions."""
        rows = rotary.inv_freq.shape[0]
        positions = [self.position_ids]
        if rows > 1:
            positions = [ops.gather(self.position_ids, scalar(row), scalar(1)) for row in range(rows)]
        return [
            ops.multiply(ops.unsqueeze(ops.convert(ids, "f32"), i64(-1)), ops.constant(frequencies[None, None]))
            for ids, frequencies in zip(positions, rotary.inv_freq, strict=True)
        ]

    @staticmethod
    def _cos_and_sin(angles: ov.Node, rotary: Rotary) -> tuple[ov.Node, ov.Node]:
        cos, sin = ops.cos(angles), ops.sin(angles)
        if rotary.factor == 1.0:
            return cos, sin
        factor = np.float32(rotary.factor)
        return ops.multiply(cos, factor), ops.multiply(sin, factor)

    @staticmethod
    def _variable(variable_id: str, element_type: ov.Type, shape: list[int]) -> Variable:
        info = VariableInfo()
        info.data_shape = ov.PartialShape(shape)
        info.data_type = element_type
        info.variable_id = variable_id
        return Variable(info)

    def model(self, logits: ov.Node, name: str) -> ov.Model:
        result = ops.result(logits)
        result.output(0).get_tensor().set_names({"logits"})
        result.set_friendly_name("logits")
        return ov.Model([result], self._sinks, self._parameters, name)
