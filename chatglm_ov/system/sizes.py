"""Numbers of bytes for people to read."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """In decimal units, as disks are sold: `12.49 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes:.0f} bytes"
