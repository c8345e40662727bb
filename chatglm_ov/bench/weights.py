"""Random weights at a model's shapes that are there at once, in the place of a checkpoint's.

The values of a tensor are windows on one pool of normal numbers, each row some numbers behind the one before it: no
two rows are equal, scales differ as those of real weights do, and nothing is drawn but the pool.
"""

from __future__ import annotations

import zlib
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from chatglm_ov.checkpoint.random_weights import RandomTensor, stored_tensors
from chatglm_ov.checkpoint.reader import Checkpoint, FileTensor
from chatglm_ov.errors import ChatGLMError

POOL = 1 << 24
"""Numbers in a pool: 64 MB."""


class RandomWeights(Checkpoint):
    """A checkpoint of the config.json `fields` without files. Tensors have the means and deviations of
    `chatglm_ov.checkpoint.random_weights`; equal seeds, equal values."""

    def __init__(self, fields: dict[str, Any], seed: int = 0):
        super().__init__(Path("random weights"), {})
        self._random = {tensor.name: tensor for tensor in stored_tensors(fields)}
        for name, tensor in self._random.items():
            self._tensors[name] = FileTensor(name, self.folder, tensor.shape, tensor.dtype.name, tensor.nbytes, self)
        self._seed = seed
        self._pools: dict[tuple[float, float], np.ndarray] = {}

    def close(self) -> None:
        super().close()
        self._pools.clear()
        self.__dict__.pop("_normal", None)

    @cached_property
    def _normal(self) -> np.ndarray:
        return np.random.default_rng(self._seed).standard_normal(POOL, np.float32)

    def _view(self, tensor: FileTensor) -> np.ndarray:
        random = self._random[tensor.name]
        if random.values is not None:
            return random.values
        return _windows(self._pool(random), tensor.shape, zlib.crc32(random.seed_name.encode()))

    def _pool(self, tensor: RandomTensor) -> np.ndarray:
        key = tensor.mean, tensor.std
        if key not in self._pools:
            self._pools[key] = self._normal * np.float32(tensor.std) + np.float32(tensor.mean)
        return self._pools[key]


def _windows(pool: np.ndarray, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A read-only view of `shape` on the pool, whose start follows from `seed`."""
    rows, columns = prod(shape[:-1]), shape[-1]
    if rows + columns > pool.size // 2:
        raise ChatGLMError("random weights", "shape", list(shape), f"less than {pool.size // 2} rows and columns")
    step = max(1, (pool.size // 2 - columns) // rows)
    start = seed % (pool.size - columns - step * (rows - 1))
    view = as_strided(pool[start:], (rows, columns), (step * pool.itemsize, pool.itemsize), writeable=False)
    return view if len(shape) == 2 else view.reshape(shape)
