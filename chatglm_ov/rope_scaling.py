"""Rotary frequencies for longer contexts than a model was trained on: `rope_scaling` of config.json.

- linear: positions are divided by the factor (arXiv:2306.15595).
- ntk: the base grows, so that the slowest frequency is divided by the factor and the fastest is kept.
- yarn: frequencies that turn often over the trained context are kept, slow ones divided by the factor, with a ramp
  between the two; scores become sharper by the square of an attention factor (arXiv:2309.00071).
"""

from __future__ import annotations

from math import ceil, floor, log, pi
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator


class RopeScaling(BaseModel):
    """The fields of `rope_scaling` (transformers 4) or of `rope_parameters` (transformers 5)."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    rope_type: Literal["linear", "ntk", "yarn"]
    factor: float = Field(ge=1, le=10000)
    original_max_position_embeddings: int | None = Field(None, gt=0)
    """Positions the model was trained on; None: those that its configuration allows without scaling."""
    attention_factor: float | None = Field(None, gt=0)
    beta_fast: float | None = Field(None, gt=0)
    beta_slow: float | None = Field(None, gt=0)
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @model_validator(mode="before")
    @classmethod
    def _older_name_of_the_type(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and "rope_type" not in fields and "type" in fields:
            return {**fields, "rope_type": fields["type"]}
        return fields

    def positions(self, trained: int) -> int:
        """Positions that a model of so many trained ones has with this scaling."""
        return int((self.original_max_position_embeddings or trained) * self.factor)


def rotary_frequencies(
    base: float, dim: int, scaling: RopeScaling | None = None, trained: int = 0
) -> tuple[np.ndarray, float]:
    """Angle per position of each pair of dims, float32 [dim / 2], and the factor of cos and sin.

    trained: positions that the model was trained on, where `scaling` does not tell; only YaRN asks.
    """
    if scaling is not None and scaling.rope_type == "ntk":
        base *= scaling.factor ** (dim / (dim - 2))
    inv_freq = 1.0 / np.float32(base) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    inv_freq = inv_freq.astype(np.float32)
    if scaling is None or scaling.rope_type == "ntk":
        return inv_freq, 1.0
    interpolated = inv_freq / np.float32(scaling.factor)
    if scaling.rope_type == "linear":
        return interpolated, 1.0
    kept = _kept_share(base, dim, scaling, scaling.original_max_position_embeddings or trained)
    return interpolated * (1 - kept) + inv_freq * kept, _attention_factor(scaling)


def _kept_share(base: float, dim: int, scaling: RopeScaling, trained: int) -> np.ndarray:
    """YaRN's ramp, float32 [dim / 2]: 1 for pairs that turn at least beta_fast times over the trained positions, 0 for
    those that turn at most beta_slow times."""

    def pair(turns: float) -> float:
        return dim * log(trained / (turns * 2 * pi)) / (2 * log(base))

    low, high = pair(scaling.beta_fast or 32), pair(scaling.beta_slow or 1)
    if scaling.truncate:
        low, high = floor(low), ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    # A ramp of no length is a step.
    ramp = (np.arange(dim // 2, dtype=np.float32) - low) / (high - low or 0.001)
    return 1 - np.clip(ramp, 0, 1).astype(np.float32)


def _attention_factor(scaling: RopeScaling) -> float:
    def sharper(mscale: float) -> float:
        return 0.1 * mscale * log(scaling.factor) + 1 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return sharper(scaling.mscale) / sharper(scaling.mscale_all_dim)
    return sharper(1)
