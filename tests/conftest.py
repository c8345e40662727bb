"""Fixtures that every test file may use."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest

# Threads of torch and numpy wait for each other spinning, so those of several test processes must not share a core.
# OpenVINO's are left at all cores, as users have them: operations that split their work are tested with more than one.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("chatglm_ov", deadline=None)
hypothesis.settings.load_profile("chatglm_ov")

TESTS = Path(__file__).parent
SHARED = TESTS.parent.parent / "shared"


@pytest.fixture(scope="session")
def data() -> Path:
    """Small goldens and tokenizers that come with the project."""
    return TESTS / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The full set of goldens beside the project folder; tests that need it are skipped where it is missing."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("../shared/golden is not here: only the goldens in tests/data are checked")
    return SHARED


@pytest.fixture
def import_tool(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a program of tools/ by its name."""
    monkeypatch.syspath_prepend(str(TESTS.parent / "tools"))
    return import_module


def pytest_configure() -> None:
    """A shell that starts the tests in the background has SIGINT ignored, nohup has SIGHUP ignored, and a process
    under test would inherit that. One that is caught here is the system's default there."""
    for number in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not (SHARED / "golden").is_dir():
        terminalreporter.write_line("../shared is not here: the full goldens were NOT checked", yellow=True)
