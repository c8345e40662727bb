"""`chatglm-ov bench`: the files that it would write over, and settings that change nothing."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Run, checkpoint, converted, names, run  # noqa: F401

FEW = ("--prompt-tokens", 4, "--new-tokens", 1, "--rounds", 1)


def test_what_is_read_or_written_is_not_written_over(converted: Path, tmp_path: Path, run: Run) -> None:
    config, picture = converted / "config.json", tmp_path / "a.svg"
    before = config.read_bytes()
    told = run("bench", converted, *FEW, "--json", config).error
    assert told == f"--json: file is {config}, which the command needs itself, expected another file"
    told = run("bench", converted, *FEW, "--json", picture, "--picture", picture).error
    assert told == f"--picture: file is {picture}, which the command needs itself, expected another file"
    assert config.read_bytes() == before and names(tmp_path) == []


def test_weights_without_integers_have_no_bits_of_activations(
    checkpoint: Path, tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    asked = ("bench", checkpoint, *FEW, "--work-folder", tmp_path, "--activation-bits", 16, 8)
    done = run(*asked, "--weight-format", "bf16")
    if "expected fused with it" in done.err:
        pytest.skip("activation bits are those of fused operations")
    assert done.code == 0, done.err
    assert caplog.messages == ["--activation-bits 8 changes nothing for weights in bf16"]
    caplog.clear()
    assert run(*asked, "--weight-format", "bf16", "int8").code == 0
    assert caplog.messages == []
