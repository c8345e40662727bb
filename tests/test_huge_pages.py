"""Advice to the system about mapped weights."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import openvino as ov
import openvino.opset15 as ops
import pytest

from chatglm_ov.system.huge_pages import CACHED_BYTES, LEAST_BYTES, advise_huge_pages, small_page_share

linux = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no MADV_HUGEPAGE")


def model_of(*sizes: int) -> ov.Model:
    constants = [ops.constant(np.full(size, i, np.uint8)) for i, size in enumerate(sizes)]
    return ov.Model([ops.result(constant) for constant in constants], [], "constants")


def flags(file: Path) -> list[str]:
    """Flags of the memory that is mapped from the file, by its pieces."""
    pieces, found, ours = Path("/proc/self/smaps").read_text().splitlines(), [], False
    for line in pieces:
        if line.endswith(file.name) and " r" in line:
            ours = str(file) in line
        elif line.startswith("VmFlags:") and ours:
            found.append(line)
            ours = False
    return found


@linux
def test_mapped_weights_are_advised(tmp_path: Path):
    ov.save_model(model_of(2 * LEAST_BYTES, 100, 3 * LEAST_BYTES), tmp_path / "model.xml", compress_to_fp16=False)
    file = tmp_path / "model.bin"
    model = ov.Core().read_model(tmp_path / "model.xml")
    assert flags(file) and not any(" hg" in line for line in flags(file))
    if not advise_huge_pages(model, file.stat().st_size):
        pytest.skip("this kernel has no huge pages")
    assert any(" hg" in line for line in flags(file))


def test_small_weights_are_left_alone():
    assert not advise_huge_pages(model_of(100, 200), 300)


def test_weights_in_memory_of_their_own_are_left_alone():
    """Two constants cannot lie in a file that is smaller than one."""
    assert not advise_huge_pages(model_of(LEAST_BYTES, LEAST_BYTES), LEAST_BYTES - 1)


SMAPS = """\
7f0000000000-7f0008000000 r--p 00000000 fe:00 11    /models/a b/openvino_model.bin
Size:             131072 kB
Rss:              100000 kB
FilePmdMapped:     60000 kB
VmFlags: rd mr mw me hg
7f0008000000-7f0009000000 r--p 08000000 fe:00 11    /models/a b/openvino_model.bin
Rss:               20000 kB
FilePmdMapped:         0 kB
ShmemPmdMapped:    18000 kB
7f0009000000-7f0019000000 rw-p 00000000 00:00 0
Rss:              262144 kB
FilePmdMapped:         0 kB
7f0019000000-7f0029000000 r--p 00000000 fe:00 12    /models/b/openvino_model.bin
Rss:               60000 kB
FilePmdMapped:         0 kB
"""


def test_share_of_small_pages_is_of_all_pieces_of_the_file(tmp_path: Path):
    maps = tmp_path / "smaps"
    maps.write_text(SMAPS)
    assert small_page_share(Path("/models/a b/openvino_model.bin"), maps) == pytest.approx(1 - 78 / 120)
    for unknown in ("/models/b/openvino_model.bin", "/models/c/openvino_model.bin"):
        assert small_page_share(Path(unknown), maps) is None
    assert small_page_share(Path("/models/a b/openvino_model.bin"), tmp_path / "missing") is None


@linux
def test_share_of_small_pages_in_this_process(tmp_path: Path):
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(CACHED_BYTES + LEAST_BYTES))
    assert small_page_share(file) is None
    weights = np.memmap(file, np.uint8, "r")
    assert weights[:: mmap.PAGESIZE].max() == 0
    share = small_page_share(file)
    assert share is not None and 0 <= share <= 1
