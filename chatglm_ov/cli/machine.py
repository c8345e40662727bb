"""What this machine offers and what OpenVINO's CPU plugin makes of it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import psutil

from chatglm_ov.native import library_path, native, unavailable
from chatglm_ov.runtime.ir_reading import core
from chatglm_ov.system.memory import available
from chatglm_ov.system.processors import THREADS, processor_quota, thread_limit

ISA_FLAGS = {
    "AVX2": ("avx2", "fma"),
    "AVX-VNNI": ("avx_vnni",),
    "AVX-512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "AVX-512 VNNI": ("avx512_vnni",),
    "AVX-512 BF16": ("avx512_bf16",),
    "AMX bf16": ("amx_tile", "amx_bf16"),
    "AMX int8": ("amx_tile", "amx_int8"),
}
"""Instruction sets that matter to these models, and the CPU flags (as Linux names them) that make each."""


def isa_of(flags: Iterable[str]) -> dict[str, bool]:
    """Which of ISA_FLAGS a processor with these flags has."""
    found = set(flags)
    return {name: found.issuperset(needed) for name, needed in ISA_FLAGS.items()}


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str] | None:
    """Flags of the first processor; None where the system has no such file or names none (not Linux on x86)."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), None)


def kernel_in_use(precision: str | None) -> dict[str, Any]:
    """The kernel that the CPU plugin runs an int8 linear layer with, and the number of threads.

    Found by running a small one, so it includes what the flags do not tell: limits of the virtual machine, the
    system's permission for AMX, environment variables. precision: INFERENCE_PRECISION_HINT, None: its default.
    """
    opset = ov.opset13
    x = opset.parameter([-1, 256], ov.Type.f32)
    weight = opset.convert(opset.constant(np.ones((256, 256), np.int8)), "f32")
    y = opset.matmul(x, opset.multiply(weight, opset.constant(np.ones((256, 1), np.float32))), False, True)
    settings = {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}
    compiled = core().compile_model(ov.Model([y], [x]), "CPU", {**settings, **thread_limit(core())})
    compiled(np.zeros((64, 256), np.float32))
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    kernel = next(n["primitiveType"].astype(str) for n in nodes if n["layerType"].astype(str) == "FullyConnected")
    return {
        "inference_precision": compiled.get_property("INFERENCE_PRECISION_HINT").to_string(),
        "kernel": kernel,
        "isa": isa_of_kernel(kernel),
        "threads": compiled.get_property(THREADS),
    }


def isa_of_kernel(kernel: str) -> str:
    """The instruction set in the name of a plugin's kernel, such as `brgemm_avx512_amx`; else the name itself."""
    marks = {"amx": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512_vnni": "AVX-512 VNNI", "avx512": "AVX-512"}
    marks |= {"avx2": "AVX2", "avx": "AVX", "sse": "SSE"}
    return next((isa for mark, isa in marks.items() if mark in kernel), kernel)


def fused_operations() -> dict[str, Any]:
    """The native library: its file and the instruction set level that it uses, or why it cannot be used."""
    found = {"unavailable": unavailable(), "forced_level": os.environ.get("CHATGLM_OV_ISA")}
    if found["unavailable"] is not None:
        return found
    return {**found, "library": library_path(), "level": native().isa(), "levels": native().present_isa_levels()}


def machine() -> dict[str, Any]:
    """Description of this machine: strings, numbers and lists only."""
    flags = cpu_flags()
    memory = psutil.virtual_memory()
    return {
        "cpu": core().get_property("CPU", "FULL_DEVICE_NAME").strip() or platform.processor(),
        "physical_cores": psutil.cpu_count(logical=False),
        "usable_processors": _usable_processors(),
        "processor_quota": processor_quota(),
        "numa_nodes": numa_nodes(),
        "memory_bytes": memory.total,
        "memory_available_bytes": available(),
        "isa": None if flags is None else isa_of(flags),
        "fused_operations": fused_operations(),
        "openvino": ov.get_version(),
        "openvino_devices": core().available_devices,
        "openvino_cpu_capabilities": sorted(core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
        "default": kernel_in_use(None),
        "f32": kernel_in_use("f32"),
    }


def numa_nodes(folder: Path = Path("/sys/devices/system/node")) -> int | None:
    """Parts of the memory that are nearer to some processors than to others; None where the system has no such folder
    (not Linux)."""
    return len(list(folder.glob("node[0-9]*"))) or None


def _usable_processors() -> int | None:
    """Processors that this process may use: fewer than there are under taskset or in a container."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count()
