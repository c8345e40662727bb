"""The stock lowering: opset calls only, in the patterns that the CPU plugin fuses.

Letters in shapes as in `chatglm_ov.lowering`. The graph computes in f32; what a device makes of that follows from
the inference precision it is compiled for. Inputs, state and attention are as OpenVINO GenAI expects them, which also
turns the attention into its paged one: input_ids, attention_mask, position_ids and beam_idx, and nothing else but what
ChatGLM-6B needs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as ops

from chatglm_ov.lowering import Activation, AttentionShape, Rotary
from chatglm_ov.lowering.graph import CACHE, GraphLowering, i64, scalar
from chatglm_ov.weights.ir import DECOMPRESSION_SUFFIX

BLOCKED = np.float32(np.finfo(np.float16).min / 2)
"""Added to a score that is masked. The sum is finite in every type, float16 too, so that a row of padding, which
sees nothing, is no NaN."""


class StockLowering(GraphLowering):
    """Builds one model; see `chatglm_ov.lowering.Lowering` for the words."""

    name = "stock"

    def inputs(self, rotary: Rotary, *, prefix: bool = False) -> None:
        super().inputs(rotary, prefix=prefix)
        rows = self._angle_rows(rotary)
        angles = ops.unsqueeze(ops.concat(rows + rows, -1), i64(1))
        self._cos_sin = self._cos_and_sin(angles, rotary)  # f32 [B, 1, L, R], of all layers
        self._rotary_dim = rotary.dim
        self._batch = ops.gather(ops.shape_of(self.input_ids), i64(0), scalar(0))
        self._mask = self._attention_mask()

    def _attention_mask(self) -> ov.Node:
        """f32 [B, 1, L, T]: 0 where a query sees a key, BLOCKED elsewhere. Query i stands at column past + i and
        sees the real columns up to its own, and those before the prefix length."""
        new = ops.gather(ops.shape_of(self.input_ids), scalar(1), scalar(0))
        total = ops.gather(ops.shape_of(self.attention_mask), scalar(1), scalar(0))
        keys = ops.range(scalar(0), total, scalar(1), output_type="i64")
        queries = ops.range(ops.subtract(total, new), total, scalar(1), output_type="i64")
        visible = ops.less_equal(
            ops.unsqueeze(keys, i64(0, 1, 2)), ops.unsqueeze(ops.unsqueeze(queries, i64(1)), i64(0, 1))
        )
        if self.prefix_length is not None:
            in_prefix = ops.less(ops.unsqueeze(keys, i64(0)), ops.unsqueeze(self.prefix_length, i64(1)))
            visible = ops.logical_or(visible, ops.unsqueeze(in_prefix, i64(1, 2)))
        real = ops.not_equal(self.attention_mask, scalar(0))
        visible = ops.logical_and(visible, ops.unsqueeze(real, i64(1, 2)))
        return ops.select(visible, ops.constant(np.float32(0)), ops.constant(BLOCKED))

    def _dequantized(self, name: str, parts: dict[str, ov.Node], shape: list[int]) -> ov.Node:
        """(data - zero_point) * scale as f32 `shape`, in the form that plugins keep compressed."""
        weight = parts["weight"]
        if weight.get_element_type() == ov.Type.f32:
            return weight
        value = ops.convert(weight, "f32")
        if "scale" not in parts:
            # Plugins know integers with a scale by themselves, and expand them if they carry this mark.
            value.set_friendly_name(name + DECOMPRESSION_SUFFIX)
            return value
        if "zero_point" in parts:
            value = ops.subtract(value, ops.convert(parts["zero_point"], "f32"))
        value = ops.multiply(value, parts["scale"])
        return value if len(weight.get_output_shape(0)) == len(shape) else ops.reshape(value, i64(*shape), False)

    def embedding(self, name: str, *, tied: bool = False) -> ov.Node:
        parts = self.weights.lm_head(name) if tied else self.weights.embedding(name)
        if parts["weight"].get_element_type() != ov.Type.u4:
            return self._gathered_embedding(parts)
        # Plugins know this pattern of 4-bit weights, and only this one where a MatMul reads the same ones.
        table = self._dequantized(name, parts, list(self.weights.checkpoint.shape(name)))
        return ops.gather(table, self.input_ids, scalar(0))

    def _gathered_embedding(self, parts: dict[str, ov.Node]) -> ov.Node:
        """Rows are gathered before they are decompressed, so that the table is never expanded."""
        rows = ops.gather(parts["weight"], self.input_ids, scalar(0))
        if parts["weight"].get_element_type() != ov.Type.f32:
            rows = ops.convert(rows, "f32")
        if "scale" in parts:
            rows = ops.multiply(rows, ops.gather(parts["scale"], self.input_ids, scalar(0)))
        return rows

    def rms_norm(self, x: ov.Node, name: str, eps: float) -> ov.Node:
        mean_square = ops.reduce_mean(ops.power(x, np.float32(2)), i64(-1), keep_dims=True)
        inverse = ops.divide(np.float32(1), ops.sqrt(ops.add(mean_square, np.float32(eps))))
        return ops.multiply(ops.multiply(x, inverse), self.weights.vector(name))

    def layer_norm(self, x: ov.Node, name: str, eps: float) -> ov.Node:
        normalized = ops.mvn(x, i64(-1), True, eps, "inside_sqrt")
        scaled = ops.multiply(normalized, self.weights.vector(f"{name}.weight"))
        return ops.add(scaled, self.weights.vector(f"{name}.bias"))

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
        shape = list(self.weights.checkpoint.shape(name))
        y = ops.matmul(x, self._dequantized(name, self.weights.linear(name, rows), shape), False, True)
        if bias:
            y = ops.add(y, self.weights.vector(name.removesuffix("weight") + "bias", rows))
        if activation == "gelu_tanh":
            y = ops.gelu(y, "tanh")
        elif activation == "silu_gate":
            y = self._silu_gate(y)
        if residual is None:
            return y
        if residual_scale != 1.0:
            residual = ops.multiply(residual, np.float32(residual_scale))
        return ops.add(residual, y)

    @staticmethod
    def _silu_gate(gate_up: ov.Node) -> ov.Node:
        # Split, and Swish with its second input: the CPU plugin's merged-MLP node does not match these. It is
        # slower than separate layers on few cores, and ends the process (SIGFPE) when there is only one thread.
        halves = ops.split(gate_up, scalar(2), 2)
        return ops.multiply(ops.swish(halves.output(0)), halves.output(1))

    def attention(self, qkv: ov.Node, layer: int, shape: AttentionShape) -> ov.Node:
        heads, groups, dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        planes = ops.variadic_split(qkv, scalar(-1), i64(heads * dim, groups * dim, groups * dim))
        query = self._rotated(self._heads(planes.output(0), heads, dim))
        key = self._rotated(self._heads(planes.output(1), groups, dim))
        value = self._heads(planes.output(2), groups, dim)
        key = self._repeated(self._cached(key, f"{CACHE}{layer}.key", groups, dim), heads, groups, dim)
        value = self._repeated(self._cached(value, f"{CACHE}{layer}.value", groups, dim), heads, groups, dim)
        context = ops.scaled_dot_product_attention(query, key, value, self._mask)
        context = ops.transpose(context, i64(0, 2, 1, 3))
        return ops.reshape(context, i64(0, 0, heads * dim), True)

    @staticmethod
    def _heads(plane: ov.Output, heads: int, dim: int) -> ov.Node:
        """[B, L, heads D] -> [B, heads, L, D]."""
        return ops.transpose(ops.reshape(plane, i64(0, 0, heads, dim), True), i64(0, 2, 1, 3))

    def _rotated(self, x: ov.Node) -> ov.Node:
        """Rotate-half over the first R dims of x [B, heads, L, D]; the others pass through."""
        rest = x.get_output_partial_shape(0)[3].get_length() - self._rotary_dim
        if rest == 0:
            return self._rotate_half(x)
        head = ops.variadic_split(x, scalar(3), i64(self._rotary_dim, rest))
        return ops.concat([self._rotate_half(head.output(0)), head.output(1)], -1)

    def _rotate_half(self, x: Any) -> ov.Node:
        (cos, sin), half_dim = self._cos_sin, self._rotary_dim // 2
        half = ops.variadic_split(x, scalar(3), i64(half_dim, half_dim))
        turned = ops.concat([ops.multiply(half.output(1), np.float32(-1)), half.output(0)], -1)
        return ops.add(ops.multiply(x, cos), ops.multiply(turned, sin))

    def _cached(self, x: ov.Node, variable_id: str, heads: int, dim: int) -> ov.Node:
        """x appended to the state: f32 [B, heads, T, D]. The state starts empty and its rows follow beam_idx."""
        variable = self._variable(variable_id, ov.Type.f32, [-1, heads, -1, dim])
        empty = ops.broadcast(np.float32(0), ops.concat([self._batch, i64(heads, 0, dim)], 0))
        past = ops.gather(ops.read_value(empty, variable), self.beam_idx, scalar(0))
        total = ops.concat([past, x], 2)
        self._sinks.append(ops.assign(total, variable))
        return total

    @staticmethod
    def _repeated(x: ov.Node, heads: int, groups: int, dim: int) -> ov.Node:
        """[B, groups, T, D] -> [B, heads, T, D]: query head j reads group j // (heads / groups)."""
        if heads == groups:
            return x
        times = i64(1, 1, heads // groups, 1, 1)
        repeated = ops.broadcast(ops.unsqueeze(x, i64(2)), times, broadcast_spec="BIDIRECTIONAL")
        return ops.reshape(repeated, i64(0, heads, -1, dim), True)

    def lm_head(self, x: ov.Node, name: str) -> ov.Node:
        # Of all rows: whoever runs the model leaves out those that nobody wants (`chatglm_ov.passes.last_rows`).
        shape = list(self.weights.checkpoint.shape(name))
        return ops.matmul(x, self._dequantized(name, self.weights.lm_head(name), shape), False, True)
