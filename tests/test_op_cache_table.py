"""CacheTable: which row of the cache holds a block."""

from __future__ import annotations

import numpy as np
import pytest
from operations import compiled, create, needs_library, parameter

pytestmark = needs_library


BLOCK = 32


@pytest.fixture(scope="module")
def cache_table():
    def build(prefix):
        inputs = [parameter([-1, -1], np.int32) for _ in range(3)] + [parameter([-1], np.int32)]
        inputs += [parameter([-1], np.int32)] if prefix else []
        node = create("CacheTable", [i.output(0) for i in inputs], {"prefix": int(prefix)})
        model = compiled([node.output(i) for i in range(4)], inputs)
        return lambda *arrays: model([np.ascontiguousarray(a, np.int32) for a in arrays])

    return {prefix: build(prefix) for prefix in (False, True)}


def test_padding_takes_no_slot(cache_table):
    mask = [[0, 0, 1, 1], [1, 1, 1, 1]]
    table, slots, visible, copied = cache_table[False](np.zeros((2, 0)), mask, np.zeros((2, 4)), [0, 1])
    assert slots.tolist() == [[-1, -1, 0, 1], [0, 1, 2, 3]]
    assert visible.tolist() == [[0, 0, 1, 2], [1, 2, 3, 4]]
    assert table.tolist() == [[0], [1]]
    assert copied.tolist() == [-1, -1]


def test_a_hole_in_the_mask_takes_no_slot(cache_table):
    _, slots, visible, _ = cache_table[False](np.zeros((1, 0)), [[1, 0, 1]], np.zeros((1, 3)), [0])
    assert slots.tolist() == [[0, -1, 1]]
    assert visible.tolist() == [[1, 0, 2]]


