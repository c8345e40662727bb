"""What is looked at before a conversion begins."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

from chatglm_ov.checkpoint.trained_prefix import TrainedPrefix
from chatglm_ov.config import parse_config, read_config_json
from chatglm_ov.conversion.converted_config import converted_fields, is_converted
from chatglm_ov.conversion.source_model import SourceModel
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.weight_formats import FORMATS
from chatglm_ov.weights.ir import IR_NAME, read_description

OPS = ("fused", "stock")


def check_arguments(source: Path, target: Path, weight_formats: Sequence[str], ops: str) -> None:
    if isinstance(weight_formats, str) or not weight_formats:
        raise ChatGLMError("convert", "weight_formats", repr(weight_formats), f"a list of {', '.join(FORMATS)}")
    for name in weight_formats:
        if name not in FORMATS:
            raise ChatGLMError("convert", "weight_formats", repr(name), f"one of {', '.join(FORMATS)}")
    if ops not in OPS:
        raise ChatGLMError("convert", "ops", repr(ops), f"one of {', '.join(OPS)}")
    try:
        target.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError before Python 3.13
        raise ChatGLMError(target, "output", "a link that leads to itself", "a folder that is new or empty") from error
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


def check_addable(target: Path, weight_formats: Sequence[str], overwrite: bool) -> None:
    """A converted folder that other formats are added to: without those, unless they may be written over."""
    if not is_converted(target):
        seen = "a folder of something else" if target.exists() else "missing"
        raise ChatGLMError(target, "output", seen, "a converted folder, which formats can be added to")
    there = [name for name in weight_formats if (target / name).exists()]
    if there and not overwrite:
        raise ChatGLMError(target, "weight_formats", f"{there[0]}, which is there", "other formats, or --overwrite")


def check_same_model(target: Path, model: SourceModel, ops: str, weight_formats: Sequence[str]) -> None:
    """What is added to a converted folder fits the formats that stay there, as far as it can be told without reading
    weights. ops: fused or stock. weight_formats: those that are written."""
    stored, fields = read_config_json(target), converted_fields(model.fields, model.config, ops)
    there, added = (_flat(json.loads(json.dumps(each))) for each in (stored, fields))
    for name in sorted(there.keys() | added.keys()):
        if there.get(name) != added.get(name):
            seen, wanted = (json.dumps(each.get(name), ensure_ascii=False) for each in (there, added))
            raise ChatGLMError(target / "config.json", name, seen, f"{wanted}, as in what is added")
    old = TrainedPrefix.load(target, parse_config(stored))
    if old is not None and not old.equals(model.prefix):
        raise ChatGLMError(target, "trained prefix", "another one", "that of what is added")
    for xml in target.glob(f"*/{IR_NAME}"):
        if xml.parent.name in weight_formats:
            continue
        try:
            merged = read_description(xml).get("lora")
        except ParseError as error:
            raise ChatGLMError(xml, "IR", f"unreadable ({error})", "an IR as `convert` writes it") from error
        if merged != model.lora:
            raise ChatGLMError(xml, "lora", merged or "none", f"{model.lora or 'none'}, as in what is added")


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    """With the fields of our own object beside the others; it has none where it is something else."""
    others = {name: value for name, value in fields.items() if name != "chatglm_ov"}
    own = fields["chatglm_ov"]
    return others | own if isinstance(own, dict) else others


def check_apart(target: Path, folder: Path, name: str) -> None:
    """Raises ChatGLMError for a folder or file of what is read that the output would take the place of."""
    if target.resolve() == folder.resolve():
        raise ChatGLMError(target, "output", f"the {name} itself", "another folder")
    if target.resolve() in folder.resolve().parents:
        raise ChatGLMError(target, "output", f"a folder that the {name} is in", "another folder")
