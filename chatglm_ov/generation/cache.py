"""The object that `generate()` carries around for the KV cache inside the model."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import torch
from transformers import Cache

from chatglm_ov.errors import ChatGLMError

# transformers 4.48 has no marker for "grows without limit" but None; later ones use -1.
_NO_LIMIT = None if issubclass(Cache, torch.nn.Module) else -1


class Session:
    """One infer request, which is one KV cache, and the number of sequences begun in it.

    The number tells the handle of the sequence that is in the cache from a handle of an earlier one.
    """

    def __init__(self, request: Any, num_layers: int):
        self.request, self.num_layers = request, num_layers
        self.epoch = 0

    def restart(self, batch_size: int, prefix: np.ndarray | None) -> StateCache:
        """Empty the KV cache and begin a sequence of `batch_size` rows. Every handle given out before is stale."""
        self.epoch += 1
        self.request.reset()
        return StateCache(self, batch_size, prefix)


class StateCache(Cache):
    """Handle on the keys and values inside an infer request: it holds none of them itself.

    What it remembers is what the next call needs of each row: which row of the cache it continues
    (`beam_idx` int32 [B]), which columns are padding (`keep` bool [B, past]), its last position (`position`
    int64 [B], or [B, 2] where there are block positions) and its prefix (int64 [B], or None without one).
    """

    is_compileable = False
    is_initialized = True

    def __init__(self, session: Session, batch_size: int, prefix: np.ndarray | None):
        try:
            super().__init__(layers=[])
        except TypeError:  # transformers < 4.54: the base class takes no argument
            super().__init__()
        self._session, self._epoch = session, session.epoch
        self.prefix = prefix
        self.advance(np.ones((batch_size, 0), dtype=bool), np.zeros(batch_size, dtype=np.int64))

    def advance(self, keep: np.ndarray, position: np.ndarray) -> None:
        """Note that a call has filled the cache up to keep.shape[1] columns and read it in row order."""
        self.keep, self.position = keep, position
        self.beam_idx = np.arange(len(keep), dtype=np.int32)

    def check_current(self, session: Session | None = None) -> None:
        """Raise ChatGLMError if this is the handle of another model, or of a sequence that is gone."""
        if session is not None and session is not self._session:
            raise ChatGLMError("past_key_values", "model", "another one", "the model that returned this cache")
        if self._epoch != self._session.epoch:
            wanted = "the cache of the latest one (a call without past_key_values empties the cache)"
            raise ChatGLMError("past_key_values", "sequence", "an earlier one", wanted)

    # Rows

    @property
    def batch_size(self) -> int:
        return len(self.beam_idx)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i continues what row beam_idx[i] was so far. Nothing is moved: the next call reads through it."""
        self.check_current()
        index = beam_idx.cpu().numpy()
        self.beam_idx = self.beam_idx[index]
        self.keep, self.position = self.keep[index], self.position[index]
        self.prefix = None if self.prefix is None else self.prefix[index]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these rows, in this order."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row: one prompt, several continuations."""
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    # What transformers asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns in the cache, left padding included."""
        self.check_current()
        return self.keep.shape[1]

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

    def __len__(self) -> int:
        return self._session.num_layers

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rows={self.batch_size}, columns={self.keep.shape[1]})"

    def _inside_the_model(self, *args: Any, **kwargs: Any) -> NoReturn:
        wanted = "only get_seq_length, reorder_cache, batch_select_indices, batch_repeat_interleave"
        raise ChatGLMError("past_key_values", "operation", "one that needs the keys and values", wanted)

    update = crop = reset = to_legacy_cache = __getitem__ = __iter__ = __deepcopy__ = _inside_the_model
