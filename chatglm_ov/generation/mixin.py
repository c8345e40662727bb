"""What Hugging Face `generate()` needs to know about a model that keeps its cache to itself.

The steps between two calls of the model (which ids are new, mask, positions, cache) are done here in full and not by
the base class, whose versions differ in them: some append positions, some drop a mask of ones, some make a
cache of their own, and none knows positions in two rows.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList

from chatglm_ov.errors import ChatGLMError
from chatglm_ov.generation import inputs
from chatglm_ov.generation.cache import CACHE_NAME, CACHE_NAMES, Session, StateCache, one_cache
from chatglm_ov.generation.inputs import refuse_tensors
from chatglm_ov.generation.nucleus import without_sorting
from chatglm_ov.generation.speculative import Choice, check_assistant, decode, guesser

if TYPE_CHECKING:
    from chatglm_ov.generation.guesses import Guesses
    from chatglm_ov.generation.inputs import Step


_REFUSED = {
    "guidance_scale": (1, "a prompt without the condition would need a cache of its own"),
    "prefill_chunk_size": (None, "a long prompt is computed in pieces anyway"),
    "cache_implementation": (None, "the cache is inside the model"),
    "assistant_early_exit": (None, "a compiled model has no exit but its last layer"),
}
"""Arguments of generate() that cannot be had, beside the value with which they do nothing, and why."""


class StatefulGenerationMixin(GenerationMixin):
    """`generate()` over a model with `compiled`, `session` and `forward` (see OVChatGLMForCausalLM)."""

    _is_stateful = False
    _supports_cache_class = True

    compiled: Any
    session: Session
    prompt_progress: Any
    reused_tokens: int
    """Tokens of the latest prompt that were in the cache already."""
    _most_columns: int | None = None
    """Columns at which the call in progress ends whatever it was told; None: nowhere."""
    speculation: Any
    """What became of the latest call's guesses; None where nothing was guessed."""

    def generate(  # type: ignore[override]
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As in Hugging Face (same arguments, same results), with the masks and positions of these models.

        `inputs` (or `input_ids`) int64 [B, L], left-padded; `attention_mask` [B, L] with 1 = token, or the first
        generation's own [B, 1, L, L] with 1 = not seen; without one, leading pad ids are taken for padding.
        `position_ids` as in `forward`. With `past_key_values`, `inputs` is the whole sequence, which begins with what
        is in the cache, or, if shorter than the cache or than the mask, what is new. ChatGLMError where all of a
        sequence is in the cache already.

        Beams and return sequences: the prompt is computed and stored once for all of them. `reuse_cache`: what the
        latest sequence in the model has in common with `inputs`, of one row, is not computed again. `prompt_progress`:
        a function that is called with the tokens of the prompt that are done, and with all of them.
        `prompt_lookup_num_tokens` and `assistant_model`, a smaller converted model of the same vocabulary: tokens are
        guessed and checked several at a time (`chatglm_ov.generation.speculative`); the result is the same.
        """
        refuse_tensors("generate", kwargs.get("inputs_embeds"), kwargs.pop("token_type_ids", None))
        for name, (neutral, reason) in _REFUSED.items():
            value = self._argument(name, generation_config, kwargs)
            if value not in (None, neutral):
                raise ChatGLMError("generate", name, repr(value), f"none: {reason}")
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        assistant = kwargs.get("assistant_model")
        check_assistant(self, assistant)
        with ExitStack() as stack:
            # To the end: between two steps another thread would take the sequence, and what this call has set, away. In
            # one order for all: two models may be each other's assistants.
            users = [self] if assistant is None else [self, assistant]
            for turns in sorted((model.session.request.turns for model in users), key=id):
                stack.enter_context(turns.taken())
            return self._generated(ids, generation_config, args, kwargs)

    def _generated(self, ids: Any, config: GenerationConfig | None, args: tuple, kwargs: dict[str, Any]) -> Any:
        self.reused_tokens, self.speculation = 0, None
        given = one_cache(kwargs)
        cache = self.session.meant(given, inputs.token_ids(ids))
        kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        kwargs |= {} if cache is None else {CACHE_NAME: cache}
        # It is inside the model, and there is no other way to go on.
        if config is None:
            kwargs["use_cache"] = True
        else:
            config = copy.copy(config)
            config.use_cache = True
        if kwargs.pop("reuse_cache", False):
            self._resume(ids, kwargs)
        step = self._first_step(ids, config, kwargs)
        self._most_columns = self._columns_within_positions(step, ids.shape[1])
        kwargs["attention_mask"] = torch.from_numpy(step.keep.astype(np.int64))
        kwargs["position_ids"] = torch.from_numpy(np.array(step.position_ids))
        own_progress = self.prompt_progress
        self.prompt_progress = kwargs.pop("prompt_progress", own_progress)
        try:
            made = super().generate(ids, config, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.prompt_progress = own_progress
        self.session.bind(given)
        return made

    def _first_step(self, input_ids: Any, config: GenerationConfig | None, kwargs: dict[str, Any]) -> Step:
        ids, cache = inputs.token_ids(input_ids), self._checked_cache(kwargs.get(CACHE_NAME))
        if cache is not None and not inputs.go_back_to_mask(ids, kwargs.get("attention_mask"), cache):
            del kwargs[CACHE_NAME]
            cache = None
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        new = ids.shape[1]
        if cache is not None:
            new = inputs.new_columns(ids, mask, cache)
        elif mask is None:
            special = self._special_ids(config, kwargs)
            inputs.warn_of_padding(ids, *special)
            keep = inputs.leading_padding(ids, *special)
            mask = None if keep is None else torch.from_numpy(keep)
        if not 0 < new <= ids.shape[1]:
            raise ChatGLMError("input_ids", "length", ids.shape[1], f"at least {new}, the columns not in the cache")
        positions = None if positions is None else positions[..., -new:]
        step = inputs.prepare(self.compiled, input_ids[:, -new:], mask, positions, cache)
        if not step.keep[:, -1].all():
            raise ChatGLMError("attention_mask", "last column", "padding", "a token in each row: pad on the left")
        return step

    def _columns_within_positions(self, step: Step, columns: int) -> int | None:
        """Columns of a text that fills the model, its last token being one that is not fed; None without a limit."""
        limit = self.compiled.config.position_limit
        return None if limit is None else columns + max(1, limit - int(step.position_ids[..., -1].max()))

    def _get_stopping_criteria(  # type: ignore[override]
        self, generation_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> StoppingCriteriaList:
        """A text that fills the model ends there, as at any other greatest length. The config is that of one call, with
        all that it was made of."""
        if self._most_columns is not None:
            generation_config.max_length = min(generation_config.max_length, self._most_columns)
        return super()._get_stopping_criteria(generation_config, *args, **kwargs)  # type: ignore[misc]

    def _argument(self, name: str, config: GenerationConfig | None, kwargs: dict[str, Any]) -> Any:
        """What one call of generate() works with: its own argument, that of its config, and what that leaves out the
        model's."""
        if name in kwargs:
            return kwargs[name]
        told = getattr(config, name, None)
        return getattr(self.generation_config, name, None) if told is None else told

    def _special_ids(self, config: GenerationConfig | None, kwargs: dict[str, Any]) -> tuple[int | None, list[int]]:
        """pad_token_id and the end ids of one call."""
        pad, ends = (
            [] if ids is None else [int(i) for i in np.atleast_1d(ids)]
            for ids in (self._argument(name, config, kwargs) for name in ("pad_token_id", "eos_token_id"))
        )
        return pad[0] if pad else None, ends

    def _resume(self, input_ids: Any, kwargs: dict[str, Any]) -> None:
        """Put a cache with what `input_ids` and the latest sequence have in common into the arguments, if that is
        something and the arguments say nothing else of the sequence."""
        ids, mask = inputs.token_ids(input_ids), kwargs.get("attention_mask")
        told = any(kwargs.get(name) is not None for name in (CACHE_NAME, "position_ids"))
        whole = mask is None or (isinstance(mask, torch.Tensor) and mask.shape == ids.shape and bool(mask.all()))
        if told or len(ids) != 1 or not whole:
            return
        cache = self.resume(ids[0])
        if cache is not None:
            kwargs[CACHE_NAME], self.reused_tokens = cache, cache.get_seq_length()

    def resume(self, ids: np.ndarray) -> StateCache | None:
        """The cache with what the latest sequence in it has in common with `ids` int64 [L]; see `Session.resume`."""
        module, config = self.compiled.architecture, self.compiled.config
        positions = module.position_ids(config, ids[None], None)
        return self.session.resume(ids, positions[0], module.prefix_length(config, ids[None], None))

    def _checked_cache(self, cache: Any) -> StateCache | None:
        """The cache argument if it is the handle of what is in the model now; ChatGLMError for any other."""
        cache = self.session.meant(cache)
        if cache is not None:
            cache.check_current(self.session)
        return cache

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        past_key_values: StateCache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        next_sequence_length: int | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 1,
        prompt_copies: int = 1,
        cache: StateCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next call: the columns that are not in the cache, the LM head on the last one, and one
        row of each that stand for `prompt_copies`."""
        new, handle = input_ids.shape[1], past_key_values or cache
        if next_sequence_length is not None:
            new = next_sequence_length
        elif handle is not None and attention_mask is not None:
            new = attention_mask.shape[1] - handle.get_seq_length()
        mask = None if attention_mask is None else attention_mask[::prompt_copies]
        if handle is not None and mask is not None:
            # A beam that is finished goes on from any row in some releases: its padding is that row's then.
            keep = torch.from_numpy(handle.columns.keep).to(mask.dtype)
            mask = torch.cat([keep.expand(len(mask), -1), mask[:, keep.shape[1] :]], dim=1)
        passed_on = ("output_attentions", "output_hidden_states")
        return {
            "input_ids": input_ids[::prompt_copies, -new:],
            "attention_mask": mask,
            "position_ids": None if position_ids is None else position_ids[::prompt_copies, ..., -new:],
            CACHE_NAME: handle,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "prompt_copies": prompt_copies,
            **{name: kwargs[name] for name in passed_on if name in kwargs},
        }

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        """Append the column of the token just chosen to mask and positions."""
        model_kwargs[CACHE_NAME] = outputs[CACHE_NAME]
        model_kwargs.pop("prompt_copies", None)
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs["position_ids"]
        if mask is not None:
            model_kwargs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), num_new_tokens)], dim=1)
        following = inputs.next_positions(positions[..., -1].numpy(), num_new_tokens)
        model_kwargs["position_ids"] = torch.cat([positions, torch.from_numpy(following)], dim=-1)
        return model_kwargs

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Repeat every row for beams or return sequences; rows come first in every tensor here. The cache is not
        repeated before the prompt is in it."""
        if expand_size == 1:
            return input_ids, model_kwargs
        for name, value in model_kwargs.items():
            if isinstance(value, torch.Tensor) and name != "cache_position":
                model_kwargs[name] = value.repeat_interleave(expand_size, dim=0)
        model_kwargs["prompt_copies"] = expand_size
        return None if input_ids is None else input_ids.repeat_interleave(expand_size, dim=0), model_kwargs

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:  # type: ignore[override]
        return without_sorting(super()._get_logits_processor(*args, **kwargs))  # type: ignore[misc]

    def _get_candidate_generator(  # type: ignore[override]
        self, generation_config: GenerationConfig, *args: Any, assistant_model: Any = None, **kwargs: Any
    ) -> Guesses:
        """The source of guesses, for the releases of transformers that hand it to `_assisted_decoding`."""
        return guesser(generation_config, assistant_model)

    def _assisted_decoding(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Any = None,
        candidate_generator: Guesses | None = None,
        assistant_model: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Decoding with guesses from the text so far or from an assistant."""
        guesses = candidate_generator or guesser(generation_config, assistant_model)
        choice = Choice(logits_processor, stopping_criteria, generation_config)
        return decode(self, input_ids, guesses, choice, streamer, kwargs)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """No cache object is made here: the first call returns the handle of the one inside the model."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not offered, nor what begins with it."""
        raise ChatGLMError("continuous batching", "cache", "a paged one", "generate(): the cache is inside the model")

    generate_batch = init_continuous_batching
