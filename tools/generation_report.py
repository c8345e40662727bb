#!/usr/bin/env python
"""What guessing tokens, reusing a conversation's beginning, long prompts, beams and sampling come to.

    python tools/generation_report.py guesses [--preset chatglm3-6b] [--layers 8] [--weight-format int8]
    python tools/generation_report.py reuse [--history 2048] ...
    python tools/generation_report.py long-prompt [--preset chatglm3-6b-32k] [--layers 2] [--tokens 32768] ...
    python tools/generation_report.py beams [--preset chatglm-6b] [--layers 4] [--tokens 512] ...
    python tools/generation_report.py sampling [--preset glm-edge-1.5b-chat] [--weight-format int4] [--tokens 64] ...

Random weights at a released model's shapes. `guesses`: the same answer with and without prompt lookup, in turns; which
answer it is, is forced, so that the weights do not matter: a poem quoted with a line changed, a program with a name
changed, and poems that the prompt does not have. Ratios of times, medians of the rounds. `reuse`: the time of a second
turn's first token against computing the whole conversation again. `long-prompt`: the peak of anonymous memory beside
weights and cache, and the time of the first and of the last quarter of the prompt. `beams`: what a step of four rows
takes that go on from rows drawn anew in each step, against rows that go on from themselves, early and late.
`sampling`: what lies between two calls of the model, where tokens are as likely as in a text; with top-p as
transformers has it and as it is here, in turns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from chatglm_ov import OVChatGLMForCausalLM, load_tokenizer
from chatglm_ov.bench.measure import Tokens
from chatglm_ov.bench.models import converted, from_preset
from chatglm_ov.calibration.text import POEMS
from chatglm_ov.cli.demo import CHECKPOINT
from chatglm_ov.conversion.convert import available_ops
from chatglm_ov.generation import mixin
from chatglm_ov.system.memory import growth
from chatglm_ov.system.sizes import size

PROGRAM = Path(__file__).read_text(encoding="utf-8")


class Forced(LogitsProcessor):
    """Makes generate() choose these tokens, one after another, behind a prompt of that length."""

    def __init__(self, prompt: int, answer: list[int]):
        self._prompt, self._answer = prompt, answer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self._answer[input_ids.shape[1] - self._prompt]] = torch.inf
        return scores


def tasks(tokenizer: Any) -> dict[str, tuple[list[int], list[int]]]:
    """Prompt and answer, by what the answer is."""
    poems = [tokenizer.decode(document.ids, skip_special_tokens=True) for document in POEMS.documents(tokenizer)]
    quoted = "".join(poems[:6])
    changed = quoted.replace(poems[2], poems[2][::-1])
    code = PROGRAM[2000:4500]
    texts = {
        "a poem, a line changed": (quoted, changed),
        "a program, a name changed": (code, code.replace("self", "this")),
        "other poems": (quoted, "".join(poems[20:26])),
    }
    made = {}
    for name, (prompt, answer) in texts.items():
        made[name] = tokenizer.encode(prompt)[:384], tokenizer.encode(answer, add_special_tokens=False)[:256]
    return made


def seconds(model: Any, prompt: list[int], answer: list[int], **options: Any) -> float:
    """Of the answer without the prompt: the prompt is in the cache before."""
    ids = torch.tensor([prompt])
    model(ids, logits_to_keep=1)
    start = perf_counter()
    forced = LogitsProcessorList([Forced(len(prompt), answer)])
    given = {"do_sample": False, "eos_token_id": None, "max_new_tokens": len(answer), "reuse_cache": True, **options}
    out = model.generate(ids, logits_processor=forced, **given)
    assert out[0, len(prompt) :].tolist() == answer
    return perf_counter() - start


def guesses(model: Any, arguments: argparse.Namespace) -> Iterator[list[str]]:
    yield ["answer", "tokens", "guesses right", "times as fast"]
    for name, (prompt, answer) in tasks(load_tokenizer(CHECKPOINT)).items():
        if arguments.answer not in name:
            continue
        ratios, told = [], None
        for _ in range(arguments.rounds):
            before = seconds(model, prompt, answer)
            guessed = seconds(model, prompt, answer, prompt_lookup_num_tokens=arguments.num_tokens)
            told = model.speculation
            # A machine that becomes faster or slower does so for both.
            ratios.append((before + seconds(model, prompt, answer)) / 2 / guessed)
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        right = "none" if told is None else f"{told.accepted} of {told.guessed}"
        yield [name, str(len(answer)), right, spread]


def random_ids(model: Any, count: int) -> torch.Tensor:
    """int64 [1, count]."""
    return torch.randint(0, model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))


def reuse(model: Any, arguments: argparse.Namespace) -> Iterator[list[str]]:
    yield ["history", "new tokens", "share of computing it again"]
    ids = random_ids(model, arguments.history + 32)
    shares = []
    for _ in range(arguments.rounds):
        times = []
        for reused in (False, True):
            model.generate(ids[:, : arguments.history], max_new_tokens=1, do_sample=False, reuse_cache=True)
            start = perf_counter()
            model.generate(ids, max_new_tokens=1, do_sample=False, reuse_cache=reused)
            times.append(perf_counter() - start)
        shares.append(times[1] / times[0])
    yield [str(arguments.history), "32", f"{median(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})"]


def long_prompt(model: Any, arguments: argparse.Namespace) -> Iterator[list[str]]:
    yield ["tokens", "cache", "peak beside weights and cache", "last quarter / first quarter"]
    ids = random_ids(model, arguments.tokens)
    times: list[tuple[int, float]] = [(0, perf_counter())]
    model.prompt_progress = lambda done, total: times.append((done, perf_counter()))
    with growth() as grown:
        model(ids, logits_to_keep=1)
    cache = model.session.request.cache.nbytes
    quarters = [
        [b - a for (_, a), (done, b) in pairwise(times) if low < done / arguments.tokens <= high]
        for low, high in ((0, 0.26), (0.74, 1))
    ]
    slower = sum(quarters[1]) / sum(quarters[0])
    yield [str(arguments.tokens), size(cache), size(grown.nbytes - cache), f"{slower:.2f}"]


def steps_of_rows(model: Any, rows: int, prompt: int, count: int, orders: np.random.Generator | None) -> list[float]:
    """Seconds of each of `count` steps behind a prompt; a row goes on from one that `orders` draws, or from itself."""
    tokens, request = Tokens(model.compiled.config, rows, [prompt], count), model.compiled.create_request()
    tokens.feed(request, 0, prompt)
    times = []
    for end in range(prompt + 1, prompt + count + 1):
        if orders is not None:
            tokens.rows = orders.integers(0, rows, rows).astype(np.int32)
        times.append(tokens.feed(request, end - 1, end))
    return times


def beams(model: Any, arguments: argparse.Namespace) -> Iterator[list[str]]:
    yield ["rows", "tokens in the cache", "in any order / in order"]
    rows, prompt, count, part = 4, 64, arguments.tokens, 32
    ratios = {f"{prompt} to {prompt + part}": [], f"{prompt + count - part} to {prompt + count}": []}
    for _ in range(arguments.rounds):
        steady, mixed = (steps_of_rows(model, rows, prompt, count, order) for order in (None, np.random.default_rng(0)))
        for found, steps in zip(ratios.values(), (slice(part), slice(-part, None)), strict=True):
            found.append(median(mixed[steps]) / median(steady[steps]))
    for name, found in ratios.items():
        yield [str(rows), name, f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})"]


class LikeText(LogitsProcessor):
    """Chances by rank as in a text, rank ** -1.5, whatever the model says; which tokens, changes from step to step."""

    def __init__(self, vocab_size: int):
        self._scores = -1.5 * torch.arange(1, vocab_size + 1).log()[torch.randperm(vocab_size)]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self._scores.roll(input_ids.shape[1]).expand_as(scores).clone()


def between_calls(model: Any, rows: int, count: int, **options: Any) -> float:
    """Seconds from the end of a call of the model to the beginning of the next, the median of `count`."""
    request, calls = model.session.request, []

    def timed(*arguments: Any, **named: Any) -> np.ndarray:
        start = perf_counter()
        logits = type(request).infer(request, *arguments, **named)
        calls.append((start, perf_counter()))
        return logits

    request.infer = timed
    try:
        like_text = LogitsProcessorList([LikeText(model.config.vocab_size)])
        given = {"eos_token_id": None, "max_new_tokens": count + 1, "logits_processor": like_text, **options}
        model.generate(random_ids(model, 16).expand(rows, -1), **given)
    finally:
        del request.infer
    return median(start - end for (_, end), (start, _) in pairwise(calls))


def sampling(model: Any, arguments: argparse.Namespace) -> Iterator[list[str]]:
    yield ["a token is", "rows", "between two calls", "with the top-p of transformers"]
    nucleus = {"do_sample": True, "top_p": 0.8, "temperature": 0.8}
    ways = {
        "the likeliest": {"do_sample": False},
        "of 50, top-p": {**nucleus, "top_k": 50},
        "top-p": {**nucleus, "top_k": 0},
    }
    for rows in (1, 8):
        for name, options in ways.items():
            found: dict[Any, list[float]] = {mixin.without_sorting: [], LogitsProcessorList: []}
            for _ in range(arguments.rounds):
                for how, times in found.items():
                    with patch.object(mixin, "without_sorting", how):
                        times.append(1e3 * between_calls(model, rows, arguments.tokens, **options))
            yield [name, str(rows), *(f"{median(t):.1f} ms ({min(t):.1f} to {max(t):.1f})" for t in found.values())]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, preset, layers, weight_format, tokens in (
        ("guesses", "chatglm3-6b", 8, "int8", 0),
        ("reuse", "chatglm3-6b", 8, "int8", 0),
        ("long-prompt", "chatglm3-6b-32k", 2, "int8", 32768),
        ("beams", "chatglm-6b", 4, "int8", 512),
        ("sampling", "glm-edge-1.5b-chat", None, "int4", 64),
    ):
        command = commands.add_parser(name)
        command.add_argument("--preset", default=preset)
        command.add_argument("--layers", type=int, default=layers)
        command.add_argument("--weight-format", default=weight_format)
        command.add_argument("--rounds", type=int, default=5)
        command.add_argument("--num-tokens", type=int, default=10)
        command.add_argument("--answer", default="", help="only those with this in their name")
        command.add_argument("--history", type=int, default=2048)
        command.add_argument("--tokens", type=int, default=tokens)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    measures = {"guesses": guesses, "reuse": reuse, "long-prompt": long_prompt, "beams": beams, "sampling": sampling}
    measure = measures[arguments.command]
    ops, source = available_ops("fused"), from_preset(arguments.preset, arguments.layers)
    with tempfile.TemporaryDirectory() as place, converted(source, arguments.weight_format, [ops], Path(place)) as made:
        model = OVChatGLMForCausalLM.from_pretrained(made[ops], arguments.weight_format)
        model.compiled.warm_up()
        header, *rows = tqdm(measure(model, arguments), file=sys.stderr, desc=arguments.command)
    table = Table(*header, title=f"{source.name}, {arguments.weight_format}, {ops}")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
