"""`chatglm-ov info`: what a folder holds and what this machine can do."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatglm_ov.system.sizes import size

SUMMARY = "describe a checkpoint or converted folder, and this machine"
FAMILIES = {"chatglm": "ChatGLM", "chatglm2": "ChatGLM2", "chatglm3": "ChatGLM3", "glm4": "GLM-4"}
WORKING_NODES = ("MatMul", "ScaledDotProductAttention", "FullyConnected", "MultiHeadAttention")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", help="checkpoint or converted folder (default: machine only)")
    parser.add_argument("--json", action="store_true", help="everything, for programs to read")


def run(arguments: argparse.Namespace) -> None:
    from chatglm_ov.cli.machine import machine

    report = {}
    if arguments.folder is not None:
        from chatglm_ov.cli.folder import folder

        report["folder"] = folder(arguments.folder)
    report["machine"] = machine()
    if arguments.json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
        return
    from chatglm_ov.cli.tables import print_fields

    if "folder" in report:
        print_fields(_folder_lines(report["folder"]))
        print()
    print_fields(_machine_lines(report["machine"]))


def _folder_lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "folder", f"{found['folder']} ({found['kind']})"
    yield "model", _model(found)
    yield "parameters", f"{found['parameters']:,}"
    yield "layers", f"{found['num_layers']}, hidden size {found['hidden_size']}"
    heads, groups = found["num_attention_heads"], found["num_key_value_heads"]
    yield "attention", f"{heads} query heads, {groups} key/value heads of {found['head_dim']}"
    yield "vocabulary", f"{found['vocab_rows']} rows"
    yield "positions", "no limit" if found["max_positions"] is None else str(found["max_positions"])
    if found.get("rope_ratio", 1) != 1:
        yield "rope_ratio", f"{found['rope_ratio']:g}, on the {found['rope_ratio_meaning']}"
    if found["rope_scaling"]:
        yield "rope scaling", f"{found['rope_scaling']['rope_type']}, {found['rope_scaling']['factor']:g} times as long"
    if found["pre_seq_len"]:
        yield "trained prefix", f"{found['pre_seq_len']} tokens (P-Tuning v2)"
    tokenizer = found["tokenizer"]
    yield "tokenizer", f"{tokenizer['family']}, {tokenizer['file']}" if tokenizer else "none in the folder"
    yield from _cache_line(found)
    yield from _converted_lines(found) if found["kind"] == "converted" else _checkpoint_lines(found)


def _model(found: dict[str, Any]) -> str:
    family = FAMILIES.get((found["tokenizer"] or {}).get("family", ""), "")
    shape = f"the shape of {' or '.join(found['shape_of'])}" if found["shape_of"] else "no released model's shape"
    return f"{family + ', ' if family else ''}architecture {found['architecture']}, {shape}"


def _cache_line(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    per_type = found["kv_cache_bytes_per_token"]
    used = found.get("default", {}).get("kv_cache_type")
    types = [used] if used in per_type else list(per_type)
    yield "KV cache", ", ".join(f"{size(per_type[name])} a token in {name}" for name in types)


def _checkpoint_lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    stored = ", ".join(f"{size(nbytes)} {name}" for name, nbytes in found["stored"].items())
    count = found["weight_files"]
    yield "stored", f"{stored}, in {count} file{'s' if count > 1 else ''}"
    for name, nbytes in found["sizes"].items():
        yield f"as {name}", size(nbytes)


def _converted_lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if adapters := sorted({ir["lora"] for ir in found["weight_formats"].values()} - {None}):
        yield "LoRA", f"{', '.join(adapters)}, merged"
    for name, ir in found["weight_formats"].items():
        states = f"{ir['state_variables']} states"
        calibrated = f" by {ir['calibration']}" if ir["calibration"] else ""
        yield (
            name + calibrated,
            f"{size(ir['bytes'])}, {ir['ops']} ops, {states}, {ir['nodes']} nodes with {_work(ir['node_types'])}",
        )
        for part, stored in ir["parts"].items():
            yield f"  {part}", f"{size(stored['bytes'])}{_formats(stored['formats'])}"
    default = found["default"]
    fused = default["ops"] == "fused"
    how = f"fused ops ({default['level']})" if fused else f"{default['inference_precision']} arithmetic"
    yield (
        "runs with",
        f"{default['weight_format']} weights, {how}, {default['kv_cache_type']} KV cache, {default['threads']} threads",
    )


def _formats(counts: dict[str, int]) -> str:
    """The formats of a part, the number of weights with each where there are several."""
    several = len(counts) > 1
    told = [f"{count} x {name}" if several else name for name, count in counts.items()]
    return f", {', '.join(told)}" if told else ""


def _work(node_types: dict[str, int]) -> str:
    """The nodes that do the work of a model; all others are in the JSON."""
    return ", ".join(f"{node_types[name]} {name}" for name in WORKING_NODES if name in node_types)


def _machine_lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    nodes = f", {found['numa_nodes']} NUMA nodes" if (found["numa_nodes"] or 1) > 1 else ""
    cores = f"{found['physical_cores']} cores, {found['usable_processors']} usable processors"
    quota = "" if found["processor_quota"] is None else f" with the time of {found['processor_quota']:g}"
    yield "processor", f"{found['cpu']}, {cores}{quota}{nodes}"
    yield "memory", f"{size(found['memory_bytes'])}, {size(found['memory_available_bytes'])} available"
    isa = found["isa"]
    if isa is None:
        yield "instruction sets", "not told by this system"
    else:
        has = ", ".join(name for name, there in isa.items() if there) or "none of these"
        lacks = ", ".join(name for name, there in isa.items() if not there)
        yield "instruction sets", has + (f" (not: {lacks})" if lacks else "")
    yield "fused operations", _fused_operations(found["fused_operations"])
    yield "OpenVINO", f"{found['openvino']}, devices {', '.join(found['openvino_devices'])}"
    yield "CPU plugin offers", ", ".join(found["openvino_cpu_capabilities"])
    for title, name in (("in use", "default"), ("in use for f32", "f32")):
        used = found[name]
        isa_used = f"{used['isa']}, kernel {used['kernel']}"
        yield title, f"{isa_used}, {used['inference_precision']} arithmetic, {used['threads']} threads"


def _fused_operations(found: dict[str, Any]) -> str:
    if found["unavailable"] is not None:
        return f"cannot be used: {' '.join(found['unavailable'].split())}"
    forced = " by CHATGLM_OV_ISA" if found["forced_level"] else ""
    return f"{found['level']}{forced}, of {', '.join(found['levels'])}; {found['library']}"
