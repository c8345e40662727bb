"""Times of a model through the public runtime, in turns with others.

A turn: models are loaded, each case is run, they are released. In a case each model runs the prompt once untimed, then
timed; then all of them take one token a step, a few steps in turns, the first steps untimed: so what disturbs the
machine for longer than that disturbs all of them alike. Only the calls of `Request.infer` are timed, not what makes
their inputs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from chatglm_ov.bench.limits import Limits
from chatglm_ov.bench.work import weight_bytes
from chatglm_ov.config import ArchitectureConfig
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.models import architecture
from chatglm_ov.native import unavailable
from chatglm_ov.runtime.ir_reading import read_ir
from chatglm_ov.runtime.loading import CompiledModel, Request, load_model
from chatglm_ov.system.huge_pages import small_page_share
from chatglm_ov.system.memory import give_back, memory
from chatglm_ov.system.processors import THREADS
from chatglm_ov.weights.ir import IR_NAME, WEIGHTS_NAME

WARM_STEPS = 2
STEPS_AT_ONCE = 2
"""Steps between two measurements of the read bandwidth."""
CHUNK = 512
"""Tokens of a call while a long context is filled."""

Report = Callable[[str], None]
"""Called after each case with what was measured."""
ReadBandwidth = Callable[[], float]
"""Bytes that can be read from memory a second, measured at the call."""


@dataclass(frozen=True)
class Case:
    """`tokens` in each of `batch` rows: a prompt in one call with steps behind it, or (`filled`) a context that is
    filled in chunks and holds so many tokens at the last step."""

    tokens: int
    batch: int
    filled: bool = False

    def prompt_tokens(self, steps: int) -> int:
        return self.tokens - WARM_STEPS - steps if self.filled else self.tokens

    def calls(self, steps: int) -> list[int]:
        """Tokens of each call that together are the prompt."""
        length = self.prompt_tokens(steps)
        step = CHUNK if self.filled else length
        return [min(step, length - start) for start in range(0, length, step)]

    def check(self, config: ArchitectureConfig, steps: int) -> None:
        """Raises ChatGLMError where the model has no place for it."""
        option, least = "--prompt-tokens", max(1, len(config.prompt_end))
        if self.filled:
            option, least = "--context", WARM_STEPS + steps + 2
        more = 0 if self.filled else WARM_STEPS + steps
        limit = config.max_positions
        if self.tokens < least:
            raise ChatGLMError(option, "value", self.tokens, f"at least {least}")
        if limit is not None and self.tokens + more > limit:
            wanted = f"at most {limit - more} ({config.positions_field} {limit})"
            raise ChatGLMError(option, "value", self.tokens, wanted)


@dataclass(frozen=True)
class Variant:
    """One way to run the model. activation_bits: None where the lowering has no choice. hint: the inference precision
    that the plugin is told; None leaves it to it."""

    weight_format: str
    ops: str
    activation_bits: int | None = None
    kv_cache_format: str = "bf16"
    hint: str | None = None

    @property
    def label(self) -> str:
        parts = [self.weight_format]
        if self.activation_bits == 8:
            parts.append("8-bit activations")
        if self.kv_cache_format != "bf16":
            parts.append(f"{self.kv_cache_format} cache")
        if self.ops == "stock":
            parts.append("stock" if self.hint is None else f"stock, {self.hint} hint")
        return ", ".join(parts)

    def load(self, folder: Path, threads: int | None) -> CompiledModel:
        properties: dict[str, Any] = {} if threads is None else {THREADS: threads}
        # As a property the hint changes nothing else: no quantization of activations is switched off for f32.
        properties |= {} if self.hint is None else {"INFERENCE_PRECISION_HINT": self.hint}
        options: dict[str, Any] = {}
        if self.ops == "fused":
            options["kv_cache_format"] = self.kv_cache_format
            if self.activation_bits is not None:
                options["activation_bits"] = self.activation_bits
        return load_model(folder, self.weight_format, properties=properties, **options)


@dataclass
class Times:
    """Times of one case, by round: seconds of the whole prompt and of each step, and the read bandwidth beside each
    step, the mean of what it was before and after it and its neighbours; no rounds where it cannot be measured."""

    prompt: list[float] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)
    read: list[list[float]] = field(default_factory=list)


@dataclass
class Record:
    """What is known of a variant. load: seconds from the folder to the end of the first inference, of one or two
    tokens. anonymous_*: bytes that the process had more when it was compiled, and after that inference. small_pages:
    what part of weights that are used in the mapped file does not lie in huge pages, where that is known."""

    variant: Variant
    cases: dict[Case, Times]
    weight_bytes: int = 0
    load: list[float] = field(default_factory=list)
    anonymous_compiled: list[int] = field(default_factory=list)
    anonymous_first: list[int] = field(default_factory=list)
    small_pages: list[float] = field(default_factory=list)


def run_rounds(
    groups: Sequence[Sequence[Variant]],
    folders: dict[str, Path],
    cases: Sequence[Case],
    *,
    steps: int,
    rounds: int,
    threads: int | None,
    limits: Limits,
    report: Report,
) -> list[Record]:
    """Every group of variants, whose models are in memory together, has a turn in each round. The order of the groups,
    and that within them, is turned round each time. The limits are measured before, between and after the rounds, and
    the read bandwidth, which other users of the machine take their parts of, after every few steps."""
    turns = [[Record(variant, {case: Times() for case in cases}) for variant in group] for group in groups]
    can_measure = unavailable() is None
    for i in range(rounds):
        if can_measure:
            limits.take()
        order = 1 if i % 2 == 0 else -1
        for records in turns[::order]:
            read = limits.reader() if can_measure else None
            take_turn(records[::order], folders, steps, threads, read, report)
    if can_measure:
        limits.take()
    return [record for records in turns for record in records]


def take_turn(
    records: Sequence[Record],
    folders: dict[str, Path],
    steps: int,
    threads: int | None,
    read: ReadBandwidth | None,
    report: Report,
) -> None:
    """Load the variants, add one sample of everything to each record, release them."""
    models = []
    for record in records:
        folder = folders[record.variant.ops]
        models.append(_timed_load(record, folder, threads))
        graph = read_ir(folder / record.variant.weight_format / IR_NAME)
        record.weight_bytes = weight_bytes(graph, models[-1].config)
    for case in records[0].cases:
        runs = []
        for model, record in zip(models, records, strict=True):
            runs.append(CaseRun(model, case, steps, record.cases[case]))
            report(f"{record.variant.label}: {case.tokens} tokens, batch {case.batch}")
        run_steps(runs, steps, read)
    for record in records:
        weights = folders[record.variant.ops] / record.variant.weight_format / WEIGHTS_NAME
        if record.variant.ops == "fused" and (share := small_page_share(weights.resolve())) is not None:
            record.small_pages.append(share)


def _timed_load(record: Record, folder: Path, threads: int | None) -> CompiledModel:
    # What was freed goes back first, so that what is taken next shows.
    gc.collect()
    give_back()
    before, start = memory()[1], perf_counter()
    model = record.variant.load(folder, threads)
    request = model.create_request()
    record.anonymous_compiled.append(memory()[1] - before)
    tokens = Tokens(model.config, 1, [2], 0)
    tokens.feed(request, 0, 2)
    record.load.append(perf_counter() - start)
    record.anonymous_first.append(memory()[1] - before)
    return model


class CaseRun:
    """One round of a case, in a new request: the prompt is run and its time added to `times`; then one can go on."""

    def __init__(self, model: CompiledModel, case: Case, steps: int, times: Times):
        calls = case.calls(steps)
        self.times = times
        self._tokens = Tokens(model.config, case.batch, calls, WARM_STEPS + steps)
        self._request = model.create_request()
        self._end = 0
        if not case.filled:
            self._feed(calls[0])
            self._request.reset()
            self._end = 0
        times.prompt.append(sum(self._feed(length) for length in calls))

    def _feed(self, length: int) -> float:
        begin, self._end = self._end, self._end + length
        return self._tokens.feed(self._request, begin, self._end)

    def step(self) -> float:
        """Run one token; returns the seconds."""
        return self._feed(1)


def run_steps(runs: Sequence[CaseRun], steps: int, read: ReadBandwidth | None) -> None:
    """Adds one round of steps to the times of each run: a few of one, then of the next."""
    for run in runs:
        for _ in range(WARM_STEPS):
            run.step()
        run.times.steps.append([])
        if read is not None:
            run.times.read.append([])
    before = 0.0 if read is None else read()
    for first in range(0, steps, STEPS_AT_ONCE):
        for run in runs:
            some = [run.step() for _ in range(min(STEPS_AT_ONCE, steps - first))]
            run.times.steps[-1] += some
            if read is not None:
                after = read()
                run.times.read[-1] += [(before + after) / 2] * len(some)
                before = after


class Tokens:
    """Random token ids [B, N] for a prompt in `calls` and `following` steps, with the inputs that belong to them.

    The first call ends as a prompt of the model does."""

    def __init__(self, config: ArchitectureConfig, batch: int, calls: Sequence[int], following: int):
        module = architecture(config)
        ordinary = np.setdiff1d(np.arange(config.vocab_rows), config.position_marks)
        self.ids = np.random.default_rng(0).choice(ordinary, (batch, sum(calls) + following))
        self.ids[:, calls[0] - len(config.prompt_end) : calls[0]] = config.prompt_end
        self.mask = np.ones_like(self.ids)
        self.positions = module.position_ids(config, self.ids, self.mask)
        self.prefix = module.prefix_length(config, self.ids, self.mask)
        self.rows = np.arange(batch, dtype=np.int32)

    def feed(self, request: Request, begin: int, end: int) -> float:
        """Run the columns begin..end, those before being in the cache; returns the seconds."""
        ids, mask, positions = self.ids[:, begin:end], self.mask[:, :end], self.positions[..., begin:end]
        start = perf_counter()
        request.infer(ids, mask, positions, self.rows, 1, self.prefix)
        return perf_counter() - start
