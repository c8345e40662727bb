"""A file that is written in whole huge pages, whatever the order and the sizes of its parts.

What is written in one piece of 2 MB at a multiple of 2 MB becomes one large folio of Linux's page cache (ext4 from
6.16 on, XFS before), and one entry of the page tables where the file is mapped. Weights are read from there, straight
through, at every token: with pages of 4 kB the processor waits for a page walk and starts prefetching anew at each.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np

PAGE_BYTES = 2 << 20
OPEN_PAGES = 16
"""A constant is written in up to three streams (codes, scales, zero points), each with its page."""


class PagedFile:
    """A new file. What was written is in it after `flush` or `close`; bytes that were not are zero."""

    def __init__(self, path: Path):
        self._file = path.open("w+b")
        self._size = 0
        self._pages: OrderedDict[int, np.ndarray] = OrderedDict()
        self._written: set[int] = set()

    def extend(self, size: int) -> None:
        """Make the file at least `size` bytes long, so that it can be mapped."""
        if size > self._size:
            self._file.truncate(size)
            self._size = size

    def write_at(self, offset: int, data: np.ndarray) -> None:
        """Write uint8 [n] to the bytes from `offset` on."""
        self.extend(offset + data.size)
        while data.size:
            page, start = divmod(offset, PAGE_BYTES)
            piece = data[: PAGE_BYTES - start]
            self._page(page)[start : start + piece.size] = piece
            offset, data = offset + piece.size, data[piece.size :]

    def flush(self) -> None:
        while self._pages:
            self._write_oldest()
        self._file.flush()

    def close(self) -> None:
        """Leaves out what was not flushed."""
        self._pages.clear()
        self._file.close()

    def _page(self, number: int) -> np.ndarray:
        if number in self._pages:
            self._pages.move_to_end(number)
        else:
            if len(self._pages) == OPEN_PAGES:
                self._write_oldest()
            self._pages[number] = self._read(number)
        return self._pages[number]

    def _read(self, number: int) -> np.ndarray:
        page = np.zeros(PAGE_BYTES, np.uint8)
        # Reading a hole would fill the page cache with small folios.
        if number in self._written:
            self._file.seek(number * PAGE_BYTES)
            self._file.readinto(page.data)
        return page

    def _write_oldest(self) -> None:
        number, page = self._pages.popitem(last=False)
        start = number * PAGE_BYTES
        self._file.seek(start)
        self._file.write(page[: self._size - start].data)
        self._written.add(number)
