"""The object that `generate()` carries around for the KV cache inside the model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from chatglm_ov.errors import ChatGLMError

# transformers 4.48 has no marker for "grows without limit" but None; later ones use -1.
_NO_LIMIT = None if issubclass(Cache, torch.nn.Module) else -1

CACHE_NAMES = ("past_key_values", "cache")
CACHE_NAME = CACHE_NAMES[any(field.name == "cache" for field in fields(CausalLMOutputWithPast))]
"""What transformers calls a cache among arguments and in outputs: `cache` from 5.24 on. Here both names are taken."""

_CROPS_BY_SIZE = "max_length" in inspect.signature(DynamicCache.crop).parameters
"""Earlier releases ask for the columns that stay, later ones, by negative numbers only, for those that go."""


def one_cache(arguments: dict[str, Any]) -> Any:
    """The cache that is given under one of its names, or None. ChatGLMError where both are given."""
    given = [arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None]
    if len(given) > 1:
        raise ChatGLMError("cache", "value", "given", "nothing beside past_key_values: they are names of the same")
    return given[0] if given else None


@dataclass
class Columns:
    """What the next call needs to know of the B rows in the cache.

    Of each row: the row of the cache that it continues (`beam_idx` int32 [B]), its prefix (int64 [B], or None without
    one), and of its columns the `ids` int64 [B, past], which are no padding (`keep` bool [B, past]) and the positions
    (`position_ids` int64 [B, past], or [B, 2, past] where there are block positions).
    """

    ids: np.ndarray
    keep: np.ndarray
    position_ids: np.ndarray
    beam_idx: np.ndarray
    prefix: np.ndarray | None

    @classmethod
    def none(cls, rows: int, prefix: np.ndarray | None) -> Columns:
        """The columns of `rows` sequences that have nothing in the cache yet."""
        ids = np.zeros((rows, 0), dtype=np.int64)
        positions = ids if prefix is None else np.zeros((rows, 2, 0), dtype=np.int64)
        return cls(ids, ids == 0, positions, np.arange(rows, dtype=np.int32), prefix)

    @property
    def position(self) -> np.ndarray:
        """The last position of each row: int64 [B], or [B, 2]."""
        return self.position_ids[..., -1]

    def append(self, ids: np.ndarray, keep: np.ndarray, position_ids: np.ndarray) -> None:
        """Note a call that has fed `ids` and read the cache in row order; `keep` [B, T] is of all columns."""
        self.ids = np.concatenate([self.ids, ids], axis=1)
        self.position_ids = np.concatenate([self.position_ids, position_ids], axis=-1)
        self.keep = keep
        self.beam_idx = np.arange(len(keep), dtype=np.int32)

    def select(self, rows: np.ndarray) -> None:
        """Row i continues what rows[i] was so far."""
        self.ids, self.keep, self.position_ids = self.ids[rows], self.keep[rows], self.position_ids[rows]
        self.beam_idx = self.beam_idx[rows]
        self.prefix = None if self.prefix is None else self.prefix[rows]

    def crop(self, columns: int) -> None:
        """Forget all but the first columns."""
        self.ids, self.keep = self.ids[:, :columns], self.keep[:, :columns]
        self.position_ids = self.position_ids[..., :columns]

    def begins_with(self, ids: np.ndarray) -> bool:
        """Whether `ids` [B, L] and what is in the columns, padding aside, are the same as far as both go."""
        length = min(self.ids.shape[1], ids.shape[1])
        return not ((self.ids[:, :length] != ids[:, :length]) & self.keep[:, :length]).any()

    def in_common(self, ids: np.ndarray, position_ids: np.ndarray, prefix: np.ndarray | None) -> int:
        """How many of `ids` [L], with these positions [L] or [2, L], the only row begins with; 0 with padding, with
        several rows, and where a prefix, whose columns have seen each other, is another one."""
        if len(self.ids) != 1 or not self.keep.all():
            return 0
        positions = map(np.atleast_2d, (self.position_ids[0], position_ids))
        common = min(common_prefix(*pair) for pair in [(self.ids[0], ids), *zip(*positions, strict=True)])
        if prefix is None:
            return common
        same = self.prefix is not None and np.array_equal(prefix, self.prefix)
        return common if same and common >= prefix.max() else 0


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids the two rows begin with alike."""
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if differs.size else length


