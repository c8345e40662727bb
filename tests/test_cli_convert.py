"""`chatglm-ov convert`: what it writes and says, and what it leaves behind when it cannot."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import (  # noqa: F401
    PROGRAM,
    Run,
    checkpoint,
    converted,
    copy_of,
    finish,
    make_checkpoint,
    names,
    run,
    spawn,
    wait_for,
)
from conversions import plan_conversion

from chatglm_ov.conversion import finished_folder
from chatglm_ov.presets import config_json
from chatglm_ov.system.sizes import size

SIDE_FILES = ["config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json"]


def test_says_what_it_needs_then_shows_progress_then_sizes(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    done = run("convert", checkpoint, tmp_path / "out")
    assert done.code == 0
    assert names(tmp_path / "out") == sorted([*SIDE_FILES, "bf16", "int8"])
    plan, sizes = done.out.index("of memory"), done.out.index("weight format")
    assert plan < done.out.index("written to") < sizes
    plan_line = next(line for line in done.out.splitlines() if "of memory" in line)
    assert re.search(r"bf16, int8\. Reads [\d.]+ MB, writes [\d.]+ kB, needs about [\d.]+ MB of memory", plan_line)
    assert "transformer.output_layer.weight" in done.err and "100%" in done.err
    for name in ("bf16", "int8"):
        nbytes = sum(file.stat().st_size for file in (tmp_path / "out" / name).iterdir())
        assert re.search(rf"^{name} +{nbytes / 1000:.2f} kB *$", done.out, re.MULTILINE)


@pytest.mark.parametrize(
    "options", [["--weight-format", "int4", "f32"], ["--weight-format", "int4", "--weight-format", "f32"]]
)
def test_weight_formats_after_one_option_or_several(
    options: list[str], checkpoint: Path, tmp_path: Path, run: Run
) -> None:
    assert run("convert", checkpoint, tmp_path / "out", *options).code == 0
    assert names(tmp_path / "out") == sorted([*SIDE_FILES, "f32", "int4"])


def test_refuses_a_folder_in_use_unless_told_to_overwrite(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "diary.txt").write_text("mine")
    assert run("convert", checkpoint, target).error == (
        f"{target}: output is not empty, expected a new or empty folder, or --overwrite"
    )
    assert run("convert", checkpoint, target, "--overwrite", "--weight-format", "f32").code == 0
    assert names(target) == sorted([*SIDE_FILES, "f32", "diary.txt"])
    assert run("convert", checkpoint, target, "--overwrite", "--weight-format", "bf16").code == 0
    assert names(target) == sorted([*SIDE_FILES, "bf16"])


def test_what_else_is_in_a_folder_stays(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    """All but what has the names of the new files; the folder of another model is left alone."""
    (tmp_path / "bf16").mkdir()
    for name in ("diary.txt", "bf16/old.bin", "tokenizer.model"):
        (tmp_path / name).write_text("mine")
    assert run("convert", checkpoint, tmp_path, "--overwrite", "--weight-format", "bf16").code == 0
    assert names(tmp_path) == sorted([*SIDE_FILES, "bf16", "diary.txt"])
    assert "old.bin" not in names(tmp_path / "bf16") and (tmp_path / "tokenizer.model").stat().st_size > 100
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    told = run("convert", checkpoint, other, "--overwrite").error
    assert told == f"{other}: output is a folder of another model, expected a converted folder, or another place"
    assert names(other) == ["config.json"]


@pytest.mark.parametrize("option", ["--calibration", "--layer-formats", "--lora", "--p-tuning"])
def test_refuses_to_replace_what_it_reads(checkpoint: Path, tmp_path: Path, run: Run, option: str) -> None:
    target = tmp_path / "out"
    assert run("convert", checkpoint, target, "--weight-format", "f32").code == 0
    mine = target / "mine.txt"
    mine.write_text("{}")
    told = run("convert", checkpoint, target, "--overwrite", "--weight-format", "int4", option, mine).error
    assert f"{target}: output is a folder that the " in told
    assert mine.exists()


def test_refuses_to_replace_the_current_folder(
    checkpoint: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell would be left in a folder that is gone. An empty one is filled."""
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    done = run("convert", checkpoint, ".", "--weight-format", "f32")
    assert done.code == 0 and "written to .\n" in done.out and "f32 " in done.out
    assert tmp_path.stat().st_ino == before and names(tmp_path) == sorted([*SIDE_FILES, "f32"])
    told = run("convert", checkpoint, "../" + tmp_path.name, "--overwrite").error
    assert "output is the current folder, which cannot be replaced" in told
    assert names(tmp_path) == sorted([*SIDE_FILES, "f32"])


def test_a_converted_folder_is_no_checkpoint(converted: Path, tmp_path: Path, run: Run) -> None:
    told = run("convert", converted, tmp_path / "out").error
    assert told == f"{converted}: checkpoint is a converted folder, expected the folder that it was made of"


