"""What every program of the package shares: one-line errors, exit codes, signals, output on any terminal.

Exit codes: 0 done, 1 a fault that is not the user's, 2 a user error, 130 Ctrl-C, 128 + n ended by signal n.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from chatglm_ov.errors import ChatGLMError

FAULT, USER_ERROR, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141

Command = Callable[[argparse.Namespace], "int | None"]


class UsageError(Exception):
    """Arguments that the parser does not take."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line; `--debug` is understood before and after a sub-command."""

    def __init__(self, debug_default: Any = argparse.SUPPRESS, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)
        self.add_argument("--debug", action="store_true", default=debug_default, help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        # An option that takes several values has taken the folder that stands behind it.
        places = [action.dest.upper() for action in self._actions if not action.option_strings]
        is_taken = any(action.nargs == "+" for action in self._actions) and "required" in message
        order = f"; options stand behind {' '.join(places)}" if is_taken else ""
        raise UsageError(f"{message} (see {self.prog} --help{order})")


def execute(parser: Parser, argv: Sequence[str] | None, command: Command) -> int:
    """Parse `argv` (None: the process's own) and run `command` on the result; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in arguments
    with _ending_signals() as interrupts:
        try:
            _open_missing_streams()
            _accept_any_text()
            code = command(parser.parse_args(arguments)) or 0
            sys.stdout.flush()
            return code
        except SystemExit as end:  # --help, --version, a signal
            return end.code if isinstance(end.code, int) else 0
        except KeyboardInterrupt:
            return _report(parser.prog, "interrupted", INTERRUPTED, debug)
        except BrokenPipeError:
            return _hang_up()
        except (ChatGLMError, UsageError) as error:
            return _report(parser.prog, str(error), USER_ERROR, debug)
        except OSError as error:
            return _report(parser.prog, _os_error(error), USER_ERROR, debug)
        except Exception as error:
            # An import that Ctrl-C ends may come out so.
            if interrupts and isinstance(error, (ImportError, RecursionError)):
                return _report(parser.prog, "interrupted", INTERRUPTED, debug)
            message = f"{type(error).__name__}: {error} (--debug shows where)"
            return _report(parser.prog, message, FAULT, debug)


def _report(program: str, message: str, code: int, debug: bool) -> int:
    try:
        if debug:
            traceback.print_exc()
        print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        return _hang_up()
    except OSError:  # a log on a full disk: the exit code says it
        pass
    return code


def _os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror or error}"


def _hang_up() -> int:
    """The reader of our output is gone: nothing more is written, not even by the interpreter at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(null, stream.fileno())
    os.close(null)
    return BROKEN_PIPE


def _open_missing_streams() -> None:
    """A program that was started with closed streams reads nothing, and writes to nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


def _accept_any_text() -> None:
    """A character that the terminal's encoding lacks is replaced instead of ending the program; lines that come in may
    end as on Windows."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    with suppress(AttributeError, OSError, ValueError):
        sys.stdin.reconfigure(newline=None)  # type: ignore[union-attr]


@contextmanager
def _ending_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGHUP unwind the program, so that what it was writing is removed. Gives a list in which each Ctrl-C
    is noted."""
    interrupts: list[int] = []

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    def interrupt(number: int, frame: object) -> NoReturn:
        interrupts.append(number)
        raise KeyboardInterrupt

    handlers: dict[int, Callable[[int, object], NoReturn]] = {
        getattr(signal, name): end for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
    }
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = interrupt
    before: dict[int, Any] = {}
    for number, handler in handlers.items():
        with suppress(ValueError):  # only the main thread may; elsewhere signals stay as they are
            before[number] = signal.signal(number, handler)
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
