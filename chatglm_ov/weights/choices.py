"""Which format each weight of a model is stored in."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

from chatglm_ov.config import ArchitectureConfig
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.json_files import read_json_object
from chatglm_ov.models import architecture, graph_shapes, lm_head_name
from chatglm_ov.weight_formats import FORMATS, GROUP_SIZE, GROUP_SIZES, WeightFormat, int4_format

EMBEDDING_FORMATS = ("f32", "bf16", "int8")
"""Rows of the embedding are looked up one by one: 4 bits would save 1 % of a model, and cost accuracy."""

log = logging.getLogger(__name__)


class LayerFormats(dict[str, str]):
    """Formats by patterns of weight names, as the JSON object in `file` has them."""

    def __init__(self, file: Path, formats: Mapping[str, str]):
        super().__init__(formats)
        self.file = file


@dataclass(frozen=True)
class FormatChoices:
    """What a user chooses beside the format of a model.

    group_size: columns that share a scale in int4. lm_head_format: of the LM head, which in a tied model is the
    embedding. embedding_format: of an embedding that is not tied. layer_formats: format by a pattern of weight names,
    such as `*.layers.0.*` (shell wildcards); the first pattern that fits counts. None: the
    format of the model, int8 in an int4 model.
    """

    group_size: int = GROUP_SIZE
    lm_head_format: str | None = None
    embedding_format: str | None = None
    layer_formats: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        _check("group_size", self.group_size, GROUP_SIZES)
        _check("lm_head_format", self.lm_head_format, (None, *FORMATS))
        _check("embedding_format", self.embedding_format, (None, *EMBEDDING_FORMATS))
        for pattern, name in self.layer_formats.items():
            _check(f"layer_formats of {pattern!r}", name, tuple(FORMATS))

    def check_layers(self, layers: Sequence[str]) -> None:
        """Raises ChatGLMError for a pattern that fits none of these linear weights, which are all that a model has in
        its layers; a warning tells of one whose weights have all gone to patterns before it."""
        free = set(layers)
        for pattern in self.layer_formats:
            fitting = {name for name in layers if fnmatchcase(name, pattern)}
            if not fitting:
                wanted = f"a pattern of linear weights in layers, such as {layers[0]}"
                raise ChatGLMError(self._layers_from, "layer_formats", repr(pattern), wanted)
            if not fitting & free:
                told = "%s: layer_formats of %r chooses nothing, as earlier patterns fit all of its weights"
                log.warning(told, self._layers_from, pattern)
            free -= fitting

    def check_tied(self) -> None:
        """Raises ChatGLMError where the embedding of a model whose LM head is tied to it was to have a format of its
        own: the two are stored once."""
        if self.embedding_format not in (None, self.lm_head_format):
            wanted = "not given, as the embedding is the LM head too: lm_head_format is for both"
            raise ChatGLMError("convert", "embedding_format", self.embedding_format, wanted)

    def linear(self, model_format: str, name: str, columns: int) -> WeightFormat:
        """Format of the linear weight `name` [N, columns] in a model of `model_format`. int4 is int8 where 32 does not
        divide the columns, unless a pattern asks for it."""
        for pattern, chosen in self.layer_formats.items():
            if fnmatchcase(name, pattern):
                return self._fitting(chosen, columns, f"layer_formats of {pattern!r} for {name}", self._layers_from)
        usual = self._named(model_format)
        return usual if usual.fits(columns) else FORMATS["int8"]

    def lm_head(self, model_format: str, columns: int, dtype: str = "") -> WeightFormat:
        """int8 in an int4 model, where 4 bits cost more accuracy than they save memory; but what has its authors' 4
        bits already keeps them. dtype: of the tensor in the checkpoint."""
        if self.lm_head_format is not None:
            return self._fitting(self.lm_head_format, columns, "lm_head_format")
        return self._named(model_format) if dtype == model_format else _table_format(model_format)

    def embedding(self, model_format: str) -> WeightFormat:
        """int8 in an int4 model."""
        return _table_format(model_format) if self.embedding_format is None else FORMATS[self.embedding_format]

    def _named(self, name: str) -> WeightFormat:
        return int4_format(self.group_size) if name == "int4" else FORMATS[name]

    @property
    def _layers_from(self) -> Path | str:
        return self.layer_formats.file if isinstance(self.layer_formats, LayerFormats) else "convert"

    def _fitting(self, name: str, columns: int, what: str, where: Path | str = "convert") -> WeightFormat:
        chosen = self._named(name)
        if not chosen.fits(columns):
            raise ChatGLMError(where, what, name, f"a format for {columns} columns: int4 takes multiples of 32")
        return chosen


def matrix_formats(
    config: ArchitectureConfig,
    choices: FormatChoices,
    model_format: str,
    dtype: Callable[[str], str] = lambda name: "",
) -> dict[str, WeightFormat]:
    """The format of each matrix that a graph of `model_format` reads, by its name there. dtype(name): of the tensor in
    the checkpoint."""
    formats, head = {}, lm_head_name(config)
    for name, shape in graph_shapes(config).items():
        if len(shape) != 2:
            continue
        if name == head:
            formats[name] = choices.lm_head(model_format, shape[1], dtype(name))
        elif name == architecture(config).EMBEDDING:
            formats[name] = choices.embedding(model_format)
        else:
            formats[name] = choices.linear(model_format, name, shape[1])
    return formats


def _table_format(model_format: str) -> WeightFormat:
    return FORMATS["int8" if model_format == "int4" else model_format]


def _check(name: str, value: Any, known: tuple[Any, ...], where: Path | str = "convert") -> None:
    if value not in known:
        wanted = ", ".join(str(each) for each in known if each is not None)
        raise ChatGLMError(where, name, repr(value), f"one of {wanted}")


DEFAULT_CHOICES = FormatChoices()


def read_layer_formats(path: Path) -> LayerFormats:
    """The contents of a JSON file of {pattern: format}. Raises ChatGLMError if it is none, for a format that there is
    not, and for a pattern that is in it twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for pattern, count in Counter(pattern for pattern, _ in pairs).items():
            if count > 1:
                raise ChatGLMError(path, f"layer_formats of {pattern!r}", f"there {count} times", "one format")
        return dict(pairs)

    contents = read_json_object(path, "a JSON object of pattern: format", once)
    for pattern, name in contents.items():
        _check(f"layer_formats of {pattern!r}", name, tuple(FORMATS), path)
    return LayerFormats(path, contents)
