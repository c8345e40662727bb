"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chatglm_ov.errors import ChatGLMError

# Names only: the modules that define them cost an import of OpenVINO.
WEIGHT_FORMATS = ("f32", "bf16", "int8", "int4")
INFERENCE_PRECISIONS = ("f32", "bf16", "f16")
KV_CACHE_FORMATS = ("f32", "bf16", "int8")

_SAMPLING = ("temperature", "top_p", "top_k", "seed")
_OTHERS = ("max_new_tokens", "repetition_penalty", "no_repeat_ngram_size")
_MODEL_FILES = (
    *("*config.json", "*.index.json", "*.safetensors", "*.bin"),
    *("tokenizer*", "*.model", "*.jinja", "special_tokens_map.json", "added_tokens.json"),
    "*/*",  # the folders of a converted one's formats
)

log = logging.getLogger(__name__)


def number(kind: type, low: float, high: float = float("inf"), above: bool = False) -> Callable[[str], Any]:
    """A type for an argument: an int or float from `low` (`above`: greater than it) to `high`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (low < value if above else low <= value) or not value <= high or value == float("inf"):
            raise ValueError
        return value

    limits = f"above {low}" if above else f"from {low}"
    parse.__name__ = f"{kind.__name__} {limits}" + (f" to {high:g}" if high != float("inf") else "")
    return parse


def model_files(folder: Path | None) -> list[Path]:
    """Files of a model that a report of the command could take the place of."""
    return [] if folder is None else [file for pattern in _MODEL_FILES for file in folder.glob(pattern)]


def check_output(option: str, file: Path | None, taken: Sequence[Path | None] = ()) -> None:
    """Raises ChatGLMError for a file that could not be written at the end of a long command, and for one of those that
    the command reads, or writes otherwise."""
    if file is None:
        return
    if any(file.resolve() == other.resolve() for other in taken if other is not None):
        raise ChatGLMError(f"--{option}", "file", f"{file}, which the command needs itself", "another file")
    folder = file.absolute().parent
    if file.is_dir() or not folder.is_dir():
        raise ChatGLMError(f"--{option}", "file", str(file), "a file in a folder that is there")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise ChatGLMError(f"--{option}", "file", f"{file}, which cannot be written", "one that can")


def warn_of_idle_activation_bits(bits: Sequence[int], weight_formats: Sequence[str]) -> None:
    """8-bit activations are multiplied with integers."""
    if 8 in bits and not {"int8", "int4"} & set(weight_formats):
        log.warning("--activation-bits 8 changes nothing for weights in %s", ", ".join(weight_formats))


def prompt_text(text: str, where: Path | str = "--prompt") -> str:
    """A type for an argument: text that a tokenizer can take."""
    if not text.strip():
        raise ChatGLMError(where, "text", "empty", "at least one character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ChatGLMError(where, "text", "not in the terminal's encoding", "valid characters") from None
    return text


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="converted folder")
    parser.add_argument("--weight-format", metavar="FORMAT", help="default: int8, else bf16, else what is there")
    parser.add_argument(
        "--inference-precision", choices=INFERENCE_PRECISIONS, help="default: what OpenVINO prefers on this machine"
    )
    parser.add_argument("--kv-cache-format", choices=KV_CACHE_FORMATS, help="default: bf16; f32 with f32 precision")
    parser.add_argument(
        "--activation-bits", type=int, choices=(16, 8), default=16, help="8: faster prompts, less exact (default: 16)"
    )
    parser.add_argument("--threads", type=number(int, 1), metavar="N", help="default: what OpenVINO takes")


def model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments for `from_pretrained()`."""
    names = ("weight_format", "inference_precision", "kv_cache_format", "activation_bits")
    properties = {} if arguments.threads is None else {"INFERENCE_NUM_THREADS": arguments.threads}
    return {"properties": properties} | {name: getattr(arguments, name) for name in names}


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Without --do-sample an answer is the same every time."""
    parser.add_argument(
        "--max-new-tokens", type=number(int, 1), metavar="N", help="default: 512, with thinking 32768, if the model can"
    )
    parser.add_argument("--do-sample", action="store_true", help="draw tokens instead of taking the likeliest")
    parser.add_argument(
        "--temperature", type=number(float, 0), help="with --do-sample; 0: the likeliest token, as without it"
    )
    parser.add_argument("--top-p", type=number(float, 0, 1, above=True), help="with --do-sample")
    parser.add_argument("--top-k", type=number(int, 1), help="with --do-sample")
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), help="with --do-sample: the same draws every time")
    parser.add_argument("--repetition-penalty", type=number(float, 0, above=True), metavar="FACTOR")
    parser.add_argument(
        "--no-repeat-ngram-size", type=number(int, 1), metavar="N", help="no N tokens in a row that were there before"
    )
    parser.add_argument(
        "--stop", nargs="+", action="extend", metavar="TEXT", help="ends an answer, of which it is no part; one or more"
    )
    parser.add_argument(
        "--prompt-lookup", type=number(int, 1), metavar="N", help="guess up to N tokens at a time from the text so far"
    )
    parser.add_argument(
        "--assistant", type=Path, metavar="FOLDER", help="guess with a smaller converted model of the same vocabulary"
    )


def generation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments for `generate()`, only those that were given. Sets the seed."""
    drawn = arguments.do_sample and arguments.temperature != 0
    given = {name: None if arguments.temperature == 0 else getattr(arguments, name) for name in _SAMPLING}
    for name, value in given.items():
        if value is not None and not drawn:
            raise ChatGLMError(f"--{name.replace('_', '-')}", "value", value, "--do-sample with it")
    if given["seed"] is not None:
        from transformers import set_seed

        set_seed(given["seed"])
    named = {name: given[name] for name in _SAMPLING[:-1]}
    named |= {name: getattr(arguments, name) for name in _OTHERS} | {"stop_strings": arguments.stop}
    if arguments.assistant is not None and arguments.prompt_lookup is not None:
        raise ChatGLMError("--prompt-lookup", "value", arguments.prompt_lookup, "none with --assistant")
    named["prompt_lookup_num_tokens"] = arguments.prompt_lookup
    return {"do_sample": drawn} | {name: value for name, value in named.items() if value is not None}
