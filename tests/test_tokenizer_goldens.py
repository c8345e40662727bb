"""Ids and texts of the tokenizers, exactly as the original ones gave them."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizer_cases import SETS, golden_of, tokenizer_of

pytestmark = pytest.mark.transformers_matrix

names = pytest.mark.parametrize("name", SETS)


def same_or_original_raised(result, golden) -> bool:
    """An entry {"error": ...} says that the original raised; any result that is not an exception is fine then."""
    return (isinstance(golden, dict) and "error" in golden) or result == golden


@names
def test_vocabulary_and_special_ids(name):
    tokenizer, golden = tokenizer_of(name), golden_of(name)
    assert tokenizer.vocab_size == golden["vocab_size"]
    for token, index in golden["special_ids"].items():
        found = getattr(tokenizer, token) if token.endswith("_id") else tokenizer.convert_tokens_to_ids(token)
        assert (token, found) == (token, index)


@names
def test_text_to_ids(name):
    tokenizer, entries = tokenizer_of(name), golden_of(name)["strings"]
    assert len(entries) > 100
    for entry in entries:
        text = entry["text"]
        plain, special = tokenizer.encode(text, add_special_tokens=False), tokenizer(text)["input_ids"]
        assert same_or_original_raised(plain, entry["ids"]), text
        assert same_or_original_raised(special, entry["ids_with_special"]), text
        inner = entry.get("sp_ids", entry.get("bpe_ids"))
        assert same_or_original_raised(tokenizer.encode_ordinary(text), inner), text
        if "ids_encode_special_tokens" in entry:
            roles = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text, encode_special_tokens=True))
            assert same_or_original_raised(roles, entry["ids_encode_special_tokens"]), text


@names
def test_ids_to_text(name):
    tokenizer = tokenizer_of(name)
    for entry in golden_of(name)["strings"]:
        ids, special = entry["ids"], entry["ids_with_special"]
        assert same_or_original_raised(tokenizer.decode(ids), entry["decode"]), entry["text"]
        assert same_or_original_raised(tokenizer.decode(special), entry["decode_with_special"]), entry["text"]
        skipped = tokenizer.decode(special, skip_special_tokens=True)
        assert same_or_original_raised(skipped, entry["decode_skip_special"]), entry["text"]


@names
def test_random_ids_and_growing_prefixes_to_text(name):
    tokenizer, golden = tokenizer_of(name), golden_of(name)
    for entry in golden["decode_random_ids"]:
        assert same_or_original_raised(tokenizer.decode(entry["ids"]), entry["decode"]), entry["ids"]
    for entry in golden["decode_growing_prefixes"]:
        for length, text in enumerate(entry["decode_prefixes"], 1):
            assert same_or_original_raised(tokenizer.decode(entry["ids"][:length]), text), entry["ids"][:length]


@names
@pytest.mark.parametrize("tensors", [None, "np", "pt"])
def test_left_padded_batch(name, tensors):
    tokenizer, golden = tokenizer_of(name), golden_of(name)["batch_padding"]
    batch = tokenizer(golden["texts"], padding=True, return_tensors=tensors)
    for key in ("input_ids", "attention_mask", "position_ids"):
        assert np.array_equal(np.asarray(batch[key]).astype(np.int64), np.array(golden[key])), key
    assert set(batch) == {"input_ids", "attention_mask", "position_ids"}
