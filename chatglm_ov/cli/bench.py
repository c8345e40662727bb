"""`chatglm-ov bench`: how fast a model is, beside what this machine could do at most.

The memory's read bandwidth and the peak rate of the arithmetic are measured in the same process, with the same
threads, between the rounds. Shares tell how near a model comes to them.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm_ov.cli.options import WEIGHT_FORMATS, check_output, model_files, number, warn_of_idle_activation_bits
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.presets import PRESETS

if TYPE_CHECKING:
    from chatglm_ov.bench.measure import Case
    from chatglm_ov.bench.models import Source
    from chatglm_ov.bench.session import Session

SUMMARY = "measure a model's speed beside the limits of this machine"
COMMA_LISTS = ("prompt_tokens", "context", "batch")


def numbers(text: str) -> list[int]:
    """A type for an argument: whole numbers from 1, with commas between them."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return list(dict.fromkeys(found))


numbers.__name__ = "list of numbers from 1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", help="converted folder, or checkpoint folder")
    parser.add_argument("--preset", choices=PRESETS, metavar="MODEL", help=f"random weights: {', '.join(PRESETS)}")
    parser.add_argument("--layers", type=number(int, 1), metavar="N", help="with --preset: so many layers only")
    parser.add_argument(
        "--weight-format", nargs="+", action="extend", choices=WEIGHT_FORMATS, metavar="FORMAT",
        help="default: what a converted folder has, else bf16 int8 int4",
    )  # fmt: skip
    parser.add_argument(
        "--group-size", type=int, choices=(128, 64, 32), help="of int4, unless the folder is converted (default: 128)"
    )
    parser.add_argument("--ops", choices=("fused", "stock"), help="default: fused, where it is built")
    parser.add_argument(
        "--activation-bits", nargs="+", action="extend", type=int, choices=(16, 8), metavar="BITS",
        help="16, 8 or both, with int8 and int4 weights (default: 16)",
    )  # fmt: skip
    parser.add_argument("--kv-cache-format", choices=("bf16", "int8"), default="bf16", help="default: bf16")
    parser.add_argument("--prompt-tokens", type=numbers, metavar="N,...", help="default: 512, or none with --context")
    parser.add_argument("--context", type=numbers, default=[], metavar="N,...", help="steps at the end of N tokens")
    parser.add_argument("--batch", type=numbers, default=[1], metavar="N,...", help="rows (default: 1)")
    parser.add_argument("--new-tokens", type=number(int, 1), default=16, metavar="N", help="timed steps (default: 16)")
    parser.add_argument("--rounds", type=number(int, 1), default=3, metavar="N", help="default: 3")
    parser.add_argument("--threads", type=number(int, 1), metavar="N", help="default: what OpenVINO takes")
    parser.add_argument("--compare", choices=("stock",), help="OpenVINO's own operations on the same weights beside it")
    parser.add_argument("--work-folder", type=Path, metavar="DIR", help="where the temporary folder is made")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and samples")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the figures: .png or .svg")


def run(arguments: argparse.Namespace) -> None:
    from chatglm_ov.bench.session import Session

    source = _source(arguments)
    _check_outputs(arguments)
    session = Session(
        source,
        _ops(arguments, source),
        _weight_formats(arguments, source),
        list(_cases(arguments)),
        activation_bits=arguments.activation_bits or (),
        kv_cache_format=arguments.kv_cache_format,
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
        threads=arguments.threads,
        compare=arguments.compare is not None,
        place=arguments.work_folder,
    )
    session.check()
    warn_of_idle_activation_bits(session.activation_bits, session.weight_formats)
    report = _measured(session, command_line(arguments))
    # Before anything is shown: whoever reads that may stop reading.
    _write(arguments, report)
    _show(report)


def _source(arguments: argparse.Namespace) -> Source:
    from chatglm_ov.weights.choices import FormatChoices

    source = _weights(arguments)
    for option in ("group_size", "work_folder"):
        value = getattr(arguments, option)
        if source.ops is not None and value is not None:
            raise ChatGLMError(f"--{option.replace('_', '-')}", "value", value, "a checkpoint or --preset with it")
    if arguments.group_size is None:
        return source
    return replace(source, choices=FormatChoices(arguments.group_size))


