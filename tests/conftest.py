"""Fixtures that every test file may use."""

from __future__ import annotations

from pathlib import Path

import pytest

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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not (SHARED / "golden").is_dir():
        terminalreporter.write_line("../shared is not here: the full goldens were NOT checked", yellow=True)
