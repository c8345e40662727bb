"""The weights of a fused graph by their checkpoint names, read without the native library.

Tensors are as the stock lowering stores them: rows that a model reorders stand in the model's order already, those of
gate and up behind one another, and none is padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import openvino as ov

from chatglm_ov.checkpoint.quantized import Parts, QuantizedTensor
from chatglm_ov.checkpoint.reader import Checkpoint, Rows, Tensor
from chatglm_ov.weight_formats import FORMATS, WeightFormat
from chatglm_ov.weights.graph_file import GraphFile, Layer
from chatglm_ov.weights.packing import PADDING, gate_up_rows
from chatglm_ov.weights.store import WeightStore
from chatglm_ov.weights.unpacking import PackedRows

_ROW_FORMATS = {"f32": "f32", "bf16": "bf16", "i8": "int8"}
"""Formats of weights that are looked up row by row, by their element type."""


@dataclass(frozen=True)
class Vector(Tensor):
    """A bias or norm weight, float32 [N]."""

    values: np.ndarray

    def rows(self, rows: Rows) -> np.ndarray:
        return np.array(self.values[rows])

    def read(self) -> np.ndarray:
        return np.array(self.values)


class PackedWeights(Checkpoint):
    """All that the fused operations of `graph` read. Raises ChatGLMError for a graph that is damaged."""

    def __init__(self, graph: GraphFile):
        super().__init__(graph.path.parent, {})
        self._graph = graph
        readers: dict[str, Callable[[Layer], None]] = {
            "FullyConnected": self._add_fully_connected,
            "EmbeddingRows": self._add_table,
            "Norm": self._add_norm,
        }
        for layer in graph.layers.values():
            if layer.kind not in readers:
                continue
            try:
                readers[layer.kind](layer)
            except (LookupError, ArithmeticError, ValueError) as error:
                raise graph.damaged(f"{layer.name}: {error}") from error

    def close(self) -> None:
        super().close()
        self._tensors.clear()

    def _add_fully_connected(self, layer: Layer) -> None:
        number = {name: int(layer.attributes[name]) for name in ("y_features", "out_features", "in_features")}
        payload = self._read(layer, 1)
        packed = PackedRows(
            self._graph.constant(payload),
            layer.attributes["format"],
            number["out_features"],
            number["in_features"],
            int(layer.attributes["group_size"]),
        )
        order = _stored_order(number["y_features"], layer.attributes["activation"] == "silu_gate")
        shape = order.size, packed.in_features
        self._add_matrix(payload.name, shape, packed.format, lambda rows: packed.parts(order[rows]))
        if layer.attributes["bias"] == "1":
            self._add_vector(self._read(layer, 2), order)

    def _add_table(self, layer: Layer) -> None:
        weight, *others = (self._read(layer, port) for port in range(1, len(layer.inputs)))
        arrays = tuple(self._graph.constant(each) for each in (weight, *others))
        fmt = FORMATS[_ROW_FORMATS[weight.attributes["element_type"]]]
        if len(arrays) != len(fmt.parts(1)):
            raise ValueError(f"{len(arrays)} parts of a weight in {fmt.name}")
        self._add_matrix(weight.name, arrays[0].shape, fmt, lambda rows: tuple(np.array(each[rows]) for each in arrays))

    def _add_norm(self, layer: Layer) -> None:
        for port in range(1, len(layer.inputs)):
            self._add_vector(self._read(layer, port), slice(None))

    def _read(self, layer: Layer, port: int) -> Layer:
        return self._graph.layers[layer.inputs[port]]

    def _add_matrix(self, name: str, shape: tuple[int, ...], fmt: WeightFormat, parts: Callable[[Rows], Parts]) -> None:
        file = self._graph.path
        self._tensors[name] = QuantizedTensor(name, file, shape, fmt.name, fmt.nbytes(shape), fmt, parts)

    def _add_vector(self, layer: Layer, order: Rows) -> None:
        values = self._graph.constant(layer)[order]
        self._tensors[layer.name] = Vector(layer.name, self._graph.path, values.shape, "f32", values.nbytes, values)


def _stored_order(features: int, gated: bool) -> np.ndarray:
    """Where the payload has each row of the weight."""
    if not gated:
        return np.arange(features)
    packed = gate_up_rows(features)
    order = np.empty(2 * features, np.int64)
    order[packed[packed != PADDING]] = np.flatnonzero(packed != PADDING)
    return order


class UnpackedStore(WeightStore):
    """Stores `PackedWeights` in the formats that they have, in the order that they have: `rows` has been followed when
    they were packed."""

    checkpoint: PackedWeights

    def linear(self, name: str, rows: np.ndarray | None = None) -> dict[str, ov.Node]:
        return super().linear(name)

    def vector(self, name: str, rows: np.ndarray | None = None) -> ov.Node:
        return super().vector(name)

    def embedding(self, name: str) -> dict[str, ov.Node]:
        return self._parts(name, self._linear_format(name), None)

    def _linear_format(self, name: str) -> WeightFormat:
        return self._lm_head_format(name)

    def _lm_head_format(self, name: str) -> WeightFormat:
        tensor = self.checkpoint[name]
        assert isinstance(tensor, QuantizedTensor)
        return tensor.format
