"""Factors of the columns of a weight by the activations they meet (AWQ, arXiv:2306.00978, section 3.2).

A column that meets large activations is multiplied by s > 1 before it is rounded, and what makes that activation is
divided by s: its rounding error counts less. s = m^a, or m^a / w^(1 - a), m the mean magnitude of the activation, w
that of the column within its groups; a is the one with the smallest error of the layer's output.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from chatglm_ov.calibration.moments import InputMoments
from chatglm_ov.calibration.rounding import clipped, grouped

STEPS = 20
"""Values of a that are tried, from 0 on."""
SMALLEST = 1e-4
"""Magnitudes are taken as at least this share of the largest."""
PRODUCTS = 1 << 32
"""Multiplications for the error of one a: rows of the weight, evenly picked, up to this and to MOST_ROWS."""
LEAST_ROWS, MOST_ROWS = 64, 512


def column_scales(weight: Tensor, moments: InputMoments, group: int, makers: Tensor | None) -> Tensor:
    """Factors [K] of the columns of weight [N, K]. makers: int [K], columns with the same number must have the same
    factor, since one row makes them all."""
    sample = weight[_picked_rows(weight)]
    shared = _Shared(makers, weight.shape[1])
    magnitude = shared.mean(moments.magnitude)
    groups = grouped(weight.abs(), group)
    relative = groups / groups.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    importance = moments.second.diagonal()
    best, least = torch.ones(weight.shape[1]), torch.inf
    for scale in _candidates(magnitude, shared.mean(relative.mean(0).flatten())):
        scaled = sample * scale
        rounded = clipped(scaled, importance / scale**2, group).rounded(grouped(scaled, group))
        error = moments.error(rounded.reshape_as(scaled).sub_(scaled).div_(scale)).item()
        if error < least:
            best, least = scale, error
    return best


def _picked_rows(weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    count = min(rows, max(LEAST_ROWS, min(MOST_ROWS, PRODUCTS // columns**2)))
    return torch.linspace(0, rows - 1, count).long()


def _candidates(magnitude: Tensor, relative: Tensor) -> Iterator[Tensor]:
    """All ones first; the largest and the smallest factor of each are as far from 1."""
    magnitude = magnitude.clamp(min=max(SMALLEST * magnitude.max().item(), torch.finfo(torch.float32).tiny))
    relative = relative.clamp(min=max(SMALLEST * relative.max().item(), torch.finfo(torch.float32).tiny))
    for step in range(STEPS):
        a = step / STEPS
        for scale in (magnitude**a, magnitude**a / relative ** (1 - a)):
            yield scale / (scale.max() * scale.min()).sqrt()


class _Shared:
    """Means over the columns that one row makes."""

    def __init__(self, makers: Tensor | None, columns: int):
        numbers = torch.arange(columns) if makers is None else torch.unique(makers, return_inverse=True)[1]
        self._numbers, self._counts = numbers, torch.bincount(numbers)

    def mean(self, values: Tensor) -> Tensor:
        """[K], equal where the maker is."""
        sums = torch.zeros(len(self._counts)).index_add_(0, self._numbers, values)
        return (sums / self._counts)[self._numbers]
