"""Texts of a user, as token ids to be predicted.

A file is one text (.txt) or one JSON object a line (.jsonl), plain or packed by xz (.xz behind it). Each object is a
document of its own: no document is predicted from another.
"""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from chatglm_ov.chat import chat_format_for
from chatglm_ov.errors import ChatGLMError

SUFFIXES = (".txt", ".jsonl", ".txt.xz", ".jsonl.xz")
_PLACEHOLDER = re.compile(r"{(\w+)}")
_NO_CHARACTER = re.compile("[\0\ud800-\udfff]")
"""NUL, and halves of a surrogate pair: JSON can write one without the other, UTF-8 cannot."""


@dataclass(frozen=True)
class Document:
    """`given`: ids that come first and are not predicted, at least those that begin every text; `ids`: the text."""

    given: tuple[int, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Where the texts are. field: name of the text in an object; a list of texts counts as its lines. prompt: what to
    ask the model before each text, in its chat format, with names of fields in braces; None for no chat format.
    limit: no more documents than that."""

    path: Path
    field: str = "text"
    prompt: str | None = None
    limit: int | None = None

    def check(self) -> None:
        """Raises ChatGLMError for what would fail without reading any text."""
        if not self.path.name.endswith(SUFFIXES):
            raise ChatGLMError(self.path, "name", repr(self.path.name), f"one that ends with {', '.join(SUFFIXES)}")
        if not self.path.is_file():
            raise ChatGLMError(self.path, "file", "missing", "a file of texts")
        if self.prompt is not None and ".jsonl" not in self.path.suffixes:
            raise ChatGLMError("prompt", "data", self.path.name, "a .jsonl file: it is asked before each object")
        if not self.field:
            raise ChatGLMError(self.path, "field", "empty", "the name of a text in each object")
        _characters("prompt", "text", self.prompt or "")

    def documents(self, tokenizer: Any) -> list[Document]:
        """Raises ChatGLMError for what is no text, and if there is nothing to predict."""
        found = list(self.read(tokenizer))
        if not any(document.ids for document in found):
            raise ChatGLMError(self.path, "file", "of one token a document" if found else "empty", "text")
        return found

    def read(self, tokenizer: Any) -> Iterator[Document]:
        """One document after the other. Raises ChatGLMError for what is no text."""
        self.check()
        for where, fields in islice(self._objects(), self.limit):
            text = _text(where, self.field, fields)
            ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            if not ids:
                raise ChatGLMError(where, self.field, "empty", "text")
            yield _document(self._given(tokenizer, where, fields), ids)

    def _given(self, tokenizer: Any, where: str, fields: dict[str, Any]) -> tuple[int, ...]:
        if self.prompt is None:
            return tuple(tokenizer.encode(""))
        query = _PLACEHOLDER.sub(lambda match: _text(where, match.group(1), fields), self.prompt)
        return tuple(chat_format_for(tokenizer).build_inputs(tokenizer, query))

    def _objects(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Where an object comes from, and its fields."""
        opened = lzma.open if self.path.suffix == ".xz" else open
        try:
            with opened(self.path, "rt", encoding="utf-8-sig") as stream:
                if ".jsonl" not in self.path.suffixes:
                    yield str(self.path), {self.field: stream.read()}
                    return
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        where = f"{self.path} line {number}"
                        yield where, _object(where, line)
        except UnicodeDecodeError as error:
            raise ChatGLMError(self.path, "encoding", f"not UTF-8 ({error.reason})", "text in UTF-8") from error
        except (lzma.LZMAError, EOFError) as error:
            raise ChatGLMError(self.path, "file", f"unreadable ({error})", "what xz packed") from error


def _document(given: tuple[int, ...], ids: tuple[int, ...]) -> Document:
    # A tokenizer that begins texts with nothing: the first token cannot be predicted.
    return Document(given, ids) if given else Document(ids[:1], ids[1:])


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ChatGLMError(where, "JSON", f"unreadable ({error})", "one object a line") from error
    if not isinstance(fields, dict):
        raise ChatGLMError(where, "JSON", f"of type {type(fields).__name__}", "an object")
    return fields


def _text(where: str, field: str, fields: dict[str, Any]) -> str:
    if field not in fields:
        raise ChatGLMError(where, field, "missing", f"one of {', '.join(fields) or 'no fields'}")
    value = fields[field]
    if isinstance(value, list):
        return "\n".join(_characters(where, f"{field}[{i}]", line) for i, line in enumerate(value))
    return _characters(where, field, value, "text, or a list of texts")


def _characters(where: str, field: str, value: Any, wanted: str = "text") -> str:
    """`value`, if it is text of whole characters."""
    if not isinstance(value, str):
        raise ChatGLMError(where, field, f"of type {type(value).__name__}", wanted)
    if found := _NO_CHARACTER.search(value):
        line = value.count("\n", 0, found.start()) + 1
        raise ChatGLMError(where, field, f"with {found[0]!r} in line {line} of it", "text")
    return value
