"""What is known of the input x of a linear layer over a text. Letters: T tokens, K features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class InputMoments:
    """second: mean of x x^T, float32 [K, K]. magnitude: mean of |x|, float32 [K]."""

    second: Tensor
    magnitude: Tensor

    @classmethod
    def of(cls, x: np.ndarray) -> InputMoments:
        """Of float32 [T, K]."""
        values = torch.from_numpy(x)
        return cls(values.T @ values / len(values), values.abs().mean(0))

    def scaled(self, scale: Tensor) -> InputMoments:
        """Of x / scale, scale [K]."""
        return InputMoments(self.second / scale / scale[:, None], self.magnitude / scale)

    def error(self, difference: Tensor) -> Tensor:
        """Mean of |D x|^2 over the text for the error D [n, K] of a weight, summed over its rows."""
        return ((difference @ self.second) * difference).sum()
