"""The weights file of an IR, written front to back while the graph is built.

A constant of the graph is a view on the mapped file, so a model of any size is built without holding its weights
in anonymous memory, and every constant starts at a multiple of 64 bytes (a cache line, an AMX tile row).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import openvino as ov

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
        self._file: BinaryIO = path.open("wb")
        self._views: list[np.ndarray] = []

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._views.clear()

    def write(self, name: str, blocks: Iterable[np.ndarray]) -> Entry:
        """Append the bytes of `blocks`, one after the other, as the constant `name`."""
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        for block in blocks:
            self._file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        self.entries[name] = Entry(offset, self._file.tell() - offset)
        return self.entries[name]

    def reserve(self, name: str, nbytes: int) -> Entry:
        """Room for a constant that `write_at` fills in pieces."""
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        entry = self.entries[name] = Entry(self._file.tell(), nbytes)
        self._file.truncate(entry.offset + nbytes)
        self._file.seek(entry.offset + nbytes)
        return entry

    def write_at(self, entry: Entry, position: int, block: np.ndarray) -> int:
        """Write a piece of a reserved constant; returns the position behind it, in bytes from its start."""
        data = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
        end = self._file.tell()
        self._file.seek(entry.offset + position)
        self._file.write(data.data)
        self._file.seek(end)
        return position + data.size

    def constant(self, name: str, element_type: str, shape: Sequence[int]) -> ov.Node:
        """The graph constant of that name: a view on the file, valid as long as this object is open."""
        self._file.flush()
        entry = self.entries[name]
        view = np.memmap(self.path, dtype=np.uint8, mode="r", offset=entry.offset, shape=(entry.nbytes,))
        # The tensor does not keep the numpy array alive.
        self._views.append(view)
        node = ov.op.Constant(ov.Tensor(view, ov.Shape(list(shape)), getattr(ov.Type, element_type)))
        node.set_friendly_name(name)
        return node
