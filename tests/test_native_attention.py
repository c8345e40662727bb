"""The attention kernels of every level, against double precision with bounds from the operands.

The elements of a cache are put in their places by numpy, as csrc/kernels/cache_layout.h documents them, and compared
as stored: rounding to bf16 or int8 is part of `append` only. u is half a unit in the last place of float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from page_end import at_page_end

from chatglm_ov.native import native, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no native library: {unavailable()}")

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


# attend


@each_type
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention_is_near_double_precision(isa, cache_type, head_dim):
    """All numbers of rows, ranges that end anywhere, rows that see more, less, or none of them."""
    cache = random_cache(cache_type, head_dim, 333)
    for rows in range(1, 17):
        query = random_query(rows, head_dim)
        end = 333 - rows * (rows + 1) // 2
        visible = end + 2 - 3 * np.arange(rows)[::-1]
        visible[rows // 2] = (0, 1, end, 10**6)[rows % 4]
        begin = (0, 32, 192)[rows % 3]
        check(isa, cache, query, visible, begin, end)


@each_type
@pytest.mark.parametrize(
    ("begin", "end"), [(0, 1), (0, 2), (0, 17), (32, 65), (64, 64), (0, 256), (256, 257), (0, 999)]
)
def test_ranges_that_end_anywhere(isa, cache_type, begin, end):
    cache = random_cache(cache_type, 64, end)
    for rows in (1, 2, 7, 16):
        check(isa, cache, random_query(rows, 64), end, begin)


@each_type
@pytest.mark.parametrize("rows", [1, 6, 16])
def test_a_long_cache(isa, cache_type, rows):
    cache = random_cache(cache_type, 128, 5000)
    check(isa, cache, random_query(rows, 128), 5000 - np.arange(rows))


@each_type
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_do_not_overflow(isa, cache_type, sign):
    """Scores about 1e4 and -1e4, rising so that each step of slots has a new max."""
    slots, head_dim = 600, 32
    rng = np.random.default_rng(0)
    keys, values = rng.uniform(0.9, 1.1, (2, slots, head_dim))
    keys *= np.linspace(0.5, 1, slots)[:, None]
    cache = make_cache(cache_type, keys, values)
    query = np.full((16, head_dim), sign * 1e4 / head_dim, np.float32)
    for result in attend(isa, cache, query, slots):
        assert np.isfinite(result).all()
    check(isa, cache, query, slots)


@pytest.mark.parametrize("head_dim", [512, 528])
def test_sums_of_long_heads_do_not_overflow(isa, head_dim):
    """Up to 512 dims a sum of 16-bit words fits 32 bits; these have the largest codes in all dims."""
    cache = make_cache("int8", np.ones((40, head_dim)), np.ones((40, head_dim)))
    query = np.full((16, head_dim), 1 / head_dim, np.float32)
    context, peak, total = attend(isa, cache, query, 40)
    scores = cache.keys @ query[0].astype(np.float64)
    p = np.exp(scores - scores.max())
    # Words or a chain of multiply-adds: 2^-15 of the scores, which are about 1.
    np.testing.assert_allclose(peak, scores.max(), rtol=2**-14)
    np.testing.assert_allclose(total, p.sum(), rtol=2**-12)
    np.testing.assert_allclose(context / total[:, None], np.tile(p @ cache.values / p.sum(), (16, 1)), rtol=2**-12)


@pytest.mark.parametrize("rows", [1, 16])
def test_exp_is_off_by_one_unit_at_most(isa, rows):
    """Scores are x, exactly, and values a unit matrix: the context is p = exp(x - 0)."""
    rng = np.random.default_rng(0)
    for low in (-1e-3, -1, -20, -87.33):
        x = np.append(rng.uniform(low, 0, 127), 0).astype(np.float32)
        keys = np.zeros((128, 128))
        keys[:, 0] = x
        query = np.zeros((rows, 128), np.float32)
        query[:, 0] = 1
        context, _, _ = attend(isa, make_cache("f32", keys, np.eye(128)), query, 128)
        exact = np.exp(x.astype(np.float64))
        assert (np.abs(context - exact) <= np.spacing(exact.astype(np.float32))).all()


def test_a_score_far_below_the_maximum_weighs_nothing(isa):
    keys = np.zeros((40, 16))
    keys[:, 0] = np.resize([0, -88, -1e3, -1e30], 40)
    query = np.zeros((1, 16), np.float32)
    query[:, 0] = 1
    context, peak, total = attend(isa, make_cache("f32", keys, np.ones((40, 16))), query, 40)
    assert (peak[0], total[0]) == (0, 10)
    assert (context == 10).all()


# What must not matter


@each_type
@pytest.mark.parametrize("head_dim", [128, 20])
def test_a_row_does_not_depend_on_the_others(isa, cache_type, head_dim):
    """Bit for bit: alone, among others, and whatever the others see."""
    cache = random_cache(cache_type, head_dim, 301)
    query = random_query(16, head_dim)
    visible = 301 - 15 + np.arange(16)
    together = attend(isa, cache, query, visible)
    for rows in (slice(0, 1), slice(3, 4), slice(2, 9), slice(9, 16), slice(0, 15)):
        for whole, part in zip(together, attend(isa, cache, query[rows].copy(), visible[rows]), strict=True):
            np.testing.assert_array_equal(part, whole[rows])


@each_type
@pytest.mark.parametrize("end", [1, 33, 270, 287])
def test_what_lies_behind_the_end_does_not_matter(isa, cache_type, end):
    """Bit for bit: 0xFF is NaN in floats and scales, 0x7F the largest int8 and huge floats."""
    for rows in (1, 3, 16):
        results = [
            attend(isa, random_cache(cache_type, 80, end, garbage=garbage), random_query(rows, 80), 10**6)
            for garbage in (0, 0xFF, 0x7F)
        ]
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                np.testing.assert_array_equal(a, b)


@each_type
def test_slots_that_no_row_sees_do_not_matter(isa, cache_type):
    cache, shorter = random_cache(cache_type, 64, 300), random_cache(cache_type, 64, 300)
    shorter.blocks[7:] = 0xFF
    query, visible = random_query(16, 64), 223 - np.arange(16)
    for a, b in zip(attend(isa, cache, query, visible), attend(isa, shorter, query, visible), strict=True):
        np.testing.assert_array_equal(a, b)


@each_type
def test_nothing_is_read_behind_the_blocks(isa, cache_type):
    for slots, head_dim in ((1, 8), (96, 64), (257, 80), (320, 128)):
        cache = random_cache(cache_type, head_dim, slots)
        cache.blocks = at_page_end(cache.blocks)
        for rows in (1, 5, 16):
            check(isa, cache, at_page_end(random_query(rows, head_dim)), at_page_end(np.full(rows, slots)))


# merge


def folded(isa, parts):
    """One row of several partial results [(context, max, sum), ..] as one."""
    context, peak, total = parts[0][0].copy(), parts[0][1], parts[0][2]
    for part in parts[1:]:
        peak, total = native().merge(isa, *part, context, peak, total)
    return context, peak, total


@each_type
def test_merged_ranges_are_one_range(isa, cache_type):
    """The parts and the whole are each within the bounds of `check`, taken here for the softmax's quotient: score
    errors count twice, in p and in its sum, and each of both sides once more."""
    cache = random_cache(cache_type, 64, 900)
    query = random_query(16, 64)
    visible = np.where(np.arange(16) % 4 == 0, 200, 900)
    cuts = (0, 128, 448, 480, 900)
    parts = [attend(isa, cache, query, visible, *cut) for cut in pairwise(cuts)]
    for row, q in enumerate(query.astype(np.float64)):
        n = visible[row]
        k, v = cache.keys[:n], cache.values[:n]
        scores = k @ q
        p = np.exp(scores - scores.max())
        context, peak, total = folded(isa, [[part[i][row] for i in range(3)] for part in parts])
        in_bf16 = multiplies_in_bf16(isa, cache_type)
        bound = score_bound(isa, cache_type, k, q)
        assert abs(peak - scores.max()) <= bound.max()
        roundings = (n + 40 + 6 * len(cuts) + 2 * np.ptp(scores)) * U + (BF16_U if in_bf16 else 0)
        error = np.expm1(2 * (bound.max() + roundings)) * (p @ np.abs(v)) / p.sum()
        if multiplies_words(isa, cache_type):
            # The steps of a part begin where it does: the largest of all bounds those of each.
            scales = cache.value_scales[:n]
            relative = np.exp(2 * (bound.max() + roundings))
            error += WORD_U * relative * ((p * scales).max() / scales) @ np.abs(v) / p.sum()
        assert (np.abs(context / total - p @ v / p.sum()) <= error).all()


@pytest.mark.parametrize("dim", [1, 16, 80, 128])
def test_merge_weighs_both_sides(isa, dim):
    """exp(max - top) is off by 3 units u with its argument's rounding, a product and a sum by one each."""
    rng = np.random.default_rng(dim)
    for max_a, max_b in ((0.5, -3.0), (-80.0, 20.0), (1e4, 1e4), (-1e4, 0.0)):
        a, b = rng.standard_normal((2, dim)).astype(np.float32)
        into = at_page_end(b)
        peak, total = native().merge(isa, at_page_end(a), max_a, 3.0, into, max_b, 5.0)
        top = max(max_a, max_b)
        factor_a, factor_b = np.exp(max_a - top), np.exp(max_b - top)
        relative = (6 + abs(max_a - max_b)) * U
        assert peak == top
        assert abs(total - (3 * factor_a + 5 * factor_b)) <= relative * (3 * factor_a + 5 * factor_b) + TINY
        wide_a, wide_b = a.astype(np.float64) * factor_a, b.astype(np.float64) * factor_b
        assert (np.abs(into - (wide_a + wide_b)) <= relative * (np.abs(wide_a) + np.abs(wide_b)) + TINY).all()


