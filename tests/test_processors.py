"""Threads in a container that may use the time of some processors only."""

# ruff: noqa: F811 (a fixture is imported)

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from command_line import Run, run  # noqa: F401
from golden_cases import V2

from chatglm_ov import convert
from chatglm_ov.calibration import run as calibration_run
from chatglm_ov.calibration.needs import calibrated_weights
from chatglm_ov.checkpoint.reader import Checkpoint
from chatglm_ov.config import load_config
from chatglm_ov.runtime.loading import load_model
from chatglm_ov.system import processors
from chatglm_ov.system.processors import THREADS, processor_quota, thread_limit
from chatglm_ov.weights.choices import DEFAULT_CHOICES

CORE = ov.Core()


def in_groups(root: Path, lines: str) -> None:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(lines)


def version_2(folder: Path, limit: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.max").write_text(f"{limit}\n")


def version_1(folder: Path, quota: int, period: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu.cfs_period_us").write_text(f"{period}\n")


def test_without_groups(tmp_path: Path) -> None:
    assert processor_quota(tmp_path) is None
    in_groups(tmp_path, "0::/\n")
    assert processor_quota(tmp_path) is None
    assert thread_limit(CORE, tmp_path) == {}


@pytest.mark.parametrize(("limit", "quota"), [("max 100000", None), ("150000 100000", 1.5), ("400000 50000", 8.0)])
def test_version_2(limit: str, quota: float | None, tmp_path: Path) -> None:
    in_groups(tmp_path, "0::/\n")
    version_2(tmp_path / "sys/fs/cgroup", limit)
    assert processor_quota(tmp_path) == quota


@pytest.mark.parametrize("text", ["", "max", "100000", "many 100000", "100000 0", "1 2 3"])
def test_files_that_tell_nothing(text: str, tmp_path: Path) -> None:
    in_groups(tmp_path, "0::/\nno group\n")
    version_2(tmp_path / "sys/fs/cgroup", text)
    assert processor_quota(tmp_path) is None


@pytest.mark.parametrize("name", ["/", "/docker/0123"])
def test_version_1(name: str, tmp_path: Path) -> None:
    """In a container the name is the one outside, where nothing can be seen; the limit is at the top."""
    in_groups(tmp_path, f"12:pids:/x\n5:cpu,cpuacct:{name}\n1:name=systemd:/\n0::/\n")
    version_1(tmp_path / "sys/fs/cgroup/cpu", -1, 100_000)
    assert processor_quota(tmp_path) is None
    version_1(tmp_path / "sys/fs/cgroup/cpu", 250_000, 100_000)
    assert processor_quota(tmp_path) == 2.5


def test_the_smallest_of_all_groups_around(tmp_path: Path) -> None:
    in_groups(tmp_path, "0::/pod/container\n")
    place = tmp_path / "sys/fs/cgroup"
    version_2(place / "pod/container", "max 100000")
    version_2(place / "pod", "300000 100000")
    assert processor_quota(tmp_path) == 3
    version_2(place / "pod/container", "50000 100000")
    assert processor_quota(tmp_path) == 0.5


@pytest.mark.parametrize(
    ("quota", "threads"), [(0.1, 1), (1.0, 1), (1.49, 1), (1.5, 2), (2.4, 2), (7.6, 8), (8, 8), (63.4, 63), (64, None)]
)
def test_threads_of_a_large_machine(
    quota: float, threads: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processors, "_default_threads", lambda core: 64)
    in_groups(tmp_path, "0::/\n")
    version_2(tmp_path / "sys/fs/cgroup", f"{round(quota * 100_000)} 100000")
    limited = {THREADS: threads, "ENABLE_CPU_PINNING": False}
    assert thread_limit(CORE, tmp_path) == ({} if threads is None else limited)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(V2.checkpoint, tmp_path_factory.mktemp("converted") / "v2", ("int8",), progress=False)


def threads_of(folder: Path, **options: object) -> int:
    return load_model(folder, **options).compiled.get_property(THREADS)


def test_a_model_keeps_within_the_quota(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if threads_of(folder) < 2:
        pytest.skip("one processor has one thread")
    monkeypatch.setattr(processors, "processor_quota", lambda root: 1.2)
    assert threads_of(folder) == 1
    assert not load_model(folder).compiled.get_property("ENABLE_CPU_PINNING")
    # Whoever names a number wants that one.
    assert threads_of(folder, properties={THREADS: 2}) == 2


def test_a_calibration_keeps_within_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, choose = [], calibration_run._choose
    monkeypatch.setattr(processors, "processor_quota", lambda root: 1.0)
    monkeypatch.setattr(
        calibration_run, "_choose", lambda *arguments: seen.append(torch.get_num_threads()) or choose(*arguments)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        config = load_config(V2.checkpoint)
        formats = calibrated_weights(config, DEFAULT_CHOICES, ("int4",), ("gptq",))
        with Checkpoint.open(V2.checkpoint) as weights:
            calibration_run.calibrate(
                config, weights, formats, [np.arange(5, 40)], ("gptq",), tmp_path, lambda name: None
            )
        assert torch.get_num_threads() == 2 and set(seen) == {1}
    finally:
        torch.set_num_threads(before)


def test_the_quota_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (" with the time of " in run("info").out) == (processor_quota() is not None)
    monkeypatch.setattr("chatglm_ov.cli.machine.processor_quota", lambda: 1.25)
    monkeypatch.setattr(processors, "processor_quota", lambda root: 1.25)
    told = run("info").out
    assert " usable processors with the time of 1.25" in told
    assert "f32 arithmetic, 1 threads" in told
