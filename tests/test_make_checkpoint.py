"""tools/make_checkpoint.py: its files, its memory, and what is left after a failure."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from chatglm_ov.checkpoint.reader import Checkpoint
from chatglm_ov.config import load_config
from chatglm_ov.models import architecture
from chatglm_ov.presets import PRESETS
from chatglm_ov.system.memory import growth

TOOL = Path(__file__).parent.parent / "tools" / "make_checkpoint.py"
FORMATS = ["safetensors", "bin"]
Main = Callable[..., int]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")

TINY = ["--layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--ffn-hidden-size", "96"]
TINY += ["--vocab-size", "256"]
TINY_LATER = [*TINY, "--kv-channels", "16", "--multi-query-group-num", "2"]


def tiny(preset: str) -> list[str]:
    return ["--preset", preset, *(TINY if preset == "chatglm-6b" else TINY_LATER)]


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def assert_one_error(said: str, *words: str) -> None:
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "error:" in line]
    for word in words:
        assert word in line


def assert_holds(folder: Path, *names: str) -> None:
    assert {path.name for path in folder.iterdir()} == set(names)


@pytest.fixture
def main(import_tool: Callable[[str], Any]) -> Main:
    """The tool's main(), in this process, with arguments of any type."""
    make_checkpoint = import_tool("make_checkpoint")
    return lambda *arguments: make_checkpoint.main([str(argument) for argument in arguments])


# Values and files


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("file_format", FORMATS)
def test_reader_accepts_it(tmp_path: Path, main: Main, preset: str, file_format: str) -> None:
    assert main(tmp_path / "out", *tiny(preset), "--format", file_format, "--shard-size", "100KB") == 0
    config = load_config(tmp_path / "out")
    model = architecture(config)
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        checkpoint.verify(model.weight_shapes(config), ignored=lambda name: model.is_ignored(config, name))
        for name in checkpoint.names:
            assert np.isfinite(checkpoint[name].read()).all()
        frequencies = [name for name in checkpoint.names if name.endswith("inv_freq")]
        assert len(frequencies) == {"chatglm": 2, "chatglm2": 1}.get(config.architecture, 0)
        for name in frequencies:
            np.testing.assert_allclose(checkpoint[name].read(), 10000.0 ** (-np.arange(0, 1, 0.25)), rtol=1e-2)
        stored = {checkpoint.dtype(name) for name in checkpoint.names}
    released = json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"]
    assert stored == ({"float16", "float32"} if preset == "chatglm-6b" else {released})


def test_chatglm_6b_stores_what_the_release_stores(tmp_path: Path, main: Main) -> None:
    assert main(tmp_path / "out", *tiny("chatglm-6b")) == 0
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        embedding, head = checkpoint["transformer.word_embeddings.weight"], checkpoint["lm_head.weight"]
        np.testing.assert_array_equal(embedding.read(), head.read())
        norms = [name for name in checkpoint.names if "layernorm" in name]
        assert len(norms) == 10
        assert {checkpoint.dtype(name) for name in norms} == {"float32"}


@pytest.mark.parametrize("preset", ["chatglm-6b", "codegeex2-6b"])
def test_formats_and_shards_hold_the_same_values(tmp_path: Path, main: Main, preset: str) -> None:
    """Read by the libraries, not by our reader: one file, many files, both formats, and another seed."""
    ways = {
        "one": [],
        "many": ["--shard-size", "30KB"],
        "bin": ["--format", "bin"],
        "bins": ["--format", "bin", "--shard-size", "30KB"],
        "seed": ["--seed", "1"],
    }
    read = {}
    for way, options in ways.items():
        folder = tmp_path / way
        assert main(folder, *tiny(preset), *options) == 0
        state = {}
        for file in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
            state |= load_file(file) if file.suffix == ".safetensors" else torch.load(file)
        read[way] = state
    names = set(read["one"])
    for way in ("many", "bin", "bins"):
        assert set(read[way]) == names
        assert all(torch.equal(read[way][name], read["one"][name]) for name in names)
    changed = [name for name in names if not torch.equal(read["seed"][name], read["one"][name])]
    assert len(changed) == sum("inv_freq" not in name for name in names)


