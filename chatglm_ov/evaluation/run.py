"""Models side by side over the same windows: no more than one chunk of logits of each is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from chatglm_ov.documents import Document
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.evaluation.scores import Scores, log_probabilities
from chatglm_ov.evaluation.windows import Window, check_room, windows
from chatglm_ov.models import architecture
from chatglm_ov.runtime.loading import CompiledModel
from chatglm_ov.runtime.request import Request

CHUNK = 64
"""Tokens of a call: their logits in float64 are 33 MB for 65024 rows."""

Report = Callable[[int], None]
"""Called with the number of tokens that were scored since the last call."""


@dataclass(frozen=True)
class Windows:
    """The windows of all documents. length and stride in tokens."""

    documents: Sequence[Document]
    length: int
    stride: int

    def __iter__(self) -> Iterator[Window]:
        for document in self.documents:
            yield from windows(document, self.length, self.stride)


def evaluate(model: CompiledModel, reference: CompiledModel | None, texts: Windows, report: Report) -> Scores:
    """Scores of the model, with agreement and divergence where there is a reference. Raises ChatGLMError for windows
    that a model has no positions for, tokens that it has not, and models of different vocabularies."""
    models = [model] if reference is None else [model, reference]
    _check(models, texts)
    requests = [each.create_request() for each in models]
    scores = Scores()
    for window in texts:
        for targets, logits in _together(requests, window):
            others = log_probabilities(logits[1]) if reference is not None else None
            scores.add(logits[0], targets, others)
            report(len(targets))
    return scores


def _check(models: Sequence[CompiledModel], texts: Windows) -> None:
    for document in texts.documents:
        check_room(document, texts.length, texts.stride)
    rows = {model.config.vocab_rows for model in models}
    if len(rows) > 1:
        raise ChatGLMError("eval", "reference", f"a model of {max(rows)} and {min(rows)} tokens", "the same vocabulary")
    for model in models:
        limit = model.config.max_positions
        if limit is not None and texts.length > limit:
            raise ChatGLMError("eval", "window", texts.length, f"at most {limit} ({model.config.positions_field})")


def _together(requests: Sequence[Request], window: Window) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """For each chunk with something to score: the ids that came, [N], and each model's logits before them, [N, V]."""
    ids, scored = window.ids, window.scored
    first = len(ids) - scored - 1  # its logits predict the first id to be scored
    streams = [_logits(request, ids[:-1], first) for request in requests]
    for parts in zip(*streams, strict=True):
        start, count = parts[0][0], len(parts[0][1])
        yield ids[start + 1 : start + 1 + count], [logits for _, logits in parts]


def _logits(request: Request, ids: np.ndarray, first: int) -> Iterator[tuple[int, np.ndarray]]:
    """Place and logits [n, V] of the positions from `first` on, chunk by chunk, in a fresh sequence."""
    request.reset()
    config, module = request.config, architecture(request.config)
    batch, mask = ids[None], np.ones((1, len(ids)), np.int64)
    positions = module.position_ids(config, batch, mask)
    prefix = module.prefix_length(config, batch, mask)
    row = np.zeros(1, np.int32)
    # What is given must be in one call in ChatGLM-6B, whose columns see each other.
    begin, end = 0, min(len(ids), max(CHUNK, first + 1))
    while begin < end:
        kept = end - max(begin, first)
        columns = slice(begin, end)
        logits = request.infer(batch[:, columns], mask[:, :end], positions[..., columns], row, kept, prefix)
        yield end - kept, logits[0]
        begin, end = end, min(len(ids), end + CHUNK)
