"""Weight formats: how the rows of a linear weight [N, K] are stored.

Every row is quantized by itself, so that a weight can be encoded in blocks of rows. The parts of a format are the
operands of `weight = (data - zero_point) * scale`, in the order and shapes that OpenVINO plugins keep compressed when
they execute a MatMul; `packing` lays the same numbers out for our own kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

import ml_dtypes
import numpy as np

GROUP_SIZE = 128
"""Columns that share a scale and a zero point in int4."""
SMALLEST_GROUP = 32
"""Smaller groups would save little over int8, and the kernels take none."""

SMALLEST_SCALE = np.finfo(np.float32).tiny
"""A smaller scale of int8 is subnormal and has lost digits: what it would cover is stored as zeros."""

LARGEST_INT4 = 15 / 2 * float(np.finfo(np.float16).max)
"""Weights up to this size have a range that 15 steps of a float16 scale cover."""


@dataclass(frozen=True)
class Part:
    """One stored array of a weight.

    element_type: OpenVINO's name of it. shape: for a weight of n rows, with n left out. bits: per element.
    """

    name: str
    element_type: str
    shape: tuple[int, ...]
    bits: int

    def nbytes(self, rows: int) -> int:
        return (rows * int(np.prod(self.shape)) * self.bits + 7) // 8

    def stored(self, values: np.ndarray) -> np.ndarray:
        """Elements of the part as an array of its bytes: 4-bit ones, which come one a byte, two a byte."""
        return pack_u4(values) if self.bits == 4 else values


@dataclass(frozen=True)
class WeightFormat:
    """parts(K) lists the stored arrays; encode(block) turns float32 [n, K] into the elements [n, *shape] of each of
    them, 4-bit ones as uint8. No weight may be larger than `largest`."""

    name: str
    parts: Callable[[int], tuple[Part, ...]]
    encode: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    largest: float = float("inf")

    def nbytes(self, shape: tuple[int, int]) -> int:
        return sum(part.nbytes(shape[0]) for part in self.parts(shape[1]))


def _f32_parts(columns: int) -> tuple[Part, ...]:
    return (Part("weight", "f32", (columns,), 32),)


def _bf16_parts(columns: int) -> tuple[Part, ...]:
    return (Part("weight", "bf16", (columns,), 16),)


def _int8_parts(columns: int) -> tuple[Part, ...]:
    return (Part("weight", "i8", (columns,), 8), Part("scale", "f32", (1,), 32))


def _encode_int8(block: np.ndarray) -> tuple[np.ndarray, ...]:
    """Symmetric, one scale a row: scale = max|w| / 127, so that the largest weight is exact."""
    scale = np.abs(block).max(axis=1, keepdims=True) / np.float32(127)
    scale[scale < SMALLEST_SCALE] = 1
    return np.rint(block / scale).astype(np.int8), scale


def group_size(columns: int) -> int:
    """128 where it divides the columns, else the largest power of two that does: 32, 64 or 128 in int4."""
    return gcd(columns, GROUP_SIZE)


def _int4_parts(columns: int) -> tuple[Part, ...]:
    group = group_size(columns)
    groups = columns // group
    return (
        Part("weight", "u4", (groups, group), 4),
        Part("zero_point", "u4", (groups, 1), 4),
        Part("scale", "f32", (groups, 1), 32),
    )


def _encode_int4(block: np.ndarray) -> tuple[np.ndarray, ...]:
    """Asymmetric: a group's range, stretched to hold 0, is cut into 15 steps of a float16 size."""
    groups = block.reshape(block.shape[0], -1, group_size(block.shape[1]))
    low = np.minimum(groups.min(axis=2, keepdims=True), 0)
    high = np.maximum(groups.max(axis=2, keepdims=True), 0)
    scale = _float16_from((high - low) / np.float32(15))
    scale[scale == 0] = 1
    zero_point = np.rint(-low / scale)
    levels = np.clip(np.rint(groups / scale) + zero_point, 0, 15)
    return levels.astype(np.uint8), zero_point.astype(np.uint8), scale


def _float16_from(values: np.ndarray) -> np.ndarray:
    """The smallest float16 values that are not below `values` >= 0, as float32."""
    rounded = values.astype(np.float16)
    low = rounded < values
    rounded[low] = np.nextafter(rounded[low], np.float16(np.inf))
    return rounded.astype(np.float32)


def pack_u4(values: np.ndarray) -> np.ndarray:
    """Two values 0..15 a byte, the earlier one in the low nibble; an odd last one stands alone."""
    flat = values.astype(np.uint8).ravel()
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return flat[0::2] | (flat[1::2] << 4)


FORMATS = {
    "f32": WeightFormat("f32", _f32_parts, lambda block: (block,)),
    "bf16": WeightFormat("bf16", _bf16_parts, lambda block: (block.astype(ml_dtypes.bfloat16),)),
    "int8": WeightFormat("int8", _int8_parts, _encode_int8),
    "int4": WeightFormat("int4", _int4_parts, _encode_int4, LARGEST_INT4),
}


def stored_format(name: str, columns: int, table: bool = False) -> WeightFormat:
    """The format that a weight [N, columns] has in a model of the format `name`. What int4 does not suit is int8:
    tables (embedding and LM head), where 4 bits cost more accuracy than they save memory, and columns that 32 does
    not divide."""
    if name == "int4" and (table or group_size(columns) < SMALLEST_GROUP):
        return FORMATS["int8"]
    return FORMATS[name]
