"""ChatGLM-6B, the first generation.

Per block, with a = sqrt(56): u = LN1(x); y = a u + Attn(u); w = LN2(y); out = a w + W2 gelu(W1 w). The residual
branch is the normalized value, x itself is dropped. Attention is bidirectional over everything before `<sop>`
and causal from there; half of each head is rotated by the position, half by the position in the answer.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from chatglm_ov.config import ChatGLMConfig
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.lowering import AttentionShape, Lowering, Rotary
from chatglm_ov.models.folds import Fold
from chatglm_ov.models.rows import per_head_qkv, per_head_values, two_halves_to_one

EMBEDDING = "transformer.word_embeddings.weight"
FINAL_NORM = "transformer.final_layernorm"
LM_HEAD = "lm_head.weight"
LAYER = "transformer.layers"

RESIDUAL_SCALE = sqrt(2 * 28)
"""The original never hands its number of layers to the block, so the factor is that of 28 layers always."""


def weight_shapes(config: ChatGLMConfig) -> dict[str, tuple[int, ...]]:
    """Stored tensors and their shapes, [out, in] for linear layers."""
    hidden, inner, vocab = config.hidden_size, config.inner_hidden_size, config.vocab_size
    linears = {
        "attention.query_key_value": (3 * hidden, hidden),
        "attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (inner, hidden),
        "mlp.dense_4h_to_h": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocab, hidden)}
    for i in range(config.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{LAYER}.{i}.{norm}.weight"] = shapes[f"{LAYER}.{i}.{norm}.bias"] = (hidden,)
        for name, shape in linears.items():
            shapes[f"{LAYER}.{i}.{name}.weight"] = shape
            shapes[f"{LAYER}.{i}.{name}.bias"] = shape[:1]
    shapes[f"{FINAL_NORM}.weight"] = shapes[f"{FINAL_NORM}.bias"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (vocab, hidden)
    return shapes


def stacked_weights(config: ChatGLMConfig) -> dict[str, tuple[str, ...]]:
    """None: query, key and value weights are stored as one."""
    return {}


def is_ignored(config: ChatGLMConfig, name: str) -> bool:
    """The stored rotary frequencies are never loaded by the original; a tied head is stored all the same;
    a prefix encoder is read by the conversion."""
    return name.endswith("inv_freq") or ".prefix_encoder." in name or (config.tie_word_embeddings and name == LM_HEAD)


def rotary(config: ChatGLMConfig) -> Rotary:
    """Frequencies rounded to float16, as the original has them even when it runs in float32; one row for the
    position and one for the block position."""
    dim = config.head_dim // 2
    inv_freq = 1.0 / 10000.0 ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    return Rotary(np.tile(inv_freq.astype(np.float16).astype(np.float32), (2, 1)))


def build(config: ChatGLMConfig, lowering: Lowering) -> Any:
    """The whole model as an openvino.Model."""
    heads = config.num_attention_heads
    shape = AttentionShape(heads, heads, config.head_dim)
    rows = per_head_qkv(heads, two_halves_to_one(config.head_dim))
    lowering.inputs(rotary(config), prefix=True)
    x = lowering.embedding(EMBEDDING, tied=config.tie_word_embeddings)
    for i in range(config.num_layers):
        x = _attention(config, lowering, x, i, shape, rows)
        x = _mlp(config, lowering, x, i)
    x = lowering.layer_norm(x, FINAL_NORM, config.layernorm_epsilon)
    return lowering.model(lowering.lm_head(x, EMBEDDING if config.tie_word_embeddings else LM_HEAD), "chatglm")


def _attention(config: ChatGLMConfig, g: Lowering, x: Any, i: int, shape: AttentionShape, rows: np.ndarray) -> Any:
    prefix, eps = f"{LAYER}.{i}", config.layernorm_epsilon
    u = g.layer_norm(x, f"{prefix}.input_layernorm", eps)
    qkv = g.fully_connected(u, f"{prefix}.attention.query_key_value.weight", bias=True, rows=rows)
    context = g.attention(qkv, i, shape)
    return g.fully_connected(
        context, f"{prefix}.attention.dense.weight", bias=True, residual=u, residual_scale=RESIDUAL_SCALE
    )


def _mlp(config: ChatGLMConfig, g: Lowering, y: Any, i: int) -> Any:
    prefix = f"{LAYER}.{i}"
    w = g.layer_norm(y, f"{prefix}.post_attention_layernorm", config.layernorm_epsilon)
    inner = g.fully_connected(w, f"{prefix}.mlp.dense_h_to_4h.weight", bias=True, activation="gelu_tanh")
    return g.fully_connected(
        inner, f"{prefix}.mlp.dense_4h_to_h.weight", bias=True, residual=w, residual_scale=RESIDUAL_SCALE
    )


def input_folds(config: ChatGLMConfig) -> dict[str, Fold]:
    """Only the values of attention: what a norm makes is the residual too, and GELU is not linear."""
    values = per_head_values(config.num_attention_heads, config.head_dim)
    folds = {}
    for i in range(config.num_layers):
        qkv = f"{LAYER}.{i}.attention.query_key_value"
        folds[f"{LAYER}.{i}.attention.dense.weight"] = Fold((f"{qkv}.weight", f"{qkv}.bias"), values, cached=True)
    return folds


def key_order(config: ChatGLMConfig) -> np.ndarray:
    """Order of the dims of a cached key head, in terms of the checkpoint's dims: cached[..., j] is the
    original's [..., key_order[j]]."""
    return two_halves_to_one(config.head_dim)


