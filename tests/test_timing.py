"""The times of an answer's tokens."""

from __future__ import annotations

import time

import pytest
import torch

from chatglm_ov.generation.timing import Stopwatch, Timing


def test_figures_of_an_answer() -> None:
    timing = Timing(tokens=5, first=0.5, rest=0.2)
    assert timing.following == pytest.approx(0.05)
    assert timing.tokens_per_second == pytest.approx(20)
    assert str(timing) == "5 tokens, first token 500.0 ms, next tokens 50.0 ms each, 20.0 tokens/s"


def test_an_answer_of_one_token_has_no_next_ones() -> None:
    timing = Timing(tokens=1, first=0.25, rest=0.0)
    assert timing.following is None
    assert str(timing) == "1 token, first token 250.0 ms, 4.0 tokens/s"


def test_stopwatch_takes_the_time_of_each_token_and_stops_none() -> None:
    watch = Stopwatch()
    assert watch.timing is None
    ids = torch.zeros(3, 2, dtype=torch.long)
    for pause in (0.05, 0.01, 0.01):
        time.sleep(pause)
        assert watch(ids, None).tolist() == [False] * 3
    assert watch.timing.tokens == 3
    assert watch.timing.first >= 0.05
    assert watch.timing.rest >= 0.02
