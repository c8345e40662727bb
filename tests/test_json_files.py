"""JSON files of a checkpoint as they come from other programs: marks of the encoding, nesting, and what is no JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatglm_ov import ChatGLMError
from chatglm_ov.json_files import read_json_object
from chatglm_ov.tokenizer.files import read_json

each_reader = pytest.mark.parametrize("reader", [read_json_object, read_json])
Reader = Callable[[Path], dict[str, Any]]


@each_reader
def test_a_mark_of_the_encoding_is_no_part_of_the_object(reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('\ufeff{"name": "模型"}', encoding="utf-8")
    assert reader(path) == {"name": "模型"}


@each_reader
@pytest.mark.parametrize(
    ("contents", "told"),
    [
        (b"[" * 100_000, r"not JSON \(maximum recursion depth exceeded"),
        (b'{"a":' * 100_000, r"not JSON \(maximum recursion depth exceeded"),
        (b"\xff\xfe{", r"not JSON \("),
        (b"[]", r"a JSON list"),
    ],
)
def test_what_is_no_object_is_told_with_its_file(reader: Reader, contents: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(contents)
    with pytest.raises(ChatGLMError, match=rf"config.json: contents is {told}.*, expected a JSON object$") as error:
        reader(path)
    assert "\n" not in str(error.value)


def test_a_file_of_a_tokenizer_may_be_missing(tmp_path: Path) -> None:
    assert read_json(tmp_path / "tokenizer_config.json") == {}
