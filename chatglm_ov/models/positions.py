"""The position rule that all models but ChatGLM-6B share."""

from __future__ import annotations

import numpy as np


def causal_positions(input_ids: np.ndarray, attention_mask: np.ndarray | None) -> np.ndarray:
    """Positions int64 [B, N] of all N tokens: 0, 1, 2, ... from the first real token on, 0 on left padding.
    Without a mask every token counts, as in the originals."""
    if attention_mask is None:
        return np.broadcast_to(np.arange(input_ids.shape[1], dtype=np.int64), input_ids.shape).copy()
    return np.maximum(np.cumsum(attention_mask != 0, axis=1, dtype=np.int64) - 1, 0)
