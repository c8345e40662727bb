"""The vocabulary file of GLM-4, lines of `base64(bytes) rank`."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from chatglm_ov.errors import ChatGLMError


def read_ranks(data: bytes, where: str | Path) -> dict[bytes, int]:
    """Bytes of each token to its rank, in the order of the ranks 0, 1, 2, ..."""
    ranks = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            if int(rank) != number - 1:
                raise ValueError
            ranks[base64.b64decode(token, validate=True)] = number - 1
        except (ValueError, binascii.Error):
            seen = repr(line[:40].decode("utf-8", "replace"))
            raise ChatGLMError(where, f"line {number}", seen, f"`base64(bytes) {number - 1}`") from None
    single = sum(len(token) == 1 for token in ranks)
    if len(ranks) < len(data.splitlines()) or single != 256:
        seen = f"{len(ranks)} different ones, {single} of them single bytes"
        raise ChatGLMError(where, "tokens", seen, f"{len(data.splitlines())}, all 256 bytes among them")
    return ranks
