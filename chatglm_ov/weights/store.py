"""Weights of one model in one format: read from the checkpoint in blocks of rows, encoded, written to the file.

The lowering asks for a weight by its name in the checkpoint and gets the graph constants that hold it: the parts of
its format for OpenVINO's own operations, or one packed payload for ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import openvino as ov

from chatglm_ov.checkpoint import Checkpoint, Tensor
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.weights.file import WeightsFile
from chatglm_ov.weights.formats import WeightFormat, stored_format
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

    def __init__(self, checkpoint: Checkpoint, file: WeightsFile, weight_format: str, progress: Progress):
        self.checkpoint = checkpoint
        self.file = file
        self.weight_format = weight_format
        self._progress = progress
        self._constants: dict[str, dict[str, ov.Node]] = {}
        self._packed: dict[str, PackedWeight] = {}

    def linear(self, name: str, rows: np.ndarray | None = None) -> dict[str, ov.Node]:
        """Parts of a linear weight [N, K], by part name (weight, scale, zero_point)."""
        return self._parts(name, False, rows)

    def table(self, name: str) -> dict[str, ov.Node]:
        """Parts of the embedding or LM head [V, K]; a tied one is the same constants."""
        return self._parts(name, True, None)

    def packed_linear(self, name: str, rows: np.ndarray | None = None) -> PackedWeight:
        """Payload of a linear weight [N, K]; `rows` may hold -1."""
        return self._payload(name, False, rows)

    def packed_table(self, name: str) -> PackedWeight:
        """Payload of the embedding or LM head [V, K]; a tied one is the same constant."""
        return self._payload(name, True, None)

    def vector(self, name: str, rows: np.ndarray | None = None) -> ov.Node:
        """A bias or norm weight, float32 [N]; `rows` may hold -1."""
        if name not in self._constants:
            tensor = self.checkpoint[name]
            values = _checked(tensor, tensor.read())
            if rows is not None:
                values = np.where(rows == PADDING, np.float32(0), values[rows])
            self.file.write(name, values)
            self._constants[name] = {"weight": self.file.constant(name, "f32", values.shape)}
            self._progress(name, tensor.nbytes)
        return self._constants[name]["weight"]

    def _parts(self, name: str, table: bool, rows: np.ndarray | None) -> dict[str, ov.Node]:
        if name not in self._constants:
            fmt = stored_format(self.weight_format, self.checkpoint.shape(name)[1], table)
            self._constants[name] = self._write_parts(self.checkpoint[name], fmt, rows)
        return self._constants[name]

    def _write_parts(self, tensor: Tensor, fmt: WeightFormat, rows: np.ndarray | None) -> dict[str, ov.Node]:
        count, columns = tensor.shape
        parts = fmt.parts(columns)
        names = [tensor.name if part.name == "weight" else f"{tensor.name}.{part.name}" for part in parts]
        entries = [self.file.reserve(n, part.nbytes(count)) for n, part in zip(names, parts, strict=True)]
        ends = [0] * len(parts)
        # Even blocks: two 4-bit values share a byte.
        for _, block, _ in self._blocks(tensor, fmt, rows, 2):
            pieces = [part.stored(values) for part, values in zip(parts, fmt.encode(block), strict=True)]
            ends = [self.file.write_at(*place) for place in zip(entries, ends, pieces, strict=True)]
        return {
            part.name: self.file.constant(n, part.element_type, (count, *part.shape))
            for n, part in zip(names, parts, strict=True)
        }

    def _payload(self, name: str, table: bool, rows: np.ndarray | None) -> PackedWeight:
        if name not in self._packed:
            fmt = stored_format(self.weight_format, self.checkpoint.shape(name)[1], table)
            self._packed[name] = self._write_payload(self.checkpoint[name], fmt, rows)
        return self._packed[name]

    def _write_payload(self, tensor: Tensor, fmt: WeightFormat, rows: np.ndarray | None) -> PackedWeight:
        layout = layout_of(fmt, tensor.shape[0] if rows is None else rows.size, tensor.shape[1])
        entry = self.file.reserve(tensor.name, layout.bytes)
        for start, block, padding in self._blocks(tensor, fmt, rows, PANEL):
            for place, piece in packed_block(fmt, layout, start, block, padding):
                self.file.write_at(entry, place, piece)
        payload = self.file.constant(tensor.name, "u8", [layout.bytes])
        return PackedWeight(payload, fmt.name, layout.out_features, layout.in_features, layout.group_size)

    def _blocks(
        self, tensor: Tensor, fmt: WeightFormat, rows: np.ndarray | None, multiple: int
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Start, float32 [n, K] and which rows are zeros by order (bool [n]), of blocks of n rows, a multiple of
        `multiple` but in the last one."""
        stored, columns = tensor.shape
        order = np.arange(stored) if rows is None else rows
        step = max(multiple, BLOCK_BYTES // (4 * columns) // multiple * multiple)
        for start in range(0, order.size, step):
            index = order[start : start + step]
            padding = index == PADDING
            if rows is None:
                block = tensor.rows(slice(start, start + index.size))
            else:
                block = tensor.rows(np.where(padding, 0, index))
                block[padding] = 0
            yield start, _checked(tensor, block, fmt.largest), padding
            self._progress(tensor.name, tensor.nbytes * int(np.count_nonzero(~padding)) // stored)


def _checked(tensor: Tensor, values: np.ndarray, largest: float = float("inf")) -> np.ndarray:
    """`values` themselves. One NaN or infinity would spoil the scale of its row, and every sum it enters."""
    fit = np.isfinite(values) if largest == float("inf") else np.abs(values) <= largest
    if not fit.all():
        wanted = "a finite number" if largest == float("inf") else f"at most {largest:g}, what its format can hold"
        raise ChatGLMError(tensor.file, f"a value of {tensor.name}", values[~fit][0], wanted)
    return values
