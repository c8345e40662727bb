"""Logits of OVChatGLMForCausalLM against the originals', and what its calls refuse."""

# ruff: noqa: F811 (a fixture is imported)

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_sets import GOLDENS, cases, model_inputs, open_model  # noqa: F401
from transformers import AutoModelForCausalLM, DynamicCache

from chatglm_ov import ChatGLMError, OVChatGLMForCausalLM, convert
from chatglm_ov.generation.cache import StateCache

pytestmark = pytest.mark.transformers_matrix

TOLERANCE = 1e-3
# Between two ways through the same f32 graph: rounding only.
SAME = 1e-4

v1_only = pytest.mark.parametrize("golden", [golden for golden in GOLDENS if "both_tok_input_ids" in golden], ids=str)
each_golden = pytest.mark.parametrize("golden", GOLDENS, ids=str)


def real(values: torch.Tensor, pads: np.ndarray) -> torch.Tensor:
    """The rows [N, V] of [B, L, V] that are not padding."""
    return torch.cat([row[pad:] for row, pad in zip(values, pads, strict=True)])


def largest(a: torch.Tensor, b: torch.Tensor | np.ndarray) -> float:
    return float((a - torch.as_tensor(b)).abs().max())


@pytest.mark.parametrize(("golden", "prompt"), cases("prefill_logits"))
def test_prefill_logits(golden, prompt, open_model):
    model = open_model(golden)
    if prompt == "batch_nomask":
        got, pads = model(golden.tensor("batch_input_ids")).logits, np.zeros(3, dtype=int)
    else:
        got, pads = model(**model_inputs(golden, prompt)).logits, golden.pads(prompt)
    wanted = golden.tensor(f"{prompt}_prefill_logits")
    assert got.dtype == torch.float32
    assert got.shape == wanted.shape
    assert largest(real(got, pads), real(wanted, pads)) < TOLERANCE


# The positions of both_tok are the tokenizer's, which differ from the model's own.
@pytest.mark.parametrize(("golden", "prompt"), [case for case in cases("position_ids") if case.values[1] != "both_tok"])
def test_computed_positions_are_the_originals(golden, prompt, open_model):
    model, given = open_model(golden), model_inputs(golden, prompt)
    own = model(**given).logits
    told = model(**{**given, "position_ids": golden.tensor(f"{prompt}_position_ids")}).logits
    assert torch.equal(own, told)


@pytest.mark.parametrize(("golden", "prompt"), cases("dec_logits"))
@pytest.mark.parametrize("told", [False, True], ids=["remembered", "told"])
def test_teacher_forced_decode(golden, prompt, told, open_model):
    """Mask and positions of a step may be left to the cache or given in full: the result is the same."""
    model, given = open_model(golden), model_inputs(golden, prompt)
    output = model(**given, logits_to_keep=1)
    positions = golden.tensor(f"{prompt}_position_ids")[..., -1:]
    step = torch.tensor([0, 1])[:, None] if positions.ndim == 3 else 1
    wanted, tokens = golden.tensor(f"{prompt}_dec_logits"), golden.tensor(f"{prompt}_dec_tokens")
    keep = torch.ones(len(tokens), given["input_ids"].shape[1], dtype=torch.int64)
    for row, pad in enumerate(golden.pads(prompt)):
        keep[row, :pad] = 0
    for i in range(wanted.shape[1]):
        assert largest(output.logits[:, -1], wanted[:, i]) < TOLERANCE, f"step {i}"
        positions, keep = positions + step, torch.cat([keep, keep.new_ones(len(keep), 1)], dim=1)
        extra = {"attention_mask": keep, "position_ids": positions} if told else {}
        output = model(tokens[:, i : i + 1], past_key_values=output.past_key_values, **extra)


@each_golden
def test_logits_to_keep_is_the_tail_of_all(golden, open_model):
    model, ids = open_model(golden), golden.tensor("p17_input_ids")
    whole = model(ids).logits
    for kept in (1, 5, 17):
        tail = model(ids, logits_to_keep=kept).logits
        assert torch.equal(model(ids, logits_to_keep=torch.tensor(kept)).logits, tail)
        assert tail.shape[1] == kept
        assert largest(tail, whole[:, -kept:]) < SAME


