"""ChatGLM2-6B, ChatGLM3-6B (8k, 32k, 128k), CodeGeeX2, and GLM-4-9B / codegeex4 in the original layout.

One architecture; the models differ in numbers, tokenizer and in what `rope_ratio` does. Per block:
y = x + Attn(RMS(x)); out = y + W2 (silu(gate) * up), [gate; up] = W1 RMS(y).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from chatglm_ov.config import ChatGLM2Config
from chatglm_ov.lowering import AttentionShape, Lowering, Rotary
from chatglm_ov.models.folds import Fold, gated_block_folds
from chatglm_ov.models.positions import causal_positions
from chatglm_ov.models.rows import interleaved_to_half, per_head_qkv, per_head_values, planar_qkv, planar_values
from chatglm_ov.rope_scaling import rotary_frequencies

EMBEDDING = "transformer.embedding.word_embeddings.weight"
FINAL_NORM = "transformer.encoder.final_layernorm.weight"
LM_HEAD = "transformer.output_layer.weight"
LAYER = "transformer.encoder.layers"


def weight_shapes(config: ChatGLM2Config) -> dict[str, tuple[int, ...]]:
    """Stored tensors and their shapes, [out, in] for linear layers."""
    hidden, ffn, vocab = config.hidden_size, config.ffn_hidden_size, config.padded_vocab_size
    context = config.num_attention_heads * config.kv_channels
    qkv = context + 2 * config.num_key_value_heads * config.kv_channels
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocab, hidden)}
    for i in range(config.num_layers):
        shapes[f"{LAYER}.{i}.input_layernorm.weight"] = (hidden,)
        shapes[f"{LAYER}.{i}.self_attention.query_key_value.weight"] = (qkv, hidden)
        if config.add_qkv_bias:
            shapes[f"{LAYER}.{i}.self_attention.query_key_value.bias"] = (qkv,)
        shapes[f"{LAYER}.{i}.self_attention.dense.weight"] = (hidden, context)
        shapes[f"{LAYER}.{i}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{LAYER}.{i}.mlp.dense_h_to_4h.weight"] = (2 * ffn, hidden)
        shapes[f"{LAYER}.{i}.mlp.dense_4h_to_h.weight"] = (hidden, ffn)
    shapes[FINAL_NORM] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (vocab, hidden)
    return shapes


def stacked_weights(config: ChatGLM2Config) -> dict[str, tuple[str, ...]]:
    """None: query, key and value weights are stored as one."""
    return {}


def is_ignored(config: ChatGLM2Config, name: str) -> bool:
    """The rotary frequencies follow from the configuration; a tied head may be stored all the same; a
    prefix encoder is read by the conversion."""
    return name.endswith("inv_freq") or ".prefix_encoder." in name or (config.tie_word_embeddings and name == LM_HEAD)


def rotary(config: ChatGLM2Config) -> Rotary:
    """Angles of the first half of the head, float32 (the form that the original takes in float32).

    `rope_ratio` divides the position (chatglm2-6b-32k) or multiplies the base 10000 (all others).
    """
    dim = config.kv_channels // 2
    interpolated = config.rope_ratio_meaning == "position"
    base = 10000.0 * (1.0 if interpolated else config.rope_ratio)
    inv_freq, factor = rotary_frequencies(base, dim, config.rope_scaling, config.seq_length)
    if interpolated:
        inv_freq = inv_freq / np.float32(config.rope_ratio)
    return Rotary(inv_freq[None], factor)


def qkv_rows(config: ChatGLM2Config, rotary_dim: int) -> np.ndarray:
    """The merged weight holds all query heads, then the key groups, then the value groups; without
    multi-query attention it is interleaved per head."""
    order = interleaved_to_half(config.kv_channels, rotary_dim)
    if config.multi_query_attention:
        return planar_qkv(config.num_attention_heads, config.num_key_value_heads, order)
    return per_head_qkv(config.num_attention_heads, order)


def build(config: ChatGLM2Config, lowering: Lowering) -> Any:
    """The whole model as an openvino.Model."""
    shape = AttentionShape(config.num_attention_heads, config.num_key_value_heads, config.kv_channels)
    rope = rotary(config)
    rows = qkv_rows(config, rope.dim)
    lowering.inputs(rope)
    x = lowering.embedding(EMBEDDING, tied=config.tie_word_embeddings)
    for i in range(config.num_layers):
        x = _attention(config, lowering, x, i, shape, rows)
        x = _mlp(config, lowering, x, i)
    x = lowering.rms_norm(x, FINAL_NORM, config.layernorm_epsilon)
    return lowering.model(lowering.lm_head(x, EMBEDDING if config.tie_word_embeddings else LM_HEAD), "chatglm2")


def _attention(config: ChatGLM2Config, g: Lowering, x: Any, i: int, shape: AttentionShape, rows: np.ndarray) -> Any:
    prefix, eps = f"{LAYER}.{i}", config.layernorm_epsilon
    u = g.rms_norm(x, f"{prefix}.input_layernorm.weight", eps)
    qkv = g.fully_connected(u, f"{prefix}.self_attention.query_key_value.weight", bias=config.add_qkv_bias, rows=rows)
    context = g.attention(qkv, i, shape)
    return g.fully_connected(context, f"{prefix}.self_attention.dense.weight", residual=x)


def _mlp(config: ChatGLM2Config, g: Lowering, y: Any, i: int) -> Any:
    prefix = f"{LAYER}.{i}"
    w = g.rms_norm(y, f"{prefix}.post_attention_layernorm.weight", config.layernorm_epsilon)
    gated = g.fully_connected(w, f"{prefix}.mlp.dense_h_to_4h.weight", activation="silu_gate")
    return g.fully_connected(gated, f"{prefix}.mlp.dense_4h_to_h.weight", residual=y)


def input_folds(config: ChatGLM2Config) -> dict[str, Fold]:
    """Folds of a block with a gated MLP; a value is made for all query heads of its group."""
    heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.kv_channels
    values = planar_values(heads, groups, dim) if config.multi_query_attention else per_head_values(heads, dim)
    kinds = ("weight", "bias") if config.add_qkv_bias else ("weight",)
    folds: dict[str, Fold] = {}
    for layer in (f"{LAYER}.{i}" for i in range(config.num_layers)):
        folds |= gated_block_folds(
            (f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight"),
            tuple(f"{layer}.self_attention.query_key_value.{kind}" for kind in kinds),
            f"{layer}.self_attention.dense.weight",
            (f"{layer}.mlp.dense_h_to_4h.weight", f"{layer}.mlp.dense_4h_to_h.weight"),
            values,
            config.ffn_hidden_size,
        )
    return folds


def key_order(config: ChatGLM2Config) -> np.ndarray:
    """Order of the dims of a cached key head, in terms of the checkpoint's dims: cached[..., j] is the
    original's [..., key_order[j]]."""
    return interleaved_to_half(config.kv_channels, rotary(config).dim)


def position_ids(config: ChatGLM2Config, input_ids: np.ndarray, attention_mask: np.ndarray | None) -> np.ndarray:
    """Positions int64 [B, N] of all N tokens."""
    return causal_positions(input_ids, attention_mask)


def prefix_length(config: ChatGLM2Config, input_ids: np.ndarray, attention_mask: np.ndarray | None) -> None:
    """Plain causal attention: there is no prefix that every row sees."""
