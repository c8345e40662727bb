"""Checkpoints that are stored quantized, written in the layouts of the originals and of GPTQ and AWQ.

What they stand for is read back from them element by element, without the package.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from golden_cases import V1, V2, write_checkpoint

from chatglm_ov.config import parse_config, read_config_json
from chatglm_ov.models import architecture

Tensors = dict[str, np.ndarray]
LINEARS = ("query_key_value.weight", "dense.weight", "dense_h_to_4h.weight", "dense_4h_to_h.weight")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The row that nibble 0, 1, ... of a word holds."""


# Writers


def in_rows(bits: int) -> Callable[[str, np.ndarray], Tensors]:
    def write(name: str, weight: np.ndarray) -> Tensors:
        scale = (np.abs(weight).max(axis=1) / (2 ** (bits - 1) - 1)).astype(np.float16)
        codes = np.rint(weight / scale[:, None].astype(np.float32)).astype(np.int8)
        if bits == 4:
            codes[:, 0] = -8
            codes = ((codes[:, 0::2] & 15) << 4 | codes[:, 1::2] & 15).astype(np.int8)
        return {name: codes, f"{name}_scale": scale}

    return write


def random_groups(weight: np.ndarray, group: int, zeros: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """codes [K, N], zero points and scales [groups, N]: any numbers are a weight to be read."""
    rng = np.random.default_rng(weight.shape)
    columns, rows = weight.shape[::-1]
    codes = rng.integers(0, 16, (columns, rows))
    zero = rng.integers(*zeros, (columns // group, rows), endpoint=True)
    scale = (rng.random((columns // group, rows)) * 0.02 + 1e-3).astype(np.float16)
    return codes, zero, scale


def words(numbers: np.ndarray, axis: int, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """Eight neighbours along an axis in 32 bits, the lowest nibble that of order[0]."""
    moved = np.moveaxis(numbers.astype(np.uint32), axis, -1)
    moved = moved.reshape(*moved.shape[:-1], -1, 8)[..., list(order)]
    packed = sum(moved[..., i] << np.uint32(4 * i) for i in range(8))
    return np.moveaxis(packed, -1, axis).view(np.int32)


def gptq(group: int, zeros: tuple[int, int] = (1, 16), offset: int = 1) -> Callable[[str, np.ndarray], Tensors]:
    def write(name: str, weight: np.ndarray) -> Tensors:
        base, size = name.removesuffix(".weight"), weight.shape[1] if group == -1 else group
        codes, zero, scale = random_groups(weight, size, zeros)
        return {
            f"{base}.qweight": words(codes, 0),
            f"{base}.qzeros": words(zero - offset, 1),
            f"{base}.scales": scale,
            f"{base}.g_idx": np.arange(len(codes), dtype=np.int32) // size,
        }

    return write


def awq(group: int) -> Callable[[str, np.ndarray], Tensors]:
    def write(name: str, weight: np.ndarray) -> Tensors:
        base = name.removesuffix(".weight")
        codes, zero, scale = random_groups(weight, group, (0, 15))
        return {
            f"{base}.qweight": words(codes, 1, AWQ_ORDER),
            f"{base}.qzeros": words(zero, 1, AWQ_ORDER),
            f"{base}.scales": scale,
        }

    return write


# The independent reading


def nibble(word: np.int32, number: int) -> int:
    return int(np.uint32(word) >> np.uint32(4 * number)) & 15


def read_rows(stored: Tensors, name: str) -> np.ndarray:
    codes, scale = stored[name], stored[f"{name}_scale"].astype(np.float32)
    if codes.shape[1] * 2 == stored["columns"][name]:
        wide = np.empty((len(codes), codes.shape[1] * 2), np.float32)
        for (row, i), byte in np.ndenumerate(codes.view(np.uint8)):
            for column, code in ((2 * i, byte >> 4), (2 * i + 1, byte & 15)):
                wide[row, column] = int(code) - 16 if code > 7 else int(code)
        codes = wide
    return codes.astype(np.float32) * scale[:, None]


def read_gptq(stored: Tensors, name: str, offset: int) -> np.ndarray:
    base = name.removesuffix(".weight")
    words, zeros, scales, groups = (stored[f"{base}.{kind}"] for kind in ("qweight", "qzeros", "scales", "g_idx"))
    values = np.empty((words.shape[1], len(groups)), np.float32)
    for (row, column), _ in np.ndenumerate(values):
        group = groups[column]
        zero = nibble(zeros[group, row // 8], row % 8) + offset
        code = nibble(words[column // 8, row], column % 8)
        values[row, column] = np.float32(scales[group, row]) * np.float32(code - zero)
    return values


def read_awq(stored: Tensors, name: str) -> np.ndarray:
    base = name.removesuffix(".weight")
    words, zeros, scales = (stored[f"{base}.{kind}"] for kind in ("qweight", "qzeros", "scales"))
    values = np.empty((scales.shape[1], len(words)), np.float32)
    group_size = len(words) // len(scales)
    for (row, column), _ in np.ndenumerate(values):
        at, group = AWQ_ORDER.index(row % 8), column // group_size
        difference = nibble(words[column, row // 8], at) - nibble(zeros[group, row // 8], at)
        values[row, column] = np.float32(scales[group, row]) * np.float32(difference)
    return values


@dataclass(frozen=True)
class Layout:
    """fields: of config.json. files: other JSON files."""

    write: Callable[[str, np.ndarray], Tensors]
    read: Callable[[Tensors, str], np.ndarray]
    fields: dict[str, Any]
    files: dict[str, Any] = field(default_factory=dict)
    like: Path = V2.checkpoint
    format: str = "int4"


def quantization(method: str, **fields: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, "bits": 4, **fields}}


def as_stored(stored: Tensors, name: str) -> np.ndarray:
    return read_gptq(stored, name, 1)


LAYOUTS = {
    "chatglm-int4": Layout(in_rows(4), read_rows, {"quantization_bit": 4}, like=V1.checkpoint),
    "chatglm-int8": Layout(in_rows(8), read_rows, {"quantization_bit": 8}, like=V1.checkpoint, format="int8"),
    "chatglm2-int4": Layout(in_rows(4), read_rows, {"quantization_bit": 4}),
    "gptq": Layout(gptq(32), as_stored, quantization("gptq", group_size=32, desc_act=False)),
    "gptq, zero points of 4 bits": Layout(gptq(64, (1, 15)), as_stored, quantization("gptq", group_size=64)),
    "gptq, one group": Layout(gptq(-1), as_stored, quantization("gptq", group_size=-1)),
    "gptq, its own file": Layout(
        gptq(32), as_stored, {}, {"quantize_config.json": {"bits": 4, "group_size": 32, "desc_act": False}}
    ),
    "gptq_v2": Layout(
        gptq(32, (0, 15), 0),
        lambda stored, name: read_gptq(stored, name, 0),
        quantization("gptq", group_size=32, checkpoint_format="gptq_v2"),
    ),
    "awq": Layout(awq(32), read_awq, quantization("awq", group_size=32, version="gemm")),
    "awq, its own file": Layout(
        awq(64), read_awq, {}, {"quant_config.json": {"w_bit": 4, "q_group_size": 64, "version": "GEMM"}}
    ),
}
SIZES = {"hidden_size": 128, "num_layers": 1}


@dataclass(frozen=True)
class Made:
    """A quantized checkpoint, what its linear weights stand for, and its other tensors in float32."""

    folder: Path
    linears: Tensors
    others: Tensors
    fields: dict[str, Any]


def make(
    layout: Layout, folder: Path, spoil: Callable[[Tensors], object] = lambda stored: None, features: int = 192
) -> Made:
    """features: of the MLP."""
    fields = {**read_config_json(layout.like), **SIZES}
    fields["inner_hidden_size" if layout.like == V1.checkpoint else "ffn_hidden_size"] = features
    shapes = architecture(config := parse_config(fields)).weight_shapes(config)
    rng = np.random.default_rng(0)
    weights = {name: (0.05 * rng.standard_normal(shape)).astype(np.float16) for name, shape in shapes.items()}
    linears = [name for name in weights if name.endswith(LINEARS)]
    stored = {name: tensor for name, tensor in weights.items() if name not in linears}
    for name in linears:
        stored |= layout.write(name, weights[name].astype(np.float32))
    spoil(stored)
    write_checkpoint(folder, layout.like, stored, **{**fields, **layout.fields})
    for name, contents in layout.files.items():
        (folder / name).write_text(json.dumps(contents))
    described: Any = {**stored, "columns": {name: weights[name].shape[1] for name in linears}}
    others = {name: stored[name].astype(np.float32) for name in weights if name in stored}
    values = {name: layout.read(described, name) for name in linears} if spoil.__name__ == "<lambda>" else {}
    return Made(folder, values, others, fields)
