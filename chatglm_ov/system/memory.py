"""The memory of this process, and what is left for it."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from chatglm_ov.system.control_groups import groups


def memory() -> tuple[int, int]:
    """Resident and anonymous bytes of this process. The second leaves out the pages of mapped files, such as the
    weights, which the system can drop and share; where it does not tell them apart, both are the same."""
    info = psutil.Process().memory_info()
    return info.rss, info.rss - getattr(info, "shared", 0)


def give_back() -> None:
    """What was freed and the allocator keeps goes back to the system, where the C library can do so (glibc)."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)


def available(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: of the machine, or of the container or slice that it runs in, which ends
    it for more. `root`: where the system's files are."""
    return min([psutil.virtual_memory().available, *_left_of_groups(root)])


# Of control groups by version: the files with their limit and what is used of it, and in memory.stat what of that are
# files, which the system can drop unless they are in memory only.
_NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"),
    2: ("memory.max", "memory.current", "file", "shmem"),
}


def _left_of_groups(root: Path) -> Iterator[int]:
    """Bytes that are left in each control group that can be seen and has a limit."""
    for version, folder in groups("memory", root):
        with suppress(OSError, ValueError):
            yield _left(folder, *_NAMES[version])


def _left(group: Path, limit: str, used: str, files: str, in_memory: str) -> int:
    """Raises ValueError where there is no limit ("max")."""
    free = int((group / limit).read_text()) - int((group / used).read_text())
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return max(0, free + int(stat.get(files, 0)) - int(stat.get(in_memory, 0)))


@dataclass
class Growth:
    """nbytes: the most that the anonymous memory was above what it began with."""

    nbytes: int = 0


@contextmanager
def growth() -> Iterator[Growth]:
    """How much the anonymous memory grows at most before the end, looked at every millisecond."""
    before, found, done = memory()[1], Growth(), threading.Event()

    def look() -> None:
        found.nbytes = max(found.nbytes, memory()[1] - before)

    def watch() -> None:
        while not done.wait(0.001):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        look()
