"""Decoding with guesses (speculative decoding): several tokens are checked in one call of the model.

Each token is chosen from the model's own scores for the tokens before it, as without guesses, and a guess that is not
the token chosen is taken back out of the cache with all behind it. So the tokens are those of plain decoding; with
sampling their distribution is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from chatglm_ov.errors import ChatGLMError
from chatglm_ov.generation.cache import CACHE_NAME
from chatglm_ov.generation.guesses import LONGEST_NGRAM, Assistant, Guesses, PromptLookup
from chatglm_ov.generation.inputs import next_positions

ASSISTANT_TOKENS, ASSISTANT_CONFIDENCE = 20, 0.4
"""As in transformers."""


@dataclass
class Speculation:
    """Counts of one call of generate(): calls of the model, tokens that were guessed, guesses that were right."""

    calls: int = 0
    guessed: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the guessed tokens that were right; 0 without guesses."""
        return self.accepted / max(1, self.guessed)

    def __str__(self) -> str:
        calls = "1 call" if self.calls == 1 else f"{self.calls} calls"
        return f"{calls}, {self.accepted} of {self.guessed} guesses right ({self.acceptance:.0%})"


@dataclass(frozen=True)
class Choice:
    """How a token is chosen from logits, and when to stop."""

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig

    def token(self, scores: torch.Tensor) -> torch.Tensor:
        """The next one, int64 [1], of scores [1, V]."""
        if not self.config.do_sample:
            return scores.argmax(-1)
        # A number is drawn for each token that is asked for: those that top-k and top-p have left.
        probabilities = scores[0].softmax(-1)
        possible = probabilities.nonzero()[:, 0]
        return possible[torch.multinomial(probabilities[possible], 1)]


def check_assistant(model: Any, assistant: Any) -> None:
    """Raise ChatGLMError for an assistant_model that cannot guess for `model`."""
    if assistant is None:
        return
    if not hasattr(assistant, "session"):
        raise ChatGLMError("generate", "assistant_model", type(assistant).__name__, "an OVChatGLMForCausalLM")
    if assistant.session is model.session:
        wanted = "another model: its cache is not that of this one"
        raise ChatGLMError("generate", "assistant_model", "the model itself", wanted)
    ours, theirs = (_vocabulary(each.compiled.config) for each in (model, assistant))
    if ours != theirs:
        raise ChatGLMError("generate", "vocabulary of assistant_model", theirs, ours)


def _vocabulary(config: Any) -> str:
    ends = [] if config.eos_token_id is None else np.atleast_1d(config.eos_token_id).tolist()
    return f"{config.vocab_rows} tokens, ends {ends}"


def guesser(config: GenerationConfig, assistant: Any) -> Guesses:
    """The source of guesses that the arguments of generate() ask for."""
    if assistant is None:
        tokens, ngram = config.prompt_lookup_num_tokens, config.max_matching_ngram_size
        if not isinstance(tokens, int) or tokens < 1:
            raise ChatGLMError("generate", "prompt_lookup_num_tokens", tokens, "a number from 1")
        if not (ngram is None or (isinstance(ngram, int) and ngram > 0)):
            raise ChatGLMError("generate", "max_matching_ngram_size", ngram, "a number from 1, or None")
        return PromptLookup(tokens, ngram or LONGEST_NGRAM)
    own = assistant.generation_config
    confidence = own.assistant_confidence_threshold
    return Assistant(
        assistant,
        own.num_assistant_tokens or ASSISTANT_TOKENS,
        ASSISTANT_CONFIDENCE if confidence is None else confidence,
    )


