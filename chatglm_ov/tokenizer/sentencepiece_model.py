"""Loads a sentencepiece model from its bytes and completes the ones of early ChatGLM-6B.

Only the outermost level of the protobuf wire format is looked at here, which is three record kinds long: the model
itself is read by the sentencepiece library.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from chatglm_ov.errors import ChatGLMError

# Fields of sentencepiece's ModelProto, and kinds of a piece in it.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6

V1_SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
MAX_BLANKS = 80


def load_sentencepiece(data: bytes, where: str | Path) -> SentencePieceProcessor:
    """A processor for the serialized model `data`. Raises ChatGLMError for anything that is not a whole model."""
    processor = SentencePieceProcessor()
    try:
        # The library accepts a file that was cut between two pieces: the parts behind the pieces are then missing.
        whole = {_PIECES, _TRAINER, _NORMALIZER} <= set(_field_numbers(data))
        loaded = whole and processor.LoadFromSerializedProto(data)
    except (RuntimeError, ValueError):
        loaded = False
    if not loaded:
        seen = f"not a whole sentencepiece model ({len(data)} bytes)"
        raise ChatGLMError(where, "content", seen, "a sentencepiece model, not cut off")
    return processor


def with_v1_special_pieces(data: bytes) -> bytes:
    """The serialized model `data` plus the 344 pieces that early ChatGLM-6B added at run time: 8 special tokens, tab,
    runs of 2 to 80 blanks, 256 bytes.

    Two protobuf messages, one behind the other, are one message with both their repeated fields.
    """
    pieces = [_piece(token, _CONTROL) for token in V1_SPECIAL_TOKENS]
    pieces += [_piece("<|tab|>", _USER_DEFINED)]
    pieces += [_piece(f"<|blank_{count}|>", _USER_DEFINED) for count in range(2, MAX_BLANKS + 1)]
    pieces += [_piece(f"<0x{byte:02X}>", _BYTE) for byte in range(256)]
    byte_fallback = _record(_TRAINER, bytes([0x98, 0x02, 0x01]))  # TrainerSpec field 35, a varint, true
    return data + b"".join(pieces) + byte_fallback


def _piece(text: str, kind: int) -> bytes:
    """ModelProto.SentencePiece: 1 piece (string), 2 score (float, 0), 3 type (enum)."""
    return _record(_PIECES, _record(1, text.encode()) + b"\x15" + struct.pack("<f", 0.0) + bytes([0x18, kind]))


def _record(field: int, content: bytes) -> bytes:
    """A length-delimited field; all of those written here are shorter than 128 bytes."""
    return bytes([field << 3 | 2, len(content)]) + content


def _field_numbers(data: bytes) -> Iterator[int]:
    """Numbers of the outermost fields in order. ValueError where the records do not end with the data."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        if tag & 7 != 2:
            raise ValueError(f"field of wire type {tag & 7}")
        length, position = _varint(data, position)
        position += length
        yield tag >> 3
    if position != len(data):
        raise ValueError("cut off")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data):
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
    raise ValueError("cut off")
