"""Trained prefixes (P-Tuning v2, arXiv:2110.07602): keys and values that stand before every sequence in the cache.

The originals save the tensors `transformer.prefix_encoder.*` alone, or in a checkpoint with all others (model-family
section 3.8). A conversion computes keys and values of them once; they have no rotary embedding, and take no positions.

Letters: L layers, P tokens of the prefix, G key/value heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chatglm_ov.checkpoint.files import FLOATS, open_weight_file, save_safetensors
from chatglm_ov.checkpoint.reader import Checkpoint
from chatglm_ov.config import ArchitectureConfig
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.models import architecture

FILE_NAME = "prefix.safetensors"
ENCODER = "transformer.prefix_encoder."
_EMBEDDING = "embedding.weight"
_PROJECTION = ("trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")


@dataclass(frozen=True)
class TrainedPrefix:
    """keys and values: float32 [L, G, P, D], the dims of a key in the order of the cache."""

    keys: np.ndarray
    values: np.ndarray

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def equals(self, other: TrainedPrefix | None) -> bool:
        """But for the rounding of a projection, whose products are those of the processor."""
        return other is not None and all(
            np.allclose(getattr(self, name), getattr(other, name), rtol=1e-4, atol=1e-5) for name in ("keys", "values")
        )

    def save(self, folder: Path) -> None:
        save_safetensors({"keys": self.keys, "values": self.values}, folder / FILE_NAME)

    @classmethod
    def load(cls, folder: Path, config: ArchitectureConfig) -> TrainedPrefix | None:
        """The prefix in a converted folder; None if its model has none. Raises ChatGLMError if the file is missing or
        another model's."""
        path, length = folder / FILE_NAME, config.pre_seq_len
        if not length:
            return None
        if not path.is_file():
            raise ChatGLMError(path, "file", "missing", f"keys and values of pre_seq_len {length} tokens")
        stored = open_weight_file(path)
        shape = (config.num_layers, config.num_key_value_heads, length, config.head_dim)
        for name in ("keys", "values"):
            seen = f"{stored[name].dtype} {list(stored[name].shape)}" if name in stored else "missing"
            if seen != (wanted := f"float32 {list(shape)}"):
                raise ChatGLMError(path, name, seen, wanted)
        return cls(*(np.array(stored[name].view()) for name in ("keys", "values")))


def has_prefix(weights: Checkpoint) -> bool:
    """Whether a checkpoint holds a prefix encoder."""
    return any(name.startswith(ENCODER) for name in weights.names)


def read_prefix(weights: Checkpoint, config: ArchitectureConfig) -> TrainedPrefix:
    """Keys and values of the prefix encoder in `weights`: its embedding [P, 2 L G D], or with a projection
    W_2 tanh(W_0 e + b_0) + b_2 of each row e. Raises ChatGLMError for tensors that are missing, left over, of another
    model, or not finite."""
    if not config.takes_trained_prefix:
        raise ChatGLMError(weights.folder, "prefix_encoder", "there", f"none: {config.architecture} models have none")
    features = 2 * config.num_layers * config.num_key_value_heads * config.head_dim
    found = {name.removeprefix(ENCODER): _floats(weights, name) for name in weights.names if name.startswith(ENCODER)}
    names = (_EMBEDDING, *_PROJECTION) if any(name in found for name in _PROJECTION) else (_EMBEDDING,)
    for name in names:
        if name not in found:
            raise ChatGLMError(weights.folder, ENCODER + name, "missing", "a tensor of the prefix encoder")
    for name in sorted(found.keys() - set(names)):
        raise ChatGLMError(weights.folder, ENCODER + name, "there", f"only {', '.join(names)}")
    rows = found[_EMBEDDING]
    if len(names) > 1:
        rows = _projected(weights, rows, found, features)
    if rows.ndim != 2 or rows.shape[1] != features:
        wanted = f"[tokens, {features}], keys and values of {config.num_layers} layers"
        raise ChatGLMError(weights.folder, f"shape of {ENCODER}{_EMBEDDING}", list(rows.shape), wanted)
    shape = (len(rows), config.num_layers, 2, config.num_key_value_heads, config.head_dim)
    keys, values = rows.reshape(shape).transpose(2, 1, 3, 0, 4)
    order = architecture(config).key_order(config)
    return TrainedPrefix(np.ascontiguousarray(keys[..., order]), np.ascontiguousarray(values))


def _floats(weights: Checkpoint, name: str) -> np.ndarray:
    tensor = weights[name]
    if tensor.dtype not in FLOATS:
        raise ChatGLMError(tensor.file, f"dtype of {name}", tensor.dtype, f"one of {', '.join(FLOATS)}")
    values = tensor.read()
    if not np.isfinite(values).all():
        raise ChatGLMError(tensor.file, f"a value of {name}", values[~np.isfinite(values)][0], "a finite number")
    return values


def _projected(weights: Checkpoint, rows: np.ndarray, found: dict[str, np.ndarray], features: int) -> np.ndarray:
    w_0, b_0, w_2, b_2 = (found[name] for name in _PROJECTION)
    inner = len(b_0)
    wanted = {
        "trans.0.weight": (w_0, (inner, rows.shape[-1])),
        "trans.2.weight": (w_2, (features, inner)),
        "trans.2.bias": (b_2, (features,)),
    }
    for name, (values, shape) in wanted.items():
        if values.shape != shape:
            raise ChatGLMError(weights.folder, f"shape of {ENCODER}{name}", list(values.shape), list(shape))
    return np.tanh(rows @ w_0.T + b_0) @ w_2.T + b_2
