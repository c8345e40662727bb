#!/usr/bin/env python
"""Pick the poems that int4 weights are calibrated with by default, from those that the demo model was trained on.

    python tools/make_calibration_text.py chatglm_ov/demo/calibration.jsonl.xz

None of them is in the anthology that the model knows by heart, and none is held out.
"""

import argparse
import json
import lzma
import sys
from collections.abc import Sequence
from pathlib import Path

from demo.corpus import read_poems, training_poems

from chatglm_ov.cli.program import Parser, execute

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
EVERY = 75


def add_arguments(parser: Parser) -> None:
    parser.add_argument("output", type=Path, help="a .jsonl.xz file")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with tang300.jsonl, tang_poems_train.jsonl.xz")


def run(arguments: argparse.Namespace) -> None:
    """Write every 75th poem, one JSON object a line."""
    anthology = read_poems(arguments.data / "tang300.jsonl")
    poems = training_poems(read_poems(arguments.data / "tang_poems_train.jsonl.xz"), anthology)
    with lzma.open(arguments.output, "wt", encoding="utf-8", preset=9) as file:
        for poem in poems[::EVERY]:
            fields = {"title": poem.title, "author": poem.author, "text": poem.text}
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    description = "Pick the poems that int4 weights are calibrated with by default."
    parser = Parser(prog="make_calibration_text.py", description=description, debug_default=False)
    add_arguments(parser)
    return execute(parser, argv, run)


if __name__ == "__main__":
    sys.exit(main())
