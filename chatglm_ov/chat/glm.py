"""Chat format of the models of transformers' own classes: GLM-4-hf, GLM-Edge, GLM-4-0414, GLM-Z1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chatglm_ov.chat.base import ChatDefaults, Message, Response, without_beginning
from chatglm_ov.chat.glm4 import GLM4Format, named_call
from chatglm_ov.chat.roles import ROLE_STOPS
from chatglm_ov.chat.templates import token_id

THINK, END_THINK = "<think>", "</think>"


class GLMFormat(GLM4Format):
    """A tokenizer.json and the template that comes with it.

    An answer may begin with thinking: after `<think>`, which the prompt or the answer writes, up to `</think>`. It is
    told apart as `thinking` of the answer's last message, and no later prompt has it. While it lasts, the response
    is "". A first line is a tool's name where such a tool is offered, text otherwise.
    """

    name = "glm"

    def __init__(self, opening: str = ""):
        super().__init__(escaped_json=False, opening=opening)
        self._prompt_thinks = opening.strip().endswith(THINK)
        if self._prompt_thinks:
            self.defaults = ChatDefaults(max_length=32768, top_p=0.95, temperature=0.6)

    def stop_token_ids(self, tokenizer: Any) -> list[int]:
        """Ids of the end tokens that the vocabulary has: they differ from model to model."""
        found = [token_id(tokenizer, name) for name in ("<|endoftext|>", *ROLE_STOPS)]
        return list(dict.fromkeys(i for i in (*found, tokenizer.eos_token_id) if i is not None))

    def process_response(
        self, output: str, query: str, history: Sequence | None = None, role: str = "user"
    ) -> tuple[Response, list[Message]]:
        thinking, answer = self._split_thinking(output)
        response, messages = super().process_response(answer, query, history, role)
        if thinking is not None:
            messages[-1]["thinking"] = thinking
        return response, messages

    def _split_thinking(self, output: Any) -> tuple[str | None, Any]:
        """(thinking, answer); thinking None where the answer began without any."""
        if not isinstance(output, str):
            return None, output
        text = output.lstrip()
        if text.startswith(THINK):
            text = text[len(THINK) :]
        elif not self._prompt_thinks:
            return None, output
        thinking, _, answer = text.partition(END_THINK)
        return thinking.strip(), answer

    def split_answer(self, text: str) -> tuple[str, str]:
        """Thinking is no part of the answer, which may be still to come."""
        thinking, answer = self._split_thinking(text)
        if thinking is None:
            return super().split_answer(text)
        before = text[: len(text) - len(answer)]
        space, answer = super().split_answer(answer)
        return before + space, answer

    def metadata_and_content(self, part: str, names: set[str]) -> tuple[str, str]:
        return named_call(part, names)

    def stable_output(self, text: str) -> str:
        return without_beginning(text, (THINK, END_THINK))
