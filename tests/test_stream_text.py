"""TextStream: the pieces joined are the whole decode, whatever the ids, and no piece ends within a character."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import SETS, fast_folder, golden_of, small_folder, tokenizer_of

from chatglm_ov.errors import ChatGLMError
from chatglm_ov.tokenizer import TextStream, load_tokenizer
from chatglm_ov.tokenizer.stream import CleanUp, WhitespaceTokens, byte_characters

pytestmark = pytest.mark.transformers_matrix

NAMES = [*SETS, "small_v2", "small_v3", "fast", "fast_clean"]
names = pytest.mark.parametrize("name", NAMES)
many = settings(max_examples=150, deadline=None)

chinese_and_emoji = st.text(
    st.one_of(
        st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF),
        st.characters(min_codepoint=0x1F300, max_codepoint=0x1FAFF),
        st.sampled_from("👨‍👩‍👧👍🏽𠮷龘，。！？：； \n\t"),
    ),
    max_size=40,
)
mixed_text = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from(
            [
                "<n>",
                "<|tab|>",
                "<|blank_7|>",
                "<",
                "|",
                "blank_",
                "  ",
                " '",
                "' ",
                "n't",
                " 'm",
                " .",
                " ,",
                "<|user|>",
            ]
        ),
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    made = {f"small_v{n}": small_folder(tmp_path_factory.mktemp(f"v{n}"), f"chatglm{n}") for n in (2, 3)}
    fast = load_tokenizer(fast_folder(tmp_path_factory.mktemp("fast")))
    clean = load_tokenizer(fast_folder(tmp_path_factory.mktemp("clean")), clean_up_tokenization_spaces=True)
    loaded = {name: load_tokenizer(folder) for name, folder in made.items()} | {"fast": fast, "fast_clean": clean}
    return lambda name: loaded[name] if name in loaded else tokenizer_of(name)


def pieces_of(tokenizer, ids, skip_special_tokens=False) -> list[str]:
    stream = TextStream(tokenizer, skip_special_tokens=skip_special_tokens)
    return [*map(stream.put, ids), stream.flush()]


def assert_joined_is_whole(tokenizer, ids) -> None:
    for skip in (False, True):
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        assert "".join(pieces_of(tokenizer, ids, skip)) == whole


def tricky_ids(tokenizer) -> list[int]:
    """Ids that do something: bytes, special tokens, whitespace, padding, the rows behind the vocabulary."""
    tokens = ["<unk>", "<s>", "</s>", "<pad>", "\u2581", "<n>", "<|tab|>", "<|blank_2|>", "<", "|", ">", "'", "n"]
    tokens += [f"<0x{byte:02X}>" for byte in (0x0A, 0x20, 0x80, 0xBD, 0xE4, 0xEF, 0xF0, 0x9F, 0xC0, 0xED, 0xA0, 0xFF)]
    tokens += list(byte_characters().values())[::9] + tokenizer.all_special_tokens
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens if token in vocabulary] + [len(tokenizer), len(tokenizer) - 1]


@names
@many
@given(data=st.data())
def test_random_ids(tokenizers, name, data):
    tokenizer = tokenizers(name)
    index = st.one_of(st.integers(0, len(tokenizer) - 1), st.sampled_from(tricky_ids(tokenizer)))
    assert_joined_is_whole(tokenizer, data.draw(st.lists(index, max_size=30)))


@names
@many
@given(text=chinese_and_emoji)
def test_chinese_and_emoji(tokenizers, name, text):
    tokenizer = tokenizers(name)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert_joined_is_whole(tokenizer, ids)
    pieces = pieces_of(tokenizer, ids)
    assert not any("\ufffd" in piece for piece in pieces)
    if name in ("v2", "v3", "small_v2", "small_v3", "glm4", "fast"):
        assert "".join(pieces) == text


@names
@many
@given(text=mixed_text)
def test_texts_with_whitespace_tokens_and_punctuation(tokenizers, name, text):
    tokenizer = tokenizers(name)
    assert_joined_is_whole(tokenizer, tokenizer.encode(text))


@pytest.mark.parametrize("name", SETS)
def test_goldens_token_by_token(name):
    tokenizer, golden = tokenizer_of(name), golden_of(name)
    for entry in golden["strings"]:
        assert "".join(pieces_of(tokenizer, entry["ids"])) == entry["decode"]
        assert "".join(pieces_of(tokenizer, entry["ids_with_special"])) == entry["decode_with_special"]
        assert "".join(pieces_of(tokenizer, entry["ids_with_special"], True)) == entry["decode_skip_special"]
    for entry in [*golden["decode_random_ids"], *golden["decode_growing_prefixes"]]:
        whole = entry["decode"] if "decode" in entry else entry["decode_prefixes"][-1]
        assert "".join(pieces_of(tokenizer, entry["ids"])) == whole


@names
def test_incomplete_character_is_held_back_and_flushed(tokenizers, name):
    tokenizer = tokenizers(name)
    ids = tokenizer.encode("你𓀀", add_special_tokens=False)
    stream = TextStream(tokenizer)
    pieces = [stream.put(index) for index in ids]
    assert "".join(pieces) == "你𓀀" and "𓀀" in pieces[-1] and stream.flush() == ""
    assert "".join(map(stream.put, ids[:-1])) == "你"
    rest = stream.flush()
    assert rest == "\ufffd" * len(rest) and len(rest) in (1, 3)
    assert "".join(map(stream.put, ids)) + stream.flush() == "你𓀀"  # from the beginning again after a flush


@names
def test_put_takes_one_id_or_several(tokenizers, name):
    tokenizer = tokenizers(name)
    ids = tokenizer.encode("床前明月光👋", add_special_tokens=False)
    stream = TextStream(tokenizer)
    assert stream.put(ids) + stream.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["v1", "small_v3", "glm4"])
def test_wrong_id(tokenizers, name):
    with pytest.raises(ChatGLMError, match="token id is -1 at index 0"):
        TextStream(tokenizers(name)).put(-1)


@names
@pytest.mark.parametrize("ids", ["x", None, [1.5], [[1]], {"a": 1}])
def test_what_is_no_id(tokenizers, name, ids):
    with pytest.raises(ChatGLMError, match=r"TextStream.put: token_ids is of type \w+, expected a list of integers"):
        TextStream(tokenizers(name)).put(ids)


@names
@pytest.mark.parametrize("index", [-1, 1 << 32, 1 << 80])
def test_id_that_no_vocabulary_has(tokenizers, name, index):
    with pytest.raises(ChatGLMError, match=f"token id is {index}"):
        TextStream(tokenizers(name)).put(index)


def test_unknown_kind_of_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ChatGLMError, match="decoder is NoneType, expected ByteLevel"):
        TextStream(tokenizer)


def held(stream: TextStream) -> int:
    """Characters and bytes that the decoders of a stream have put by, which is what they go through again."""
    state = [value for decoder in stream._decoders for value in vars(decoder).values()]
    parts = [value.getstate()[0] if isinstance(value, codecs.IncrementalDecoder) else value for value in state]
    parts = ["".join(part) if isinstance(part, list) else part for part in parts]
    return sum(len(part) for part in parts if isinstance(part, (str, bytes)))


@names
@pytest.mark.parametrize("garbage", [False, True])
def test_what_an_id_costs_does_not_grow(tokenizers, name, garbage):
    """Text, and bytes that never become a character: besides an id, a stream goes through what it holds back."""
    tokenizer = tokenizers(name)
    text = tokenizer.encode("床前明月光，疑是地上霜。 ' x", add_special_tokens=False)
    byte = tokenizer.get_vocab().get("<0x80>", tokenizer.get_vocab().get(byte_characters()[0x80]))
    unit, stream, most, whole = [byte] if garbage else text, TextStream(tokenizer), 0, ""
    for index in (unit * 2_000)[:2_000]:
        whole += stream.put(index)
        most = max(most, held(stream))
    assert most <= 8
    assert whole + stream.flush() == tokenizer.decode((unit * 2_000)[:2_000])


clean_up_text = st.lists(
    st.sampled_from([" ", "'", "n", "t", "v", "r", "e", "m", "s", ".", ",", "x", " ' ", "  "]), max_size=25
)


@settings(max_examples=2000, deadline=None)
@given(parts=clean_up_text)
def test_clean_up_in_parts(parts):
    decoder = CleanUp()
    assert "".join(map(decoder.put, parts)) + decoder.flush() == CleanUp.replace("".join(parts))


def test_clean_up_is_that_of_the_library(tokenizers):
    library = tokenizers("fast").clean_up_tokenization
    for text in ("a . b ? c ! d , e ' f n't g 'm h 's i 've j 're k", " n ' t", "  ' m", "' ' ' '", "x  .", " . . ."):
        assert CleanUp.replace(text) == library(text)


whitespace_text = st.lists(
    st.one_of(
        st.text("<|>nbltak_ 0123456789x", max_size=4), st.sampled_from(["<n>", "<|tab|>", "<|blank_", "80|>", "<|"])
    ),
    max_size=15,
)


@settings(max_examples=2000, deadline=None)
@given(parts=whitespace_text)
def test_whitespace_tokens_in_parts(parts):
    decoder = WhitespaceTokens()
    text = "".join(parts)
    expected = text.replace("<n>", "\n").replace("<|tab|>", "\t")
    for count in range(2, 81):
        expected = expected.replace(f"<|blank_{count}|>", " " * count)
    assert "".join(map(decoder.put, parts)) + decoder.flush() == expected == WhitespaceTokens.replace(text)
