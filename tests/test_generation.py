"""Hugging Face `generate()` over the state inside the model, against the originals' tokens."""

# ruff: noqa: F811 (a fixture is imported)

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from golden_sets import GOLDENS, cases, model_inputs, open_either_model, open_model  # noqa: F401
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TopPLogitsWarper,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer

from chatglm_ov import ChatGLMError
from chatglm_ov.generation.inputs import _warn_once

pytestmark = pytest.mark.transformers_matrix

each_golden = pytest.mark.parametrize("golden", GOLDENS, ids=str)
REPETITION = "reppen1.3_tokens"


def new_tokens(model, arguments: dict, **options) -> torch.Tensor:
    """What greedy `generate()`, or what the options make of it, adds to the prompt: [rows, n]."""
    ids = model.generate(**arguments, **{"do_sample": False, **options})
    return ids[:, arguments["input_ids"].shape[1] :]


@pytest.mark.parametrize(("golden", "prompt"), cases("generate"))
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
def test_greedy(golden, prompt, use_cache, open_either_model):
    got = new_tokens(open_either_model(golden), model_inputs(golden, prompt), max_new_tokens=24, use_cache=use_cache)
    assert torch.equal(got, torch.from_numpy(np.atleast_2d(golden[f"{prompt}_generate"])))


@pytest.mark.parametrize(("golden", "prompt"), cases("beam3_tokens"))
def test_beams(golden, prompt, open_either_model):
    got = new_tokens(open_either_model(golden), model_inputs(golden, prompt), max_new_tokens=16, num_beams=3)
    assert torch.equal(got, golden.tensor(f"{prompt}_beam3_tokens"))


@pytest.mark.parametrize(("golden", "prompt"), cases("beam3_all_tokens"))
def test_all_beams_and_their_scores(golden, prompt, open_either_model):
    model, given = open_either_model(golden), model_inputs(golden, prompt)
    result = model.generate(
        **given,
        do_sample=False,
        max_new_tokens=16,
        num_beams=3,
        num_return_sequences=3,
        return_dict_in_generate=True,
        output_scores=True,
    )
    length = given["input_ids"].shape[1]
    assert torch.equal(result.sequences[:, length:], golden.tensor(f"{prompt}_beam3_all_tokens"))
    # The release that made these goldens divided by the length with the prompt (GLM-4's: without), all later
    # ones divide by the number of new tokens.
    new = result.sequences.shape[1] - length
    divisor = new if golden.folder.name.startswith("glm4") else new + length
    wanted = golden[f"{prompt}_beam3_all_scores"] * divisor / new
    assert np.abs(result.sequences_scores.numpy() - wanted).max() < 1e-4
    steps = model.compute_transition_scores(
        result.sequences, result.scores, result.beam_indices, normalize_logits=False
    )
    assert torch.allclose(steps.sum(dim=1) / new, result.sequences_scores, atol=1e-4)


@each_golden
def test_beams_of_a_batch_are_those_of_each_row(golden, open_either_model):
    model, given = open_either_model(golden), model_inputs(golden, "batch")
    options = {"max_new_tokens": 8, "num_beams": 4, "num_return_sequences": 4}
    together = new_tokens(model, given, **options)
    for row, pad in enumerate(golden.pads("batch")):
        alone = {"input_ids": given["input_ids"][row : row + 1, pad:]}
        assert torch.equal(new_tokens(model, alone, **options), together[4 * row : 4 * row + 4])


@pytest.mark.parametrize(("golden", "prompt"), cases(REPETITION))
def test_repetition_penalty(golden, prompt, open_either_model):
    arguments = {"input_ids": golden.tensor(f"{prompt}_input_ids")}
    got = new_tokens(open_either_model(golden), arguments, max_new_tokens=24, repetition_penalty=1.3)
    assert got[0].tolist() == golden[f"{prompt}_{REPETITION}"].tolist()


