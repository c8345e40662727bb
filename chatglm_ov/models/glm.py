"""GLM-4-9B-chat-hf and GLM-Edge: `glm` of transformers.

Per block: y = x + Attn(RMS(x)); out = y + W_down (silu(gate) * up), [gate; up] = W_gate_up RMS(y). The mathematics of
`chatglm2` under other names, with query, key and value weights apart. GLM-Edge rotates whole heads, and its LM head may
be tied.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from chatglm_ov.config import GlmConfig
from chatglm_ov.lowering import AttentionShape, Lowering, Rotary
from chatglm_ov.models.folds import Fold, gated_block_folds
from chatglm_ov.models.positions import causal_positions
from chatglm_ov.models.rows import interleaved_to_half, planar_qkv, planar_values
from chatglm_ov.rope_scaling import rotary_frequencies

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
LAYER = "model.layers"
NORMS = ("input_layernorm", "post_attention_layernorm")


def weight_shapes(config: GlmConfig) -> dict[str, tuple[int, ...]]:
    """Stored tensors and their shapes, [out, in] for linear layers."""
    return shapes_with_norms(config, NORMS)


def shapes_with_norms(config: GlmConfig, norms: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of all stored tensors, of a model whose blocks have these norms."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocab, hidden)}
    for i in range(config.num_layers):
        layer = f"{LAYER}.{i}"
        shapes |= {f"{layer}.{norm}.weight": (hidden,) for norm in norms}
        for name, heads in _projections(config).items():
            shapes[f"{layer}.self_attn.{name}.weight"] = (heads * config.head_dim, hidden)
            if config.attention_bias:
                shapes[f"{layer}.self_attn.{name}.bias"] = (heads * config.head_dim,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, config.num_attention_heads * config.head_dim)
        shapes[f"{layer}.mlp.gate_up_proj.weight"] = (2 * inner, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
    shapes[FINAL_NORM] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (vocab, hidden)
    return shapes


def _projections(config: GlmConfig) -> dict[str, int]:
    """Heads of each projection, in the order of the merged weight."""
    groups = config.num_key_value_heads
    return {"q_proj": config.num_attention_heads, "k_proj": groups, "v_proj": groups}


def stacked_weights(config: GlmConfig) -> dict[str, tuple[str, ...]]:
    """Query, key and value weights are one: they have the same input, and are read in one go."""
    kinds = ("weight", "bias") if config.attention_bias else ("weight",)
    attention = [f"{LAYER}.{i}.self_attn" for i in range(config.num_layers)]
    return {
        f"{layer}.qkv_proj.{kind}": tuple(f"{layer}.{name}.{kind}" for name in _projections(config))
        for layer in attention
        for kind in kinds
    }


def is_ignored(config: GlmConfig, name: str) -> bool:
    """GLM-Edge says that its head is tied and stores one all the same. Where it is another one, the configuration does
    not say so here any more (`chatglm_ov.checkpoint.fields`)."""
    return name.endswith("inv_freq") or (config.tie_word_embeddings and name == LM_HEAD)


def rotary(config: GlmConfig) -> Rotary:
    """Angles of the first `rotary_dim` dims of a head, float32."""
    trained = config.max_position_embeddings
    inv_freq, factor = rotary_frequencies(config.rope_theta, config.rotary_dim, config.rope_scaling, trained)
    return Rotary(inv_freq[None], factor)


def build(config: GlmConfig, lowering: Lowering) -> Any:
    """The whole model as an openvino.Model."""
    lowering.inputs(rotary(config))
    x = lowering.embedding(EMBEDDING, tied=config.tie_word_embeddings)
    for i in range(config.num_layers):
        x = attention(config, lowering, x, i, residual=x)
        x = mlp(config, lowering, x, i, residual=x)
    x = lowering.rms_norm(x, FINAL_NORM, config.rms_norm_eps)
    return lowering.model(lowering.lm_head(x, EMBEDDING if config.tie_word_embeddings else LM_HEAD), "glm")


def attention(config: GlmConfig, g: Lowering, x: Any, i: int, residual: Any = None) -> Any:
    """Attn(RMS(x)), and the residual if there is one."""
    layer = f"{LAYER}.{i}"
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    rows = planar_qkv(heads, groups, interleaved_to_half(config.head_dim, config.rotary_dim))
    u = g.rms_norm(x, f"{layer}.input_layernorm.weight", config.rms_norm_eps)
    qkv = g.fully_connected(u, f"{layer}.self_attn.qkv_proj.weight", bias=config.attention_bias, rows=rows)
    context = g.attention(qkv, i, AttentionShape(heads, groups, config.head_dim))
    return g.fully_connected(context, f"{layer}.self_attn.o_proj.weight", residual=residual)


def mlp(config: GlmConfig, g: Lowering, y: Any, i: int, residual: Any = None) -> Any:
    """MLP(RMS(y)), and the residual if there is one. The norm is called after attention, which it follows."""
    layer = f"{LAYER}.{i}"
    w = g.rms_norm(y, f"{layer}.post_attention_layernorm.weight", config.rms_norm_eps)
    gated = g.fully_connected(w, f"{layer}.mlp.gate_up_proj.weight", activation="silu_gate")
    return g.fully_connected(gated, f"{layer}.mlp.down_proj.weight", residual=residual)


def input_folds(config: GlmConfig) -> dict[str, Fold]:
    """Folds of a block with a gated MLP; a value is made for all query heads of its group."""
    values = planar_values(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    kinds = ("weight", "bias") if config.attention_bias else ("weight",)
    folds: dict[str, Fold] = {}
    for layer in (f"{LAYER}.{i}" for i in range(config.num_layers)):
        folds |= gated_block_folds(
            (f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight"),
            tuple(f"{layer}.self_attn.qkv_proj.{kind}" for kind in kinds),
            f"{layer}.self_attn.o_proj.weight",
            (f"{layer}.mlp.gate_up_proj.weight", f"{layer}.mlp.down_proj.weight"),
            values,
            config.intermediate_size,
        )
    return folds


def key_order(config: GlmConfig) -> np.ndarray:
    """Order of the dims of a cached key head, in terms of the checkpoint's dims: cached[..., j] is the
    original's [..., key_order[j]]."""
    return interleaved_to_half(config.head_dim, config.rotary_dim)


def position_ids(config: GlmConfig, input_ids: np.ndarray, attention_mask: np.ndarray | None) -> np.ndarray:
    """Positions int64 [B, N] of all N tokens."""
    return causal_positions(input_ids, attention_mask)


def prefix_length(config: GlmConfig, input_ids: np.ndarray, attention_mask: np.ndarray | None) -> None:
    """Plain causal attention: there is no prefix that every row sees."""
