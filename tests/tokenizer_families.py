"""A tokenizer of each family of models, and what the tests of all of them share."""

from __future__ import annotations

import pytest
from tokenizer_cases import DATA, small_folder

from chatglm_ov.tokenizer import load_tokenizer

FAMILIES = ("chatglm", "chatglm2", "chatglm3", "glm4")
SENTENCES = ["你好，世界👋", "床前⟨新⟩ 光", "床前明月光", "def f(x):\n    return x\t# 1", "<|user|> [MASK] <eop>", ""]

families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    small = {family: small_folder(tmp_path_factory.mktemp(family), family) for family in FAMILIES[1:3]}
    return small | {"chatglm": DATA / "tokenizer_v1", "glm4": DATA / "tokenizer_glm4"}


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {family: load_tokenizer(folder) for family, folder in folders.items()}
