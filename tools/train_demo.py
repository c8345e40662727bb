#!/usr/bin/env python
"""Train the demo model: the ChatGLM3 architecture in small, on Tang poems, with PyTorch on the CPU.

    python tools/train_demo.py --output demo-output

writes `checkpoint/` (an ordinary ChatGLM3 folder), `report.json` and `training.png` into the output folder. A snapshot
there lets a run that was ended continue with the same command.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
from demo.batches import BATCH_TOKENS, ConversationStream
from demo.corpus import (
    ALIASES,
    BY_TITLE,
    BY_TITLE_AND_AUTHOR,
    CANONICAL,
    CONTINUE,
    WHOLE_BY_OPENING,
    Poem,
    read_poems,
    training_poems,
)
from demo.evaluation import forced_recitals, perplexity, quantized_copy, recitals
from demo.export import read_checkpoint, write_checkpoint
from demo.model import SIZES, ChatGLM3
from demo.training import Plan, Trainer, draw_curve
from demo.vocabulary import SPECIALS, ChatVocabulary, choose_characters, train_vocabulary

from chatglm_ov.cli.program import Parser, execute

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CHARACTERS = 4160
MERGES = 160
VOCABULARY = 3 + 256 + 1 + CHARACTERS + MERGES
CHECK_POEMS = 100


def prompt_texts() -> list[str]:
    forms = [CANONICAL, *BY_TITLE_AND_AUTHOR, *BY_TITLE, *WHOLE_BY_OPENING, *CONTINUE, "，首句“”。·• "]
    filled = [form.format(title="", author="", opening="", given="") for form in forms]
    return filled + [title + author for names in ALIASES.values() for title, author in names]


def make_vocabulary(anthology: list[Poem], poems: list[Poem]) -> bytes:
    """Characters come from everything that is said, merges from the verse: names are spelled alike in every prompt."""
    own = [text for poem in anthology for text in (poem.title, poem.author, poem.text)] + prompt_texts()
    others = [text for poem in poems for text in (poem.title, poem.author, poem.text)]
    verse = [poem.text for poem in anthology + poems]
    return train_vocabulary(verse, choose_characters(own, others, CHARACTERS), VOCABULARY)


def evaluate(checkpoint: Path, anthology: list[Poem], held_out: list[Poem]) -> dict:
    """Figures of the shipped file: weights as stored in float16, arithmetic in float32."""
    model = read_checkpoint(checkpoint)
    vocabulary = ChatVocabulary(checkpoint / "tokenizer.model")
    per_token, per_character = perplexity(model, vocabulary, held_out)
    named, recited, failed = recitals(model, vocabulary, anthology)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "poems": len(anthology),
        "recited_from_title_and_author": named,
        "recited_with_opening_where_ambiguous": recited,
        "failed": [f"{poem.author} {poem.title}" for poem in failed],
        "recited_int8_rows": forced_recitals(quantized_copy(model, 8), vocabulary, anthology),
        "recited_int4_group128": forced_recitals(quantized_copy(model, 4, 128), vocabulary, anthology),
        "perplexity_per_token": per_token,
        "perplexity_per_character": per_character,
        "perplexity_per_token_int8_rows": perplexity(quantized_copy(model, 8), vocabulary, held_out)[0],
    }


def measure_steps(minutes: float, trainer: Trainer) -> int:
    """Number of steps that fit into `minutes`, from a few steps of a copy that is thrown away."""
    for _ in range(3):
        trainer.train_step()
    start = perf_counter()
    for _ in range(12):
        trainer.train_step()
    return max(300, round(minutes * 60 / ((perf_counter() - start) / 12) / 100) * 100)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--data", type=Path, default=DATA, help="folder with tang300.jsonl and tang_poems_*.jsonl.xz")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="checkpoint, report and snapshot")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=3200, help=f"training steps of {BATCH_TOKENS} tokens")
    parser.add_argument("--minutes", type=float, help="choose the steps by a speed measurement; not reproducible")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="before it falls to nothing")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    parser.add_argument("--evaluate-only", action="store_true", help="only make the report of an existing checkpoint")


def run(asked: argparse.Namespace) -> None:
    data, output = asked.data, asked.output
    torch.set_num_threads(asked.threads)
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(True)
    anthology, held_out = read_poems(data / "tang300.jsonl"), read_poems(data / "tang_poems_test.jsonl.xz")
    checkpoint = output / "checkpoint"
    if not asked.evaluate_only:
        poems = training_poems(read_poems(data / "tang_poems_train.jsonl.xz"), anthology)
        plan = Plan(asked.size, asked.steps, asked.seed, asked.threads, asked.learning_rate, asked.bf16)
        train(plan, asked.minutes, anthology, poems, held_out, output)
    report = evaluate(checkpoint, anthology, held_out)
    (output / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, ensure_ascii=False, indent=2))


def train(
    plan: Plan,
    minutes: float | None,
    anthology: list[Poem],
    poems: list[Poem],
    held_out: list[Poem],
    output: Path,
) -> None:
    tokenizer = make_vocabulary(anthology, poems)
    vocabulary = ChatVocabulary(tokenizer)
    assert len(vocabulary) == VOCABULARY + len(SPECIALS) <= SIZES[plan.size].padded_vocab_size

    def trainer() -> Trainer:
        torch.manual_seed(plan.seed)
        model = ChatGLM3(SIZES[plan.size])
        stream = ConversationStream(anthology, poems, vocabulary, model.size.seq_length, plan.seed)
        return Trainer(model, stream, plan, output / "snapshot.pt")

    if minutes is not None:
        plan = replace(plan, steps=measure_steps(minutes, trainer()))

    def check(model: ChatGLM3) -> tuple[int, float]:
        return forced_recitals(model, vocabulary, anthology), perplexity(model, vocabulary, held_out[:CHECK_POEMS])[0]

    run = trainer()
    run.run(check)
    write_checkpoint(output / "checkpoint", run.model, tokenizer)
    draw_curve(run.history, len(anthology), output / "training.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    description = "Train the demo model and write its checkpoint and figures."
    parser = Parser(prog="train_demo.py", description=description, debug_default=False)
    add_arguments(parser)
    return execute(parser, argv, run)


if __name__ == "__main__":
    sys.exit(main())
