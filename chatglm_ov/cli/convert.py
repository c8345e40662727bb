"""`chatglm-ov convert`, and what tools/gen_chatglm.py runs."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chatglm_ov.cli.options import WEIGHT_FORMATS

SUMMARY = "convert a checkpoint folder for OpenVINO"
DEFAULT_FORMATS = ("bf16", "int8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder as the model's authors publish it")
    parser.add_argument("output", type=Path, help="folder to write, new or empty")
    parser.add_argument(
        "--weight-format",
        nargs="+",
        action="extend",
        choices=WEIGHT_FORMATS,
        metavar="FORMAT",
        help=f"any of {', '.join(WEIGHT_FORMATS)} (default: {' '.join(DEFAULT_FORMATS)})",
    )
    parser.add_argument("--ops", choices=("fused", "stock"), default="fused", help="default: fused, where it is built")
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder that is not empty")
    parser.add_argument(
        "--rope-ratio-meaning",
        choices=("position", "base"),
        help="what rope_ratio does, where config.json leaves it open: divide the position or multiply the base",
    )


def run(arguments: argparse.Namespace) -> None:
    convert_with_report(
        arguments.checkpoint,
        arguments.output,
        arguments.weight_format or DEFAULT_FORMATS,
        ops=arguments.ops,
        rope_ratio_meaning=arguments.rope_ratio_meaning,
        overwrite=arguments.overwrite,
    )


def convert_with_report(
    checkpoint: Path, output: Path, weight_formats: Sequence[str], called: str | None = None, **options: Any
) -> None:
    """`chatglm_ov.convert`, with the plan told before and the sizes after it; `called` stands for `output` there."""
    from chatglm_ov.cli.tables import print_table
    from chatglm_ov.conversion import convert
    from chatglm_ov.runtime import weight_formats as formats_in
    from chatglm_ov.sizes import size

    with shown_log():
        convert(checkpoint, output, weight_formats, **options)
    rows = [(name, size(folder_bytes(output / name))) for name in formats_in(output)]
    others = sum(file.stat().st_size for file in output.iterdir() if file.is_file())
    print(f"written to {called or output}")
    print_table(("weight format", "size"), [*rows, ("configuration, tokenizer", size(others))])


def folder_bytes(folder: Path) -> int:
    """Size of all files under `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@contextmanager
def shown_log() -> Iterator[None]:
    """What the package logs, above all the plan of a conversion before it starts, goes to the standard output."""
    log, handler = logging.getLogger("chatglm_ov"), logging.StreamHandler(sys.stdout)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
