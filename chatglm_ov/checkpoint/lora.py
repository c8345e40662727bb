"""A LoRA adapter in the folder format of PEFT, merged into the weights of a checkpoint while they are read.

    with with_lora(weights, folder, config) as merged:
        block = merged["lm_head.weight"].rows(slice(0, 1024))

What is merged follows from the names of the adapter's tensors, so that the fields of adapter_config.json that chose
modules for training (target_modules, layers_to_transform and the like) are not looked at. Neither is fan_in_fan_out,
which PEFT itself switches off for linear layers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from chatglm_ov.checkpoint.files import FLOATS
from chatglm_ov.checkpoint.quantized import QuantizedTensor
from chatglm_ov.checkpoint.reader import Checkpoint, Rows, Tensor, checked
from chatglm_ov.config import ArchitectureConfig
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.field_errors import field_error
from chatglm_ov.json_files import read_json_object
from chatglm_ov.models import architecture

CONFIG_NAME = "adapter_config.json"
WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."

_PART = re.compile(
    r"(.+)\.lora_(?:([AB])(?:\.default)?\.weight|(embedding_[AB]|magnitude_vector)(?:\.default)?(?:\.weight)?)"
)
_WRAPPER = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")
"""Modules that PEFT puts between a layer and its tensors."""

_OTHER_METHODS = (
    "alora_invocation_tokens", "arrow_config", "enable_lora", "layer_replication", "lora_bias", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
"""Fields that make something else of an adapter than a product added to a weight."""

log = logging.getLogger(__name__)

T = TypeVar("T")


class _AdapterConfig(BaseModel):
    """adapter_config.json, fields named as in the file."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    peft_type: Literal["LORA"]
    r: PositiveInt
    lora_alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[str] | None = None
    # The others change the weights that an adapter is added to before its training begins.
    init_lora_weights: Literal[True, False, "gaussian", "orthogonal", "eva"] = True

    def rank(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        rank = self.rank(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (sqrt(rank) if self.use_rslora else rank)


def _at_the_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})"


def _by_pattern(patterns: Mapping[str, T] | None, module: str, default: T) -> T:
    """The value of the first pattern that is the end of the module's name, from a dot or its beginning on."""
    found = (value for pattern, value in (patterns or {}).items() if re.fullmatch(_at_the_end(pattern), module))
    return next(found, default)


@dataclass(frozen=True)
class _Replacement(Tensor):
    """A tensor that was trained as a whole, under its name in the checkpoint."""

    source: Tensor

    def rows(self, rows: Rows) -> np.ndarray:
        return self.source.rows(rows)

    def read(self) -> np.ndarray:
        return self.source.read()


@dataclass(frozen=True)
class _Merged(Tensor):
    """original [N, K] + scale * product, float32.

    product(rows): of the two low-rank matrices, these rows as a new array. magnitude: [N], what DoRA makes the norms of
    the rows; None for plain LoRA.
    """

    original: Tensor
    product: Callable[[Rows], np.ndarray]
    scale: float
    magnitude: Tensor | None

    # Whoever takes the values tells which are not finite.
    @np.errstate(over="ignore", divide="ignore", invalid="ignore")
    def rows(self, rows: Rows) -> np.ndarray:
        values, added = self.original.rows(rows), self.product(rows)
        added *= self.scale
        values += added
        if self.magnitude is not None:
            values *= (self.magnitude.rows(rows) / np.linalg.norm(values, axis=1))[:, None]
        return values

    def read(self) -> np.ndarray:
        return self.rows(slice(None))


@contextmanager
def with_lora(weights: Checkpoint, folder: Path | None, config: ArchitectureConfig) -> Iterator[Checkpoint]:
    """The weights with the adapter in `folder` merged into them; None: the weights themselves.

    W + alpha / r * B A, with alpha / sqrt(r) if use_rslora; trained biases and modules_to_save take the place of what
    the checkpoint has. Raises ChatGLMError for anything that cannot be merged exactly: another method, a quantized
    weight, an incomplete adapter or one for another model, values that are not finite.
    """
    if folder is None:
        yield weights
        return
    described = _read_config(folder)
    with _open_adapter(folder) as adapter:
        yield _apply(weights, adapter, described, config)


def _read_config(folder: Path) -> _AdapterConfig:
    path = folder / CONFIG_NAME
    if not path.is_file():
        seen = "missing" if folder.is_dir() else "missing, as is the folder"
        raise ChatGLMError(folder, CONFIG_NAME, seen, "a folder as PEFT saves a LoRA")
    fields = read_json_object(path)
    try:
        described = _AdapterConfig.model_validate(fields)
    except ValidationError as error:
        raise field_error(path, fields, error) from None
    for name in _OTHER_METHODS:
        if fields.get(name):
            raise ChatGLMError(path, name, repr(fields[name])[:40], "unset: it cannot be merged")
    for name in ("rank_pattern", "alpha_pattern"):
        _check_patterns(path, name, getattr(described, name) or {})
    return described


def _check_patterns(path: Path, field: str, patterns: Mapping[str, float]) -> None:
    for pattern in patterns:
        try:
            re.compile(_at_the_end(pattern))
        except re.error as error:
            raise ChatGLMError(path, field, f"{pattern!r} ({error})", "regular expressions") from None


def _open_adapter(folder: Path) -> Checkpoint:
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            return Checkpoint(folder, {folder / name: None})
    raise ChatGLMError(folder, "weights", "missing", " or ".join(WEIGHT_NAMES))


