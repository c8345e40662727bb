"""The tokenizers as Hugging Face tokenizers: tensors, padding, saving, pickling, added tokens."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import copy
import json
import pickle
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizer_cases import small_folder, tokenizer_of
from tokenizer_families import SENTENCES, families, folders, tokenizers  # noqa: F401
from transformers import AddedToken, StopStringCriteria

from chatglm_ov.errors import ChatGLMError
from chatglm_ov.tokenizer import load_tokenizer

pytestmark = pytest.mark.transformers_matrix


@families
def test_outputs_of_a_call(tokenizers, family):
    single = tokenizers[family]("床前明月光", return_tensors="pt")
    length = single["input_ids"].shape[1]
    assert single["input_ids"].dtype == torch.int64 and single["input_ids"].shape == (1, length)
    if family == "chatglm":
        assert set(single) == {"input_ids"}
    else:
        assert set(single) == {"input_ids", "attention_mask", "position_ids"}
        assert single["attention_mask"].tolist() == [[1] * length]
        assert single["position_ids"].tolist() == [list(range(length))]


@families
def test_padded_row_is_the_row_alone_and_padding(tokenizers, family):
    tokenizer = tokenizers[family]
    batch = tokenizer(["明", "床前明月光，疑是地上霜"], padding=True, return_tensors="pt")
    for row, text in enumerate(["明", "床前明月光，疑是地上霜"]):
        alone = tokenizer(text, padding=True, return_tensors="pt")
        length = alone["input_ids"].shape[1]
        assert batch["input_ids"][row, -length:].tolist() == alone["input_ids"][0].tolist()
        assert set(batch["input_ids"][row, :-length].tolist()) <= {tokenizer.pad_token_id}
        assert torch.equal(batch["position_ids"][row, ..., -length:], alone["position_ids"][0])
        assert not batch["position_ids"][row, ..., :-length].any()
        if family == "chatglm":
            mask = batch["attention_mask"][row, 0]
            assert torch.equal(mask[-length:, -length:], alone["attention_mask"][0, 0])
            assert mask[:-length].all() and mask[:, :-length].all()
        else:
            assert batch["attention_mask"][row].sum() == length


def test_v1_positions_and_mask():
    """Context of 4 ids with [gMASK] at 3, `<sop>` at 4: blocked is what lies on the right and not in the context."""
    tokenizer = tokenizer_of("v1")
    ids = [*tokenizer.encode_ordinary("你好")[-1:] * 3, tokenizer.gmask_token_id, tokenizer.bos_token_id, 7, 8]
    row = tokenizer.pad({"input_ids": [ids]}, padding=True, return_tensors="np")
    assert row["attention_mask"].dtype == bool and row["attention_mask"].shape == (1, 1, 7, 7)
    assert row["position_ids"].tolist() == [[[0, 1, 2, 3, 3, 3, 3], [0, 0, 0, 0, 1, 2, 3]]]
    blocked = [[j > i and j >= 4 for j in range(7)] for i in range(7)]
    assert row["attention_mask"][0, 0].tolist() == blocked
    both = [tokenizer.mask_token_id, *ids]
    assert tokenizer.pad({"input_ids": [both]}, padding=True)["position_ids"][0][0].tolist()[5:] == [0, 0, 0]


@families
def test_padding_to_a_length_and_to_a_multiple(tokenizers, family):
    tokenizer = tokenizers[family]
    ids = tokenizer("床前明月光")["input_ids"]
    to_length = tokenizer("床前明月光", padding="max_length", max_length=40)
    assert to_length["input_ids"] == [tokenizer.pad_token_id] * (40 - len(ids)) + ids
    assert np.asarray(to_length["position_ids"]).shape[-1] == 40
    assert np.asarray(to_length["attention_mask"]).shape[-1] == 40
    multiple = tokenizer(["床前明月光", "明"], padding=True, pad_to_multiple_of=32, return_tensors="np")
    assert multiple["input_ids"].shape == (2, 32) and multiple["position_ids"].shape[-1] == 32


@families
def test_padding_on_the_right_is_refused(tokenizers, folders, family):
    with pytest.raises(ChatGLMError, match="padding_side is 'right', expected 'left'"):
        load_tokenizer(folders[family], padding_side="right")
    with pytest.raises(ChatGLMError, match="padding_side is 'right', expected 'left'"):
        tokenizers[family](["a", "bcd"], padding=True, padding_side="right")


@families
def test_truncation_keeps_the_special_tokens(tokenizers, family):
    tokenizer = tokenizers[family]
    text = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"
    whole = tokenizer.encode(text, add_special_tokens=False)
    cut = tokenizer(text, truncation=True, max_length=10)["input_ids"]
    assert cut == tokenizer.build_inputs_with_special_tokens(whole[:8]) and len(cut) == 10


def test_pairs(tokenizers):
    for family, tokenizer in tokenizers.items():
        first, second = (tokenizer.encode(text, add_special_tokens=False) for text in ("你好", "世界"))
        marks = tokenizer.build_inputs_with_special_tokens([])
        expected = [*first, *marks] if family == "chatglm" else [*marks, *first]
        found = tokenizer("你好", "世界", return_special_tokens_mask=True)
        assert found["input_ids"] == [*expected, *second, tokenizer.eos_token_id]
        mask = found["special_tokens_mask"]
        assert mask[-1] == 1 and sum(mask) == 3 and len(mask) == len(found["input_ids"])


def reloaded(tokenizer, way, folder):
    if way == "pickle":
        return pickle.loads(pickle.dumps(tokenizer))
    if way == "deepcopy":
        return copy.deepcopy(tokenizer)
    files = tokenizer.save_pretrained(folder)
    assert all(
        (folder / name).exists() for name in (tokenizer.vocab_files_names["vocab_file"], "tokenizer_config.json")
    )
    assert files
    return load_tokenizer(folder) if way == "load_tokenizer" else type(tokenizer).from_pretrained(str(folder))


@families
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "load_tokenizer", "from_pretrained"])
def test_saved_and_loaded_again(folders, family, way, tmp_path):
    tokenizer = load_tokenizer(folders[family])
    assert tokenizer.add_tokens(["⟨新⟩"]) == 1
    again = reloaded(tokenizer, way, tmp_path)
    assert type(again) is type(tokenizer) and len(again) == len(tokenizer)
    assert again.get_vocab() == tokenizer.get_vocab()
    for text in SENTENCES:
        ids = tokenizer(text)["input_ids"]
        assert again(text)["input_ids"] == ids
        assert again.decode(ids) == tokenizer.decode(ids)
    message = [{"role": "user", "content": "床前明月光"}]
    assert again.apply_chat_template(message, tokenize=False) == tokenizer.apply_chat_template(message, tokenize=False)
    assert again.all_special_ids == tokenizer.all_special_ids


@families
def test_unpickled_without_the_file(folders, family, tmp_path):
    shutil.copytree(folders[family], tmp_path / "folder")
    data = pickle.dumps(load_tokenizer(tmp_path / "folder"))
    shutil.rmtree(tmp_path / "folder")
    again = pickle.loads(data)
    assert again.decode(again.encode_ordinary("床前明月光")) == "床前明月光"
    again.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").get_vocab() == again.get_vocab()


@families
def test_vocabulary_is_one_to_one(tokenizers, family):
    tokenizer = tokenizers[family]
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(tokenizer)))
    ids = list(range(len(tokenizer)))
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(ids)) == ids


@families
def test_added_token_is_found_in_text_and_decoded(folders, family):
    tokenizer = load_tokenizer(folders[family])
    tokenizer.add_tokens(["⟨新⟩"])
    index = tokenizer.convert_tokens_to_ids("⟨新⟩")
    ids = tokenizer.encode("床前⟨新⟩", add_special_tokens=False)
    assert ids[-1] == index == len(tokenizer) - 1
    assert tokenizer.decode(ids).replace(" ", "") == "床前⟨新⟩"


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3"])
def test_special_tokens_are_never_found_in_text(tokenizers, family):
    tokenizer = tokenizers[family]
    for name in [*tokenizer.SPECIAL_TOKENS, "<unk>", "</s>", "<s>"]:
        assert tokenizer.encode(name, add_special_tokens=False) == tokenizer.encode_ordinary(name)
        assert max(tokenizer.encode_ordinary(name)) < tokenizer.get_command("[MASK]")
    with pytest.raises(ChatGLMError, match="get_command: token is 'user', expected"):
        tokenizer.get_command("user")


# As the later releases of ChatGLM3-6B have them.
DECLARED = ("[gMASK]", "sop", "<|user|>", "<|assistant|>")


@pytest.fixture
def declaring(tmp_path, tokenizers):
    """ChatGLM3's tokenizer of a folder whose tokenizer_config.json declares special tokens."""
    folder, command = small_folder(tmp_path, "chatglm3"), tokenizers["chatglm3"].get_command
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {command(name): {"content": name, "special": False} for name in DECLARED}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def test_declared_special_tokens_are_found_in_the_text_of_a_template(declaring, tokenizers, tmp_path):
    messages = [
        {"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "床前明月", strict=True)
    ]
    text = declaring.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    ids = declaring.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    declaring.save_pretrained(tmp_path / "saved")
    for tokenizer in (declaring, load_tokenizer(tmp_path / "saved")):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    undeclared = tokenizers["chatglm3"]
    assert undeclared.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False) == ids
    assert undeclared.encode(text, add_special_tokens=False) == undeclared.encode_ordinary(text) != ids


