"""`chat()` and `stream_chat()`, named and used as those of the original models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from chatglm_ov.chat import ChatFormat, chat_format_for
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.generation.cache import Session, StateCache
from chatglm_ov.generation.stop_strings import StopStrings
from chatglm_ov.generation.stream import stream_tokens
from chatglm_ov.tokenizer import TextStream

ONE_ANSWER = {"num_return_sequences": 1, "return_dict_in_generate": False}


class ChatMixin:
    """Conversations over a model with `generate` and `config` (see OVChatGLMForCausalLM).

    `history` and the history returned are a list of (query, answer) pairs for ChatGLM-6B and ChatGLM2, of messages
    `{"role", "content", ...}` for ChatGLM3 and all later ones; the argument itself is not changed. `options` go to
    `generate()`; those of the original chat (sampling with its top_p and temperature, max_length counting the
    prompt too) hold unless told otherwise. `max_new_tokens` counts the answer alone. `stop_strings`, a text or several,
    end an answer and are no part of it. What a prompt has in common with
    the sequence that is in the model, such as the turns before it, is not computed again (`reuse_cache`): a
    `past_key_values` that `stream_chat()` returned is taken, and makes no difference. `temperature` 0 is greedy.
    """

    config: Any
    session: Session
    generation_config: Any

    def chat(
        self, tokenizer: Any, query: str, history: Sequence | None = None, role: str = "user", **options: Any
    ) -> tuple[Any, list]:
        """(answer, history with this round). The answer is text, for a tool call a dict with `name`."""
        chat, ids = _prompt(tokenizer, query, history, role)
        stops, ends, settings = self._arguments(chat, tokenizer, len(ids), options)
        output = self.generate(torch.tensor([ids]), **settings)  # type: ignore[attr-defined]
        return chat.answer(tokenizer, output[0, len(ids) :].tolist(), query, history, role, stops, ends.cut)

    def stream_chat(
        self,
        tokenizer: Any,
        query: str,
        history: Sequence | None = None,
        role: str = "user",
        return_past_key_values: bool = False,
        **options: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """Iterator over the growing answer: each item is what `chat()` would return if the answer ended there,
        the last one what it does return; with `return_past_key_values` the handle of the cache is its third part.
        Characters come whole. A model that thinks first has the last message's `thinking` growing while the answer is
        "". Closing the iterator ends the answer."""
        chat, ids = _prompt(tokenizer, query, history, role)
        stops, ends, settings = self._arguments(chat, tokenizer, len(ids), options)
        stream = TextStream(tokenizer)

        handles: list[StateCache] = []

        def keep_handle() -> None:
            handles[:] = [self.session.latest()]

        def told_so_far(answer: str) -> tuple[Any, ...]:
            item = chat.process_response(answer, query, history, role)
            return (*item, *handles) if return_past_key_values else item

        def answers() -> Iterator[tuple[Any, ...]]:
            text, told = "", None
            made = stream_tokens(self, torch.tensor([ids]), on_token=keep_handle, **settings)
            with closing(made) as tokens:  # type: ignore[type-var]
                for token in tokens:
                    text += "" if token in stops else stream.put(token)
                    certain = ends.stable_output(chat.stable_output(text))
                    if certain and certain != told:
                        yield told_so_far(certain)
                        told = certain
            text = ends.cut(text + stream.flush())
            if text != told:
                yield told_so_far(text)

        return answers()

    def _arguments(
        self, chat: ChatFormat, tokenizer: Any, prompt: int, options: dict[str, Any]
    ) -> tuple[list[int], StopStrings, dict[str, Any]]:
        """What ends an answer to a prompt of so many tokens, ids and texts, and the arguments of generate() for it."""
        stops, ends = self.stop_ids(chat, tokenizer, options), self.stop_texts(chat, options)
        settings = _settings(chat, prompt, {**options, "eos_token_id": stops}, self.config)
        return stops, ends, settings | _stopping(ends.criteria(tokenizer, prompt), settings)

    def stop_ids(self, chat: ChatFormat, tokenizer: Any, options: dict[str, Any]) -> list[int]:
        """What ends an answer: `eos_token_id` of the options; without it the tokens of the chat format, of the options'
        generation_config or generation_config.json, and of config.json together."""
        if options.get("eos_token_id") is not None:
            return as_list(options["eos_token_id"])
        config = options.get("generation_config") or self.generation_config
        ends = [chat.stop_token_ids(tokenizer), config.eos_token_id, self.config.eos_token_id]
        return list(dict.fromkeys(index for end in ends for index in as_list(end)))

    def stop_texts(self, chat: ChatFormat, options: dict[str, Any]) -> StopStrings:
        """`stop_strings` of the options, else those of their generation_config, else those of the model's."""
        told = [options.get("stop_strings"), getattr(options.get("generation_config"), "stop_strings", None)]
        texts = next((texts for texts in told if texts is not None), self.generation_config.stop_strings)
        return StopStrings(texts, chat.split_answer)


