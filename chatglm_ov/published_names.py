"""What the names under which models are published tell."""

from __future__ import annotations

import re
from typing import Any

_GENERATIONS = {2: ("chatglm2", "codegeex2"), 3: ("chatglm3",), 4: ("glm4", "codegeex4")}
"""Parts of the names under which the models of ChatGLM2's architecture are published, without hyphens."""


def generation_of_name(name: Any) -> int | None:
    """The generation, 2 to 4, that the name of a folder or of a published model tells; None if it tells none, or
    several."""
    plain = re.sub("[-_ ]", "", str(name or "").lower())
    found = [generation for generation, parts in _GENERATIONS.items() if any(part in plain for part in parts)]
    return found[0] if len(found) == 1 else None


def is_chatglm2(fields: dict[str, Any]) -> bool:
    """Whether a config.json of ChatGLM2's architecture is that of ChatGLM2 or CodeGeeX2 themselves: by its name, or
    else by its `transformers_version`, 4.27.1 in what is published of these two, 4.30.2 or later in all others."""
    generation = generation_of_name(fields.get("_name_or_path"))
    if generation is not None:
        return generation == 2
    version = re.match(r"(\d+)\.(\d+)", str(fields.get("transformers_version", "")))
    return version is not None and (int(version[1]), int(version[2])) < (4, 30)