@each_golden
def test_leading_pad_ids_without_a_mask_are_padding(golden, open_model):
    """As in the library; where the pad id is an end id too it cannot be told."""
    model, ids = open_model(golden), golden.tensor("batch_input_ids")
    got = new_tokens(model, {"input_ids": ids}, max_new_tokens=24)
    ends = np.atleast_1d(model.generation_config.eos_token_id)
    known = model.generation_config.pad_token_id not in ends
    assert torch.equal(got, golden.tensor("batch_generate")) == known


@each_golden
def test_padding_that_is_taken_for_text_is_told_once(golden, open_model, caplog):
    model, ids = open_model(golden), golden.tensor("batch_input_ids")
    _warn_once.cache_clear()
    told = {"max_new_tokens": 2, "do_sample": False}

    def warnings(given, **options) -> list[str]:
        caplog.clear()
        model.generate(given, **told, **options)
        return [record.getMessage() for record in caplog.records if record.name.startswith("chatglm_ov")]

    first, last = int(ids[0, 0]), int(ids[0, -1])
    ends = {"pad_token_id": first, "eos_token_id": [first]}
    assert warnings(ids, **ends, attention_mask=torch.ones_like(ids)) == []
    (text,) = warnings(ids, **ends)
    assert text.startswith(f"Rows begin with {first}, which is pad_token_id and an end id")
    assert warnings(ids, **ends) == []
    (text,) = warnings(ids, pad_token_id=last, eos_token_id=-1)
    assert text.startswith(f"Rows end with pad_token_id {last}, which is taken for text")
    # One row, and rows without any padding, are nobody's mistake.
    _warn_once.cache_clear()
    assert warnings(golden.tensor("p5_input_ids"), pad_token_id=last, eos_token_id=-1) == []
    other = next(index for index in range(model.config.vocab_size) if index not in ids)
    assert warnings(ids, pad_token_id=other, eos_token_id=other) == []


@each_golden
def test_a_config_of_the_call_leaves_the_models_ids(golden, open_model):
    """transformers takes the special ids that a config does not have from the model's own."""
    model, ids = open_model(golden), model_inputs(golden, "batch")["input_ids"]
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False)
    config = GenerationConfig(max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, generation_config=config), wanted)
    # A pad id that ends texts too tells of no padding, whoever says so.
    ends = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=model.generation_config.pad_token_id)
    unpadded = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=ends.eos_token_id)
    assert torch.equal(model.generate(ids, generation_config=ends), unpadded)


@each_golden
def test_a_call_waits_between_the_pieces_of_another(golden, open_model, monkeypatch):
    """Else it would take the sequence away: the model is one, forward() as well as generate()."""
    monkeypatch.setattr("chatglm_ov.generation.inputs.PIECE_TOKENS", 8)
    model, ids = open_model(golden), golden.tensor("p17_input_ids")
    wanted, threads, others = model(ids, logits_to_keep=1).logits, [], []

    def interfere(done: int, total: int) -> None:
        model.prompt_progress = None if done == total else interfere
        thread = threading.Thread(target=lambda: others.append(model(ids, logits_to_keep=1).logits))
        thread.start()
        threads.append(thread)

    model.prompt_progress = interfere
    assert torch.equal(model(ids, logits_to_keep=1).logits, wanted)
    for thread in threads:
        thread.join()
    assert threads and len(others) == len(threads) and all(torch.equal(other, wanted) for other in others)


@each_golden
def test_a_pad_id_inside_the_prompt_is_a_token(golden, open_model):
    model, ids = open_model(golden), golden.tensor("p17_input_ids").clone()
    ids[0, 5] = model.generation_config.pad_token_id
    told = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(
        new_tokens(model, {"input_ids": ids}, max_new_tokens=8), new_tokens(model, told, max_new_tokens=8)
    )


