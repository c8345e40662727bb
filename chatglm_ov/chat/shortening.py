"""Conversations that have become too long for the model."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from chatglm_ov.chat.base import ChatFormat


def shortened(
    chat_format: ChatFormat, tokenizer: Any, query: str, history: Sequence, room: int, limit: int
) -> tuple[list, int]:
    """The history with which `query` is to be asked, and how many of the oldest rounds are left out of it.

    None are while the prompt leaves `room` of `limit` tokens. Then as many as bring it down to half of the limit: what
    is in the cache is of no use after that, which should be rare. None either where even the question is too long.
    """

    def without(rounds: int) -> list:
        return [*history[: starts[0]], *history[starts[rounds] :]]

    def tokens(rounds: int) -> int:
        return len(chat_format.build_inputs(tokenizer, query, without(rounds)))

    starts = [*chat_format.round_starts(history), len(history)]
    last = len(starts) - 1
    if tokens(0) <= limit - room or tokens(last) >= limit:
        return list(history), 0
    fewest = bisect_left(range(last), True, key=lambda rounds: tokens(rounds) <= limit // 2)
    return without(fewest), fewest
