"""`chatglm-ov generate`: answers to prompts on the command line.

The answers go to the standard output, what they cost to the standard error.
"""

from __future__ import annotations

import argparse
import sys

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
        "--prompt", nargs="+", action="extend", type=prompt_text, required=True, metavar="TEXT", help="one or more"
    )
    parser.add_argument("--raw", action="store_true", help="continue the prompt itself: no chat format around it")
    add_generation_options(parser)
    parser.add_argument("--num-beams", type=number(int, 1), default=1, metavar="N", help="more than 1: not streamed")
    parser.add_argument("--no-stream", action="store_true", help="print an answer when it is complete")


def run(arguments: argparse.Namespace) -> None:
    if arguments.num_beams > 1 and arguments.do_sample:
        raise ChatGLMError("--num-beams", "value", arguments.num_beams, "1 with --do-sample")
    if arguments.num_beams > 1 and (arguments.prompt_lookup is not None or arguments.assistant is not None):
        raise ChatGLMError("--num-beams", "value", arguments.num_beams, "1 with --prompt-lookup and --assistant")
    options = generation_options(arguments) | {"num_beams": arguments.num_beams}

    from chatglm_ov.cli.answer import PromptBar, ask, assistant_options, complete, open_model, running
    from chatglm_ov.cli.printing import TextPrinter

    model, tokenizer = open_model(arguments.folder, **model_options(arguments))
    if sys.stderr.isatty():
        print(f"[{running(model)}]", file=sys.stderr, flush=True)
    options |= {"prompt_progress": PromptBar(), **assistant_options(arguments.assistant)}
    answer_to = complete if arguments.raw else ask
    for prompt in arguments.prompt:
        printer = TextPrinter()
        show = None if arguments.no_stream or arguments.num_beams > 1 else printer.show
        answer = answer_to(model, tokenizer, prompt, show, **options)
        printer.finish(answer.text)
        print(f"[{answer.figures}]", file=sys.stderr, flush=True)
        if answer.cut and arguments.num_beams == 1 and sys.stderr.isatty():
            print(f"[{answer.cut}]", file=sys.stderr, flush=True)
