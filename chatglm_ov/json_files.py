"""JSON files as other programs write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chatglm_ov.errors import ChatGLMError


def read_json_object(
    path: Path,
    wanted: str = "a JSON object",
    object_pairs_hook: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The contents of a file with one JSON object, `wanted` in the words of an error; object_pairs_hook as in
    `json.loads`. Raises ChatGLMError for a file that is missing or has anything else in it."""
    try:
        # Editors on Windows begin a file with a mark of its encoding.
        contents = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=object_pairs_hook)
    except FileNotFoundError:
        raise ChatGLMError(path, "file", "missing", wanted) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ChatGLMError(path, "contents", f"not JSON ({error})", wanted) from None
    if not isinstance(contents, dict):
        raise ChatGLMError(path, "contents", f"a JSON {type(contents).__name__}", wanted)
    return contents
