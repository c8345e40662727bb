"""What is left of the memory, in a container too."""

from __future__ import annotations

import logging
from pathlib import Path

import psutil
import pytest
from golden_sets import GOLDENS

from chatglm_ov import convert
from chatglm_ov.conversion import convert as conversion
from chatglm_ov.system.memory import available

MACHINE = 8_000_000
VERSION_1 = {
    "limit": "memory.limit_in_bytes",
    "used": "memory.usage_in_bytes",
    "files": "total_cache",
    "shm": "total_shmem",
}
VERSION_2 = {"limit": "memory.max", "used": "memory.current", "files": "file", "shm": "shmem"}


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=MACHINE))


def group(folder: Path, names: dict[str, str], limit: object, used: int, files: int = 0, shm: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names["limit"]).write_text(f"{limit}\n")
    (folder / names["used"]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names['files']} {files}\n{names['shm']} {shm}\n")


def in_groups(root: Path, lines: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)


def test_without_groups(tmp_path: Path) -> None:
    assert available(tmp_path) == MACHINE
    in_groups(tmp_path, "0::/user.slice\n")
    assert available(tmp_path) == MACHINE


def test_files_of_a_group_can_be_dropped(tmp_path: Path) -> None:
    in_groups(tmp_path, "0::/\n")
    group(tmp_path / "sys/fs/cgroup", VERSION_2, 5_000_000, 3_000_000, files=900_000, shm=100_000)
    assert available(tmp_path) == 2_800_000


def test_the_smallest_of_all_groups_around(tmp_path: Path) -> None:
    in_groups(tmp_path, "0::/outer/inner\n")
    place = tmp_path / "sys/fs/cgroup"
    group(place / "outer/inner", VERSION_2, "max", 3_000_000)
    group(place / "outer", VERSION_2, 5_000_000, 4_000_000)
    assert available(tmp_path) == 1_000_000
    group(place / "outer/inner", VERSION_2, 3_500_000, 3_600_000)
    assert available(tmp_path) == 0


@pytest.mark.parametrize("name", ["/", "/docker/0123"])
def test_version_1(tmp_path: Path, name: str) -> None:
    """In a container the name is the one outside, where nothing can be seen; the limit is at the top."""
    in_groups(tmp_path, f"12:pids:/x\n5:cpu,memory:{name}\n1:name=systemd:/\n")
    group(tmp_path / "sys/fs/cgroup/memory", VERSION_1, 4_000_000, 1_500_000, files=600_000, shm=200_000)
    assert available(tmp_path) == 2_900_000


def test_no_limit_of_version_1_is_a_large_number(tmp_path: Path) -> None:
    in_groups(tmp_path, "5:memory:/\n")
    group(tmp_path / "sys/fs/cgroup/memory", VERSION_1, 9223372036854771712, 1_500_000)
    assert available(tmp_path) == MACHINE


def test_a_conversion_that_may_be_ended_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = next(golden.checkpoint for golden in GOLDENS if golden.folder.name == "v2_tiny")
    for free, told in ((10**12, 0), (5_000_000, 1)):
        monkeypatch.setattr(conversion, "available", lambda free=free: free)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            convert(checkpoint, tmp_path / str(free), ("bf16",), ops="stock", progress=False)
        warnings = [record.getMessage() for record in caplog.records]
        assert warnings == ["5.00 MB of memory are free: the system may end the conversion"] * told
