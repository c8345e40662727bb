"""Chat format of GLM-4 and of the models that came after it in its way of writing a conversation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from chatglm_ov.chat.base import ChatDefaults, Message
from chatglm_ov.chat.roles import ROLE_STOPS, RolesFormat
from chatglm_ov.errors import ChatGLMError

# For a folder without a template: roles and function tools, in the published wording.
_TOOLS_TEXT = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)
_TOOL_TEXT = "\n\n## {{ tool['function']['name'] }}\n\n{{ tool['function'] | tojson(indent=4) }}"
_TOOL_TEXT += "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
DEFAULT_TEMPLATE = (
    "[gMASK]<sop>{% for item in messages %}"
    "{% if item['tools'] is defined %}<|system|>\n"
    + _TOOLS_TEXT
    + "{% for tool in item['tools'] %}"
    + _TOOL_TEXT
    + "{% endfor %}{% endif %}"
    "{% if item['content'] %}<|{{ item['role'] }}|>{{ item['metadata'] }}\n{{ item['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class GLM4Format(RolesFormat):
    """The tokenizer's own chat template, rendered in Jinja's sandbox, then encoded. Special tokens that somebody typed
    count as such, as in the original.

    `escaped_json` is how a template writes tools: True gives what the published code gives with the transformers of its
    time (up to 4.43: sorted keys, `\\uXXXX` for what is not ASCII), False what later transformers give (the order of
    the keys and all characters kept).
    """

    name = "glm4"
    defaults = ChatDefaults(max_length=8192, top_p=0.8, temperature=0.8)
    tools_system_text = ""

    def __init__(self, escaped_json: bool = True):
        self.escaped_json = escaped_json

    def stop_token_ids(self, tokenizer: Any) -> list[int]:
        return tokenizer.convert_tokens_to_ids(["<|endoftext|>", *ROLE_STOPS])

    def conversation_text(
        self, tokenizer: Any, messages: Sequence[Message], tools: Any = None, add_generation_prompt: bool = True
    ) -> str:
        source = getattr(tokenizer, "chat_template", None) or DEFAULT_TEMPLATE
        if isinstance(source, dict):
            source = source.get("default", DEFAULT_TEMPLATE)
        # Some templates look for tools in a system message, some for a variable of that name.
        prepared = self.with_tools(messages, tools if "['tools']" in source else None)
        tools = tools or next((message["tools"] for message in prepared if "tools" in message), None)
        special = getattr(tokenizer, "special_tokens_map", {})
        values = special | {"messages": prepared, "tools": tools, "add_generation_prompt": add_generation_prompt}
        return _render(source, self.escaped_json, values)

    def conversation_ids(
        self, tokenizer: Any, messages: Sequence[Message], tools: Any = None, add_generation_prompt: bool = True
    ) -> list[int]:
        text = self.conversation_text(tokenizer, messages, tools, add_generation_prompt)
        return list(tokenizer.encode(text, add_special_tokens=False))

    def parse_arguments(self, content: str) -> Any:
        """The JSON that is all of a tool call's content."""
        try:
            return json.loads(content)
        except RecursionError as error:
            raise ValueError(content) from error


def _render(source: str, escaped_json: bool, values: dict[str, Any]) -> str:
    from jinja2 import TemplateError

    try:
        return _environment(escaped_json).from_string(source).render(values)
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        seen = f"one that cannot be applied ({type(error).__name__}: {error})"
        raise ChatGLMError("chat_template", "template", seen, "a Jinja template for these messages") from None


@lru_cache
def _environment(escaped_json: bool) -> Any:
    """Jinja as transformers sets it up for chat templates: a sandbox, the newline after a block tag dropped."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    if not escaped_json:
        environment.filters["tojson"] = _tojson
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise ChatGLMError("chat_template", "messages", message, "a conversation that the template allows")
