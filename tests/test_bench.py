"""`chatglm-ov bench` from the command line to the JSON file and the picture. Times are never judged."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import json
import shutil
import signal
import sys
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

import pytest
from command_line import (  # noqa: F401
    DATA,
    PROGRAM,
    Run,
    checkpoint,
    converted,
    finish,
    names,
    reader_went_away,
    run,
    spawn,
    wait_for,
)
from golden_cases import without_library
from PIL import Image

from chatglm_ov.bench import limits, session, weights
from chatglm_ov.cli.demo import CHECKPOINT as DEMO
from chatglm_ov.native import native, unavailable
from chatglm_ov.presets import PRESETS, config_json

V1 = DATA / "golden" / "v1" / "v1_tiny" / "checkpoint"
FEW = ("--new-tokens", 2, "--rounds", 1, "--prompt-tokens", 8)
lowerings = pytest.mark.parametrize("ops", ["stock", pytest.param("fused", marks=without_library)])

# The GLM-4 golden model: hidden 64, 4 heads of 16 in 2 groups, feed-forward 172, vocabulary 1536, 2 layers.
MATRICES = [(128, 64), (64, 64), (2 * 172, 64), (64, 172)] * 2 + [(1536, 64)]
VECTORS = 4 * (2 * (64 + 64 + 128) + 64)


@pytest.fixture(autouse=True)
def small_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of a second a sample, and random numbers for the largest model, would be most of the time here."""
    monkeypatch.setattr(limits, "BUFFER_BYTES", 1 << 22)
    monkeypatch.setattr(limits, "PEAK_SECONDS", 0.005)
    monkeypatch.setattr(weights, "POOL", 1 << 20)


def up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def expected_weight_bytes(ops: str, weight_format: str) -> int:
    """All but the embedding. Fused operations pad features to 16, in the two halves of the gated layer each, and
    columns to 32 (bf16) or 64 (int8)."""
    padding = {"bf16": 32, "int8": 64}[weight_format]
    total = VECTORS
    for rows, columns in MATRICES:
        if ops == "fused":
            rows = 2 * up(172, 16) if rows == 2 * 172 else up(rows, 16)
            columns = up(columns, padding)
        total += 2 * rows * columns if weight_format == "bf16" else rows * columns + 4 * rows
    return total


def measured(run: Run, tmp_path: Path, *arguments: object) -> dict[str, Any]:
    done = run("bench", *arguments, "--json", tmp_path / "figures.json", "--work-folder", tmp_path)
    assert done.code == 0, done.err
    assert names(tmp_path) == ["figures.json"]
    return json.loads((tmp_path / "figures.json").read_text())


def check_samples(values: dict[str, Any], count: int) -> None:
    assert len(values["samples"]) == count
    assert values["median"] == median(values["samples"])
    assert (values["low"], values["high"]) == (min(values["samples"]), max(values["samples"]))


@lowerings
def test_figures_follow_from_each_other(ops: str, checkpoint: Path, tmp_path: Path, run: Run) -> None:
    report = measured(
        run, tmp_path, checkpoint, "--ops", ops, "--weight-format", "bf16", "int8", "--batch", "1,3", "--rounds", 2,
        "--new-tokens", 4, "--prompt-tokens", 9, "--context", 40,
    )  # fmt: skip
    assert report["model"]["num_layers"] == 2 and report["rounds"] == 2 and report["machine"]["cpu"]
    assert [found["weight_format"] for found in report["weight_formats"]] == ["bf16", "int8"]
    for found in report["weight_formats"]:
        (model,) = found["models"]
        assert model["ops"] == ops and model["weight_bytes"] == expected_weight_bytes(ops, found["weight_format"])
        assert found["against_stock"] == [] and found["left_out"] == []
        for name in ("load_seconds", "anonymous_bytes_compiled", "anonymous_bytes_first"):
            check_samples(model[name], 2)
        cases = [(case["kind"], case["tokens"], case["batch"]) for case in model["cases"]]
        assert cases == [("prompt", 9, 1), ("prompt", 9, 3), ("context", 40, 1), ("context", 40, 3)]
        for case in model["cases"]:
            check_prompt(case, found["limits"], ops)
            check_decode(case, model["weight_bytes"], found["limits"])


