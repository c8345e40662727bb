"""From a weight and the moments of its input to int4 or int8 codes. Letters: n rows, K columns, G groups of them.

`clipped` shrinks the range of each group to where the rounding errors, weighed by the square of the inputs, are
smallest. `Compensation` rounds one column after the other, those of the largest inputs first, and lets each make up for
the errors of those before it (GPTQ, arXiv:2210.17323). With the second moments as L L^T, L lower triangular, the mean
square of D x is |D L|^2, and entry j of D L depends on the errors of columns from j on only: so, from the last column
down, column j is rounded from w_j + (d_{j+1} L_{j+1,j} + d_{j+2} L_{j+2,j} + ...) / L_jj. That needs no inverse
(arXiv:2507.18553 shows that it is the same), and no memory but that of L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from chatglm_ov.calibration.moments import InputMoments
from chatglm_ov.weight_formats import SMALLEST_SCALE

LEVELS = {"int4": 15, "int8": 254}
"""Steps of a range. Those of int8 are codes -127..127, 127 lower than here."""
LARGEST_SCALE = torch.finfo(torch.float16).max
RANGES = {"int4": [1 - 0.04 * i for i in range(11)], "int8": [1 - 0.01 * i for i in range(11)]}
"""Shares of a group's range that are tried."""
CLIP_ELEMENTS = 1 << 18
"""Weights that are clipped at once: what a core's cache holds."""

DAMPING = 0.01
"""Added to the diagonal of the second moments, times its mean."""
LAZY_COLUMNS = 128
"""Columns whose errors reach the columns behind them in one product."""
ROWS = 1024
"""Rows that are rounded at once: with so many columns they stay in a core's cache."""


@dataclass(frozen=True)
class Grid:
    """weight = (code - zero_point) * scale; both float32 [n, G, 1]. Codes and zero points are 0..levels, scales of int4
    float16 values."""

    zero_point: Tensor
    scale: Tensor
    levels: int = LEVELS["int4"]

    def codes(self, groups: Tensor) -> Tensor:
        """The nearest codes of [n, G, columns of a group]."""
        return torch.round(groups / self.scale).add_(self.zero_point).clamp_(0, self.levels)

    def rows(self, rows: slice) -> Grid:
        return replace(self, zero_point=self.zero_point[rows], scale=self.scale[rows])

    def values(self, codes: Tensor) -> Tensor:
        return (codes - self.zero_point) * self.scale

    def rounded(self, groups: Tensor) -> Tensor:
        return self.values(self.codes(groups))

    @classmethod
    def over(cls, groups: Tensor, share: float = 1.0) -> Grid:
        """The grid over a share of each group's range, stretched to hold 0."""
        low = groups.amin(-1, keepdim=True).mul_(share).clamp_(max=0)
        high = groups.amax(-1, keepdim=True).mul_(share).clamp_(min=0)
        levels = LEVELS["int4"]
        scale = ((high - low) / levels).clamp_(max=LARGEST_SCALE).half().float()
        scale[scale == 0] = 1
        return cls(torch.round(-low / scale).clamp_(0, levels), scale)

    @classmethod
    def symmetric(cls, groups: Tensor, share: float = 1.0) -> Grid:
        """The int8 grid over a share of the largest magnitude of each group."""
        middle = LEVELS["int8"] // 2
        scale = groups.abs().amax(-1, keepdim=True) * (share / middle)
        scale[scale < SMALLEST_SCALE] = 1
        return cls(torch.full_like(scale, middle), scale, LEVELS["int8"])

    @classmethod
    def joined(cls, grids: Sequence[Grid]) -> Grid:
        """One grid with the rows of all of these."""
        zero_point, scale = (torch.cat([getattr(grid, part) for grid in grids]) for part in ("zero_point", "scale"))
        return cls(zero_point, scale, grids[0].levels)

    def where(self, chosen: Tensor, other: Grid) -> Grid:
        """This one where chosen [n, G, 1] says so."""
        zero_point = torch.where(chosen, self.zero_point, other.zero_point)
        return Grid(zero_point, torch.where(chosen, self.scale, other.scale), self.levels)


def clipped(weight: Tensor, importance: Tensor, group: int, name: str = "int4") -> Grid:
    """The best grid of each group of weight [n, K], every weight rounded by itself. importance [K]: mean squares of
    the inputs. name: of the format."""
    importance = importance.reshape(-1, group)
    rows = max(1, CLIP_ELEMENTS // weight.shape[1])
    return Grid.joined([_best_grid(grouped(block, group), importance, name) for block in weight.split(rows)])


def grouped(weight: Tensor, group: int) -> Tensor:
    """[n, K] as [n, G, group]."""
    return weight.reshape(len(weight), -1, group)


def _best_grid(groups: Tensor, importance: Tensor, name: str) -> Grid:
    over = Grid.over if name == "int4" else Grid.symmetric
    best, least = over(groups), torch.full((), torch.inf)
    for share in RANGES[name]:
        grid = over(groups, share)
        error = ((grid.rounded(groups) - groups).square_() * importance).sum(-1, keepdim=True)
        best, least = grid.where(error < least, best), torch.minimum(error, least)
    return best


class Compensation:
    """Rounds the rows of one weight; what depends on the inputs only is computed once."""

    def __init__(self, moments: InputMoments):
        self._order = moments.second.diagonal().argsort()
        self._factor = _lower_factor(moments.second, self._order)

    def codes(self, weight: Tensor, grid: Grid, group: int) -> Tensor:
        """Codes uint8 [n, K] of weight [n, K] on a grid that is given."""
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        for start in range(0, len(weight), ROWS):
            rows = slice(start, start + ROWS)
            codes[rows] = self._codes(weight[rows], grid.rows(rows), group)
        return codes

    def _codes(self, weight: Tensor, grid: Grid, group: int) -> Tensor:
        """Everything is transposed here: a column of the weight is a line of memory."""
        of_column = self._order // group
        weight = weight.T[self._order]
        scale, zero_point = (part[..., 0].T[of_column] for part in (grid.scale, grid.zero_point))
        codes, carried = torch.empty_like(weight, dtype=torch.uint8), torch.zeros_like(weight)
        for end in range(len(weight), 0, -LAZY_COLUMNS):
            start = max(0, end - LAZY_COLUMNS)
            factor = self._factor[start:end, start:end].contiguous()
            errors = torch.empty(end - start, weight.shape[1])
            for i in reversed(range(end - start)):
                column = start + i
                wanted = weight[column] + carried[column] / factor[i, i]
                code = wanted.div_(scale[column]).round_().add_(zero_point[column]).clamp_(0, grid.levels)
                codes[column] = code
                errors[i] = weight[column] - code.sub_(zero_point[column]).mul_(scale[column])
                carried[start:column].addr_(factor[i, :i], errors[i])
            carried[:start].addmm_(self._factor[start:end, :start].T, errors)
        stored = torch.empty_like(codes)
        stored[self._order] = codes
        return stored.T


def _lower_factor(second: Tensor, order: Tensor) -> Tensor:
    """Lower triangular L with L L^T = second, reordered and damped until it has such a factor."""
    damping = DAMPING * second.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    failed = torch.empty((), dtype=torch.int32)
    while True:
        # Columns lie one behind the other, as LAPACK has them: the factor takes the place of the matrix.
        factor = second[order[:, None], order].T
        factor.diagonal().add_(damping)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed:
            return factor
        damping *= 10