def test_merge_with_a_side_that_saw_nothing(isa):
    x, nothing = np.array([1.5, -2, 3], np.float32), np.zeros(3, np.float32)
    into = x.copy()
    assert native().merge(isa, nothing, -np.inf, 0.0, into, 0.25, 7.0) == (0.25, 7.0)
    np.testing.assert_array_equal(into, x)
    into = nothing.copy()
    assert native().merge(isa, x, 0.25, 7.0, into, -np.inf, 0.0) == (0.25, 7.0)
    np.testing.assert_array_equal(into, x)
    into = nothing.copy()
    assert native().merge(isa, nothing, -np.inf, 0.0, into, -np.inf, 0.0) == (-np.inf, 0.0)
    np.testing.assert_array_equal(into, nothing)


def test_what_does_not_fit_is_refused(isa):
    cache = random_cache("bf16", 16, 40)
    with pytest.raises(ValueError, match="cache type: 'fp8', wanted one of f32, bf16, int8"):
        native().CacheLayout("fp8", 1, 16)
    with pytest.raises(ValueError, match="attend: arrays do not fit"):
        attend(isa, cache, random_query(17, 16), 40)
    with pytest.raises(ValueError, match="attend: arrays do not fit"):
        attend(isa, cache, random_query(1, 16), 40, end=65)
    with pytest.raises(ValueError, match="append: arrays do not fit"):
        native().append(isa, "bf16", 16, cache.blocks[0], 32, np.zeros(16, np.float32), np.zeros(16, np.float32))