def check_prompt(case: dict[str, Any], limits: dict[str, Any] | None, ops: str) -> None:
    prompt, tokens, rows = case["prompt"], case["prompt"]["tokens"], case["batch"]
    # What is timed behind it: 2 steps that do not count and 4 that do.
    assert tokens == {"prompt": 9, "context": 40 - 6}[case["kind"]]
    # Of the last layer, the fused lowering does three for the last token only.
    every = MATRICES[:5] if ops == "fused" else MATRICES[:8]
    once = MATRICES[len(every) :]
    linear = 2 * tokens * sum(n * k for n, k in every) + 2 * sum(n * k for n, k in once)
    assert prompt["operations"] == rows * (linear + 4 * (tokens * tokens // 2) * 4 * 16 * 2)
    check_samples(prompt["seconds"], 2)
    rate = prompt["operations"] / prompt["seconds"]["median"]
    assert prompt["operations_per_second"] == pytest.approx(rate)
    assert prompt["tokens_per_second"] == pytest.approx(tokens * rows / prompt["seconds"]["median"])
    if limits is not None:
        factor, limit = {"bf16": (1, "bf16"), "int8 / 2": (0.5, "int8"), "int16": (1, "int8")}[prompt["peak"]]
        assert prompt["share"] == pytest.approx(rate / (factor * limits[limit]["median"]))


def check_decode(case: dict[str, Any], weight_bytes: int, limits: dict[str, Any] | None) -> None:
    decode, rows = case["decode"], case["batch"]
    # The 4 steps see 12 to 15 tokens behind a prompt of 9, and 37 to 40 in a context of 40.
    assert decode["cached_tokens"] == {"prompt": 13.5, "context": 38.5}[case["kind"]]
    assert decode["cache_bytes"] == 2 * 2 * 2 * 16 * 2 * decode["cached_tokens"] * rows
    assert decode["bytes"] == weight_bytes + decode["cache_bytes"]
    check_samples(decode["seconds"], 2)
    assert [len(steps) for steps in decode["seconds"]["steps"]] == [4, 4]
    assert decode["seconds"]["samples"] == [median(steps) for steps in decode["seconds"]["steps"]]
    seconds = decode["seconds"]["median"]
    assert decode["tokens_per_second"] == pytest.approx(rows / seconds)
    assert decode["bytes_per_second"] == pytest.approx(decode["bytes"] / seconds)
    if limits is not None:
        beside = decode["limit_samples"]
        assert [len(reads) for reads in beside] == [4, 4] and min(map(min, beside)) > 1e8
        reads, steps = (list(chain.from_iterable(rounds)) for rounds in (beside, decode["seconds"]["steps"]))
        shares = [decode["bytes"] / (step * read) for step, read in zip(steps, reads, strict=True)]
        assert decode["share"] == pytest.approx(median(shares))
        assert decode["limit_bytes_per_second"] == median(reads)


@without_library
def test_limits_are_taken_before_between_and_after_the_rounds(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    report = measured(run, tmp_path, checkpoint, "--weight-format", "int8", *FEW, "--rounds", 2)
    limits = report["weight_formats"][0]["limits"]
    for name in ("read", "int8", "bf16"):
        check_samples(limits[name], 3)
        assert limits[name]["low"] > 1e8


@lowerings
def test_beside_stock(ops: str, tmp_path: Path, run: Run) -> None:
    report = measured(run, tmp_path, DEMO, "--ops", ops, "--compare", "stock", "--weight-format", "int8", *FEW)
    (found,) = report["weight_formats"]
    ours, bf16, f32 = found["models"]
    assert [model["hint"] for model in found["models"]] == [None, "bf16", "f32"]
    assert (ours["ops"], bf16["ops"], f32["ops"]) == (ops, "stock", "stock")
    (row,) = found["against_stock"]
    for phase in ("prompt", "decode"):
        seconds = [model["cases"][0][phase]["seconds"]["median"] for model in found["models"]]
        assert row[phase] == min(seconds[1:]) / seconds[0]


@without_library
def test_variants_of_the_fused_operations(tmp_path: Path, run: Run) -> None:
    arguments = ("--activation-bits", 16, 8, "--kv-cache-format", "int8", "--weight-format", "bf16", "int8")
    report = measured(run, tmp_path, DEMO, *arguments, *FEW)
    models = [model for found in report["weight_formats"] for model in found["models"]]
    assert [model["label"] for model in models] == [
        "bf16, int8 cache", "int8, int8 cache", "int8, 8-bit activations, int8 cache",
    ]  # fmt: skip
    integers = ["int16", "int16"] if native().isa() == "avx2" else ["int8 / 2", "int8"]
    assert [model["cases"][0]["prompt"]["peak"] for model in models] == ["bf16", *integers]
    # 5 layers, 2 heads of 64 with a float32 scale, keys and values, 11.5 tokens.
    assert {model["cases"][0]["decode"]["cache_bytes"] for model in models} == {5 * 2 * (64 + 4) * 2 * 11.5}


def test_converted_folder_as_it_is(converted: Path, tmp_path: Path, run: Run) -> None:
    before = names(converted)
    done = run("bench", converted, *FEW, "--weight-format", "int8")
    assert done.code == 0 and names(converted) == before
    for title in ("Loading", "Prompt", "Next tokens"):
        assert f"\n{title}\n" in done.out
    assert "Times as fast as stock" not in done.out
    assert ("Limits of this machine" in done.out) == (unavailable() is None)


def test_first_generation_has_marks_and_a_prefix(tmp_path: Path, run: Run) -> None:
    report = measured(run, tmp_path, V1, "--weight-format", "bf16", "--context", 600, *FEW[:4])
    (case,) = report["weight_formats"][0]["models"][0]["cases"]
    assert (case["kind"], case["prompt"]["tokens"], case["prompt"]["calls"]) == ("context", 596, 2)


def tiny_preset() -> dict[str, Any]:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "kv_channels": 16, "ffn_hidden_size": 96}
    return config_json("chatglm3-6b", padded_vocab_size=512, **sizes)


def test_random_weights_of_a_preset(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", tiny_preset())
    report = measured(run, tmp_path, "--preset", "tiny", "--layers", 3, *FEW)
    assert report["model"]["name"] == "tiny, 3 layers" and report["model"]["random_weights"]
    assert [found["weight_format"] for found in report["weight_formats"]] == ["bf16", "int8", "int4"]
    assert report["command"].startswith("chatglm-ov bench --preset tiny --layers 3 --kv-cache-format bf16 ")
    assert "--prompt-tokens 8" in report["command"] and "--rounds 1" in report["command"]


def test_pictures(tmp_path: Path, run: Run) -> None:
    arguments = (DEMO, "--weight-format", "int8", "--compare", "stock", *FEW[:4], "--prompt-tokens", "8,16")
    assert run("bench", *arguments, "--picture", tmp_path / "bars.png").code == 0
    assert run("bench", *arguments, "--picture", tmp_path / "bars.svg").code == 0
    with Image.open(tmp_path / "bars.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000 and len(picture.getcolors(1 << 24)) > 10
    assert ElementTree.parse(tmp_path / "bars.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_stock_models_that_do_not_fit_into_memory_are_left_out(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "SPARE_BYTES", 1 << 60)
    report = measured(run, tmp_path, DEMO, "--compare", "stock", "--weight-format", "int8", *FEW)
    (found,) = report["weight_formats"]
    assert [model["hint"] for model in found["models"]] == [None] and found["against_stock"] == []
    assert [reason.partition(" left out, ")[0] for reason in found["left_out"]] == [
        "int8, stock, bf16 hint", "int8, stock, f32 hint",
    ]  # fmt: skip


@without_library
def test_models_are_loaded_together_where_they_fit_with_their_caches(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []
    needed: list[int] = []

    def counted(turns: Any, folders: dict[str, Path], cases: Any, **options: Any) -> Any:
        groups.append(len(turns))
        files = [folders[v.ops] / v.weight_format / "openvino_model.bin" for turn in turns for v in turn]
        # Keys and values of 5 layers, 2 heads of 64 in bfloat16, 2 rows of 8 tokens; room for twice as many.
        caches = 2 * 5 * 2 * 64 * 2 * 2 * 8
        needed.append(sum(file.stat().st_size + 2 * caches for file in files))
        return run_rounds(turns, folders, cases, **options)

    run_rounds = session.run_rounds
    monkeypatch.setattr(session, "SPARE_BYTES", 0)
    monkeypatch.setattr(session, "run_rounds", counted)
    for lacking in (None, 0, 1):
        if lacking is not None:
            monkeypatch.setattr(session, "available", lambda free=needed[0] - lacking: free)
        measured(run, tmp_path, DEMO, "--compare", "stock", "--weight-format", "int8", *FEW, "--batch", 2)
    assert groups == [1, 1, 3]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "bench: folder is missing, expected a folder, or else --preset"),
        (["demo", "--preset", "chatglm3-6b"], "bench: folder is given with --preset, expected a folder"),
        (["demo", "--layers", "2"], "--layers: value is 2, expected --preset with it"),
        (["--preset", "chatglm5"], "invalid choice: 'chatglm5'"),
        (["nowhere"], "nowhere: folder is missing"),
        (["demo", "--prompt-tokens", "8,0"], "--prompt-tokens: invalid list of numbers from 1 value: '8,0'"),
        (["demo", "--batch", "many"], "--batch: invalid list of numbers from 1 value: 'many'"),
        (["demo", "--weight-format", "int3"], "invalid choice: 'int3'"),
        (["demo", "--prompt-tokens", "2045", "--new-tokens", "2"], "value is 2045, expected at most 2044"),
        (["demo", "--context", "2049"], "--context: value is 2049, expected at most 2048 (seq_length 2048)"),
        (["demo", "--context", "8", "--new-tokens", "7"], "--context: value is 8, expected at least 11"),
        (["v1", "--prompt-tokens", "1"], "--prompt-tokens: value is 1, expected at least 2"),
        (["demo", "--picture", "bars.jpg"], "--picture: file is bars.jpg, expected a name ending in .png or .svg"),
        (["demo", "--picture", "nowhere/bars.png"], "--picture: file is nowhere/bars.png, expected a file in a folder"),
        (["demo", "--json", "."], "--json: file is ., expected a file in a folder that is there"),
        (["demo", "--work-folder", "nowhere"], "nowhere: work folder is missing, expected a folder"),
        (["demo", "--ops", "stock", "--activation-bits", "8"], "--activation-bits: ops is stock, expected fused"),
        (["demo", "--ops", "stock", "--kv-cache-format", "int8"], "--kv-cache-format: ops is stock, expected fused"),
        (["--preset", "glm-4-9b-chat", "--layers", "9999"], "free disk space is"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(
    arguments: list[str], told: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DEMO, "demo")
    shutil.copytree(V1, "v1")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert told in run("bench", *arguments).error
    assert names(tmp_path) == ["demo", "v1"]


def test_what_a_converted_folder_cannot_do(converted: Path, run: Run) -> None:
    assert "converted folder holds one lowering" in run("bench", converted, "--compare", "stock").error
    assert "weight format is int4, expected one of bf16, f32, int8" in run(
        "bench", converted, "--weight-format", "int4"
    ).error  # fmt: skip


def test_matplotlib_is_wanted_before_the_work(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = run("bench", DEMO, "--picture", tmp_path / "bars.png").error
    assert told == "--picture: matplotlib is missing, expected pip install 'chatglm-ov[bench]'"


def test_figures_and_picture_are_written_though_nobody_reads_the_tables(
    converted: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatglm_ov.cli.tables.print_table", reader_went_away)
    files = ("figures.json", "bars.png")
    outputs = ("--json", tmp_path / files[0], "--picture", tmp_path / files[1])
    assert run("bench", converted, "--weight-format", "int8", *FEW, *outputs).code == 141
    assert names(tmp_path) == sorted(files)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_ended_measurement_leaves_nothing(number: int, code: int, tmp_path: Path) -> None:
    process = spawn(*PROGRAM, "bench", DEMO, "--rounds", 1000, "--work-folder", tmp_path)
    wait_for(lambda: list(tmp_path.rglob("openvino_model.xml")))
    process.send_signal(number)
    assert finish(process).code == code
    assert names(tmp_path) == []
