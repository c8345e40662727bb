"""Weights that are quantized already: by the authors of a checkpoint, or by a calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from chatglm_ov.checkpoint.reader import Rows, Tensor
from chatglm_ov.weight_formats import WeightFormat

Parts = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class QuantizedTensor(Tensor):
    """A linear weight [N, K] whose elements are stored, not only its values.

    format: what they are elements of. parts(rows): those of these rows as new arrays, in the order and the shapes in
    which the format's `encode` gives them.
    """

    format: WeightFormat
    parts: Callable[[Rows], Parts]

    def rows(self, rows: Rows) -> np.ndarray:
        return self.format.decode(self.parts(rows))

    def read(self) -> np.ndarray:
        return self.rows(slice(None))
