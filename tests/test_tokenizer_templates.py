"""Chat templates of the tokenizers: what they return, answers that go on, prompts of the originals."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import copy
from functools import partial

import pytest
from tokenizer_families import FAMILIES, families, folders, tokenizers  # noqa: F401

from chatglm_ov.errors import ChatGLMError

pytestmark = pytest.mark.transformers_matrix


@families
def test_what_a_chat_template_returns(tokenizers, family):
    tokenizer = tokenizers[family]
    short, long = ([{"role": "user", "content": "床前明月光。" * count}] for count in (1, 3))
    template = {"add_generation_prompt": True}
    ids = tokenizer.apply_chat_template(long, return_dict=False, **template)
    assert isinstance(ids, list) and isinstance(ids[0], int)
    tensor = tokenizer.apply_chat_template(long, return_dict=False, return_tensors="pt", **template)
    assert tensor.tolist() == [ids]
    encoded = tokenizer.apply_chat_template(long, return_dict=True, return_tensors="pt", **template)
    assert encoded["input_ids"].tolist() == [ids]
    assert ("attention_mask" in encoded) == (family != "chatglm")
    both = tokenizer.apply_chat_template([short, long], return_dict=False, **template)
    assert both[1] == ids and len(both[0]) < len(ids)
    padded = tokenizer.apply_chat_template(
        [short, long], padding=True, return_dict=True, return_tensors="pt", **template
    )
    missing = len(ids) - len(both[0])
    assert padded["input_ids"].tolist() == [[tokenizer.pad_token_id] * missing + both[0], ids]
    assert padded["position_ids"][0, ..., :missing].sum() == 0
    cut = tokenizer.apply_chat_template(long, return_dict=False, truncation=True, max_length=4, **template)
    assert cut == ids[:4]
    shorter = copy.deepcopy(tokenizer)
    shorter.truncation_side, shorter.model_max_length = "left", 5
    assert shorter.apply_chat_template(long, return_dict=False, truncation=True, **template) == ids[-5:]
    assert shorter.apply_chat_template(long, return_dict=False, truncation=True, max_length=4, **template) == ids[-4:]
    assert shorter.apply_chat_template(long, return_dict=False, **template) == ids


@pytest.mark.parametrize("family", ["chatglm3", "glm4"])
def test_generation_prompt_is_optional(tokenizers, family):
    tokenizer, message = tokenizers[family], [{"role": "user", "content": "明"}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert tokenizer.apply_chat_template(message, return_dict=False) == ids[:-1]
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")


BEGUN = [
    {"role": "user", "content": "床"},
    {"role": "assistant", "content": "前"},
    {"role": "user", "content": "明"},
    {"role": "assistant", "content": "月光 "},
]
ECHO = [{"role": "user", "content": "月光 "}, BEGUN[-1]]
"""An answer that repeats the question."""


@families
def test_an_answer_that_goes_on(tokenizers, family):
    """Nothing stands behind it: not the generation prompt, and not what ends an answer."""
    tokenizer = tokenizers[family]
    ids = tokenizer.apply_chat_template(BEGUN, continue_final_message=True, return_dict=False)
    asked = tokenizer.apply_chat_template(BEGUN[:-1], add_generation_prompt=True, return_dict=False)
    assert ids[: len(asked)] == asked and len(ids) > len(asked)
    assert tokenizer.decode(ids[len(asked) :]).strip() == "月光"


@pytest.mark.parametrize("messages", [BEGUN, ECHO], ids=["another text", "the question"])
@pytest.mark.parametrize("family", FAMILIES[1:])
def test_the_text_of_an_answer_that_goes_on(tokenizers, family, messages):
    tokenizer = tokenizers[family]
    text = tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    assert text.startswith(asked) and text[len(asked) :].lstrip() == "月光 "
    both = tokenizer.apply_chat_template([messages, BEGUN[:2]], continue_final_message=True, tokenize=False)
    assert both[0] == text and both[1].endswith("前")


def test_a_template_that_takes_whitespace_or_the_answer_away(tokenizers):
    tokenizer = copy.copy(tokenizers["glm4"])
    tokenizer.chat_template = "{% for item in messages %}{{ item['content'] | trim }}<eop>{% endfor %}"
    assert tokenizer.apply_chat_template(BEGUN, continue_final_message=True, tokenize=False).endswith("明<eop>月光")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ChatGLMError, match=r"messages\[3\]: content is not in what the template writes"):
        tokenizer.apply_chat_template(BEGUN, continue_final_message=True)


@families
def test_what_cannot_go_on(tokenizers, family):
    tokenizer = tokenizers[family]
    with pytest.raises(ChatGLMError, match="add_generation_prompt is True, expected False with continue_final_message"):
        tokenizer.apply_chat_template(BEGUN, continue_final_message=True, add_generation_prompt=True)
    if family == "chatglm":
        with pytest.raises(ChatGLMError, match="continue_final_message is given for text, expected tokenize=True"):
            tokenizer.apply_chat_template(BEGUN, continue_final_message=True, tokenize=False)
    if family in ("chatglm", "chatglm2"):
        with pytest.raises(ChatGLMError, match=r"messages\[2\]: role is 'user', expected 'assistant'"):
            tokenizer.apply_chat_template(BEGUN[:-1], continue_final_message=True)


def test_chatglm3_methods_of_the_original(tokenizers):
    tokenizer = tokenizers["chatglm3"]
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "metadata": "", "content": "b"}]
    built = tokenizer.build_chat_input("q", history)
    messages = [*history, {"role": "user", "content": "q"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert built["input_ids"].tolist() == [expected]
    single = [index for m in messages for index in tokenizer.build_single_message(m["role"], "", m["content"])]
    assert expected == [*tokenizer.get_prefix_tokens(), *single, tokenizer.get_command("<|assistant|>")]


def test_chatglm2_prompt_of_the_original(tokenizers):
    prompt = tokenizers["chatglm2"].build_prompt("q", [("a", "b")])
    assert prompt == "[Round 1]\n\n问：a\n\n答：b\n\n[Round 2]\n\n问：q\n\n答："


@families
def test_arguments_that_a_fixed_format_cannot_take(tokenizers, family):
    message = [{"role": "user", "content": "q"}]
    for name, value in {"chat_template": "x", "documents": [{}]}.items():
        with pytest.raises(ChatGLMError, match=f"apply_chat_template: {name} is of type"):
            tokenizers[family].apply_chat_template(message, **{name: value})
    with pytest.raises(ChatGLMError, match="conversation is of type list, expected a list of messages, not empty"):
        tokenizers[family].apply_chat_template([])


@pytest.mark.parametrize("family", ["chatglm", "chatglm2", "chatglm3", "glm4"])
def test_template_options_are_those_of_a_call(tokenizers, family):
    tokenizer, message = tokenizers[family], [{"role": "user", "content": "床前明月光"}]
    make = partial(tokenizer.apply_chat_template, message, add_generation_prompt=True, return_dict=False)
    ids = make()
    for told in ({"pad_to_multiple_of": 32}, {"tokenizer_kwargs": {"pad_to_multiple_of": 32}}):
        padded = make(padding=True, **told)
        assert len(padded) % 32 == 0 and padded[-len(ids) :] == ids
    assert make(truncation="do_not_truncate", max_length=2) == ids
    assert make(truncation="longest_first", max_length=2) == ids[:2]
    assert make(enable_thinking=False) == ids
    with pytest.raises(ChatGLMError, match="padding_side is 'right', expected 'left'"):
        make(padding=True, padding_side="right")
    with pytest.raises(ChatGLMError, match="return_assistant_tokens_mask"):
        make(return_assistant_tokens_mask=True)
