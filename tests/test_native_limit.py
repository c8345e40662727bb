"""The loops that `chatglm-ov bench` measures the machine with: they run at every level, on any buffer, and say no to
what they cannot do. How fast they are is not tested."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest

from chatglm_ov.native import native, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no native library: {unavailable()}")

LEVELS = ("avx2", "avx_vnni", "avx512", "avx512_bf16", "amx")
PROT_NONE = 0


@pytest.fixture(params=LEVELS)
def isa(request):
    if request.param not in native().present_isa_levels():
        pytest.skip(f"this machine has no {request.param}")
    return request.param


@pytest.fixture(scope="module")
def pages():
    """1 MiB and 3 pages u8; reading on behind them ends the process."""
    size = (1 << 20) + 3 * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    buffer = np.frombuffer(memory, np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(buffer.ctypes.data + size), ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE) == 0
    return buffer[:size]


@pytest.mark.parametrize("count", [1, 63, 257, 4095, (1 << 20) + 77])
@pytest.mark.parametrize("threads", [1, 2])
def test_reading_stays_inside_the_buffer(isa, pages, count, threads):
    assert native().read_bandwidth(isa, pages[pages.size - count :], threads) > 0


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_a_peak_is_positive(isa, kind):
    assert native().peak(isa, kind, 2, 0.001) > 0


def test_an_unknown_kind_is_refused(isa):
    with pytest.raises(ValueError, match="kind: 'fp4', wanted int8 or bf16"):
        native().peak(isa, "fp4", 1, 0.001)


def test_no_threads_are_refused(isa, pages):
    with pytest.raises(ValueError, match="threads: 0, wanted at least 1"):
        native().read_bandwidth(isa, pages, 0)
    with pytest.raises(ValueError, match="threads: 0, wanted at least 1"):
        native().peak(isa, "int8", 0, 0.001)
