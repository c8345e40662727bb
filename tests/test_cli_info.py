"""`chatglm-ov info`: figures of a folder that can be checked by hand, and of this machine."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from command_line import Run, checkpoint, converted, copy_of, finish, run, spawn  # noqa: F401
from golden_cases import each_ops, without_library
from safetensors.numpy import save_file

from chatglm_ov import convert
from chatglm_ov.cli import machine as this_machine
from chatglm_ov.cli.folder import released_models
from chatglm_ov.cli.machine import cpu_flags, isa_of, isa_of_kernel
from chatglm_ov.config import load_config, parse_config
from chatglm_ov.native import unavailable
from chatglm_ov.presets import PRESETS, config_json

# The golden model: hidden 64, 4 heads of 16 in 2 groups, feed-forward 172, vocabulary 1536, 2 layers.
LAYER = 64 + (64 + 1) * 128 + 64 * 64 + 64 + 64 * 344 + 172 * 64
WORKING = {"fused": ("MultiHeadAttention", "FullyConnected"), "stock": ("ScaledDotProductAttention", "MatMul")}
PARAMETERS = 2 * 1536 * 64 + 64 + 2 * LAYER


def reported(run: Run, *arguments: object) -> dict[str, Any]:
    done = run("info", *arguments, "--json")
    assert done.code == 0 and done.err == ""
    return json.loads(done.out)


def test_checkpoint(checkpoint: Path, run: Run) -> None:
    found = reported(run, checkpoint)["folder"]
    assert found["kind"] == "checkpoint"
    assert found["parameters"] == PARAMETERS
    assert found["weight_files"] == 3
    # And the 4 rotary frequencies, which the model does not read.
    assert found["stored"] == {"float16": 2 * (PARAMETERS + 4)}
    assert found["tokenizer"] == {"family": "glm4", "file": "tokenizer.model"}
    # Keys and values of 2 layers, 2 groups of 16 elements.
    assert found["kv_cache_bytes_per_token"] == {"bf16": 256, "f32": 512}
    assert found["max_positions"] == 4096
    assert found["shape_of"] == []


def test_sizes_told_are_the_sizes_written(checkpoint: Path, converted: Path, run: Run) -> None:
    """Up to the padding between constants and the small ones of the graph."""
    told = reported(run, checkpoint)["folder"]["sizes"]
    for name in ("f32", "bf16", "int8"):
        written = (converted / name / "openvino_model.bin").stat().st_size
        assert told[name] <= written < told[name] + 12_000
    assert told["int4"] < told["int8"] < told["bf16"] < told["f32"]


@each_ops
def test_converted(ops: str, checkpoint: Path, tmp_path: Path, run: Run) -> None:
    converted = convert(checkpoint, tmp_path / "out", ("f32", "bf16", "int8"), ops, progress=False)
    found = reported(run, converted)["folder"]
    assert found["kind"] == "converted"
    assert found["parameters"] == PARAMETERS
    assert sorted(found["weight_formats"]) == ["bf16", "f32", "int8"]
    for name, ir in found["weight_formats"].items():
        assert ir["bytes"] == sum(file.stat().st_size for file in (converted / name).iterdir())
        assert ir["ops"] == ops
        # A cache a layer and the beam table, or keys and values of each layer.
        assert ir["state_variables"] == {"fused": 2 + 1, "stock": 2 * 2}[ops]
        attention, linear = WORKING[ops]
        assert ir["node_types"][attention] == 2
        # qkv, dense and two of the feed-forward part a layer, and the head.
        assert ir["node_types"][linear] == 2 * 4 + 1
        assert ir["nodes"] == sum(ir["node_types"].values())
    assert found["default"]["weight_format"] == "int8"
    assert found["default"]["kv_cache_type"] == "bf16"
    assert found["default"]["ops"] == ops
    assert f"{ops} ops" in run("info", converted).out


def test_people_read_the_same(checkpoint: Path, converted: Path, run: Run) -> None:
    for folder in (checkpoint, converted):
        out = run("info", folder).out
        for text in (str(folder), "GLM-4", f"{PARAMETERS:,}", "4 query heads, 2 key/value heads of 16", "256 bytes"):
            assert text in out
        assert ov.get_version() in out
    assert "as int4" in run("info", checkpoint).out


def test_machine_alone(run: Run) -> None:
    found = reported(run)
    assert list(found) == ["machine"]
    machine = found["machine"]
    assert machine["openvino"] == ov.get_version()
    assert 1 <= machine["default"]["threads"] <= machine["usable_processors"]
    assert machine["f32"]["inference_precision"] == "f32"
    assert machine["memory_available_bytes"] < machine["memory_bytes"]
    out = run("info").out
    assert machine["cpu"] in out
    assert all(line == line.rstrip() for line in out.splitlines())


def test_several_nodes_of_memory_are_told(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert this_machine.numa_nodes(tmp_path) is None
    for name in ("node0", "node1", "node10", "possible", "has_cpu"):
        (tmp_path / name).mkdir()
    assert this_machine.numa_nodes(tmp_path) == 3
    for nodes, told in ((3, True), (1, False), (None, False)):
        monkeypatch.setattr(this_machine, "numa_nodes", lambda nodes=nodes: nodes)
        assert (f"usable processors, {nodes} NUMA nodes" in run("info").out) == told
        assert ("NUMA" in run("info").out) == told


@without_library
def test_fused_operations(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = reported(run)["machine"]["fused_operations"]
    assert Path(found["library"]).is_file()
    assert found["level"] in [*found["levels"], "amx_emulated"]
    assert f"{found['level']}, of" in run("info").out or f"{found['level']} by CHATGLM_OV_ISA, of" in run("info").out


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [("CHATGLM_OV_NATIVE", "/nonexistent", "/nonexistent is no Python module"), ("CHATGLM_OV_ISA", "mmx", "mmx")],
)
def test_why_there_are_no_fused_operations(variable: str, value: str, told: str) -> None:
    """In a process of its own: the library is looked for once."""
    if variable == "CHATGLM_OV_ISA" and unavailable() is not None:
        pytest.skip(f"no native library: {unavailable()}")
    command = "from chatglm_ov.cli.main import main; main(['info'])"
    done = finish(spawn(sys.executable, "-c", command, env={variable: value}))
    line = next(line for line in done.out.splitlines() if line.startswith("fused operations"))
    assert "cannot be used" in line and told in line


def test_instruction_sets_agree_with_numpy(run: Run) -> None:
    """numpy asks the processor itself."""
    isa = reported(run)["machine"]["isa"]
    if isa is None:
        pytest.skip("this system has no /proc/cpuinfo")
    features = np._core._multiarray_umath.__cpu_features__
    assert isa["AVX2"] == (features["AVX2"] and features["FMA3"])
    assert isa["AVX-512"] == features["AVX512_SKX"]
    assert isa["AVX-512 VNNI"] == features.get("AVX512VNNI", features["AVX512_CLX"])


def test_instruction_sets_of_other_processors(tmp_path: Path) -> None:
    sapphire_rapids = (
        "fma avx2 avx_vnni avx512f avx512dq avx512bw avx512vl avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8"
    )
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: X\nflags\t\t: {sapphire_rapids}\nflags\t\t: sse\n")
    assert all(isa_of(cpu_flags(cpuinfo)).values())
    assert isa_of(["avx2", "fma", "amx_bf16"]) == {"AVX2": True} | dict.fromkeys(list(isa_of([]))[1:], False)
    cpuinfo.write_text("processor\t: 0\nFeatures\t: asimd\n")
    assert cpu_flags(cpuinfo) is None
    assert cpu_flags(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("kernel", "isa"),
    [
        ("brgemm_avx512_amx", "AMX"),
        ("brgemm_avx512_bf16", "AVX-512 BF16"),
        ("brgemm_avx512_f32", "AVX-512"),
        ("jit_avx2_f32", "AVX2"),
        ("ref_any_f32", "ref_any_f32"),
    ],
)
def test_instruction_set_of_a_kernel(kernel: str, isa: str) -> None:
    assert isa_of_kernel(kernel) == isa


@pytest.mark.parametrize("name", PRESETS)
def test_a_released_model_is_recognised(name: str) -> None:
    assert name in released_models(parse_config(config_json(name)))


def test_models_of_different_shapes_are_not_confused() -> None:
    assert released_models(parse_config(config_json("chatglm2-6b"))) == ["chatglm2-6b"]
    assert released_models(parse_config(config_json("chatglm3-6b", num_layers=27))) == []


def test_folders_that_are_neither(tmp_path: Path, run: Run) -> None:
    assert (
        run("info", tmp_path / "none").error
        == f"{tmp_path / 'none'}: folder is missing, expected a folder with config.json"
    )
    assert "config.json is missing" in run("info", tmp_path).error


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (Path.unlink, "openvino_model.bin: file is missing"),
        (lambda weights: os.truncate(weights, 1000), "openvino_model.xml: IR is unreadable"),
        (lambda weights: os.truncate(weights.with_suffix(".xml"), 10_000), "openvino_model.xml: IR is unreadable"),
    ],
)
@pytest.mark.parametrize("weight_format", ["int8", "f32"])
def test_damaged_weights(
    weight_format: str, damage: Callable[[Path], object], told: str, converted: Path, tmp_path: Path, run: Run
) -> None:
    folder = copy_of(converted, tmp_path / "damaged")
    damage(folder / weight_format / "openvino_model.bin")
    assert told in run("info", folder).error


def test_longer_contexts_and_trained_prefixes_are_told(data: Path, tmp_path: Path, run: Run) -> None:
    checkpoint = data / "golden" / "v2" / "v2_tiny" / "checkpoint"
    config = load_config(checkpoint)
    features = 2 * config.num_layers * config.num_key_value_heads * config.head_dim
    (tmp_path / "tuned").mkdir()
    tensors = {"transformer.prefix_encoder.embedding.weight": np.zeros((7, features), np.float32)}
    save_file(tensors, tmp_path / "tuned" / "model.safetensors")
    options = ["--p-tuning", tmp_path / "tuned", "--rope-scaling", "yarn:4", "--weight-format", "int8"]
    assert run("convert", checkpoint, tmp_path / "out", *options).code == 0
    told = run("info", tmp_path / "out").out
    assert re.search(r"trained prefix +7 tokens", told)
    assert re.search(r"rope scaling +yarn, 4 times as long", told)
    assert re.search(rf"positions +{4 * config.seq_length}", told)