@each_golden
def test_batch_row_is_the_row_alone(golden, open_model):
    model, given = open_model(golden), model_inputs(golden, "batch")
    tokens = golden.tensor("batch_dec_tokens")[:, :4]
    output = model(**given)
    batch = [output.logits]
    for i in range(4):
        output = model(tokens[:, i : i + 1], past_key_values=output.past_key_values)
        batch.append(output.logits)
    together = torch.cat(batch, dim=1)
    for row, pad in enumerate(golden.pads("batch")):
        output = model(given["input_ids"][row : row + 1, pad:])
        alone = [output.logits]
        for i in range(4):
            output = model(tokens[row : row + 1, i : i + 1], past_key_values=output.past_key_values)
            alone.append(output.logits)
        assert largest(together[row, pad:], torch.cat(alone, dim=1)[0]) < SAME


@each_golden
def test_stepwise_is_full(golden, open_model):
    """The first generation sees its prompt both ways, so that only what follows `<sop>` comes in steps."""
    model = open_model(golden)
    start = golden.tensor("p5_input_ids")
    ids = torch.cat([start, golden.tensor("p5_dec_tokens")[:, :9]], dim=1)
    full = model(ids).logits
    output = model(start)
    parts = [output.logits]
    for begin, end in ((5, 6), (6, 9), (9, 14)):
        output = model(ids[:, begin:end], past_key_values=output.past_key_values)
        parts.append(output.logits)
    assert largest(torch.cat(parts, dim=1), full) < SAME


@each_golden
def test_a_call_without_cache_is_fresh(golden, open_model):
    model, ids = open_model(golden), golden.tensor("p17_input_ids")
    first = model(ids).logits
    model(**model_inputs(golden, "batch"))
    assert torch.equal(model(ids).logits, first)


@each_golden
def test_one_row_of_positions_stands_for_all(golden, open_model):
    model, ids = open_model(golden), golden.tensor("p5_input_ids")
    positions = golden.tensor("p5_position_ids")
    twice = model(ids.repeat(2, 1), position_ids=positions).logits
    assert largest(twice[1], model(ids).logits[0]) < SAME


@v1_only
def test_masks_of_both_forms_are_one(golden, open_model):
    """[B, 1, L, L] with 1 = not seen, as bool or uint8, and [B, L] with 1 = token."""
    model, ids = open_model(golden), golden.tensor("batch_input_ids")
    blocked = golden.tensor("batch_attention_mask")
    wanted = model(ids, attention_mask=blocked).logits
    for mask in (blocked.bool(), 1 - blocked[:, 0, -1].int(), blocked[:, 0, -1] == 0):
        assert torch.equal(model(ids, attention_mask=mask).logits, wanted)


@v1_only
def test_blocked_mask_of_a_step(golden, open_model):
    """The original passes its last mask row on, with an open entry for the new token."""
    model, given = open_model(golden), model_inputs(golden, "batch")
    cache = model(**given).past_key_values
    row = given["attention_mask"][:, :, -1:]
    mask = torch.cat([row, torch.zeros_like(row[..., :1])], dim=-1).bool()
    tokens = golden.tensor("batch_dec_tokens")
    logits = model(tokens[:, :1], past_key_values=cache, attention_mask=mask).logits
    assert largest(logits[:, -1], golden.tensor("batch_dec_logits")[:, 1]) < TOLERANCE


@v1_only
def test_a_mask_that_padding_and_prefix_do_not_make_is_refused(golden, open_model):
    model, ids = open_model(golden), golden.tensor("p5_input_ids")
    mask = golden.tensor("p5_attention_mask").bool()
    mask[0, 0, 0, 2] = True
    with pytest.raises(ChatGLMError, match="row 0: column 2 for token 0 is blocked"):
        model(ids, attention_mask=mask)


@v1_only
def test_prompt_without_sop_is_refused(golden, open_model):
    ids = golden.tensor("p5_input_ids")[:, :-1]
    for call in (open_model(golden), open_model(golden).generate):
        with pytest.raises(ChatGLMError, match="input_ids row 0: <sop> is missing"):
            call(ids)


