"""Prompts for code: infilling with codegeex4, completion with CodeGeeX2."""

from __future__ import annotations

from chatglm_ov.errors import ChatGLMError

_MODES = ("LINE", "BLOCK")


def infilling_query(prefix: str, suffix: str, path: str = "", language: str = "", mode: str = "BLOCK") -> str:
    """The query of a codegeex4 chat that asks for the code between `prefix` and `suffix`.

    `path` and `language` say what file it is, "" leaves their lines out. `mode`: "LINE" (the rest of a line) or
    "BLOCK".
    """
    if mode not in _MODES:
        raise ChatGLMError("infilling_query", "mode", repr(mode), " or ".join(_MODES))
    lines = {"PATH": path, "LANGUAGE": language, "MODE": mode}
    head = "".join(f"###{name}:{value}\n" for name, value in lines.items() if value)
    return f"{head}<|code_suffix|>{suffix}<|code_prefix|>{prefix}<|code_middle|>"


def completion_prompt(code: str, language: str = "Python", comment: str = "#") -> str:
    """The text that CodeGeeX2 continues: `code` below a line of comment that names its language."""
    return f"{comment} language: {language}\n{code}"
