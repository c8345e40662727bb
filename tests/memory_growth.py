"""Anonymous memory of converting a checkpoint and of loading the result, in a process of its own.

    python memory_growth.py CHECKPOINT WARM_UP_CHECKPOINT OUT OPS FORMAT...

Prints a JSON object: by format, bytes of the .bin and the peak growth in bytes of `convert` and of `load` (compiling,
and the first token, which is when the plugin packs weights, or a cache gets its memory).
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from chatglm_ov.conversion import convert
from chatglm_ov.runtime import load_model


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


@contextmanager
def growth(into: dict[str, int], name: str) -> Iterator[None]:
    """Note under `name` by how much the memory grew at most, looked at every millisecond."""
    start, done = anonymous_bytes(), threading.Event()
    peaks = [start]

    def watch() -> None:
        while not done.wait(0.001):
            peaks.append(max(peaks[-1], anonymous_bytes()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        into[name] = max(peaks[-1], anonymous_bytes()) - start


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
        with growth(sizes, "convert"):
            convert(checkpoint, out / name, (name,), ops, progress=False)
        sizes["bin"] = (out / name / name / "openvino_model.bin").stat().st_size
        for precision in ("f32", None):
            with growth(sizes, f"load {precision}"):
                first_token(out / name, name, precision)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4], sys.argv[5:])
