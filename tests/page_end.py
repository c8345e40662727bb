"""Arrays that end where readable memory ends."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np


def at_page_end(array: np.ndarray) -> np.ndarray:
    """A writable copy whose last byte is the last one of a page, with a page behind it that faults at any access."""
    end = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, end + mmap.PAGESIZE), np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if protect(memory.ctypes.data + end, mmap.PAGESIZE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = memory[end - array.nbytes : end].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
