"""Decoding with guesses gives the tokens of plain decoding; what is guessed, and how the guesses learn."""

# ruff: noqa: F811 (a fixture is imported)

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from glm_models import TINY, reference, saved
from golden_cases import V2
from golden_sets import GOLDENS, open_either_model, open_model  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from chatglm_ov import ChatGLMError, OVChatGLMForCausalLM, convert
from chatglm_ov.generation.guesses import BUSY_COST, CHECK_COST, FREE_CHECKS, PromptLookup, _worth_guessing

pytestmark = pytest.mark.transformers_matrix

REPEATED = torch.randint(2, TINY["vocab_size"], (1, 12), generator=torch.Generator().manual_seed(4)).repeat(1, 3)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a model of two layers in both lowerings, and of one with its first layer only."""
    folder = tmp_path_factory.mktemp("models")
    for name, fields in (("large", {}), ("small", {"num_hidden_layers": 1})):
        checkpoint = saved(reference("glm", **fields), folder / f"{name}-checkpoint")
        for ops in ("fused", "stock"):
            convert(checkpoint, folder / f"{name}-{ops}", ("f32",), ops, progress=False)
    return lambda name, ops="fused": OVChatGLMForCausalLM.from_pretrained(folder / f"{name}-{ops}", "f32", "f32")


def greedy(model, ids=REPEATED, **options):
    return model.generate(ids, max_new_tokens=40, do_sample=False, **options)


@pytest.mark.parametrize("ops", ["fused", "stock"])
@pytest.mark.parametrize("num_tokens", [1, 3, 10])
def test_prompt_lookup_gives_the_tokens_of_plain_decoding(models, ops, num_tokens):
    model = models("large", ops)
    wanted = greedy(model)
    assert torch.equal(greedy(model, prompt_lookup_num_tokens=num_tokens), wanted)
    told = model.speculation
    assert 0 < told.accepted <= told.guessed
    assert told.calls + told.accepted == 40
    for options in ({"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 3}, {"eos_token_id": list(range(2, 30))}):
        assert torch.equal(greedy(model, prompt_lookup_num_tokens=num_tokens, **options), greedy(model, **options)), (
            options
        )


@pytest.mark.parametrize("golden", GOLDENS, ids=str)
def test_prompt_lookup_gives_the_goldens_tokens(golden, open_either_model):
    """ChatGLM-6B with its two rows of positions, ChatGLM2 and GLM-4."""
    model, ids = open_either_model(golden), golden.tensor("p17_input_ids")
    options = {"do_sample": False, "max_new_tokens": 24}
    wanted = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **options), wanted)


@pytest.mark.parametrize("ops", ["fused", "stock"])
def test_assistants_give_the_tokens_of_plain_decoding(models, ops):
    model, small = models("large", ops), models("small", ops)
    small.generation_config.assistant_confidence_threshold = 0.0
    small.generation_config.num_assistant_tokens = 3
    wanted = greedy(model)
    assert torch.equal(greedy(model, assistant_model=small), wanted)
    assert model.speculation.guessed > 40
    # One that is always right: the same weights with a cache of their own.
    twin = OVChatGLMForCausalLM(model.config, model.compiled)
    twin.generation_config.assistant_confidence_threshold = 0.0
    twin.generation_config.num_assistant_tokens = 4
    assert torch.equal(greedy(model, assistant_model=twin), wanted)
    assert model.speculation.acceptance == 1
    assert model.speculation.calls == 8
    # The next call finds what the assistant has of the text.
    assert torch.equal(greedy(model, wanted[:, :50], assistant_model=twin)[:, : wanted.shape[1]], wanted)


def test_draws_with_guesses_are_draws_of_the_model(models):
    """The same distribution: with a temperature near 0 the same tokens, with a high one other ones each time."""
    model = models("large")
    cold = model.generate(REPEATED, max_new_tokens=20, do_sample=True, temperature=1e-4, prompt_lookup_num_tokens=5)
    assert torch.equal(cold, model.generate(REPEATED, max_new_tokens=20, do_sample=False))
    counts = np.zeros(TINY["vocab_size"])
    torch.manual_seed(0)
    for _ in range(300):
        ids = model.generate(
            REPEATED, max_new_tokens=2, do_sample=True, top_k=0, prompt_lookup_num_tokens=5, reuse_cache=True
        )
        counts[int(ids[0, -2])] += 1
    with torch.no_grad():
        chances = model(REPEATED, logits_to_keep=1).logits[0, -1].softmax(-1).numpy()
    # The total variation of 300 draws of as many likely tokens is about sqrt(n / 300) / 2.
    likely = int((chances > 1e-2).sum())
    assert np.abs(counts / 300 - chances).sum() / 2 < np.sqrt(max(likely, 4) / 300)


def test_criteria_are_asked_and_the_stream_is_fed_token_by_token(models):
    class Record(StoppingCriteria, BaseStreamer):
        def __init__(self):
            self.lengths, self.streamed, self.ended = [], [], False

        def __call__(self, input_ids, scores, **kwargs):
            self.lengths.append(input_ids.shape[1])
            return torch.tensor([len(self.lengths) == 17])

        def put(self, value):
            self.streamed += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, record = models("large"), Record()
    twin = OVChatGLMForCausalLM(model.config, model.compiled)
    twin.generation_config.assistant_confidence_threshold = 0.0
    twin.generation_config.num_assistant_tokens = 6
    ids = greedy(model, assistant_model=twin, stopping_criteria=StoppingCriteriaList([record]), streamer=record)
    length = REPEATED.shape[1]
    assert record.lengths == list(range(length + 1, length + 18))
    assert ids.shape[1] == length + 17
    assert record.streamed == ids[0].tolist()
    assert record.ended
    # What was checked beyond the end is no part of the sequence that is in the model.
    again = greedy(model, ids, reuse_cache=True)
    assert torch.equal(again, greedy(model, ids))


def test_no_token_is_guessed_that_has_no_room(models):
    model = models("large")
    limit = TINY["max_position_embeddings"]
    ids = REPEATED.repeat(1, 7)[:, : limit - 5]
    out = model.generate(ids, max_length=limit, do_sample=False, prompt_lookup_num_tokens=10)
    assert out.shape[1] == limit


def test_wrong_assistants_are_told(models, tmp_path):
    model = models("large")
    other = reference("glm", vocab_size=176)
    convert(saved(other, tmp_path / "checkpoint"), tmp_path / "out", ("f32",), progress=False)
    stranger = OVChatGLMForCausalLM.from_pretrained(tmp_path / "out")
    for assistant, message in (
        (stranger, "vocabulary of assistant_model"),
        (model, "the model itself"),
        (reference("glm"), "GlmForCausalLM"),
    ):
        with pytest.raises(ChatGLMError, match=message):
            greedy(model, assistant_model=assistant)
    two = REPEATED.repeat(2, 1)
    with pytest.raises((ChatGLMError, ValueError), match=r"row|batch_size = 1"):
        greedy(model, two, prompt_lookup_num_tokens=3)
    with pytest.raises(ChatGLMError, match="prompt_lookup_num_tokens"):
        greedy(model, prompt_lookup_num_tokens=0)


# What is guessed


def ids_of(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_the_longest_and_latest_match_is_taken():
    text = ids_of(1, 2, 3, 40, 41, 42, 2, 3, 50, 51, 52, 1, 2, 3)
    assert PromptLookup(3).guess(text, 10).tolist() == [40, 41, 42]
    assert PromptLookup(2, ngram=2).guess(text, 10).tolist() == [50, 51]
    assert PromptLookup(3).guess(text, 1).tolist() == [40]
    assert PromptLookup(3).guess(ids_of(1, 2, 3), 10).size == 0
    # A loop of one token: a match with enough behind it, or with the most.
    assert PromptLookup(3).guess(ids_of(7, 7, 7, 7, 7, 7), 10).tolist() == [7, 7, 7]
    assert PromptLookup(3).guess(ids_of(7, 7, 7, 7), 10).tolist() == [7]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 12), st.integers(0, 12))
def test_a_guess_is_what_followed_an_earlier_match(values, num_tokens, room):
    text = ids_of(*values)
    guessed = PromptLookup(num_tokens).guess(text, room)
    assert len(guessed) <= min(num_tokens, room)
    if guessed.size:
        places = [i for i in range(1, len(text)) if text[i - 1] == text[-1]]
        assert any(text[i : i + len(guessed)].tolist() == guessed.tolist() for i in places)


def test_wrong_guesses_end_guessing_and_right_ones_bring_it_back():
    text = ids_of(*range(1, 6), *range(1, 6))
    lookup = PromptLookup(10)
    sizes = []
    for _ in range(40):
        sizes.append(lookup.guess(text, 10).size)
        lookup.learn(0)
    assert sizes[0] == 4
    assert sum(sizes[-10:]) <= 4
    for _ in range(60):
        lookup.learn(lookup.guess(text, 10).size)
    assert lookup.guess(text, 10).size == 5


def test_as_many_are_guessed_as_are_worth_their_check():
    assert _worth_guessing(0.0, 10) == 0
    assert _worth_guessing(1.0, 10) == 10
    counts = [_worth_guessing(chance, 50) for chance in np.linspace(0, 1, 21)]
    assert counts == sorted(counts)


def test_guesses_end_where_the_positions_do(tmp_path):
    """ChatGLM2's table of positions; an assistant with fewer of them has nothing to say from there on."""
    models = {}
    for limit in (60, 40):
        checkpoint = Path(shutil.copytree(V2.checkpoint, tmp_path / f"{limit}-checkpoint"))
        fields = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps({**fields, "seq_length": limit}))
        convert(checkpoint, tmp_path / f"{limit}", ("f32",), progress=False)
        models[limit] = OVChatGLMForCausalLM.from_pretrained(tmp_path / f"{limit}", "f32")
    model, ids = models[60], V2.tensor("p17_input_ids").repeat(1, 4)[:, :54]
    stop = StoppingCriteriaList([lambda ids, scores, **_: torch.tensor([ids.shape[1] == 59])])
    options = {"max_length": 120, "do_sample": False, "eos_token_id": [], "stopping_criteria": stop}
    wanted = model.generate(ids, **options)
    assert wanted.shape[1] == 59
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=10, **options), wanted)
    models[40].generation_config.assistant_confidence_threshold = 0.0
    assert torch.equal(
        model.generate(ids[:, :36], assistant_model=models[40], **options)[:, :59],
        model.generate(ids[:, :36], **options),
    )


