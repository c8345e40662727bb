"""What all programs share: errors, exit codes, the end of their output."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from command_line import PROGRAM, Outcome, Run, finish, run, spawn  # noqa: F401

from chatglm_ov import ChatGLMError, __version__
from chatglm_ov.cli.main import COMMANDS, main
from chatglm_ov.cli.program import Parser, execute

Program = Callable[..., Outcome]


@pytest.fixture
def program(capfd: pytest.CaptureFixture[str]) -> Program:
    """Function from what a program does, and its arguments, to how it ends."""

    def end(action: Callable[[], object], *arguments: str) -> Outcome:
        code = execute(Parser(prog="tool", debug_default=False), arguments, lambda parsed: action())
        return Outcome(code, *capfd.readouterr())

    return end


def fail(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def test_done(program: Program) -> None:
    assert program(lambda: print("fine")) == Outcome(0, "fine\n", "")
    assert program(lambda: 1).code == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            ChatGLMError("config.json", "num_layers", 0, "1 or more"),
            2,
            "config.json: num_layers is 0, expected 1 or more",
        ),
        (FileNotFoundError(2, "No such file or directory", "x.bin"), 2, "x.bin: No such file or directory"),
        (OSError("no space"), 2, "no space"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("first line\n  second line"), 1, "RuntimeError: first line second line (--debug shows where)"),
    ],
)
def test_errors_are_one_line_and_a_traceback_only_for_debug(
    error: BaseException, code: int, line: str, program: Program
) -> None:
    assert program(fail(error)) == Outcome(code, "", f"tool: error: {line}\n")
    told = program(fail(error), "--debug")
    assert told.code == code
    assert told.err.startswith("Traceback (most recent call last):")
    assert told.err.endswith(f"tool: error: {line}\n")


def test_debug_before_and_after_the_command(tmp_path: Path, run: Run) -> None:
    for arguments in (["--debug", "info", tmp_path], ["info", "--debug", tmp_path], ["info", tmp_path, "--debug"]):
        told = run(*arguments)
        assert told.code == 2 and "Traceback" in told.err and "config.json is missing" in told.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["sing"], "invalid choice: 'sing'"),
        (["info", "a", "b"], "unrecognized arguments: b"),
        (["convert", "a"], "the following arguments are required: output"),
    ],
)
def test_usage(arguments: list[str], told: str, run: Run) -> None:
    assert told in run(*arguments).error


def test_help_and_version(run: Run) -> None:
    assert run("--version") == Outcome(0, f"chatglm-ov {__version__}\n", "")
    for command in COMMANDS:
        assert command in run("--help").out
        assert run(command, "--help").out.startswith(f"usage: chatglm-ov {command}")


def test_the_package_is_the_command_too() -> None:
    done = finish(spawn(sys.executable, "-m", "chatglm_ov", "--version"))
    assert done == Outcome(0, f"chatglm-ov {__version__}\n", "")
    assert finish(spawn(sys.executable, "-m", "chatglm_ov", "info", "none")).code == 2


def test_help_does_not_load_the_libraries() -> None:
    code = (
        "import sys; from chatglm_ov.cli.main import main; main(['--help']); "
        "sys.exit(bool({'torch', 'transformers', 'openvino', 'numpy'} & set(sys.modules)))"
    )
    assert finish(spawn(sys.executable, "-c", code)).code == 0


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_fault(closed: str) -> None:
    done = subprocess.run(f"{PROGRAM[0]} info --json {closed}", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_logged_to_a_reader_that_went_away_is_no_error() -> None:
    """The plan of a conversion, by a handler of `logging`, which prints a traceback of its own otherwise."""
    script = (
        "import logging, os, sys\n"
        "from chatglm_ov.cli.convert import shown_log\n"
        "from chatglm_ov.cli.program import Parser, execute\n"
        "def command(arguments):\n"
        "    os.close(1)\n"
        "    with shown_log():\n"
        "        logging.getLogger('chatglm_ov').info('x')\n"
        "raise SystemExit(execute(Parser(prog='p'), [], command))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "p: error: Bad file descriptor\n")


def test_a_reader_that_went_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = finish(spawn(*PROGRAM, "info", stdout=writer))
    os.close(writer)
    assert (done.code, done.err) == (141, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_unwind_and_are_put_back(number: int, code: int, program: Program) -> None:
    before, unwound = signal.getsignal(number), []

    def action() -> None:
        try:
            signal.raise_signal(number)
        finally:
            unwound.append(True)

    assert program(action) == Outcome(code, "", "")
    assert unwound == [True]
    assert signal.getsignal(number) == before


def test_runs_outside_the_main_thread(capfd: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["--version"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_any_text_can_be_printed_in_any_encoding() -> None:
    code = (
        "import sys; from chatglm_ov.cli.program import Parser, execute; "
        "sys.exit(execute(Parser(prog='tool', debug_default=False), [], lambda parsed: print('a\\u597d\\udcff')))"
    )
    for encoding, shown in (("ascii", b"a??"), ("gbk", "a好?".encode("gbk")), ("utf-8", "a好?".encode())):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
        assert done.stdout.strip() == shown


def test_namespace_of_a_command_reaches_it(program: Program) -> None:
    seen: list[argparse.Namespace] = []
    parser = Parser(prog="tool", debug_default=False)
    parser.add_argument("--size", type=int)
    assert execute(parser, ["--size", "3"], seen.append) == 0
    assert seen[0].size == 3


def test_interrupts_that_come_out_as_other_errors(program: Program) -> None:
    """As imports make of them."""
    before = signal.getsignal(signal.SIGINT)

    def action() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    assert program(action) == Outcome(130, "", "tool: error: interrupted\n")
    assert program(fail(ImportError("x"))).code == 1

    def handled() -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise RuntimeError("a fault")

    assert program(handled).code == 1
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
def test_a_log_on_a_full_disk() -> None:
    with Path("/dev/full").open("w") as full:
        assert subprocess.run([*PROGRAM, "info", "nowhere"], stderr=full, check=False).returncode == 2
