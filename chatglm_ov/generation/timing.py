"""How long the tokens of an answer took."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from transformers import StoppingCriteria


@dataclass(frozen=True)
class Timing:
    """How long one answer took. tokens: generated ones, the end token included. Times in seconds."""

    tokens: int
    first: float
    """From the call to the first token: the prompt."""
    rest: float
    """From the first token to the last one."""

    @property
    def following(self) -> float | None:
        """Mean time of a token after the first; None if there is only one."""
        return self.rest / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def tokens_per_second(self) -> float:
        """Speed of the tokens after the first, so that the prompt does not count; of the first if it is alone."""
        return 1 / (self.following or self.first)

    def __str__(self) -> str:
        following = "" if self.following is None else f", next tokens {1000 * self.following:.1f} ms each"
        noun = "tokens" if self.tokens > 1 else "token"
        return (
            f"{self.tokens} {noun}, first token {1000 * self.first:.1f} ms{following}, "
            f"{self.tokens_per_second:.1f} tokens/s"
        )


class Stopwatch(StoppingCriteria):
    """Takes the time of every token of one call of `generate()`: an item of its `stopping_criteria`, which are asked
    after each token in every mode, beams included. It never stops anything."""

    def __init__(self) -> None:
        self._start = perf_counter()
        self._times: list[float] = []
        self.length, self.last_id = 0, -1
        """Tokens of the first row so far, the prompt's included, and the id of the last one."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._times.append(perf_counter())
        self.length, self.last_id = input_ids.shape[1], int(input_ids[0, -1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    @property
    def timing(self) -> Timing | None:
        """None before the first token."""
        if not self._times:
            return None
        return Timing(len(self._times), self._times[0] - self._start, self._times[-1] - self._times[0])
