"""The memory of this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil


def memory() -> tuple[int, int]:
    """Resident and anonymous bytes of this process. The second leaves out the pages of mapped files, such as the
    weights, which the system can drop and share; where it does not tell them apart, both are the same."""
    info = psutil.Process().memory_info()
    return info.rss, info.rss - getattr(info, "shared", 0)


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
