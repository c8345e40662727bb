"""Texts that end an answer: `stop_strings`, as a conversation uses them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

from chatglm_ov.chat.base import without_beginning
from chatglm_ov.errors import ChatGLMError

Split = Callable[[str], tuple[str, str]]


class StopStrings:
    """They are no part of the answer, nor is what the token that completes one of them brings behind it. `split`: what
    stands before the answer in an output, and the answer, where alone they are looked for."""

    def __init__(self, texts: str | Sequence[str] | None, split: Split = lambda text: ("", text)):
        self._texts = [texts] if isinstance(texts, str) else list(texts or ())
        if not all(isinstance(text, str) and text for text in self._texts):
            raise ChatGLMError("stop_strings", "value", repr(texts), "a text or a list of texts, none of them empty")
        self._split = split

    def criteria(self, tokenizer: Any, prompt: int) -> list[StoppingCriteria]:
        """What ends `generate()` when one of them is complete behind a prompt of so many tokens. That of transformers
        looks at every token of the vocabulary first, and some releases fail at ids that have none."""
        return [_Completed(self, tokenizer, prompt)] if self._texts else []

    def complete(self, text: str) -> bool:
        """Whether one of them is in the answer."""
        answer = self._split(text)[1]
        return any(stop in answer for stop in self._texts)

    def cut(self, text: str) -> str:
        """What stands before the first of them."""
        if not self.complete(text):
            return text
        before, answer = self._split(text)
        return before + answer[: min(at for at in map(answer.find, self._texts) if at >= 0)]

    def stable_output(self, text: str) -> str:
        """The longest beginning of an unfinished output that no later text can turn into a part of a stop text."""
        if self.complete(text):
            return self.cut(text)
        before, answer = self._split(text)
        sure = without_beginning(answer, self._texts)
        return text if sure == answer else before + sure


class _Completed(StoppingCriteria):
    def __init__(self, stops: StopStrings, tokenizer: Any, prompt: int):
        self._stops, self._tokenizer, self._prompt = stops, tokenizer, prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = map(self._tokenizer.decode, input_ids[:, self._prompt :].tolist())
        return torch.tensor([self._stops.complete(text) for text in texts])
