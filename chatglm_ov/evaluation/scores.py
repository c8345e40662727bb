"""From logits to figures. Letters: N positions, V rows of the LM head. All sums are float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Scores:
    """Sums over the tokens so far. nll: -ln of the probability of the right token; right: tokens that were the first
    choice. agreed: tokens whose first choice is the reference's; divergence: sum of KL(reference || model), in nats."""

    tokens: int = 0
    nll: float = 0.0
    right: int = 0
    agreed: int = 0
    divergence: float = 0.0

    def add(self, logits: np.ndarray, targets: np.ndarray, reference: np.ndarray | None = None) -> None:
        """logits, reference [N, V]; targets int [N], the ids that came. reference: log-probabilities."""
        own = log_probabilities(logits)
        choice, rows = own.argmax(axis=1), np.arange(len(targets))
        self.tokens += len(targets)
        self.nll -= float(own[rows, targets].sum())
        self.right += int(np.count_nonzero(choice == targets))
        if reference is not None:
            self.agreed += int(np.count_nonzero(choice == reference.argmax(axis=1)))
            self.divergence += float(divergence(reference, own).sum())

    @property
    def perplexity(self) -> float:
        """Infinite where it is more than a float64 holds."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.nll / self.tokens))


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """ln softmax over the last axis, float64; NaN where logits are not finite."""
    shifted = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        shifted -= shifted.max(axis=-1, keepdims=True)
        shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference || other) [N] of log-probabilities [N, V], in nats."""
    return (np.exp(reference) * (reference - other)).sum(axis=-1)
