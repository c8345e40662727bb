"""A checkpoint's weights as a model's graph reads them: checked, and those stacked that it reads as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from chatglm_ov.checkpoint.files import FLOATS
from chatglm_ov.checkpoint.quantized import Parts, QuantizedTensor
from chatglm_ov.checkpoint.reader import Checkpoint, Rows, Tensor, checked
from chatglm_ov.config import ArchitectureConfig
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.models import architecture
from chatglm_ov.weight_formats import int4_format


def model_weights(config: ArchitectureConfig, weights: Checkpoint) -> Checkpoint:
    """The tensors of `models.graph_shapes`. Raises ChatGLMError for names, shapes and types that the model does not
    have; nothing is read but biases that should not be there."""
    module = architecture(config)
    shapes = module.weight_shapes(config)
    weights = _without_empty_biases(weights, shapes)
    weights.verify(shapes, ignored=lambda name: module.is_ignored(config, name))
    for name, shape in shapes.items():
        quantized = len(shape) == 2 and isinstance(weights[name], QuantizedTensor)
        if weights.dtype(name) not in FLOATS and not quantized:
            wanted = f"one of {', '.join(FLOATS)}"
            raise ChatGLMError(weights[name].file, f"dtype of {name}", weights.dtype(name), wanted)
    stacks = module.stacked_weights(config)
    removed = {name for names in stacks.values() for name in names}
    return weights.replaced(removed, [_stacked(name, [weights[n] for n in names]) for name, names in stacks.items()])


def _without_empty_biases(weights: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """Tools that quantize store a bias with every linear weight, of zeros where the model has none. Raises ChatGLMError
    for other values."""
    linear = [name for name in shapes if name in weights and isinstance(weights[name], QuantizedTensor)]
    biases = [f"{name.removesuffix('.weight')}.bias" for name in linear]
    empty = [name for name in biases if name in weights and name not in shapes]
    for name in empty:
        values = weights[name].read()
        if values.any():
            wanted = "0: the model has no bias there"
            raise ChatGLMError(weights[name].file, f"a value of {name}", values[values != 0][0], wanted)
    return weights.replaced(empty, ())


@dataclass(frozen=True)
class StackedTensor(Tensor):
    """The rows of several tensors one after another."""

    tensors: tuple[Tensor, ...]

    def rows(self, rows: Rows) -> np.ndarray:
        (values,) = _gathered(self.tensors, rows, lambda tensor, index: (tensor.rows(index),))
        return values

    def read(self) -> np.ndarray:
        return np.concatenate([tensor.read() for tensor in self.tensors])


@dataclass(frozen=True)
class StackedQuantizedTensor(QuantizedTensor):
    """The rows of several tensors one after another, of which some are quantized, or all. The others have elements as
    the format of those makes them, but values of their own."""

    tensors: tuple[Tensor, ...]

    def rows(self, rows: Rows) -> np.ndarray:
        (values,) = _gathered(self.tensors, rows, lambda tensor, index: (tensor.rows(index),))
        return values


def _stacked(name: str, tensors: list[Tensor]) -> Tensor:
    shape = (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:])
    nbytes = sum(tensor.nbytes for tensor in tensors)
    quantized = [tensor for tensor in tensors if isinstance(tensor, QuantizedTensor)]
    if len({(t.format.name, t.format.group_size(shape[1])) for t in quantized}) != 1:
        # What differs in format has values in common.
        return StackedTensor(name, tensors[0].file, shape, tensors[0].dtype, nbytes, tuple(tensors))
    fmt = quantized[0].format
    if fmt.name == "int4":
        # Zero points that one of them has wider, all of them have.
        bits = max(part.bits for t in quantized for part in t.format.parts(shape[1]) if part.name == "zero_point")
        fmt = int4_format(fmt.widest_group, bits)

    def elements(tensor: Tensor, index: np.ndarray) -> Parts:
        if isinstance(tensor, QuantizedTensor):
            return tensor.parts(index)
        return fmt.encode(checked(tensor, tensor.rows(index), fmt.largest))

    def parts(rows: Rows) -> Parts:
        return _gathered(tensors, rows, elements)

    return StackedQuantizedTensor(name, quantized[0].file, shape, fmt.name, nbytes, fmt, parts, tuple(tensors))


def _gathered(tensors: Sequence[Tensor], rows: Rows, read: Callable[[Tensor, np.ndarray], Parts]) -> Parts:
    """What `read(tensor, index)` gives of these rows of the stack, tensor by tensor, put in their order."""
    ends = np.cumsum([tensor.shape[0] for tensor in tensors])
    index = np.arange(ends[-1])[rows]
    owner = np.searchsorted(ends, index, side="right")
    made: list[np.ndarray] = []
    for i, tensor in enumerate(tensors):
        mine = owner == i
        if not mine.any():
            continue
        pieces = read(tensor, index[mine] - (ends[i] - tensor.shape[0]))
        made = made or [np.empty((index.size, *piece.shape[1:]), piece.dtype) for piece in pieces]
        for whole, piece in zip(made, pieces, strict=True):
            whole[mine] = piece
    return tuple(made)
