"""A whole measurement: one weight format after the other, ours and its rivals in turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from chatglm_ov.bench.limits import Limits
from chatglm_ov.bench.measure import Case, Variant, run_rounds
from chatglm_ov.bench.models import Source, check_disk, converted
from chatglm_ov.bench.report import format_report
from chatglm_ov.bench.work import cache_bytes
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.native import native, unavailable
from chatglm_ov.system.memory import available
from chatglm_ov.system.sizes import size
from chatglm_ov.weights.ir import WEIGHTS_NAME

HINTS = ("bf16", "f32")
"""Inference precisions that the stock lowering is given; which of them is faster depends on machine and step."""
INTEGER_FORMATS = ("int8", "int4")
SPARE_BYTES = 1_000_000_000
"""Memory of a model beside its weights, of which stock operations make a copy, and its cache."""


@dataclass(frozen=True)
class Session:
    """What is measured, and how.

    ops: the lowering of our models. activation_bits: of integer weights, one model each; empty for the default.
    new_tokens: timed steps of a case. threads: None for what OpenVINO takes. compare: stock rivals beside each
    format. place: folder for the temporary one, None for the system's.
    """

    source: Source
    ops: str
    weight_formats: Sequence[str]
    cases: Sequence[Case]
    activation_bits: Sequence[int] = ()
    kv_cache_format: str = "bf16"
    new_tokens: int = 16
    rounds: int = 3
    threads: int | None = None
    compare: bool = False
    place: Path | None = None

    @property
    def lowerings(self) -> list[str]:
        return list(dict.fromkeys((self.ops, "stock") if self.compare else (self.ops,)))

    def check(self) -> None:
        """Raises ChatGLMError for what would fail later."""
        for case in self.cases:
            case.check(self.source.config, self.new_tokens)
        if self.ops == "stock" and self.activation_bits:
            raise ChatGLMError("--activation-bits", "ops", "stock", "fused with it")
        if self.ops == "stock" and self.kv_cache_format != "bf16":
            raise ChatGLMError("--kv-cache-format", "ops", "stock", "fused with it")
        check_disk(self.source, self.weight_formats, self.lowerings, self.place)

    def variants(self, weight_format: str) -> list[Variant]:
        """Our models of a format, then their rivals."""
        ours: list[Variant]
        if self.ops == "stock":
            ours = [Variant(weight_format, "stock")]
        elif weight_format in INTEGER_FORMATS:
            bits = dict.fromkeys(self.activation_bits or (16,))
            ours = [Variant(weight_format, self.ops, b, self.kv_cache_format) for b in bits]
        else:
            ours = [Variant(weight_format, self.ops, None, self.kv_cache_format)]
        rivals = [Variant(weight_format, "stock", hint=hint) for hint in HINTS]
        return ours + rivals if self.compare else ours

    def run(self, used_threads: int) -> Iterator[dict[str, Any]]:
        """The report of each weight format. used_threads: what the models will run with."""
        for weight_format in self.weight_formats:
            with converted(self.source, weight_format, self.lowerings, self.place) as folders:
                yield self._measure(weight_format, folders, Limits(used_threads))

    def _measure(self, weight_format: str, folders: dict[str, Path], limits: Limits) -> dict[str, Any]:
        variants = self.variants(weight_format)
        left_out = list(self._too_large(variants, folders))
        fitting = [variant for variant in variants if not any(variant is rival for rival, _ in left_out)]
        with tqdm(total=self.rounds * len(fitting) * len(self.cases), desc="measure", unit="case") as bar:

            def report(done: str) -> None:
                bar.set_postfix_str(done, refresh=False)
                bar.update()

            records = run_rounds(
                [fitting] if self._fit_together(fitting, folders) else [[variant] for variant in fitting],
                folders,
                self.cases,
                steps=self.new_tokens,
                rounds=self.rounds,
                threads=self.threads,
                limits=limits,
                report=report,
            )
        reasons = [f"{variant.label} left out, {reason}" for variant, reason in left_out]
        isa = native().isa() if unavailable() is None else None
        return format_report(self.source.config, records, self.new_tokens, limits, reasons, isa)

    def _needed(self, variant: Variant, folders: dict[str, Path]) -> int:
        """Memory of a model. Fused operations use the weights where the file is mapped. A cache has up to twice the
        room that it needs."""
        file = folders[variant.ops] / variant.weight_format / WEIGHTS_NAME
        caches = (cache_bytes(self.source.config, variant.kv_cache_format, c.tokens, c.batch) for c in self.cases)
        return file.stat().st_size + SPARE_BYTES + int(2 * max(caches))

    def _fit_together(self, variants: Sequence[Variant], folders: dict[str, Path]) -> bool:
        """Whether the models can be in memory all at once."""
        return sum(self._needed(variant, folders) for variant in variants) <= available()

    def _too_large(self, variants: Sequence[Variant], folders: dict[str, Path]) -> Iterator[tuple[Variant, str]]:
        """Rivals for which there is not enough memory, and why."""
        free = available()
        for variant in variants:
            needed = self._needed(variant, folders)
            if variant.hint is not None and free < needed:
                yield variant, f"{size(free)} of memory free, {size(needed)} needed"
