"""generate() against transformers' own models of the same weights: every option that changes what is chosen."""

from __future__ import annotations

import pytest
import torch
from glm_models import KINDS, TINY, reference, saved
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from chatglm_ov import ChatGLMError, OVChatGLMForCausalLM, convert

pytestmark = pytest.mark.transformers_matrix

PROMPT = torch.randint(2, TINY["vocab_size"], (1, 9), generator=torch.Generator().manual_seed(1)).repeat(1, 3)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """transformers' model and ours, of fused operations."""
    return original_and_ours(request.param, "fused", tmp_path_factory.mktemp("model"))


def original_and_ours(kind, ops, folder):
    original = reference(kind)
    convert(saved(original, folder / "checkpoint"), folder / "out", ("f32",), ops, progress=False)
    return original, OVChatGLMForCausalLM.from_pretrained(folder / "out", "f32", "f32")


class Stop(StoppingCriteria):
    """At the first multiple of 7 behind the prompt."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] % 7 == 0) & torch.tensor(input_ids.shape[1] > PROMPT.shape[1] + 2)


class NoOddTokens(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 1::2] = -torch.inf
        return scores


def allowed(batch_id, input_ids):
    """What is larger than the last token, or all when that is large."""
    last = int(input_ids[-1])
    return list(range(last + 1, TINY["vocab_size"])) if last < 150 else list(range(2, 20))


OPTIONS = {
    "greedy": {},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[5], [17, 33], [40], [99]]},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": allowed},
    "logits_processor": {"logits_processor": LogitsProcessorList([NoOddTokens()])},
    "stopping_criteria": {"stopping_criteria": StoppingCriteriaList([Stop()])},
    "min_new_tokens": {"min_new_tokens": 12, "eos_token_id": list(range(2, 80))},
    "several ends": {"eos_token_id": list(range(2, 40))},
    "beams": {"num_beams": 3},
    "4 beams, 4 returned": {"num_beams": 4, "num_return_sequences": 4},
    "beams with penalties": {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "beams, length_penalty, early_stopping": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "beams with ends": {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": list(range(2, 40))},
    "constrained beams": {"num_beams": 2, "prefix_allowed_tokens_fn": allowed},
}
SAMPLING = {
    "plain": {},
    "min_p": {"min_p": 0.2},
    "top_k, temperature": {"top_k": 5, "temperature": 0.7},
    "top_p": {"top_p": 0.8},
    "typical_p": {"typical_p": 0.6},
    "several returned": {"num_return_sequences": 4},
    "beams": {"num_beams": 3},
}


def both(pair, ids, mask=None, seed=None, **options):
    """Tokens of both, with the same draws."""
    options = {"max_new_tokens": 16, "do_sample": False, **options}
    made = []
    for model in pair:
        if seed is not None:
            torch.manual_seed(seed)
        with torch.no_grad():
            given = torch.ones_like(ids) if mask is None else mask
            made.append(model.generate(ids, attention_mask=given, **options))
    return made


@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_are_those_of_transformers(pair, name):
    wanted, ours = both(pair, PROMPT, **OPTIONS[name])
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize("name", SAMPLING)
def test_draws_are_those_of_transformers(pair, name):
    for seed in range(3):
        wanted, ours = both(pair, PROMPT, seed=seed, do_sample=True, **SAMPLING[name])
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("options", [{}, {"num_beams": 4, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_eight_unequal_prompts_are_those_of_transformers(pair, options):
    generator = torch.Generator().manual_seed(2)
    lengths = [3, 27, 8, 14, 1, 20, 27, 5]
    ids = torch.zeros(8, 27, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(2, TINY["vocab_size"], (length,), generator=generator)
    wanted, ours = both(pair, ids, (ids != 0).long(), **options)
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 5}], ids=str)
def test_scores_and_logits_are_those_of_transformers(pair, options):
    original, ours = pair
    given = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    given |= {"output_logits": True, "attention_mask": torch.ones_like(PROMPT)}
    with torch.no_grad():
        # Some releases go beyond max_new_tokens with guesses; the tokens are those without.
        plain = {name: value for name, value in options.items() if name != "prompt_lookup_num_tokens"}
        wanted = original.generate(PROMPT, **given, **plain)
        ours = ours.generate(PROMPT, **given, **options)
    assert torch.equal(ours.sequences, wanted.sequences)
    for kind in ("scores", "logits"):
        assert len(ours[kind]) == len(wanted[kind]) == 8
        for one, other in zip(ours[kind], wanted[kind], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_what_the_model_does_not_give_is_refused(pair, name):
    with pytest.raises(ChatGLMError, match=name):
        pair[1].generate(PROMPT, max_new_tokens=2, return_dict_in_generate=True, **{name: True})


def test_guidance_is_refused(pair):
    with pytest.raises(ChatGLMError, match=r"guidance_scale is 1\.5"):
        pair[1].generate(PROMPT, max_new_tokens=2, guidance_scale=1.5)


def test_a_stream_of_beams_is_refused_as_transformers_does(pair):
    class Tokenizer:
        def decode(self, ids, **kwargs):
            return ""

    for model in pair:
        with pytest.raises(ValueError, match="streamer"):
            model.generate(PROMPT, num_beams=2, max_new_tokens=2, streamer=TextIteratorStreamer(Tokenizer()))


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"num_return_sequences": 5, "do_sample": True}], ids=str)
def test_the_prompt_is_computed_once_for_all_rows_of_it(pair, monkeypatch, options):
    ours, shapes = pair[1], []
    infer = ours.session.request.infer
    monkeypatch.setattr(
        ours.session.request, "infer", lambda ids, *a, **k: (shapes.append(ids.shape), infer(ids, *a, **k))[1]
    )
    two = torch.cat([PROMPT, PROMPT.flip(1)])
    ours.generate(two, max_new_tokens=3, **options)
    assert shapes[0] == (2, PROMPT.shape[1])
    assert {shape[0] for shape in shapes[1:]} == {2 * max(options.values())}


@pytest.mark.parametrize("name", ["greedy", "4 beams, 4 returned"])
def test_stock_operations_choose_the_same(name, tmp_path):
    wanted, ours = both(original_and_ours("glm", "stock", tmp_path), PROMPT, **OPTIONS[name])
    assert torch.equal(ours, wanted)
