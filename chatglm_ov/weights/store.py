"""Weights of one model in one format: read from the checkpoint in blocks of rows, encoded, written to the file.

The lowering asks for a weight by its name in the checkpoint and gets the graph constants that hold it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import openvino as ov

from chatglm_ov.checkpoint import Checkpoint, Tensor
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.weights.file import WeightsFile
from chatglm_ov.weights.formats import FORMATS, TABLE_FORMATS, WeightFormat

BLOCK_BYTES = 64 << 20
"""Size of a block of rows in float32: what bounds the memory of a conversion."""

Progress = Callable[[str, int], None]
"""Called with a tensor's name and the checkpoint bytes of it that were just done."""


class WeightStore:
    """Encoded weights by checkpoint name; each is stored once, however often it is asked for."""

    def __init__(self, checkpoint: Checkpoint, file: WeightsFile, weight_format: str, progress: Progress):
        self.checkpoint = checkpoint
        self.file = file
        self.linear_format = FORMATS[weight_format]
        self.table_format = TABLE_FORMATS[weight_format]
        self._progress = progress
        self._constants: dict[str, dict[str, ov.Node]] = {}

    def linear(self, name: str, rows: np.ndarray | None = None) -> dict[str, ov.Node]:
        """Parts of a linear weight [N, K], by part name (weight, scale, zero_point); `rows` reorders N."""
        return self._encoded(name, self.linear_format, rows)

    def table(self, name: str) -> dict[str, ov.Node]:
        """Parts of the embedding or LM head [V, K]; a tied one is the same constants."""
        return self._encoded(name, self.table_format, None)

    def vector(self, name: str, rows: np.ndarray | None = None) -> ov.Node:
        """A bias or norm weight, float32 [N]."""
        if name not in self._constants:
            tensor = self.checkpoint[name]
            values = _finite(tensor, tensor.read())
            self.file.write(name, [values if rows is None else values[rows]])
            self._constants[name] = {"weight": self.file.constant(name, "f32", values.shape)}
            self._progress(name, tensor.nbytes)
        return self._constants[name]["weight"]

    def _encoded(self, name: str, fmt: WeightFormat, rows: np.ndarray | None) -> dict[str, ov.Node]:
        if name not in self._constants:
            self._write(name, fmt, rows)
        return self._constants[name]

    def _write(self, name: str, fmt: WeightFormat, rows: np.ndarray | None) -> None:
        tensor = self.checkpoint[name]
        count, columns = tensor.shape
        parts = fmt.parts(columns)
        names = [name if part.name == "weight" else f"{name}.{part.name}" for part in parts]
        entries = [self.file.reserve(n, part.nbytes(count)) for n, part in zip(names, parts, strict=True)]
        ends = [0] * len(parts)
        # Even blocks: two 4-bit values share a byte.
        step = max(2, BLOCK_BYTES // (4 * columns) // 2 * 2)
        for start in range(0, count, step):
            index = slice(start, min(start + step, count)) if rows is None else rows[start : start + step]
            block = _finite(tensor, tensor.rows(index))
            encoded = fmt.encode(block)
            ends = [self.file.write_at(*place) for place in zip(entries, ends, encoded, strict=True)]
            self._progress(name, tensor.nbytes * block.shape[0] // count)
        self._constants[name] = {
            part.name: self.file.constant(n, part.element_type, (count, *part.shape))
            for n, part in zip(names, parts, strict=True)
        }


def _finite(tensor: Tensor, values: np.ndarray) -> np.ndarray:
    """`values` themselves. One NaN or infinity would spoil the scale of its row, and every sum it enters."""
    finite = np.isfinite(values)
    if not finite.all():
        raise ChatGLMError(tensor.file, f"a value of {tensor.name}", values[~finite][0], "a finite number")
    return values
