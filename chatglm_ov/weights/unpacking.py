"""Packed weights without the native library: the elements of a payload's rows, as the format's `encode` gives them.

The layouts are those of csrc/kernels/packing.h. Each is made of cells of four bytes, [panel][cell][16 features]: one
number of K in f32, two in bf16, four in int8, eight in int4.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from chatglm_ov.weight_formats import FORMATS, WeightFormat, int4_format
from chatglm_ov.weights.packing import PANEL

UNPACKED_VERSION = 2
"""Packing version of the layouts in this file."""

_CELL_COLUMNS = {"f32": 1, "bf16": 2, "int8": 4, "int4": 8}
_COLUMN_MULTIPLE = {"f32": 16, "bf16": 32, "int8": 64, "int4": 64}
_SECTION_BYTES = 64


@dataclass(frozen=True)
class PackedRows:
    """Rows of a payload, uint8 [bytes]. Raises ValueError for one of another size."""

    payload: np.ndarray
    name: str
    out_features: int
    in_features: int
    group_size: int

    def __post_init__(self) -> None:
        if self.payload.size != self._bytes:
            raise ValueError(f"a payload of {self.payload.size} bytes, where {self._bytes} are those of its shape")

    @property
    def format(self) -> WeightFormat:
        """With zero points of 4 bits where all fit."""
        if self.name != "int4":
            return FORMATS[self.name]
        return int4_format(self.group_size, 4 if self._zero_points.max() <= 15 else 8)

    def parts(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        """Elements of these rows [n], in the order of the payload, part by part of the format."""
        panel, channel = rows // PANEL, rows % PANEL
        cells = np.ascontiguousarray(self._cells[panel, :, channel])
        codes = self._codes(cells)[:, : self.in_features]
        if self.name == "int8":
            return codes, self._scales[panel, channel][:, None]
        if self.name == "int4":
            groups = self.in_features // self.group_size
            scales, zero_points = (
                values[panel, :, channel][:, :groups, None] for values in (self._scales, self._zero_points)
            )
            return codes.reshape(len(rows), groups, -1), zero_points, scales.astype(np.float32)
        return (codes,)

    def _codes(self, cells: np.ndarray) -> np.ndarray:
        """uint32 [n, cells] -> elements [n, K with its padding]."""
        if self.name == "f32":
            return cells.view(np.float32)
        if self.name == "bf16":
            return cells.view(ml_dtypes.bfloat16)
        four = cells.view(np.uint8)
        if self.name == "int8":
            return (four ^ 128).view(np.int8)
        four = four.reshape(*cells.shape, 4)
        return np.stack([four & 15, four >> 4], axis=2).reshape(len(cells), -1)

    @property
    def _panels(self) -> int:
        return -(-self.out_features // PANEL)

    @property
    def _padded_in(self) -> int:
        multiple = max(_COLUMN_MULTIPLE[self.name], self.group_size)
        return -(-self.in_features // multiple) * multiple

    @property
    def _groups(self) -> int:
        return self._padded_in // self.group_size

    @property
    def _code_bytes(self) -> int:
        return self._panels * self._padded_in * PANEL * 4 // _CELL_COLUMNS[self.name]

    @property
    def _zero_point_start(self) -> int:
        end = self._code_bytes + self._panels * self._groups * PANEL * 2
        return -(-end // _SECTION_BYTES) * _SECTION_BYTES

    @property
    def _bytes(self) -> int:
        if self.name == "int8":
            return self._code_bytes + self._panels * PANEL * 4
        return self._zero_point_start + self._panels * self._groups * PANEL if self.name == "int4" else self._code_bytes

    @property
    def _cells(self) -> np.ndarray:
        return self.payload[: self._code_bytes].view(np.uint32).reshape(self._panels, -1, PANEL)

    @property
    def _scales(self) -> np.ndarray:
        """float32 [panels, 16] in int8, float16 [panels, groups, 16] in int4."""
        behind = self.payload[self._code_bytes :]
        if self.name == "int8":
            return behind.view(np.float32).reshape(self._panels, PANEL)
        count = self._panels * self._groups * PANEL
        return behind[: 2 * count].view(np.float16).reshape(self._panels, self._groups, PANEL)

    @property
    def _zero_points(self) -> np.ndarray:
        """uint8 [panels, groups, 16]."""
        return self.payload[self._zero_point_start :].reshape(self._panels, self._groups, PANEL)
