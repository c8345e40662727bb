"""The format that a weight has in a model, where nothing else is chosen."""

from __future__ import annotations

from chatglm_ov.weight_formats import WeightFormat
from chatglm_ov.weights.choices import DEFAULT_CHOICES


def stored_format(model_format: str, columns: int, table: bool = False) -> WeightFormat:
    """Of a linear weight [N, columns], or with `table` of the embedding or the LM head."""
    if table:
        return DEFAULT_CHOICES.lm_head(model_format, columns)
    return DEFAULT_CHOICES.linear(model_format, "weight", columns)
