"""The process that a model belongs to."""

from __future__ import annotations

import os
from functools import cache

from chatglm_ov.errors import ChatGLMError


@cache
def _first_user() -> int:
    """The process that has used OpenVINO first; in a fork of it still that one."""
    return os.getpid()


def check_process() -> None:
    """Raises ChatGLMError in a fork of a process that has loaded a model: OpenVINO's threads, and whoever held a lock
    at that moment, are not there, and it would wait for them forever."""
    if _first_user() != os.getpid():
        wanted = "from_pretrained() in each process: fork before a model is loaded, or start processes by spawn"
        raise ChatGLMError("model", "process", "a fork of one that has loaded a model", wanted)