def decode(
    model: Any, input_ids: Any, guesses: Guesses, choice: Choice, streamer: Any, model_kwargs: dict[str, Any]
) -> Any:
    """The decoding loop of generate(): `input_ids` int64 [1, L]; `model_kwargs` with the attention_mask [1, T] or None,
    the cache, and the position_ids of the columns that are not in it. Returns what generate() does."""
    if len(input_ids) != 1:
        raise ChatGLMError("generate", "input_ids", f"{len(input_ids)} rows", "1 row where tokens are guessed")
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs["position_ids"]
    cache, made = model_kwargs.get(CACHE_NAME), _Made(input_ids, choice, streamer)
    model.speculation = told = Speculation()
    limit = model.compiled.config.position_limit or choice.config.max_length
    while not made.done:
        ids = made.ids
        room = min(choice.config.max_length - ids.shape[1] - 1, limit - 1 - int(positions[..., -1].max()))
        guessed = guesses.guess(ids[0].numpy(), max(0, room))
        count = len(guessed)
        following = torch.from_numpy(next_positions(positions[..., -1].numpy(), count + 1))
        positions = torch.cat([positions, following[..., :-1]], dim=-1)
        if model.prompt_progress is not None:
            model.prompt_progress = partial(_tell_of_prompt, model.prompt_progress, count)
        fed = torch.cat([ids, torch.from_numpy(np.ascontiguousarray(guessed))[None]], dim=1)
        output = model(fed[:, -positions.shape[-1] :], _longer(mask, count), positions, cache, count + 1)
        # What is fed from here on is no prompt.
        model.prompt_progress = None
        new, right = made.take(output.logits, guessed)
        cache = output[CACHE_NAME]
        # The last token that was chosen is not in the cache yet.
        if (unused := count + 1 - new) > 0:
            cache.crop(-unused)
        guesses.learn(right)
        told.calls, told.guessed, told.accepted = told.calls + 1, told.guessed + count, told.accepted + right
        mask, positions = _longer(mask, new), following[..., new - 1 : new]
    if streamer is not None:
        streamer.end()
    return made.output(cache)


def _tell_of_prompt(progress: Callable[[int, int], None], guessed: int, done: int, total: int) -> None:
    """Tell of columns without the guessed ones at their end."""
    progress(min(done, total - guessed), total - guessed)


class _Made:
    """The sequence as far as it is made."""

    def __init__(self, ids: Any, choice: Choice, streamer: Any):
        self.ids, self.done = ids, False
        self._choice, self._streamer = choice, streamer
        self._scores: list[Any] = []
        self._logits: list[Any] = []

    def take(self, logits: torch.Tensor, guessed: np.ndarray) -> tuple[int, int]:
        """Append the tokens that logits [1, n + 1, V] choose, up to the first that is not the one of n guessed ones, or
        the end. Returns how many, and how many of the guesses were right."""
        for at in range(logits.shape[1]):
            scores = self._choice.processors(self.ids, logits[:, at].clone())  # type: ignore[arg-type]
            token = self._choice.token(scores)
            self.ids = torch.cat([self.ids, token[:, None]], dim=1)
            self._keep(scores, logits[:, at])
            if self._streamer is not None:
                self._streamer.put(token)
            self.done = bool(self._choice.criteria(self.ids, tuple(self._scores) or None).all())  # type: ignore[arg-type]
            right = at < len(guessed) and int(token) == guessed[at]
            if self.done or not right:
                return at + 1, at + int(right)
        raise AssertionError("behind the last guess there is one more token")

    def _keep(self, scores: torch.Tensor, logits: torch.Tensor) -> None:
        config = self._choice.config
        if config.return_dict_in_generate and config.output_scores:
            self._scores.append(scores)
        if config.return_dict_in_generate and config.output_logits:
            self._logits.append(logits)

    def output(self, cache: Any) -> Any:
        """What generate() returns."""
        if not self._choice.config.return_dict_in_generate:
            return self.ids
        return GenerateDecoderOnlyOutput(
            sequences=self.ids,
            scores=tuple(self._scores) or None,  # type: ignore[arg-type]
            logits=tuple(self._logits) or None,  # type: ignore[arg-type]
            **{CACHE_NAME: cache},
        )


def _longer(mask: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """The mask with so many further columns."""
    return None if mask is None else torch.cat([mask, mask.new_ones(1, count)], dim=1)
