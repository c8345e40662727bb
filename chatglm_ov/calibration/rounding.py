"""From a weight and the moments of its input to int4 codes. Letters: n rows, K columns, G groups of them.

`clipped` shrinks the range of each group to where the rounding errors, weighed by the square of the inputs, are
smallest. `Compensation` rounds one column after the other and moves the error of each into the columns that are left
(GPTQ, arXiv:2210.17323), the columns of the largest inputs first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chatglm_ov.calibration.moments import InputMoments

LEVELS = 15
LARGEST_SCALE = torch.finfo(torch.float16).max
RANGES = [1 - 0.04 * i for i in range(11)]
"""Shares of a group's range that are tried."""
CLIP_ELEMENTS = 1 << 18
"""Weights that are clipped at once: what a core's cache holds."""

DAMPING = 0.01
"""Added to the diagonal of the second moments, times its mean."""
LAZY_COLUMNS = 128
"""Columns whose errors reach the columns behind them in one product."""


@dataclass(frozen=True)
class Grid:
    """weight = (code - zero_point) * scale; both float32 [n, G, 1], whole numbers 0..15 and float16 values."""

    zero_point: Tensor
    scale: Tensor

    def codes(self, groups: Tensor) -> Tensor:
        """The nearest codes 0..15 of [n, G, columns of a group]."""
        return torch.round(groups / self.scale).add_(self.zero_point).clamp_(0, LEVELS)

    def values(self, codes: Tensor) -> Tensor:
        return (codes - self.zero_point) * self.scale

    def rounded(self, groups: Tensor) -> Tensor:
        return self.values(self.codes(groups))

    @classmethod
    def over(cls, groups: Tensor, share: float = 1.0) -> Grid:
        """Of a share of each group's range, stretched to hold 0."""
        low = groups.amin(-1, keepdim=True).mul_(share).clamp_(max=0)
        high = groups.amax(-1, keepdim=True).mul_(share).clamp_(min=0)
        scale = ((high - low) / LEVELS).clamp_(max=LARGEST_SCALE).half().float()
        scale[scale == 0] = 1
        return cls(torch.round(-low / scale).clamp_(0, LEVELS), scale)

    @classmethod
    def joined(cls, grids: Sequence[Grid]) -> Grid:
        """Of the rows of all of them."""
        return cls(torch.cat([grid.zero_point for grid in grids]), torch.cat([grid.scale for grid in grids]))

    def where(self, chosen: Tensor, other: Grid) -> Grid:
        """This one where chosen [n, G, 1] says so."""
        return Grid(
            torch.where(chosen, self.zero_point, other.zero_point), torch.where(chosen, self.scale, other.scale)
        )


def clipped(weight: Tensor, moments: InputMoments, group: int) -> Grid:
    """The best grid of each group of weight [n, K], every weight rounded by itself."""
    importance = moments.second.diagonal().reshape(-1, group)
    rows = max(1, CLIP_ELEMENTS // weight.shape[1])
    return Grid.joined([_best_grid(grouped(block, group), importance) for block in weight.split(rows)])


def grouped(weight: Tensor, group: int) -> Tensor:
    """[n, K] as [n, G, group]."""
    return weight.reshape(len(weight), -1, group)


def _best_grid(groups: Tensor, importance: Tensor) -> Grid:
    best, least = Grid.over(groups), torch.full((), torch.inf)
    for share in RANGES:
        grid = Grid.over(groups, share)
        error = ((grid.rounded(groups) - groups).square_() * importance).sum(-1, keepdim=True)
        best, least = grid.where(error < least, best), torch.minimum(error, least)
    return best


class Compensation:
    """Rounds rows of one weight; what depends on the inputs only is computed once."""

    def __init__(self, moments: InputMoments):
        self._order = moments.second.diagonal().argsort(descending=True)
        self._factor = _inverse_factor(moments.second[self._order][:, self._order])

    def codes(self, weight: Tensor, grid: Grid, group: int) -> Tensor:
        """Codes [n, G, group] of weight [n, K] on a grid that is given."""
        left = weight[:, self._order]
        of_column = self._order // group
        scale, zero_point = grid.scale[:, of_column, 0], grid.zero_point[:, of_column, 0]
        codes, columns = torch.empty_like(left), left.shape[1]
        for start in range(0, columns, LAZY_COLUMNS):
            end = min(columns, start + LAZY_COLUMNS)
            errors = torch.empty(len(left), end - start)
            for column in range(start, end):
                here, behind = left[:, column], left[:, column + 1 : end]
                code = torch.round(here / scale[:, column]).add_(zero_point[:, column]).clamp_(0, LEVELS)
                error = here - (code - zero_point[:, column]) * scale[:, column]
                error /= self._factor[column, column]
                behind.addr_(error, self._factor[column, column + 1 : end], alpha=-1)
                codes[:, column], errors[:, column - start] = code, error
            left[:, end:].addmm_(errors, self._factor[start:end, end:], alpha=-1)
        stored = torch.empty_like(codes)
        stored[:, self._order] = codes
        return stored.reshape(len(stored), -1, group)


def _inverse_factor(second: Tensor) -> Tensor:
    """Upper triangular U with U^T U = second^-1, of moments that are damped until they have an inverse."""
    mean, damping = second.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny), DAMPING
    while True:
        damped = second.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return factor
        damping *= 10
