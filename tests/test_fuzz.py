"""Tokenizers, chat formats and streams under arbitrary input: no exception but ours, no text lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizer_cases import TESTS, fast_folder, tokenizer_of

from chatglm_ov import ChatGLMError, load_tokenizer
from chatglm_ov.chat import chat_format_for
from chatglm_ov.tokenizer import TextStream
from chatglm_ov.unicode import whole_characters

pytestmark = pytest.mark.transformers_matrix

DEMO = TESTS.parent / "chatglm_ov" / "demo" / "checkpoint"
FAST = ("hf", "edge", "0414", "z1")
OWN = ("v1", "v2", "v3", "glm4")
examples = settings(max_examples=30)
own = pytest.mark.parametrize("name", OWN)
each = pytest.mark.parametrize("name", [*OWN, *FAST])


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Tokenizer by family: early and late sentencepiece, tiktoken, tokenizer.json with each template."""
    loaded = {f"v{n}": load_tokenizer(DEMO, family=f"chatglm{n}") for n in (2, 3)}
    for name in FAST:
        folder: Path = tmp_path_factory.mktemp(name)
        loaded[name] = load_tokenizer(fast_folder(folder, template="" if name == "hf" else name, prefix=True))
    return lambda name: loaded[name] if name in loaded else tokenizer_of(name)


