"""CacheTable: which row of the cache holds a slot."""

from __future__ import annotations

import numpy as np
import pytest
from operations import compiled, create, needs_library, parameter

pytestmark = needs_library


@pytest.fixture(scope="module")
def cache_table():
    def build(prefix):
        inputs = [parameter([-1, -1], np.int32) for _ in range(3)] + [parameter([-1], np.int32)]
        inputs += [parameter([-1], np.int32)] if prefix else []
        node = create("CacheTable", [i.output(0) for i in inputs], {"prefix": int(prefix)})
        model = compiled([node.output(i) for i in range(3)], inputs)
        return lambda *arrays: model([np.ascontiguousarray(a, np.int32) for a in arrays])

    return {prefix: build(prefix) for prefix in (False, True)}


def test_padding_takes_no_slot(cache_table):
    mask = [[0, 0, 1, 1], [1, 1, 1, 1]]
    table, slots, visible = cache_table[False](np.zeros((2, 0)), mask, np.zeros((2, 4)), [0, 1])
    assert slots.tolist() == [[-1, -1, 0, 1], [0, 1, 2, 3]]
    assert visible.tolist() == [[0, 0, 1, 2], [1, 2, 3, 4]]
    assert table[0, :2].tolist() == [0, 0]
    assert table[1].tolist() == [1, 1, 1, 1]


def test_a_hole_in_the_mask_takes_no_slot(cache_table):
    _, slots, visible = cache_table[False](np.zeros((1, 0)), [[1, 0, 1]], np.zeros((1, 3)), [0])
    assert slots.tolist() == [[0, -1, 1]]
    assert visible.tolist() == [[1, 0, 2]]


def test_columns_before_the_prefix_are_seen_by_all(cache_table):
    mask, ids = [[0, 1, 1, 1], [1, 1, 1, 1]], np.zeros((2, 4))
    _, _, visible = cache_table[True](np.zeros((2, 0)), mask, ids, [0, 1], [3, 2])
    assert visible.tolist() == [[0, 2, 2, 3], [2, 2, 3, 4]]


def test_a_row_goes_on_from_another_without_moving_it(cache_table):
    past = [[0, 0, 0], [1, 1, 1]]
    table, slots, _ = cache_table[False](past, np.ones((2, 4)), np.zeros((2, 1)), [1, 1])
    assert table[:, :3].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert sorted(table[:, 3].tolist()) == [0, 1]
    assert slots.tolist() == [[3], [3]]


def test_swapped_rows_of_unequal_length_keep_what_each_refers_to(cache_table):
    mask = [[1] * 4, [0, 0, 1, 1]]
    past, _, _ = cache_table[False](np.zeros((2, 0)), mask, np.zeros((2, 4)), [0, 1])
    mask = [[0, 0, 1, 1, 1], [1] * 5]
    table, slots, _ = cache_table[False](past, mask, np.zeros((2, 1)), [1, 0])
    assert slots.tolist() == [[2], [4]]
    # Row 0 of the cache holds the longer sequence's slot 2.
    assert table[0, :3].tolist() == [1, 1, 1]
    assert table[1].tolist()[:4] == [0, 0, 0, 0]


def test_more_rows_than_before(cache_table):
    table, slots, _ = cache_table[False]([[0, 0]], np.ones((3, 3)), np.zeros((3, 1)), [0, 0, 0])
    assert table[:, :2].tolist() == [[0, 0]] * 3
    assert sorted(table[:, 2].tolist()) == [0, 1, 2]
    assert slots.tolist() == [[2]] * 3


def test_going_back_drops_the_later_slots(cache_table):
    table, slots, _ = cache_table[False]([[0] * 6], np.ones((1, 4)), np.zeros((1, 2)), [0])
    assert table.shape == (1, 4)
    assert slots.tolist() == [[2, 3]]


@pytest.mark.parametrize("seed", range(5))
def test_no_two_sequences_ever_write_the_same_slot(cache_table, seed):
    """Random reorders of unequal rows: what a sequence wrote is what it reads, as if each had a cache of its own."""
    rng = np.random.default_rng(seed)
    rows, prompt = 4, 5
    keep = np.arange(prompt) >= rng.integers(0, prompt, (rows, 1))
    table, slots, _ = cache_table[False](np.zeros((rows, 0)), keep, np.zeros((rows, prompt)), np.arange(rows))
    cache, own = {}, [[] for _ in range(rows)]
    stamp = 0

    def write():
        nonlocal stamp
        for row in range(rows):
            for slot in slots[row][slots[row] >= 0]:
                stamp += 1
                cache[(table[row, slot], slot)] = stamp
                own[row] = [*own[row][:slot], stamp]

    write()
    for _ in range(20):
        order = rng.integers(0, rows, rows)
        keep = np.concatenate([keep[order], np.ones((rows, 1), bool)], axis=1)
        own = [list(own[i]) for i in order]
        table, slots, _ = cache_table[False](table, keep, np.zeros((rows, 1)), order)
        write()
        for row in range(rows):
            assert [cache[(table[row, s], s)] for s in range(len(own[row]))] == own[row]


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
