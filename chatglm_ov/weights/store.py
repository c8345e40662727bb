"""Weights of one model in one format: read from the checkpoint in blocks of rows, encoded, written to the file.

The lowering asks for a weight by its name in the checkpoint and gets the graph constants that hold it: the parts of
its format for OpenVINO's own operations, or one packed payload for ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import openvino as ov

from chatglm_ov.checkpoint.quantized import QuantizedTensor
from chatglm_ov.checkpoint.reader import Checkpoint, Rows, Tensor, checked
from chatglm_ov.weight_formats import WeightFormat
from chatglm_ov.weights.choices import DEFAULT_CHOICES, FormatChoices
from chatglm_ov.weights.file import WeightsFile
from chatglm_ov.weights.packing import PADDING, PANEL, PackedWeight, layout_of, packed_block

BLOCK_BYTES = 64 << 20
"""Size of a block of rows in float32: what bounds the memory of a conversion."""

Progress = Callable[[str, int], None]
"""Called with a tensor's name and the checkpoint bytes of it that were just done."""


class WeightStore:
    """Encoded weights by checkpoint name; each is stored once, however often it is asked for.

    `rows` reorders the first axis: for each row of the result, the row of the stored tensor; where it says so, -1 is
    a row of zeros.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        file: WeightsFile,
        weight_format: str,
        progress: Progress,
        choices: FormatChoices = DEFAULT_CHOICES,
    ):
        self.checkpoint = checkpoint
        self.file = file
        self.weight_format = weight_format
        self.choices = choices
        self._progress = progress
        self._constants: dict[str, dict[str, ov.Node]] = {}
        self._packed: dict[str, PackedWeight] = {}

    def linear(self, name: str, rows: np.ndarray | None = None) -> dict[str, ov.Node]:
        """Parts of a linear weight [N, K], by part name (weight, scale, zero_point)."""
        return self._parts(name, self._linear_format(name), rows)

    def embedding(self, name: str) -> dict[str, ov.Node]:
        """Parts of an embedding [V, K] that is not tied."""
        return self._parts(name, self.choices.embedding(self.weight_format), None)

    def lm_head(self, name: str) -> dict[str, ov.Node]:
        """Parts of the LM head [V, K], which may be the embedding too; then it is the same constants."""
        return self._parts(name, self._lm_head_format(name), None)

    def packed_linear(self, name: str, rows: np.ndarray | None = None) -> PackedWeight:
        """Payload of a linear weight [N, K]; `rows` may hold -1."""
        return self._payload(name, self._linear_format(name), rows)

    def packed_lm_head(self, name: str) -> PackedWeight:
        """Payload of the LM head [V, K], which may be the embedding too; then it is the same constant."""
        return self._payload(name, self._lm_head_format(name), None)

    def vector(self, name: str, rows: np.ndarray | None = None) -> ov.Node:
        """A bias or norm weight, float32 [N]; `rows` may hold -1."""
        if name not in self._constants:
            tensor = self.checkpoint[name]
            values = checked(tensor, tensor.read())
            if rows is not None:
                values = np.where(rows == PADDING, np.float32(0), values[rows])
            self.file.write(name, values)
            self._constants[name] = {"weight": self.file.constant(name, "f32", values.shape)}
            self._progress(name, tensor.nbytes)
        return self._constants[name]["weight"]

    def _linear_format(self, name: str) -> WeightFormat:
        return self.choices.linear(self.weight_format, name, self.checkpoint.shape(name)[1])

    def _lm_head_format(self, name: str) -> WeightFormat:
        return self.choices.lm_head(self.weight_format, self.checkpoint.shape(name)[1], self.checkpoint.dtype(name))

    def _parts(self, name: str, fmt: WeightFormat, rows: np.ndarray | None) -> dict[str, ov.Node]:
        if name not in self._constants:
            self._constants[name] = self._write_parts(self.checkpoint[name], fmt, rows)
        return self._constants[name]

    def _write_parts(self, tensor: Tensor, fmt: WeightFormat, rows: np.ndarray | None) -> dict[str, ov.Node]:
        fmt = stored_as(tensor, fmt)
        count, columns = tensor.shape
        parts = fmt.parts(columns)
        names = [tensor.name if part.name == "weight" else f"{tensor.name}.{part.name}" for part in parts]
        entries = [self.file.reserve(n, part.nbytes(count)) for n, part in zip(names, parts, strict=True)]
        ends = [0] * len(parts)
        # Even blocks: two 4-bit values share a byte.
        for _, block, _ in self._blocks(tensor, fmt, rows, 2):
            pieces = [part.stored(values) for part, values in zip(parts, block, strict=True)]
            ends = [self.file.write_at(*place) for place in zip(entries, ends, pieces, strict=True)]
        return {
            part.name: self.file.constant(n, part.element_type, (count, *part.shape))
            for n, part in zip(names, parts, strict=True)
        }

    def _payload(self, name: str, fmt: WeightFormat, rows: np.ndarray | None) -> PackedWeight:
        if name not in self._packed:
            self._packed[name] = self._write_payload(self.checkpoint[name], fmt, rows)
        return self._packed[name]

    def _write_payload(self, tensor: Tensor, fmt: WeightFormat, rows: np.ndarray | None) -> PackedWeight:
        fmt = stored_as(tensor, fmt)
        layout = layout_of(fmt, tensor.shape[0] if rows is None else rows.size, tensor.shape[1])
        entry = self.file.reserve(tensor.name, layout.bytes)
        for start, parts, padding in self._blocks(tensor, fmt, rows, PANEL):
            for place, piece in packed_block(fmt, layout, start, parts, padding):
                self.file.write_at(entry, place, piece)
        payload = self.file.constant(tensor.name, "u8", [layout.bytes])
        return PackedWeight(payload, fmt.name, layout.out_features, layout.in_features, layout.group_size)

    def _blocks(
        self, tensor: Tensor, fmt: WeightFormat, rows: np.ndarray | None, multiple: int
    ) -> Iterator[tuple[int, tuple[np.ndarray, ...], np.ndarray]]:
        """Start, the elements of each part of the format, and which rows are zeros by order (bool [n]), of blocks of n
        rows, a multiple of `multiple` but in the last one."""
        stored, columns = tensor.shape
        order = np.arange(stored) if rows is None else rows
        step = max(multiple, BLOCK_BYTES // (4 * columns) // multiple * multiple)
        for start in range(0, order.size, step):
            index = order[start : start + step]
            padding = index == PADDING
            taken = slice(start, start + index.size) if rows is None else np.where(padding, 0, index)
            yield start, _encoded(tensor, fmt, taken, padding), padding
            self._progress(tensor.name, tensor.nbytes * int(np.count_nonzero(~padding)) // stored)


def stored_as(tensor: Tensor, fmt: WeightFormat) -> WeightFormat:
    """The format that a weight which was to have `fmt` has in the end: what is quantized by the same name already keeps
    its own groups."""
    if isinstance(tensor, QuantizedTensor) and tensor.format.name == fmt.name:
        return tensor.format
    return fmt


def _encoded(tensor: Tensor, fmt: WeightFormat, rows: Rows, padding: np.ndarray) -> tuple[np.ndarray, ...]:
    """Elements of each part of the format, of these rows; zeros where `padding` says so."""
    if isinstance(tensor, QuantizedTensor) and fmt is tensor.format:
        parts = tensor.parts(rows)
        if padding.any():
            for part, zero in zip(parts, fmt.encode(np.zeros((1, tensor.shape[1]), np.float32)), strict=True):
                part[padding] = zero
        return parts
    block = tensor.rows(rows)
    block[padding] = 0
    return fmt.encode(checked(tensor, block, fmt.largest))
