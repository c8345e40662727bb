"""The handle on the cache inside the model, without a model."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import pytest
import torch
from transformers import Cache, DynamicCache

from chatglm_ov import ChatGLMError
from chatglm_ov.generation.cache import Session, StateCache
from chatglm_ov.runtime.turns import Turns

pytestmark = pytest.mark.transformers_matrix


class Request:
    """As much of a request as a session asks for."""

    past_length = 0

    def __init__(self) -> None:
        self.turns = Turns()

    def reset(self) -> None:
        self.past_length = 0

    def truncate(self, past_length: int) -> None:
        self.past_length = past_length


def begun(rows: int = 3, columns: int = 5, prefix: np.ndarray | None = None) -> tuple[Session, StateCache]:
    """A session with a sequence of `columns` in it; row i has i columns of padding and ends at position 10 + i."""
    session = Session(Request(), num_layers=2)
    cache = session.restart(rows, prefix)
    keep = np.arange(columns) >= np.arange(rows)[:, None]
    positions = 10 + np.arange(rows)[:, None] + np.arange(1 - columns, 1)
    if prefix is not None:
        positions = np.stack([positions, positions], axis=1)
    session.request.past_length = columns
    cache.columns.append(100 * np.arange(rows)[:, None] + np.arange(columns), keep, positions)
    return session, cache


def test_it_is_a_cache_that_generate_may_hold():
    session, cache = begun()
    assert isinstance(cache, Cache)
    assert cache.get_seq_length() == 5
    assert cache.batch_size == cache.max_batch_size == 3
    assert cache.get_max_cache_shape() in (None, -1)
    assert cache.get_max_cache_shape() == cache.get_max_length() == cache.max_cache_len
    assert not cache.is_compileable
    assert len(cache) == session.num_layers
    assert cache
    assert repr(cache) == "StateCache(rows=3, columns=5)"


def test_a_fresh_handle_is_empty():
    session = Session(Request(), num_layers=2)
    cache = session.restart(2, None)
    assert cache.get_seq_length() == 0
    assert cache.columns.beam_idx.tolist() == [0, 1]
    assert cache.columns.beam_idx.dtype == np.int32


def test_reorder_moves_what_is_known_of_a_row():
    prefix = np.array([7, 8, 9])
    _, cache = begun(prefix=prefix)
    columns, keep, ids = cache.columns, cache.columns.keep, cache.columns.ids
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert columns.beam_idx.tolist() == [2, 0, 0]
    assert columns.position.tolist() == [[12, 12], [10, 10], [10, 10]]
    assert columns.prefix.tolist() == [9, 7, 7]
    assert np.array_equal(columns.keep, keep[[2, 0, 0]])
    assert np.array_equal(columns.ids, ids[[2, 0, 0]])
    assert columns.beam_idx.dtype == np.int32


def test_reorders_compose_until_the_next_call():
    """Row i of the second order is row second[i] of the first one, whose cache rows are still where they were."""
    _, cache = begun()
    first, second = torch.tensor([1, 2, 0]), torch.tensor([0, 0, 2])
    cache.reorder_cache(first)
    cache.reorder_cache(second)
    columns = cache.columns
    assert columns.beam_idx.tolist() == first[second].tolist()
    more = np.ones((3, 1), np.int64)
    columns.append(more, np.concatenate([columns.keep, more > 0], 1), more)
    assert columns.beam_idx.tolist() == [0, 1, 2]


def test_rows_are_repeated_and_selected():
    _, cache = begun()
    cache.batch_repeat_interleave(2)
    assert cache.columns.beam_idx.tolist() == [0, 0, 1, 1, 2, 2]
    assert cache.batch_size == 6
    cache.batch_select_indices(torch.tensor([5, 1]))
    assert cache.columns.beam_idx.tolist() == [2, 0]
    assert cache.columns.position.tolist() == [12, 10]


def test_crop_forgets_the_last_columns():
    _, cache = begun()
    cache.crop(-2)
    assert cache.get_seq_length() == 3
    assert cache.columns.ids.tolist() == [[0, 1, 2], [100, 101, 102], [200, 201, 202]]
    assert cache.columns.position.tolist() == [8, 9, 10]
    cache.crop(9)
    assert cache.get_seq_length() == 3
    # The columns that stay, or, in later releases, those that go.
    cache.crop(0)
    assert cache.get_seq_length() == (0 if "max_length" in inspect.signature(DynamicCache.crop).parameters else 3)


def test_a_latest_handle_is_one_of_the_same_sequence():
    session, cache = begun()
    latest = session.latest()
    assert latest.get_seq_length() == cache.get_seq_length() == 5
    latest.crop(3)
    assert cache.get_seq_length() == 3
    session.restart(1, None)
    with pytest.raises(ChatGLMError, match="sequence is an earlier one"):
        latest.get_seq_length()


def test_what_the_columns_begin_with():
    """As far as both go; padding (a column in row 1, two in row 2) may be anything."""
    columns = begun()[1].columns
    ids = columns.ids.copy()
    ids[1, 0] = ids[2, 1] = -7
    longer = np.concatenate([ids, ids], axis=1)
    assert columns.begins_with(ids) and columns.begins_with(ids[:, :3]) and columns.begins_with(longer)
    ids[1, 1] = -7
    assert not columns.begins_with(ids) and columns.begins_with(ids[:, :1])


def test_a_new_sequence_makes_the_handle_stale():
    session, cache = begun()
    cache.check_current(session)
    fresh = session.restart(1, None)
    for use in (cache.get_seq_length, cache.check_current, lambda: cache.reorder_cache(torch.tensor([0]))):
        with pytest.raises(ChatGLMError, match="past_key_values: sequence is an earlier one"):
            use()
    assert fresh.get_seq_length() == 0


def test_another_models_handle_is_refused():
    (session, _), (_, cache) = begun(), begun()
    with pytest.raises(ChatGLMError, match="past_key_values: model is another one"):
        cache.check_current(session)


def test_what_would_need_keys_and_values_is_refused():
    _, cache = begun()
    for use in (
        lambda: cache.update(torch.zeros(1), torch.zeros(1), 0),
        lambda: cache.reset(),
        lambda: cache[0],
        lambda: list(cache),
        lambda: copy.deepcopy(cache),
    ):
        with pytest.raises(ChatGLMError, match="needs the keys and values"):
            use()
