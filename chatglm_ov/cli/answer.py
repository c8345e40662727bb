"""One answer of a model, with the time it took: what `generate`, `chat`, `demo` and tools/test_chatglm.py do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from chatglm_ov.chat import chat_format_for
from chatglm_ov.generation.timing import Stopwatch, Timing
from chatglm_ov.modeling import OVChatGLMForCausalLM
from chatglm_ov.tokenizer import TextStream, load_tokenizer

DEFAULT_NEW_TOKENS = 512

Show = Callable[[str], None]
"""Called with all of an answer's text so far, again and again."""


@dataclass(frozen=True)
class Answer:
    text: str
    timing: Timing | None


def open_model(folder: Path, weight_format: str | None, inference_precision: str | None) -> tuple[Any, Any]:
    """Model and tokenizer of a converted folder."""
    logging.set_verbosity_error()
    model = OVChatGLMForCausalLM.from_pretrained(folder, weight_format, inference_precision)
    return model, load_tokenizer(folder)


def ask(model: Any, tokenizer: Any, query: str, show: Show | None = None, **options: Any) -> Answer:
    """Answer `query` in the model's chat format, without a history. `options` are those of `generate()`."""
    watch = Stopwatch()
    options |= new_tokens(model, options, lambda: chat_format_for(tokenizer).build_inputs(tokenizer, query))
    response: Any = ""
    if show is None:
        options["stopping_criteria"] = StoppingCriteriaList([watch])
        response, _ = model.chat(tokenizer, query, history=[], **options)
    else:
        for response, _ in stream(model, tokenizer, query, [], watch, **options):
            show(as_text(response))
    return Answer(as_text(response), watch.timing)


def stream(
    model: Any, tokenizer: Any, query: str, history: Sequence[Any], watch: Stopwatch, **options: Any
) -> Iterator[tuple[Any, list[Any]]]:
    """The growing answer to `query` after `history`, and the history with it. Closing the iterator ends the answer."""
    options |= new_tokens(model, options, lambda: chat_format_for(tokenizer).build_inputs(tokenizer, query, history))
    options["stopping_criteria"] = StoppingCriteriaList([watch])
    return model.stream_chat(tokenizer, query, history=list(history), **options)


def complete(model: Any, tokenizer: Any, prompt: str, show: Show | None = None, **options: Any) -> Answer:
    """Continue `prompt` itself, without any chat format."""
    watch = Stopwatch()
    inputs = tokenizer([prompt], return_tensors="pt")
    options |= new_tokens(model, options, lambda: inputs["input_ids"][0])
    if show is not None:
        options["streamer"] = GrowingText(tokenizer, show)
    criteria = StoppingCriteriaList([watch])
    ids = model.generate(**inputs, stopping_criteria=criteria, **options)[0, inputs["input_ids"].shape[1] :]
    return Answer(tokenizer.decode(ids, skip_special_tokens=True), watch.timing)


def new_tokens(model: Any, options: dict[str, Any], prompt: Callable[[], Sequence[int]]) -> dict[str, int]:
    """`max_new_tokens` where `options` lacks it: 512, or less if the model has no positions for so many."""
    if "max_new_tokens" in options:
        return {}
    limit = getattr(model.config, "max_position_embeddings", None)
    room = DEFAULT_NEW_TOKENS if limit is None else limit - len(prompt())
    return {"max_new_tokens": max(1, min(DEFAULT_NEW_TOKENS, room))}


def as_text(response: Any) -> str:
    """A response of `chat()` as text: a tool call, which is a dict, as JSON."""
    return response if isinstance(response, str) else json.dumps(response, ensure_ascii=False)


class GrowingText(BaseStreamer):
    """A streamer for `generate()` that shows the text so far, whole characters only."""

    def __init__(self, tokenizer: Any, show: Show):
        self._stream, self._show = TextStream(tokenizer, skip_special_tokens=True), show
        self._text: str | None = None

    def put(self, value: torch.Tensor) -> None:
        if self._text is None:  # the first call brings the prompt
            self._text = ""
            return
        self._text += self._stream.put(value.flatten().tolist())
        self._show(self._text)

    def end(self) -> None:
        self._text = (self._text or "") + self._stream.flush()
        self._show(self._text)
