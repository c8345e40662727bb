"""`chatglm-ov convert`: from a checkpoint folder to a converted folder. tools/gen_chatglm.py is the same command."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm_ov.cli.options import WEIGHT_FORMATS, number
from chatglm_ov.errors import ChatGLMError

if TYPE_CHECKING:
    from chatglm_ov.calibration.text import Calibration
    from chatglm_ov.weights.choices import FormatChoices

SUMMARY = "convert a checkpoint folder for OpenVINO"
DEFAULT_FORMATS = ("bf16", "int8")

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder as the model's authors publish it")
    parser.add_argument("output", type=Path, help="folder to write: new or empty, unless --overwrite or --add")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a converted folder, or write beside what is in another"
    )
    parser.add_argument("--add", action="store_true", help="write further formats into a converted folder of the model")
    parser.add_argument("--ops", choices=("fused", "stock"), default="fused", help="default: fused, where it is built")
    parser.add_argument(
        "--p-tuning", type=Path, metavar="FOLDER", help="with the trained prefix encoder of a P-Tuning v2 (pre_seq_len)"
    )
    parser.add_argument(
        "--lora", type=Path, metavar="FOLDER", help="adapter_config.json and weights as PEFT saves them, to be merged"
    )
    _add_formats(parser.add_argument_group("weight formats"))
    _add_calibration(parser.add_argument_group("calibration"))
    _add_positions(parser.add_argument_group("positions"))


def _add_formats(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--weight-format",
        nargs="+",
        action="extend",
        choices=WEIGHT_FORMATS,
        metavar="FORMAT",
        help=f"any of {', '.join(WEIGHT_FORMATS)} (default: {' '.join(DEFAULT_FORMATS)}; with a calibration int4)",
    )
    group.add_argument(
        "--group-size", type=int, choices=(128, 64, 32), help="columns that share a scale in int4 (default: 128)"
    )
    group.add_argument(
        "--lm-head-format", choices=WEIGHT_FORMATS, help="default: as --weight-format, int8 in an int4 model"
    )
    group.add_argument("--embedding-format", choices=WEIGHT_FORMATS[:3], help="default: likewise")
    group.add_argument(
        "--layer-formats", type=Path, metavar="FILE", help="JSON object of formats by patterns of weight names"
    )


def _add_calibration(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--awq", action="store_true", help="int4: scale columns by their activations, clip ranges")
    group.add_argument("--gptq", action="store_true", help="int4 and int8: clip ranges, compensate rounding errors")
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help=".txt or .jsonl, or either with .xz, for --awq and --gptq, both if neither is given (default: poems)",
    )
    group.add_argument("--calibration-field", metavar="NAME", help="of a .jsonl object: its text (default: text)")
    group.add_argument(
        "--calibration-prompt", metavar="TEXT", help="asked before each object, as `eval --prompt` does it"
    )
    group.add_argument("--calibration-tokens", type=number(int, 1), metavar="N", help="default: 16384")


def _add_positions(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--rope-ratio-meaning",
        choices=("position", "base"),
        help="what rope_ratio does, where config.json leaves it open: divide the position or multiply the base",
    )
    group.add_argument(
        "--rope-theta",
        type=number(float, 1, above=True),
        metavar="BASE",
        help="rotary base, where config.json is wrong",
    )
    group.add_argument(
        "--rope-scaling",
        type=_rope_scaling,
        metavar="TYPE:FACTOR",
        help="longer contexts: linear, ntk or yarn, and how many times as long, such as yarn:4",
    )


def run(arguments: argparse.Namespace) -> None:
    from chatglm_ov.conversion.checks import check_apart

    calibration, formats = _calibration(arguments), arguments.weight_format
    if formats is None:
        formats = default_formats(arguments.checkpoint) if calibration is None else ("int4",)
    elif arguments.awq and "int4" not in formats:
        raise ChatGLMError("--awq", "weight formats", ", ".join(formats), "int4 among them")
    if arguments.layer_formats is not None:
        check_apart(arguments.output, arguments.layer_formats, "file of --layer-formats")
    convert_with_report(
        arguments.checkpoint,
        arguments.output,
        formats,
        ops=arguments.ops,
        lora=arguments.lora,
        p_tuning=arguments.p_tuning,
        choices=_choices(arguments, formats),
        calibration=calibration,
        rope_ratio_meaning=arguments.rope_ratio_meaning,
        rope_theta=arguments.rope_theta,
        rope_scaling=arguments.rope_scaling,
        overwrite=arguments.overwrite,
        add=arguments.add,
    )


def _rope_scaling(text: str) -> dict[str, Any]:
    """A type for an argument: the fields of config.json for `yarn:4`."""
    kind, _, factor = text.partition(":")
    return {"rope_type": kind, "factor": float(factor)}


_rope_scaling.__name__ = "TYPE:FACTOR"


def default_formats(checkpoint: Path) -> Sequence[str]:
    """That of a checkpoint which is quantized already, else DEFAULT_FORMATS."""
    from chatglm_ov.checkpoint.prequantized import quantized_format
    from chatglm_ov.config import read_config_json

    own = quantized_format(checkpoint, read_config_json(checkpoint))
    return DEFAULT_FORMATS if own is None else (own,)


def _choices(arguments: argparse.Namespace, formats: Sequence[str]) -> FormatChoices:
    from chatglm_ov.weight_formats import GROUP_SIZE
    from chatglm_ov.weights.choices import FormatChoices, read_layer_formats

    layers = {} if arguments.layer_formats is None else read_layer_formats(arguments.layer_formats)
    used = {*formats, arguments.lm_head_format, *layers.values()}
    if arguments.group_size is not None and "int4" not in used:
        raise ChatGLMError("--group-size", "weight formats", ", ".join(formats), "int4 among them")
    group_size = arguments.group_size or GROUP_SIZE
    return FormatChoices(group_size, arguments.lm_head_format, arguments.embedding_format, layers)


def _calibration(arguments: argparse.Namespace) -> Calibration | None:
    """None where no option asks for one."""
    methods = tuple(name for name in ("awq", "gptq") if getattr(arguments, name))
    given = {name: getattr(arguments, f"calibration_{name}") for name in ("field", "prompt", "tokens")}
    given = {name: value for name, value in given.items() if value is not None}
    if not methods and arguments.calibration is None:
        for name in given:
            raise ChatGLMError(f"--calibration-{name}", "value", repr(given[name]), "--calibration, --awq or --gptq")
        return None
    from chatglm_ov.calibration.text import METHODS, Calibration
    from chatglm_ov.documents import Source

    options: dict[str, Any] = {"methods": methods or METHODS}
    if "tokens" in given:
        options["tokens"] = given.pop("tokens")
    if arguments.calibration is not None:
        options["source"] = Source(arguments.calibration, **given)
    elif given:
        raise ChatGLMError(f"--calibration-{next(iter(given))}", "value", "given", "--calibration FILE with it")
    return Calibration(**options)


def convert_with_report(
    checkpoint: Path, output: Path, weight_formats: Sequence[str], called: str | None = None, **options: Any
) -> None:
    """`chatglm_ov.convert`, with the plan told before and the sizes after it; `called` stands for `output` there."""
    from chatglm_ov.cli.tables import print_table
    from chatglm_ov.conversion.convert import convert
    from chatglm_ov.runtime.loading import weight_formats as formats_in
    from chatglm_ov.system.sizes import size
    from chatglm_ov.tokenizer.files import FAST_FILE, MODEL_FILE, V1_FILE

    called = called or str(output)
    tokenizers = (V1_FILE, MODEL_FILE, FAST_FILE)
    with shown_log():
        convert(checkpoint, output, weight_formats, **options)
        output = output.resolve()
        if not any((output / name).is_file() for name in tokenizers):
            log.warning("no tokenizer in %s (%s): generate, chat and eval need one", checkpoint, ", ".join(tokenizers))
    rows = [(name, size(folder_bytes(output / name))) for name in formats_in(output)]
    others = sum(file.stat().st_size for file in output.iterdir() if file.is_file())
    print(f"written to {called}")
    print_table(("weight format", "size"), [*rows, ("configuration, tokenizer", size(others))])


def folder_bytes(folder: Path) -> int:
    """Size of all files under `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


class _Printer(logging.StreamHandler):
    """What cannot be written is an error of the program, as with print()."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


@contextmanager
def shown_log() -> Iterator[None]:
    """What the package logs, above all the plan of a conversion before it starts, goes to the standard output."""
    log, handler = logging.getLogger("chatglm_ov"), _Printer(sys.stdout)
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    # A library may give the root logger a handler of its own.
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
