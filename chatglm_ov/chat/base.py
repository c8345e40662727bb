"""The interface of a chat format, and what several formats share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from chatglm_ov.errors import ChatGLMError

Message = dict[str, Any]
Response = str | dict[str, Any]

ROLES = ("system", "user", "assistant", "observation")

PLACEHOLDER, DATE = "[[训练时间]]", "2023年"
"""What the models write for the date of their training, and what the originals show in its place."""


@dataclass(frozen=True)
class ChatDefaults:
    """Arguments of generate() that the original chat() uses unless told otherwise. max_length counts the prompt too."""

    max_length: int
    top_p: float
    temperature: float
    do_sample: bool = True
    num_beams: int = 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class ChatFormat(ABC):
    """How one generation writes a conversation as ids, and reads the answer.

    A history is what the original chat() takes and returns: a list of (query, answer) pairs for v1 and ChatGLM2, a list
    of messages `{"role", "content"[, "metadata"][, "tools"][, "thinking"]}` for ChatGLM3, GLM-4 and all later ones. No
    method changes its arguments.
    """

    name: str
    defaults: ChatDefaults

    @abstractmethod
    def stop_token_ids(self, tokenizer: Any) -> list[int]:
        """Ids that end an answer."""

    @abstractmethod
    def conversation_text(
        self, tokenizer: Any, messages: Sequence[Message], tools: Any = None, add_generation_prompt: bool = True
    ) -> str:
        """The prompt as text, special tokens written out."""

    @abstractmethod
    def conversation_ids(
        self, tokenizer: Any, messages: Sequence[Message], tools: Any = None, add_generation_prompt: bool = True
    ) -> list[int]:
        """The prompt as ids, with all special tokens that the model wants around it."""

    @abstractmethod
    def continued_text(self, tokenizer: Any, messages: Sequence[Message], tools: Any = None) -> str:
        """The conversation as text up to the end of its last message, which what follows goes on with. ChatGLMError
        where the format cannot write that."""

    @abstractmethod
    def continued_ids(self, tokenizer: Any, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """The conversation as ids up to the end of its last message, see `continued_text`."""

    @abstractmethod
    def build_inputs(
        self, tokenizer: Any, query: str, history: Sequence | None = None, role: str = "user"
    ) -> list[int]:
        """Ids of the prompt that asks `query` after `history`."""

    @abstractmethod
    def process_response(
        self, output: str, query: str, history: Sequence | None = None, role: str = "user"
    ) -> tuple[Response, list]:
        """The answer that is told to the caller, and the history with this round in it.

        `output` is the decoded answer without its stop token; it may be an unfinished one of a stream.
        """

    @abstractmethod
    def round_starts(self, history: Sequence) -> list[int]:
        """Where in the history its rounds begin: a question and what came of it. A system message stands before."""

    def split_answer(self, text: str) -> tuple[str, str]:
        """(what stands before the answer, the answer with its own characters) of an output, finished or not. Texts that
        end an answer are looked for in the second."""
        answer = text.lstrip()
        return text[: len(text) - len(answer)], answer

    def stable_output(self, text: str) -> str:
        """The part of an unfinished output that what follows cannot make into something else."""
        return text

    def stable_response(self, response: str) -> str:
        """The part of a response to an unfinished output that later ones begin with. The originals' streams tell all of
        it, and take some back."""
        return without_beginning(response, (PLACEHOLDER,))

    def without_stop_token(self, tokenizer: Any, ids: Sequence[int], stops: Sequence[int] | None = None) -> list[int]:
        """`ids` less a stop token at the end (one of `stops`; None: those of the format). The originals drop the last
        id whatever it is, which loses text when an answer ends for its length."""
        stops = self.stop_token_ids(tokenizer) if stops is None else stops
        return list(ids[:-1]) if len(ids) and ids[-1] in stops else list(ids)

    def answer(
        self,
        tokenizer: Any,
        ids: Sequence[int],
        query: str,
        history: Sequence | None = None,
        role: str = "user",
        stops: Sequence[int] | None = None,
        cut: Callable[[str], str] = str,
    ) -> tuple[Response, list]:
        """Like `process_response`, from the generated ids, which end with one of `stops` or for their number; of their
        text `cut` gives what belongs to the answer."""
        text = tokenizer.decode(self.without_stop_token(tokenizer, ids, stops))
        return self.process_response(cut(text), query, history, role)


def with_date(text: str) -> str:
    """`text` with a date instead of each placeholder for one."""
    return text.replace(PLACEHOLDER, DATE)


def without_beginning(text: str, wholes: Sequence[str]) -> str:
    """`text` without the longest end of it that may still become one of `wholes`."""
    lengths = [n for whole in wholes for n in range(1, len(whole)) if text.endswith(whole[:n])]
    return text[: len(text) - max(lengths, default=0)]


def checked_text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise ChatGLMError(where, field, f"of type {type(value).__name__}", "text")
    return value


def checked_messages(messages: Any, where: str = "history") -> list[Message]:
    """A deep copy of a list of messages, each with a known role and text as content."""
    if not isinstance(messages, (list, tuple)):
        raise ChatGLMError(where, "value", f"of type {type(messages).__name__}", "a list of messages (dict)")
    for index, message in enumerate(messages):
        place = f"{where}[{index}]"
        if not isinstance(message, dict):
            raise ChatGLMError(place, "message", f"of type {type(message).__name__}", "a dict with role and content")
        if message.get("role") not in ROLES:
            raise ChatGLMError(place, "role", repr(message.get("role")), ", ".join(ROLES[:-1]) + " or " + ROLES[-1])
        checked_text(message.get("content"), place, "content")
        if message.get("image") is not None:
            raise ChatGLMError(place, "image", "given", "none: images are not supported")
        for field in ("metadata", "thinking"):
            if message.get(field) is not None:
                checked_text(message[field], place, field)
    try:
        return copy.deepcopy(list(messages))
    except RecursionError:
        raise ChatGLMError(where, "value", "nested too deeply", "a list of messages (dict)") from None


def checked_role(role: Any, allowed: Sequence[str] = ROLES) -> str:
    if role not in allowed:
        raise ChatGLMError("chat", "role", repr(role), " or ".join(allowed))
    return role
