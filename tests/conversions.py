"""What the tests of conversion share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chatglm_ov import convert
from chatglm_ov.checkpoint.model_weights import model_weights
from chatglm_ov.checkpoint.prequantized import open_checkpoint
from chatglm_ov.config import parse_config, read_config_json
from chatglm_ov.conversion.convert import available_ops
from chatglm_ov.conversion.plan import Plan, make_plan


def to_int8(checkpoint: Path, output: Path, **options: Any) -> Path:
    return convert(checkpoint, output, ("int8",), **{"progress": False, **options})


def plan_conversion(checkpoint: Path, weight_formats: Sequence[str] = ("bf16", "int8"), ops: str = "fused") -> Plan:
    """What `convert` tells before it starts."""
    fields = read_config_json(checkpoint)
    config = parse_config(fields)
    with open_checkpoint(checkpoint, fields) as weights:
        return make_plan(config, model_weights(config, weights), weight_formats, available_ops(ops))


def names(folder: Path) -> list[str]:
    """What is in a folder, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


def listing(folder: Path) -> list[str]:
    """What is in a folder and below, as relative paths."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def interrupted(*args: Any) -> None:
    raise KeyboardInterrupt


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid
