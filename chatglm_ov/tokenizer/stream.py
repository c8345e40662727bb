"""Text of ids as they come, without decoding anything twice.

    stream = TextStream(tokenizer)
    for token_id in ids: print(stream.put(token_id), end="")
    print(stream.flush())

The pieces joined are `tokenizer.decode(ids)`, character by character. What later ids can still change is held back:
the first bytes of a character (3 at most), in v1 also a blank before punctuation and a whitespace token's beginning.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable
from operator import index
from typing import Any, Protocol

from chatglm_ov.errors import ChatGLMError

SPACE = "\u2581"  # sentencepiece writes a blank so
REPLACEMENT = "\ufffd"
_TRUNCATED = "unexpected end of data"
_MOST_IDS = 1 << 32  # the tokenizers library holds an id in 32 bits


class Decoder(Protocol):
    """Turns a stream of something into text; `flush` gives what was held back and starts anew."""

    def put(self, item: Any) -> str: ...

    def flush(self) -> str: ...


class TextStream:
    """Incremental `tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)`."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = False):
        self._token: Callable[[int], Any]
        self._decoders: list[Decoder]
        if hasattr(tokenizer, "stream_decoders"):
            self._token, self._decoders = tokenizer.stream_decoders(skip_special_tokens)
        else:
            self._token, self._decoders = _fast_decoders(tokenizer, skip_special_tokens)

    def put(self, ids: int | Iterable[int]) -> str:
        """The text that is certain after these ids; "" while a character is incomplete."""
        return "".join(map(self._put_one, id_list(ids, "TextStream.put")))

    def _put_one(self, token_id: int) -> str:
        item = self._token(token_id)
        if item is None:
            return ""
        for decoder in self._decoders:
            item = decoder.put(item)
        return item

    def flush(self) -> str:
        """The text held back; afterwards the stream is at its beginning again."""
        text = ""
        for decoder in self._decoders:
            text = (decoder.put(text) if text else "") + decoder.flush()
        return text


def id_list(ids: Any, where: str) -> list[int]:
    """One id or several as a list. Raises ChatGLMError for what is not made of integers."""
    try:
        return [ids] if isinstance(ids, int) else list(map(index, ids))
    except TypeError:
        raise ChatGLMError(where, "token_ids", f"of type {type(ids).__name__}", "a list of integers") from None


class PieceDecoder:
    """Sentencepiece's rules for turning pieces into text. Items: bytes (a byte piece), (text, is a piece of the model).

    Neighbouring byte pieces form characters; a byte that cannot be part of one becomes U+FFFD. The blank that was put
    before the text is dropped from the first piece, or (`all_blanks`) from every piece until there is text.
    """

    def __init__(self, all_blanks: bool):
        self._all_blanks = all_blanks
        self._bytes = b""
        self._at_start = True

    def put(self, item: bytes | tuple[str, bool]) -> str:
        if isinstance(item, bytes):
            self._bytes += item
            text = self._characters(final=False)
            self._at_start = self._at_start and not text
            return text
        before = self._characters(final=True)
        self._at_start = self._at_start and not before
        text, is_piece = item
        if is_piece:
            text = self._blanks(text)
        self._at_start = self._at_start and not text
        return before + text

    def _blanks(self, piece: str) -> str:
        if self._at_start and piece.startswith(SPACE):
            piece = piece[1:]
            self._at_start = self._all_blanks
        return piece.replace(SPACE, " ")

    def _characters(self, final: bool) -> str:
        text = ""
        while self._bytes:
            try:
                text, self._bytes = text + self._bytes.decode(), b""
            except UnicodeDecodeError as error:
                text += self._bytes[: error.start].decode()
                self._bytes = self._bytes[error.start :]
                if error.reason == _TRUNCATED and not final:
                    break
                text, self._bytes = text + REPLACEMENT, self._bytes[1:]
        return text

    def flush(self) -> str:
        text = self._characters(final=True)
        self._at_start = True
        return text


class ByteDecoder:
    """UTF-8 bytes to text, errors replaced. Items: bytes, or str for a special token.

    A special token ends the bytes before it; `separator` stands on both sides of it, unless at an end of the text.
    """

    def __init__(self, separator: str):
        self._separator = separator
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._started = False
        self._after_special = False

    def put(self, item: bytes | str) -> str:
        special = isinstance(item, str)
        gap = self._separator if self._started and (special or self._after_special) else ""
        self._started, self._after_special = True, special
        if isinstance(item, str):
            return self._utf8.decode(b"", final=True) + gap + item
        return gap + self._utf8.decode(item)

    def flush(self) -> str:
        self._started = self._after_special = False
        return self._utf8.decode(b"", final=True)


class WhitespaceTokens:
    """v1's tokens for newline, tab and runs of blanks, written out in text, back to whitespace."""

    PATTERN = re.compile(r"<(?:n|\|(?:tab|blank_([2-9]|[1-7]\d|80))\|)>")
    # What may still become one of them.
    _BEGINNING = re.compile(r"<(?:n|\|(?:t?|ta|tab\|?|b|bl|bla|blan|blank|blank_(?:\d{1,2}\|?)?))?\Z")

    def __init__(self) -> None:
        self._held = ""

    @classmethod
    def replace(cls, text: str) -> str:
        return cls.PATTERN.sub(cls._whitespace, text)

    @staticmethod
    def _whitespace(match: re.Match[str]) -> str:
        return " " * int(match[1]) if match[1] else ("\n" if match[0] == "<n>" else "\t")

    def put(self, item: str) -> str:
        text = self.replace(self._held + item)
        beginning = self._BEGINNING.search(text)
        end = beginning.start() if beginning else len(text)
        self._held = text[end:]
        return text[:end]

    def flush(self) -> str:
        text, self._held = self._held, ""
        return text


class CleanUp:
    """The replacements of Hugging Face's `clean_up_tokenization_spaces`: blanks before punctuation are dropped.

    All patterns begin with a blank. Behind it only the characters of `_UNSURE` can stand in the beginning of a pattern,
    so that a text can be cut at a blank that has nothing but those between itself and the end, and no such blank
    before it: what is on the left of the cut is not changed by what comes.
    """

    _PATTERNS = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
    _UNSURE = frozenset(" 'nvr")

    def __init__(self) -> None:
        self._held: list[str] = []

    @classmethod
    def replace(cls, text: str) -> str:
        for pattern in cls._PATTERNS:
            text = text.replace(pattern, pattern.strip(" "))
        return text

    def put(self, item: str) -> str:
        end = len(item)
        while end and item[end - 1] in self._UNSURE:
            end -= 1
        text = self.replace(self.flush_raw() + item[:end]) if end else ""
        tail = item[end:]
        cut = 0 if self._held else tail.find(" ")
        cut = len(tail) if cut < 0 else cut
        self._held += [tail[cut:]] if tail[cut:] else []
        return text + tail[:cut]

    def flush_raw(self) -> str:
        text = "".join(self._held)
        self._held.clear()
        return text

    def flush(self) -> str:
        return self.replace(self.flush_raw())


def byte_characters() -> dict[int, str]:
    """Byte to the printable character that stands for it in byte-level vocabularies (as in GPT-2): itself for printable
    Latin-1, the characters from U+0100 on for the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def _fast_decoders(tokenizer: Any, skip_special_tokens: bool) -> tuple[Callable[[int], bytes | None], list[Decoder]]:
    """For a tokenizer.json with a byte-level decoder, the only kind in this family."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    decoder = type(getattr(backend, "decoder", None)).__name__
    if decoder != "ByteLevel":
        raise ChatGLMError(type(tokenizer).__name__, "decoder", decoder, "ByteLevel")
    to_byte = {character: byte for byte, character in byte_characters().items()}
    added = tokenizer.added_tokens_decoder.items() if skip_special_tokens else ()
    skipped = {token_id for token_id, token in added if token.special}

    def token(token_id: int) -> bytes | None:
        if not 0 <= token_id < _MOST_IDS:
            raise ChatGLMError("TextStream", "token id", token_id, f"0 to {len(tokenizer) - 1}")
        text = None if token_id in skipped else backend.id_to_token(token_id)
        if text is None:
            return None
        known = all(character in to_byte for character in text)
        return bytes(to_byte[character] for character in text) if known else text.encode()

    # Whether byte-level text is cleaned up depends on the transformers version, besides the tokenizer's setting.
    clean = tokenizer.decode(tokenizer.encode("a ,", add_special_tokens=False)) == "a,"
    return token, [ByteDecoder(""), *([CleanUp()] if clean else [])]