def ours(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the call returns, None where it raises a ChatGLMError of one line."""
    try:
        return call(*arguments, **options)
    except ChatGLMError as error:
        assert "\n" not in str(error)
        return None


# ---- what is drawn

_TOKENS = ("<|user|>", "<|assistant|>", "<|observation|>", "[gMASK]", "<sop>", "sop", "<eop>", "<pad>", "</s>", "<unk>")
_MARKS = ("<n>", "<|tab|>", "<|blank_7|>", "<think>", "</think>", "\n", "\u2581", "\ud83d", "\ufffd", "[[训练时间]]")
_CALLS = (
    "track\n",
    "```python\n",
    "tool_call(a=1)",
    "tool_call(a='",
    "{",
    '{"a": 1}',
    "[",
    "}",
    "```",
    "1e999",
    "(" * 300,
)
words = st.one_of(st.text(max_size=5), st.characters(), st.sampled_from([*_TOKENS, *_MARKS, *_CALLS]))
texts = st.lists(words, max_size=8).map("".join)
plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
numbers = st.one_of(st.integers(-3, 2000), st.integers(), st.floats())
json_like = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
roles = st.sampled_from(["system", "user", "assistant", "observation", "tool", ""])
tools = st.one_of(
    json_like,
    st.lists(
        st.fixed_dictionaries({"type": texts, "function": st.fixed_dictionaries({"name": texts, "x": json_like})})
    ),
    st.just([{"type": "function", "function": {"name": "track", "parameters": {}}}]),
)
messages = st.fixed_dictionaries(
    {"role": roles, "content": st.one_of(texts, json_like)},
    optional={"metadata": st.one_of(texts, json_like), "tools": tools, "thinking": texts, "tool_calls": json_like},
)
good_messages = st.fixed_dictionaries({"role": roles.filter(lambda role: role not in ("", "tool")), "content": texts})
histories = st.one_of(
    json_like,
    st.lists(messages, max_size=3),
    st.lists(good_messages, max_size=4),
    st.lists(st.tuples(texts, texts), max_size=3),
    st.lists(st.one_of(st.tuples(texts, texts), messages, json_like), max_size=3),
)


# ---- tokenizers


@each
@examples
@given(text=texts)
def test_every_text_has_ids_and_its_ids_have_text(tokenizers, name, text):
    tokenizer = tokenizers(name)
    text = text if name in OWN else whole_characters(text)
    ids = tokenizer.encode(text)
    assert all(0 <= index < len(tokenizer) for index in ids)
    assert isinstance(tokenizer.decode(ids), str)


@pytest.mark.parametrize("name", ["v2", "v3", "glm4", *FAST])
@examples
@given(text=plain)
def test_text_in_is_text_out(tokenizers, name, text):
    """Sentencepiece writes blanks as U+2581, so that this character comes back as one."""
    tokenizer = tokenizers(name)
    assume(not any(token in text for token in tokenizer.added_tokens_encoder))
    expected = text.replace("\u2581", " ") if name in ("v2", "v3") else text
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == expected


@examples
@given(
    lines=st.lists(
        st.lists(st.text("床前明月光疑是地霜abcXYZ019", min_size=1, max_size=5), min_size=1, max_size=4), max_size=4
    )
)
def test_lines_of_words_are_kept_by_the_first_generation(lines):
    """It folds characters and drops blanks at the ends of a line, but keeps words, indents and lines."""
    text = "\n".join("\t".join(words) for words in lines)
    tokenizer = tokenizer_of("v1")
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


anything = st.one_of(json_like, st.lists(st.integers(-3, 3000), max_size=6), st.lists(numbers, max_size=4))


@own
@examples
@given(ids=anything)
def test_anything_as_ids(tokenizers, name, ids):
    tokenizer = tokenizers(name)
    text = ours(tokenizer.decode, ids)
    streamed = ours(lambda: (stream := TextStream(tokenizer)).put(ids) + stream.flush())
    if not isinstance(ids, list) or not any(isinstance(index, list) for index in ids):
        assert text == streamed  # lists of lists are a batch for decode()


@pytest.mark.parametrize("name", FAST)
@examples
@given(ids=anything)
def test_anything_as_ids_of_a_stream(tokenizers, name, ids):
    stream = TextStream(tokenizers(name))
    text = ours(stream.put, ids)
    assert text is None or isinstance(text + stream.flush(), str)


# ---- streams


@each
@examples
@given(data=st.data(), skip=st.booleans())
def test_a_stream_in_chunks_is_the_whole_text(tokenizers, name, data, skip):
    tokenizer = tokenizers(name)
    some_ids = st.one_of(
        st.lists(st.integers(0, len(tokenizer) - 1), max_size=6),
        texts.map(lambda text: tokenizer.encode(whole_characters(text), add_special_tokens=False)),
    )
    chunks = data.draw(st.lists(some_ids, max_size=6))
    ids = [index for chunk in chunks for index in chunk]
    stream = TextStream(tokenizer, skip_special_tokens=skip)
    pieces = [stream.put(chunk) for chunk in chunks]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["v2", "v3", "glm4", *FAST])
@examples
@given(text=plain)
def test_a_stream_never_ends_within_a_character(tokenizers, name, text):
    assume("\ufffd" not in text)
    stream = TextStream(tokenizers(name))
    ids = tokenizers(name).encode(text, add_special_tokens=False)
    assert not any("\ufffd" in stream.put(index) for index in ids) and stream.flush() == ""


# ---- chat


@each
@examples
@given(query=st.one_of(texts, json_like), history=histories, role=st.one_of(roles, json_like))
def test_any_history(tokenizers, name, query, history, role):
    tokenizer = tokenizers(name)
    chat, before = chat_format_for(tokenizer), repr(history)
    ids = ours(chat.build_inputs, tokenizer, query, history, role)
    assert ids is None or all(isinstance(index, int) for index in ids)
    answered = ours(chat.process_response, "text", query, history, role)
    assert ids is None or answered is not None
    assert repr(history) == before


@each
@settings(max_examples=60)
@given(output=texts, offered=st.booleans())
def test_any_answer(tokenizers, name, output, offered):
    """Every answer is read, of its text nothing is lost but marks and blanks, and the history goes into a prompt."""
    tokenizer = tokenizers(name)
    chat = chat_format_for(tokenizer)
    beginning = [{"role": "system", "content": "s", "tools": [{"function": {"name": "track"}}]}]
    history: list = beginning if offered and name not in ("v1", "v2", "edge", "z1") else []
    response, after = chat.process_response(output, "q", history)
    json.dumps(response)
    assert isinstance(response, (str, dict))
    if isinstance(after[-1], dict):
        told = [message.get(key, "") for message in after for key in ("thinking", "metadata", "content")]
        marks = ("<think>", "</think>", "<|assistant|>")
        assert letters("".join(told).removeprefix("s").removeprefix("q"), marks) == letters(output, marks)
    assert chat.build_inputs(tokenizer, "next", after)
    certain = chat.stable_output(output)
    assert output.startswith(certain) and len(output) - len(certain) < len("</think>")


def letters(text: str, marks: tuple[str, ...]) -> str:
    """`text` without marks and whitespace."""
    while any(mark in text for mark in marks):
        for mark in marks:
            text = text.replace(mark, "")
    return "".join(text.split())


@each
@examples
@given(conversation=st.one_of(histories, st.lists(good_messages, min_size=1)), tools=tools, generate=st.booleans())
def test_any_conversation_in_a_template(tokenizers, name, conversation, tools, generate):
    tokenizer = tokenizers(name)
    chat = chat_format_for(tokenizer)
    text = ours(chat.conversation_text, tokenizer, conversation, tools, generate)
    ids = ours(chat.conversation_ids, tokenizer, conversation, tools, generate)
    assert (text is None) == (ids is None)
    if name in OWN:
        told = ours(
            tokenizer.apply_chat_template, conversation, tools, add_generation_prompt=generate, return_dict=False
        )
        assert told in (None, ids) or isinstance(conversation[0], list)


@pytest.mark.parametrize("name", FAST)
@examples
@given(conversation=st.lists(good_messages, min_size=1, max_size=4))
def test_the_template_of_the_library_gives_the_same(tokenizers, name, conversation):
    tokenizer = tokenizers(name)
    ids = chat_format_for(tokenizer).conversation_ids(tokenizer, conversation)
    whole = [{**message, "content": whole_characters(message["content"])} for message in conversation]
    assert ids == tokenizer.apply_chat_template(whole, add_generation_prompt=True, return_dict=False)


_STATEMENTS = (
    *("{% for m in messages %}", "{% endfor %}", "{% if tools %}", "{% else %}", "{% endif %}", "{%- set x = 1 -%}"),
    *(
        "{{ messages }}",
        "{{ messages[0].role }}",
        "{{ m.content }}",
        "{{ m['content'] | tojson }}",
        "{{ tools | tojson }}",
    ),
    *("{{ raise_exception(messages) }}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ x.__class__ }}", "{{ range(9 ** 9) }}"),
    *("{{ messages[9] }}", "{{ none.a.b }}", "{{ m.content.split(3) }}", "{{ x() }}", "{# ", "#}", "{{", "}}", "{%"),
    *("{% macro f(a) %}{{ f(a) }}{% endmacro %}", "{{ f(1) }}", "{% break %}", "<|assistant|>", "<think>", "\n"),
)


@settings(max_examples=100)
@given(source=st.lists(st.one_of(st.sampled_from(_STATEMENTS), texts), min_size=1).map("".join), history=histories)
def test_any_template(source, history):
    tokenizer = tokenizer_of("glm4")
    shown, tokenizer.chat_template = tokenizer.chat_template, source
    try:
        ours(chat_format_for(tokenizer).build_inputs, tokenizer, "q", history)
    finally:
        tokenizer.chat_template = shown
