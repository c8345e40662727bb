"""What a Request refuses, and that nothing is spoilt by it."""

# ruff: noqa: F811 (a fixture is imported)

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from golden_cases import TOLERANCE, V1, V2, Opener, Prompt, each_small, golden_prompt, open_compiled, open_either  # noqa: F401

from chatglm_ov import ChatGLMError
from chatglm_ov.runtime.loading import CompiledModel, Request


def call(request: Request, prompt: Prompt, **changes: object) -> np.ndarray:
    """The whole prompt, with some arguments replaced."""
    arguments = {
        "input_ids": prompt.ids,
        "attention_mask": prompt.keep,
        "position_ids": prompt.position_ids,
        "beam_idx": np.arange(prompt.rows),
        "prefix_length": prompt.prefix,
    }
    return request.infer(**{**arguments, **changes})


WRONG_CALLS: dict[str, tuple[str, Callable[[Prompt, CompiledModel], dict[str, object]]]] = {
    "one dimension": ("input_ids", lambda p, m: {"input_ids": p.ids[0]}),
    "no token": ("input_ids", lambda p, m: {"input_ids": p.ids[:, :0]}),
    "no row": ("input_ids", lambda p, m: {"input_ids": p.ids[:0]}),
    "id beyond the vocabulary": ("input_ids", lambda p, m: {"input_ids": p.ids * 0 + m.config.vocab_rows}),
    "negative id": ("input_ids", lambda p, m: {"input_ids": p.ids * 0 - 1}),
    "mask too short": ("attention_mask", lambda p, m: {"attention_mask": p.keep[:, 1:]}),
    "mask of other rows": ("attention_mask", lambda p, m: {"attention_mask": p.keep[:1]}),
    "positions too short": ("position_ids", lambda p, m: {"position_ids": p.position_ids[..., 1:]}),
    "positions of other rows": ("position_ids", lambda p, m: {"position_ids": p.position_ids[:2]}),
    "negative position": ("position_ids", lambda p, m: {"position_ids": p.position_ids - 1}),
    "one row of positions too many": ("position_ids", lambda p, m: {"position_ids": np.stack([p.position_ids] * 3, 1)}),
    "beam_idx too short": ("beam_idx", lambda p, m: {"beam_idx": np.arange(2)}),
    "no such row": ("beam_idx", lambda p, m: {"beam_idx": np.array([0, 1, 3])}),
    "negative row": ("beam_idx", lambda p, m: {"beam_idx": np.array([0, 1, -1])}),
    "negative logits_to_keep": ("logits_to_keep", lambda p, m: {"logits_to_keep": -1}),
    "prefix of other rows": ("prefix_length", lambda p, m: {"prefix_length": np.array([1, 2])}),
}


@each_small
@pytest.mark.parametrize("wrong", WRONG_CALLS)
def test_wrong_calls_are_named_and_harmless(golden, wrong, open_either: Opener):
    model = open_either(golden.checkpoint)
    prompt, request = golden_prompt(golden, "batch", model), model.create_request()
    right = call(request, prompt)
    field, changes = WRONG_CALLS[wrong]
    request.reset()
    with pytest.raises(ChatGLMError) as error:
        call(request, prompt, **changes(prompt, model))
    assert error.value.field == field
    assert "\n" not in str(error.value)
    np.testing.assert_array_equal(call(request, prompt), right)


@each_small
def test_wrong_call_leaves_the_cache_as_it_was(golden, open_either: Opener):
    model = open_either(golden.checkpoint)
    prompt, request = golden_prompt(golden, "batch", model), model.create_request()
    prompt.feed(request)
    next_token = prompt.extended(golden["batch_dec_tokens"][:, :1])
    before = [part.copy() for part in request.cached(0)]
    with pytest.raises(ChatGLMError, match="beam_idx is a row 3, expected 0 to 2"):
        request.infer(
            next_token.ids[:, -1:],
            next_token.keep,
            next_token.position_ids[..., -1:],
            np.array([0, 1, 3]),
            1,
            prompt.prefix,
        )
    for ours, wanted in zip(request.cached(0), before, strict=True):
        np.testing.assert_array_equal(ours, wanted)
    ours = next_token.feed(request, prompt.ids.shape[1])
    assert np.abs(ours[:, -1] - golden["batch_dec_logits"][:, 1]).max() < TOLERANCE


