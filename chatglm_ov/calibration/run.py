"""A calibration from one end to the other: the model is run on the text once, and every int4 and int8 weight is chosen
when its input is there.

What was chosen is kept in files, a weight each, and read by the conversion as if the checkpoint had it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor as Values

from chatglm_ov.calibration.eager import EagerLowering
from chatglm_ov.calibration.moments import InputMoments
from chatglm_ov.calibration.needs import INT8_ROWS
from chatglm_ov.calibration.rounding import LEVELS, ROWS, Compensation, Grid, clipped, grouped
from chatglm_ov.calibration.scaling import column_scales
from chatglm_ov.checkpoint.files import open_weight_file, save_safetensors
from chatglm_ov.checkpoint.quantized import Parts, QuantizedTensor
from chatglm_ov.checkpoint.reader import Checkpoint, Rows, Tensor, checked
from chatglm_ov.config import ArchitectureConfig
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.models import architecture
from chatglm_ov.models.folds import Fold
from chatglm_ov.system.processors import quota_threads
from chatglm_ov.weight_formats import WeightFormat, pack_u4, unpack_u4

Report = Callable[[str], None]
"""Called with the name of each weight that was chosen, once for each model format."""


def calibrate(
    config: ArchitectureConfig,
    weights: Checkpoint,
    formats: Mapping[str, Mapping[str, WeightFormat]],
    sequences: Sequence[np.ndarray],
    methods: Sequence[str],
    folder: Path,
    report: Report,
    prefix: bool = False,
) -> dict[str, Checkpoint]:
    """The weights for each model format, with those that `formats` has for it as int4 and int8. sequences: int64 [N]
    each. folder: for what is chosen; it must stay as long as the result is used. prefix: the model has a trained one,
    which the text is run without. Raises ChatGLMError for weights that are no numbers."""
    folds = architecture(config).input_folds(config) if "awq" in methods else {}
    folds = {name: fold for name, fold in folds.items() if not (prefix and fold.cached)}
    models = {model: _Chosen(weights, folder / model) for model in formats}

    def observe(name: str, x: np.ndarray) -> None:
        wanted = {model: found[name] for model, found in formats.items() if name in found}
        if not wanted or any(name in models[model] for model in wanted):
            return
        moments = InputMoments.of(x)
        _check_moments(weights[name], moments)
        # Of int8 before int4, for which the moments are scaled.
        for fmt in sorted(set(wanted.values()), key=lambda fmt: fmt.name == "int4"):
            choice = _choose(weights[name], fmt, moments, methods, folds.get(name))
            for model in (model for model, other in wanted.items() if other == fmt):
                models[model].add(name, choice)
                report(name)

    with _threads_in_quota():
        architecture(config).build(config, EagerLowering(weights, config, sequences, observe))
    return {model: chosen.checkpoint() for model, chosen in models.items()}


@contextmanager
def _threads_in_quota() -> Iterator[None]:
    """torch with no more threads than the quota gives it: they wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, quota_threads() or before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Choice:
    """parts: what is stored, by name. divisors: what to divide the rows of other tensors by."""

    format: WeightFormat
    parts: dict[str, np.ndarray]
    divisors: dict[str, np.ndarray]


def _check_moments(tensor: Tensor, moments: InputMoments) -> None:
    # What lies beside the diagonal is no larger than the two on it.
    if not torch.isfinite(moments.second.diagonal()).all():
        raise ChatGLMError(tensor.file, f"input of {tensor.name}", "infinite or not a number", "finite activations")


def _choose(
    tensor: Tensor, fmt: WeightFormat, moments: InputMoments, methods: Sequence[str], fold: Fold | None
) -> _Choice:
    if fmt.name == "int8":
        return _Choice(fmt, _int8_parts(tensor, fmt, moments), {})
    weight = torch.from_numpy(checked(tensor, tensor.read(), fmt.largest))
    group = fmt.group_size(weight.shape[1])
    divisors: dict[str, np.ndarray] = {}
    if fold is not None:
        rows = torch.arange(weight.shape[1]) if fold.rows is None else torch.from_numpy(fold.rows)
        scale = column_scales(weight, moments, group, rows)
        weight *= scale
        moments.divide_(scale)
        divisors = dict.fromkeys(fold.into, _by_row(rows, scale))
    grid = clipped(weight, moments.second.diagonal(), group)
    codes = Compensation(moments).codes(weight, grid, group) if "gptq" in methods else _nearest(weight, grid, group)
    parts = {
        "codes": pack_u4(codes.numpy()).reshape(len(codes), -1),
        "zero_point": grid.zero_point.to(torch.uint8).numpy(),
        "scale": grid.scale.half().numpy(),
    }
    return _Choice(fmt, parts, divisors)