def test_a_special_token_that_is_part_of_a_word_stays_text(declaring):
    for text in ("sop", "philosophy", "people [MASK] </s> <|system|>", "床 sop"):
        assert declaring.encode(text, add_special_tokens=False) == declaring.encode_ordinary(text)
    ids = declaring.encode("[gMASK]sop sop", add_special_tokens=False)
    assert ids == [*declaring.get_prefix_tokens(), *declaring.encode_ordinary(" sop")]


def test_no_declaration_renames_a_special_token(tmp_path, tokenizers):
    folder, user = small_folder(tmp_path, "chatglm3"), tokenizers["chatglm3"].get_command("<|user|>")
    added = {user: {"content": "床"}, 1: {"content": "前"}}
    tokenizer = load_tokenizer(folder, added_tokens_decoder=added)
    assert tokenizer.encode("床前", add_special_tokens=False) == tokenizer.encode_ordinary("床前")
    assert tokenizer.decode([user]) == "<|user|>"


def test_role_tokens_when_asked_for(folders, tokenizers):
    always = load_tokenizer(folders["chatglm3"], encode_special_tokens=True)
    text = "<|user|>你好<|assistant|>"
    expected = [always.get_command("<|user|>"), *always.encode_ordinary("你好"), always.get_command("<|assistant|>")]
    assert always.encode(text, add_special_tokens=False) == expected
    assert tokenizers["chatglm3"].encode(text, add_special_tokens=False) == always.encode_ordinary(text)
    assert "gMASK" in always.decode(always.encode("[gMASK]", add_special_tokens=False))


