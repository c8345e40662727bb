"""Chat format of ChatGLM2-6B."""

from __future__ import annotations

from collections.abc import Sequence

from chatglm_ov.chat.base import ChatDefaults, with_date
from chatglm_ov.chat.rounds import Round, RoundsFormat


class ChatGLM2Format(RoundsFormat):
    """Every question is a round, counted from 1, with empty lines between the parts."""

    name = "chatglm2"
    defaults = ChatDefaults(max_length=8192, top_p=0.8, temperature=0.8)

    def prompt(self, query: str, history: Sequence[Round]) -> str:
        rounds = [
            f"[Round {index}]\n\n问：{question}\n\n答：{answer}\n\n"
            for index, (question, answer) in enumerate(history, 1)
        ]
        return "".join(rounds) + f"[Round {len(history) + 1}]\n\n问：{query}\n\n答："

    def clean(self, output: str) -> str:
        return with_date(output.strip())
