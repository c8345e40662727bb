"""Conversations of messages with roles: what ChatGLM3 and GLM-4 share."""

from __future__ import annotations

import copy
import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from chatglm_ov.chat.base import (
    ChatFormat,
    Message,
    Response,
    checked_messages,
    checked_role,
    checked_text,
    with_date,
)
from chatglm_ov.errors import ChatGLMError

ASSISTANT = "<|assistant|>"
ROLE_STOPS = ("<|user|>", "<|observation|>")


class RolesFormat(ChatFormat):
    """History: a list of messages. A system message at the beginning may carry `tools`, a list of JSON objects.

    The first line of an answer is its metadata: empty for text, the tool's name for a tool call.
    """

    # The system message that a list of tools gets when the conversation has none.
    tools_system_text: str

    @abstractmethod
    def parse_arguments(self, content: str) -> Any:
        """The arguments in the text of a tool call. ValueError where there are none to be read."""

    def build_inputs(
        self, tokenizer: Any, query: str, history: Sequence | None = None, role: str = "user"
    ) -> list[int]:
        return self.conversation_ids(tokenizer, _with_question(history, query, role))

    def process_response(
        self, output: str, query: str, history: Sequence | None = None, role: str = "user"
    ) -> tuple[Response, list[Message]]:
        """The response is text; for a tool call it is {"name", "parameters"} when the history offers tools and the
        arguments can be read, {"name", "content"} otherwise. Arguments are parsed as literals, never evaluated."""
        messages = _with_question(history, query, role)
        has_tools = messages[0]["role"] == "system" and bool(messages[0].get("tools"))
        names = tool_names(messages[0]["tools"]) if has_tools else set()
        response: Response = ""
        for part in checked_text(output, "chat", "output").split(ASSISTANT):
            metadata, content = self.metadata_and_content(part, names)
            if not metadata.strip():
                content = content.strip()
                response = with_date(content)
            else:
                response = self._tool_response(metadata.strip(), content, has_tools)
            messages.append({"role": "assistant", "metadata": metadata, "content": content})
        return response, messages

    def round_starts(self, history: Sequence) -> list[int]:
        return [index for index, message in enumerate(checked_messages(history)) if message["role"] == "user"]

    def metadata_and_content(self, part: str, names: set[str]) -> tuple[str, str]:
        """The first line of one message of an answer, and the rest of it. `names`: the tools that are offered."""
        metadata, newline, content = part.partition("\n")
        return (metadata, content) if newline else ("", part)

    def _tool_response(self, name: str, content: str, has_tools: bool) -> Response:
        if has_tools:
            try:
                return {"name": name, "parameters": self.parse_arguments(content)}
            except ValueError:
                pass
        return {"name": name, "content": content}

    def with_tools(self, messages: Sequence[Message], tools: Any) -> list[Message]:
        """A checked copy of `messages`; `tools`, as `as_objects` makes them, are put into its system message, which is
        made if there is none."""
        checked = checked_messages(messages, "messages")
        if tools:
            if not checked or checked[0]["role"] != "system":
                checked.insert(0, {"role": "system", "content": self.tools_system_text})
            checked[0]["tools"] = copy.deepcopy(tools)
        for index, message in enumerate(checked):
            if message.get("tools") is None:
                message.pop("tools", None)
            else:
                check_tools(message["tools"], f"messages[{index}]")
        return checked


def _with_question(history: Any, query: Any, role: Any) -> list[Message]:
    question = {"role": checked_role(role), "content": checked_text(query, "chat", "query")}
    return [*checked_messages([] if history is None else history), question]


def as_objects(tools: Any) -> Any:
    """The `tools` of a template as a list of JSON objects. A Python function becomes its name, the types of its
    arguments and what its docstring says, as transformers reads them. Raises ChatGLMError where that cannot be."""
    if isinstance(tools, (list, tuple)):
        tools = [_as_object(tool) if callable(tool) else tool for tool in tools]
    if tools:
        check_tools(tools, "chat")
    return tools


def _as_object(function: Callable[..., Any]) -> dict[str, Any]:
    from transformers.utils import chat_template_utils as of_templates

    try:
        return of_templates.get_json_schema(function)["function"]
    except (of_templates.TypeHintParsingException, of_templates.DocstringParsingException) as error:
        name = getattr(function, "__name__", type(function).__name__)
        wanted = "a function with type hints, and a docstring that describes each argument"
        raise ChatGLMError("chat", "tools", f"{name} ({error})", wanted) from None


def check_tools(tools: Any, where: str) -> None:
    """Raises ChatGLMError unless `tools` is a list of JSON objects."""
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, dict) for tool in tools):
        raise ChatGLMError(where, "tools", f"of type {type(tools).__name__}", "a list of JSON objects (dict)")
    try:
        json.dumps(tools, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatGLMError(where, "tools", f"not JSON ({error})", "a list of JSON objects (dict)") from None


def tool_names(tools: Any) -> set[str]:
    """Names of the tools in a list: of functions as OpenAI writes them, of plain ones, else their type."""
    names = set()
    for tool in tools if isinstance(tools, (list, tuple)) else ():
        tool = tool if isinstance(tool, dict) else {}
        function = tool.get("function")
        name = (function if isinstance(function, dict) else tool).get("name", tool.get("type"))
        names |= {name} if isinstance(name, str) else set()
    return names