@pytest.mark.parametrize("contents", ["", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"])
def test_a_tokenizer_that_is_not_there_yet(checkpoint: Path, tmp_path: Path, run: Run, contents: str) -> None:
    source = copy_of(checkpoint, tmp_path / "source")
    (source / "tokenizer.model").write_text(contents)
    told = run("convert", source, tmp_path / "out").error
    assert told.startswith(f"{source / 'tokenizer.model'}: ") and "the real file" in told
    assert names(tmp_path) == ["source"]


def test_a_calibration_makes_int4(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    text = tmp_path / "text.txt"
    text.write_text("床前明月光，疑是地上霜。" * 400)
    given = ("convert", checkpoint, tmp_path / "out", "--awq", "--calibration", text, "--calibration-tokens", 512)
    assert run(*given).code == 0
    assert names(tmp_path / "out") == sorted([*SIDE_FILES, "int4"])
    assert run(*given, "--weight-format", "int8").error == "--awq: weight formats is int8, expected int4 among them"


@pytest.mark.parametrize(
    ("options", "method", "left"),
    [
        (["--awq"], "awq", "int4"),
        (["--awq", "--gptq", "--lm-head-format", "bf16"], "awq+gptq", "int4 or int8"),
    ],
)
def test_a_calibration_that_chooses_nothing(
    checkpoint: Path, tmp_path: Path, run: Run, options: list[str], method: str, left: str
) -> None:
    layers = tmp_path / "layers.json"
    layers.write_text(json.dumps({"*": "int8" if left == "int4" else "bf16"}))
    told = run("convert", checkpoint, tmp_path / "out", *options, "--layer-formats", layers).error
    wanted = f"layer_formats and lm_head_format that leave a weight in {left}"
    assert told == f"convert: calibration is {method}, expected {wanted}"
    assert names(tmp_path) == ["layers.json"]


def test_a_checkpoint_without_tokenizer_is_told_once(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    source = copy_of(checkpoint, tmp_path / "source")
    told = f"no tokenizer in {source} (ice_text.model, tokenizer.model, tokenizer.json): generate, chat and eval need"
    assert "no tokenizer" not in run("convert", source, tmp_path / "out").out
    (source / "tokenizer.model").unlink()
    done = run("convert", source, tmp_path / "bare")
    assert done.code == 0 and done.out.count(told) == done.out.count("no tokenizer") == 1


def test_groups_are_those_of_int4(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    given = ("convert", checkpoint, tmp_path / "out", "--group-size", 32)
    assert run(*given).error == "--group-size: weight formats is bf16, int8, expected int4 among them"
    assert names(tmp_path) == []
    assert run(*given, "--weight-format", "int8", "--lm-head-format", "int4").code == 0


def test_a_link_stands_for_the_device_that_takes_unwanted_weights(checkpoint: Path, tmp_path: Path) -> None:
    """OpenVINO removes the file of weights where it cannot write the graph: as root that was /dev/null itself."""
    from chatglm_ov.weights import ir

    with ir._nowhere(tmp_path / "nowhere") as path:
        assert path.is_symlink() and path.resolve() == Path(os.devnull)
        path.write_bytes(b"weights")
        path.unlink()
    assert names(tmp_path) == [] and Path(os.devnull).is_char_device()


def test_rope_ratio_meaning_is_kept(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    assert run("convert", checkpoint, tmp_path / "out", "--rope-ratio-meaning", "position").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_ratio_meaning"] == "position"


# Checkpoints that cannot be converted: a change to a copy, and what the error line must tell.


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def lose_a_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def truncate_a_shard(folder: Path) -> None:
    os.truncate(folder / "model-00003-of-00003.safetensors", 100_000)


def empty_a_shard(folder: Path) -> None:
    (folder / "model-00001-of-00003.safetensors").write_bytes(b"")


def leave_only_code(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "modeling_chatglm.py").write_text("raise SystemExit('run')")


def pickle_code(folder: Path) -> None:
    leave_only_code(folder)
    torch.save({"transformer.output_layer.weight": os.getcwd}, folder / "pytorch_model.bin")


def name_another_architecture(folder: Path) -> None:
    change_config(folder, model_type="llama", auto_map={"AutoModel": "modeling_llama.LlamaModel"})


BROKEN: list[tuple[Callable[[Path], None], str]] = [
    (lose_a_shard, r"model-00002-of-00003.safetensors: .* missing"),
    (truncate_a_shard, r"model-00003-of-00003.safetensors: .*, expected a whole safetensors file"),
    (empty_a_shard, r"model-00001-of-00003.safetensors: size is 0 bytes"),
    (leave_only_code, r"weights is missing \(the folder has .*modeling_chatglm.py"),
    (pickle_code, r"pytorch_model.bin: contents is a pickle that calls .* \(refused\)"),
    (name_another_architecture, r"config.json: model_type is 'llama', expected 'chatglm'"),
    (lambda folder: (folder / "config.json").unlink(), r"config.json is missing"),
    (lambda folder: (folder / "config.json").write_text("{"), r"config.json: contents is not JSON"),
    (
        lambda folder: change_config(folder, ffn_hidden_size=200),
        r"shape of transformer.encoder.layers.0.mlp.dense_4h_to_h.weight is \[64, 172\], expected \[64, 200\]",
    ),
    (lambda folder: change_config(folder, num_layers=3), r"transformer.encoder.layers.2.* is missing"),
    (lambda folder: change_config(folder, num_layers="two"), r"config.json: num_layers is 'two', expected"),
    (shutil.rmtree, r"missing, expected a folder with config.json"),
]


@pytest.mark.parametrize(("damage", "told"), BROKEN, ids=[told[:30] for _, told in BROKEN])
def test_a_broken_checkpoint_is_told_in_one_line(
    damage: Callable[[Path], None], told: str, checkpoint: Path, tmp_path: Path, run: Run
) -> None:
    source = copy_of(checkpoint, tmp_path / "source" / "glm4")
    damage(source)
    (tmp_path / "target").mkdir()
    error = run("convert", source, tmp_path / "target" / "out").error
    assert re.search(told, error), error
    assert str(source) in error
    assert names(tmp_path / "target") == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--weight-format", "int9"], "invalid choice: 'int9'"),
        (["--ops", "slow"], "invalid choice: 'slow'"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(
    arguments: list[str], told: str, checkpoint: Path, tmp_path: Path, run: Run
) -> None:
    assert told in run("convert", checkpoint, tmp_path / "out", *arguments).error
    assert names(tmp_path) == []


def test_output_that_is_a_file(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "out").write_text("mine")
    assert "output is a file" in run("convert", checkpoint, tmp_path / "out").error
    below = run("convert", checkpoint, tmp_path / "out" / "below").error
    assert str(tmp_path / "out") in below
    assert (tmp_path / "out").read_text() == "mine"
    assert names(tmp_path) == ["out"]


def test_too_little_disk_space_is_told_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = size(plan_conversion(checkpoint).disk_bytes + (8 << 20))
    usage = finished_folder.psutil.disk_usage(tmp_path)._replace(free=500_000)
    monkeypatch.setattr(finished_folder.psutil, "disk_usage", lambda path: usage)
    told = run("convert", checkpoint, tmp_path / "out").error
    assert f"free disk space is 500.00 kB, expected {needed} for bf16, int8" in told
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_on_the_way(checkpoint: Path, tmp_path: Path) -> None:
    """A limit on the size of a file fails a write just as a full disk does."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    done = finish(spawn(*PROGRAM, "convert", checkpoint, tmp_path / "out", preexec_fn=limit))
    assert done.code == 2
    assert "Traceback" not in done.err
    assert done.err.splitlines()[-1] == (
        f"chatglm-ov: error: {tmp_path / 'out'}: output is not writable (File too large), "
        "expected a folder on a disk with room"
    )
    assert names(tmp_path) == []


# Ended from outside


def ended_conversion(number: int, source: Path, target: Path) -> int:
    """Exit code of a conversion that gets the signal `number` as soon as it has begun to write."""
    formats = ["f32", "bf16", "int8", "int4"]
    process = spawn(*PROGRAM, "convert", source, target, "--weight-format", *formats)
    wait_for(lambda: list(target.parent.glob(".out.partial-*/f32/*.bin")) or process.poll() is not None)
    process.send_signal(number)
    done = finish(process)
    assert "Traceback" not in done.err
    return done.code


@pytest.fixture(scope="module")
def slow_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose conversion takes some seconds: many small layers."""
    folder = tmp_path_factory.mktemp("slow") / "checkpoint"
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "kv_channels": 64, "ffn_hidden_size": 512}
    make_checkpoint(folder, config_json("chatglm3-6b", num_layers=40, padded_vocab_size=4096, **sizes))
    return folder


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_an_ended_conversion_leaves_nothing(number: int, code: int, slow_checkpoint: Path, tmp_path: Path) -> None:
    assert ended_conversion(number, slow_checkpoint, tmp_path / "out") == code
    assert names(tmp_path) == []


def test_a_killed_conversion_leaves_nothing_that_looks_finished(
    slow_checkpoint: Path, tmp_path: Path, checkpoint: Path, run: Run
) -> None:
    assert ended_conversion(signal.SIGKILL, slow_checkpoint, tmp_path / "out") == -signal.SIGKILL
    [leftover] = names(tmp_path)
    assert leftover.startswith(".out.partial-")
    assert leftover in run("generate", tmp_path / leftover, "--prompt", "你好").error
    assert run("convert", checkpoint, tmp_path / "out").code == 0
    assert names(tmp_path) == ["out"]
