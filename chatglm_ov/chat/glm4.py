"""Chat format of GLM-4 in its original layout, and of codegeex4."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from chatglm_ov.chat.base import ChatDefaults, Message
from chatglm_ov.chat.roles import ROLE_STOPS, RolesFormat, as_objects
from chatglm_ov.chat.templates import GLM4_TEMPLATE, render, template_of
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.unicode import whole_characters

_TOOLS_OF_A_MESSAGE = re.compile(r"""\[\s*["']tools["']\s*\]|\.\s*tools\b|\bget\(\s*["']tools["']""")


class GLM4Format(RolesFormat):
    """The tokenizer's own chat template, rendered in Jinja's sandbox, then encoded. Special tokens that somebody typed
    count as such, as in the original.

    `escaped_json` is how a template writes tools: True gives what the published code gives with the transformers of its
    time (up to 4.43: sorted keys, `\\uXXXX` for what is not ASCII), False what later transformers give (the order of
    the keys and all characters kept). `opening` is what the prompt writes of an answer behind `<|assistant|>`.
    """

    name = "glm4"
    defaults = ChatDefaults(max_length=8192, top_p=0.8, temperature=0.8)
    tools_system_text = ""

    def __init__(self, escaped_json: bool = True, opening: str = ""):
        self.escaped_json, self.opening = escaped_json, opening

    def stop_token_ids(self, tokenizer: Any) -> list[int]:
        return tokenizer.convert_tokens_to_ids(["<|endoftext|>", *ROLE_STOPS])

    def conversation_text(
        self, tokenizer: Any, messages: Sequence[Message], tools: Any = None, add_generation_prompt: bool = True
    ) -> str:
        source = template_of(tokenizer) or GLM4_TEMPLATE
        tools = as_objects(tools)
        # Some templates look for tools in a system message, some for a variable of that name.
        prepared = self.with_tools(messages, tools if _TOOLS_OF_A_MESSAGE.search(source) else None)
        for message in prepared:
            if message.get("tools"):
                message["tools"] = _as_functions(message["tools"])
        tools = _as_functions(tools) or next((each["tools"] for each in prepared if each.get("tools")), None)
        if tools and "tools" not in source:
            raise ChatGLMError("chat_template", "tools", "given", "none: the template has no place for them")
        written = [
            {key: value for key, value in message.items() if key != "thinking" and value is not None}
            for message in prepared
        ]
        special = getattr(tokenizer, "special_tokens_map", {})
        values = special | {"messages": written, "tools": tools, "documents": None}
        return render(source, self.escaped_json, values | {"add_generation_prompt": add_generation_prompt})

    def conversation_ids(
        self, tokenizer: Any, messages: Sequence[Message], tools: Any = None, add_generation_prompt: bool = True
    ) -> list[int]:
        """The template writes all special tokens, those at the beginning too: the tokenizer adds none."""
        return _ids_of(tokenizer, self.conversation_text(tokenizer, messages, tools, add_generation_prompt))

    def continued_text(self, tokenizer: Any, messages: Sequence[Message], tools: Any = None) -> str:
        """Cut behind the last message's text, of which a template may leave out the whitespace around it."""
        text = self.conversation_text(tokenizer, messages, tools, add_generation_prompt=False)
        last = messages[-1]["content"].lstrip()
        start = text.rfind(last.rstrip())
        if start < 0 or not last:
            seen = "not in what the template writes"
            raise ChatGLMError(f"messages[{len(messages) - 1}]", "content", seen, "text to go on with")
        return text[: start + len(last if text.startswith(last, start) else last.rstrip())]

    def continued_ids(self, tokenizer: Any, messages: Sequence[Message], tools: Any = None) -> list[int]:
        return _ids_of(tokenizer, self.continued_text(tokenizer, messages, tools))

    def metadata_and_content(self, part: str, names: set[str]) -> tuple[str, str]:
        """A prompt that ends the first line itself leaves no place for metadata: then only the name of a tool that is
        offered is taken for some."""
        return named_call(part, names) if self.opening else super().metadata_and_content(part, names)

    def parse_arguments(self, content: str) -> Any:
        """The JSON that is all of a tool call's content."""
        try:
            return json.loads(content)
        except RecursionError as error:
            raise ValueError(content) from error


def _ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(whole_characters(text), add_special_tokens=False))


def _as_functions(tools: Any) -> Any:
    """Plain tools, as ChatGLM3 has them, in the form of the others: the published template writes no more of them than
    that there are some."""
    return tools and [{"type": "function", "function": tool} if _is_plain(tool) else tool for tool in tools]


def _is_plain(tool: Any) -> bool:
    return isinstance(tool, dict) and "name" in tool and not {"type", "function"} & set(tool)


def named_call(part: str, names: set[str]) -> tuple[str, str]:
    """(name, rest) of a text whose first line is one of `names`, ("", text) of any other."""
    name, newline, content = part.strip().partition("\n")
    return (name.strip(), content) if newline and name.strip() in names else ("", part)
