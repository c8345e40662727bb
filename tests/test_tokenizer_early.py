"""The tokenizer of the early ChatGLM-6B, whose text vocabulary stands behind 20000 image tokens."""

from __future__ import annotations

import json
import shutil

import pytest
from tokenizer_cases import DATA, tokenizer_of
from tokenizer_families import SENTENCES

from chatglm_ov.tokenizer import load_tokenizer
from chatglm_ov.tokenizer.sentencepiece_model import _varint

pytestmark = pytest.mark.transformers_matrix


def without_special_pieces(data: bytes) -> bytes:
    """The model as it was in March 2023: the last 344 pieces were added at run time."""
    records, position = [], 0
    while position < len(data):
        tag, start = _varint(data, position)
        length, start = _varint(data, start)
        records.append((tag >> 3, data[position : start + length]))
        position = start + length
    pieces = [record for field, record in records if field == 1]
    others = b"".join(record for field, record in records if field != 1)
    fallback = bytes([0x98, 0x02, 1])  # TrainerSpec.byte_fallback = true, which needs the byte pieces
    assert others.count(fallback) == 1
    return b"".join(pieces[:-344]) + others.replace(fallback, fallback[:2] + b"\0")


@pytest.mark.parametrize("name", ["v1", "v1_real"])
def test_early_vocabulary(name, tmp_path):
    """20000 image tokens before the text vocabulary, special pieces that the file lacks, `</s>` called eos_token."""
    late = tokenizer_of(name)
    whole = late._model_bytes
    (tmp_path / "ice_text.model").write_bytes(without_special_pieces(whole))
    config = {"bos_token": "<sop>", "eos_token": "</s>", "eop_token": "<eop>", "gmask_token": "[gMASK]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    early = load_tokenizer(tmp_path)
    assert early.vocab_size == late.vocab_size + 20000
    assert [early.bos_token_id, early.eos_token_id, early.gmask_token_id, early.mask_token_id, early.pad_token_id] == [
        20000 + index
        for index in (late.bos_token_id, late.eos_token_id, late.gmask_token_id, late.mask_token_id, late.pad_token_id)
    ]
    for text in [*SENTENCES, "a  b" + " " * 81 + "c 龘𠮷\u3000é", "hello\r\n[MASK] x <sop> y"]:
        ids = late(text)["input_ids"]
        assert early(text)["input_ids"] == [index + 20000 for index in ids]
        if name == "v1_real":  # the small model has its special pieces as ordinary ones, with text
            assert early.decode([index + 20000 for index in ids]) == late.decode(ids)
    assert early.convert_tokens_to_ids("<image_7>") == 7 and early.convert_ids_to_tokens(7) == "<image_7>"
    early.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again")(SENTENCES[0]) == early(SENTENCES[0])


def test_early_special_ids_of_the_real_vocabulary(tmp_path):
    shutil.copytree(tokenizer_of("v1_real").vocab_file.rsplit("/", 1)[0], tmp_path, dirs_exist_ok=True)
    early = load_tokenizer(tmp_path, num_image_tokens=20000)
    assert early("你好")["input_ids"] == [20005, 94874, 150001, 150004]
    assert (early.eos_token_id, early.mask_token_id, early.pad_token_id, len(early)) == (150005, 150000, 20003, 150344)


@pytest.mark.parametrize(
    ("config", "count"), [({}, 20000), ({"vocab_size": 150528}, 20000), ({"vocab_size": 130528}, 0)]
)
def test_number_of_image_tokens_from_the_model_config(config, count, tmp_path):
    shutil.copy(DATA / "tokenizer_v1" / "ice_text.model", tmp_path)
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).num_image_tokens == count
