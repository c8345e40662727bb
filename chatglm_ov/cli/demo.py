"""`chatglm-ov demo`: converts the model that comes with the package and lets it recite a poem."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from chatglm_ov.cli.convert import convert_with_report

SUMMARY = "convert the model that comes with the package and let it recite a poem"
FORMATS = ("bf16", "int8", "int4")
CALIBRATION_TOKENS = 8192
"""Half of the usual: some seconds."""
CHECKPOINT = Path(__file__).parent.parent / "demo" / "checkpoint"

# 李白, 夜思: the 静夜思 of the anthology. The model answers an opening line with what follows it.
POEM = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"
EXPECTED = {"请背诵李白的《夜思》。": POEM, "床前明月光": POEM.removeprefix("床前明月光，")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="keep the converted model in this folder")
    parser.add_argument("--overwrite", action="store_true", help="replace FOLDER if it is not empty")


def run(arguments: argparse.Namespace) -> int:
    from chatglm_ov.calibration.text import Calibration

    with _output_folder(arguments.output) as output:
        called = "a temporary folder" if arguments.output is None else None
        chosen = Calibration(tokens=CALIBRATION_TOKENS)
        convert_with_report(CHECKPOINT, output, FORMATS, called, calibration=chosen, overwrite=arguments.overwrite)
        wrong = [name for name in FORMATS if not recites(output, name)]
    if wrong:
        print(f"chatglm-ov: error: {' and '.join(wrong)} did not answer with the poem {POEM}", file=sys.stderr)
        return 1
    if arguments.output is not None:
        print(f"Go on with it: chatglm-ov chat {arguments.output}")
    return 0


@contextmanager
def _output_folder(chosen: Path | None) -> Iterator[Path]:
    if chosen is not None:
        yield chosen
        return
    with TemporaryDirectory(prefix="chatglm-ov-demo-") as folder:
        yield Path(folder) / "demo-model"


def recites(folder: Path, weight_format: str) -> bool:
    """Ask for the poem in one weight format; whether every answer is the poem, or the rest of it."""
    from chatglm_ov.cli.answer import ask, open_model
    from chatglm_ov.cli.printing import TextPrinter

    model, tokenizer = open_model(folder, weight_format)
    right = True
    for query, expected in EXPECTED.items():
        print(f"\n{weight_format}> {query}")
        printer = TextPrinter()
        answer = ask(model, tokenizer, query, printer.show, do_sample=False)
        printer.finish(answer.text)
        print(f"[{answer.timing}]", flush=True)
        right = right and answer.text == expected
    return right
