"""Jinja chat templates: those of checkpoints, rendered in a sandbox, and the ones for folders that have none."""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

from chatglm_ov.errors import ChatGLMError

# The published wording, roles and function tools.
_TOOLS = (
    "{% if tools %}<|system|>\n"
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
    "{% for tool in tools %}{% set function = tool['function'] if tool['function'] is defined else tool %}"
    "\n\n## {{ function['name'] }}\n\n{{ function | tojson(indent=4) }}"
    "\n在调用上述函数时，请使用 Json 格式表示调用的参数。{% endfor %}{% endif %}"
)
_TURNS = (
    "{% for item in messages %}{% if item['content'] %}"
    "<|{{ item['role'] }}|>{{ item['metadata'] }}\n{{ item['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GLM4_TEMPLATE = "[gMASK]<sop>" + _TOOLS + _TURNS
EDGE_TEMPLATE = _TURNS

# `<|endoftext|>`, the first special token, says how large the vocabulary is.
_DEFAULTS = {151329: GLM4_TEMPLATE, 59246: EDGE_TEMPLATE}


def template_of(tokenizer: Any) -> str | None:
    """The template that the tokenizer brings, or that of its vocabulary: GLM-4's or GLM-Edge's. None for others."""
    source = getattr(tokenizer, "chat_template", None)
    if isinstance(source, dict):
        source = source.get("default")
    return source or _DEFAULTS.get(token_id(tokenizer, "<|endoftext|>") or 0)


def token_id(tokenizer: Any, token: str) -> int | None:
    """Id of a token, None where the vocabulary does not have it."""
    convert = getattr(tokenizer, "convert_tokens_to_ids", None)
    index = convert(token) if convert else None
    return index if index is not None and tokenizer.convert_ids_to_tokens(index) == token else None


def render(source: str, escaped_json: bool, values: dict[str, Any]) -> str:
    """Text of the template `source`. Whatever goes wrong in it is a ChatGLMError."""
    try:
        return _compiled(source, escaped_json).render(values)
    except ChatGLMError:
        raise
    except Exception as error:  # a template is a program of somebody else: it can fail in any way
        seen = f"one that cannot be applied ({type(error).__name__}: {_one_line(error)})"
        raise ChatGLMError("chat_template", "template", seen, "a Jinja template for these messages") from None


@lru_cache
def answer_opening(source: str) -> str:
    """What the prompt writes of an answer: the text behind the last `<|assistant|>` of a rendered question."""
    messages = [{"role": "user", "content": "?"}]
    try:
        text = render(
            source,
            False,
            {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True},
        )
    except ChatGLMError:
        return ""
    _, role, opening = text.rpartition("<|assistant|>")
    return opening if role else ""


@lru_cache
def _compiled(source: str, escaped_json: bool) -> Any:
    return _environment(escaped_json).from_string(source)


@lru_cache
def _environment(escaped_json: bool) -> Any:
    """Jinja as transformers sets it up for chat templates: a sandbox, the newline after a block tag dropped."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what a model is trained on; the text is that without the mark."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    if not escaped_json:
        environment.filters["tojson"] = _tojson
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise ChatGLMError("chat_template", "messages", _one_line(message), "a conversation that the template allows")


def _one_line(message: Any) -> str:
    return " ".join(str(message).split())
