"""Chat formats: one file per generation, all with the interface `ChatFormat`."""

from __future__ import annotations

from typing import Any

from chatglm_ov.chat.base import ChatDefaults, ChatFormat
from chatglm_ov.chat.chatglm import ChatGLMFormat
from chatglm_ov.chat.chatglm2 import ChatGLM2Format
from chatglm_ov.chat.chatglm3 import ChatGLM3Format
from chatglm_ov.chat.glm4 import GLM4Format
from chatglm_ov.errors import ChatGLMError

__all__ = ["ChatDefaults", "ChatFormat", "chat_format_for"]

_FORMATS: dict[str, ChatFormat] = {
    "chatglm": ChatGLMFormat(),
    "chatglm2": ChatGLM2Format(),
    "chatglm3": ChatGLM3Format(),
    "glm4": GLM4Format(),
}
# Tokenizers of transformers' own GLM classes: the reference for their prompts is the transformers of today.
_PLAIN_JSON = GLM4Format(escaped_json=False)


def chat_format_for(tokenizer: Any) -> ChatFormat:
    """The format of the tokenizer's generation; of a tokenizer.json with a chat template, the GLM-4 one."""
    family = getattr(tokenizer, "family", None)
    if family in _FORMATS:
        return _FORMATS[family]
    if getattr(tokenizer, "chat_template", None):
        return _PLAIN_JSON
    seen = f"a {type(tokenizer).__name__} without chat_template"
    raise ChatGLMError("chat", "tokenizer", seen, "one from chatglm_ov.load_tokenizer, or one with a chat template")
