#!/usr/bin/env python
"""The tables of memory and speed in docs/models.md and docs/models/*.md, computed from the shapes of the models.

    python tools/model_tables.py            print them
    python tools/model_tables.py --write    put them into the pages, in both languages

Sizes are those of the fused operations. Speeds are not measured: they are what a machine of some read bandwidth makes
of the bytes that a token reads, with the shares of the bandwidth in docs/performance.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from functools import cache
from math import floor, log10
from pathlib import Path

from chatglm_ov.bench.models import Source, from_preset
from chatglm_ov.bench.work import cache_bytes
from chatglm_ov.models import architecture, graph_shapes

DOCS = Path(__file__).parent.parent / "docs"

# The share of the read bandwidth at which next tokens run.
SHARES = {"bf16": 0.96, "int8": 0.95, "int4": 0.94}
BANDWIDTHS = (50e9, 100e9, 300e9)


@dataclass(frozen=True)
class Group:
    """Models with the same figures. names: of all of them, the first in full."""

    names: tuple[str, ...]
    presets: tuple[str, ...]


_CHATGLM = Group(("ChatGLM-6B",), ("chatglm-6b",))
_CHATGLM2 = Group(("ChatGLM2-6B", "-32k"), ("chatglm2-6b", "chatglm2-6b-32k"))
_CHATGLM3 = Group(("ChatGLM3-6B", "-32k", "-128k"), ("chatglm3-6b", "chatglm3-6b-32k", "chatglm3-6b-128k"))
_CODEGEEX2 = Group(("CodeGeeX2-6B",), ("codegeex2-6b",))
_GLM4 = Group(("GLM-4-9B-chat", "-chat-hf"), ("glm-4-9b-chat", "glm-4-9b-chat-hf"))
_GLM4_1M = Group(("GLM-4-9B-chat-1m", "-chat-1m-hf"), ("glm-4-9b-chat-1m", "glm-4-9b-chat-1m-hf"))
_CODEGEEX4 = Group(("codegeex4-all-9b",), ("codegeex4-all-9b",))

PAGES = {
    "chatglm-6b": (_CHATGLM,),
    "chatglm2-6b": (_CHATGLM2,),
    "chatglm3-6b": (_CHATGLM3,),
    "codegeex2-6b": (_CODEGEEX2,),
    "glm-4-9b": (_GLM4, _GLM4_1M),
    "codegeex4-all-9b": (_CODEGEEX4,),
    "glm-edge": (
        Group(("GLM-Edge-1.5B-chat",), ("glm-edge-1.5b-chat",)),
        Group(("GLM-Edge-4B-chat",), ("glm-edge-4b-chat",)),
    ),
    "glm-4-0414": (
        Group(("GLM-4-9B-0414",), ("glm-4-9b-0414",)),
        Group(("GLM-4-32B-0414",), ("glm-4-32b-0414",)),
    ),
    "glm-z1": (
        Group(("GLM-Z1-9B-0414",), ("glm-z1-9b-0414",)),
        Group(("GLM-Z1-32B-0414",), ("glm-z1-32b-0414",)),
    ),
}
"""The models of each page docs/models/PAGE.md."""


@dataclass(frozen=True)
class Language:
    """suffix: of the file names. separator: between names of models."""

    suffix: str
    separator: str
    memory: tuple[str, ...]
    speed: tuple[str, ...]


LANGUAGES = (
    Language(
        ".md",
        ", ",
        ("model", *SHARES, "cache, 1,000 tokens", "in int8"),
        ("model, weights", "read for a token", *(f"{bandwidth / 1e9:.0f} GB/s" for bandwidth in BANDWIDTHS)),
    ),
    Language(
        ".zh.md",
        "、",
        ("模型", *SHARES, "1,000 个词元的缓存", "int8 缓存"),
        ("模型，权重", "每个词元读取", *(f"{bandwidth / 1e9:.0f} GB/s" for bandwidth in BANDWIDTHS)),
    ),
)


@dataclass(frozen=True)
class Figures:
    """Bytes by weight format: of all weights, and of those that a token reads. Bytes of the cache by its type, for
    1,000 tokens."""

    weights: dict[str, int]
    token: dict[str, int]
    cache: dict[str, float]


@cache
def figures(preset: str) -> Figures:
    """Of a released model."""
    source = from_preset(preset)
    with source.weights() as weights:
        stored = {name: source.plan(weights, name, "fused").disk_bytes for name in SHARES}
    token = {name: nbytes - looked_up_bytes(source, name) for name, nbytes in stored.items()}
    return Figures(stored, token, {name: cache_bytes(source.config, name, 1000, 1) for name in ("bf16", "int8")})


def looked_up_bytes(source: Source, weight_format: str) -> int:
    """Bytes of an embedding of which a token reads a row; 0 for one that is the LM head as well."""
    if source.config.tie_word_embeddings:
        return 0
    table = graph_shapes(source.config)[architecture(source.config).EMBEDDING]
    return source.choices.embedding(weight_format).nbytes(table)


def digits(value: float, count: int) -> str:
    """`value` rounded to so many digits that count."""
    places = count - 1 - floor(log10(value))
    return f"{round(value, places):.{max(0, places)}f}"


def amount(nbytes: float) -> str:
    return f"{digits(nbytes / 1e9, 3)} GB" if nbytes >= 1e9 else f"{digits(nbytes / 1e6, 3)} MB"


def memory_table(groups: tuple[Group, ...], language: Language) -> str:
    rows = []
    for group in groups:
        found = figures(group.presets[0])
        sizes = [*found.weights.values(), *found.cache.values()]
        rows.append((language.separator.join(group.names), *map(amount, sizes)))
    return table(language.memory, rows)


def speed_table(groups: tuple[Group, ...], language: Language) -> str:
    rows = []
    for group in groups:
        for name, nbytes in figures(group.presets[0]).token.items():
            speeds = [digits(SHARES[name] * bandwidth / nbytes, 2) for bandwidth in BANDWIDTHS]
            rows.append((f"{group.names[0]}, {name}", amount(nbytes), *speeds))
    return table(language.speed, rows)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    first, *others = (f"| {' | '.join(cells)} |\n" for cells in (header, *rows))
    return "".join((first, "|" + "---|" * len(header) + "\n", *others))


def tables() -> dict[Path, list[str]]:
    """The tables that each page has to hold, in both languages."""
    found = {}
    for language in LANGUAGES:
        every = tuple(group for groups in PAGES.values() for group in groups)
        found[DOCS / f"models{language.suffix}"] = [memory_table(every, language)]
        for page, groups in PAGES.items():
            file = DOCS / "models" / f"{page}{language.suffix}"
            found[file] = [memory_table(groups, language), speed_table(groups, language)]
    return found


def replaced(text: str, new: str) -> str:
    """`text` with `new` in the place of the table that has the same header."""
    header = new.partition("\n")[0]
    return re.sub(rf"^{re.escape(header)}\n(\|.*\n)*", lambda _: new, text, flags=re.MULTILINE)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tables of memory and speed for docs/models.")
    parser.add_argument("--write", action="store_true", help="put them into the pages")
    write = parser.parse_args(argv).write
    for page, wanted in tables().items():
        if write:
            text = page.read_text(encoding="utf-8")
            for new in wanted:
                text = replaced(text, new)
            page.write_text(text, encoding="utf-8")
        else:
            print(f"{page.relative_to(DOCS)}\n\n" + "\n".join(wanted))
    return 0


if __name__ == "__main__":
    sys.exit(main())
