"""The report as bars: next tokens beside what the memory could deliver, prompts beside the peak of the arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from chatglm_ov.errors import ChatGLMError

SUFFIXES = (".png", ".svg")
OURS, STOCK, LIMIT = "#1f77b4", "#c7c7c7", "#d62728"

Value = Callable[[dict[str, Any]], float]
Limit = Callable[[dict[str, Any]], "float | None"]


def check(file: Path) -> None:
    """Raises ChatGLMError where no picture could be drawn or written."""
    if file.suffix.lower() not in SUFFIXES:
        raise ChatGLMError("--picture", "file", file.name, f"a name ending in {' or '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise ChatGLMError("--picture", "matplotlib", "missing", "pip install 'chatglm-ov[bench]'")


def draw(report: dict[str, Any], file: Path) -> None:
    """A row of two plots for every case of the smallest batch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = shown_cases(report)
    figure = Figure(figsize=(11, 1 + 3 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{report['model']['name']}: {report['machine']['cpu']}, {report['threads']} threads", fontsize=11)
    plots = figure.subplots(len(cases), 2, squeeze=False)
    for (decode, prompt), case in zip(plots, cases, strict=True):
        kind, tokens, batch = case
        steps = f"{tokens} tokens in the cache" if kind == "context" else f"after a prompt of {tokens} tokens"
        _bars(decode, report, case, _tokens_per_second, _most_tokens_per_second)
        decode.set_title(f"next tokens, {steps}, batch {batch}", fontsize=10)
        decode.set_ylabel("tokens/s")
        _bars(prompt, report, case, _prompt_tokens_per_second, _most_prompt_tokens_per_second)
        prompt.set_title(
            f"{'filling' if kind == 'context' else 'prompt of'} {tokens} tokens, batch {batch}", fontsize=10
        )
        prompt.set_ylabel("tokens/s")
    names = plots[0][0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=len(names[0]), fontsize=9, frameon=False)
    figure.savefig(file, dpi=150)


def shown_cases(report: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Kind, tokens and batch of each case of the smallest batch; the others are in the JSON and the tables."""
    cases = report["weight_formats"][0]["models"][0]["cases"]
    least = min(case["batch"] for case in cases)
    return [(case["kind"], case["tokens"], case["batch"]) for case in cases if case["batch"] == least]


def _tokens_per_second(case: dict[str, Any]) -> float:
    return case["decode"]["tokens_per_second"]


def _most_tokens_per_second(case: dict[str, Any]) -> float | None:
    limit = case["decode"]["limit_bytes_per_second"]
    return None if limit is None else limit / case["decode"]["bytes"] * case["batch"]


def _prompt_tokens_per_second(case: dict[str, Any]) -> float:
    return case["prompt"]["tokens_per_second"]


def _most_prompt_tokens_per_second(case: dict[str, Any]) -> float | None:
    share = case["prompt"]["share"]
    return None if share is None else _prompt_tokens_per_second(case) / share


def _bars(plot: Any, report: dict[str, Any], case: tuple[str, int, int], value: Value, limit: Limit) -> None:
    """A group for each model that is ours: its limit, its bar, and the better of the stock ones beside it."""
    names = []
    for i, (label, ours, rivals) in enumerate(_groups(report, case)):
        first = i == 0
        _bar(plot, i - 0.2 if rivals else i, value(ours), OURS, "chatglm_ov" if first else None)
        if rivals:
            best = max(value(rival) for rival in rivals)
            _bar(plot, i + 0.2, best, STOCK, "stock OpenVINO, the better hint" if first else None)
        if (most := limit(ours)) is not None:
            name = "limit, measured in the same run" if first else None
            plot.hlines(most, i - 0.42, i + 0.42, colors=LIMIT, label=name)
        names.append(label.replace(", ", "\n"))
    plot.set_xticks(range(len(names)), names, fontsize=8)
    plot.margins(y=0.1)
    plot.spines[["top", "right"]].set_visible(False)


def _bar(plot: Any, place: float, height: float, colour: str, label: str | None) -> None:
    bars = plot.bar(place, height, 0.38, color=colour, label=label)
    # A bar that nearly reaches its limit has the line of that where its number stands.
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    number = f"{height:,.0f}" if height >= 100 else f"{height:.3g}"
    plot.bar_label(bars, [number], fontsize=8, padding=3, bbox=ground, zorder=3)


def _groups(
    report: dict[str, Any], wanted: tuple[str, int, int]
) -> Iterator[tuple[str, dict[str, Any], Sequence[dict[str, Any]]]]:
    """Label, case of our model, cases of its rivals."""
    for found in report["weight_formats"]:
        of_case = {
            model["label"]: (model, case)
            for model in found["models"]
            for case in model["cases"]
            if (case["kind"], case["tokens"], case["batch"]) == wanted
        }
        rivals = [case for model, case in of_case.values() if model["hint"] is not None]
        for label, (model, case) in of_case.items():
            if model["hint"] is None:
                yield label, case, rivals
