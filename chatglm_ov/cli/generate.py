"""`chatglm-ov generate`: answers to prompts on the command line.

The answers go to the standard output, what they cost to the standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

from chatglm_ov.cli.options import (
    add_generation_options,
    add_model_options,
    generation_options,
    model_options,
    number,
    prompt_text,
)
from chatglm_ov.errors import ChatGLMError

SUMMARY = "answer prompts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument(
        "--prompt", nargs="+", action="extend", type=prompt_text, default=[], metavar="TEXT",
        help="one or more; - is what comes in on the standard input",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-file", nargs="+", action="extend", type=Path, default=[], metavar="FILE", help="a prompt each"
    )
    parser.add_argument("--system", metavar="TEXT", help="what the model is told about its task (ChatGLM3 and later)")
    parser.add_argument("--raw", action="store_true", help="continue the prompt itself: no chat format around it")
    add_generation_options(parser)
    parser.add_argument("--num-beams", type=number(int, 1), default=1, metavar="N", help="more than 1: not streamed")
    parser.add_argument("--no-stream", action="store_true", help="print an answer when it is complete")


def run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    options = generation_options(arguments) | {"num_beams": arguments.num_beams}
    prompts = list(_prompts(arguments))

    from chatglm_ov.cli.answer import PromptBar, ask, assistant_options, beginning, complete, open_model, running
    from chatglm_ov.cli.printing import TextPrinter

    settings = model_options(arguments)
    model, tokenizer = open_model(arguments.folder, **settings)
    if sys.stderr.isatty():
        print(f"[{running(model)}]", file=sys.stderr, flush=True)
    options |= {"prompt_progress": PromptBar(), **assistant_options(arguments.assistant, settings["properties"])}
    if not arguments.raw:
        options["history"] = beginning(tokenizer, arguments.system)
    answer_to = complete if arguments.raw else ask
    for prompt in prompts:
        printer = TextPrinter()
        show = None if arguments.no_stream or arguments.num_beams > 1 else printer.show
        answer = answer_to(model, tokenizer, prompt, show, **options)
        printer.finish(answer.text)
        print(f"[{answer.figures}]", file=sys.stderr, flush=True)
        if answer.cut and arguments.num_beams == 1:
            print(f"[{answer.cut}]", file=sys.stderr, flush=True)


def _check(arguments: argparse.Namespace) -> None:
    """Raises ChatGLMError for options that exclude each other."""
    if arguments.num_beams > 1 and arguments.do_sample:
        raise ChatGLMError("--num-beams", "value", arguments.num_beams, "1 with --do-sample")
    if arguments.num_beams > 1 and (arguments.prompt_lookup is not None or arguments.assistant is not None):
        raise ChatGLMError("--num-beams", "value", arguments.num_beams, "1 with --prompt-lookup and --assistant")
    if arguments.raw and arguments.system is not None:
        raise ChatGLMError("--system", "value", "given", "none with --raw: it is a part of the chat format")


def _prompts(arguments: argparse.Namespace) -> Iterator[str]:
    """The prompts of the command line, then those of files. The end of the last line is no part of a prompt."""
    if not arguments.prompt and not arguments.prompt_file:
        raise ChatGLMError("generate", "prompt", "missing", "--prompt TEXT or --prompt-file FILE")
    given = getattr(sys.stdin, "buffer", sys.stdin)
    for text in arguments.prompt:
        yield text if text != "-" else _read(given, sys.stdin.encoding, "standard input")
    for file in arguments.prompt_file:
        with file.open("rb") as stream:
            yield _read(stream, "utf-8", file)


def _read(stream: Any, encoding: str | None, where: Path | str) -> str:
    """All of a prompt: bytes, or text where a stream has no bytes. Raises ChatGLMError for what is no text."""
    data = stream.read()
    if isinstance(data, bytes):
        encoding = "utf-8-sig" if (encoding or "utf-8").lower().replace("-", "") == "utf8" else encoding
        try:
            data = TextIOWrapper(BytesIO(data), encoding=encoding).read()
        except UnicodeDecodeError as error:
            name = "UTF-8" if encoding == "utf-8-sig" else encoding
            raise ChatGLMError(where, "encoding", f"not {name} ({error.reason})", f"text in {name}") from error
    return prompt_text(data.removesuffix("\n"), where)
