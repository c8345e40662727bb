"""How many threads a model should have.

OpenVINO takes those processors that the process may run on. A container is often given an amount of their time
instead (`docker --cpus`, `limits.cpu` of Kubernetes): threads that are more than that are stopped in the middle of a
loop, and all others wait for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import openvino as ov
import openvino.opset15 as ops

from chatglm_ov.system.control_groups import groups

THREADS = "INFERENCE_NUM_THREADS"


def processor_quota(root: Path = Path("/")) -> float | None:
    """Processors whose time the control groups of this process may use up, 1.5 for example; None without a limit.
    root: where the system's files are."""
    return min(_quotas(root), default=None)


def _quotas(root: Path) -> Iterator[float]:
    for version, folder in groups("cpu", root):
        with suppress(OSError, ValueError, ZeroDivisionError):
            if version == 2:
                # "max" is no number.
                quota, period = (int(word) for word in (folder / "cpu.max").read_text().split())
            else:
                quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota > 0:
                yield quota / period


def quota_threads(root: Path = Path("/")) -> int | None:
    """Threads that fill the quota; None without one.

    The nearest whole number: half a thread too many costs decoding nothing and makes a prompt faster, while two threads
    in the time of one are slower than one.
    """
    quota = processor_quota(root)
    return None if quota is None else max(1, int(quota + 0.5))


def thread_limit(core: ov.Core, root: Path = Path("/")) -> dict[str, Any]:
    """Properties for the compilation of models on the CPU, where the quota is for fewer threads than OpenVINO takes;
    else none."""
    threads = quota_threads(root)
    if threads is None or threads >= _default_threads(core):
        return {}
    # Pinned, the threads of every process are on the first processors: two containers would share one.
    return {THREADS: threads, "ENABLE_CPU_PINNING": False}


@cache
def _default_threads(core: ov.Core) -> int:
    x = ops.parameter([1], ov.Type.f32)
    return core.compile_model(ov.Model([ops.relu(x)], [x]), "CPU").get_property(THREADS)
