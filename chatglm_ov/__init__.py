"""The ChatGLM / GLM family on CPUs with OpenVINO: convert a checkpoint, load it, `generate()`.

The names below are loaded on first use, so that `import chatglm_ov` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatglm_ov.conversion.convert import convert
    from chatglm_ov.errors import ChatGLMError
    from chatglm_ov.modeling import OVChatGLMForCausalLM
    from chatglm_ov.tokenizer import load_tokenizer

__version__ = "0.1.0"

_HOME = {
    "convert": "chatglm_ov.conversion.convert",
    "load_tokenizer": "chatglm_ov.tokenizer",
    "OVChatGLMForCausalLM": "chatglm_ov.modeling",
    "ChatGLMError": "chatglm_ov.errors",
}

__all__ = ["ChatGLMError", "OVChatGLMForCausalLM", "convert", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'chatglm_ov' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
