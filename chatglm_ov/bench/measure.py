"""Times of a model through the public runtime, in turns with others.

A turn of a model: it is loaded, each case is run, it is released. So there is one model in memory at a time, and what
disturbs the machine disturbs all of them alike. In a case the prompt is run once untimed, then timed; then one token a
step, the first steps untimed. Only the calls of `Request.infer` are timed, not what makes their inputs.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil

from chatglm_ov.bench.limits import Limits
from chatglm_ov.bench.work import weight_bytes
from chatglm_ov.config import ArchitectureConfig, ChatGLMConfig
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.models import architecture
from chatglm_ov.native import unavailable
from chatglm_ov.runtime import CompiledModel, Request, load_model, read_ir
from chatglm_ov.weights.ir import IR_NAME

WARM_STEPS = 2
STEPS_AT_ONCE = 4
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
        option, least = ("--context", WARM_STEPS + steps + 2) if self.filled else ("--prompt-tokens", 1)
        if config.architecture == "chatglm" and not self.filled:
            least = 2  # [gMASK] <sop>
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
        properties: dict[str, Any] = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
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
    """Of one case, by round: seconds of the whole prompt and of each step, and the read bandwidth beside each step, the
    mean of what it was before and after it and its neighbours; no rounds where it cannot be measured."""

    prompt: list[float] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)
    read: list[list[float]] = field(default_factory=list)


@dataclass
class Record:
    """What is known of a variant. load: seconds from the folder to the end of the first inference, of one or two
    tokens. anonymous_*: bytes that the process had more when it was compiled, and after that inference."""

    variant: Variant
    cases: dict[Case, Times]
    weight_bytes: int = 0
    load: list[float] = field(default_factory=list)
    anonymous_compiled: list[int] = field(default_factory=list)
    anonymous_first: list[int] = field(default_factory=list)


def run_rounds(
    variants: Sequence[Variant],
    folders: dict[str, Path],
    cases: Sequence[Case],
    *,
    steps: int,
    rounds: int,
    threads: int | None,
    limits: Limits,
    report: Report,
) -> list[Record]:
    """Every variant has a turn in each round, in an order that is turned round each time; the limits are measured
    before, between and after the rounds, and the read bandwidth, which other users of the machine take their parts of,
    after every few steps."""
    records = [Record(variant, {case: Times() for case in cases}) for variant in variants]
    can_measure = unavailable() is None
    for i in range(rounds):
        if can_measure:
            limits.take()
        for record in records if i % 2 == 0 else reversed(records):
            read = limits.reader() if can_measure else None
            take_turn(record, folders[record.variant.ops], steps, threads, read, report)
    if can_measure:
        limits.take()
    return records


def take_turn(
    record: Record, folder: Path, steps: int, threads: int | None, read: ReadBandwidth | None, report: Report
) -> None:
    """Load the variant, add one sample of everything to the record, release it."""
    model = _timed_load(record, folder, threads)
    graph = read_ir(folder / record.variant.weight_format / IR_NAME)
    record.weight_bytes = weight_bytes(graph, model.config)
    for case, times in record.cases.items():
        run_case(model, case, steps, times, read)
        report(f"{record.variant.label}: {case.tokens} tokens, batch {case.batch}")


def _timed_load(record: Record, folder: Path, threads: int | None) -> CompiledModel:
    give_back_memory()
    before, start = anonymous_bytes(), perf_counter()
    model = record.variant.load(folder, threads)
    request = model.create_request()
    record.anonymous_compiled.append(anonymous_bytes() - before)
    tokens = Tokens(model.config, 1, [2], 0)
    tokens.feed(request, 0, 2)
    record.load.append(perf_counter() - start)
    record.anonymous_first.append(anonymous_bytes() - before)
    return model


def run_case(model: CompiledModel, case: Case, steps: int, times: Times, read: ReadBandwidth | None = None) -> None:
    """Adds one round to the times, in a new request."""
    calls = case.calls(steps)
    tokens = Tokens(model.config, case.batch, calls, WARM_STEPS + steps)
    request = model.create_request()
    if not case.filled:
        tokens.feed(request, 0, calls[0])
        request.reset()
    prompt, end = 0.0, 0
    for length in calls:
        prompt += tokens.feed(request, end, end + length)
        end += length
    times.prompt.append(prompt)

    def step(i: int) -> float:
        return tokens.feed(request, end + i, end + i + 1)

    for i in range(WARM_STEPS):
        step(i)
    _run_steps(lambda i: step(WARM_STEPS + i), steps, times, read)


def _run_steps(step: Callable[[int], float], steps: int, times: Times, read: ReadBandwidth | None) -> None:
    """Adds one round of steps to the times."""
    if read is None:
        times.steps.append([step(i) for i in range(steps)])
        return
    seconds: list[float] = []
    beside: list[float] = []
    before = read()
    for first in range(0, steps, STEPS_AT_ONCE):
        some = [step(i) for i in range(first, min(first + STEPS_AT_ONCE, steps))]
        after = read()
        seconds += some
        beside += [(before + after) / 2] * len(some)
        before = after
    times.steps.append(seconds)
    times.read.append(beside)


class Tokens:
    """Random token ids [B, N] for a prompt in `calls` and `following` steps, with the inputs that belong to them.

    The first call of ChatGLM-6B ends with [gMASK] <sop>, as a prompt of it does."""

    def __init__(self, config: ArchitectureConfig, batch: int, calls: Sequence[int], following: int):
        module = architecture(config)
        marks: list[int] = []
        if isinstance(config, ChatGLMConfig):
            marks = [config.gmask_token_id, config.bos_token_id, config.mask_token_id]
        ordinary = np.setdiff1d(np.arange(config.vocab_rows), marks)
        self.ids = np.random.default_rng(0).choice(ordinary, (batch, sum(calls) + following))
        if marks:
            self.ids[:, calls[0] - 2 : calls[0]] = marks[:2]
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


def anonymous_bytes() -> int:
    """Memory of this process without pages of mapped files; all of it where the system does not tell them apart."""
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)


def give_back_memory() -> None:
    """What was freed returns to the system (glibc), so that what is taken next shows in `anonymous_bytes`."""
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
