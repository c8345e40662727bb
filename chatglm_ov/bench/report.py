"""From times to figures: strings, numbers, lists and dicts only, for the JSON file, the tables and the picture.

Everything is in seconds, bytes and operations (2 a multiply-add). A figure of a step is the median of the rounds'
medians. The share of a prompt is of the median of the peaks that were measured between the same rounds; that of the
steps is the median of all steps' shares, each of the read bandwidth beside that step.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from chatglm_ov.bench.limits import Limits, disturbed_rounds, summary
from chatglm_ov.bench.measure import WARM_STEPS, Case, Record, Times, Variant
from chatglm_ov.bench.work import cache_bytes, prompt_operations
from chatglm_ov.config import ArchitectureConfig

Peak = tuple[str, str, float]
"""How it is called, the limit that it is made of, and the factor."""


def peak_of(variant: Variant, isa: str | None = None) -> Peak | None:
    """What a prompt is measured against. Weights of int8 and int4 take two int8 passes with 16-bit activations, but at
    the level avx2, whose limit is that of 16-bit products, one of those with any; the stock lowering multiplies in bf16
    at most that fast. There is no limit for f32."""
    if variant.weight_format == "f32" or variant.hint == "f32":
        return None
    if variant.weight_format == "bf16" or variant.ops == "stock":
        return "bf16", "bf16", 1.0
    if isa == "avx2":
        return "int16", "int8", 1.0
    return ("int8", "int8", 1.0) if variant.activation_bits == 8 else ("int8 / 2", "int8", 0.5)


def format_report(
    config: ArchitectureConfig,
    records: Sequence[Record],
    steps: int,
    limits: Limits,
    left_out: Sequence[str],
    isa: str | None = None,
) -> dict[str, Any]:
    """Figures of one weight format: limits, models, and how these compare with the stock lowering beside them.
    isa: the level of our kernels."""
    known = {name: summary(values) for name, values in limits.samples.items() if values}
    medians = {name: values["median"] for name, values in known.items()}
    models = [_model(config, record, steps, medians, isa) for record in records]
    return {
        "weight_format": records[0].variant.weight_format,
        "limits": known or None,
        "disturbed_rounds": disturbed_rounds(limits.samples) if known else [],
        "small_page_share": max((share for record in records for share in record.small_pages), default=None),
        "models": models,
        "left_out": list(left_out),
        "against_stock": _against_stock(models),
    }


def _model(
    config: ArchitectureConfig, record: Record, steps: int, limits: dict[str, float], isa: str | None
) -> dict[str, Any]:
    variant = record.variant
    return {
        "label": variant.label,
        "ops": variant.ops,
        "weight_format": variant.weight_format,
        "activation_bits": variant.activation_bits,
        "kv_cache_format": variant.kv_cache_format,
        "hint": variant.hint,
        "weight_bytes": record.weight_bytes,
        "load_seconds": summary(record.load),
        "anonymous_bytes_compiled": summary(record.anonymous_compiled),
        "anonymous_bytes_first": summary(record.anonymous_first),
        "cases": [_case(config, record, case, times, steps, limits, isa) for case, times in record.cases.items()],
    }


def _case(
    config: ArchitectureConfig,
    record: Record,
    case: Case,
    times: Times,
    steps: int,
    limits: dict[str, float],
    isa: str | None,
) -> dict[str, Any]:
    return {
        "kind": "context" if case.filled else "prompt",
        "tokens": case.tokens,
        "batch": case.batch,
        "prompt": _prompt(config, record.variant, case, times, steps, limits, peak_of(record.variant, isa)),
        "decode": _decode(config, record, case, times, steps),
    }


def _prompt(
    config: ArchitectureConfig,
    variant: Variant,
    case: Case,
    times: Times,
    steps: int,
    limits: dict[str, float],
    peak: Peak | None,
) -> dict[str, Any]:
    length = case.prompt_tokens(steps)
    operations, seconds = prompt_operations(config, length, case.batch, variant.ops), summary(times.prompt)
    rate = operations / seconds["median"]
    most = None if peak is None or peak[1] not in limits else limits[peak[1]] * peak[2]
    return {
        "tokens": length,
        "calls": len(case.calls(steps)),
        "seconds": seconds,
        "tokens_per_second": length * case.batch / seconds["median"],
        "operations": operations,
        "operations_per_second": rate,
        "peak": None if peak is None else peak[0],
        "peak_operations_per_second": most,
        "share": None if most is None else rate / most,
    }


def _decode(config: ArchitectureConfig, record: Record, case: Case, times: Times, steps: int) -> dict[str, Any]:
    last = case.tokens if case.filled else case.tokens + steps + WARM_STEPS
    cached = last - (steps - 1) / 2
    in_cache = cache_bytes(config, record.variant.kv_cache_format, cached, case.batch)
    seconds = summary([median(samples) for samples in times.steps])
    nbytes = record.weight_bytes + in_cache
    beside = [read for reads in times.read for read in reads]
    every_step = [step for steps_of_round in times.steps for step in steps_of_round]
    shares = [nbytes / (step * read) for step, read in zip(every_step, beside, strict=bool(beside))]
    return {
        "cached_tokens": cached,
        "seconds": seconds | {"steps": times.steps},
        "tokens_per_second": case.batch / seconds["median"],
        "cache_bytes": in_cache,
        "bytes": nbytes,
        "bytes_per_second": nbytes / seconds["median"],
        "limit_bytes_per_second": median(beside) if beside else None,
        "limit_samples": times.read,
        "share": median(shares) if shares else None,
    }


def _against_stock(models: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each model and case that was not run as a rival: how many times as fast as the better of the rivals."""
    rivals = [model for model in models if model["hint"] is not None]
    if not rivals:
        return []
    return [
        {
            "label": model["label"],
            **{name: case[name] for name in ("kind", "tokens", "batch")},
            **{phase: _ratio(case, [rival["cases"][i] for rival in rivals], phase) for phase in ("prompt", "decode")},
        }
        for model in models
        if model["hint"] is None
        for i, case in enumerate(model["cases"])
    ]


def _ratio(case: dict[str, Any], rivals: Sequence[dict[str, Any]], phase: str) -> float:
    return min(rival[phase]["seconds"]["median"] for rival in rivals) / case[phase]["seconds"]["median"]
