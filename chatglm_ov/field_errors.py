"""Errors of pydantic, told in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from chatglm_ov.errors import ChatGLMError


def field_error(where: Path | str, fields: dict[str, Any], error: ValidationError) -> ChatGLMError:
    """The error that tells the first field that is wrong. Of a union pydantic reports every branch that failed."""
    failures = error.errors()
    where_in_file = failures[0]["loc"]
    # Behind the field's name a union has that of the branch.
    nested = where_in_file[0] == "rope_scaling" and len(where_in_file) > 1
    field = ".".join(map(str, where_in_file if nested else where_in_file[:1]))
    if failures[0]["type"] == "missing":
        return ChatGLMError(where, field, "missing", "a value")
    messages = dict.fromkeys(failure["msg"] for failure in failures if failure["loc"][0] == where_in_file[0])
    wanted = " or ".join(message.removeprefix("Input should be ") for message in messages)
    seen = failures[0]["input"] if nested else fields.get(field, failures[0]["input"])
    return ChatGLMError(where, field, repr(seen), wanted)
