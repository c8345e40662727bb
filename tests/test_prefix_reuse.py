"""What a prompt has in common with the sequence in the model is not computed again, and long prompts go in pieces."""

# ruff: noqa: F811 (a fixture is imported)

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from golden_sets import GOLDENS, cases, interrupt_calls, model_inputs, open_either_model, open_model  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st

from chatglm_ov import ChatGLMError
from chatglm_ov.generation import inputs
from chatglm_ov.generation.cache import CACHE_NAME, common_prefix
from chatglm_ov.generation.inputs import Step, pieces
from chatglm_ov.generation.stream import _Tokens, stream_tokens

pytestmark = pytest.mark.transformers_matrix

each_golden = pytest.mark.parametrize("golden", GOLDENS, ids=str)


@pytest.fixture
def fed(monkeypatch):
    """Numbers of columns that the calls of a model feed."""

    def record(model):
        counts: list[int] = []
        infer = model.session.request.infer

        def recorded(ids, *arguments, **options):
            counts.append(ids.shape[1])
            return infer(ids, *arguments, **options)

        monkeypatch.setattr(model.session.request, "infer", recorded)
        return counts

    return record


def greedy(model, ids, **options):
    return model.generate(ids, do_sample=False, max_new_tokens=6, **options)


@each_golden
def test_the_next_turn_computes_what_is_new(golden, open_either_model, fed):
    model, ids = open_either_model(golden), golden.tensor("p17_input_ids")
    first = greedy(model, ids)
    following = torch.cat([first, torch.tensor([[7, 8, 9]])], dim=1)
    wanted = greedy(model, following)
    greedy(model, ids)
    counts = fed(model)
    assert torch.equal(greedy(model, following, reuse_cache=True), wanted)
    # The last token of an answer was chosen, not fed.
    assert counts == [4] + [1] * 5
    assert torch.equal(greedy(model, following, reuse_cache=True), wanted)
    assert counts[6:] == [1] * 6


@each_golden
def test_an_earlier_turn_that_is_changed_rolls_back(golden, open_either_model, fed):
    model, ids = open_either_model(golden), golden.tensor("p17_input_ids")
    length = ids.shape[1]
    greedy(model, torch.cat([ids, torch.tensor([[7, 8, 9, 10, 11]])], dim=1))
    changed = torch.cat([ids, torch.tensor([[7, 8, 12, 13]])], dim=1)
    counts = fed(model)
    got = greedy(model, changed, reuse_cache=True)
    assert counts[0] == 2
    assert torch.equal(got, greedy(model, changed))
    if golden.folder.name.startswith("v1"):
        # What stands before <sop> has seen all of it: another text there is another sequence.
        ids = ids.clone()
        ids[0, 0] += 1
        counts = fed(model)
        got = greedy(model, ids, reuse_cache=True)
        assert counts[0] == length
        assert torch.equal(got, greedy(model, ids))


def test_nothing_in_common_and_other_shapes_begin_anew(open_model, fed):
    golden = next(golden for golden in GOLDENS if golden.folder.name == "v2_tiny")
    model, ids = open_model(golden, "fused"), golden.tensor("p17_input_ids")
    two = torch.cat([ids, ids.flip(1)])
    wanted = [greedy(model, each) for each in (ids, two, ids.flip(1))]
    counts = fed(model)
    for each, tokens in zip((ids, two, ids.flip(1)), wanted, strict=True):
        assert torch.equal(greedy(model, each, reuse_cache=True), tokens)
    assert counts == ([17] + [1] * 5) * 3
    padded, mask = torch.cat([torch.zeros(1, 2, dtype=torch.int64), ids], 1), torch.ones(1, 19, dtype=torch.int64)
    mask[:, :2] = 0
    assert torch.equal(greedy(model, padded, attention_mask=mask, reuse_cache=True)[:, 2:], wanted[0])
    # The padded sequence is not what `ids` continues.
    assert torch.equal(greedy(model, ids, reuse_cache=True), wanted[0])


def test_handles_of_before_are_stale(open_model):
    golden = next(golden for golden in GOLDENS if golden.folder.name == "v2_tiny")
    model, ids = open_model(golden, "fused"), golden.tensor("p17_input_ids")
    handle = model(ids).past_key_values
    greedy(model, ids, reuse_cache=True)
    with pytest.raises(ChatGLMError, match="an earlier one"):
        model(ids[:, :1], past_key_values=handle)


@each_golden
def test_beams_begin_with_what_is_there(golden, open_either_model, fed):
    model, ids = open_either_model(golden), golden.tensor("p17_input_ids")
    options = {"num_beams": 3, "num_return_sequences": 2}
    wanted = greedy(model, ids, **options)
    greedy(model, ids)
    counts = fed(model)
    assert torch.equal(greedy(model, ids, reuse_cache=True, **options), wanted)
    assert counts[0] == 1


