"""The small vocabulary that the model files are written in.

Letters in shapes: B batch rows, L tokens of this call, T = past + L cached tokens, H query heads, G key/value
heads, D head_dim, R rotary_dim, V vocabulary.

A lowering turns each word into graph nodes. `stock` uses opset calls only, in the patterns that OpenVINO's
plugins fuse; it runs on every device and is the numerical reference. `fused` uses the operations of the native library
and runs on CPUs that it has kernels for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

Activation = Literal["gelu_tanh", "silu_gate"]


@dataclass(frozen=True)
class Rotary:
    """Rotate-half rotary embedding of the first `2 * inv_freq.shape[1] * position_rows` dims of each head.

    inv_freq: float32 [position_rows, n], angle = position_ids[row] * inv_freq[row]. The angles of all rows are
    laid side by side, so that one rotation over R = 2 * position_rows * n dims serves every family. cos and sin are
    multiplied by `factor` (YaRN).
    """

    inv_freq: np.ndarray
    factor: float = 1.0

    @property
    def dim(self) -> int:
        return 2 * self.inv_freq.size


@dataclass(frozen=True)
class AttentionShape:
    """H, G, D of an attention layer; scores are scaled by 1/sqrt(D)."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


class Lowering(Protocol):
    """`Any` stands for a graph value [B, L, features] of the lowering's own kind."""

    def inputs(self, rotary: Rotary, *, prefix: bool = False) -> None:
        """Declare the model inputs: input_ids i64 [B, L], attention_mask i64 [B, T], position_ids i64 [B, L] (or
        [B, rows, L], where `rotary` has several rows of positions), beam_idx i32 [B], and with `prefix` prefix_length
        i64 [B], the leading columns that every row sees. `rotary` is that of all layers. A lowering may have
        logits_to_keep i64 [1] too, which others are given at load."""

    def embedding(self, name: str, *, tied: bool = False) -> Any:
        """Rows of the table `name` for input_ids: [B, L, hidden_size]. `tied`: it is the LM head's table too."""

    def rms_norm(self, x: Any, name: str, eps: float) -> Any:
        """x / sqrt(mean(x^2) + eps) * weight."""

    def layer_norm(self, x: Any, name: str, eps: float) -> Any:
        """(x - mean) / sqrt(variance + eps) * weight + bias."""

    def add(self, x: Any, y: Any) -> Any:
        """x + y."""

    def fully_connected(
        self,
        x: Any,
        name: str,
        *,
        bias: bool = False,
        rows: np.ndarray | None = None,
        activation: Activation | None = None,
        residual: Any = None,
        residual_scale: float = 1.0,
    ) -> Any:
        """activation(x W^T + bias) + residual_scale * residual. `rows` reorders the output features (weight rows
        and bias). `silu_gate`: the first half of the features is the gate, silu(gate) * up."""

    def attention(self, qkv: Any, layer: int, shape: AttentionShape) -> Any:
        """Rotary embedding, append to the cache, attention. qkv [B, L, (H + 2G) D] in planes q, k, v -> [B, L, H D]."""

    def lm_head(self, x: Any, name: str) -> Any:
        """Logits f32 [B, L, V], or [B, kept, V] of the last logits_to_keep positions, 0 meaning all of them."""

    def model(self, logits: Any, name: str) -> Any:
        """The finished openvino.Model."""