@each_golden
def test_padding_on_the_right_is_refused(golden, open_model):
    """The next token would follow padding. In the first generation the last one of a prompt must be seen anyway."""
    model, ids = open_model(golden), golden.tensor("p17_input_ids")
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    with pytest.raises(ChatGLMError, match=r"attention_mask: last column is padding|<sop> is missing"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)


@each_golden
def test_finished_rows_are_filled_with_the_pad_id(golden, open_either_model):
    model, given = open_either_model(golden), model_inputs(golden, "batch")
    greedy = golden.tensor("batch_generate")
    end = int(greedy[1, 3])
    got = new_tokens(model, given, max_new_tokens=12, eos_token_id=end, pad_token_id=1)
    assert got[1].tolist() == [*greedy[1, :4].tolist(), *[1] * (got.shape[1] - 4)]
    for row in (0, 2):
        ended = (greedy[row, :12] == end).nonzero()
        length = int(ended[0]) + 1 if len(ended) else 12
        assert got[row, :length].tolist() == greedy[row, :length].tolist()


class Collect(BaseStreamer):
    """All that a streamer is given, one row of tokens."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@each_golden
def test_stream_is_the_whole(golden, open_model):
    model, ids, streamer = open_model(golden), golden.tensor("p17_input_ids"), Collect()
    whole = model.generate(ids, do_sample=False, max_new_tokens=12, streamer=streamer)
    assert streamer.tokens == whole[0].tolist()
    assert streamer.ended
    with pytest.raises(ValueError, match="streamer"):
        model.generate(ids, num_beams=2, max_new_tokens=2, streamer=Collect())


@each_golden
def test_stream_from_another_thread(golden, open_model):
    model, ids, streamer = open_model(golden), golden.tensor("p17_input_ids"), Collect()
    options = {"do_sample": False, "max_new_tokens": 6, "streamer": streamer}
    thread = threading.Thread(target=model.generate, args=(ids,), kwargs=options)
    thread.start()
    thread.join()
    assert streamer.tokens == model.generate(ids, do_sample=False, max_new_tokens=6)[0].tolist()


@each_golden
def test_sampling_with_a_seed_is_reproducible(golden, open_either_model):
    model, given = open_either_model(golden), model_inputs(golden, "batch")
    options = {"do_sample": True, "top_p": 0.9, "temperature": 1.3, "top_k": 50, "max_new_tokens": 12}
    drawn = []
    for seed in (1, 1, 2):
        set_seed(seed)
        drawn.append(new_tokens(model, given, num_return_sequences=2, **options))
    assert drawn[0].shape == (6, 12)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][0], drawn[0][1])
    coldest = new_tokens(model, given, **{**options, "top_k": 1})
    assert torch.equal(coldest, golden.tensor("batch_generate")[:, :12])


@each_golden
def test_top_p_does_not_sort_the_vocabulary(golden, open_model, monkeypatch):
    monkeypatch.setattr(TopPLogitsWarper, "__call__", None)
    options = {"do_sample": True, "top_p": 0.6, "temperature": 1e-3, "max_new_tokens": 6}
    drawn = new_tokens(open_model(golden), {"input_ids": golden.tensor("p5_input_ids")}, **options)
    assert torch.equal(drawn[0], golden.tensor("p5_generate")[:6])


class Forbid(LogitsProcessor):
    """Never the given token."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.token] = -torch.inf
        return scores


