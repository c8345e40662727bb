"""Converted folders to measure: one that is there, or made of a checkpoint or of random weights in a temporary one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import psutil
from tqdm import tqdm

from chatglm_ov.bench.weights import RandomWeights
from chatglm_ov.checkpoint.fields import checkpoint_fields
from chatglm_ov.checkpoint.model_weights import model_weights
from chatglm_ov.checkpoint.prequantized import open_checkpoint
from chatglm_ov.checkpoint.reader import Checkpoint
from chatglm_ov.config import ArchitectureConfig, parse_config, read_config_json
from chatglm_ov.conversion.converted_config import is_converted
from chatglm_ov.conversion.plan import Plan, make_plan
from chatglm_ov.conversion.write import convert_weights
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.presets import config_json, layers_field
from chatglm_ov.runtime.loading import weight_formats
from chatglm_ov.system.sizes import size
from chatglm_ov.weights.choices import DEFAULT_CHOICES, FormatChoices

DEFAULT_FORMATS = ("bf16", "int8", "int4")


@dataclass(frozen=True)
class Source:
    """Where the weights come from. folder: None for random weights. ops: of a converted folder, which has no other;
    None where every lowering can be made. choices: of formats, for what is converted."""

    name: str
    fields: dict[str, Any]
    folder: Path | None = None
    ops: str | None = None
    choices: FormatChoices = DEFAULT_CHOICES

    @property
    def config(self) -> ArchitectureConfig:
        return parse_config(self.fields, self.name)

    @property
    def weight_formats(self) -> tuple[str, ...]:
        """The formats that are measured where none is chosen."""
        return DEFAULT_FORMATS if self.ops is None else tuple(weight_formats(self.folder or self.name))

    def weights(self) -> Checkpoint:
        """The weights to convert. Use as a context manager."""
        stored = RandomWeights(self.fields) if self.folder is None else open_checkpoint(self.folder, self.fields)
        return model_weights(self.config, stored)

    def plan(self, weights: Checkpoint, weight_format: str, ops: str) -> Plan:
        """What converting them to a format takes."""
        return make_plan(self.config, weights, [weight_format], ops, self.choices)


def from_preset(preset: str, layers: int | None = None) -> Source:
    """Random weights at a released model's shapes, with fewer layers if asked for."""
    name = preset if layers is None else f"{preset}, {layers} layers"
    return Source(name, config_json(preset, **({} if layers is None else {layers_field(preset): layers})))


def from_folder(folder: Path) -> Source:
    """A checkpoint folder or a converted one. Raises ChatGLMError for anything else."""
    fields = read_config_json(folder) if is_converted(folder) else checkpoint_fields(folder)
    parse_config(fields, folder / "config.json")
    marker = fields.get("chatglm_ov")
    return Source(str(folder), fields, folder, marker.get("ops", "stock") if isinstance(marker, dict) else None)


def check_disk(source: Source, formats: Sequence[str], lowerings: Sequence[str], place: Path | None) -> None:
    """Raises ChatGLMError where a format in all of the lowerings, which are there at once, would not fit."""
    if source.ops is not None:
        return
    folder = place or Path(gettempdir())
    if not folder.is_dir():
        raise ChatGLMError(folder, "work folder", "missing", "a folder")
    with source.weights() as weights:
        needed = max(sum(source.plan(weights, name, ops).disk_bytes for ops in lowerings) for name in formats)
    free = psutil.disk_usage(str(folder)).free
    if free < needed:
        raise ChatGLMError(folder, "free disk space", size(free), f"{size(needed)} for a temporary folder")


@contextmanager
def converted(
    source: Source, weight_format: str, lowerings: Sequence[str], place: Path | None
) -> Iterator[dict[str, Path]]:
    """Converted folders that hold `weight_format`, by lowering. What is made for it is removed afterwards."""
    if source.ops is not None:
        yield {source.ops: source.folder or Path(source.name)}
        return
    with TemporaryDirectory(prefix="chatglm-ov-bench-", dir=place) as temporary:
        folders = {ops: Path(temporary) / ops for ops in lowerings}
        with source.weights() as weights:
            total = sum(source.plan(weights, weight_format, ops).read_bytes for ops in lowerings)
            with tqdm(total=total, unit="B", unit_scale=True, desc=weight_format) as bar:
                # A trained prefix is a few more columns in the cache: what it costs, a context shows.
                fields = {**source.fields, "pre_seq_len": None}
                made = partial(convert_weights, weights, fields, weight_format=weight_format)
                for ops, folder in folders.items():
                    made(folder, ops=ops, report=lambda _, n: bar.update(n), choices=source.choices)
        for folder in folders.values():
            _finish_writing(folder)
        yield folders


def _finish_writing(folder: Path) -> None:
    """A disk that is still busy would disturb what is measured next."""
    for file in folder.rglob("*.bin"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
