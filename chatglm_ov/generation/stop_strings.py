"""Texts that end an answer: `stop_strings` of `generate()`, as a conversation uses them."""

from __future__ import annotations

from collections.abc import Sequence

from chatglm_ov.errors import ChatGLMError


class StopStrings:
    """`generate()` ends with the token that completes one of them; they are no part of the answer, nor is what that
    token brings behind them."""

    def __init__(self, texts: str | Sequence[str] | None):
        self._texts = [texts] if isinstance(texts, str) else list(texts or ())
        if not all(isinstance(text, str) and text for text in self._texts):
            raise ChatGLMError("stop_strings", "value", repr(texts), "a text or a list of texts, none of them empty")

    def __bool__(self) -> bool:
        return bool(self._texts)

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
