"""The files of a converted folder: models, and what stands beside them."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from chatglm_ov.checkpoint.files import refuse_placeholder
from chatglm_ov.checkpoint.reader import Checkpoint
from chatglm_ov.config import ArchitectureConfig, parse_config
from chatglm_ov.conversion.converted_config import converted_fields
from chatglm_ov.conversion.graph import write_graph
from chatglm_ov.conversion.source_model import SourceModel
from chatglm_ov.json_files import read_json_object
from chatglm_ov.tokenizer import save_tokenizer_files
from chatglm_ov.weights.choices import DEFAULT_CHOICES, FormatChoices
from chatglm_ov.weights.file import WeightsFile
from chatglm_ov.weights.ir import WEIGHTS_NAME
from chatglm_ov.weights.store import Progress, WeightStore


def write_model(
    config: ArchitectureConfig,
    weights: Checkpoint,
    folder: Path,
    weight_format: str,
    ops: str,
    report: Progress,
    choices: FormatChoices = DEFAULT_CHOICES,
    described: Mapping[str, str | int] = MappingProxyType({}),
) -> None:
    """The IR of one weight format and its weights, in the new folder `folder`. ops: fused or stock. described: what the
    IR tells about itself beside what it always does."""
    folder.mkdir()
    with WeightsFile(folder / WEIGHTS_NAME) as file:
        write_graph(config, WeightStore(weights, file, weight_format, report, choices), ops, described)


def write_side_files(model: SourceModel, folder: Path, ops: str) -> None:
    """config.json, generation_config.json, tokenizer files, a trained prefix."""
    _write_json(folder / "config.json", converted_fields(model.fields, model.config, ops))
    generation = model.folder / "generation_config.json"
    if generation.exists():
        refuse_placeholder(generation)
        read_json_object(generation)
        # transformers does not take a mark of encoding.
        (folder / generation.name).write_bytes(generation.read_bytes().removeprefix(codecs.BOM_UTF8))
    else:
        ids = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(folder / generation.name, {name: value for name, value in ids.items() if value is not None})
    save_tokenizer_files(model.folder, folder)
    if model.prefix is not None:
        model.prefix.save(folder)


def convert_weights(
    weights: Checkpoint,
    fields: dict[str, Any],
    folder: Path,
    weight_format: str,
    ops: str,
    report: Progress,
    choices: FormatChoices = DEFAULT_CHOICES,
) -> None:
    """A converted folder of one weight format and nothing else, for measurements: config.json with `fields` and the
    model. ops: fused or stock, as `available_ops` gives it."""
    config = parse_config(fields)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", converted_fields(fields, config, ops))
    write_model(config, weights, folder / weight_format, weight_format, ops, report, choices)


def _write_json(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
