"""`chatglm-ov eval`: how well the weight formats of a converted folder predict a text of yours.

Perplexity, how often the first choice is the reference's, and how far the probabilities are from the reference's (KL
divergence, in nats a token). Every token is predicted once, in windows that slide over each document.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from math import isfinite, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm_ov.cli.options import (
    KV_CACHE_FORMATS,
    WEIGHT_FORMATS,
    check_output,
    model_files,
    number,
    warn_of_idle_activation_bits,
)
from chatglm_ov.errors import ChatGLMError

if TYPE_CHECKING:
    from chatglm_ov.evaluation.run import Windows
    from chatglm_ov.runtime.loading import CompiledModel

SUMMARY = "perplexity of a text, and agreement with a reference"
REFERENCES = ("f32", "bf16")
"""Formats to take for the reference, the first that is there."""

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="converted folder")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help=".txt or .jsonl, or either with .xz")
    parser.add_argument("--field", default="text", metavar="NAME", help="of a .jsonl object: its text (default: text)")
    parser.add_argument(
        "--prompt", metavar="TEXT", help="asked before each object in the model's chat format; {NAME} is its field"
    )
    parser.add_argument("--limit", type=number(int, 1), metavar="N", help="the first N documents only")
    parser.add_argument(
        "--weight-format", nargs="+", action="extend", choices=WEIGHT_FORMATS, metavar="FORMAT",
        help="default: all in the folder",
    )  # fmt: skip
    parser.add_argument("--reference", type=Path, metavar="FOLDER", help="converted folder to agree with")
    parser.add_argument(
        "--reference-format",
        choices=WEIGHT_FORMATS,
        metavar="FORMAT",
        help="of the reference (default: f32, else bf16)",
    )
    parser.add_argument("--window", type=number(int, 2), default=512, metavar="N", help="tokens (default: 512)")
    parser.add_argument(
        "--stride", type=number(int, 1), metavar="N", help="tokens (default: half a window, or what room there is)"
    )
    parser.add_argument("--kv-cache-format", choices=KV_CACHE_FORMATS, help="default: bf16; reference: f32")
    parser.add_argument("--activation-bits", type=int, choices=(16, 8), default=16, help="default: 16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")


def run(arguments: argparse.Namespace) -> None:
    from chatglm_ov.cli.tables import print_table

    report = _report(arguments)
    # Before anything is shown: whoever reads that may stop reading.
    if arguments.json is not None:
        written = {**report, "models": [_for_json(model) for model in report["models"]]}
        text = json.dumps(written, ensure_ascii=False, indent=2, allow_nan=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    sizes = f"{report['documents']} documents, {report['tokens']} tokens"
    print(f"{arguments.data.name}: {sizes}, windows of {report['window']}, stride {report['stride']}")
    if report["reference"] is not None:
        print(f"reference: {report['reference']['folder']}, {report['reference']['weight_format']}")
    print_table(("model", "perplexity", "change", "same first choice", "KL"), map(_row, report["models"]))


def _report(arguments: argparse.Namespace) -> dict[str, Any]:
    from chatglm_ov.documents import Source
    from chatglm_ov.evaluation.run import Windows
    from chatglm_ov.evaluation.windows import scored_tokens
    from chatglm_ov.runtime.loading import weight_formats
    from chatglm_ov.tokenizer import load_tokenizer

    source = Source(arguments.data, arguments.field, arguments.prompt, arguments.limit)
    source.check()
    taken = [arguments.data, *model_files(arguments.folder), *model_files(arguments.reference)]
    check_output("json", arguments.json, taken)
    formats = list(dict.fromkeys(arguments.weight_format or weight_formats(arguments.folder)))
    if not formats:
        raise ChatGLMError(arguments.folder, "weight formats", "none", "a converted folder")
    warn_of_idle_activation_bits([arguments.activation_bits], formats)
    reference = _reference(arguments)
    documents = source.documents(load_tokenizer(arguments.folder))
    room = arguments.window - max((len(document.given) for document in documents), default=0)
    stride = arguments.stride or max(1, min(arguments.window // 2, room - 1))
    texts = Windows(documents, arguments.window, stride)
    return {
        "folder": str(arguments.folder),
        "data": str(arguments.data),
        "documents": len(documents),
        "tokens": scored_tokens(documents),
        "window": texts.length,
        "stride": texts.stride,
        "reference": reference,
        "models": list(_models(arguments, formats, reference, texts)),
    }


def _reference(arguments: argparse.Namespace) -> dict[str, str] | None:
    """Folder and format of the reference."""
    if arguments.reference is None:
        if arguments.reference_format is None:
            return None
        return {"folder": str(arguments.folder), "weight_format": arguments.reference_format}
    from chatglm_ov.runtime.loading import default_weight_format, weight_formats

    there = weight_formats(arguments.reference)
    chosen = next((name for name in REFERENCES if name in there), None) or default_weight_format(arguments.reference)
    return {"folder": str(arguments.reference), "weight_format": arguments.reference_format or chosen}


def _models(
    arguments: argparse.Namespace, formats: list[str], reference: dict[str, str] | None, texts: Windows
) -> Iterator[dict[str, Any]]:
    """The reference's own figures first, then those of each format."""
    from chatglm_ov.runtime.loading import load_model

    beside: CompiledModel | None = None
    base: dict[str, Any] | None = None
    if reference is not None:
        beside = load_model(reference["folder"], reference["weight_format"], "f32")
        base = _figures(beside, None, texts, "reference")
        yield base
    for name in formats:
        model = load_model(
            arguments.folder,
            name,
            kv_cache_format=arguments.kv_cache_format,
            activation_bits=arguments.activation_bits,
        )
        found = _figures(model, beside, texts, _label(model, arguments))
        if base is not None:
            found["perplexity_change"] = found["perplexity"] / base["perplexity"] - 1
        yield found


