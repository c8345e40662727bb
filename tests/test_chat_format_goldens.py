"""Prompts and answers of the chat formats against the original chat() of each generation."""

from __future__ import annotations

import json

import pytest
from tokenizer_cases import DATA, SETS, golden_of, tokenizer_of

from chatglm_ov.chat import chat_format_for
from chatglm_ov.chat.glm4 import GLM4Format

pytestmark = pytest.mark.transformers_matrix


def prompts() -> list[tuple[str, int]]:
    counts = {"v1": 3, "v1_real": 3, "v2": 3, "v3": 5, "glm4": 6}
    return [(name, index) for name in SETS for index in range(counts[name])]


def question(entry: dict) -> tuple[str, list, str]:
    """(query, history, role) of an entry that is given either so or as messages."""
    if "messages" in entry:
        *history, last = entry["messages"]
        return last["content"], history, last["role"]
    return entry["query"], entry["history"], entry.get("role", "user")


def as_messages(entry: dict) -> list[dict]:
    query, history, role = question(entry)
    if history and isinstance(history[0], (list, tuple)):
        turns = [({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a in history]
        history = [message for turn in turns for message in turn]
    return [*history, {"role": role, "content": query}]


@pytest.mark.parametrize(("name", "index"), prompts())
def test_prompt_ids(name, index):
    tokenizer, entry = tokenizer_of(name), golden_of(name)["chat"][index]
    chat = chat_format_for(tokenizer)
    query, history, role = question(entry)
    assert chat.build_inputs(tokenizer, query, history, role) == entry["ids"]
    messages = as_messages(entry)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == entry["ids"]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if "prompt" in entry:
        assert text == entry["prompt"]
    else:
        assert text.startswith("[gMASK]sop<|") and text.endswith("<|assistant|>")


def test_every_prompt_of_the_goldens_is_compared():
    found = {name: len(golden_of(name)["chat"]) for name in ("v1", "glm4")}
    assert found == {"v1": 3, "glm4": 6}


def test_glm4_tools_as_later_transformers_write_them():
    """The same template gives other JSON in transformers 4.44 and later: keys and characters as they are."""
    tokenizer, chat = tokenizer_of("glm4"), GLM4Format(escaped_json=False)
    entries = golden_of("glm4")["chat"]
    assert any(entry["prompt"] != entry["prompt_transformers_4_44"] for entry in entries)
    for entry in entries:
        assert chat.conversation_text(tokenizer, entry["messages"]) == entry["prompt_transformers_4_44"]


def chats(name: str) -> list[dict]:
    return json.loads((DATA / f"tokenizer_{name}" / "chat.json").read_text(encoding="utf-8"))


def has_ids_behind_the_vocabulary(name: str, entry: dict) -> bool:
    """The random models of the goldens choose ids of padding rows too. The original GLM-4 tokenizer then writes out a
    second time all text before such an id; here it has no text."""
    return max(entry["generated_ids"]) >= len(tokenizer_of(name))


@pytest.mark.parametrize("name", ["v1", "glm4"])
def test_chat_prompts(name):
    tokenizer = tokenizer_of(name)
    for entry in chats(name):
        assert chat_format_for(tokenizer).build_inputs(tokenizer, *question(entry)) == entry["prompt_ids"]


@pytest.mark.parametrize("name", ["v1", "glm4"])
def test_decoded_answers(name):
    tokenizer = tokenizer_of(name)
    exact = [entry for entry in chats(name) if not has_ids_behind_the_vocabulary(name, entry)]
    assert len(exact) >= 3
    for entry in exact:
        assert tokenizer.decode(entry["generated_ids"]) == entry["decode_generated"]


def test_ids_behind_the_vocabulary_have_no_text():
    tokenizer = tokenizer_of("glm4")
    entries = [entry for entry in chats("glm4") if has_ids_behind_the_vocabulary("glm4", entry)]
    assert entries
    for entry in entries:
        known = [index for index in entry["generated_ids"] if index < len(tokenizer)]
        assert tokenizer.decode(entry["generated_ids"]) == tokenizer.decode(known)


@pytest.mark.parametrize("name", ["v1", "glm4"])
def test_answers_and_histories(name):
    """The originals of v1 keep every id; the one of GLM-4 drops the last, here no stop token, which loses its text."""
    tokenizer, chat = tokenizer_of(name), chat_format_for(tokenizer_of(name))
    compared = 0
    for entry in chats(name):
        if "chat_response" not in entry or has_ids_behind_the_vocabulary(name, entry):
            continue
        ids = entry["generated_ids"] if name == "v1" else entry["generated_ids"][:-1]
        query, history, role = question(entry)
        response, new_history = chat.process_response(tokenizer.decode(ids), query, history, role)
        assert response == entry["chat_response"]
        assert json.loads(json.dumps(new_history)) == entry["chat_history"]
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize("name", ["v1", "glm4"])
def test_answers_of_a_stream(name):
    """v1 yields the answer after each id but the last; GLM-4 the one of all ids before it, where it is not empty and
    does not end within a character."""
    tokenizer, chat = tokenizer_of(name), chat_format_for(tokenizer_of(name))
    compared = 0
    for entry in chats(name):
        if "stream_chat_responses" not in entry or has_ids_behind_the_vocabulary(name, entry):
            continue
        query, history, role = question(entry)
        ids = entry["generated_ids"]
        texts = [tokenizer.decode(ids[:length]) for length in range(len(ids))]
        texts = texts[1:] if name == "v1" else [text for text in texts if text and text[-1] != "\ufffd"]
        responses = [chat.process_response(text, query, history, role)[0] for text in texts]
        assert responses == entry["stream_chat_responses"]
        compared += 1
    assert compared >= 2
