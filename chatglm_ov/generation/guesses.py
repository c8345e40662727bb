"""What the next tokens may be, told by something that is quicker than the model.

A guess costs little, and what is wrong is thrown away by the model's own check (`chatglm_ov.generation.speculative`).
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from chatglm_ov.generation.cache import CACHE_NAME

LONGEST_NGRAM = 3
"""Tokens at the end of a text that are looked for in it: rarely are more needed to tell a place."""

CHECK_COST, FREE_CHECKS, BUSY_COST = 0.02, 4, 0.15
"""What checking one more token costs, in single steps, and what it costs on top from the fifth one on: decoding waits
for the weights, read once for all tokens of a call, until there is more to compute than that (measured at 50 and
70 GB/s: 1.05 and 1.20 steps for 6 tokens, 1.15 and 1.53 for 11 with int8; 1.35 and 2.02, 2.03 and 2.96 with int4)."""


class Guesses(Protocol):
    """A source of guesses for one sequence."""

    def guess(self, ids: np.ndarray, room: int) -> np.ndarray:
        """Up to `room` ids that may follow `ids` int64 [N]; none is an answer too."""

    def learn(self, right: int) -> None:
        """How many of the last guess, from its beginning, were right."""


class PromptLookup:
    """What followed the last few tokens where the text had them before (prompt lookup decoding).

    A match of more tokens is a better one. Of each length it is learnt how often a guessed token is right, and only so
    many are guessed as can be expected to be worth their check: where a text copies nothing, soon nothing is guessed.
    """

    def __init__(self, num_tokens: int, ngram: int = LONGEST_NGRAM):
        self._num_tokens = num_tokens
        # At first a single token, which may be a comma, tells little, and three tell much.
        self._acceptance = {n: min(0.8, 0.3 * n - 0.1) for n in range(1, ngram + 1)}
        self._priors = dict(self._acceptance)
        self._last: tuple[int, int] = (0, 0)

    def guess(self, ids: np.ndarray, room: int) -> np.ndarray:
        self._last = (0, 0)
        for n, rate in self._acceptance.items():
            # What was given up is tried again after some hundred tokens.
            self._acceptance[n] = rate + 0.0005 * (self._priors[n] - rate)
        for n in sorted(self._acceptance, reverse=True):
            places = _places_behind(ids, n)
            if not places.size:
                continue
            count = _worth_guessing(self._acceptance[n], min(self._num_tokens, room))
            # The latest place with enough behind it, else the one with the most.
            far_enough = places[places + count <= len(ids)]
            start = far_enough[-1] if far_enough.size else places[0]
            guessed = ids[start : start + count]
            self._last = (n, len(guessed))
            return guessed
        return ids[:0]

    def learn(self, right: int) -> None:
        n, guessed = self._last
        for at in range(min(right + 1, guessed)):
            self._acceptance[n] += 0.15 * (float(at < right) - self._acceptance[n])


def _places_behind(ids: np.ndarray, n: int) -> np.ndarray:
    """Where, before its end, the text goes on behind the n tokens that it ends with."""
    if len(ids) <= n:
        return ids[:0]
    same = np.ones(len(ids) - n, bool)
    for i in range(n):
        same &= ids[i : len(ids) - n + i] == ids[len(ids) - n + i]
    return np.flatnonzero(same) + n


def _worth_guessing(chance: float, most: int) -> int:
    """The number of tokens k, each right with this chance if those before it are, with the most tokens for the time: a
    call with k guesses gives 1 + chance + .. + chance^k tokens."""
    best, rate, tokens = 0, 1.0, 1.0
    for k in range(1, most + 1):
        tokens += chance**k
        steps = 1 + k * CHECK_COST + max(0, k - FREE_CHECKS) * BUSY_COST
        # The tokens grow ever more slowly and the steps do not: from the best number on the rate only falls.
        if tokens / steps <= rate:
            break
        best, rate = k, tokens / steps
    return best


class Assistant:
    """What a smaller model of the same vocabulary says, as long as it is sure enough."""

    def __init__(self, model: Any, num_tokens: int, confidence: float):
        self._model, self._num_tokens, self._confidence = model, num_tokens, confidence

    def guess(self, ids: np.ndarray, room: int) -> np.ndarray:
        limit = self._model.compiled.config.position_limit
        room = room if limit is None else min(room, limit - len(ids))
        if room < 1:
            return ids[:0]
        cache = self._model.resume(ids)
        fed = torch.from_numpy(ids[None, 0 if cache is None else cache.get_seq_length() :])
        guessed: list[int] = []
        while len(guessed) < min(self._num_tokens, room):
            output = self._model(fed, past_key_values=cache, logits_to_keep=1)
            cache, probabilities = output[CACHE_NAME], output.logits[0, -1].softmax(-1)
            likeliest = int(probabilities.argmax())
            if probabilities[likeliest] < self._confidence:
                break
            guessed.append(likeliest)
            fed = torch.tensor([[likeliest]])
        return np.array(guessed, np.int64)

    def learn(self, right: int) -> None:
        """Its own confidence says when to stop."""
