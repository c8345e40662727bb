"""Chat formats: one file per generation, all with the interface `ChatFormat`."""

from __future__ import annotations

from typing import Any

from chatglm_ov.chat.base import ChatDefaults, ChatFormat
from chatglm_ov.chat.chatglm import ChatGLMFormat
from chatglm_ov.chat.chatglm2 import ChatGLM2Format
from chatglm_ov.chat.chatglm3 import ChatGLM3Format
from chatglm_ov.chat.codegeex import completion_prompt, infilling_query
from chatglm_ov.chat.glm import GLMFormat
from chatglm_ov.chat.glm4 import GLM4Format
from chatglm_ov.chat.templates import GLM4_TEMPLATE, answer_opening, template_of, token_id
from chatglm_ov.errors import ChatGLMError

__all__ = ["ChatDefaults", "ChatFormat", "chat_format_for", "completion_prompt", "infilling_query"]

_FORMATS: dict[str, ChatFormat] = {
    "chatglm": ChatGLMFormat(),
    "chatglm2": ChatGLM2Format(),
    "chatglm3": ChatGLM3Format(),
}


def chat_format_for(tokenizer: Any) -> ChatFormat:
    """The format of the tokenizer's generation; of a tokenizer.json, the one of its chat template."""
    family = getattr(tokenizer, "family", None)
    if family in _FORMATS:
        return _FORMATS[family]
    template = template_of(tokenizer)
    if family == "glm4":
        return GLM4Format(opening=answer_opening(template or GLM4_TEMPLATE))
    if template:
        return GLMFormat(opening=answer_opening(template))
    end = token_id(tokenizer, "<|endoftext|>")
    seen = f"a {type(tokenizer).__name__} without chat_template, in which <|endoftext|> is {end}"
    known = "<|endoftext|> at 151329 (GLM-4) or 59246 (GLM-Edge)"
    wanted = f"one from chatglm_ov.load_tokenizer, one with a chat template, or {known}"
    raise ChatGLMError("chat", "tokenizer", seen, wanted)
