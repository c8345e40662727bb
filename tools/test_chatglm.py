#!/usr/bin/env python
"""Ask a converted model, or the original through PyTorch, and say how long it took: a side-by-side look.

    python tools/test_chatglm.py CHECKPOINT OUT --use=ov|torch [--prompt TEXT ...]
    USE_INT8_WEIGHT=1 python tools/test_chatglm.py CHECKPOINT OUT --use=ov

Answers are greedy, so the same every time. `--use=ov` runs the converted folder OUT: bf16, int8 with USE_INT8_WEIGHT=1,
or `--weight-format`. `--use=torch` runs the checkpoint's own code, which can do anything on this machine:
`--trust-remote-code` says that you have read it. For `glm` and `glm4` checkpoints, which have none, transformers' own
classes are run.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from chatglm_ov.cli.options import WEIGHT_FORMATS, number, prompt_text
from chatglm_ov.cli.program import Parser, UsageError, execute

PROMPTS = ("床前明月光", "请背诵李白的《夜思》。", "What is OpenVINO?")


def add_arguments(parser: Parser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder as the model's authors publish it")
    parser.add_argument("output", type=Path, help="converted folder")
    parser.add_argument("--use", choices=("ov", "torch"), default="ov", help="default: ov")
    parser.add_argument("--prompt", nargs="+", action="extend", type=prompt_text, metavar="TEXT", help="one or more")
    parser.add_argument("--weight-format", choices=WEIGHT_FORMATS, help="of --use=ov; default: bf16")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=64, metavar="N", help="default: 64")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the checkpoint's own code")


def run(arguments: argparse.Namespace) -> None:
    from chatglm_ov.cli.answer import ask, open_model
    from chatglm_ov.system.memory import memory
    from chatglm_ov.system.sizes import size

    answer_to = ask
    if arguments.use == "torch":
        from chatglm_ov.cli.original import ask_original, open_original

        if arguments.weight_format is not None:
            raise UsageError("--weight-format is for --use=ov: the original computes in float32")
        model, tokenizer = open_original(arguments.checkpoint, arguments.trust_remote_code)
        answer_to = ask_original
    else:
        model, tokenizer = open_model(arguments.output, arguments.weight_format or default_format(arguments.output))
    for prompt in arguments.prompt or PROMPTS:
        answer = answer_to(model, tokenizer, prompt, do_sample=False, max_new_tokens=arguments.max_new_tokens)
        resident, anonymous = memory()
        print(f"prompt: {prompt}\nanswer: {answer.text}\n{answer.timing}")
        print(f"memory: {size(resident)} resident, {size(anonymous)} anonymous\n", flush=True)


def default_format(folder: Path) -> str:
    """bf16, or int8 as the environment asks; the only format of a folder that has neither, as that of a quantized
    checkpoint."""
    from chatglm_ov.runtime.loading import weight_formats

    asked = "int8" if os.environ.get("USE_INT8_WEIGHT", "0") not in ("", "0", "false", "no", "off") else "bf16"
    there = weight_formats(folder)
    if len(there) != 1 or asked in there:
        return asked
    print(f"{folder} has no {asked}: {there[0]}", file=sys.stderr)
    return there[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = Parser(prog="test_chatglm.py", description="Ask a model and say how long it took.", debug_default=False)
    add_arguments(parser)
    return execute(parser, argv, run)


if __name__ == "__main__":
    sys.exit(main())
