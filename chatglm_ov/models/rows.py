"""Orders of the rows of query/key/value weights.

The kernels know one rotary form, rotate-half over the first R dims of a head. Other forms become that one by
reordering the rows of W_q and W_k inside every head: q.k does not change when both are reordered alike.
"""

from __future__ import annotations

import numpy as np


def interleaved_to_half(head_dim: int, rotary_dim: int) -> np.ndarray:
    """Order of the dims of one head that turns rotary over adjacent pairs (2i, 2i+1) of the first `rotary_dim`
    dims into rotate-half: [0, 2, ..., 1, 3, ..., rotary_dim, ...]."""
    pairs = np.arange(rotary_dim)
    return np.concatenate([pairs[0::2], pairs[1::2], np.arange(rotary_dim, head_dim)])


def two_halves_to_one(head_dim: int) -> np.ndarray:
    """Order of the dims of one head that turns two rotate-half rotaries, one over each half of the head, into a
    single one over the whole head: [a1 b1 a2 b2] where a, b are the halves and 1, 2 their rotate-half parts."""
    a1, a2, b1, b2 = np.arange(head_dim).reshape(4, head_dim // 4)
    return np.concatenate([a1, b1, a2, b2])


def planar_qkv(num_heads: int, num_groups: int, head_order: np.ndarray) -> np.ndarray:
    """Rows of a [q heads | k groups | v groups] weight, with the dims of q and k heads in `head_order`."""
    head_dim = head_order.size
    heads = np.arange(num_heads + 2 * num_groups)[:, None] * head_dim
    rotated = heads[: num_heads + num_groups] + head_order
    values = heads[num_heads + num_groups :] + np.arange(head_dim)
    return np.concatenate([rotated.ravel(), values.ravel()])


def per_head_qkv(num_heads: int, head_order: np.ndarray) -> np.ndarray:
    """Rows of a weight stored per head as (q, k, v), taken in planes q | k | v with q and k in `head_order`."""
    head_dim = head_order.size
    starts = np.arange(num_heads)[:, None] * 3 * head_dim
    query = starts + head_order
    key = starts + head_dim + head_order
    value = starts + 2 * head_dim + np.arange(head_dim)
    return np.concatenate([query.ravel(), key.ravel(), value.ravel()])


def planar_values(num_heads: int, num_groups: int, head_dim: int) -> np.ndarray:
    """Row of a [q heads | k groups | v groups] weight that makes each column of attention's output, [heads D]."""
    group = np.arange(num_heads) // (num_heads // num_groups)
    starts = (num_heads + num_groups + group)[:, None] * head_dim
    return (starts + np.arange(head_dim)).ravel()


def per_head_values(num_heads: int, head_dim: int) -> np.ndarray:
    """Rows of the values in a weight that is stored per head as (q, k, v)."""
    starts = (3 * np.arange(num_heads) + 2)[:, None] * head_dim
    return (starts + np.arange(head_dim)).ravel()
