"""Caches of one head, and attention over them against double precision with bounds from the operands.

The elements of a cache are put in their places by numpy, as csrc/kernels/cache_layout.h documents them, and compared
as stored: rounding to bf16 or int8 is part of `append` only. u is half a unit in the last place of float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from chatglm_ov.native import native

U = 2.0**-24
BF16_U = 2.0**-8
WORD_U = (1 + 4 * U) / (2 * 32767)
TINY = 2.0**-126
BLOCK = 32
STEP = 256  # slots between two changes of a row's maximum
LEVELS = ("avx2", "avx_vnni", "avx512", "avx512_bf16", "amx", "amx_emulated")
TYPES = ("f32", "bf16", "int8")
STORED = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "int8": np.int8}
HEAD_DIMS = (128, 64, 80, 16, 8, 20, 7)

each_type = pytest.mark.parametrize("cache_type", TYPES)


@pytest.fixture(params=LEVELS)
def isa(request):
    present = native().present_isa_levels()
    needed = "avx512_bf16" if request.param == "amx_emulated" else request.param
    if needed not in present:
        pytest.skip(f"this machine has no {needed}" + (f", which {request.param} needs" * (needed != request.param)))
    return request.param


@dataclass
class Cache:
    """One head's blocks u8 [n, block_bytes], and the keys and values in them as float64 [slots, head_dim], with the
    scales [slots] of the values."""

    type: str
    blocks: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    value_scales: np.ndarray

    @property
    def slots(self):
        return len(self.keys)

    @property
    def head_dim(self):
        return self.keys.shape[1]


def key_part(elements):
    """[blocks, 32, D'] to [blocks, 2 halves, D' / 2, 16 slots, 2 dims]."""
    return elements.reshape(len(elements), 2, 16, -1, 2).transpose(0, 1, 3, 2, 4)


def value_part(elements):
    """[blocks, 32, D'] to [blocks, D' / 16, 16 pairs, 16 dims, 2 slots]."""
    return elements.reshape(len(elements), 16, 2, -1, 16).transpose(0, 3, 1, 4, 2)


def part_bytes(part):
    return np.ascontiguousarray(part).view(np.uint8).reshape(len(part), -1)


def quantized(rng, x):
    """Some int8 codes and scales near x; not those of `append`."""
    scale = (np.abs(x).max(axis=1, initial=1e-3) / 127 * rng.uniform(1, 1.2, len(x))).astype(np.float32)
    return np.rint(x / scale[:, None]), scale


def make_cache(cache_type, keys, values, garbage=0xFF):
    """Every byte that belongs to no slot of keys, values [slots, head_dim] is `garbage`: 0xFF makes NaN."""
    rng = np.random.default_rng(len(keys))
    slots, head_dim = keys.shape
    count, padded = -(-slots // BLOCK), -(-head_dim // 16) * 16
    parts, scales, stored = [], [], []
    for x, arrange in ((keys, key_part), (values, value_part)):
        codes, scale = quantized(rng, x) if cache_type == "int8" else (x, np.ones(slots, np.float32))
        elements = np.full((count * BLOCK, padded * np.dtype(STORED[cache_type]).itemsize), garbage, np.uint8)
        elements = elements.view(STORED[cache_type])
        elements[:slots] = 0
        elements[:slots, :head_dim] = codes
        stored.append(elements[:slots, :head_dim].astype(np.float64) * scale.astype(np.float64)[:, None])
        parts.append(part_bytes(arrange(elements.reshape(count, BLOCK, padded))))
        of_slots = np.full(count * BLOCK * 4, garbage, np.uint8).view(np.float32)
        of_slots[:slots] = scale
        scales.append(of_slots.view(np.uint8).reshape(count, -1))
    blocks = np.concatenate(parts + (scales if cache_type == "int8" else []), axis=1)
    return Cache(cache_type, blocks, *stored, scale.astype(np.float64))


def random_cache(cache_type, head_dim, slots, seed=0, garbage=0xFF):
    """Keys and values with a few dims 30 times the rest."""
    rng = np.random.default_rng([head_dim, slots, seed])
    keys, values = rng.standard_normal((2, slots, head_dim))
    keys[:, ::13] *= 30
    values[:, 1::11] *= 30
    return make_cache(cache_type, keys, values + 0.5, garbage)


def random_query(rows, head_dim, seed=0):
    rng = np.random.default_rng([rows, head_dim, seed])
    return (rng.standard_normal((rows, head_dim)) / np.sqrt(head_dim)).astype(np.float32)


def attend(isa, cache, query, visible, begin=0, end=None):
    visible = np.broadcast_to(np.asarray(visible, np.int64), len(query)).copy()
    end = cache.slots if end is None else end
    return native().attend(isa, cache.type, cache.head_dim, query, visible, cache.blocks, begin, end)


def multiplies_in_bf16(isa, cache_type):
    return cache_type == "bf16" and isa in ("avx512_bf16", "amx", "amx_emulated")


def multiplies_words(isa, cache_type):
    return cache_type == "int8" and isa not in ("avx2", "avx_vnni")


def score_bound(isa, cache_type, k, q):
    """A score is a chain of D' multiply-adds (and int8's scale): off by B = (D' + 2) u sum |q| |k|. Where a bf16 cache
    is multiplied in bf16, queries are two bf16 numbers. Where an int8 cache is multiplied in words, the elements of a
    query are off by half a 32767th of the largest, and the sum is exact but for its factors."""
    size, padded = np.abs(k) @ np.abs(q), -(-len(q) // 16) * 16
    if multiplies_in_bf16(isa, cache_type):
        return size * (BF16_U**2 + (2 * padded + 4) * U)
    if multiplies_words(isa, cache_type):
        return size * 6 * U + np.abs(k).sum(axis=1) * WORD_U * np.abs(q).max()
    return size * (padded + 2) * U


def weight_error(cache, p, begin, n):
    """What words of p times the scale of its value add to the error of a context: half a 32767th of the largest of each
    step. p [n] of the slots from `begin` on, with what it is off by."""
    scales = cache.value_scales[begin : begin + n]
    largest = np.maximum.reduceat(p * scales, np.arange(0, n, STEP)).repeat(STEP)[:n]
    return (WORD_U * largest / scales) @ np.abs(cache.values[begin : begin + n])


def check(isa, cache, query, visible, begin=0, end=None):
    """With a score off by B (`score_bound`), p = exp(score - max) is off, relatively, by B, by the rounding of its
    argument, |score - max| u, by a unit in the last place (2 u) and int8's scale (u), and by 3 u for every later step,
    whose exp and product bring it to a new max; all relative to the max that is returned. Its sum adds up in at most
    32 + 4 + steps roundings, the context in a chain over the slots. p below the smallest normal number is 0.

    Where a bf16 cache is multiplied in bf16, p is a bf16 number; `weight_error` has that of words.
    """
    in_bf16, in_words = multiplies_in_bf16(isa, cache.type), multiplies_words(isa, cache.type)
    end = cache.slots if end is None else end
    visible = np.broadcast_to(visible, len(query))
    context, peak, total = attend(isa, cache, query, visible, begin, end)
    for row, q in enumerate(query.astype(np.float64)):
        n = max(0, min(end, visible[row]) - begin)
        if n == 0:
            assert peak[row] == -np.inf
            assert total[row] == 0
            assert not context[row].any()
            continue
        k, v = cache.keys[begin : begin + n], cache.values[begin : begin + n]
        scores, steps = k @ q, -(-n // STEP)
        bound = score_bound(isa, cache.type, k, q)
        assert abs(peak[row] - scores.max()) <= bound.max()
        below = np.abs(scores - peak[row]) + bound
        relative = np.expm1(bound + below * U + (3 + 3 * steps) * U + (BF16_U if in_bf16 else 0))
        p = np.exp(scores - peak[row])
        assert abs(total[row] - p.sum()) <= p @ (relative + (36 + steps + (n if in_bf16 else 0)) * U) + n * TINY
        error = (p * (relative + (n + 2) * U)) @ np.abs(v) + TINY * np.abs(v).sum(axis=0)
        if in_words:
            error += weight_error(cache, p * (1 + relative), begin, n)
        assert (np.abs(context[row] - p @ v) <= error).all()
