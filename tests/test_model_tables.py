"""tools/model_tables.py: what it computes is what a converted model holds, and the pages have its tables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command_line import TOOLS
from golden_sets import without_library

from chatglm_ov.bench.models import Source, converted
from chatglm_ov.bench.work import weight_bytes
from chatglm_ov.presets import PRESETS, config_json
from chatglm_ov.runtime.ir_reading import read_ir
from chatglm_ov.weights.ir import IR_NAME

sys.path.insert(0, str(TOOLS))

import model_tables

ROOT = TOOLS.parent
SIZES = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512}


@without_library
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weight_format", model_tables.SHARES)
def test_bytes_of_a_token_are_those_of_the_converted_model(weight_format: str, tied: bool, tmp_path: Path) -> None:
    source = Source("small", config_json("glm-edge-1.5b-chat", **SIZES, tie_word_embeddings=tied))
    with source.weights() as weights:
        planned = source.plan(weights, weight_format, "fused").disk_bytes
    with converted(source, weight_format, ["fused"], tmp_path) as folders:
        computed = planned - model_tables.looked_up_bytes(source, weight_format)
        assert computed == weight_bytes(read_ir(folders["fused"] / weight_format / IR_NAME), source.config)


def test_every_preset_is_on_one_page() -> None:
    groups = [group for groups in model_tables.PAGES.values() for group in groups]
    assert sorted(preset for group in groups for preset in group.presets) == sorted(PRESETS)
    for group in groups:
        first, *others = (model_tables.figures(preset) for preset in group.presets)
        assert all(other == first for other in others), group


def test_every_page_is_there_and_has_the_tables_computed() -> None:
    wanted = model_tables.tables()
    assert {page for page in wanted if page.parent.name == "models"} == set((ROOT / "docs" / "models").glob("*.md"))
    for page, found in wanted.items():
        text = page.read_text(encoding="utf-8")
        for table in found:
            assert f"\n\n{table}\n" in text, f"{page.name}: python tools/model_tables.py --write"


def test_pages_name_the_shares_that_their_speeds_are_computed_with() -> None:
    for page in (ROOT / "docs" / "models").glob("*.md"):
        text = " ".join(page.read_text(encoding="utf-8").split())
        for name, share in model_tables.SHARES.items():
            assert f"{share:.0%}".replace("%", f" % ({name})") in text.replace("（", " (").replace("）", ")"), page.name


def test_shares_are_those_measured() -> None:
    shares = " | ".join(f"{share:.0%}".replace("%", " %") for share in model_tables.SHARES.values())
    for page in ("performance.md", "performance.zh.md"):
        assert f"| {shares} |" in (ROOT / "docs" / page).read_text(encoding="utf-8")


@pytest.mark.parametrize(("value", "count", "text"), [(64.35, 2, "64"), (0.0512, 2, "0.051"), (262.1, 2, "260")])
def test_digits(value: float, count: int, text: str) -> None:
    assert model_tables.digits(value, count) == text


def test_a_table_takes_the_place_of_the_one_with_its_header() -> None:
    old = "a\n\n| x | y |\n|---|---|\n| 1 | 2 |\n\n| z |\n|---|\n| 3 |\n"
    new = "| x | y |\n|---|---|\n| 4 | 5 |\n"
    assert model_tables.replaced(old, new) == old.replace("| 1 | 2 |", "| 4 | 5 |")
