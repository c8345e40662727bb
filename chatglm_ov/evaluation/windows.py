"""Sliding windows over a document: every token of it is predicted once, from as much before it as fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from chatglm_ov.documents import Document
from chatglm_ov.errors import ChatGLMError


@dataclass(frozen=True)
class Window:
    """ids int64 [N]; the last `scored` of them are predicted, each from all that are before it in the window."""

    ids: np.ndarray
    scored: int


def windows(document: Document, length: int, stride: int) -> Iterator[Window]:
    """Windows of at most `length` ids, each with what is given in front. The first predicts all of its tokens, each
    other one the next `stride`. Raises ChatGLMError as `check_room` does."""
    check_room(document, length, stride)
    room = length - len(document.given)
    ids, done = np.array(document.ids, np.int64), 0
    while done < len(ids):
        end = min(len(ids), done + (stride if done else room))
        body = ids[max(0, end - room) : end]
        yield Window(np.concatenate([np.array(document.given, np.int64), body]), end - done)
        done = end


def check_room(document: Document, length: int, stride: int) -> None:
    """Raises ChatGLMError where what is given leaves no room for a stride and a token."""
    if length - len(document.given) <= stride:
        wanted = f"more than {len(document.given) + stride}: the tokens before the text, and a stride of {stride}"
        raise ChatGLMError("eval", "window", length, wanted)


def scored_tokens(documents: list[Document]) -> int:
    return sum(len(document.ids) for document in documents)
