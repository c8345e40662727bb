"""From what a caller passes (ids, masks in three forms, positions) to what the runtime takes.

Letters: B rows, L new columns, T = past + L columns in all, P 1 (one position) or 2 (position, block position).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache as once
from typing import Any

import numpy as np
import torch

from chatglm_ov.errors import ChatGLMError
from chatglm_ov.generation.cache import StateCache

log = logging.getLogger(__name__)

PIECE_TOKENS = 512
"""A longer prompt is computed in pieces: this many tokens are as fast as any number (the kernels take no more rows at
once), and between two pieces it can be seen how far it is, and be ended."""


@dataclass
class Step:
    """One call of the runtime: `ids` int64 [B, L], `keep` bool [B, T] (False: padding), `position_ids` int64
    [B, L] or [B, 2, L], `prefix` int64 [B] (columns that every row sees) or None."""

    ids: np.ndarray
    keep: np.ndarray
    position_ids: np.ndarray
    prefix: np.ndarray | None


def prepare(
    compiled: Any,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache: StateCache | None = None,
) -> Step:
    """Check the arguments of one call and complete them as the original models do (model-family 3.5, 5).

    Without a cache, no mask means that every column is seen, padding too. With one, the mask of the columns in
    the cache is known and no mask means that the new ones are all real. ChatGLMError names what does not fit.
    """
    ids = token_ids(input_ids)
    past = 0 if cache is None else cache.get_seq_length()
    if cache is not None:
        _check_rows(ids, cache)
    mask = None if attention_mask is None else _mask(attention_mask)
    blocked = None
    if mask is None:
        keep = np.ones(ids.shape, dtype=bool)
        keep = keep if cache is None else np.concatenate([cache.columns.keep, keep], axis=1)
    elif mask.ndim == 2:
        keep = _keep(mask, ids, past)
    else:
        blocked = _blocked(mask, ids, past)
        keep = ~blocked[:, -1]
    # The originals leave padding out of positions and prefix only where a mask tells of it.
    padded = None if keep.all() else keep.astype(np.int64)
    prefix = cache.columns.prefix if cache else compiled.architecture.prefix_length(compiled.config, ids, padded)
    if blocked is not None:
        _check_blocked(blocked, keep, prefix)
    if position_ids is not None:
        positions = _explicit(position_ids, ids, dimensions=2 if prefix is None else 3)
    elif cache is not None and (prefix is None or past > prefix.max()):
        positions = _positions_behind(cache.columns.position, keep[:, past:])
    else:
        # Of all columns: where a prefix ends, the next position is that of a token somewhere in it.
        whole = ids if cache is None else np.concatenate([cache.columns.ids, ids], axis=1)
        positions = compiled.architecture.position_ids(compiled.config, whole, padded)[..., past:]
    return Step(ids, keep, positions, prefix)


def pieces(step: Step, past: int) -> Iterator[slice]:
    """The new columns in pieces of PIECE_TOKENS tokens in all rows: what a piece takes does not grow with the prompt.
    The columns of a prefix have to be in one piece."""
    width, end = max(1, PIECE_TOKENS // len(step.ids)), step.ids.shape[1]
    prefix = 0 if step.prefix is None else int(step.prefix.max()) - past
    start, stop = 0, min(max(width, prefix), end)
    while start < end:
        yield slice(start, stop)
        start, stop = stop, min(stop + width, end)


def token_ids(input_ids: Any) -> np.ndarray:
    """int64 [B, L] of a tensor of whole numbers with at least one id in each row."""
    ids = _whole_numbers("input_ids", input_ids)
    if ids.ndim != 2 or ids.size == 0:
        raise ChatGLMError("input_ids", "shape", list(ids.shape), "[rows, length], at least one token each")
    return ids.astype(np.int64)


def refuse_tensors(where: str, inputs_embeds: Any, token_type_ids: Any) -> None:
    """Raise ChatGLMError for what other models take beside or in place of ids."""
    if inputs_embeds is not None:
        raise ChatGLMError(where, "inputs_embeds", "given", "input_ids")
    if token_type_ids is not None:
        raise ChatGLMError(where, "token_type_ids", "given", "none: these models know no segments")


def new_columns(ids: np.ndarray, mask: torch.Tensor | None, cache: StateCache) -> int:
    """How many of the last columns of `ids` [B, L] are not in the cache: those that the mask [B, T] has beyond it;
    without one all of an input that is shorter, and of a longer one, which is the whole sequence, the rest.

    ChatGLMError for a whole sequence that does not begin with what is in the cache, and for one that is all in it: fed
    once more it would be another text. A single id is always new.
    """
    _check_rows(ids, cache)
    past, length = cache.get_seq_length(), ids.shape[1]
    total = max(length, past) if mask is None else mask.shape[-1]
    begins = cache.columns.begins_with(ids)
    if total <= past:
        if length > 1 and begins:
            wanted = f"one more than in the cache: crop it to {length - 1}, or leave it to reuse_cache=True"
            raise ChatGLMError("input_ids", "columns", f"{length}, all of them in past_key_values already", wanted)
        return length
    if length == total and not begins:
        wanted = f"the {past} in past_key_values; new ids alone with an attention_mask of {past + length} columns"
        raise ChatGLMError("input_ids", "first columns", "others", wanted)
    return total - past


def go_back_to_mask(ids: np.ndarray, mask: Any, cache: StateCache) -> bool:
    """Crop a cache to the columns where the mask [B, T] of the whole sequence `ids` [B, T] is what it was when they
    were fed: what stands behind a column that was taken for text, and is padding now, is computed again. False: no
    column is left of it. ChatGLMError where what is to be computed again is not in `ids`."""
    if mask is None:
        return True
    told, fed = _mask(mask), cache.columns.keep
    if told.ndim != 2 or len(told) != len(fed) or told.shape[1] <= fed.shape[1]:
        return True  # of another form, which is looked at where it is used
    row, column = min(np.argwhere(told[:, : fed.shape[1]] != fed).tolist(), key=lambda at: at[1], default=(0, -1))
    if column < 0:
        return True
    if ids.shape != told.shape:
        wanted = f"{int(fed[row, column])}, as when it was fed, or the ids of the whole sequence"
        raise ChatGLMError(f"attention_mask row {row}", f"column {column}", int(told[row, column]), wanted)
    prefix = cache.columns.prefix
    if column == 0 or (prefix is not None and column < prefix.max()):
        return False
    cache.crop(column - fed.shape[1])
    return True


def warn_of_padding(ids: np.ndarray, pad_token_id: int | None, eos_token_ids: list[int]) -> None:
    """Log once what may be wrong with `ids` [B, L] that came without a mask; nothing is changed."""
    if pad_token_id is None:
        return
    if pad_token_id in eos_token_ids and (ids[:, 0] == pad_token_id).any():
        _warn_once(
            f"Rows begin with {pad_token_id}, which is pad_token_id and an end id: without an attention_mask it is "
            "taken for text, not for padding"
        )
    if len(ids) > 1 and (ids[:, -1] == pad_token_id).any():
        _warn_once(
            f"Rows end with pad_token_id {pad_token_id}, which is taken for text: pad on the left, and pass the "
            "attention_mask"
        )


@once
def _warn_once(message: str) -> None:
    log.warning(message)


def _check_rows(ids: np.ndarray, cache: StateCache) -> None:
    if cache.batch_size != len(ids):
        raise ChatGLMError("input_ids", "rows", len(ids), f"{cache.batch_size}, the rows of past_key_values")


def leading_padding(ids: np.ndarray, pad_token_id: int | None, eos_token_ids: list[int]) -> np.ndarray | None:
    """bool [B, L], False on the run of pad ids that a row begins with; None if padding cannot be told."""
    if pad_token_id is None or pad_token_id in eos_token_ids:
        return None
    keep = np.logical_or.accumulate(ids != pad_token_id, axis=1)
    return None if keep.all() else keep


def next_positions(last: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` tokens after those with the positions `last`: [B] -> [B, count], counting on;
    [B, 2] -> [B, 2, count], where the position stays and the block position counts on."""
    return _positions_behind(last, np.ones((len(last), count), bool))