class Session:
    """One infer request, which is one KV cache, what is in it, and the number of sequences begun in it.

    The number tells the handle of the sequence that is in the cache from a handle of an earlier one.
    """

    def __init__(self, request: Any, num_layers: int):
        self.request, self.num_layers = request, num_layers
        self.epoch = 0
        self._columns = Columns.none(0, None)
        self._stands_for: WeakKeyDictionary[Cache, StateCache] = WeakKeyDictionary()

    def renew(self, request: Any) -> None:
        """Go on in another request, whose cache is empty. Every handle given out before is stale; who waits for a turn
        waits for the other one's."""
        request.turns = self.request.turns
        self.request = request
        self.epoch += 1
        self._columns = Columns.none(0, None)

    def restart(self, batch_size: int, prefix: np.ndarray | None) -> StateCache:
        """Empty the KV cache and begin a sequence of `batch_size` rows. Every handle given out before is stale."""
        self.request.reset()
        return self._begun(Columns.none(batch_size, prefix))

    def resume(self, ids: np.ndarray, position_ids: np.ndarray, prefix: np.ndarray | None) -> StateCache | None:
        """A sequence with what the latest one has in common with `ids` [L] from the beginning, at most L - 1 tokens:
        the rest is to be fed. None if there is nothing in common. `position_ids` [L] or [2, L] and `prefix`: those of
        `ids`. Every handle given out before is stale."""
        columns = replace(self._columns)
        if self.interrupted(columns):
            return None
        kept = min(columns.in_common(ids, position_ids, prefix), len(ids) - 1)
        if kept <= (0 if prefix is None else max(0, prefix.max() - 1)):
            return None
        self.request.truncate(kept)
        columns.crop(kept)
        return self._begun(columns)

    def meant(self, cache: Any, ids: np.ndarray | None = None) -> StateCache | None:
        """The handle that a cache argument stands for; None where a sequence begins.

        A cache object of transformers' own stays empty. Where a call has been given it, as programs do that make one
        before they begin, it stands for the sequence of that call from then on. ids [B, L]: with a whole sequence it
        may stand for one that is gone, which is computed again. Raises ChatGLMError for what cannot be a cache of this
        model."""
        if cache is None or isinstance(cache, StateCache):
            return cache
        if not isinstance(cache, Cache) or cache.get_seq_length() > 0:
            raise ChatGLMError("past_key_values", "type", type(cache).__name__, "a cache returned by this model")
        handle = self._stands_for.get(cache)
        if handle is None or handle.is_current() or ids is None:
            return handle
        return None if ids.shape[1] > handle.columns.keep.shape[1] else handle

    def bind(self, cache: Any) -> None:
        """A cache object of transformers' own stands for the sequence that is in the cache from now on."""
        if cache is not None and not isinstance(cache, StateCache):
            self._stands_for[cache] = self.latest()

    def latest(self) -> StateCache:
        """A handle of the sequence that is in the cache; those of it that were given out before stay good."""
        return StateCache(self, self._columns)

    def interrupted(self, columns: Columns) -> bool:
        """Whether the cache has lost what these columns describe: a call that does not come to its end empties it."""
        return self.request.past_length != columns.keep.shape[1]

    def _begun(self, columns: Columns) -> StateCache:
        self.epoch += 1
        self._columns = columns
        return StateCache(self, columns)


class StateCache(Cache):
    """Handle on the keys and values inside an infer request: it holds none of them itself, but what describes them."""

    is_compileable = False
    is_initialized = True

    def __init__(self, session: Session, columns: Columns):
        try:
            super().__init__(layers=[])
        except TypeError:  # transformers < 4.54: the base class takes no argument
            super().__init__()
        self._session, self._epoch = session, session.epoch
        self.columns = columns

    def check_current(self, session: Session | None = None) -> None:
        """Raise ChatGLMError if this is the handle of another model, or of a sequence that is gone."""
        if session is not None and session is not self._session:
            raise ChatGLMError("past_key_values", "model", "another one", "the model that returned this cache")
        if self._epoch != self._session.epoch:
            wanted = "the cache of the latest one (a call without past_key_values empties the cache)"
            raise ChatGLMError("past_key_values", "sequence", "an earlier one", wanted)
        if self._session.interrupted(self.columns):
            raise ChatGLMError("past_key_values", "sequence", "lost in a call that was interrupted", "a new one")

    def is_current(self) -> bool:
        """Whether the sequence is the one that is in the model."""
        return self._epoch == self._session.epoch and not self._session.interrupted(self.columns)

    # Rows

    @property
    def batch_size(self) -> int:
        return len(self.columns.beam_idx)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i continues what row beam_idx[i] was so far. Nothing is moved: the next call reads through it."""
        self.check_current()
        self.columns.select(beam_idx.cpu().numpy())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these rows, in this order."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row: one prompt, several continuations."""
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """Go back to the first `max_length` columns; a negative number takes so many away. The next call goes on from
        there. 0 is what it is in the installed transformers: no columns stay, or none go."""
        with self._session.request.turns.taken():
            columns = self.get_seq_length()
            if max_length == 0 and not _CROPS_BY_SIZE:
                return
            kept = columns + max_length if max_length < 0 else min(max_length, columns)
            self._session.request.truncate(kept)
            self.columns.crop(kept)

    # What transformers asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns in the cache, left padding included."""
        self.check_current()
        return self.columns.keep.shape[1]

    def get_max_cache_shape(self, layer_idx: int = 0) -> int | None:
        return _NO_LIMIT

    def get_max_length(self, layer_idx: int | None = None) -> int | None:  # type: ignore[override]
        return _NO_LIMIT

    @property
    def max_batch_size(self) -> int:
        return self.batch_size

    @property
    def max_cache_len(self) -> int | None:
        return _NO_LIMIT

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self._session.num_layers

    @property
    def is_linear(self) -> list[bool]:
        return [False] * self._session.num_layers

    def __len__(self) -> int:
        return self._session.num_layers

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rows={self.batch_size}, columns={self.columns.keep.shape[1]})"

    def _inside_the_model(self, *args: Any, **kwargs: Any) -> NoReturn:
        wanted = "only get_seq_length, crop, reorder_cache, batch_select_indices, batch_repeat_interleave"
        raise ChatGLMError("past_key_values", "operation", "one that needs the keys and values", wanted)

    update = reset = to_legacy_cache = __getitem__ = __iter__ = __deepcopy__ = _inside_the_model