def _weights(arguments: argparse.Namespace) -> Source:
    from chatglm_ov.bench.models import from_folder, from_preset

    if (arguments.folder is None) == (arguments.preset is None):
        seen = "missing" if arguments.folder is None else "given with --preset"
        raise ChatGLMError("bench", "folder", seen, "a folder, or else --preset")
    if arguments.folder is None:
        return from_preset(arguments.preset, arguments.layers)
    if arguments.layers is not None:
        raise ChatGLMError("--layers", "value", arguments.layers, "--preset with it")
    return from_folder(arguments.folder)


def _check_outputs(arguments: argparse.Namespace) -> None:
    """What would fail at the end fails at the beginning."""
    taken = model_files(arguments.folder)
    check_output("json", arguments.json, taken)
    check_output("picture", arguments.picture, [*taken, arguments.json])
    if arguments.picture is not None:
        from chatglm_ov.bench.picture import check

        check(arguments.picture)


def _ops(arguments: argparse.Namespace, source: Source) -> str:
    from chatglm_ov.conversion.convert import available_ops
    from chatglm_ov.native import native

    if source.ops is not None:
        if arguments.compare:
            wanted = "a checkpoint folder or --preset: a converted folder holds one lowering"
            raise ChatGLMError("--compare", "folder", source.name, wanted)
        if arguments.ops not in (None, source.ops):
            raise ChatGLMError("--ops", "value", arguments.ops, f"{source.ops}, which {source.name} was converted with")
        if source.ops == "fused":
            # Raises where it is missing: what would run in the place of these operations is not what was asked for.
            native()
        return source.ops
    return available_ops(arguments.ops or "fused")


def _weight_formats(arguments: argparse.Namespace, source: Source) -> list[str]:
    chosen = list(dict.fromkeys(arguments.weight_format or source.weight_formats))
    missing = [] if source.ops is None else [name for name in chosen if name not in source.weight_formats]
    if missing or not chosen:
        wanted = f"one of {', '.join(source.weight_formats)}" if source.weight_formats else "a format in the folder"
        raise ChatGLMError(source.name, "weight format", missing[0] if missing else "missing", wanted)
    return chosen


def _cases(arguments: argparse.Namespace) -> Iterator[Case]:
    from chatglm_ov.bench.measure import Case

    prompts = arguments.prompt_tokens or ([] if arguments.context else [512])
    for tokens, filled in [*((n, False) for n in prompts), *((n, True) for n in arguments.context)]:
        yield from (Case(tokens, batch, filled) for batch in arguments.batch)


def command_line(arguments: argparse.Namespace) -> str:
    """The command with every option, defaults too."""
    words = ["chatglm-ov", "bench"]
    for name, value in vars(arguments).items():
        values = value if isinstance(value, list) else [value]
        if name in ("run", "debug") or value is None or not values:
            continue
        option = [] if name == "folder" else [f"--{name.replace('_', '-')}"]
        words += [*option, *([",".join(map(str, values))] if name in COMMA_LISTS else map(str, values))]
    return shlex.join(words)


def _measured(session: Session, command: str) -> dict[str, Any]:
    """Everything that the JSON file will hold."""
    from chatglm_ov import __version__
    from chatglm_ov.cli.machine import machine
    from chatglm_ov.native import native, unavailable

    found = machine()
    threads = session.threads or found["default"]["threads"]
    config = session.source.config
    return {
        "command": command,
        "version": __version__,
        "machine": found,
        "isa": None if unavailable() else native().isa(),
        "threads": threads,
        "model": {
            "name": session.source.name,
            "architecture": config.architecture,
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "random_weights": session.source.folder is None,
        },
        "rounds": session.rounds,
        "new_tokens": session.new_tokens,
        "weight_formats": list(session.run(threads)),
    }


def _show(report: dict[str, Any]) -> None:
    from chatglm_ov.bench.tables import remarks, tables
    from chatglm_ov.cli.tables import print_table

    isa = f"kernels for {report['isa']}" if report["isa"] else "no native library: the limits are not known"
    print(f"{report['model']['name']}: {report['threads']} threads, {isa}; medians of {report['rounds']} rounds")
    for title, header, rows in tables(report):
        print(f"\n{title}")
        print_table(header, rows)
    for remark in remarks(report):
        print(remark)


def _write(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    if arguments.picture is not None:
        from chatglm_ov.bench.picture import draw

        draw(report, arguments.picture)
