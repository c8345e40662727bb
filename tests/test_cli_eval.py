"""`chatglm-ov eval`: its figures, its table, and what it refuses."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import Run, checkpoint, converted, reader_went_away, run  # noqa: F401
from safetensors.torch import load_file, save_file

from chatglm_ov import convert

POEMS = [
    {"title": "静夜思", "author": "李白", "text": "床前明月光，疑是地上霜。举头望明月，低头思故乡。"},
    {"title": "春晓", "author": "孟浩然", "text": "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"},
]


@pytest.fixture
def poems(tmp_path: Path) -> Path:
    path = tmp_path / "poems.jsonl"
    path.write_text("".join(json.dumps(poem, ensure_ascii=False) + "\n" for poem in POEMS), encoding="utf-8")
    return path


def test_formats_beside_a_reference(converted: Path, poems: Path, tmp_path: Path, run: Run) -> None:
    done = run(
        "eval", converted, "--data", poems, "--reference", converted, "--window", 24, "--stride", 8,
        "--json", tmp_path / "figures.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "figures.json").read_text())
    assert report["documents"] == 2 and (report["window"], report["stride"]) == (24, 8)
    assert report["reference"] == {"folder": str(converted), "weight_format": "f32"}
    models = {model["label"]: model for model in report["models"]}
    assert list(models) == ["reference", "bf16", "f32", "int8"]
    base = models["reference"]["perplexity"]
    assert models["reference"]["agreement"] is None and models["reference"]["kv_cache_format"] == "f32"
    for name in ("bf16", "f32", "int8"):
        model = models[name]
        assert model["perplexity_change"] == pytest.approx(model["perplexity"] / base - 1)
        assert 0.8 < model["agreement"] <= 1 and -1e-12 < model["divergence"] < 0.1
    assert models["f32"]["divergence"] < models["bf16"]["divergence"] < models["int8"]["divergence"]
    printed = done.out.splitlines()
    assert printed[0].startswith("poems.jsonl: 2 documents, ") and "windows of 24, stride 8" in printed[0]
    assert [line.split("  ")[0].strip() for line in printed[3:]] == list(models)


def test_settings_of_the_model_are_told(converted: Path, poems: Path, run: Run) -> None:
    done = run(
        "eval", converted, "--data", poems, "--weight-format", "int8", "--prompt", "{author}的《{title}》",
        "--limit", 1, "--kv-cache-format", "int8", "--activation-bits", 8,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "int8, 8-bit activations, int8 cache" in done.out and "1 documents" in done.out


def test_weights_without_integers_have_no_bits_of_activations(
    converted: Path, poems: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    asked = ("eval", converted, "--data", poems, "--limit", 1, "--activation-bits", 8, "--weight-format", "bf16")
    done = run(*asked)
    assert done.code == 0, done.err
    assert "bf16" in done.out and "8-bit activations" not in done.out
    assert caplog.messages == ["--activation-bits 8 changes nothing for weights in bf16"]
    assert run(*asked, "int8").code == 0 and len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--field", "verse"], "verse is missing, expected one of title, author, text"),
        (["--prompt", "{name}"], "name is missing, expected one of title, author, text"),
        (["--window", "4", "--stride", "4"], "window is 4, expected more than"),
        (["--json", "none/figures.json"], "--json: file is none/figures.json, expected a file in a folder"),
        (["--window", "1000000"], "window is 1000000, expected at most"),
        (["--weight-format", "int4"], "weight_format is 'int4'"),
        (["--reference-format", "int4"], "weight_format is 'int4'"),
    ],
)
def test_what_is_refused(arguments: list[str], told: str, converted: Path, poems: Path, run: Run) -> None:
    done = run("eval", converted, "--data", poems, *arguments)
    assert done.code == 2 and told in done.err.splitlines()[-1]


def test_folders_and_files_that_are_not_there(converted: Path, poems: Path, tmp_path: Path, run: Run) -> None:
    assert "file is missing" in run("eval", converted, "--data", tmp_path / "none.txt").error
    assert str(tmp_path) in run("eval", tmp_path, "--data", poems).error
    assert str(tmp_path) in run("eval", converted, "--data", poems, "--reference", tmp_path).error


def test_what_is_read_is_not_written_over(converted: Path, poems: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    names = ("config.json", "generation_config.json", "tokenizer.model", "int8/openvino_model.bin")
    for file in (poems, tmp_path / "link" / poems.name, *(converted / name for name in names)):
        before = file.read_bytes()
        told = run("eval", converted, "--data", poems, "--reference", converted, "--json", file).error
        assert told == f"--json: file is {file}, which the command needs itself, expected another file"
        assert file.read_bytes() == before


def test_figures_are_written_though_nobody_reads_the_table(
    converted: Path, poems: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatglm_ov.cli.tables.print_table", reader_went_away)
    done = run("eval", converted, "--data", poems, "--weight-format", "int8", "--json", tmp_path / "figures.json")
    assert done.code == 141
    (model,) = json.loads((tmp_path / "figures.json").read_text())["models"]
    assert model["label"] == "int8"


def test_a_model_that_is_broken(
    checkpoint: Path, poems: Path, tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """Figures that are none are null in the file, and the others are there."""
    for name, scale, seen in (("far", -1e4, "inf"), ("nan", np.float32(3e38), "nan")):
        broken = shutil.copytree(checkpoint, tmp_path / name)
        head = "transformer.output_layer.weight"
        index = json.loads((broken / "model.safetensors.index.json").read_text())
        shard = broken / index["weight_map"][head]
        weights = load_file(shard)
        save_file({**weights, head: weights[head].float() * float(scale)}, shard)
        folder = convert(broken, tmp_path / f"{name}-ov", ("f32",), progress=False)
        done = run("eval", folder, "--data", poems, "--json", tmp_path / "figures.json")
        assert done.code == 0, done.err
        assert seen in done.out
        (model,) = json.loads((tmp_path / "figures.json").read_text())["models"]
        assert model["perplexity"] is None and 0 <= model["right"] <= 1
        assert (f"{model['label']}: logits are not numbers" in caplog.messages) == (seen == "nan")


def test_small_windows(converted: Path, poems: Path, tmp_path: Path, run: Run) -> None:
    for window in (4, 5):
        done = run("eval", converted, "--data", poems, "--weight-format", "int8", "--window", window, "--limit", 1)
        assert done.code == 0 and f"windows of {window}, stride" in done.out
    assert "window is 2, expected more than" in run("eval", converted, "--data", poems, "--window", 2).err