@pytest.mark.parametrize("file_format", FORMATS)
def test_shards_and_index(tmp_path: Path, main: Main, file_format: str) -> None:
    assert main(tmp_path / "out", *tiny("chatglm3-6b"), "--format", file_format, "--shard-size", "30KB") == 0
    stem = "model" if file_format == "safetensors" else "pytorch_model"
    index = json.loads((tmp_path / "out" / f"{stem}.{file_format}.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"{stem}-{i:05d}-of-{len(files):05d}.{file_format}" for i in range(1, len(files) + 1)]
    assert_holds(tmp_path / "out", *files, "config.json", f"{stem}.{file_format}.index.json")
    sizes: dict[str, list[int]] = {name: [] for name in files}
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        for name, file in index["weight_map"].items():
            sizes[file].append(checkpoint.nbytes(name))
        assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    assert len(files) >= 4
    assert all(sum(parts) <= 30_000 or len(parts) == 1 for parts in sizes.values())


def test_config_and_options(tmp_path: Path, main: Main) -> None:
    options = ["--set", "eos_token_id=[5,6]", "--set", "_name_or_path=mine", "--dtype", "float32", "--seq-length", 64]
    assert main(tmp_path / "out", *tiny("glm-4-9b-chat"), *options) == 0
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    sizes = {"num_layers": 2, "num_hidden_layers": 2, "padded_vocab_size": 256, "vocab_size": 256, "seq_length": 64}
    wanted = {**sizes, "eos_token_id": [5, 6], "_name_or_path": "mine", "torch_dtype": "float32"}
    assert fields == {
        **PRESETS["glm-4-9b-chat"],
        **wanted,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 96,
        "kv_channels": 16,
        "multi_query_group_num": 2,
    }
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert {checkpoint.dtype(name) for name in checkpoint.names} == {"float32"}


def test_tokenizer_files_are_copied_without_code(tmp_path: Path, main: Main) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    for name in (
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenization_chatglm.py",
        "config.json",
    ):
        (source / name).write_bytes(name.encode())
    assert main(tmp_path / "out", *tiny("chatglm3-6b"), "--tokenizer", source) == 0
    copied = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
    assert_holds(tmp_path / "out", *copied, "config.json", "model.safetensors")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"tokenizer.model"
    assert load_config(tmp_path / "out").num_layers == 2


# Memory


@linux
@pytest.mark.parametrize("file_format", FORMATS)
def test_memory_does_not_follow_the_size_of_tensors(tmp_path: Path, main: Main, file_format: str) -> None:
    """The two largest tensors have 67 MB each, and four times that as they are drawn."""
    sizes = ["--layers", "1", "--hidden-size", "512", "--ffn-hidden-size", "512", "--multi-query-group-num", "2"]
    arguments = ["--preset", "chatglm3-6b", *sizes, "--format", file_format, "--overwrite"]
    assert main(tmp_path / "first", *tiny("chatglm3-6b"), "--format", file_format) == 0
    with growth() as grown:
        assert main(tmp_path / "out", *arguments) == 0
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) > 130e6
    assert 0 < grown.nbytes < 40e6


# Failures


def test_refuses_a_folder_in_use(tmp_path: Path, main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert main(out, *tiny("chatglm3-6b")) == 0
    before = (out / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert main(out, *tiny("chatglm3-6b"), "--seed", 1) == 2
    assert_one_error(capsys.readouterr().err, str(out), "not empty", "--overwrite")
    assert (out / "model.safetensors").read_bytes() == before
    (out / "leftover").touch()
    assert main(out, *tiny("chatglm3-6b"), "--seed", 1, "--overwrite") == 0
    assert (out / "model.safetensors").read_bytes() != before
    assert_holds(out, "config.json", "model.safetensors")
    assert_holds(tmp_path, "out")
    (tmp_path / "file").touch()
    assert main(tmp_path / "file", *tiny("chatglm3-6b"), "--overwrite") == 2
    assert_one_error(capsys.readouterr().err, str(tmp_path / "file"), "a file")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "chatglm3-6b", "--vocab-size", "2000000000"], ("free disk space", "expected 32779")),
        (["--preset", "chatglm4"], ("chatglm4", "chatglm3-6b")),
        (["--preset", "chatglm-6b", "--kv-channels", "64"], ("chatglm-6b", "kv_channels", "64")),
        (["--preset", "chatglm-6b", "--hidden-size", "100"], ("hidden_size", "100")),
        (["--preset", "chatglm3-6b", "--layers", "0"], ("num_layers", "0")),
        (["--preset", "chatglm3-6b", "--set", "torch_dtype=float8"], ("torch_dtype", "float8", "bfloat16")),
        (["--preset", "chatglm3-6b", "--set", "eos_token_id"], ("--set", "eos_token_id")),
        (["--preset", "chatglm3-6b", "--shard-size", "much"], ("--shard-size", "much")),
        (["--preset", "chatglm3-6b", "--seed", "-1"], ("--seed", "-1")),
        (["--preset", "chatglm3-6b", "--tokenizer", "nowhere"], ("nowhere", "tokenizer.model")),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_arguments(
    tmp_path: Path, main: Main, capsys: pytest.CaptureFixture[str], arguments: list[str], words: tuple[str, ...]
) -> None:
    try:
        code = main(tmp_path / "out", *arguments)
    except SystemExit as stop:  # how argparse ends
        code = stop.code
    assert code == 2
    assert_one_error(capsys.readouterr().err, *words)
    assert_holds(tmp_path)


@linux
@pytest.mark.parametrize("file_format", FORMATS)
def test_failing_write_leaves_nothing(tmp_path: Path, file_format: str) -> None:
    """The system refuses files of more than 40 KB, as a full disk would."""
    import resource

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    done = run(tmp_path / "out", *tiny("chatglm3-6b"), "--format", file_format, preexec_fn=limit)
    assert done.returncode == 2
    assert_one_error(done.stderr, str(tmp_path / "out"), "not writable (File too large)")
    assert_holds(tmp_path)


def start_and_wait_for_data(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(TOOL), str(folder / "out"), "--preset", "chatglm3-6b", "--layers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not any(file.stat().st_size for file in folder.glob(".out.partial-*/model.safetensors")):
        assert process.poll() is None
        time.sleep(0.01)
    return process


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    process = start_and_wait_for_data(tmp_path)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped" in said
    assert "Traceback" not in said
    assert_holds(tmp_path)


def test_kill_leaves_nothing_that_looks_finished(tmp_path: Path, main: Main) -> None:
    process = start_and_wait_for_data(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    assert main(tmp_path / "out", *tiny("chatglm3-6b")) == 0
    assert_holds(tmp_path, "out")
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert checkpoint.shape("transformer.output_layer.weight") == (256, 64)
