"""Chat format of ChatGLM-6B (v1)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from chatglm_ov.chat.base import ChatDefaults, Message, with_date
from chatglm_ov.chat.rounds import Round, RoundsFormat, begun_answer
from chatglm_ov.errors import ChatGLMError

# The tokenizer folds full-width punctuation to ASCII; beside a Chinese character it is widened again.
_WIDE = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
_CHINESE = "[\u4e00-\u9fff]"
_MAY_BE_WIDENED = re.compile(f"(?<!{_CHINESE})[{''.join(_WIDE)}]\\Z")


class ChatGLMFormat(RoundsFormat):
    """A first question is the bare text; later ones follow `[Round i]` lines, counted from 0, of all rounds before."""

    name = "chatglm"
    defaults = ChatDefaults(max_length=2048, top_p=0.7, temperature=0.95)

    def prompt(self, query: str, history: Sequence[Round]) -> str:
        if not history:
            return query
        rounds = [
            f"[Round {index}]\n问：{question}\n答：{answer}\n" for index, (question, answer) in enumerate(history)
        ]
        return "".join(rounds) + f"[Round {len(history)}]\n问：{query}\n答："

    def continued_text(self, tokenizer: Any, messages: Sequence[Message], tools: Any = None) -> str:
        wanted = "tokenize=True: the answer stands behind [gMASK] <sop>, which cannot be written as text"
        raise ChatGLMError(f"chat format {self.name}", "continue_final_message", "given for text", wanted)

    def continued_ids(self, tokenizer: Any, messages: Sequence[Message], tools: Any = None) -> list[int]:
        asked, answer = begun_answer(messages)
        return self.conversation_ids(tokenizer, asked, tools) + tokenizer.encode_ordinary(answer)

    def split_answer(self, text: str) -> tuple[str, str]:
        return "", self.clean(text)

    def stable_response(self, response: str) -> str:
        """Without punctuation at the end that a Chinese character behind it would widen."""
        stable = super().stable_response(response)
        return _MAY_BE_WIDENED.sub("", stable) if stable == response else stable

    def clean(self, output: str) -> str:
        response = with_date(output.strip())
        for narrow, wide in _WIDE.items():
            response = re.sub(f"({_CHINESE}){re.escape(narrow)}", rf"\1{wide}", response)
            response = re.sub(f"{re.escape(narrow)}({_CHINESE})", rf"{wide}\1", response)
        return response