def _apply(
    weights: Checkpoint, adapter: Checkpoint, described: _AdapterConfig, config: ArchitectureConfig
) -> Checkpoint:
    whole, parts = _sorted(adapter)
    _check_saved_modules(weights, adapter.folder, described, whole)
    made = {name: _replacement(_target(weights, name, source, config), source) for name, source in whole.items()}
    for name, found in parts.items():
        target = _target(weights, name, next(iter(found.values())), config)
        made[name] = _merged(made.get(name, target), found, described)
    if not parts:
        raise ChatGLMError(adapter.folder, "weights", "without lora_A and lora_B", "a LoRA")
    folder = adapter.folder.resolve().name
    log.info("LoRA %s: %d merged and %d replaced tensors.", folder, len(parts), len(whole))
    return weights.replaced((), made.values())


def _sorted(adapter: Checkpoint) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Tensors that were trained as a whole, and the parts of those that were not, by names in the checkpoint."""
    whole: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name in adapter.names:
        tensor, inner = adapter[name], name.removeprefix(PREFIX)
        if inner == name:
            raise ChatGLMError(tensor.file, "tensor name", name, f"one that begins with {PREFIX}")
        if match := _PART.fullmatch(inner):
            place, key = parts.setdefault(f"{match[1]}.weight", {}), match[2] or match[3]
        elif "lora_" in inner:
            raise ChatGLMError(tensor.file, "tensor name", name, "lora_A.weight, lora_B.weight or a weight's own name")
        else:
            place, key = whole, _WRAPPER.sub("", inner)
        if key in place:
            raise ChatGLMError(tensor.file, name, f"there as {place[key].name} too", "one adapter")
        if tensor.dtype not in FLOATS:
            raise ChatGLMError(tensor.file, f"dtype of {name}", tensor.dtype, f"one of {', '.join(FLOATS)}")
        place[key] = tensor
    return whole, parts


def _check_saved_modules(
    weights: Checkpoint, folder: Path, described: _AdapterConfig, whole: Mapping[str, Tensor]
) -> None:
    for name in weights.names:
        module = name.rpartition(".")[0]
        for saved in described.modules_to_save or []:
            if f".{module}".endswith(f".{saved}") and name not in whole:
                raise ChatGLMError(folder, f"{PREFIX}{name}", "missing", f"a tensor, as modules_to_save has {saved}")


def _target(weights: Checkpoint, name: str, source: Tensor, config: ArchitectureConfig) -> Tensor:
    """The checkpoint's tensor that `source` is for."""
    if name not in weights:
        raise ChatGLMError(source.file, source.name, f"for {name}", "a tensor of the checkpoint")
    target, module = weights[name], architecture(config)
    if module.is_ignored(config, name):
        raise ChatGLMError(source.file, source.name, f"for {name}", "a tensor that the model reads")
    if name == module.EMBEDDING and config.tie_word_embeddings:
        # An adapter of one is none of the other, but the two are stored once.
        raise ChatGLMError(source.file, source.name, f"for {name}", "no adapter of an embedding tied to the LM head")
    if isinstance(target, QuantizedTensor) or target.dtype not in FLOATS:
        wanted = f"one of {', '.join(FLOATS)} to merge a LoRA: the original weights"
        raise ChatGLMError(target.file, f"dtype of {name}", target.dtype, wanted)
    return target


def _replacement(target: Tensor, source: Tensor) -> Tensor:
    _check_shape(source, target.shape, f"that of {target.name}")
    return _Replacement(target.name, source.file, source.shape, source.dtype, source.nbytes, source)


def _merged(target: Tensor, parts: Mapping[str, Tensor], described: _AdapterConfig) -> Tensor:
    """Linear layers: A [r, K], B [N, r]. Embeddings, whose rows are inputs: A [r, N], B [K, r]."""
    module = target.name.removesuffix(".weight")
    embedding = any(part.startswith("embedding") for part in parts)
    kinds = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    if embedding and described.use_dora:
        raise ChatGLMError(next(iter(parts.values())).file, "use_dora", f"for {target.name}", "for linear layers only")
    _check_parts(module, parts, (*kinds, "magnitude_vector") if described.use_dora else kinds)
    if len(target.shape) != 2:
        raise ChatGLMError(target.file, f"shape of {target.name}", list(target.shape), "two axes to merge a LoRA")
    a, b, magnitude = parts[kinds[0]], parts[kinds[1]], parts.get("magnitude_vector")
    outputs, inputs = target.shape[::-1] if embedding else target.shape
    rank = described.rank(module)
    _check_shape(a, (rank, inputs), f"r = {rank} and {target.name}")
    _check_shape(b, (outputs, rank), f"r = {rank} and {target.name}")
    if magnitude is not None:
        _check_shape(magnitude, (outputs,), f"the rows of {target.name}")
    for part in parts.values():
        checked(part, part.read())

    def linear(rows: Rows) -> np.ndarray:
        return b.rows(rows) @ a.read()

    def looked_up(rows: Rows) -> np.ndarray:
        return a.read()[:, rows].T @ b.read().T

    product, scale = looked_up if embedding else linear, described.scale(module)
    return _Merged(
        target.name, target.file, target.shape, target.dtype, target.nbytes, target, product, scale, magnitude
    )


def _check_parts(module: str, parts: Mapping[str, Tensor], wanted: tuple[str, ...]) -> None:
    file, names = next(iter(parts.values())).file, " and ".join(f"lora_{part}" for part in wanted)
    for part in wanted:
        if part not in parts:
            raise ChatGLMError(file, f"lora_{part} of {module}", "missing", names)
    for part in sorted(parts.keys() - set(wanted)):
        raise ChatGLMError(file, f"lora_{part} of {module}", "there", f"only {names}")


def _check_shape(tensor: Tensor, shape: tuple[int, ...], reason: str) -> None:
    if tensor.shape != shape:
        seen = list(tensor.shape)
        raise ChatGLMError(tensor.file, f"shape of {tensor.name}", seen, f"{list(shape)}, from {reason}")