def prefix_length(config: ChatGLMConfig, input_ids: np.ndarray, attention_mask: np.ndarray | None) -> np.ndarray:
    """Columns before the first `<sop>` of each row, int64 [B], left padding included."""
    is_sop = input_ids == config.bos_token_id
    if attention_mask is not None:
        is_sop &= attention_mask != 0
    for row in np.flatnonzero(~is_sop.any(axis=1)):
        raise ChatGLMError(f"input_ids row {row}", "<sop>", "missing", f"token id {config.bos_token_id}")
    return is_sop.argmax(axis=1).astype(np.int64)


def position_ids(config: ChatGLMConfig, input_ids: np.ndarray, attention_mask: np.ndarray | None) -> np.ndarray:
    """Positions int64 [B, 2, N] of all N tokens. Row 0 counts up to `<sop>` and stays at the place of the first
    [gMASK] (of the first [MASK] if there is none) from there on; row 1 is 0 before `<sop>`, then 1, 2, ...
    Both are 0 on left padding, which the count leaves out, as row 1 does padding behind the prompt."""
    columns = np.arange(input_ids.shape[1], dtype=np.int64)
    real = np.ones_like(input_ids, dtype=bool) if attention_mask is None else attention_mask != 0
    padding = real.argmax(axis=1)[:, None]
    context = prefix_length(config, input_ids, attention_mask)[:, None]
    mask_column = _mask_column(config, input_ids, real)[:, None]
    position = np.where(columns < context, columns, mask_column) - padding
    block_position = (real & (columns >= context)).cumsum(axis=1, dtype=np.int64)
    return np.stack([np.where(columns < padding, 0, position), block_position], axis=1)


def _mask_column(config: ChatGLMConfig, input_ids: np.ndarray, real: np.ndarray) -> np.ndarray:
    is_gmask = (input_ids == config.gmask_token_id) & real
    is_mask = (input_ids == config.mask_token_id) & real
    for row in np.flatnonzero(~(is_gmask | is_mask).any(axis=1)):
        wanted = f"token id {config.gmask_token_id} or {config.mask_token_id}"
        raise ChatGLMError(f"input_ids row {row}", "[gMASK] / [MASK]", "missing", wanted)
    return np.where(is_gmask.any(axis=1), is_gmask.argmax(axis=1), is_mask.argmax(axis=1)).astype(np.int64)
