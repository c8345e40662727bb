"""What is known of the input x of a linear layer over a text. Letters: T tokens, K features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

STRIPE = 1024
"""Rows of the second moments that are computed at once, from the diagonal on: the other half is their mirror image."""


@dataclass(frozen=True)
class InputMoments:
    """second: mean of x x^T, float32 [K, K]. magnitude: mean of |x|, float32 [K]."""

    second: Tensor
    magnitude: Tensor

    @classmethod
    def of(cls, x: np.ndarray) -> InputMoments:
        """The moments of `x`, float32 [T, K]."""
        values = torch.from_numpy(x)
        second = torch.empty(x.shape[1], x.shape[1])
        for start in range(0, len(second), STRIPE):
            end = start + STRIPE
            torch.mm(values[:, start:end].T, values[:, start:], out=second[start:end, start:])
            second[end:, start:end] = second[start:end, end:].T
        return cls(second.div_(len(values)), values.abs().mean(0))

    def divide_(self, scale: Tensor) -> None:
        """Become those of x / scale, scale [K]."""
        self.second.div_(scale).div_(scale[:, None])
        self.magnitude.div_(scale)

    def error(self, difference: Tensor) -> Tensor:
        """Mean of |D x|^2 over the text for the error D [n, K] of a weight, summed over its rows."""
        return ((difference @ self.second) * difference).sum()