def _wrong_inputs(model, ids):
    """(arguments, what the error says)"""
    limit = model.config.vocab_size
    ones = torch.ones(1, ids.shape[1] + 1, dtype=torch.int64)
    yield {"input_ids": ids[:, :0]}, r"input_ids: shape is \[1, 0\]"
    yield {"input_ids": ids[0]}, r"input_ids: shape is \[5\]"
    yield {"input_ids": ids.float()}, r"input_ids: dtype is torch.float32, expected torch.int64"
    yield {"input_ids": ids.tolist()}, r"input_ids: type is list"
    yield {"input_ids": ids.where(ids != ids[0, 0], limit)}, f"a token id {limit}, expected 0 to {limit - 1}"
    yield {"input_ids": ids.where(ids != ids[0, 0], -1)}, "a token id -1"
    yield {"input_ids": ids, "attention_mask": ones}, r"attention_mask: shape is \[1, 6\], expected \[1, 5\]"
    yield {"input_ids": ids, "attention_mask": ones[:, :5] / 2}, "attention_mask: dtype is torch.float32"
    yield (
        {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0.5, 1]])},
        "attention_mask: dtype is torch.float32",
    )
    yield {"input_ids": ids, "attention_mask": ones[:, :5] * 0}, "row 0: tokens is 0"
    yield {"input_ids": ids, "position_ids": ones[:, :3]}, r"position_ids: shape is \[1, 3\]"
    filled = DynamicCache()
    filled.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
    yield {"input_ids": ids, "past_key_values": filled}, "past_key_values: type is DynamicCache"
    yield {"input_ids": ids, "labels": ids[:, 1:]}, r"labels is of shape \[1, 4\], expected \[1, 5\]"
    yield {"input_ids": ids.repeat(2, 1), "labels": ids}, r"labels is of shape \[1, 5\], expected \[2, 5\]"
    yield {"input_ids": ids, "logits_to_keep": -1}, "logits_to_keep is -1"
    yield {"input_ids": ids, "logits_to_keep": torch.tensor([0])}, "logits_to_keep is tensor"
    yield {"input_ids": ids, "logits_to_keep": 1.0}, "logits_to_keep is 1.0"
    yield {"input_ids": ids, "output_attentions": True}, "output_attentions is True"
    yield {"input_ids": ids, "output_hidden_states": True}, "output_hidden_states is True"
    yield {"inputs_embeds": torch.zeros(1, 5, 8)}, "forward: inputs_embeds is given, expected input_ids"
    yield {"input_ids": ids, "token_type_ids": ids}, "forward: token_type_ids is given"
    yield {}, "input_ids: type is NoneType"


@each_golden
def test_wrong_inputs_are_named_and_harmless(golden, open_model):
    model, ids = open_model(golden), golden.tensor("p5_input_ids")
    wanted = model(ids).logits
    for arguments, message in _wrong_inputs(model, ids):
        with pytest.raises(ChatGLMError, match=message) as caught:
            model(**arguments)
        assert "\n" not in str(caught.value)
    assert torch.equal(model(ids).logits, wanted)


@each_golden
def test_what_other_models_take_is_taken(golden, open_model):
    """A mask of floats, a cache of transformers with nothing in it, labels."""
    model, ids = open_model(golden), golden.tensor("p17_input_ids")
    wanted = model(ids).logits
    assert torch.equal(model(ids, attention_mask=torch.ones(ids.shape)).logits, wanted)
    assert torch.equal(model(ids, past_key_values=DynamicCache()).logits, wanted)
    nothing = {"inputs_embeds": None, "token_type_ids": None, "cache_position": torch.arange(17)}
    assert torch.equal(model(ids, **nothing).logits, wanted)
    given = {"input_ids": ids, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**given, past_key_values=DynamicCache()), model.generate(**given))
    labels = ids.clone()
    labels[:, :5] = -100
    likely = wanted[0, :-1].log_softmax(-1)[torch.arange(16), ids[0, 1:]]
    assert abs(float(model(ids, labels=labels).loss + likely[4:].mean())) < 1e-5
    assert model(ids).loss is None


@each_golden
def test_compiling_it_once_more_is_harmless(golden, open_model):
    model, ids = open_model(golden), golden.tensor("p5_input_ids")
    wanted = model(ids).logits
    twin = OVChatGLMForCausalLM(model.config, model.compiled)
    twin.compile()
    twin.compile(mode="reduce-overhead")
    assert torch.equal(twin(ids).logits, wanted)
    options = {"do_sample": False, "max_new_tokens": 3}
    assert torch.equal(twin.generate(ids, **options), model.generate(ids, **options))


