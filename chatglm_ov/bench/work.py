"""What a step has to read and to compute, from the model's shapes: no time is taken here.

Letters: T tokens in the cache, B rows.
"""

from __future__ import annotations

from math import prod

import openvino as ov

from chatglm_ov.config import ArchitectureConfig
from chatglm_ov.models import architecture, graph_shapes, lm_head_name

ELEMENT_BYTES = {"f32": 4, "bf16": 2, "int8": 1}


def weight_bytes(model: ov.Model, config: ArchitectureConfig) -> int:
    """Bytes of weights that every step reads, as the graph of an IR holds them: all but the embedding, of which it
    reads a row a token; a tied one is the LM head as well and counts."""
    names = set(graph_shapes(config))
    if not config.tie_word_embeddings:
        names.remove(architecture(config).EMBEDDING)
    total = 0
    for node in model.get_ops():
        if node.get_type_name() == "Constant":
            name = node.get_friendly_name()
            # The parts of a weight are called by its name and their own: lm_head.weight.scale.
            if name in names or name.rpartition(".")[0] in names:
                total += node.get_byte_size()
    return total


def cache_bytes(config: ArchitectureConfig, element_type: str, tokens: float, rows: int) -> float:
    """Bytes of keys and values of T tokens in all layers and B rows; int8 has a float32 scale a token and head."""
    head = config.head_dim * ELEMENT_BYTES[element_type] + (4 if element_type == "int8" else 0)
    return 2 * config.num_layers * config.num_key_value_heads * head * tokens * rows


PROJECTIONS = (".query_key_value.", ".qkv_proj.")
"""In the names of the weights before attention; what is behind it in the last layer is for the last rows only."""


def prompt_operations(config: ArchitectureConfig, tokens: int, rows: int, ops: str) -> int:
    """Operations (2 a multiply-add) of a prompt of T tokens in B rows: linear layers, the LM head for the last token,
    scores and context of attention. A token sees those before it, or the whole prompt. The fused lowering leaves out
    what only the other tokens' logits would need: that is not counted."""
    matrices = {name: prod(shape) for name, shape in graph_shapes(config).items() if len(shape) == 2}
    once = matrices.pop(lm_head_name(config))
    matrices.pop(architecture(config).EMBEDDING, None)
    if ops == "fused":
        last = f".{config.num_layers - 1}."
        behind = [name for name in matrices if last in name and not any(part in name for part in PROJECTIONS)]
        once += sum(matrices.pop(name) for name in behind)
    pairs = tokens * tokens if config.sees_whole_prompt else tokens * tokens // 2
    attention = 4 * pairs * config.num_attention_heads * config.head_dim * config.num_layers
    return rows * (2 * sum(matrices.values()) * tokens + 2 * once + attention)