@each_small
def test_a_single_id_that_is_wrong(golden, open_either: Opener):
    model = open_either(golden.checkpoint)
    prompt, request = golden_prompt(golden, "p5", model), model.create_request()
    prompt.feed(request)
    for wrong in (model.config.vocab_rows, -1):
        with pytest.raises(ChatGLMError, match=f"input_ids is a token id {wrong}, expected 0 to"):
            prompt.extended(np.array([[wrong]])).feed(request, prompt.ids.shape[1])
    assert request.past_length == prompt.ids.shape[1]


def test_left_out_prefix_is_not_the_last_calls(open_either: Opener):
    model = open_either(V1.checkpoint)
    prompt, request = golden_prompt(V1, "batch", model), model.create_request()
    call(request, prompt)
    request.reset()
    with pytest.raises(ChatGLMError, match=r"prefix_length is missing, expected \[3\]"):
        call(request, prompt, prefix_length=None)


def test_a_prefix_in_pieces_is_refused(open_either: Opener):
    """Its columns see each other: those of a first piece would have seen themselves only."""
    model = open_either(V1.checkpoint)
    prompt, request = golden_prompt(V1, "p5", model), model.create_request()
    length, whole = int(prompt.prefix[0]), prompt.ids.shape[1]

    def feed(begin: int, end: int, prefix: int) -> np.ndarray:
        ids, positions = prompt.ids[:, begin:end], prompt.position_ids[..., begin:end]
        return request.infer(ids, prompt.keep[:, :end], positions, np.arange(1), 0, np.array([prefix]))

    assert length > 2
    for begin, end in ((0, 2), (2, whole)):
        with pytest.raises(ChatGLMError, match=rf"prefix_length\[0\] is {length}, expected at most 2: "):
            feed(begin, end, length)
        if begin == 0:
            feed(0, 2, 2)
    request.reset()
    assert np.abs(feed(0, whole, length) - V1["p5_prefill_logits"]).max() < TOLERANCE


def test_prefix_of_a_model_without_one_is_refused(open_either: Opener):
    model = open_either(V2.checkpoint)
    prompt = golden_prompt(V2, "p5", model)
    with pytest.raises(ChatGLMError, match="prefix_length is given, expected none"):
        call(model.create_request(), prompt, prefix_length=np.array([3]))


def test_position_beyond_the_rotary_table_is_refused(open_either: Opener):
    model = open_either(V2.checkpoint)
    prompt = golden_prompt(V2, "p5", model)
    last = np.array([[507, 508, 509, 510, 511]])
    assert np.isfinite(call(model.create_request(), prompt, position_ids=last)).all()
    with pytest.raises(ChatGLMError, match=r"a position 512, expected 0 to 511 \(seq_length 512\)"):
        call(model.create_request(), prompt, position_ids=last + 1)


def test_first_generation_has_no_last_position(open_either: Opener):
    model = open_either(V1.checkpoint)
    prompt = golden_prompt(V1, "p5", model)
    assert np.isfinite(call(model.create_request(), prompt, position_ids=prompt.position_ids + 5000)).all()


@each_small
def test_numbers_beyond_32_bits_are_those_that_are_meant(golden, open_either: Opener):
    model = open_either(golden.checkpoint)
    prompt, request = golden_prompt(golden, "batch", model), model.create_request()
    wanted = call(request, prompt)
    for told in (
        *({"logits_to_keep": number} for number in (2**31 + 1, 2**32 + 1, 2**63 - 1)),
        {"attention_mask": prompt.keep.astype(np.int64) << 32},
        *({} if prompt.prefix is None else {"prefix_length": prompt.prefix * 0 - n} for n in (1, 2**31 + 1, 2**32 - 3)),
    ):
        request.reset()
        made = call(request, prompt, **told)
        if "prefix_length" in told:
            request.reset()
            np.testing.assert_array_equal(made, call(request, prompt, prefix_length=prompt.prefix * 0))
        else:
            np.testing.assert_array_equal(made, wanted)
