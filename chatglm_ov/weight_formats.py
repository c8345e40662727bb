"""Weight formats: how the rows of a linear weight [N, K] are stored.

Every row is quantized by itself, so that a weight can be encoded in blocks of rows. The parts of a format are the
operands of `weight = (data - zero_point) * scale`, in the order and shapes that OpenVINO plugins keep compressed when
they execute a MatMul; `packing` lays the same numbers out for our own kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from math import gcd

import ml_dtypes
import numpy as np

GROUP_SIZES = (32, 64, 128)
"""Columns that can share a scale and a zero point in int4: smaller groups would save little over int8."""
GROUP_SIZE = 128

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
    them, 4-bit ones as uint8. No weight may be larger than `largest`. widest_group: see `group_size`; 0 without
    groups."""

    name: str
    parts: Callable[[int], tuple[Part, ...]]
    encode: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    largest: float = float("inf")
    widest_group: int = 0

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return sum(part.nbytes(shape[0]) for part in self.parts(shape[1]))

    def group_size(self, columns: int) -> int:
        """Columns that share a scale: `widest_group` where it divides the columns, else the largest power of two that
        does. 0 without groups."""
        return gcd(columns, self.widest_group) if self.widest_group else 0

    def fits(self, columns: int) -> bool:
        """Whether a weight of so many columns can be stored."""
        return not self.widest_group or self.group_size(columns) in GROUP_SIZES

    def decode(self, parts: tuple[np.ndarray, ...]) -> np.ndarray:
        """float32 [n, K] of what `encode` makes: (data - zero_point) * scale."""
        named = dict(zip((part.name for part in self.parts(1)), parts, strict=True))
        values = named["weight"].astype(np.float32)
        if "zero_point" in named:
            values -= named["zero_point"]
        if "scale" in named:
            values *= named["scale"]
        return values.reshape(len(values), -1)


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
    levels = block / scale
    return np.rint(levels, out=levels).astype(np.int8), scale


def _int4_parts(widest_group: int, zero_point_bits: int, columns: int) -> tuple[Part, ...]:
    group = gcd(columns, widest_group)
    groups = columns // group
    return (
        Part("weight", "u4", (groups, group), 4),
        Part("zero_point", f"u{zero_point_bits}", (groups, 1), zero_point_bits),
        Part("scale", "f32", (groups, 1), 32),
    )


def _encode_int4(widest_group: int, block: np.ndarray) -> tuple[np.ndarray, ...]:
    """Asymmetric: a group's range, stretched to hold 0, is cut into 15 steps of a float16 size."""
    groups = block.reshape(block.shape[0], -1, gcd(block.shape[1], widest_group))
    low = np.minimum(groups.min(axis=2, keepdims=True), 0)
    high = np.maximum(groups.max(axis=2, keepdims=True), 0)
    scale = _float16_from((high - low) / np.float32(15))
    scale[scale == 0] = 1
    zero_point = np.rint(-low / scale)
    levels = groups / scale
    np.rint(levels, out=levels)
    levels += zero_point
    np.clip(levels, 0, 15, out=levels)
    return levels.astype(np.uint8), zero_point.astype(np.uint8), scale


def _float16_from(values: np.ndarray) -> np.ndarray:
    """The smallest float16 values that are not below `values` >= 0, as float32."""
    rounded = values.astype(np.float16)
    low = rounded < values
    rounded[low] = np.nextafter(rounded[low], np.float16(np.inf))
    return rounded.astype(np.float32)


def pack_u4(values: np.ndarray) -> np.ndarray:
    """Two values 0..15 a byte, the earlier one in the low nibble; an odd last one stands alone."""
    flat = values.astype(np.uint8, copy=False).ravel()
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return flat[0::2] | (flat[1::2] << 4)


def unpack_u4(packed: np.ndarray) -> np.ndarray:
    """What `pack_u4` packed, uint8; one more than that where the last one stood alone."""
    return np.stack([packed & 15, packed >> 4], axis=-1).ravel()


@cache
def int4_format(widest_group: int, zero_point_bits: int = 4) -> WeightFormat:
    """int4 in groups of up to so many columns, one of GROUP_SIZES. zero_point_bits: 8 for zero points of others that
    are not in 0..15."""
    parts, encode = partial(_int4_parts, widest_group, zero_point_bits), partial(_encode_int4, widest_group)
    return WeightFormat("int4", parts, encode, LARGEST_INT4, widest_group)


FORMATS = {
    "f32": WeightFormat("f32", _f32_parts, lambda block: (block,)),
    "bf16": WeightFormat("bf16", _bf16_parts, lambda block: (block.astype(ml_dtypes.bfloat16),)),
    "int8": WeightFormat("int8", _int8_parts, _encode_int8),
    "int4": int4_format(GROUP_SIZE),
}
