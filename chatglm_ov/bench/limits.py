"""What the machine can do at most, with the threads that the models use, from the native library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from chatglm_ov.native import native

BUFFER_BYTES = 512 << 20
"""What is read: many times the caches."""
PASSES, PASSES_BESIDE = 6, 2
"""The best of so many counts; few where other things are measured in between."""
PEAK_TRIES, PEAK_SECONDS = 3, 0.1

LIMITS = ("read", "int8", "bf16")
"""Bytes read from memory a second; int8 and bf16 operations a second, 2 for a multiply-add."""


@dataclass
class Limits:
    """Samples taken one after the other, all in one process; each is the best of a few tries."""

    threads: int
    samples: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in LIMITS})

    def take(self) -> None:
        """One more sample of each limit: about a second."""
        library = native()
        isa = library.isa()
        self.samples["read"].append(self.reader(PASSES)())
        for kind in ("int8", "bf16"):
            tries = (library.peak(isa, kind, self.threads, PEAK_SECONDS) for _ in range(PEAK_TRIES))
            self.samples[kind].append(max(tries))

    def reader(self, passes: int = PASSES_BESIDE) -> Callable[[], float]:
        """Measures at each call how many bytes can be read a second; holds its buffer as long as it lives."""
        library = native()
        isa = library.isa()
        # Ones: pages that were never written would all be the same one.
        buffer = np.ones(BUFFER_BYTES, np.uint8)
        return lambda: max(library.read_bandwidth(isa, buffer, self.threads) for _ in range(passes)) * 1e9


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """The samples themselves, their median, the lowest and the highest."""
    return {"median": median(samples), "low": min(samples), "high": max(samples), "samples": list(samples)}


def disturbed_rounds(samples: dict[str, list[float]], share: float = 0.9) -> list[int]:
    """Rounds, from 0, before or after which a limit was below this share of its median: something else was running.
    Round i lies between the samples i and i + 1."""
    found = set()
    for values in samples.values():
        least = share * median(values)
        found |= {i for i in range(len(values) - 1) if min(values[i : i + 2]) < least}
    return sorted(found)