@families
def test_decode_refuses_what_is_no_id(tokenizers, family):
    tokenizer = tokenizers[family]
    last = f"expected 0 to {len(tokenizer) - 1}"
    for wrong, told in (
        ([5, -1], f"token id is -1 at index 1, {last}"),
        ([10**6], f"token id is 1000000 at index 0, {last}"),
        (-3, f"token id is -3 at index 0, {last}"),
        ("abc", "token_ids is of type str, expected a list of integers"),
        ([1.5], "token_ids is of type list, expected a list of integers"),
        ([None], "token_ids is of type list, expected a list of integers"),
    ):
        with pytest.raises(ChatGLMError) as error:
            tokenizer.decode(wrong)
        assert str(error.value) == f"{type(tokenizer).__name__}.decode: {told}"


@families
def test_decode_takes_every_kind_of_sequence(tokenizers, family):
    tokenizer = tokenizers[family]
    ids = tokenizer.encode_ordinary("床前明月光")
    for kind in (
        tuple(ids),
        [np.int64(each) for each in ids],
        np.array(ids),
        torch.tensor(ids),
        np.array(ids, np.int32),
    ):
        assert tokenizer.decode(kind) == "床前明月光"
    assert tokenizer.decode([]) == ""
    assert tokenizer.batch_decode([ids, ids[:-1]]) == [tokenizer.decode(ids), tokenizer.decode(ids[:-1])]
    assert tokenizer.batch_decode(torch.tensor([ids, ids])) == ["床前明月光"] * 2


@families
def test_padding_rows_of_an_embedding_have_no_text(tokenizers, family):
    tokenizer = tokenizers[family]
    ids = tokenizer.encode_ordinary("床前")
    assert tokenizer.decode([*ids, len(tokenizer), *tokenizer.encode_ordinary("x")][: len(ids) + 1]) == "床前"


@families
@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", "\x00", "\ufffd", "\u2028 \u3000\x85"])
def test_odd_characters(tokenizers, family, text):
    tokenizer = tokenizers[family]
    decoded = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    if family != "chatglm":  # v1 normalizes
        assert decoded == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def test_glm4_specials_without_blanks():
    tokenizer = tokenizer_of("glm4")
    ids = tokenizer("<|user|>好")["input_ids"]
    assert tokenizer.decode(ids) == "[gMASK] <sop> <|user|> 好"
    assert tokenizer.decode(ids, spaces_between_special_tokens=False) == "[gMASK]<sop><|user|>好"


