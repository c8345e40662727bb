"""One answer of a model, with the time it took: what `generate`, `chat`, `demo` and tools/test_chatglm.py do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from chatglm_ov.chat import chat_format_for
from chatglm_ov.chat.roles import RolesFormat
from chatglm_ov.cli.options import warn_of_idle_activation_bits
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.generation.chat import ONE_ANSWER, as_list
from chatglm_ov.generation.stop_strings import StopStrings
from chatglm_ov.generation.timing import Stopwatch, Timing
from chatglm_ov.modeling import OVChatGLMForCausalLM
from chatglm_ov.native import native, unavailable
from chatglm_ov.system.processors import THREADS
from chatglm_ov.tokenizer import TextStream, load_tokenizer

DEFAULT_NEW_TOKENS = 512
_USUAL_LENGTH = 8192
"""Of the originals' chat, prompt and answer together."""

Show = Callable[[str], None]
"""Called with all of an answer's text so far, again and again."""


@dataclass(frozen=True)
class Answer:
    """figures: what it took, in a line; "" without a token. cut: why it is not complete; "" if it is."""

    text: str
    timing: Timing | None
    figures: str = ""
    cut: str = ""


def open_model(folder: Path, weight_format: str | None, **options: Any) -> tuple[Any, Any]:
    """Model, ready for its first answer, and tokenizer of a converted folder. `options` are those of
    `from_pretrained()`."""
    logging.set_verbosity_error()
    model = OVChatGLMForCausalLM.from_pretrained(folder, weight_format, **options)
    warn_of_idle_activation_bits([options.get("activation_bits", 16)], [model.compiled.weight_format])
    model.compiled.warm_up()
    return model, load_tokenizer(folder)


def running(model: Any) -> str:
    """What answers: weights, operations, cache and threads, in a line."""
    compiled = model.compiled
    if compiled.ops == "fused":
        operations = f"fused operations ({native().isa()})"
    else:
        faster = unavailable() is None and "CPU" in compiled.compiled.get_property("EXECUTION_DEVICES")
        operations = "stock operations" + ", though fused ones can run here: convert without --ops stock" * faster
    threads = compiled.compiled.get_property(THREADS)
    return f"{compiled.weight_format}, {compiled.kv_cache_format} cache, {threads} threads, {operations}"


def assistant_options(folder: Path | None, properties: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate()` for the assistant in a converted folder, which is run with these properties."""
    return {} if folder is None else {"assistant_model": open_model(folder, None, properties=properties)[0]}


def beginning(tokenizer: Any, system: str | None) -> list[dict[str, str]]:
    """The history of a conversation in which nothing was said. Raises ChatGLMError where a chat format has no room for
    the system text."""
    if system is None:
        return []
    chat_format = chat_format_for(tokenizer)
    if not isinstance(chat_format, RolesFormat):
        wanted = f"none: the chat format of {chat_format.name} has no system role"
        raise ChatGLMError("--system", "value", "given", wanted)
    return [{"role": "system", "content": system}]


def default_new_tokens(tokenizer: Any) -> int:
    """The most tokens of an answer. A format with more room than the others thinks before it answers: it gets all."""
    length = chat_format_for(tokenizer).defaults.max_length
    return length if length > _USUAL_LENGTH else DEFAULT_NEW_TOKENS


def figures(timing: Timing | None, model: Any) -> str:
    """What the model's latest answer took; "" if there was no token."""
    if timing is None:
        return ""
    reused, told = getattr(model, "reused_tokens", 0), getattr(model, "speculation", None)
    parts = [str(timing), f"{reused} prompt tokens reused" if reused else "", "" if told is None else str(told)]
    return "; ".join(part for part in parts if part)


def cut_short(model: Any, watch: Stopwatch, most: int, ends: Sequence[int]) -> str:
    """Why an answer stopped before the model ended it, in a line; "" if it did. most: tokens that it could have."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if watch.timing is None or watch.last_id in ends:
        return ""
    if limit is not None and watch.length >= limit:
        return f"cut: the model has {limit} positions"
    return f"cut after {most} tokens: --max-new-tokens allows more" if watch.timing.tokens >= most else ""


class PromptBar:
    """A `prompt_progress` for `generate()`: shows on a terminal how much of a long prompt is done, and vanishes."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None and done < total and sys.stderr.isatty():
            self._bar = tqdm(total=total, desc="prompt", unit="token", leave=False)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            if done == total:
                self._bar.close()
                self._bar = None


def ask(
    model: Any, tokenizer: Any, query: str, show: Show | None = None, history: Sequence = (), **options: Any
) -> Answer:
    """Answer `query` in the model's chat format, after `history`. `options` are those of `generate()`."""
    watch, before = Stopwatch(), list(history)
    # The original answers here as well, for comparison.
    chat = chat_format_for(tokenizer) if isinstance(model, OVChatGLMForCausalLM) else None
    most = default_new_tokens(tokenizer) if chat else DEFAULT_NEW_TOKENS
    options = {"max_new_tokens": most, **options, "stopping_criteria": StoppingCriteriaList([watch])}
    response: Any = ""
    after: list = []
    if show is None:
        response, after = model.chat(tokenizer, query, history=before, **options)
    else:
        for response, after in model.stream_chat(tokenizer, query, history=before, **options):
            show(chat.stable_response(as_text(response, after)) if chat else as_text(response, after))
    cut = ""
    if chat:
        ends = model.stop_ids(chat, tokenizer, options)
        cut = cut_short(model, watch, options["max_new_tokens"], ends)
    return Answer(as_text(response, after), watch.timing, figures(watch.timing, model), cut)


def complete(model: Any, tokenizer: Any, prompt: str, show: Show | None = None, **options: Any) -> Answer:
    """Continue `prompt` itself, without any chat format."""
    watch = Stopwatch()
    inputs = tokenizer([prompt], return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    room = getattr(model.config, "max_position_embeddings", length + DEFAULT_NEW_TOKENS) - length
    options = {"max_new_tokens": max(1, min(DEFAULT_NEW_TOKENS, room)), **ONE_ANSWER, **options}
    texts = options.get("stop_strings")
    stops = StopStrings(model.generation_config.stop_strings if texts is None else texts)
    options["stop_strings"] = None  # for which generate() would want a tokenizer
    criteria = StoppingCriteriaList([watch, *stops.criteria(tokenizer, length)])
    if show is not None:
        options["streamer"] = GrowingText(tokenizer, lambda text: show(stops.stable_output(text)))
    ids = model.generate(**inputs, stopping_criteria=criteria, **options)[0, length:]
    text = stops.cut(tokenizer.decode(ids, skip_special_tokens=True))
    cut = cut_short(model, watch, options["max_new_tokens"], as_list(model.generation_config.eos_token_id))
    return Answer(text, watch.timing, figures(watch.timing, model), cut)


def as_text(response: Any, history: Sequence = ()) -> str:
    """What `chat()` returned, as it was written: tool calls are dicts, thinking is in the last message
    of the history."""
    if not isinstance(response, str):
        content = response.get("content")
        if content is None:
            content = json.dumps(response["parameters"], ensure_ascii=False)
        response = f"{response['name']}\n{content}"
    thinking = history[-1].get("thinking") if history and isinstance(history[-1], dict) else None
    if thinking is None:
        return response
    return f"<think>\n{thinking}" + (f"\n</think>\n\n{response}" if response else "")


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
