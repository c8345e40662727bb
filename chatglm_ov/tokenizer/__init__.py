"""Tokenizers of the family without remote code.

`load_tokenizer` gives a Hugging Face tokenizer, `TextStream` turns ids into text as they come.
"""

from __future__ import annotations

from chatglm_ov.tokenizer.files import FAMILIES, detect_family, save_tokenizer_files
from chatglm_ov.tokenizer.loading import load_tokenizer
from chatglm_ov.tokenizer.stream import TextStream

__all__ = ["FAMILIES", "TextStream", "detect_family", "load_tokenizer", "save_tokenizer_files"]