def _int8_parts(tensor: Tensor, fmt: WeightFormat, moments: InputMoments) -> dict[str, np.ndarray]:
    """Compensated codes int8 [N, K] and scales float32 [N, 1], some rows at a time: an LM head is large."""
    count, columns = tensor.shape
    codes, scales = np.empty((count, columns), np.int8), np.empty((count, 1), np.float32)
    compensation, importance = Compensation(moments), moments.second.diagonal()
    for start in range(0, count, INT8_ROWS):
        rows = slice(start, min(count, start + INT8_ROWS))
        weight = torch.from_numpy(checked(tensor, tensor.rows(rows), fmt.largest))
        grid = clipped(weight, importance, columns, "int8")
        codes[rows] = compensation.codes(weight, grid, columns).short().sub_(LEVELS["int8"] // 2).numpy()
        scales[rows] = grid.scale[..., 0].numpy()
    return {"codes": codes, "scale": scales}


def _nearest(weight: Values, grid: Grid, group: int) -> Values:
    """Codes uint8 [N, K], some rows at a time: what they are computed from is four times as large."""
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        block = grid.rows(rows).codes(grouped(weight[rows], group))
        codes[rows] = block.reshape_as(weight[rows])
    return codes


def _by_row(rows: Values, scale: Values) -> np.ndarray:
    """Factors by row: float32 [last row + 1], 1 where no column is made."""
    factors = torch.ones(int(rows.max()) + 1)
    factors[rows] = scale
    return factors.numpy()


class _Chosen:
    """The weights chosen so far, a file each."""

    def __init__(self, weights: Checkpoint, folder: Path):
        folder.mkdir()
        self._weights, self._folder = weights, folder
        self._files: dict[str, tuple[WeightFormat, Path]] = {}
        self._divisors: dict[str, np.ndarray] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def add(self, name: str, choice: _Choice) -> None:
        file = self._folder / f"{len(self._files)}.safetensors"
        save_safetensors(choice.parts, file)
        self._files[name] = choice.format, file
        self._divisors.update(choice.divisors)

    def checkpoint(self) -> Checkpoint:
        added: list[Tensor] = [self._quantized(name, *found) for name, found in self._files.items()]
        added += [
            _DividedTensor.of(self._weights[name], divisors)
            for name, divisors in self._divisors.items()
            if name not in self._files
        ]
        return self._weights.replaced((), added)

    def _quantized(self, name: str, fmt: WeightFormat, file: Path) -> QuantizedTensor:
        original, divisors = self._weights[name], self._divisors.get(name)
        stored = open_weight_file(file)
        columns = original.shape[1]

        def parts(rows: Rows) -> Parts:
            codes, scale = (stored[part].view()[rows] for part in ("codes", "scale"))
            scale = scale.astype(np.float32)
            if divisors is not None:
                scale = _divided(scale, rows, divisors)
            if fmt.name == "int8":
                return codes.copy(), scale
            if divisors is not None:
                scale = _float16(scale)
            zero_point = stored["zero_point"].view()[rows].copy()
            return unpack_u4(codes).reshape(len(codes), -1, fmt.group_size(columns)), zero_point, scale

        return QuantizedTensor(name, original.file, original.shape, fmt.name, original.nbytes, fmt, parts)


@dataclass(frozen=True)
class _DividedTensor(Tensor):
    """A tensor whose rows are divided by factors."""

    original: Tensor
    divisors: np.ndarray

    @classmethod
    def of(cls, original: Tensor, divisors: np.ndarray) -> _DividedTensor:
        return cls(original.name, original.file, original.shape, original.dtype, original.nbytes, original, divisors)

    def rows(self, rows: Rows) -> np.ndarray:
        return _divided(self.original.rows(rows), rows, self.divisors)

    def read(self) -> np.ndarray:
        return self.rows(slice(None))


def _float16(scale: np.ndarray) -> np.ndarray:
    """The nearest float16 values that are neither 0 nor infinite, as float32."""
    limits = np.finfo(np.float16)
    return np.clip(scale, limits.smallest_subnormal, limits.max).astype(np.float16).astype(np.float32)


def _divided(values: np.ndarray, rows: Rows, divisors: np.ndarray) -> np.ndarray:
    """values [n, ...], rows of a tensor of any number of rows; those behind the divisors stay."""
    numbers = np.arange(len(values)) + (rows.start or 0) if isinstance(rows, slice) else np.asarray(rows)
    factors = np.append(divisors, np.float32(1))[np.minimum(numbers, len(divisors))]
    return values / factors.reshape(-1, *[1] * (values.ndim - 1))
