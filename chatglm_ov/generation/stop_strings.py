"""Texts that end an answer: `stop_strings`, as a conversation uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

from chatglm_ov.errors import ChatGLMError


class StopStrings:
    """They are no part of the answer, nor is what the token that completes one of them brings behind it."""

    def __init__(self, texts: str | Sequence[str] | None):
        self._texts = [texts] if isinstance(texts, str) else list(texts or ())
        if not all(isinstance(text, str) and text for text in self._texts):
            raise ChatGLMError("stop_strings", "value", repr(texts), "a text or a list of texts, none of them empty")

    def criteria(self, tokenizer: Any, prompt: int) -> list[StoppingCriteria]:
        """What ends `generate()` when one of them is complete behind a prompt of so many tokens. That of transformers
        looks at every token of the vocabulary first, and some releases fail at ids that have none."""
        return [_Completed(self, tokenizer, prompt, max(map(_bytes, self._texts)))] if self._texts else []

    def cut(self, text: str) -> str:
        """What stands before the first of them."""
        found = [at for at in map(text.find, self._texts) if at >= 0]
        return text[: min(found)] if found else text

    def certain(self, text: str) -> str:
        """What of an unfinished answer is before the first of them whatever follows: without a beginning at its end."""
        cut = self.cut(text)
        if cut != text:
            return cut
        begun = (n for stop in self._texts for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(begun, default=0)]


def _bytes(text: str) -> int:
    return len(text.encode())


class _Completed(StoppingCriteria):
    """Looks at the last tokens of each row, of which most are more than a byte."""

    def __init__(self, stops: StopStrings, tokenizer: Any, prompt: int, nbytes: int):
        self._stops, self._tokenizer, self._prompt, self._tokens = stops, tokenizer, prompt, nbytes + 8

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        ends = input_ids[:, max(self._prompt, input_ids.shape[1] - self._tokens) :].tolist()
        texts = [self._tokenizer.decode(end) for end in ends]
        return torch.tensor([self._stops.cut(text) != text for text in texts])
