"""The weights file of an IR, written front to back while the graph is built.

A constant of the graph is a view on the mapped file, so a model of any size is built without holding its weights
in anonymous memory, and every constant starts at a multiple of 64 bytes (a cache line, an AMX tile row).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import openvino as ov

from chatglm_ov.weights.paged_file import PagedFile

ALIGNMENT = 64


@dataclass(frozen=True)
class Entry:
    """Place of one constant in the file."""

    offset: int
    nbytes: int


class WeightsFile:
    """`openvino_model.bin` under construction. `entries` maps names of graph constants to their places."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, Entry] = {}
        self._file = PagedFile(path)
        self._end = 0
        self._views: list[np.ndarray] = []

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.flush()
        finally:
            self._file.close()
            self._views.clear()

    def flush(self) -> None:
        """What was written is in the file, and in the constants, after this or the end of the block."""
        self._file.flush()

    def write(self, name: str, block: np.ndarray) -> Entry:
        """Append the bytes of `block` as the constant `name`."""
        entry = self.reserve(name, block.nbytes)
        self.write_at(entry, 0, block)
        return entry

    def reserve(self, name: str, nbytes: int) -> Entry:
        """Room for a constant that `write_at` fills in pieces."""
        offset = -(-self._end // ALIGNMENT) * ALIGNMENT
        entry = self.entries[name] = Entry(offset, nbytes)
        self._end = offset + nbytes
        self._file.extend(self._end)
        return entry

    def write_at(self, entry: Entry, position: int, block: np.ndarray) -> int:
        """Write a piece of a reserved constant; returns the position behind it, in bytes from its start."""
        data = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
        self._file.write_at(entry.offset + position, data)
        return position + data.size

    def constant(self, name: str, element_type: str, shape: Sequence[int]) -> ov.Node:
        """The graph constant of that name: a view on the file, valid as long as this object is open."""
        entry = self.entries[name]
        view = np.memmap(self.path, dtype=np.uint8, mode="r", offset=entry.offset, shape=(entry.nbytes,))
        # The tensor does not keep the numpy array alive.
        self._views.append(view)
        node = ov.op.Constant(ov.Tensor(view, ov.Shape(list(shape)), getattr(ov.Type, element_type)))
        node.set_friendly_name(name)
        return node