class StopAfter(StoppingCriteria):
    """Ends every row when one of them holds the given token."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), bool((input_ids[:, -1] == self.token).any()))


@each_golden
def test_logits_processors_and_stopping_criteria(golden, open_model):
    model, arguments = open_model(golden), {"input_ids": golden.tensor("p5_input_ids")}
    greedy = golden.tensor("p5_generate")
    second = int(greedy[1])
    got = new_tokens(model, arguments, max_new_tokens=6, logits_processor=LogitsProcessorList([Forbid(second)]))
    assert got[0, 0] == greedy[0]
    assert second not in got[0]
    stopped = new_tokens(
        model, arguments, max_new_tokens=24, stopping_criteria=StoppingCriteriaList([StopAfter(second)])
    )
    assert stopped[0].tolist() == greedy[:2].tolist()
    banned = new_tokens(model, arguments, max_new_tokens=6, bad_words_ids=[[second]])
    assert torch.equal(banned, got)


@each_golden
def test_each_step_computes_one_row_of_logits_of_what_is_new(golden, open_model, monkeypatch):
    model, ids = open_model(golden), golden.tensor("p17_input_ids")
    calls = []
    infer = model.session.request.infer

    def recorded(new, *args, logits_to_keep, **kwargs):
        calls.append((new.shape, logits_to_keep))
        return infer(new, *args, logits_to_keep=logits_to_keep, **kwargs)

    monkeypatch.setattr(model.session.request, "infer", recorded)
    model.generate(ids, do_sample=False, num_beams=2, max_new_tokens=4)
    # The prompt is computed once for both beams.
    assert calls == [((1, 17), 1)] + [((2, 1), 1)] * 3


@each_golden
@pytest.mark.parametrize("prompt", ["p5", "batch"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "new_only"])
def test_generation_continues_from_a_cache(golden, prompt, whole, open_either_model):
    """The library's way is to pass the whole sequence again; only what is new does as well."""
    model, given = open_either_model(golden), model_inputs(golden, prompt)
    options = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**given, max_new_tokens=8, **options)
    ids = first.sequences if whole else first.sequences[:, -1:]
    second = model.generate(ids, past_key_values=first.past_key_values, max_new_tokens=10, **options)
    got = torch.cat([first.sequences[:, -8:], second.sequences[:, ids.shape[1] :]], dim=1)
    assert torch.equal(got, torch.from_numpy(np.atleast_2d(golden[f"{prompt}_generate"]))[:, :18])


@each_golden
@pytest.mark.parametrize("prompt", ["p5", "batch"])
def test_what_is_all_in_the_cache_is_not_fed_again(golden, prompt, open_model):
    """Neither the sequence nor its beginning; with one column less in the cache it goes on."""
    model, given = open_model(golden), model_inputs(golden, prompt)
    options = {"do_sample": False, "max_new_tokens": 8}
    wanted, length = model.generate(**given, **options), given["input_ids"].shape[1]
    cache = model(**given).past_key_values
    for ids in (given["input_ids"], given["input_ids"][:, :-1]):
        for mask in (None, torch.ones_like(ids)):
            with pytest.raises(ChatGLMError, match=f"columns is {ids.shape[1]}, all of them in past_key_values"):
                model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    assert cache.get_seq_length() == length
    cache.crop(length - 1)
    # A prefix that is seen both ways is another one without its last column.
    if cache.columns.prefix is None:
        assert torch.equal(model.generate(given["input_ids"], past_key_values=cache, **options), wanted)


@each_golden
def test_a_sequence_that_begins_otherwise_than_the_cache_is_refused(golden, open_model):
    model, start = open_model(golden), golden.tensor("p5_input_ids")
    cache = model(start).past_key_values
    new = golden.tensor("p5_dec_tokens")[:, :9]
    with pytest.raises(ChatGLMError, match="first columns is others, expected the 5 in past_key_values; new ids alone"):
        model.generate(new, past_key_values=cache, max_new_tokens=2)
    options = {"do_sample": False, "max_new_tokens": 4}
    mask = torch.ones(1, 14, dtype=torch.int64)
    got = model.generate(new, attention_mask=mask, past_key_values=cache, **options)
    assert torch.equal(got[:, 9:], model.generate(torch.cat([start, new], dim=1), **options)[:, 14:])