def test_columns_before_the_prefix_are_seen_by_all(cache_table):
    mask, ids = [[0, 1, 1, 1], [1, 1, 1, 1]], np.zeros((2, 4))
    _, _, visible, _ = cache_table[True](np.zeros((2, 0)), mask, ids, [0, 1], [3, 2])
    assert visible.tolist() == [[0, 2, 2, 3], [2, 2, 3, 4]]


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 65])
def test_blocks_of_a_table(cache_table, columns):
    table, slots, *_ = cache_table[False](np.zeros((2, 0)), np.ones((2, columns)), np.zeros((2, columns)), [0, 1])
    assert table.tolist() == [[row] * -(-columns // BLOCK) for row in range(2)]
    assert slots.tolist() == [list(range(columns))] * 2


def test_a_row_that_goes_on_from_another_shares_its_blocks_and_copies_the_last(cache_table):
    past = [[0, 0], [1, 1]]
    table, slots, _, copied = cache_table[False](past, np.ones((2, 41)), np.zeros((2, 1)), [1, 1])
    assert table[:, 0].tolist() == [1, 1]
    assert sorted(table[:, 1].tolist()) == [0, 1]
    assert slots.tolist() == [[40], [40]]
    assert [copied[row] for row in range(2) if table[row, 1] == 0] == [1]
    assert [copied[row] for row in range(2) if table[row, 1] == 1] == [-1]


def test_blocks_that_are_full_are_never_copied(cache_table):
    table, _, _, copied = cache_table[False]([[0], [1]], np.ones((2, 33)), np.zeros((2, 1)), [1, 1])
    assert table[:, 0].tolist() == [1, 1]
    assert sorted(table[:, 1].tolist()) == [0, 1]
    assert copied.tolist() == [-1, -1]


def test_a_row_that_feeds_nothing_keeps_what_it_shares(cache_table):
    mask = [[1, 1, 1, 0], [1, 1, 1, 1]]
    table, slots, _, copied = cache_table[False]([[0], [1]], mask, np.zeros((2, 1)), [0, 0])
    assert slots.tolist() == [[-1], [3]]
    assert table.tolist() == [[0], [1]]
    assert copied.tolist() == [-1, 0]


def test_swapped_rows_of_unequal_length_stay_where_they_are(cache_table):
    mask = [[1] * 4, [0, 0, 1, 1]]
    past, *_ = cache_table[False](np.zeros((2, 0)), mask, np.zeros((2, 4)), [0, 1])
    mask = [[0, 0, 1, 1, 1], [1] * 5]
    table, slots, _, copied = cache_table[False](past, mask, np.zeros((2, 1)), [1, 0])
    assert slots.tolist() == [[2], [4]]
    assert table.tolist() == [[1], [0]]
    assert copied.tolist() == [-1, -1]


def test_more_rows_than_before(cache_table):
    table, slots, _, copied = cache_table[False]([[0]], np.ones((3, 3)), np.zeros((3, 1)), [0, 0, 0])
    assert sorted(table[:, 0].tolist()) == [0, 1, 2]
    assert copied.tolist() == [-1 if row == 0 else 0 for row in table[:, 0]]
    assert slots.tolist() == [[2]] * 3


def test_going_back_drops_the_later_blocks(cache_table):
    table, slots, _, copied = cache_table[False]([[0, 0, 0]], np.ones((1, 34)), np.zeros((1, 3)), [0])
    assert table.tolist() == [[0, 0]]
    assert slots.tolist() == [[31, 32, 33]]
    assert copied.tolist() == [-1]


@pytest.mark.parametrize("seed", range(20))
def test_what_a_sequence_wrote_is_what_it_reads(cache_table, seed):
    """Random reorders of rows of unequal length, some steps back, one or several columns a step, some of them padding:
    as if each sequence had a cache of its own. Copies come before all that is written, in any order."""
    rng = np.random.default_rng(seed)
    rows, prompt = 4, int(rng.integers(1, 70))
    keep = np.arange(prompt) >= rng.integers(0, prompt, (rows, 1))
    cache = np.zeros((rows, 8, BLOCK), int)
    table, own, stamp = np.zeros((rows, 0)), [[] for _ in range(rows)], 0
    fresh, order = keep, np.arange(rows)
    for _ in range(40):
        table, slots, _, copied = cache_table[False](table, keep, np.zeros(fresh.shape), order)
        for row in rng.permutation(rows):
            if copied[row] >= 0:
                block = slots[row][slots[row] >= 0][0] // BLOCK
                cache[table[row, block], block] = cache[copied[row], block]
        for row in range(rows):
            for slot in slots[row][slots[row] >= 0]:
                stamp += 1
                cache[table[row, slot // BLOCK], slot // BLOCK, slot % BLOCK] = stamp
                own[row] = [*own[row][:slot], stamp]
        for row in range(rows):
            seen = [cache[table[row, slot // BLOCK], slot // BLOCK, slot % BLOCK] for slot in range(len(own[row]))]
            assert seen == own[row]
        order = rng.integers(0, rows, rows)
        kept = keep.shape[1] - int(rng.integers(0, 3))
        own = [own[i][: keep[i, :kept].sum()] for i in order]
        fresh = rng.random((rows, int(rng.integers(1, 6)))) < 0.8
        keep = np.concatenate([keep[order, :kept], fresh], axis=1)


def test_a_row_that_is_not_there_is_refused(cache_table):
    with pytest.raises(RuntimeError, match="goes on from row 3"):
        cache_table[False]([[0, 0]], np.ones((1, 3)), np.zeros((1, 1)), [3])


@pytest.mark.parametrize(
    ("mask", "ids", "beam_idx", "prefix"),
    [((2, 3), (2, 5), 2, 2), ((2, 3), (1, 3), 2, 2), ((2, 3), (2, 3), 1, 2), ((2, 3), (2, 3), 2, 1)],
)
def test_inputs_of_a_table_that_do_not_fit_are_refused(cache_table, mask, ids, beam_idx, prefix):
    with pytest.raises(RuntimeError, match=r"CacheTable: .* wanted"):
        cache_table[True](np.zeros((2, 0)), np.ones(mask), np.zeros(ids), np.zeros(beam_idx), np.zeros(prefix))
