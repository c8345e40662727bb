"""A model evaluated word by word while it is built: the third meaning of the vocabulary of `chatglm_ov.lowering`.

A value is float32 [T, features], T the tokens of all sequences one after another. Each word is a small graph of the
stock lowering in f32, compiled, run over the tokens and dropped, so that one weight at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import openvino as ov

from chatglm_ov.checkpoint.reader import Checkpoint
from chatglm_ov.config import ArchitectureConfig
from chatglm_ov.lowering import Activation, AttentionShape, Rotary
from chatglm_ov.lowering.stock import StockLowering
from chatglm_ov.models import architecture
from chatglm_ov.system.processors import thread_limit

CHUNK = 1024
"""Tokens of one inference of a word that looks at each token alone."""

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
"""Properties of the CPU plugin with which it rounds nothing."""

Observer = Callable[[str, np.ndarray], None]
"""Called with the name of each linear weight and its input, float32 [T, K], before the weight is used."""

Word = Callable[..., Any]


class _PlainWeights:
    """Weights as constants in f32: what a `StockLowering` asks of its store."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint

    def linear(self, name: str, rows: np.ndarray | None = None) -> dict[str, ov.Node]:
        return {"weight": self.vector(name, rows)}

    def embedding(self, name: str) -> dict[str, ov.Node]:
        return self.linear(name)

    def lm_head(self, name: str) -> dict[str, ov.Node]:
        return self.linear(name)

    def vector(self, name: str, rows: np.ndarray | None = None) -> ov.Node:
        tensor = self.checkpoint[name]
        return ov.opset15.constant(tensor.read() if rows is None else tensor.rows(rows))


class EagerLowering:
    """Runs one model over `sequences`, int64 [N] each."""

    name = "eager"

    def __init__(
        self, weights: Checkpoint, config: ArchitectureConfig, sequences: Sequence[np.ndarray], observe: Observer
    ):
        self.weights = _PlainWeights(weights)
        self._config, self._sequences, self._observe = config, sequences, observe
        self._core = ov.Core()

    def inputs(self, rotary: Rotary, *, prefix: bool = False) -> None:
        self._rotary, self._prefix = rotary, prefix

    def embedding(self, name: str, *, tied: bool = False) -> np.ndarray:
        return self.weights.checkpoint[name].rows(np.concatenate(self._sequences))

    def rms_norm(self, x: np.ndarray, name: str, eps: float) -> np.ndarray:
        return self._each_token(lambda g, x: g.rms_norm(x, name, eps), x)

    def layer_norm(self, x: np.ndarray, name: str, eps: float) -> np.ndarray:
        return self._each_token(lambda g, x: g.layer_norm(x, name, eps), x)

    def add(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x + y

    def fully_connected(
        self,
        x: np.ndarray,
        name: str,
        *,
        bias: bool = False,
        rows: np.ndarray | None = None,
        activation: Activation | None = None,
        residual: np.ndarray | None = None,
        residual_scale: float = 1.0,
    ) -> np.ndarray:
        self._observe(name, x)

        def word(g: StockLowering, x: ov.Node, residual: ov.Node | None = None) -> ov.Node:
            return g.fully_connected(
                x, name, bias=bias, rows=rows, activation=activation, residual=residual, residual_scale=residual_scale
            )

        return self._each_token(word, x) if residual is None else self._each_token(word, x, residual)

    def attention(self, qkv: np.ndarray, layer: int, shape: AttentionShape) -> np.ndarray:
        def word(g: StockLowering, qkv: ov.Node) -> ov.Node:
            g.inputs(self._rotary, prefix=self._prefix)
            return g.attention(qkv, layer, shape)

        request = self._compiled(word, qkv.shape[1]).create_infer_request()
        context = np.empty((len(qkv), shape.num_attention_heads * shape.head_dim), np.float32)
        for place, inputs in self._sequence_inputs():
            request.reset_state()
            context[place] = request.infer({**inputs, "x0": qkv[None, place]})["logits"][0]
        return context

    def lm_head(self, x: np.ndarray, name: str) -> np.ndarray:
        self._observe(name, x)
        return x

    def model(self, logits: np.ndarray, name: str) -> None:
        """All that there was to do is done."""

    def _each_token(self, word: Word, *values: np.ndarray) -> np.ndarray:
        request = self._compiled(word, *(value.shape[1] for value in values)).create_infer_request()
        made = np.empty((0, 0), np.float32)
        for start in range(0, len(values[0]), CHUNK):
            fed = {f"x{i}": value[None, start : start + CHUNK] for i, value in enumerate(values)}
            chunk = request.infer(fed)["logits"][0]
            if start == 0:
                made = np.empty((len(values[0]), chunk.shape[1]), np.float32)
            made[start : start + len(chunk)] = chunk
        return made

    def _compiled(self, word: Word, *features: int) -> ov.CompiledModel:
        graph = StockLowering(self.weights)
        values = [graph.input(f"x{i}", [-1, -1, count], np.float32) for i, count in enumerate(features)]
        model = graph.model(word(graph, *values), "word")
        return self._core.compile_model(model, "CPU", {**EXACT, **thread_limit(self._core)})

    def _sequence_inputs(self) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
        """Where the tokens of each sequence are, and the model inputs for them."""
        module, start = architecture(self._config), 0
        for ids in self._sequences:
            batch, mask = ids[None], np.ones((1, len(ids)), np.int64)
            inputs = {
                "input_ids": batch,
                "attention_mask": mask,
                "position_ids": module.position_ids(self._config, batch, mask),
                "beam_idx": np.zeros(1, np.int32),
            }
            if (prefix := module.prefix_length(self._config, batch, mask)) is not None:
                inputs["prefix_length"] = prefix
            yield slice(start, start + len(ids)), inputs
            start += len(ids)
