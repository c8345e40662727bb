"""Converted folders as compiled, stateful models.

One `CompiledModel` serves prompt and decode; each `Request` made from it has a KV cache of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import openvino as ov

from chatglm_ov.config import ArchitectureConfig, parse_config, read_config_json
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.models import architecture
from chatglm_ov.weights.ir import FORMAT_VERSION, IR_NAME

PRECISIONS = ("f32", "bf16", "f16")


@cache
def core() -> ov.Core:
    """The package's own Core."""
    return ov.Core()


def weight_formats(folder: str | Path) -> list[str]:
    """Names of the weight formats that a converted folder holds."""
    return sorted(path.parent.name for path in Path(folder).glob(f"*/{IR_NAME}"))


def default_weight_format(folder: str | Path) -> str:
    """int8 where it is there, else bf16, else the first."""
    found = weight_formats(folder)
    if not found:
        raise ChatGLMError(folder, "weight formats", "none", f"a converted folder with <format>/{IR_NAME}")
    return next((name for name in ("int8", "bf16") if name in found), found[0])


def load_model(
    folder: str | Path,
    weight_format: str | None = None,
    inference_precision: str | None = None,
    device: str = "CPU",
    properties: dict[str, Any] | None = None,
) -> CompiledModel:
    """Compile one weight format of a converted folder.

    inference_precision: f32 computes everything in f32, cache included, and is the numerical reference; bf16 and
    f16 are passed to the device; None leaves the choice to the device. properties: further OpenVINO properties,
    which win over ours. Raises ChatGLMError when the folder does not hold that format.
    """
    folder = Path(folder)
    fields = read_config_json(folder)
    config = parse_config(fields, folder / "config.json")
    marker = fields.get("chatglm_ov")
    version = marker.get("format_version") if isinstance(marker, dict) else None
    if version != FORMAT_VERSION:
        seen = "missing (a checkpoint, not converted)" if version is None else version
        raise ChatGLMError(folder / "config.json", "chatglm_ov.format_version", seen, FORMAT_VERSION)
    weight_format = weight_format or default_weight_format(folder)
    path = folder / weight_format / IR_NAME
    if not path.exists():
        raise ChatGLMError(folder, "weight_format", repr(weight_format), f"one of {weight_formats(folder)}")
    if inference_precision not in (None, *PRECISIONS):
        raise ChatGLMError("load_model", "inference_precision", repr(inference_precision), f"one of {PRECISIONS}")
    model = read_ir(path)
    settings = {**_precision_properties(inference_precision, device), **(properties or {})}
    return CompiledModel(config, weight_format, model, _compile(model, device, settings))


def read_ir(path: Path) -> ov.Model:
    """The graph in `path`, an openvino_model.xml, over its mapped weights. Raises ChatGLMError if it is damaged."""
    weights = path.with_suffix(".bin")
    if not weights.exists():
        raise ChatGLMError(weights, "file", "missing", "the weights beside the IR")
    try:
        return core().read_model(path)
    except RuntimeError as error:
        raise ChatGLMError(path, "IR", f"unreadable ({_last_line(error)})", "an IR as `convert` writes it") from error


def _compile(model: ov.Model, device: str, properties: dict[str, Any]) -> ov.CompiledModel:
    try:
        return core().compile_model(model, device, properties)
    except RuntimeError as error:
        known = ", ".join(core().available_devices)
        raise ChatGLMError(f"device {device}", "compilation", _last_line(error), f"a device of {known}") from error


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _precision_properties(precision: str | None, device: str) -> dict[str, Any]:
    if device != "CPU":
        return {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}
    if precision == "f32":
        # Dynamic quantization would make 8-bit activations of f32 ones.
        return {
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        }
    # The plugin's own default, a u8 cache, costs accuracy; see docs/formats.
    properties = {"KV_CACHE_PRECISION": "bf16"}
    return properties if precision is None else {"INFERENCE_PRECISION_HINT": precision, **properties}


@dataclass(frozen=True)
class CompiledModel:
    """A compiled model and what describes it."""

    config: ArchitectureConfig
    weight_format: str
    model: ov.Model
    compiled: ov.CompiledModel

    @property
    def architecture(self) -> ModuleType:
        """The module of `chatglm_ov.models` that defines the model."""
        return architecture(self.config)

    def create_request(self) -> Request:
        """A request with an empty KV cache."""
        return Request(self.config, self.compiled.create_infer_request())

    def warm_up(self) -> None:
        """Run one token through a request that is thrown away. A plugin packs the weights in the first call: after
        this the first answer's time is its own."""
        inputs = {
            port.any_name: np.zeros([1 if dim.is_dynamic else dim.get_length() for dim in port.partial_shape], np.int64)
            for port in self.compiled.inputs
        }
        inputs["attention_mask"] += 1
        inputs["logits_to_keep"] += 1
        inputs["beam_idx"] = inputs["beam_idx"].astype(np.int32)
        self.compiled.create_infer_request().infer(inputs)


