#!/usr/bin/env python
"""How far each weight format and precision is from the original implementations, on the golden sets.

    python tools/golden_report.py [--formats f32 bf16 int8 int4] [--ops fused stock] [--precisions f32 default]
                                  [--json FILE]

Teacher-forced over every prompt of a set: logits of all real prompt columns and decode steps that the set holds,
against the originals' float32 ones. Columns: largest and mean absolute error, and the share of positions with the
same best token. With fused operations a precision is that of the KV cache: what they compute in follows from the
weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from chatglm_ov import convert
from chatglm_ov.conversion.checks import OPS
from chatglm_ov.conversion.convert import available_ops
from chatglm_ov.runtime.loading import CompiledModel, load_model
from chatglm_ov.weight_formats import FORMATS

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from golden_cases import golden_prompt, teacher_forced
from golden_sets import GOLDENS, Golden

DEFAULT = "default"

Row = dict[str, "float | int | str"]


def compared(golden: Golden, model: CompiledModel) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Our logits and the original's, [positions, V] each, of every prompt."""
    request = model.create_request()
    for key in golden.arrays.files:
        if not key.endswith("_dec_logits"):
            continue
        name, wanted = key.removesuffix("_dec_logits"), golden[key]
        prompt = golden_prompt(golden, name, model)
        prefill, decoded = teacher_forced(request, prompt, golden[f"{name}_dec_tokens"])
        # The first decode step is the prompt's last column: it is counted there if the set holds the prompt.
        first = 0
        if f"{name}_prefill_logits" in golden:
            real, first = prompt.keep.astype(bool), 1
            yield prefill[real], golden[f"{name}_prefill_logits"][real]
        vocab, steps = wanted.shape[-1], slice(first, wanted.shape[1])
        yield decoded[:, steps].reshape(-1, vocab), wanted[:, steps].reshape(-1, vocab)


def measured(golden: Golden, folder: Path, weight_format: str, precision: str) -> Row:
    model = load_model(folder, weight_format, None if precision == DEFAULT else precision)
    pairs = list(compared(golden, model))
    errors = np.concatenate([np.abs(ours - theirs).max(axis=1) for ours, theirs in pairs])
    means = np.concatenate([np.abs(ours - theirs).mean(axis=1) for ours, theirs in pairs])
    equal = np.concatenate([ours.argmax(axis=1) == theirs.argmax(axis=1) for ours, theirs in pairs])
    return {
        "set": golden.folder.name,
        "weights": weight_format,
        "ops": model.ops,
        "precision": precision if precision != DEFAULT else device_precision(model),
        "positions": int(equal.size),
        "max error": float(errors.max()),
        "mean error": float(means.mean()),
        "same top-1": float(equal.mean()),
    }


def device_precision(model: CompiledModel) -> str:
    if model.ops == "fused":
        return f"{model.kv_cache_format} cache"
    return model.compiled.get_property("INFERENCE_PRECISION_HINT").to_string() + " (default)"


def report(formats: list[str], lowerings: list[str], precisions: list[str], console: Console) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for golden in track(GOLDENS, "comparing", console=console, transient=True):
            made = {ops: Path(temporary) / ops / golden.folder.name for ops in lowerings}
            folders = [convert(golden.checkpoint, folder, formats, ops, progress=False) for ops, folder in made.items()]
            rows += [
                measured(golden, folder, name, precision)
                for name in formats
                for folder in folders
                for precision in precisions
            ]
    return rows


def print_table(rows: list[Row], console: Console) -> None:
    table = Table(*rows[0])
    for column in table.columns[4:]:
        column.justify = "right"
    for i, row in enumerate(rows):
        if i and row["set"] != rows[i - 1]["set"]:
            table.add_section()
        *texts, largest, mean, same = row.values()
        table.add_row(*map(str, texts), f"{largest:.1e}", f"{mean:.1e}", f"{same:.1%}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Errors of each weight format and precision on the golden sets.")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--ops", nargs="+", choices=OPS, default=[available_ops("fused"), "stock"])
    parser.add_argument("--precisions", nargs="+", choices=("f32", "bf16", DEFAULT), default=["f32", DEFAULT])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args()
    lowerings = list(dict.fromkeys(arguments.ops))
    rows = report(arguments.formats, lowerings, arguments.precisions, Console(stderr=True))
    print_table(rows, Console(width=100))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
