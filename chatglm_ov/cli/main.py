"""The command `chatglm-ov`: one module of this package a sub-command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

from chatglm_ov import __version__
from chatglm_ov.cli.program import Parser, execute

COMMANDS = ("convert", "info", "generate", "chat", "demo", "bench", "eval")


def build_parser() -> Parser:
    """The parser of the whole command line; the chosen sub-command's function is `run` of the result."""
    parser = Parser(
        prog="chatglm-ov", description="Models of the ChatGLM family on CPUs with OpenVINO.", debug_default=False
    )
    parser.add_argument("--version", action="version", version=f"chatglm-ov {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for name in COMMANDS:
        module = import_module(f"chatglm_ov.cli.{name}")
        command = commands.add_parser(name, help=module.SUMMARY, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `chatglm-ov` with these arguments (None: the process's own); returns the exit code."""

    def command(arguments: argparse.Namespace) -> int | None:
        return arguments.run(arguments)

    return execute(build_parser(), argv, command)
