"""The attention kernels of every level, against double precision with bounds from the operands."""

# ruff: noqa: F811 (a fixture is imported)

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from attention_bounds import (  # noqa: F401
    BF16_U,
    HEAD_DIMS,
    TINY,
    WORD_U,
    U,
    attend,
    check,
    each_type,
    isa,
    make_cache,
    multiplies_in_bf16,
    multiplies_words,
    random_cache,
    random_query,
    score_bound,
)
from page_end import at_page_end

from chatglm_ov.native import native, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no native library: {unavailable()}")


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
