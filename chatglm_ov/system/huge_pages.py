"""Huge pages of Linux for mapped weights.

Asked for them, it reads a weights file that is not in memory yet in pieces of 2 MB, each one entry of the page tables,
instead of a few dozen kilobytes at a time. What is in memory already stays as it is.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import openvino as ov

LEAST_BYTES = 2 << 20
"""Constants that are smaller fill no huge page."""

CACHED_BYTES = 64 << 20
"""A file of which no more is in memory may lie in the processor's caches, and its pages do not count."""


def advise_huge_pages(model: ov.Model, file_bytes: int) -> bool:
    """Give the advice for the constants of `model`, which lie in one mapped file of this size. Returns whether the
    system took it; elsewhere nothing is changed."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return False
    places = [
        (node.data.ctypes.data, node.get_byte_size())
        for node in model.get_ops()
        if node.get_type_name() == "Constant" and node.get_byte_size() >= LEAST_BYTES
    ]
    if not places:
        return False
    begin = min(start for start, _ in places) // mmap.PAGESIZE * mmap.PAGESIZE
    end = max(start + size for start, size in places)
    # Further apart than the file is long: they lie in memory of their own.
    if end - begin > file_bytes:
        return False
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise(begin, end - begin, advice) == 0


def small_page_share(file: Path, maps: Path = Path("/proc/self/smaps")) -> float | None:
    """Share of the bytes of `file` that this process has mapped, and that are in memory, outside of huge pages;
    None where there are few of them or the system (`maps`) does not tell."""
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return None
    mapped, in_memory, huge = False, 0, 0
    for line in lines:
        name, *words = line.split()
        if not name.endswith(":"):  # of the next piece: its addresses, and what is mapped
            mapped = line.endswith(f" {file}")
        elif mapped and name == "Rss:":
            in_memory += int(words[0]) << 10
        elif mapped and name in ("FilePmdMapped:", "ShmemPmdMapped:"):  # on a disk, in memory
            huge += int(words[0]) << 10
    return 1 - huge / in_memory if in_memory > CACHED_BYTES else None
