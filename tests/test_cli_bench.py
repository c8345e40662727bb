"""`chatglm-ov bench`: the files that it would write over, and settings that change nothing."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import json
import shutil
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


def test_a_trained_prefix_is_left_out(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "source")
    config = source / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pre_seq_len": 8}))
    assert run("bench", source, *FEW, "--weight-format", "int8", "--work-folder", tmp_path).code == 0


def test_a_converted_folder_needs_no_other(converted: Path, tmp_path: Path, run: Run) -> None:
    told = run("bench", converted, *FEW, "--work-folder", tmp_path).error
    assert told == f"--work-folder: value is {tmp_path}, expected a checkpoint or --preset with it"


def test_a_checkpoint_is_not_written_over(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "source")
    before = {path: path.read_bytes() for path in source.iterdir()}
    assert len(before) > 4
    for path in before:
        for option in ("--json", "--picture"):
            assert "which the command needs itself" in run("bench", source, *FEW, option, path).error
    assert {path: path.read_bytes() for path in source.iterdir()} == before
