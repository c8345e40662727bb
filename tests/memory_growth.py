"""Anonymous memory of converting a checkpoint and of loading the result, in a process of its own.

    python memory_growth.py CHECKPOINT WARM_UP_CHECKPOINT OUT OPS FORMAT...

Prints a JSON object: by format, bytes of the .bin and the peak growth in bytes of `convert` and of `load` (compiling,
and the first token, which is when the plugin packs weights, or a cache gets its memory).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from chatglm_ov.conversion.convert import convert
from chatglm_ov.runtime.loading import load_model
from chatglm_ov.system.memory import growth


def first_token(folder: Path, weight_format: str, precision: str | None) -> None:
    ids = np.zeros((1, 2), dtype=np.int64)
    request = load_model(folder, weight_format, precision).create_request()
    request.infer(ids, np.ones_like(ids), np.array([[0, 1]]), np.array([0]), 1)


def main(checkpoint: Path, small: Path, out: Path, ops: str, formats: list[str]) -> None:
    # What the libraries take once is not counted.
    convert(small, out / "small", formats, ops, progress=False)
    for name in formats:
        first_token(out / "small", name, "f32")
    found = {}
    for name in formats:
        sizes = found[name] = {}
        with growth() as grown:
            convert(checkpoint, out / name, (name,), ops, progress=False)
        sizes["convert"] = grown.nbytes
        sizes["bin"] = (out / name / name / "openvino_model.bin").stat().st_size
        for precision in ("f32", None):
            with growth() as grown:
                first_token(out / name, name, precision)
            sizes[f"load {precision}"] = grown.nbytes
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4], sys.argv[5:])
