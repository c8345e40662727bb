"""What a checkpoint folder or a converted folder holds."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import openvino as ov

from chatglm_ov.checkpoint.fields import checkpoint_fields
from chatglm_ov.checkpoint.model_weights import model_weights
from chatglm_ov.checkpoint.prequantized import open_checkpoint
from chatglm_ov.cli.machine import kernel_in_use
from chatglm_ov.cli.parts import weight_parts
from chatglm_ov.config import ArchitectureConfig, parse_config, read_config_json
from chatglm_ov.conversion.converted_config import is_converted
from chatglm_ov.conversion.plan import make_plan
from chatglm_ov.models import architecture
from chatglm_ov.native import native, unavailable
from chatglm_ov.presets import PRESETS, config_json
from chatglm_ov.runtime.ir_reading import described_ir, read_ir, why_unpacked
from chatglm_ov.runtime.loading import Settings, default_weight_format, load_model, weight_formats
from chatglm_ov.system.processors import THREADS
from chatglm_ov.tokenizer import detect_family
from chatglm_ov.tokenizer.files import FAST_FILE, MODEL_FILE, V1_FILE
from chatglm_ov.weight_formats import FORMATS
from chatglm_ov.weights.graph_file import GraphFile
from chatglm_ov.weights.ir import IR_NAME, RT_INFO, WEIGHTS_NAME

_NOT_SHAPE = {
    "bos_token_id", "eos_token_id", "pad_token_id", "pre_seq_len", "quantization_bit", "rope_ratio_meaning",
    "rope_scaling",
}  # fmt: skip


def folder(path: Path) -> dict[str, Any]:
    """Description of a checkpoint or converted folder: strings, numbers, lists and dicts only; sizes in bytes.

    Raises ChatGLMError for a folder that is neither, and for a checkpoint that could not be converted.
    """
    converted = is_converted(path)
    fields = read_config_json(path) if converted else checkpoint_fields(path)
    config = parse_config(fields, path / "config.json")
    return {
        "folder": str(path),
        "kind": "converted" if converted else "checkpoint",
        **_model(config),
        "tokenizer": _tokenizer(path),
        **(_converted(path, config) if converted else _checkpoint(path, fields, config)),
    }


def _model(config: ArchitectureConfig) -> dict[str, Any]:
    shapes = architecture(config).weight_shapes(config)
    elements = 2 * config.num_layers * config.num_key_value_heads * config.head_dim
    described = {
        "architecture": config.architecture,
        "shape_of": released_models(config),
        "parameters": sum(prod(shape) for shape in shapes.values()),
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_rows": config.vocab_rows,
        "max_positions": config.max_positions,
        "pre_seq_len": config.pre_seq_len or 0,
        "kv_cache_bytes_per_token": {"bf16": 2 * elements, "f32": 4 * elements},
    }
    scaling = getattr(config, "rope_scaling", None)
    described["rope_scaling"] = None if scaling is None else scaling.model_dump(exclude_none=True)
    rope = {name: getattr(config, name) for name in ("rope_ratio", "rope_ratio_meaning") if hasattr(config, name)}
    return {**described, **rope}


def released_models(config: ArchitectureConfig) -> list[str]:
    """Names of the released models whose config.json describes the same computation, if any."""
    wanted = config.model_dump(exclude=_NOT_SHAPE)
    known = {name: parse_config(config_json(name)).model_dump(exclude=_NOT_SHAPE) for name in PRESETS}
    return [name for name, shape in known.items() if shape == wanted]


def _tokenizer(path: Path) -> dict[str, str] | None:
    file = next((name for name in (V1_FILE, MODEL_FILE, FAST_FILE) if (path / name).is_file()), None)
    return None if file is None else {"family": detect_family(path), "file": file}


def _checkpoint(path: Path, fields: dict[str, Any], config: ArchitectureConfig) -> dict[str, Any]:
    """Stored tensors by type, and what each weight format would take."""
    with open_checkpoint(path, fields) as weights:
        read = model_weights(config, weights)
        stored: Counter[str] = Counter()
        for name in weights.names:
            stored[weights.dtype(name)] += weights.nbytes(name)
        ops = "stock" if unavailable() else "fused"
        sizes = {name: make_plan(config, read, [name], ops).disk_bytes for name in FORMATS}
        return {"weight_files": len({weights[name].file for name in weights.names}), "stored": stored, "sizes": sizes}


def _converted(path: Path, config: ArchitectureConfig) -> dict[str, Any]:
    """Each weight format's files and graph, and the settings with which the default one is compiled here."""
    name = default_weight_format(path)
    default = _compiled(path, name) if why_unpacked(path / name / IR_NAME) is None else _unpacked(name)
    found = {name: _ir(path / name / IR_NAME, config) for name in weight_formats(path)}
    return {"weight_formats": found, "default": default}


def _compiled(path: Path, weight_format: str) -> dict[str, Any]:
    chosen = load_model(path, weight_format)
    used = {
        "weight_format": chosen.weight_format,
        "ops": chosen.ops,
        "kv_cache_type": chosen.kv_cache_format,
        "threads": chosen.compiled.get_property(THREADS),
    }
    if chosen.ops == "fused":
        return {**used, "level": native().isa()}
    return {**used, "inference_precision": chosen.compiled.get_property("INFERENCE_PRECISION_HINT").to_string()}


def _unpacked(weight_format: str) -> dict[str, Any]:
    used = {name: value for name, value in kernel_in_use(None).items() if name in ("threads", "inference_precision")}
    return {"weight_format": weight_format, "ops": "stock", "kv_cache_type": Settings().cache_format, **used}


def _ir(xml: Path, config: ArchitectureConfig) -> dict[str, Any]:
    if why_unpacked(xml) is not None:
        return _unknown_ir(xml)
    model = read_ir(xml)
    types = Counter(node.get_type_name() for node in model.get_ops())
    return {
        "calibration": _told(model, "calibration"),
        "lora": _told(model, "lora"),
        "parts": weight_parts(model, config),
        "bytes": _bytes(xml),
        "ops": model.get_rt_info(["chatglm_ov", "ops"]).astype(str),
        "state_variables": len(model.get_variables()),
        "nodes": sum(types.values()),
        "node_types": dict(types.most_common()),
    }


def _unknown_ir(xml: Path) -> dict[str, Any]:
    """What `_ir` tells, of a graph that OpenVINO does not read here; what its weights are is left out."""
    described, layers = described_ir(xml), GraphFile(xml).layers.values()
    types = Counter("Constant" if layer.kind == "Const" else layer.kind for layer in layers)
    return {
        "calibration": described.get("calibration"),
        "lora": described.get("lora"),
        "parts": {},
        "bytes": _bytes(xml),
        "ops": described["ops"],
        "state_variables": types["ReadValue"],
        "nodes": sum(types.values()),
        "node_types": dict(types.most_common()),
    }


def _bytes(xml: Path) -> int:
    return sum(file.stat().st_size for file in (xml, xml.with_name(WEIGHTS_NAME)))


def _told(model: ov.Model, name: str) -> str | None:
    """What an IR tells about itself, if it does."""
    path = [RT_INFO, name]
    return model.get_rt_info(path).astype(str) if model.has_rt_info(path) else None
