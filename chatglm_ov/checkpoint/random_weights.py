"""Random weights at a model's shapes, drawn a block at a time.

Values are normal with a standard deviation of 1/sqrt(inputs) for matrices, near 1 for the weights of norms: sums
stay of order one, so that logits are finite. They depend on the seed and the tensor's name only.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from chatglm_ov.checkpoint.files import FLOATS
from chatglm_ov.config import ArchitectureConfig, parse_config
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.models import architecture

# Values drawn at once: 4 MB in float32.
BLOCK = 1 << 20


_FLOAT32_NORMS = ("chatglm",)
"""Architectures whose norms are float32 beside weights of 16 bits."""


@dataclass(frozen=True)
class RandomTensor:
    """Normal values of this mean and deviation, or `values` themselves. Tensors of one `seed_name` are equal."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    mean: float = 0.0
    std: float = 0.0
    values: np.ndarray | None = None
    seed_name: str = ""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def blocks(self, seed: int) -> Iterator[np.ndarray]:
        """The values in file order, flat arrays of at most BLOCK elements."""
        if self.values is not None:
            yield self.values.astype(self.dtype).ravel()
            return
        generator = np.random.default_rng([seed, zlib.crc32(self.seed_name.encode())])
        size = prod(self.shape)
        buffer = np.empty(min(BLOCK, size), np.float32)
        for start in range(0, size, BLOCK):
            block = buffer[: size - start]
            generator.standard_normal(out=block, dtype=np.float32)
            block *= self.std
            block += self.mean
            yield block.astype(self.dtype)


def stored_tensors(fields: dict[str, Any]) -> list[RandomTensor]:
    """All tensors that the original checkpoint of this config.json holds, in its `torch_dtype`.

    Raises ChatGLMError for a config that names no known model or type.
    """
    config, dtype = parse_config(fields), str(fields.get("torch_dtype"))
    if dtype not in FLOATS:
        raise ChatGLMError("config.json", "torch_dtype", repr(dtype), f"one of {', '.join(FLOATS)}")
    model = architecture(config)
    shapes = model.weight_shapes(config)
    seed_names = {}
    if config.tie_word_embeddings:
        # A tied head is stored all the same, with equal values.
        shapes[model.LM_HEAD] = shapes[model.EMBEDDING]
        seed_names[model.LM_HEAD] = model.EMBEDDING
    tensors: list[RandomTensor] = []
    for name, shape in shapes.items():
        mean, std = _mean_and_std(name, shape)
        stored = "float32" if config.architecture in _FLOAT32_NORMS and "norm" in name else dtype
        tensors.append(RandomTensor(name, shape, FLOATS[stored], mean, std, seed_name=seed_names.get(name, name)))
    pairs = config.head_dim // 4
    frequencies = 10000.0 ** (-np.arange(pairs, dtype=np.float32) / pairs)
    buffers = [RandomTensor(name, (pairs,), FLOATS[dtype], values=frequencies) for name in _rotary_buffers(config)]
    return [*buffers, *tensors]


def _rotary_buffers(config: ArchitectureConfig) -> list[str]:
    """Stored rotary frequencies, which no model reads: of each layer in ChatGLM-6B, of all in ChatGLM2."""
    return {
        "chatglm": [f"transformer.layers.{i}.attention.rotary_emb.inv_freq" for i in range(config.num_layers)],
        "chatglm2": ["transformer.rotary_pos_emb.inv_freq"],
    }.get(config.architecture, [])


def _mean_and_std(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if name.endswith("norm.weight"):
        return 1.0, 0.05
    return 0.0, shape[1] ** -0.5 if len(shape) == 2 else 0.02