def as_list(ids: Any) -> list[int]:
    """`eos_token_id` of a config: None, one id or several."""
    return [] if ids is None else torch.as_tensor(ids).flatten().tolist()


def _prompt(tokenizer: Any, query: str, history: Sequence | None, role: str) -> tuple[ChatFormat, list[int]]:
    chat = chat_format_for(tokenizer)
    return chat, chat.build_inputs(tokenizer, query, history, role)


def _stopping(criteria: list[StoppingCriteria], settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of generate() with which these end an answer. Never `stop_strings`, for which it wants a tokenizer."""
    every = [*settings.get("stopping_criteria", ()), *criteria]
    return {"stop_strings": None, **({"stopping_criteria": StoppingCriteriaList(every)} if every else {})}


def _settings(chat: ChatFormat, prompt: int, options: dict[str, Any], config: Any) -> dict[str, Any]:
    """Arguments of generate() for a prompt of that many tokens: the original's defaults under `options`, which may have
    a generation_config, and an end that the positions of the model allow."""
    _check(options)
    given = {name: value for name, value in options.items() if value is not None}
    told = _of_config(given.get("generation_config"))
    given = _greedy_at_zero(given)
    given.pop("past_key_values", None)
    defaults = chat.defaults.as_dict() if told is None else {"max_length": chat.defaults.max_length, **told}
    settings = {**defaults, **ONE_ANSWER, "reuse_cache": True, **given}
    if told is None and not settings["do_sample"]:
        settings |= {name: given.get(name, 1.0) for name in ("top_p", "temperature")}
    length = _length(prompt, settings["max_length"], settings.get("max_new_tokens"), config)
    return {**settings, "max_length": length, "max_new_tokens": None}


def _check(options: dict[str, Any]) -> None:
    """Raise ChatGLMError for what would not give one answer."""
    for name, wanted in ONE_ANSWER.items():
        if options.get(name) not in (None, wanted):
            raise ChatGLMError("chat", name, options[name], f"{wanted}: generate() gives more than one answer")
    if options.get("streamer") is not None:
        raise ChatGLMError("chat", "streamer", type(options["streamer"]).__name__, "none: stream_chat() is a stream")
    if not isinstance(options.get("past_key_values"), (StateCache, type(None))):
        seen = f"of type {type(options['past_key_values']).__name__}"
        raise ChatGLMError("chat", "past_key_values", seen, "None or what stream_chat() returned")


def _greedy_at_zero(given: dict[str, Any]) -> dict[str, Any]:
    """The options where temperature 0, of them or of their config, means greedy, as it does to users of other
    programs."""
    if given.get("temperature", getattr(given.get("generation_config"), "temperature", None)) != 0:
        return given
    return given | {"temperature": 1.0, "do_sample": False}


def _length(prompt: int, max_length: int, max_new_tokens: int | None, config: Any) -> int:
    """The most tokens that prompt and answer may have together."""
    if max_new_tokens is not None:
        if max_new_tokens < 1:
            raise ChatGLMError("chat", "max_new_tokens", max_new_tokens, "1 or more")
        max_length = prompt + max_new_tokens
    limit = getattr(config, "max_position_embeddings", None) or max_length
    length = min(max_length, limit)
    if prompt >= length:
        more = f" (max_length; the model takes {limit})" if length < limit else ""
        raise ChatGLMError("chat", "prompt", f"{prompt} tokens long", f"fewer than {length}{more}")
    return length


def _of_config(config: GenerationConfig | None) -> dict[str, Any] | None:
    """The lengths that a config of the call has; what else is in it goes to generate() with it. None without one. Some
    releases of transformers have a max_length where nothing was said."""
    if config is None:
        return None
    lengths = {"max_length": config.max_length, "max_new_tokens": config.max_new_tokens}
    if lengths["max_length"] == GenerationConfig().max_length:
        del lengths["max_length"]
    return {name: value for name, value in lengths.items() if value is not None}