def test_one_end_and_a_list_of_it_are_the_same(models, tmp_path):
    other = reference("glm", num_hidden_layers=1, eos_token_id=1)
    convert(saved(other, tmp_path / "checkpoint"), tmp_path / "out", ("f32",), progress=False)
    assert OVChatGLMForCausalLM.from_pretrained(tmp_path / "out").compiled.config.eos_token_id == 1
    model = models("large")
    assert torch.equal(
        greedy(model, assistant_model=OVChatGLMForCausalLM.from_pretrained(tmp_path / "out")), greedy(model)
    )


def test_criteria_get_the_scores_that_are_kept(models):
    seen = []

    class Watch(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(scores)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model = models("large")
    options = {"stopping_criteria": StoppingCriteriaList([Watch()]), "prompt_lookup_num_tokens": 4}
    greedy(model, **options)
    assert set(seen) == {None}
    seen.clear()
    made = greedy(model, return_dict_in_generate=True, output_scores=True, **options)
    assert [len(scores) for scores in seen] == list(range(1, len(made.scores) + 1))
    assert all(map(torch.equal, seen[-1], made.scores))


def test_scores_that_are_changed_in_place_leave_the_logits_as_they_are(models):
    class InPlace(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, 5:9] = -1e9
            return scores

    how = {"output_logits": True, "return_dict_in_generate": True, "prompt_lookup_num_tokens": 3}
    made = greedy(models("large"), logits_processor=LogitsProcessorList([InPlace()]), **how)
    assert torch.stack(made.logits).min() > -1e8


def test_progress_is_told_of_the_prompt_alone(models):
    model, told = models("large"), []
    greedy(model, prompt_lookup_num_tokens=3, prompt_progress=lambda *at: told.append(at))
    assert model.speculation.guessed > 3
    assert told == [(REPEATED.shape[1], REPEATED.shape[1])]


def test_what_is_told_of_guesses_is_of_the_latest_call(models):
    model = models("large")
    greedy(model, prompt_lookup_num_tokens=3)
    assert model.speculation is not None
    greedy(model)
    assert model.speculation is None


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_matching_ngram_size", 2.5),
        ("max_matching_ngram_size", -3),
        ("assistant_early_exit", 2),
        ("prompt_lookup_num_tokens", 0),
    ],
)
def test_what_no_guess_can_be_made_with(models, option, value):
    with pytest.raises(ChatGLMError, match=f"generate: {option} is {value}"):
        greedy(models("large"), **{"prompt_lookup_num_tokens": 4, option: value})


@given(chance=st.floats(0, 1), most=st.integers(0, 40))
def test_as_many_guesses_as_are_worth_it(chance, most):
    def rate(k):
        return sum(chance**i for i in range(k + 1)) / (1 + k * CHECK_COST + max(0, k - FREE_CHECKS) * BUSY_COST)

    count = _worth_guessing(chance, most)
    assert 0 <= count <= most
    assert rate(count) >= max(map(rate, range(most + 1))) * (1 - 1e-9)


def test_guesses_are_no_more_than_there_is_room_for():
    ids = np.tile(np.arange(9), 30)
    assert len(PromptLookup(10**18).guess(ids, 7)) <= 7
