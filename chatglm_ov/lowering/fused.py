"""The fused lowering: the operations of the native library, with the KV cache in the model and updated in place.

Letters in shapes as in `chatglm_ov.lowering`. All values between operations are f32; the operations choose what they
compute in.

A layer's cache is one variable of bytes, in blocks of slots as csrc/kernels/cache_layout.h has them. Attention writes
into the value that it reads, and what is assigned is that value: the CPU plugin keeps one buffer for it and copies
nothing (`chatglm_ov.runtime.in_place` tests that, and knows what to do where it does not hold). Which row of the cache
holds a block is told by the variable `beam_table`, so that a reorder moves no keys or values: a beam copies the block
that it has begun, if it shares that, and reads all others where they lie. States begin empty: whoever runs the model
gives the caches their memory (`chatglm_ov.runtime.kv_cache`), before the first inference and after reset_state.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset15 as ops

from chatglm_ov.lowering import Activation, AttentionShape, Rotary
from chatglm_ov.lowering.graph import CACHE, LOGITS_TO_KEEP, GraphLowering, i64, last_rows, scalar
from chatglm_ov.lowering.operations import operation
from chatglm_ov.weights.packing import PADDING, PackedWeight, filled, gate_up_rows
from chatglm_ov.weights.store import WeightStore

BEAM_TABLE = "beam_table"


class FusedLowering(GraphLowering):
    """Builds one model; see `chatglm_ov.lowering.Lowering` for the words."""

    name = "fused"
    weights: WeightStore

    def inputs(self, rotary: Rotary, *, prefix: bool = False) -> None:
        super().inputs(rotary, prefix=prefix)
        rows = self._angle_rows(rotary)
        angles = rows[0] if len(rows) == 1 else ops.concat(rows, -1)
        self._cos_sin = self._cos_and_sin(angles, rotary)  # f32 [B, L, R / 2], of all layers
        self._logits_to_keep = self.input(LOGITS_TO_KEEP, [1], np.int64)
        self._ids = ops.convert(self.input_ids, "i32")
        columns = [ops.convert(self.attention_mask, "i32"), self._ids, self.beam_idx]
        if self.prefix_length is not None:
            columns.append(ops.convert(self.prefix_length, "i32"))
        variable = self._variable(BEAM_TABLE, ov.Type.i32, [-1, -1])
        past = ops.read_value(self._empty(np.int32(0), 2), variable)
        self._slots = operation("CacheTable", [past, *columns], prefix=int(prefix))
        self._sinks.append(ops.assign(self._slots, variable))

    def _empty(self, zero: np.generic, rank: int) -> ov.Node:
        """What a state begins with: no elements. Anything else is not safe: the plugin may write it to the memory of
        another request. The size is computed, since one that is known to be 0 would be that of the variable."""
        columns = ops.gather(ops.shape_of(self.attention_mask), i64(1), scalar(0))
        none = ops.subtract(columns, columns)
        return ops.broadcast(ops.constant(zero), ops.concat([none] * rank, 0))

    def embedding(self, name: str, *, tied: bool = False) -> ov.Node:
        # A row is scattered over the payload, so what is only looked up lies row by row.
        if not tied:
            parts = self.weights.embedding(name)
            return operation("EmbeddingRows", [self._ids, *parts.values()], hidden_size=parts["weight"].shape[1])
        table = self.weights.packed_lm_head(name)
        return operation("Embedding", [self._ids, table.payload], **_layout(table))

    def rms_norm(self, x: ov.Node, name: str, eps: float) -> ov.Node:
        return operation("Norm", [x, self.weights.vector(name)], kind="rms", eps=eps)

    def layer_norm(self, x: ov.Node, name: str, eps: float) -> ov.Node:
        weights = [self.weights.vector(f"{name}.{part}") for part in ("weight", "bias")]
        return operation("Norm", [x, *weights], kind="layer", eps=eps)

    def fully_connected(
        self,
        x: ov.Node,
        name: str,
        *,
        bias: bool = False,
        rows: np.ndarray | None = None,
        activation: Activation | None = None,
        residual: ov.Node | None = None,
        residual_scale: float = 1.0,
    ) -> ov.Node:
        y_features = self.weights.checkpoint.shape(name)[0]
        if activation == "silu_gate":
            y_features //= 2
            order = gate_up_rows(y_features)
            rows = order if rows is None else np.where(order == PADDING, PADDING, rows[order])
        weight = self.weights.packed_linear(name, rows)
        optional = []
        if bias:
            order = np.arange(y_features) if rows is None else rows
            optional.append(self.weights.vector(name.removesuffix("weight") + "bias", filled(order)))
        if residual is not None:
            optional.append(residual)
        return _fully_connected(
            [x, weight.payload, *optional],
            weight,
            y_features,
            activation=activation or "none",
            bias=int(bias),
            residual=int(residual is not None),
            residual_scale=residual_scale,
        )

    def attention(self, qkv: ov.Node, layer: int, shape: AttentionShape) -> ov.Node:
        variable = self._variable(f"{CACHE}{layer}", ov.Type.u8, [-1, -1, -1, -1])
        cache = ops.read_value(self._empty(np.uint8(0), 4), variable)
        self._sinks.append(ops.assign(cache, variable))
        return operation(
            "MultiHeadAttention",
            [qkv, *self._cos_sin, *self._slots.outputs(), cache],
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            in_place=1,
        )

    def lm_head(self, x: ov.Node, name: str) -> ov.Node:
        table = self.weights.packed_lm_head(name)
        return _fully_connected([last_rows(x, self._logits_to_keep), table.payload], table, table.out_features)


def _layout(weight: PackedWeight) -> dict[str, str | int]:
    names = ("format", "in_features", "out_features", "group_size")
    return {name: getattr(weight, name) for name in names}


def _fully_connected(
    inputs: list[ov.Node],
    weight: PackedWeight,
    y_features: int,
    activation: str = "none",
    bias: int = 0,
    residual: int = 0,
    residual_scale: float = 1.0,
) -> ov.Node:
    return operation(
        "FullyConnected",
        inputs,
        **_layout(weight),
        y_features=y_features,
        activation=activation,
        bias=bias,
        residual=residual,
        residual_scale=residual_scale,
        activation_bits=16,
    )
