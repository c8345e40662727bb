"""What a calibration is made with: its methods, its text, and how much of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chatglm_ov.config import ArchitectureConfig
from chatglm_ov.documents import Source
from chatglm_ov.errors import ChatGLMError

METHODS = ("awq", "gptq")
POEMS = Source(Path(__file__).parent.parent / "demo" / "calibration.jsonl.xz", prompt="请背诵{author}的《{title}》。")
"""The text of the package: Tang poems that the demo model does not know by heart."""


def calibrated_formats(methods: Sequence[str]) -> tuple[str, ...]:
    """The weight formats that calibration methods choose."""
    return ("int4", "int8") if "gptq" in methods else ("int4",)


@dataclass(frozen=True)
class Calibration:
    """How int4 weights are chosen, and with GPTQ int8 ones.

    methods: `awq` scales columns by their activations and clips ranges; `gptq` clips, and moves rounding errors into
    the columns that are left; both together scale first. source: texts. tokens: as many of them are used, from the
    first on. window: tokens of a sequence, and the least that the texts must have.
    """

    methods: tuple[str, ...] = METHODS
    source: Source = POEMS
    tokens: int = 16384
    window: int = 512

    def __post_init__(self) -> None:
        if not self.methods or not set(self.methods) <= set(METHODS):
            raise ChatGLMError("convert", "calibration methods", repr(self.methods), f"any of {', '.join(METHODS)}")
        if self.window < 2 or self.tokens < self.window:
            raise ChatGLMError("convert", "calibration tokens", self.tokens, f"at least a window of {self.window}")
        self.source.check()

    @property
    def label(self) -> str:
        """The methods in one word: awq, gptq or awq+gptq."""
        return "+".join(name for name in METHODS if name in self.methods)

    @property
    def weight_formats(self) -> tuple[str, ...]:
        """The formats whose weights these methods choose."""
        return calibrated_formats(self.methods)

    def chosen_by(self, weight_format: str) -> str:
        """The methods that chose the weights of a model of this format: only columns of int4 are scaled by AWQ."""
        return self.label if weight_format == "int4" else "gptq"

    def sequences(self, tokenizer: Any, config: ArchitectureConfig) -> list[np.ndarray]:
        """Ids of the texts, int64 [N] each, N at most a window. Raises ChatGLMError for texts shorter than that."""
        limit = config.max_positions
        if limit is not None and self.window > limit:
            wanted = f"at most {limit} ({config.positions_field})"
            raise ChatGLMError("convert", "calibration window", self.window, wanted)
        found, tokens = [], 0
        for ids, given in self._windows(tokenizer):
            _check_ids(self.source.path, ids, config)
            kept = ids[: self.tokens - tokens]
            # What is given is whole or not there: ChatGLM-6B needs the end of it.
            if len(kept) > given:
                found.append(kept)
                tokens += len(kept)
            if len(kept) < len(ids) or tokens == self.tokens:
                return found
        if tokens < self.window:
            seen = f"{tokens} token{'s' if tokens != 1 else ''}"
            raise ChatGLMError(self.source.path, "text", seen, f"at least a window of {self.window}")
        return found

    def _windows(self, tokenizer: Any) -> Iterator[tuple[np.ndarray, int]]:
        """Pieces of each document, every token in one of them, and how many ids in front of each are given."""
        for document in self.source.read(tokenizer):
            room = self.window - len(document.given)
            if room < 2:
                wanted = f"less than a window of {self.window}"
                raise ChatGLMError(self.source.path, "prompt", f"{len(document.given)} tokens", wanted)
            for start in range(0, len(document.ids), room):
                ids = document.given + document.ids[start : start + room]
                yield np.array(ids, np.int64), len(document.given)


def _check_ids(path: Path, ids: np.ndarray, config: ArchitectureConfig) -> None:
    if ids.max() >= config.vocab_rows:
        raise ChatGLMError(
            path, "token id", int(ids.max()), f"less than {config.vocab_rows}, the rows of the embedding"
        )