@each_golden
def test_ids_that_are_new_may_be_those_at_the_beginning(golden, open_model):
    """One alone, or with a mask that says so."""
    model, start = open_model(golden), golden.tensor("p5_input_ids")
    for count in (1, 2):
        new, cache = start[:, :count], model(start).past_key_values
        mask = None if count == 1 else torch.ones(1, 5 + count, dtype=torch.int64)
        got = model.generate(new, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=4)
        whole = torch.cat([start, new], dim=1)
        wanted = model.generate(whole, past_key_values=model(start).past_key_values, do_sample=False, max_new_tokens=4)
        assert torch.equal(got[:, count:], wanted[:, 5 + count :])


@each_golden
def test_a_cache_has_two_names(golden, open_model):
    """`past_key_values`, and `cache` as transformers calls it from 5.24 on, whichever release is installed."""
    model, start = open_model(golden), golden.tensor("p5_input_ids")
    following, options = golden.tensor("p5_dec_tokens")[:, :1], {"do_sample": False, "max_new_tokens": 6}
    whole = torch.cat([start, following], dim=1)
    seen = [
        (model(following, **{name: model(start).past_key_values}).logits,
         model.generate(whole, **{name: model(start).past_key_values}, **options))
        for name in ("past_key_values", "cache")
    ]  # fmt: skip
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one, other)
    handle = model(start).past_key_values
    for call in (model, model.generate):
        with pytest.raises(ChatGLMError, match="cache: value is given, expected nothing beside past_key_values"):
            call(following, past_key_values=handle, cache=handle)


@each_golden
def test_one_prompt_in_the_cache_serves_several_rows(golden, open_either_model):
    model, start = open_either_model(golden), golden.tensor("p5_input_ids")
    ids = torch.cat([start, golden.tensor("p5_dec_tokens")[:, :3]], dim=1)
    options = {"do_sample": False, "num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 8}
    cache = model(start).past_key_values
    got = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(got, model.generate(ids, **options))


@each_golden
def test_what_needs_the_keys_and_values_is_refused(golden, open_model):
    model, ids = open_model(golden), golden.tensor("p5_input_ids")
    for kind in ("static", "paged"):
        with pytest.raises(ChatGLMError, match=f"cache_implementation is '{kind}', expected none: the cache is inside"):
            model.generate(ids, max_new_tokens=2, cache_implementation=kind)
    with pytest.raises(ChatGLMError, match="continuous batching: cache is a paged one"):
        model.generate_batch([ids[0].tolist()])
    with pytest.raises(ChatGLMError, match="output_hidden_states is True"):
        model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, output_hidden_states=True)
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(ids, max_new_tokens=2, unheard_of=1)


@each_golden
def test_empty_prompts_are_refused(golden, open_model):
    model = open_model(golden)
    with pytest.raises(ChatGLMError, match="input_ids: type is NoneType"):
        model.generate(max_new_tokens=2)
    with pytest.raises(ChatGLMError, match=r"input_ids: shape is \[1, 0\]"):
        model.generate(torch.zeros(1, 0, dtype=torch.int64), max_new_tokens=2)
    with pytest.raises(ChatGLMError, match="generate: inputs_embeds is given"):
        model.generate(inputs_embeds=torch.zeros(1, 2, 8), max_new_tokens=2)
    with pytest.raises(ChatGLMError, match="generate: token_type_ids is given"):
        model.generate(torch.zeros(1, 2, dtype=torch.int64), token_type_ids=torch.zeros(1, 2), max_new_tokens=2)


@each_golden
def test_output_scores_and_logits(golden, open_model):
    model, ids = open_model(golden), golden.tensor("p5_input_ids")
    result = model.generate(
        ids,
        do_sample=False,
        max_new_tokens=8,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    wanted = golden.tensor("p5_dec_logits")[0, :8]
    assert float((torch.cat(result.logits) - wanted).abs().max()) < 1e-3
    assert torch.equal(torch.cat(result.scores), torch.cat(result.logits))