@each_golden
def test_crop_goes_back(golden, open_either_model):
    model, ids = open_either_model(golden), golden.tensor("p17_input_ids")
    more = torch.tensor([[7, 8, 9]])
    wanted = model(more, past_key_values=model(ids).past_key_values).logits
    cache = model(more.flip(1), past_key_values=model(ids).past_key_values).past_key_values
    cache.crop(-3)
    assert cache.get_seq_length() == 17
    torch.testing.assert_close(model(more, past_key_values=cache).logits, wanted, rtol=0, atol=1e-4)
    cache.crop(17)
    torch.testing.assert_close(model(more, past_key_values=cache).logits, wanted, rtol=0, atol=1e-4)
    cache.crop(100)
    assert cache.get_seq_length() == 20


@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), max_size=8))
def test_common_prefix(a, b):
    n = common_prefix(np.array(a, np.int64), np.array(b, np.int64))
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


# Pieces


@pytest.mark.parametrize(("golden", "prompt"), [c for c in cases("input_ids") if c.values[1] in ("p17", "batch")])
@pytest.mark.parametrize("logits_to_keep", [0, 1, 4])
def test_a_prompt_in_pieces_is_the_whole_prompt(golden, prompt, logits_to_keep, open_either_model, monkeypatch, fed):
    model, given_inputs = open_either_model(golden), model_inputs(golden, prompt)
    wanted = model(**given_inputs, logits_to_keep=logits_to_keep).logits
    rows, length = given_inputs["input_ids"].shape
    monkeypatch.setattr(inputs, "PIECE_TOKENS", 3 * rows)
    counts, told = fed(model), []
    model.prompt_progress = lambda done, total: told.append((done, total))
    try:
        output = model(**given_inputs, logits_to_keep=logits_to_keep)
    finally:
        model.prompt_progress = None
    assert sum(counts) == length
    assert max(counts[1:], default=0) <= 3
    assert told == [(int(done), length) for done in np.cumsum(counts)]
    # Of padding nothing is promised.
    for row, pads in enumerate(np.broadcast_to(golden.pads(prompt), rows)):
        hidden = pads if logits_to_keep == 0 else 0
        torch.testing.assert_close(output.logits[row, hidden:], wanted[row, hidden:], rtol=0, atol=1e-4)
    if not golden.folder.name.startswith("v1"):
        assert len(counts) == -(-length // 3)


@given(st.integers(1, 60), st.integers(1, 4), st.none() | st.integers(0, 60), st.integers(0, 10))
def test_pieces_cover_every_column_once(length, rows, prefix, past):
    ids = np.zeros((rows, length), np.int64)
    step = Step(ids, ids == 0, ids, None if prefix is None else np.full(rows, min(prefix, length) + past))
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(inputs, "PIECE_TOKENS", 8)
    found = list(pieces(step, past))
    monkeypatch.undo()
    assert [i for piece in found for i in range(piece.start, piece.stop)] == list(range(length))
    assert all(piece.stop - piece.start <= max(1, 8 // rows) for piece in found[1:])
    # A prefix in one piece, and no more than it in a piece that is wider than others.
    assert min(prefix or 0, length) <= found[0].stop <= max(1, 8 // rows, prefix or 0)


@pytest.mark.parametrize(("prefix", "past", "first"), [(1024, 1024, 512), (600, 0, 600), (100, 0, 512), (700, 50, 650)])
def test_the_first_piece_is_as_wide_as_what_is_left_of_the_prefix(prefix, past, first):
    ids = np.zeros((1, 1536), np.int64)
    assert next(pieces(Step(ids, ids == 0, ids, np.array([prefix])), past)) == slice(0, first)


def test_generate_tells_its_progress(open_model):
    golden = next(golden for golden in GOLDENS if golden.folder.name == "v2_tiny")
    model, told = open_model(golden, "fused"), []
    greedy(model, golden.tensor("p17_input_ids"), prompt_progress=lambda *at: told.append(at))
    assert told == [(17, 17)]
    greedy(model, golden.tensor("p17_input_ids"))
    assert told == [(17, 17)]


def test_positions_are_checked_before_anything_is_computed(open_model, fed):
    golden = next(golden for golden in GOLDENS if golden.folder.name == "v2_tiny")
    model = open_model(golden, "fused")
    limit, counts = model.compiled.config.max_positions, fed(model)
    with pytest.raises(ChatGLMError, match=f"a position {limit}"):
        model(torch.full((1, limit + 1), 5))
    assert counts == []


# What must not be reused, or is lost


def v2(open_model, ops="fused"):
    golden = next(golden for golden in GOLDENS if golden.folder.name == "v2_tiny")
    return open_model(golden, ops), golden.tensor("p17_input_ids")


@pytest.mark.parametrize("ops", ["fused", "stock"])
def test_other_positions_are_another_sequence(open_model, ops):
    model, ids = v2(open_model, ops)
    wanted = greedy(model, ids)
    greedy(model, ids, position_ids=torch.arange(17)[None] * 3 + 5)
    assert torch.equal(greedy(model, ids, reuse_cache=True), wanted)
    assert model.reused_tokens == 0


def first_logits(model, ids, **options):
    """Of the first token of an answer that goes on with what is in the model."""
    made = greedy(model, ids, reuse_cache=True, output_logits=True, return_dict_in_generate=True, **options)
    return made.logits[0]


@pytest.mark.parametrize("ops", ["fused", "stock"])
def test_given_positions_are_not_those_of_what_is_reused(open_model, ops):
    model, ids = v2(open_model, ops)
    positions = torch.arange(17)[None] * 3 + 5
    wanted = model(ids, position_ids=positions, logits_to_keep=1).logits[:, -1]
    greedy(model, ids)
    torch.testing.assert_close(first_logits(model, ids, position_ids=positions), wanted, rtol=0, atol=1e-4)
    assert model.reused_tokens == 0


@pytest.mark.parametrize("ops", ["fused", "stock"])
def test_padding_is_not_reused_as_text(open_model, ops):
    model, ids = v2(open_model, ops)
    ids = torch.cat([torch.full((1, 2), 9), ids], dim=1)
    wanted = model(ids, logits_to_keep=1).logits[:, -1]
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    greedy(model, ids, attention_mask=mask)
    torch.testing.assert_close(first_logits(model, ids), wanted, rtol=0, atol=1e-4)
    assert model.reused_tokens == 0


@pytest.mark.parametrize("ops", ["fused", "stock"])
def test_an_interrupted_call_is_forgotten(open_model, ops, monkeypatch):
    model, ids = v2(open_model, ops)
    wanted = greedy(model, ids)
    handle = model(ids[:, :9]).past_key_values
    interrupt_calls(model, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, 9:], past_key_values=handle)
    monkeypatch.undo()
    with pytest.raises(ChatGLMError, match="lost in a call that was interrupted"):
        model(ids[:, 9:], past_key_values=handle)
    assert torch.equal(greedy(model, ids, reuse_cache=True), wanted)
    assert model.reused_tokens == 0


def test_a_stream_is_closed_between_pieces_of_its_prompt(open_model, monkeypatch):
    model, ids = v2(open_model)
    monkeypatch.setattr(inputs, "PIECE_TOKENS", 2)
    told: list[int] = []

    def close(done: int, total: int) -> None:
        told.append(done)
        if done == 6:
            tokens.closed.set()

    tokens = _Tokens()
    tokens.run(model, ids, {"max_new_tokens": 3, "do_sample": False, "prompt_progress": close})
    assert tokens.queue.get() is None
    assert told == [2, 4, 6]


def test_streams_of_several_sequences_are_refused(open_model):
    model, ids = v2(open_model)
    for prompt, options in ((ids.repeat(2, 1), {}), (ids, {"num_return_sequences": 2, "do_sample": True})):
        with pytest.raises(ChatGLMError, match="sequences is 2"):
            next(stream_tokens(model, prompt, max_new_tokens=2, **options))


@pytest.mark.parametrize("ops", ["fused", "stock"])
def test_what_is_cropped_away_begins_anew(open_model, ops):
    model, ids = v2(open_model, ops)
    wanted = model(ids).logits
    cache = model(ids).past_key_values
    cache.crop(-ids.shape[1])
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_without_a_cache_nothing_is_reused(open_model, num_beams):
    model, ids = v2(open_model)
    wanted = greedy(model, ids, num_beams=num_beams)
    assert torch.equal(greedy(model, ids, num_beams=num_beams, use_cache=False, reuse_cache=True), wanted)


def test_pieces_of_transformers_are_refused(open_model):
    model, ids = v2(open_model)
    config = copy.deepcopy(model.generation_config)
    config.prefill_chunk_size = 4
    with pytest.raises(ChatGLMError, match="prefill_chunk_size is 4"):
        model.generate(ids, config, max_new_tokens=2)
    with pytest.raises(ChatGLMError, match="type is list"):
        model.generate(ids, max_new_tokens=2, reuse_cache=True, attention_mask=[[1] * 17])


@pytest.mark.parametrize(
    ("golden", "prompt"), [case for case in cases("input_ids") if "v1" in case.values[0].folder.name]
)
def test_a_first_generation_prompt_goes_on_right_before_its_end(golden, prompt, open_either_model):
    """Where `<sop>` is the first new token, its position is the place of a mask token that may stand far before."""
    model, ids = open_either_model(golden), golden.tensor(f"{prompt}_input_ids")
    if len(ids) > 1:
        pytest.skip("a batch is not reused")
    wanted = greedy(model, ids)
    assert torch.equal(greedy(model, ids, reuse_cache=True), wanted)
    assert model.reused_tokens == ids.shape[1] - 1
    end = int((ids[0] == model.config.bos_token_id).nonzero()[0])
    whole = model(ids)[CACHE_NAME]
    whole.crop(end - ids.shape[1])
    assert whole.get_seq_length() == end
    assert torch.equal(greedy(model, ids, past_key_values=whole), wanted)
