"""Conversations of numbered rounds, question and answer: what v1 and ChatGLM2 share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from chatglm_ov.chat.base import ChatFormat, Message, checked_messages, checked_role, checked_text
from chatglm_ov.errors import ChatGLMError

Round = tuple[str, str]


class RoundsFormat(ChatFormat):
    """History: a list of (query, answer) pairs. There are no roles besides user and assistant."""

    @abstractmethod
    def prompt(self, query: str, history: Sequence[Round]) -> str:
        """The text that asks `query` after `history`, without special tokens."""

    @abstractmethod
    def clean(self, output: str) -> str:
        """The answer as it is shown."""

    def stop_token_ids(self, tokenizer: Any) -> list[int]:
        return [tokenizer.eos_token_id]

    def build_inputs(
        self, tokenizer: Any, query: str, history: Sequence | None = None, role: str = "user"
    ) -> list[int]:
        checked_role(role, ("user",))
        return list(tokenizer.encode(self.prompt(checked_text(query, "chat", "query"), checked_rounds(history))))

    def process_response(
        self, output: str, query: str, history: Sequence | None = None, role: str = "user"
    ) -> tuple[str, list[Round]]:
        checked_role(role, ("user",))
        response = self.clean(checked_text(output, "chat", "output"))
        return response, [*checked_rounds(history), (checked_text(query, "chat", "query"), response)]

    def round_starts(self, history: Sequence) -> list[int]:
        return list(range(len(checked_rounds(history))))

    def conversation_text(
        self, tokenizer: Any, messages: Sequence[Message], tools: Any = None, add_generation_prompt: bool = True
    ) -> str:
        """The start of an answer belongs to the text of a question, so `add_generation_prompt` changes nothing."""
        if tools:
            raise ChatGLMError(
                f"chat format {self.name}", "tools", "given", "none: the model was trained without tools"
            )
        *history, last = rounds_of_messages(messages)
        return self.prompt(last[0], history)

    def conversation_ids(
        self, tokenizer: Any, messages: Sequence[Message], tools: Any = None, add_generation_prompt: bool = True
    ) -> list[int]:
        return list(tokenizer.encode(self.conversation_text(tokenizer, messages, tools, add_generation_prompt)))

    def continued_text(self, tokenizer: Any, messages: Sequence[Message], tools: Any = None) -> str:
        asked, answer = begun_answer(messages)
        return self.conversation_text(tokenizer, asked, tools) + answer

    def continued_ids(self, tokenizer: Any, messages: Sequence[Message], tools: Any = None) -> list[int]:
        return list(tokenizer.encode(self.continued_text(tokenizer, messages, tools)))


def begun_answer(messages: Any) -> tuple[list[Message], str]:
    """The messages before the last one, which is an answer, and its text."""
    *asked, last = checked_messages(messages, "messages") or [{"role": None}]
    if last["role"] != "assistant":
        raise ChatGLMError(f"messages[{len(asked)}]", "role", repr(last["role"]), "'assistant', to go on with")
    return asked, last["content"]


def checked_rounds(history: Any) -> list[Round]:
    """The history as a new list of (query, answer) tuples; None is an empty one."""
    rounds = [] if history is None else history
    if not isinstance(rounds, (list, tuple)):
        raise ChatGLMError("history", "value", f"of type {type(history).__name__}", "a list of (query, answer) pairs")
    for index, pair in enumerate(rounds):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ChatGLMError(
                f"history[{index}]", "round", f"of type {type(pair).__name__}", "(query, answer), two texts"
            )
    return [(pair[0], pair[1]) for pair in rounds]


def rounds_of_messages(messages: Any) -> list[Round]:
    """(query, answer) pairs of messages that alternate between user and assistant; the last answer is ""."""
    checked = checked_messages(messages, "messages")
    for index, message in enumerate(checked):
        wanted = "assistant" if index % 2 else "user"
        if message["role"] != wanted:
            raise ChatGLMError(f"messages[{index}]", "role", repr(message["role"]), repr(wanted))
    if len(checked) % 2 == 0:
        raise ChatGLMError("messages", "number", len(checked), "an odd one, ending with the user's question")
    texts = [message["content"] for message in checked] + [""]
    return list(zip(texts[::2], texts[1::2], strict=True))
