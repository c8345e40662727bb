"""What is looked at before a conversion begins."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from chatglm_ov.converted_config import is_converted
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.weights.formats import FORMATS

OPS = ("fused", "stock")


def check_arguments(source: Path, target: Path, weight_formats: Sequence[str], ops: str) -> None:
    if isinstance(weight_formats, str) or not weight_formats:
        raise ChatGLMError("convert", "weight_formats", repr(weight_formats), f"a list of {', '.join(FORMATS)}")
    for name in weight_formats:
        if name not in FORMATS:
            raise ChatGLMError("convert", "weight_formats", repr(name), f"one of {', '.join(FORMATS)}")
    if ops not in OPS:
        raise ChatGLMError("convert", "ops", repr(ops), f"one of {', '.join(OPS)}")
    if target.exists() and not target.is_dir():
        raise ChatGLMError(target, "output", "a file", "a folder that is new or empty")
    check_apart(target, source, "checkpoint")
    if os.path.ismount(target):
        raise ChatGLMError(target, "output", "a mount point, which cannot be renamed to", "a folder in it")


def check_replaceable(target: Path, overwrite: bool) -> None:
    """An output that is not empty: with `overwrite`, no folder of another model, and none that somebody is in. A
    converted folder is replaced; what is in any other stays, beside the new files."""
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ChatGLMError(target, "output", "not empty", "a new or empty folder, or --overwrite")
    if (target / "config.json").exists() and not is_converted(target):
        raise ChatGLMError(target, "output", "a folder of another model", "a converted folder, or another place")
    if is_converted(target) and target.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ChatGLMError(target, "output", "the current folder, which cannot be replaced", "another folder")


def check_apart(target: Path, folder: Path, name: str) -> None:
    """Raises ChatGLMError for a folder or file of what is read that the output would take the place of."""
    if target.resolve() == folder.resolve():
        raise ChatGLMError(target, "output", f"the {name} itself", "another folder")
    if target.resolve() in folder.resolve().parents:
        raise ChatGLMError(target, "output", f"a folder that the {name} is in", "another folder")
