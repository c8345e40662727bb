"""`chatglm-ov demo`: the model in the package, converted, recites the poem."""

# ruff: noqa: F811 (a fixture is imported)

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
from command_line import Run, names, run  # noqa: F401

from chatglm_ov.cli import demo

POEM = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"


def test_recites_from_every_format(tmp_path: Path, run: Run) -> None:
    done = run("demo", "--output", tmp_path / "kept")
    assert done.code == 0, done.err
    assert {"bf16", "int8", "int4", "tokenizer.model"} < set(names(tmp_path / "kept"))
    assert re.search(r"Reads [\d.]+ MB, writes [\d.]+ MB", done.out) and "100%" in done.err
    for weight_format in ("bf16", "int8", "int4"):
        for query, answer in (("请背诵李白的《夜思》。", POEM), ("床前明月光", POEM.partition("，")[2])):
            assert f"\n{weight_format}> {query}\n{answer}\n[" in done.out
    assert len(re.findall(r"first token [\d.]+ ms, next tokens [\d.]+ ms each, [\d.]+ tokens/s\]", done.out)) == 6


def test_cleans_up_and_tells_a_wrong_answer(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(demo, "CALIBRATION_TOKENS", 512)
    monkeypatch.setattr(demo, "EXPECTED", {"床前明月光": "疑是地下霜。"})
    done = run("demo")
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith(
        "chatglm-ov: error: bf16 and int8 and int4 did not answer with the poem"
    )
    assert names(tmp_path) == []


def test_does_not_write_over_a_folder_in_use(tmp_path: Path, run: Run) -> None:
    (tmp_path / "diary.txt").write_text("mine")
    assert "output is not empty" in run("demo", "--output", tmp_path).error
    assert names(tmp_path) == ["diary.txt"]
