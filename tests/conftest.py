"""Fixtures that every test file may use."""

from __future__ import annotations

import signal
from pathlib import Path

import hypothesis
import pytest

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


def pytest_configure() -> None:
    """A shell that starts the tests in the background has SIGINT ignored, nohup has SIGHUP ignored, and a process
    under test would inherit that. One that is caught here is the system's default there."""
    for number in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not (SHARED / "golden").is_dir():
        terminalreporter.write_line("../shared is not here: the full goldens were NOT checked", yellow=True)
