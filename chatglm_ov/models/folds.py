"""Which weights make the input of a linear layer, so that they can scale it.

A linear layer computes W x. Where x_j comes from row r of another weight and nothing else reads it, that row can be
divided by s_j and column j of W multiplied by it: the model is the same, and the columns of W suit a quantization
better (AWQ, arXiv:2306.00978).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Fold:
    """into: names of the tensors, a norm's weight, or a linear weight and its bias. rows: for each column of the linear
    weight, the row of them that makes it, int [K]; one row may make several columns. None: column j by row j. cached:
    what they make goes through the KV cache, where a trained prefix has values that no weight makes."""

    into: tuple[str, ...]
    rows: np.ndarray | None = None
    cached: bool = False
