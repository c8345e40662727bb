"""`generate()` and `model()` that go on with a cache: other masks, caches of transformers' own, the last position."""

# ruff: noqa: F811 (a fixture is imported)

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_cases import V1, V2, without_library
from golden_sets import GOLDENS, interrupt_calls, model_inputs, open_either_model, open_model  # noqa: F401
from transformers import DynamicCache, GenerationConfig

from chatglm_ov import ChatGLMError, OVChatGLMForCausalLM, convert
from chatglm_ov.runtime import kv_cache

pytestmark = pytest.mark.transformers_matrix

each_golden = pytest.mark.parametrize("golden", GOLDENS, ids=str)
GREEDY = {"do_sample": False, "max_new_tokens": 6}


def begun(model: OVChatGLMForCausalLM, golden) -> tuple[torch.Tensor, torch.Tensor, object]:
    """A batch with three more tokens: ids and mask [B, T] of a next turn of two tokens, and the cache."""
    given = model_inputs(golden, "batch")
    first = model.generate(**given, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, given["input_ids"][:, -2:].flip(0)], dim=1)
    mask = given["attention_mask"]
    # ChatGLM-6B's own has 1 for what is not seen.
    mask = 1 - mask[:, 0, -1].long() if mask.ndim == 4 else mask
    mask = torch.cat([mask, torch.ones(len(ids), 5, dtype=torch.int64)], dim=1)
    return ids, mask, first.past_key_values


@each_golden
@pytest.mark.parametrize("taken_back", [-4, -5])
def test_what_was_text_may_be_padding_in_the_next_turn(golden, taken_back, open_either_model):
    """Rows of a batch end at different lengths: what stands behind the end is masked when they go on."""
    model = open_either_model(golden)
    ids, mask, cache = begun(model, golden)
    mask[1, taken_back] = 0
    wanted = model.generate(ids, attention_mask=mask, **GREEDY)
    ids, _, cache = begun(model, golden)
    assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY), wanted)
    ids, _, cache = begun(model, golden)
    with pytest.raises(ChatGLMError, match=r"attention_mask row 1: column .* is 0, expected 1, as when it was fed"):
        model.generate(ids[:, -2:], attention_mask=mask, past_key_values=cache, **GREEDY)


