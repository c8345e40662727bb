"""Text as tokenizers can take it."""

from __future__ import annotations


def whole_characters(text: str) -> str:
    """`text` with half a surrogate pair, which UTF-8 cannot hold, as U+FFFD; two halves side by side become one
    character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
