#!/usr/bin/env python
"""What the demo model can do once it is converted: poems recited, and perplexity of the held-out poems.

    python tools/evaluate_demo.py CONVERTED [--weight-format bf16 int8 ...] [--data DIR]

CONVERTED is what `chatglm-ov demo --output CONVERTED` writes. The figures are defined as those of tools/train_demo.py.
"""

import argparse
import sys
from collections.abc import Sequence
from math import exp
from pathlib import Path

import torch
import torch.nn.functional as F
from demo.corpus import Poem, read_poems
from demo.evaluation import canonical_prompts, name_prompt
from demo.vocabulary import IGNORED, ChatVocabulary
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from chatglm_ov import OVChatGLMForCausalLM, load_tokenizer
from chatglm_ov.cli.options import WEIGHT_FORMATS
from chatglm_ov.cli.program import Parser, execute
from chatglm_ov.runtime.loading import weight_formats

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def recitals(model: OVChatGLMForCausalLM, folder: Path, poems: list[Poem]) -> tuple[int, int]:
    """(recited from title and author alone, recited in all), greedy, through `chat()`."""
    tokenizer, named, right = load_tokenizer(folder), 0, 0
    for prompt, poem in zip(tqdm(canonical_prompts(poems), desc="reciting"), poems, strict=True):
        answer, _ = model.chat(tokenizer, prompt, history=[], do_sample=False)
        right += answer == poem.text
        named += answer == poem.text and prompt == name_prompt(poem)
    return named, right


def perplexity(model: OVChatGLMForCausalLM, vocabulary: ChatVocabulary, poems: list[Poem]) -> tuple[float, float]:
    """(per token, per character) of the poems' text, given the canonical prompt with title and author."""
    loss, tokens = 0.0, 0
    for poem in tqdm(poems, desc="perplexity"):
        ids, labels = (torch.tensor(row) for row in vocabulary.conversation([(name_prompt(poem), poem.text)]))
        wanted = (labels != IGNORED).nonzero().flatten()[len(vocabulary.newline) :]
        logits = model(ids[None]).logits[0]
        loss += float(F.cross_entropy(logits[wanted], labels[wanted], reduction="sum"))
        tokens += len(wanted)
    return exp(loss / tokens), exp(loss / sum(len(poem.text) for poem in poems))


def add_arguments(parser: Parser) -> None:
    parser.add_argument("converted", type=Path)
    parser.add_argument("--weight-format", nargs="+", choices=WEIGHT_FORMATS, help="default: all that are there")
    parser.add_argument(
        "--data", type=Path, default=DATA, help="folder with tang300.jsonl and tang_poems_test.jsonl.xz"
    )


def run(arguments: argparse.Namespace) -> None:
    anthology = read_poems(arguments.data / "tang300.jsonl")
    held_out = read_poems(arguments.data / "tang_poems_test.jsonl.xz")
    vocabulary = ChatVocabulary(arguments.converted / "tokenizer.model")
    table = Table("weight format", "by title and author", "in all", "perplexity a token", "a character")
    for name in arguments.weight_format or weight_formats(arguments.converted):
        model = OVChatGLMForCausalLM.from_pretrained(arguments.converted, weight_format=name)
        named, right = recitals(model, arguments.converted, anthology)
        per_token, per_character = perplexity(model, vocabulary, held_out)
        table.add_row(name, f"{named}", f"{right} of {len(anthology)}", f"{per_token:.1f}", f"{per_character:.1f}")
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = Parser(prog="evaluate_demo.py", description="What the converted demo model can do.", debug_default=False)
    add_arguments(parser)
    return execute(parser, argv, run)


if __name__ == "__main__":
    sys.exit(main())