@dataclass
class Request:
    """One KV cache and the calls that continue it. Letters as in `chatglm_ov.lowering`."""

    config: ArchitectureConfig
    infer_request: ov.InferRequest
    past_length: int = field(default=0, init=False)
    """Columns in the cache, padding included."""
    rows: int = field(default=0, init=False)
    """Rows in the cache."""

    def __post_init__(self) -> None:
        self._input_shapes = {port.any_name: port.partial_shape for port in self.infer_request.model_inputs}

    def reset(self) -> None:
        """Forget the sequence; the next call starts a fresh one and may have another number of rows."""
        self.infer_request.reset_state()
        self.past_length = self.rows = 0

    def infer(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        beam_idx: np.ndarray,
        logits_to_keep: int = 0,
        prefix_length: np.ndarray | None = None,
    ) -> np.ndarray:
        """Feed L more tokens; returns logits float32 [B, kept, V] of the last `logits_to_keep`, 0 meaning all L.

        input_ids int64 [B, L]; attention_mask int64 [B, past + L], 0 on padding; position_ids int64 [B, L], or
        [B, 2, L] for ChatGLM-6B; beam_idx int32 [B], the cache row that each row continues, its own in the first
        call; prefix_length int64 [B] for ChatGLM-6B, whose columns before it must all be in one call. Raises
        ChatGLMError for ids out of the vocabulary, positions beyond the rotary table and shapes that do not fit;
        the cache is then as it was.
        """
        inputs: dict[str, np.ndarray] = {
            "input_ids": np.ascontiguousarray(input_ids, np.int64),
            "attention_mask": np.ascontiguousarray(attention_mask, np.int64),
            "position_ids": np.ascontiguousarray(position_ids, np.int64),
            "beam_idx": np.ascontiguousarray(beam_idx, np.int32),
            "logits_to_keep": np.array([logits_to_keep], np.int64),
        }
        if prefix_length is not None:
            inputs["prefix_length"] = np.ascontiguousarray(prefix_length, np.int64)
        self._check_shapes(inputs)
        self._check_values(inputs)
        # Copied in: the plugin keeps pointers to shared inputs, and a later request writes its own through them.
        self.infer_request.infer(inputs)
        self.rows, new = input_ids.shape
        self.past_length += new
        return self.infer_request.get_tensor("logits").data.copy()

    def _check_shapes(self, inputs: dict[str, np.ndarray]) -> None:
        """An input that is left out would be the last call's, and an error inside the plugin spoils the compiled
        model for later calls: neither may come to that."""
        ids = inputs["input_ids"]
        if ids.ndim != 2 or ids.size == 0:
            raise ChatGLMError("infer", "input_ids", f"of shape {ids.shape}", "[B, L], at least one token")
        batch, new = ids.shape
        position_rows = [rows.get_length() for rows in list(self._input_shapes["position_ids"])[1:-1]]
        expected = {
            "attention_mask": [batch, self.past_length + new],
            "position_ids": [batch, *position_rows, new],
            "beam_idx": [batch],
            "prefix_length": [batch],
        }
        for name, shape in expected.items():
            if (name in inputs) != (name in self._input_shapes):
                seen, wanted = ("given", "none") if name in inputs else ("missing", shape)
                raise ChatGLMError("infer", name, seen, wanted)
            if name in inputs and list(inputs[name].shape) != shape:
                raise ChatGLMError("infer", name, f"of shape {list(inputs[name].shape)}", shape)

    def _check_values(self, inputs: dict[str, np.ndarray]) -> None:
        rows = self.rows or len(inputs["beam_idx"])
        limit = self.config.max_positions
        allowed = {
            "input_ids": (self.config.vocab_rows, "token id", ""),
            "position_ids": (limit, "position", f" (seq_length {limit})"),
            "beam_idx": (rows, "row", " (rows in the cache)"),
            "logits_to_keep": (None, "number", ""),
        }
        for name, (end, kind, why) in allowed.items():
            values = inputs[name]
            wrong = values[(values < 0) | (values >= (np.inf if end is None else end))]
            if wrong.size:
                wanted = "0 or more" if end is None else f"0 to {end - 1}{why}"
                raise ChatGLMError("infer", name, f"a {kind} {wrong[0]}", wanted)

    def cached(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of one layer, float32 [B, num_key_value_heads, past_length, head_dim] each, with the
        dims of a key head in the checkpoint's order."""
        states = {state.name: state for state in self.infer_request.query_state()}
        key = states[f"past_key_values.{layer}.key"].state.data
        value = states[f"past_key_values.{layer}.value"].state.data
        order = architecture(self.config).key_order(self.config)
        restored = np.empty_like(key)
        restored[..., order] = key
        return restored, value.copy()
