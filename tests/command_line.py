"""Programs in the tests: a small checkpoint with a tokenizer, and runs inside and outside this process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from chatglm_ov.cli.main import main

DATA = Path(__file__).parent / "data"
TOOLS = Path(__file__).parent.parent / "tools"
PROGRAM = [str(Path(sys.executable).with_name("chatglm-ov"))]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GLM-4 checkpoint of 2 layers in 3 shards, with its tokenizer. Not to be changed: see `copy_of`."""
    folder = tmp_path_factory.mktemp("checkpoint") / "glm4"
    shutil.copytree(DATA / "golden" / "glm4" / "glm4_chat" / "checkpoint", folder, copy_function=shutil.copyfile)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(DATA / "tokenizer_glm4" / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def converted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`checkpoint` in f32, bf16 and int8."""
    folder = tmp_path_factory.mktemp("converted") / "glm4-ov"
    assert main(["convert", str(checkpoint), str(folder), "--weight-format", "f32", "bf16", "int8"]) == 0
    return folder


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a user error is."""
        assert self.code == 2, self
        lines = self.err.splitlines()
        assert len(lines) == 1 and ": error: " in lines[0], self.err
        return lines[0].partition(": error: ")[2]


class Run:
    """Runs `chatglm-ov` inside this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str]):
        self._capfd = capfd

    def __call__(self, *arguments: object) -> Outcome:
        self._capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *self._capfd.readouterr())


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(capfd)


def spawn(*command: object, **options: object) -> subprocess.Popen[str]:
    """A program of its own, with pipes and UTF-8."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", **options.pop("env", {})}
    words = [str(word) for word in command]
    return subprocess.Popen(words, text=True, encoding="utf-8", env=environment, **{**pipes, **options})


def finish(process: subprocess.Popen[str], given: str | None = None, timeout: float = 120) -> Outcome:
    out, err = process.communicate(given, timeout=timeout)
    return Outcome(process.returncode, out, err)


def reader_went_away(*_: object) -> None:
    """In place of what prints: its reader has closed the pipe."""
    raise BrokenPipeError


def make_checkpoint(folder: Path, fields: dict[str, object]) -> None:
    """A checkpoint with random weights: what tools/make_checkpoint.py writes."""
    path = sys.path.copy()
    sys.path.insert(0, str(TOOLS))
    try:
        from make_checkpoint import make_checkpoint as make
    finally:
        sys.path[:] = path
    make(folder, fields)


def copy_of(folder: Path, target: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(folder, target))


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