@each_golden
def test_position_beyond_the_table_is_refused(golden, open_model):
    model, ids = open_model(golden), golden.tensor("p5_input_ids")
    limit = model.compiled.config.position_limit
    if limit is None:
        assert torch.isfinite(model(ids, position_ids=golden.tensor("p5_position_ids") + 10**4).logits).all()
        return
    with pytest.raises(ChatGLMError, match=f"a position {limit}, expected 0 to {limit - 1}"):
        model(ids, position_ids=torch.arange(limit - 4, limit + 1)[None])


@each_golden
def test_stale_and_foreign_caches_are_refused(golden, open_model):
    model, ids = open_model(golden), golden.tensor("p5_input_ids")
    old = model(ids).past_key_values
    new = model(ids).past_key_values
    for call in (model, model.generate):
        with pytest.raises(ChatGLMError, match="past_key_values: sequence is an earlier one"):
            call(ids[:, :1], past_key_values=old)
    with pytest.raises(ChatGLMError, match="sequence is an earlier one"):
        old.get_seq_length()
    with pytest.raises(ChatGLMError, match="input_ids: rows is 2, expected 1"):
        model(ids[:, :1].repeat(2, 1), past_key_values=new)
    assert new.get_seq_length() == 5
    twin = OVChatGLMForCausalLM(model.config, model.compiled)
    with pytest.raises(ChatGLMError, match="past_key_values: model is another one"):
        twin(ids[:, :1], past_key_values=new)


@each_golden
def test_two_models_of_one_compiled_model_keep_apart(golden, open_model):
    model, tokens = open_model(golden), golden.tensor("p5_dec_tokens")
    twin = OVChatGLMForCausalLM(model.config, model.compiled)
    cache = model(golden.tensor("p5_input_ids")).past_key_values
    twin(golden.tensor("p17_input_ids"))
    logits = model(tokens[:, :1], past_key_values=cache).logits
    assert largest(logits[0], golden["p5_dec_logits"][:, 1]) < TOLERANCE


@each_golden
def test_a_released_cache_begins_anew(golden, open_model):
    model, given = open_model(golden), model_inputs(golden, "batch")
    before = model(**given)
    request = model.session.request
    model.release_cache()
    assert model.session.request is not request
    with pytest.raises(ChatGLMError, match="past_key_values: sequence is an earlier one"):
        before.past_key_values.get_seq_length()
    assert torch.equal(model(**given).logits, before.logits)


@each_golden
def test_output_forms(golden, open_model):
    model, ids = open_model(golden), golden.tensor("p5_input_ids")
    logits, cache = model(ids, return_dict=False)
    assert isinstance(cache, StateCache)
    (again,) = model(ids, return_dict=False, use_cache=False)
    assert torch.equal(logits, again)


@each_golden
def test_config_has_what_generate_asks_for(golden, open_model):
    model, architecture = open_model(golden), open_model(golden).compiled.config
    assert model.config.num_hidden_layers == architecture.num_layers
    assert model.config.vocab_size == architecture.vocab_rows
    assert model.config.hidden_size == architecture.hidden_size
    assert model.generation_config.eos_token_id == architecture.eos_token_id
    assert model.generation_config.pad_token_id == architecture.pad_token_id
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    assert model.can_generate()
    with pytest.raises(ChatGLMError, match="save_pretrained"):
        model.save_pretrained("anywhere")
    with pytest.raises(ChatGLMError, match="push_to_hub"):
        model.push_to_hub("somebody/something")
    with pytest.raises(ChatGLMError, match="from_config: weights is none"):
        AutoModelForCausalLM.from_config(model.config)


