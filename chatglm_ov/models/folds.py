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


def gated_block_folds(
    norms: tuple[str, str], qkv: tuple[str, ...], dense: str, mlp: tuple[str, str], values: np.ndarray, features: int
) -> dict[str, Fold]:
    """Folds of a block whose MLP has a gate: every input of a linear layer is made by weights that nothing else reads.

    A norm makes those of `qkv` and of the first weight of `mlp`, [2 F, K]; the values of attention, rows `values` of
    `qkv`, those of `dense`; the half that is multiplied with the gate those of the second weight of `mlp`, [N, F].
    norms: weights of those before attention and before the MLP. qkv: the weight, and its bias if there is one.
    features: F.
    """
    return {
        qkv[0]: Fold((norms[0],)),
        dense: Fold(qkv, values, cached=True),
        mlp[0]: Fold((norms[1],)),
        mlp[1]: Fold((mlp[0],), features + np.arange(features)),
    }