def _label(model: CompiledModel, arguments: argparse.Namespace) -> str:
    parts = [model.weight_format]
    # Fused operations that were unpacked to stock ones have no such choice.
    if arguments.activation_bits == 8 and model.weight_format in ("int8", "int4") and model.ops == "fused":
        parts.append("8-bit activations")
    if arguments.kv_cache_format is not None:
        parts.append(f"{arguments.kv_cache_format} cache")
    return ", ".join(parts)


def _figures(model: CompiledModel, reference: CompiledModel | None, texts: Windows, label: str) -> dict[str, Any]:
    from tqdm import tqdm

    from chatglm_ov.evaluation.run import evaluate
    from chatglm_ov.evaluation.windows import scored_tokens

    with tqdm(total=scored_tokens(list(texts.documents)), unit="token", desc=label) as bar:
        scores = evaluate(model, reference, texts, lambda count: bar.update(count))
    if isnan(scores.nll):
        log.warning("%s: logits are not numbers", label)
    compared = reference is not None
    return {
        "label": label,
        "weight_format": model.weight_format,
        "kv_cache_format": model.kv_cache_format,
        "perplexity": scores.perplexity,
        "perplexity_change": None,
        "right": scores.right / scores.tokens,
        "agreement": scores.agreed / scores.tokens if compared else None,
        "divergence": scores.divergence / scores.tokens if compared else None,
    }


def _for_json(model: dict[str, Any]) -> dict[str, Any]:
    """The figures of a model; JSON has no other word than null for what is not finite."""
    return {name: None if isinstance(value, float) and not isfinite(value) else value for name, value in model.items()}


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    def shown(value: float | None, text: str) -> str:
        return "-" if value is None else text.format(value)

    return (
        model["label"],
        f"{model['perplexity']:.3f}",
        shown(model["perplexity_change"], "{:+.2%}"),
        shown(model["agreement"], "{:.2%}"),
        shown(model["divergence"], "{:.5f}"),
    )
