"""Prompts for code: the formats of the published guides."""

from __future__ import annotations

import pytest

from chatglm_ov import ChatGLMError
from chatglm_ov.chat import completion_prompt, infilling_query


def test_infilling_query():
    query = infilling_query("def f():\n    ", "\n    return x", path="a.py", language="Python")
    assert query == (
        "###PATH:a.py\n###LANGUAGE:Python\n###MODE:BLOCK\n"
        "<|code_suffix|>\n    return x<|code_prefix|>def f():\n    <|code_middle|>"
    )
    assert infilling_query("a", "b", mode="LINE") == "###MODE:LINE\n<|code_suffix|>b<|code_prefix|>a<|code_middle|>"
    with pytest.raises(ChatGLMError, match="infilling_query: mode is 'WORD', expected LINE or BLOCK"):
        infilling_query("a", "b", mode="WORD")


def test_completion_prompt():
    text = "# write a bubble sort function\n"
    assert completion_prompt(text) == f"# language: Python\n{text}"
    assert completion_prompt("int x;", "C++", comment="//") == "// language: C++\nint x;"
