"""Converted folders as compiled, stateful models.

One `CompiledModel` serves prompt and decode; each `Request` made from it has a KV cache of its own.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import openvino as ov

from chatglm_ov.checkpoint.trained_prefix import TrainedPrefix
from chatglm_ov.config import ArchitectureConfig, parse_config, read_config_json
from chatglm_ov.errors import ChatGLMError, last_line
from chatglm_ov.models import architecture
from chatglm_ov.passes.chains import chain_operations
from chatglm_ov.passes.fuse_norms import fuse_norms, fuse_residuals
from chatglm_ov.passes.last_rows import add_logits_to_keep, take_last_rows_early
from chatglm_ov.runtime import in_place
from chatglm_ov.runtime.ir_fit import check_fits
from chatglm_ov.runtime.ir_reading import core, runnable_ir
from chatglm_ov.runtime.kv_cache import ELEMENT_TYPES, BlockCache, BlockLayout, KVCache, PluginCache
from chatglm_ov.runtime.process import check_process
from chatglm_ov.runtime.request import Request
from chatglm_ov.system.memory import available
from chatglm_ov.system.processors import thread_limit
from chatglm_ov.system.sizes import size
from chatglm_ov.weights.ir import FORMAT_VERSION, IR_NAME, RT_INFO, UNPACKED, WEIGHTS_NAME

PRECISIONS = ("f32", "bf16", "f16")
KV_CACHE_FORMATS = tuple(ELEMENT_TYPES)
ACTIVATION_BITS = (16, 8)

log = logging.getLogger(__name__)


def weight_formats(folder: str | Path) -> list[str]:
    """Names of the weight formats that a converted folder holds."""
    return sorted(path.parent.name for path in Path(folder).glob(f"*/{IR_NAME}"))


def default_weight_format(folder: str | Path) -> str:
    """int8 where it is there, else bf16, else the first."""
    found = weight_formats(folder)
    if not found:
        read_config_json(folder)  # which tells of a folder that is not there
        raise ChatGLMError(folder, "weight formats", "none", f"a converted folder with <format>/{IR_NAME}")
    return next((name for name in ("int8", "bf16") if name in found), found[0])


@dataclass(frozen=True)
class Settings:
    """How a model is run; None: what suits the device best. Raises ChatGLMError for unknown values."""

    inference_precision: str | None = None
    kv_cache_format: str | None = None
    activation_bits: int = 16

    def __post_init__(self) -> None:
        for name, known in (
            ("inference_precision", (None, *PRECISIONS)),
            ("kv_cache_format", (None, *KV_CACHE_FORMATS)),
            ("activation_bits", ACTIVATION_BITS),
        ):
            value = getattr(self, name)
            if value not in known or isinstance(value, float):
                wanted = f"one of {tuple(each for each in known if each is not None)}"
                raise ChatGLMError("load_model", name, repr(value), wanted)

    @property
    def cache_format(self) -> str:
        # The plugin's own default, a cache in 8 bits, costs accuracy; see docs/formats.
        return self.kv_cache_format or ("f32" if self.inference_precision == "f32" else "bf16")


def load_model(
    folder: str | Path,
    weight_format: str | None = None,
    inference_precision: str | None = None,
    device: str = "CPU",
    properties: dict[str, Any] | None = None,
    kv_cache_format: str | None = None,
    activation_bits: int = 16,
) -> CompiledModel:
    """Compile one weight format of a converted folder.

    inference_precision: with stock operations f32 computes everything in f32, cache included, and is the numerical
    reference; bf16 and f16 are passed to the device; None is f32 for weights in f32, which nobody takes for speed, and
    else leaves the choice to the device. Fused operations choose
    by the weights what they compute in; it stands for the format of the cache there.
    kv_cache_format: f32, bf16 or int8; None: f32 if the inference precision is, else bf16.
    activation_bits: 8 multiplies int8 and int4 weights with 8-bit activations, which is faster for prompts and less
    exact; fused operations only. properties: further OpenVINO properties, which win over ours; the number of threads
    is OpenVINO's own choice, or fewer in a container with less processor time.
    Fused operations are unpacked to stock ones, with a warning, where the native library cannot be used.
    Raises ChatGLMError when the folder does not hold that format, or what it holds cannot run here.
    """
    check_process()
    if not isinstance(device, str):
        raise ChatGLMError("load_model", "device", repr(device), "the name of a device, such as 'CPU'")
    if not isinstance(properties, dict | None):
        raise ChatGLMError("load_model", "properties", repr(properties), "a dict of OpenVINO properties")
    folder, device = Path(folder), device.upper()
    config = _converted_config(folder)
    weight_format = default_weight_format(folder) if weight_format is None else weight_format
    if weight_format == "f32" and inference_precision is None:
        inference_precision = "f32"
    settings = Settings(inference_precision, kv_cache_format, activation_bits)
    path = folder / weight_format / IR_NAME
    if weight_format not in weight_formats(folder):
        raise ChatGLMError(folder, "weight_format", repr(weight_format), f"one of {weight_formats(folder)}")
    model = runnable_ir(path, config, weight_format)
    nbytes = path.with_name(WEIGHTS_NAME).stat().st_size
    if nbytes > (free := available()):
        told = "%s: weights of %s, free memory of %s: what does not fit is read from the disk for each token"
        log.warning(told, path.parent, size(nbytes), size(free))
    check_fits(model, config, path)
    ops = model.get_rt_info([RT_INFO, "ops"]).astype(str)
    if model.has_rt_info([RT_INFO, UNPACKED]):
        # A setting of fused operations, for speed: what runs in their place is exact to 16 bits or more.
        settings = replace(settings, activation_bits=16)
    own = _fused_properties if ops == "fused" else _stock_properties
    ours = own(settings, device)
    if ops == "fused" and "KV_CACHE_PRECISION" in (properties or {}):
        log.warning("KV_CACHE_PRECISION changes nothing with fused operations: kv_cache_format is theirs")
    try:
        if ops == "fused":
            _prepare_fused(model, settings.activation_bits)
        else:
            add_logits_to_keep(model)
    except RuntimeError as error:
        raise ChatGLMError(path, "IR", f"damaged ({last_line(error)})", "an IR as `convert` writes it") from error
    limit = thread_limit(core()) if device == "CPU" else {}
    compiled = _compile(model, device, {**ours, **limit, **(properties or {})})
    cache_format = settings.cache_format if ops == "fused" else _plugin_cache_format(compiled, settings)
    return CompiledModel(config, weight_format, model, compiled, ops, cache_format, TrainedPrefix.load(folder, config))


def _converted_config(folder: Path) -> ArchitectureConfig:
    fields = read_config_json(folder)
    config = parse_config(fields, folder / "config.json")
    marker = fields.get("chatglm_ov")
    version = marker.get("format_version") if isinstance(marker, dict) else None
    if version != FORMAT_VERSION:
        seen = "missing (a checkpoint, not converted)" if version is None else version
        wanted = f"{FORMAT_VERSION}: convert it with this version (chatglm-ov convert)"
        raise ChatGLMError(folder / "config.json", "chatglm_ov.format_version", seen, wanted)
    return config


def _compile(model: ov.Model, device: str, properties: dict[str, Any]) -> ov.CompiledModel:
    try:
        return core().compile_model(model, device, properties)
    except RuntimeError as error:
        known = core().available_devices
        wanted = "properties that it takes, and memory for the model"
        if device not in known:
            wanted = f"a device of {', '.join(known)}"
        raise ChatGLMError(f"device {device}", "compilation", last_line(error), wanted) from error


def _stock_properties(settings: Settings, device: str) -> dict[str, Any]:
    precision = settings.inference_precision
    if settings.activation_bits != 16:
        wanted = "16 with stock operations, whose activations the device chooses"
        raise ChatGLMError("load_model", "activation_bits", settings.activation_bits, wanted)
    properties = {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}
    if device != "CPU":
        return properties
    properties["KV_CACHE_PRECISION"] = "u8" if settings.cache_format == "int8" else settings.cache_format
    if precision == "f32":
        # Dynamic quantization would make 8-bit activations of f32 ones.
        properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
    return properties


def _plugin_cache_format(compiled: ov.CompiledModel, settings: Settings) -> str:
    """The format of a plugin's cache, which `properties` may have changed; one that is not among ours by OpenVINO's
    name."""
    if "KV_CACHE_PRECISION" not in compiled.get_property("SUPPORTED_PROPERTIES"):
        return settings.cache_format
    name = compiled.get_property("KV_CACHE_PRECISION").to_string()
    return "int8" if name == "u8" else name


def _fused_properties(settings: Settings, device: str) -> dict[str, Any]:
    if device != "CPU":
        raise ChatGLMError("load_model", "device", repr(device), "'CPU', or a folder converted with --ops stock")
    if settings.inference_precision == "f16":
        raise ChatGLMError("load_model", "inference_precision", "'f16'", "f32 or bf16 with fused operations")
    # Values between operations are f32. With another hint the plugin would convert them there and back.
    return {"INFERENCE_PRECISION_HINT": "f32"}


def _prepare_fused(model: ov.Model, activation_bits: int) -> None:
    """Change `model` in place: the operations have their settings in themselves."""
    for node in model.get_ops():
        if node.get_type_name() == "FullyConnected":
            node.set_attribute("activation_bits", activation_bits)
    take_last_rows_early(model)
    fuse_norms(model)
    fuse_residuals(model)
    if in_place.works_in_place():
        chain_operations(model)
    else:
        in_place.copy_caches(model)


@dataclass(frozen=True)
class CompiledModel:
    """A compiled model and what describes it. ops: the lowering it was converted with."""

    config: ArchitectureConfig
    weight_format: str
    model: ov.Model
    compiled: ov.CompiledModel
    ops: str
    kv_cache_format: str
    trained_prefix: TrainedPrefix | None = None

    @property
    def architecture(self) -> ModuleType:
        """The module of `chatglm_ov.models` that defines the model."""
        return architecture(self.config)

    @property
    def cache_layout(self) -> BlockLayout:
        """Layout of the fused lowering's cache."""
        return BlockLayout(self.kv_cache_format, self.config.num_key_value_heads, self.config.head_dim)

    def create_request(self) -> Request:
        """A request with an empty KV cache."""
        request = self.compiled.create_infer_request()
        if self.ops == "fused":
            cache: KVCache = BlockCache(request, self.config.num_layers, self.cache_layout)
        else:
            cache = PluginCache(request, quantized=self.kv_cache_format not in ("f32", "bf16", "f16"))
        return Request(self.config, request, cache, self.trained_prefix)

    def warm_up(self) -> None:
        """Run one token through a request that is thrown away. A plugin packs the weights in the first call, fused
        operations touch the mapped file: after this the first answer's time is its own."""
        inputs = {
            port.any_name: np.zeros([1 if dim.is_dynamic else dim.get_length() for dim in port.partial_shape], np.int64)
            for port in self.compiled.inputs
        }
        inputs["attention_mask"] += 1
        inputs["logits_to_keep"] += 1
        inputs["beam_idx"] = inputs["beam_idx"].astype(np.int32)
        request = self.create_request()
        if isinstance(request.cache, BlockCache):
            request.cache.allocate(1, 1, keep=False)
        request.infer_request.infer(inputs)
