"""The cache blocks of every level: their documented layout, and what `append` stores in them."""

# ruff: noqa: F811 (a fixture is imported)

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from attention_bounds import (  # noqa: F401
    BLOCK,
    HEAD_DIMS,
    STORED,
    Cache,
    attend,
    check,
    each_type,
    isa,
    key_part,
    random_query,
    value_part,
)
from page_end import at_page_end

from chatglm_ov.native import native, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no native library: {unavailable()}")


# The layout


@each_type
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_layout_is_the_documented_one(cache_type, head_dim):
    layout = native().CacheLayout(cache_type, 3, head_dim)
    padded, width = -(-head_dim // 16) * 16, np.dtype(STORED[cache_type]).itemsize
    assert layout.padded_dim == padded
    assert layout.value_offset == 32 * padded * width
    assert layout.key_scale_offset == 2 * layout.value_offset
    assert layout.value_scale_offset == layout.key_scale_offset + 128
    assert layout.block_bytes == layout.key_scale_offset + (256 if cache_type == "int8" else 0)
    numbers = np.arange(32 * padded).reshape(1, 32, padded)
    for index, arrange in ((layout.key_index, key_part), (layout.value_index, value_part)):
        places = [index(slot, d) for slot in range(32) for d in range(padded)]
        np.testing.assert_array_equal(arrange(numbers).ravel()[places], numbers.ravel())


# append


def encoded(cache_type, x):
    """Elements and scale that `append` makes of x [head_dim]."""
    if cache_type != "int8":
        return x.astype(STORED[cache_type]), np.float32(1)
    scale = np.abs(x).max() / np.float32(127)
    with np.errstate(invalid="ignore"):
        return (np.rint(np.clip(x / scale, -127, 127)) if scale > 0 else np.zeros_like(x)).astype(np.int8), scale


def tokens(head_dim):
    rng = np.random.default_rng(head_dim)
    outlier = rng.standard_normal(head_dim).astype(np.float32)
    outlier[head_dim // 2] = 1000
    # Halfway between two bf16 numbers, where the even one is below, and above.
    ties = np.resize(np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8], np.float32), head_dim)
    # Quotients by the scale 1 that lie halfway between integers.
    halves = np.resize(np.array([127, 0.5, 1.5, -2.5, -127], np.float32), head_dim)
    subnormal = np.resize(np.array([2.0**-149, 190 * 2.0**-149, -(2.0**-130)], np.float32), head_dim)
    plain = rng.standard_normal((3, head_dim)).astype(np.float32)
    return [*plain, outlier, ties, halves, subnormal, np.zeros(head_dim, np.float32), plain[0] * np.float32(1e36)]


@each_type
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_append_rounds_to_nearest_and_touches_its_slot_only(isa, cache_type, head_dim):
    layout = native().CacheLayout(cache_type, 1, head_dim)
    rng = np.random.default_rng(1)
    before = rng.integers(0, 256, layout.block_bytes, np.uint8)
    block = at_page_end(before)
    padded, expected = layout.padded_dim, before.copy()
    of_keys, of_values = (
        expected[offset : offset + layout.value_offset].view(STORED[cache_type]) for offset in (0, layout.value_offset)
    )
    for i, key in enumerate(tokens(head_dim)):
        slot, value = (0, 31, 16, 15, 7, 8, 22, 1, 30)[i], tokens(head_dim)[-1 - i]
        native().append(isa, cache_type, head_dim, block, slot, at_page_end(key), at_page_end(value))
        for elements, x, index, scales in (
            (of_keys, key, layout.key_index, layout.key_scale_offset),
            (of_values, value, layout.value_index, layout.value_scale_offset),
        ):
            places = [index(slot, d) for d in range(padded)]
            codes, scale = encoded(cache_type, x)
            elements[places] = np.pad(codes, (0, padded - head_dim))
            if cache_type == "int8":
                expected[scales + 4 * slot : scales + 4 * slot + 4] = np.frombuffer(scale.tobytes(), np.uint8)
        np.testing.assert_array_equal(block, expected)


def test_append_keeps_infinity_and_nan_in_bf16(isa):
    x = np.array([np.inf, -np.inf, np.nan, -np.nan, 3.4e38], np.float32)
    x = np.concatenate([x, np.array([0x7F800001, 0x7FFFFFFF], np.uint32).view(np.float32)])
    layout = native().CacheLayout("bf16", 1, len(x))
    block = np.zeros(layout.block_bytes, np.uint8)
    native().append(isa, "bf16", len(x), block, 3, x, x)
    keys = block[: layout.value_offset].view(ml_dtypes.bfloat16)
    stored = [float(keys[layout.key_index(3, d)]) for d in range(len(x))]
    np.testing.assert_array_equal(stored, [np.inf, -np.inf, np.nan, np.nan, np.inf, np.nan, np.nan])


@each_type
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["key", "value"])
def test_what_is_not_finite_spreads_to_who_sees_it(isa, cache_type, wrong, part):
    """A fault in a model shows as NaN in every type of cache."""
    rng = np.random.default_rng(8)
    block = np.zeros(native().CacheLayout(cache_type, 1, 20).block_bytes, np.uint8)
    for slot in range(6):
        token = dict(zip(("key", "value"), rng.standard_normal((2, 20)).astype(np.float32), strict=True))
        if slot == 4:
            token[part][7] = wrong
        native().append(isa, cache_type, 20, block, slot, token["key"], token["value"])
    cache = Cache(cache_type, block[None], *np.zeros((2, 6, 20)), np.zeros(6))
    query = np.abs(random_query(1, 20))
    assert np.isfinite(attend(isa, cache, query, 4, end=4)[0]).all()
    assert not np.isfinite(attend(isa, cache, query, 6)[0]).all()


@each_type
def test_attend_reads_what_append_wrote(isa, cache_type):
    rng = np.random.default_rng(7)
    keys, values = rng.standard_normal((2, 45, 20)).astype(np.float32)
    blocks = np.full((2, native().CacheLayout(cache_type, 1, 20).block_bytes), 0xFF, np.uint8)
    decoded = []
    for slot, token in enumerate(zip(keys, values, strict=True)):
        native().append(isa, cache_type, 20, blocks[slot // BLOCK], slot % BLOCK, *token)
        decoded.append([codes.astype(np.float64) * scale for codes, scale in (encoded(cache_type, x) for x in token)])
    scales = np.array([encoded(cache_type, value)[1] for value in values], np.float64)
    cache = Cache(cache_type, blocks, *np.array(decoded).transpose(1, 0, 2), scales)
    check(isa, cache, random_query(5, 20), 45)