def test_v1_options(folders):
    tokenizer = load_tokenizer(folders["chatglm"], do_lower_case=True, remove_space=True)
    plain = load_tokenizer(folders["chatglm"])
    assert tokenizer.encode("  The  END ") == plain.encode("the end")
    assert (
        load_tokenizer(folders["chatglm"], clean_up_tokenization_spaces=False).decode(plain.encode_ordinary("a , b"))
        == "a , b"
    )
    assert plain.decode(plain.encode_ordinary("a , b")) == "a, b"


def test_glm4_takes_a_million_blanks():
    """tiktoken alone panics there."""
    tokenizer, text = tokenizer_of("glm4"), "a" + " " * 1_200_000 + "b"
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


# ---- long texts


@families
@pytest.mark.parametrize("unit", ["床前明月光，疑是地上霜。", "月", " ", "a b\n\t", "<eop>", "🌙", "[["])
def test_work_grows_with_the_length_and_not_with_its_square(tokenizers, family, unit):
    """Sixteen times the text takes sixteen times the calls, of Python's functions and of libraries', there and back."""

    def calls(length: int) -> int:
        text, events = (unit * length)[:length], Counter()
        sys.setprofile(lambda frame, event, argument: events.update([event]))
        try:
            ids = tokenizers[family](text)["input_ids"]
            tokenizers[family].decode(ids, skip_special_tokens=True)
        finally:
            sys.setprofile(None)
        return events["call"] + events["c_call"]

    calls(500)
    assert calls(8_000) < 20 * calls(500)


def test_special_tokens_can_be_split(declaring):
    text = "床[gMASK]前<|user|>"
    assert declaring.get_command("<|user|>") in declaring.encode(text, add_special_tokens=False)
    split = declaring.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert split == declaring.encode_ordinary(text)
    declaring.split_special_tokens = True
    assert declaring.tokenize(text) == [declaring._pieces[index] for index in split]


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3"])
def test_added_tokens_keep_to_words_and_swallow_blanks(folders, family):
    tokenizer = load_tokenizer(folders[family])
    tokenizer.add_tokens([AddedToken("ab", single_word=True), AddedToken("<y>", lstrip=True, rstrip=True), "ab!"])
    for text, tokens in {"b ab.": {"ab"}, "bab abb": set(), "ab": {"ab"}, "a <y> b": {"<y>"}, "ab!": {"ab!"}}.items():
        assert set(tokenizer.tokenize(text)) & {"ab", "<y>", "ab!"} == tokens
    assert tokenizer.tokenize("a  <y>  b") == tokenizer.tokenize("a<y>b")
    tokenizer.add_tokens(["<y>z"])
    assert "<y>z" in tokenizer.tokenize("a <y>z")


@families
def test_ids_of_padding_rows_and_of_nothing(tokenizers, family):
    tokenizer = tokenizers[family]
    behind = len(tokenizer)
    assert tokenizer.decode([behind]) == tokenizer.convert_ids_to_tokens(behind) == ""
    pad, other = (tokenizer.convert_ids_to_tokens(index) for index in (tokenizer.pad_token_id, 9))
    for ids in ([tokenizer.pad_token_id, 9, behind], iter([tokenizer.pad_token_id, 9, behind])):
        assert tokenizer.convert_ids_to_tokens(ids) == [pad, other, ""]
    assert tokenizer.convert_ids_to_tokens([tokenizer.pad_token_id, 9, behind], skip_special_tokens=True) == [other, ""]
    for ids in (-1, [5, -100], [1 << 40]):
        with pytest.raises(ChatGLMError, match=r"Tokenizer.convert_ids_to_tokens: token id is (-1|-100|1\d+) at index"):
            tokenizer.convert_ids_to_tokens(ids)


@families
def test_tokens_as_a_string_are_the_decoded_text(tokenizers, family):
    tokenizer, text = tokenizers[family], "床前\n\n明\t月   光"
    tokens = tokenizer.tokenize(text)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert tokenizer.convert_tokens_to_string(tokens).strip() == decoded.strip() == text


def test_stop_strings_of_blanks_and_lines_in_v1():
    tokenizer = tokenizer_of("v1")
    for stop in ("\n", "\n\n", "\t", "   "):
        ids = tokenizer.encode(f"床前{stop}", add_special_tokens=False)
        stops = StopStringCriteria(tokenizer, [stop])
        assert stops(torch.tensor([ids]), None) and not stops(torch.tensor([ids[:-1]]), None)