@pytest.mark.parametrize(
    ("golden", "masked"), [(V2, [(0, 20), (1, 18)]), (V1, [(0, 1)])], ids=["rows at different columns", "in a prefix"]
)
def test_columns_that_are_masked_in_the_next_turn_alone(golden, masked, open_either_model):
    """What stands behind the first of them is computed again; all, where what they are in is computed at once."""
    model = open_either_model(golden)
    ids = golden.tensor("p17_input_ids").repeat(len(masked), 1)
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([first.sequences, ids[:, :2]], dim=1)
    mask = torch.ones_like(longer)
    for row, column in masked:
        mask[row, column] = 0
    ours = model.generate(longer, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(ours, model.generate(longer, attention_mask=mask, **GREEDY))


@each_golden
def test_a_cache_that_the_caller_makes_stands_for_its_sequence(golden, open_either_model):
    model, ids = open_either_model(golden), golden.tensor("p17_input_ids")
    whole = model.generate(ids, **GREEDY)
    cache, new, made = DynamicCache(), ids, []
    for _ in range(6):
        new = model(new, past_key_values=cache).logits[:, -1:].argmax(-1)
        made.append(int(new))
    assert made == whole[0, ids.shape[1] :].tolist()

    turns = DynamicCache()
    first = model.generate(ids, past_key_values=turns, **GREEDY)
    calls = []
    model.prompt_progress = lambda done, total: calls.append(total)
    longer = torch.cat([first, ids[:, -3:]], dim=1)
    second = model.generate(longer, past_key_values=turns, **GREEDY)
    model.prompt_progress = None
    assert calls == [4]
    assert torch.equal(second, model.generate(longer, **GREEDY))


@each_golden
def test_a_cache_of_a_sequence_that_is_gone(golden, open_model):
    """A whole sequence is computed again, new tokens alone cannot be."""
    model, ids = open_model(golden), golden.tensor("p17_input_ids")
    one, other = DynamicCache(), DynamicCache()
    first = model.generate(ids, past_key_values=one, **GREEDY)
    model.generate(golden.tensor("p5_input_ids"), past_key_values=other, **GREEDY)
    longer = torch.cat([first, ids[:, -3:]], dim=1)
    wanted = model.generate(longer, **GREEDY)
    assert torch.equal(model.generate(longer, past_key_values=one, **GREEDY), wanted)
    with pytest.raises(ChatGLMError, match="past_key_values: sequence is an earlier one"):
        model(ids[:, -1:], past_key_values=other)


def test_a_cache_of_a_call_that_was_interrupted(open_either_model, monkeypatch):
    model, ids, mine = open_either_model(V2), V2.tensor("p17_input_ids"), DynamicCache()
    first = model.generate(ids, past_key_values=mine, **GREEDY)
    longer = torch.cat([first, ids[:, -3:]], dim=1)
    interrupt_calls(model, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        model.generate(longer, past_key_values=mine, **GREEDY)
    monkeypatch.undo()
    assert torch.equal(model.generate(longer, past_key_values=mine, **GREEDY), model.generate(longer, **GREEDY))


@without_library
def test_a_prompt_that_the_memory_cannot_hold_is_refused_before_it_is_computed(open_model, monkeypatch):
    model, ids = open_model(V2, ops="fused"), V2.tensor("p17_input_ids").repeat(2, 30)
    model.release_cache()
    layers, layout = model.config.num_hidden_layers, model.compiled.cache_layout
    enough_for_half = (layers + 1) * layout.nbytes(2, 256 // kv_cache.BLOCK_SLOTS)
    monkeypatch.setattr(kv_cache, "available", lambda: enough_for_half)
    done = []
    how = {"max_new_tokens": 1, "prompt_progress": lambda columns, total: done.append(columns)}
    with pytest.raises(ChatGLMError, match=r"KV cache: free memory is .*, for 2 rows of 512 slots"):
        model.generate(ids, **how)
    assert not done
    model.generate(ids[:, :256], **how)
    monkeypatch.undo()
    model.generate(ids, **how)
    assert done == [256, 256, 510]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> OVChatGLMForCausalLM:
    """A model of 40 positions."""
    folder = convert(V2.checkpoint, tmp_path_factory.mktemp("short") / "out", ("f32",), ops="stock", progress=False)
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seq_length": 40}))
    return OVChatGLMForCausalLM.from_pretrained(folder, "f32", "f32")


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_text_ends_where_the_positions_do(short, num_beams):
    ids = V2.tensor("p17_input_ids")
    how = {"do_sample": False, "eos_token_id": -1, "num_beams": num_beams}
    wanted = short.generate(ids, max_new_tokens=24, **how)
    assert wanted.shape[1] == 41
    assert torch.equal(short.generate(ids, max_new_tokens=1000, **how), wanted)
    assert torch.equal(short.generate(ids, max_length=1000, **how), wanted)
    of_call = GenerationConfig(max_new_tokens=1000, pad_token_id=0, **how)
    assert torch.equal(short.generate(ids, generation_config=of_call), wanted)
    if num_beams == 1:
        assert torch.equal(short.generate(ids, max_new_tokens=1000, prompt_lookup_num_tokens=3, **how), wanted)


def test_lengths_of_the_models_config_beside_one_of_the_call(short):
    ids, of_model = V2.tensor("p17_input_ids"), short.generation_config
    of_call = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=-1)
    try:
        of_model.max_new_tokens = 1000
        assert short.generate(ids, generation_config=of_call).shape[1] <= 41
        of_model.guidance_scale = 1.5
        with pytest.raises(ChatGLMError, match=r"guidance_scale is 1\.5, expected none"):
            short.generate(ids, generation_config=of_call)
    finally:
        of_model.max_new_tokens = of_model.guidance_scale = None


def test_a_pad_id_may_be_a_tensor(short):
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.int64), V2.tensor("p17_input_ids")], dim=1)
    how = {"do_sample": False, "max_new_tokens": 4}
    wanted = short.generate(ids, pad_token_id=0, **how)
    for pad in (torch.tensor(0), torch.tensor([0])):
        assert torch.equal(short.generate(ids, pad_token_id=pad, **how), wanted)


def test_a_config_of_the_call_stays_as_it_is(short, recwarn):
    config = GenerationConfig(max_new_tokens=4, pad_token_id=0, eos_token_id=1, use_cache=False)
    short.generate(V2.tensor("p17_input_ids"), generation_config=config)
    assert config.use_cache is False
    assert not [warning for warning in recwarn if "generation-related arguments" in str(warning.message)]
