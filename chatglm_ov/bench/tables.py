"""The report as tables for people to read: a title, the names of the columns, rows of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from chatglm_ov.system.sizes import size

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
NONE = "-"


def tables(report: dict[str, Any]) -> Iterator[Table]:
    """One a topic; a topic that has nothing to say is left out."""
    formats = report["weight_formats"]
    for title, header, row_lists in (
        ("Limits of this machine", ("measured with", "read GB/s", "bf16 TFLOP/s", "int8 TOP/s"), map(_limits, formats)),
        ("Loading", ("model", "weights", "to the first token", "anonymous", "with a cache"), map(_loading, formats)),
        ("Prompt", (*_CASE, "first token", "tokens/s", "TFLOP/s", "share", "of"), map(_prompts, formats)),
        ("Next tokens", (*_CASE, "a step", "tokens/s", "read a step", "GB/s", "share"), map(_steps, formats)),
        ("Times as fast as stock", (*_CASE, "prompt", "next tokens"), map(_ratios, formats)),
    ):
        rows = [row for found in row_lists for row in found]
        if rows:
            yield title, header, rows


def remarks(report: dict[str, Any]) -> Iterator[str]:
    """What must be known to trust the figures."""
    for found in report["weight_formats"]:
        name = found["weight_format"]
        if found["disturbed_rounds"]:
            rounds = ", ".join(str(i + 1) for i in found["disturbed_rounds"])
            yield f"{name}: a limit fell by more than a tenth around round {rounds}: something else was running."
        if (share := found["small_page_share"] or 0) > MANY_SMALL_PAGES:
            yield f"{name}: {share * 100:.0f} % of the mapped weights lie in small pages, which are read more slowly"
        for reason in found["left_out"]:
            yield f"{name}: {reason}"


MANY_SMALL_PAGES = 0.1
"""Of the mapped weights. A few there always are, where constants meet."""

_CASE = ("model", "tokens", "batch")


def _limits(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    if found["limits"] is None:
        return
    read, bf16, int8 = (found["limits"][name] for name in ("read", "bf16", "int8"))
    yield found["weight_format"], _spread(read, 1e9, 1), _spread(bf16, 1e12, 2), _spread(int8, 1e12, 2)


def _spread(values: dict[str, Any], unit: float, digits: int) -> str:
    low, high = (f"{values[name] / unit:.{digits}f}" for name in ("low", "high"))
    return f"{values['median'] / unit:.{digits}f} ({low} to {high})"


def _loading(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for model in found["models"]:
        compiled, first = (model[f"anonymous_bytes_{name}"]["median"] for name in ("compiled", "first"))
        seconds = f"{model['load_seconds']['median']:.2f} s"
        yield model["label"], size(model["weight_bytes"]), seconds, size(max(0, compiled)), size(max(0, first))


def _cases(found: dict[str, Any]) -> Iterator[tuple[tuple[str, str, str], dict[str, Any]]]:
    for model in found["models"]:
        for case in model["cases"]:
            yield _case(model["label"], case), case


def _case(label: str, case: dict[str, Any]) -> tuple[str, str, str]:
    kind = " context" if case["kind"] == "context" else ""
    return label, f"{case['tokens']}{kind}", str(case["batch"])


def _prompts(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for names, case in _cases(found):
        prompt = case["prompt"]
        rate, seconds = prompt["operations_per_second"], prompt["seconds"]["median"]
        share, peak = _share(prompt["share"]), NONE if prompt["share"] is None else f"{prompt['peak']} peak"
        yield *names, _time(seconds), f"{prompt['tokens_per_second']:.1f}", f"{rate / 1e12:.3f}", share, peak


def _steps(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for names, case in _cases(found):
        decode = case["decode"]
        rate, seconds = decode["bytes_per_second"], decode["seconds"]["median"]
        read, share = size(decode["bytes"]), _share(decode["share"])
        yield *names, _time(seconds), f"{decode['tokens_per_second']:.1f}", read, f"{rate / 1e9:.1f}", share


def _ratios(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for row in found["against_stock"]:
        yield *_case(row["label"], row), f"{row['prompt']:.2f}", f"{row['decode']:.2f}"


def _share(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.0f} %"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
