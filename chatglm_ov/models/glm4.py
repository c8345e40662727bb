"""GLM-4-0414 and GLM-Z1, 9B and 32B: `glm4` of transformers.

Per block, a norm on both sides of attention and MLP: y = x + RMS(Attn(RMS(x))); out = y + RMS(MLP(RMS(y))). All else is
as in `glm`.
"""

from __future__ import annotations

from typing import Any

from chatglm_ov.config import Glm4Config
from chatglm_ov.lowering import Lowering
from chatglm_ov.models import glm
from chatglm_ov.models.glm import (
    EMBEDDING,
    FINAL_NORM,
    LAYER,
    LM_HEAD,
    input_folds,
    is_ignored,
    key_order,
    position_ids,
    prefix_length,
    rotary,
    stacked_weights,
)

__all__ = [
    "EMBEDDING", "FINAL_NORM", "LAYER", "LM_HEAD", "build", "input_folds", "is_ignored", "key_order",
    "position_ids", "prefix_length", "rotary", "stacked_weights", "weight_shapes",
]  # fmt: skip

NORMS = (*glm.NORMS, "post_self_attn_layernorm", "post_mlp_layernorm")


def weight_shapes(config: Glm4Config) -> dict[str, tuple[int, ...]]:
    """Stored tensors and their shapes, [out, in] for linear layers."""
    return glm.shapes_with_norms(config, NORMS)


def build(config: Glm4Config, lowering: Lowering) -> Any:
    """The whole model as an openvino.Model."""
    eps = config.rms_norm_eps
    lowering.inputs(rotary(config))
    x = lowering.embedding(EMBEDDING, tied=config.tie_word_embeddings)
    for i in range(config.num_layers):
        attended = glm.attention(config, lowering, x, i)
        y = lowering.add(x, lowering.rms_norm(attended, f"{LAYER}.{i}.post_self_attn_layernorm.weight", eps))
        made = glm.mlp(config, lowering, y, i)
        x = lowering.add(y, lowering.rms_norm(made, f"{LAYER}.{i}.post_mlp_layernorm.weight", eps))
    x = lowering.rms_norm(x, FINAL_NORM, eps)
    return lowering.model(lowering.lm_head(x, EMBEDDING if config.tie_word_embeddings else LM_HEAD), "glm4")