def _positions_behind(last: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Positions as `next_positions` gives them, of columns `keep` [B, n] (False: padding), where padding takes none."""
    step = keep.cumsum(axis=1, dtype=np.int64)
    if last.ndim == 1:
        return last[:, None] + step
    return last[:, :, None] + np.stack([np.zeros_like(step), step], axis=1)


def _explicit(position_ids: torch.Tensor, ids: np.ndarray, dimensions: int) -> np.ndarray:
    """The caller's positions as int64 [B, L], or [B, 2, L] with 3 dimensions; one row stands for all rows."""
    positions = _whole_numbers("position_ids", position_ids)
    rows, length = ids.shape
    inner = [length] if dimensions == 2 else [2, length]
    if list(positions.shape[1:]) != inner or len(positions) not in (1, rows):
        raise ChatGLMError("position_ids", "shape", list(positions.shape), [rows, *inner])
    return np.broadcast_to(positions.astype(np.int64), (rows, *inner))


def _keep(mask: np.ndarray, ids: np.ndarray, past: int) -> np.ndarray:
    """bool [B, T] of a mask of ones and zeros [B, T]."""
    wanted = (len(ids), past + ids.shape[1])
    if mask.shape != wanted:
        raise ChatGLMError("attention_mask", "shape", list(mask.shape), f"{list(wanted)}: [rows, past + new columns]")
    for row in np.flatnonzero(~mask.any(axis=1)):
        raise ChatGLMError(f"attention_mask row {row}", "tokens", 0, "at least one that is not padding")
    return mask


def _blocked(mask: np.ndarray, ids: np.ndarray, past: int) -> np.ndarray:
    """bool [B, L, T] of the first generation's own mask [B, 1, L, T], True where a column is not seen."""
    rows, length = ids.shape
    if mask.shape != (rows, 1, length, past + length):
        wanted = f"[{rows}, {past + length}] (1 = seen) or [{rows}, 1, {length}, {past + length}] (1 = not seen)"
        raise ChatGLMError("attention_mask", "shape", list(mask.shape), wanted)
    return mask[:, 0]


def _mask(attention_mask: torch.Tensor) -> np.ndarray:
    if isinstance(attention_mask, torch.Tensor) and attention_mask.is_floating_point():
        whole = attention_mask.to(torch.int64)
        attention_mask = whole if torch.equal(whole.to(attention_mask.dtype), attention_mask) else attention_mask
    return _whole_numbers("attention_mask", attention_mask, bools=True) != 0


def _whole_numbers(name: str, tensor: Any, bools: bool = False) -> np.ndarray:
    if not isinstance(tensor, torch.Tensor):
        raise ChatGLMError(name, "type", type(tensor).__name__, "a torch.Tensor")
    if tensor.is_floating_point() or tensor.is_complex() or (tensor.dtype == torch.bool and not bools):
        raise ChatGLMError(name, "dtype", tensor.dtype, "torch.int64" + " or torch.bool" * bools)
    return tensor.cpu().numpy()


def _check_blocked(blocked: np.ndarray, keep: np.ndarray, prefix: np.ndarray | None) -> None:
    """A mask [B, L, T] must be what padding and prefix make of it, but for the rows of padding, whose results
    nobody reads: the runtime takes nothing else."""
    if prefix is None:
        raise ChatGLMError("attention_mask", "dimensions", 4, "2: [rows, columns], 1 = seen")
    length, total = blocked.shape[1:]
    columns = np.arange(total)
    later = columns > np.arange(total - length, total)[:, None]
    expected = ~keep[:, None] | (later & (columns >= prefix[:, None, None]))
    differs = (expected != blocked) & keep[:, -length:, None]
    for row, i, j in np.argwhere(differs)[:1]:
        seen = "blocked" if blocked[row, i, j] else "open"
        wanted = "left padding blocked, columns before <sop> open, causal from there"
        raise ChatGLMError(f"attention_mask row {row}", f"column {j} for token {i}", seen, wanted)
