"""What the tests of conversion share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from chatglm_ov import convert


def to_int8(checkpoint: Path, output: Path, **options: Any) -> Path:
    return convert(checkpoint, output, ("int8",), **{"progress": False, **options})


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