@each_golden
@pytest.mark.parametrize("again", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_open_model_cannot_be_taken_along(golden, open_model, again):
    with pytest.raises(ChatGLMError, match=r"pickle is an open model, expected from_pretrained\("):
        again(open_model(golden))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("formats") / "model"
    convert(GOLDENS[0].checkpoint, folder, weight_formats=("f32", "bf16"), ops="stock", progress=False)
    return folder


def test_weight_format_is_chosen(folder):
    assert OVChatGLMForCausalLM.from_pretrained(folder, trust_remote_code=True).compiled.weight_format == "bf16"
    assert OVChatGLMForCausalLM.from_pretrained(folder, "f32").compiled.weight_format == "f32"
    with pytest.raises(ChatGLMError, match="weight_format is 'int4', expected one of"):
        OVChatGLMForCausalLM.from_pretrained(folder, "int4")


@pytest.mark.parametrize(
    "arguments",
    [
        {
            "trust_remote_code": True,
            "low_cpu_mem_usage": True,
            "local_files_only": True,
            "cache_dir": "x",
            "revision": "main",
        },
        {"load_in_8bit": False, "export": False},
        {"device_map": "auto", "torch_dtype": "auto", "compile": False},
        {"device_map": "cpu", "dtype": "auto", "ov_config": None, "attn_implementation": None},
        {"device_map": None, "dtype": None, "torch_dtype": None, "quantization_config": None},
    ],
    ids=["switches", "others", "auto", "cpu", "none"],
)
def test_what_other_libraries_are_opened_with_changes_nothing(folder, arguments):
    model = OVChatGLMForCausalLM.from_pretrained(folder, "f32", **arguments)
    assert model.compiled.weight_format == "f32"
    ids = GOLDENS[0].tensor("p5_input_ids")
    assert torch.equal(model(ids).logits, OVChatGLMForCausalLM.from_pretrained(folder, "f32")(ids).logits)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("dtype", torch.bfloat16, "torch.bfloat16, expected weight_format"),
        ("torch_dtype", "float16", "'float16', expected weight_format"),
        ("device_map", {"": 0}, r"{'': 0}, expected device"),
        ("ov_config", {"NUM_STREAMS": 1}, r"{'NUM_STREAMS': 1}, expected properties"),
        ("quantization_config", {"bits": 4}, r"{'bits': 4}, expected weight_format"),
        ("attn_implementation", "sdpa", "'sdpa', expected none"),
        ("load_in_8bit", True, "True, expected weight_format='int8'"),
    ],
)
def test_what_would_not_be_followed_is_told(folder, name, value, wanted):
    with pytest.raises(ChatGLMError, match=f"from_pretrained: {name} is {wanted}"):
        OVChatGLMForCausalLM.from_pretrained(folder, **{name: value})


def test_arguments_that_nobody_knows(folder):
    with pytest.raises(TypeError, match="unexpected keyword argument 'weigth_format'"):
        OVChatGLMForCausalLM.from_pretrained(folder, weigth_format="f32")


def test_generation_config_of_the_folder_counts(folder):
    path = folder / "generation_config.json"
    before = path.read_text() if path.exists() else None
    try:
        path.write_text('{"do_sample": true, "top_p": 0.8, "eos_token_id": 7}')
        config = OVChatGLMForCausalLM.from_pretrained(folder).generation_config
        assert (config.do_sample, config.top_p, config.eos_token_id) == (True, 0.8, 7)
        assert config.pad_token_id is not None
        for wrong in ("{", "[1]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [2, null]}'):
            path.write_text(wrong)
            with pytest.raises(ChatGLMError, match=re.escape(str(path))):
                OVChatGLMForCausalLM.from_pretrained(folder)
    finally:
        path.unlink() if before is None else path.write_text(before)


def test_another_object_over_the_weights_of_a_relative_path(folder, monkeypatch):
    """It reads generation_config.json again, wherever the program is by then."""
    monkeypatch.chdir(folder.parent)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    model = OVChatGLMForCausalLM.from_pretrained(folder.name)
    monkeypatch.chdir("/")
    assert OVChatGLMForCausalLM(model.config, model.compiled).generation_config.eos_token_id == [2, 7]


@pytest.mark.parametrize(
    "stray",
    [
        {"_attn_implementation": "flash_attention_2"},
        {"use_return_dict": False},
        {"text_config": {}},
        {"sub_configs": {}},
    ],
)
def test_config_fields_that_say_nothing_here(folder, stray):
    path = folder / "config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | stray))
        assert OVChatGLMForCausalLM.from_pretrained(folder).config.vocab_size > 0
    finally:
        path.write_text(before)
    with pytest.raises(ChatGLMError, match="weight_format is ''"):
        OVChatGLMForCausalLM.from_pretrained(folder, "")
