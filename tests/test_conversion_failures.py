"""What a conversion refuses, and what is left where it fails."""

from __future__ import annotations

import base64
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conversions import dead_process, interrupted, listing, names, plan_conversion, to_int8
from golden_cases import V2, each_ops, stored_weights, write_checkpoint

from chatglm_ov import ChatGLMError, convert
from chatglm_ov.config import parse_config
from chatglm_ov.conversion import finished_folder, graph
from chatglm_ov.models import architecture
from chatglm_ov.presets import config_json
from chatglm_ov.runtime.loading import load_model

QKV = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
NORM = "transformer.encoder.layers.1.input_layernorm.weight"


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"weight_formats": ("int8", "int3")},
            "convert: weight_formats is 'int3', expected one of f32, bf16, int8, int4",
        ),
        ({"weight_formats": ()}, r"weight_formats is \(\), expected a list of f32, bf16, int8, int4"),
        ({"weight_formats": "int8"}, "weight_formats is 'int8', expected a list of"),
        ({"ops": "magic"}, "ops is 'magic', expected one of fused, stock"),
        ({"rope_ratio_meaning": "both"}, "rope_ratio_meaning is 'both', expected 'position' or 'base'"),
        ({"output": "checkpoint"}, "output is the checkpoint itself"),
        ({"output": "."}, "output is a folder that the checkpoint is in"),
        ({"output": "file"}, "output is a file, expected a folder"),
        ({"output": "file/below"}, "output is not writable"),
        ({"checkpoint": "nowhere"}, "nowhere: folder is missing"),
        ({"checkpoint": "file"}, "file: folder is a file, expected a folder with config.json"),
        ({"checkpoint": "empty"}, r"config\.json is missing"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, message, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(V2.checkpoint, tmp_path / "checkpoint")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    before = listing(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ChatGLMError, match=message) as error:
        convert(**{"checkpoint": "checkpoint", "output": "out", "overwrite": True, "progress": False, **arguments})
    assert "\n" not in str(error.value)
    assert listing(tmp_path) == before


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="wants a mount point")
def test_mount_point_is_refused_before_the_work():
    with pytest.raises(ChatGLMError, match="output is a mount point"):
        to_int8(V2.checkpoint, Path("/proc"), overwrite=True)


Damage = Callable[[Path, dict[str, np.ndarray]], object]


def spoil_value(value: float, name: str = QKV) -> Damage:
    def spoil(folder: Path, weights: dict[str, np.ndarray]) -> None:
        weights[name].flat[-1] = value

    return spoil


def truncate_weights(folder: Path, weights: dict[str, np.ndarray]) -> None:
    weights.clear()
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)


def add_broken_tokenizer(folder: Path, weights: dict[str, np.ndarray]) -> None:
    (folder / "tokenizer.model").write_bytes(b"x")
    (folder / "tokenizer_config.json").write_text("{")


def add_gbk_template(folder: Path, weights: dict[str, np.ndarray]) -> None:
    (folder / "tokenizer.model").write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    (folder / "chat_template.jinja").write_bytes("床前".encode("gbk"))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing tensor": (lambda f, w: w.pop(QKV), f"{QKV} is missing"),
    "unknown tensor": (lambda f, w: w.update(extra=np.zeros(2, np.float32)), "extra is a tensor of shape"),
    "wrong shape": (
        lambda f, w: w.update({QKV: w[QKV][1:]}),
        rf"shape of {QKV} is \[255, 128\], expected \[256, 128\]",
    ),
    "integers": (
        lambda f, w: w.update({QKV: w[QKV].astype(np.int8)}),
        f"dtype of {QKV} is int8, expected one of float16",
    ),
    "nan": (spoil_value(np.nan), f"a value of {QKV} is nan, expected a finite number"),
    "infinity": (spoil_value(-np.inf), f"a value of {QKV} is -inf, expected a finite number"),
    "nan in a norm": (spoil_value(np.nan, NORM), f"a value of {NORM} is nan, expected a finite number"),
    "truncated file": (truncate_weights, r"model\.safetensors: contents is damaged"),
    "no weights": (lambda f, w: (w.clear(), (f / "model.safetensors").unlink()), "weights is missing"),
    "another config": (lambda f, w: (f / "config.json").write_text('{"model_type": "qwen2"}'), "model_type is 'qwen2'"),
    "broken generation config": (lambda f, w: (f / "generation_config.json").write_text("{"), "contents is not JSON"),
    "generation config that was not fetched": (
        lambda f, w: (f / "generation_config.json").write_text("version https://git-lfs.github.com/spec/v1"),
        r"generation_config\.json: contents is a Git LFS pointer",
    ),
    "generation config that is a folder": (
        lambda f, w: ((f / "generation_config.json").unlink(missing_ok=True), (f / "generation_config.json").mkdir()),
        r"generation_config\.json: file is not readable \(Is a directory\)",
    ),
    "cut vocabulary": (lambda f, w: (f / "tokenizer.model").write_bytes(b"xyz"), "not a whole sentencepiece model"),
    "cut ranks": (lambda f, w: (f / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n"), "tokens is 2 different ones"),
    "cut fast tokenizer": (
        lambda f, w: (f / "tokenizer.json").write_text("{"),
        r"tokenizer\.json: content is one that",
    ),
    "template in another encoding": (add_gbk_template, r"chat_template\.jinja: contents is not UTF-8"),
    "broken tokenizer": (add_broken_tokenizer, r"tokenizer_config\.json: contents is not JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_named_and_nothing_is_left(damage, tmp_path: Path):
    weights = stored_weights(V2.checkpoint)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", V2.checkpoint, weights)
    spoil, message = DAMAGES[damage]
    spoil(checkpoint, weights)
    if weights:
        write_checkpoint(tmp_path / "new", checkpoint, weights)
        shutil.move(tmp_path / "new" / "model.safetensors", checkpoint / "model.safetensors")
        shutil.rmtree(tmp_path / "new")
    with pytest.raises(ChatGLMError, match=message) as error:
        to_int8(checkpoint, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["checkpoint"]


@each_ops
def test_what_int4_cannot_hold_is_named(ops, tmp_path: Path):
    """Its scales are float16; those of int8 are not."""
    weights = stored_weights(V2.checkpoint)
    weights[QKV][3, 5] = 5e5
    checkpoint = write_checkpoint(tmp_path / "checkpoint", V2.checkpoint, weights)
    with pytest.raises(ChatGLMError, match=rf"a value of {QKV} is 500000.*, expected at most 491\d+"):
        convert(checkpoint, tmp_path / "out", ("int4",), ops, progress=False)
    to_int8(checkpoint, tmp_path / "out", ops=ops)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_original_without_its_scales_is_named(bits, tmp_path: Path):
    checkpoint = write_checkpoint(tmp_path / "c", V2.checkpoint, stored_weights(V2.checkpoint), quantization_bit=bits)
    with pytest.raises(ChatGLMError, match=f"quantization_bit is {bits}, expected a checkpoint that has .weight_scale"):
        to_int8(checkpoint, tmp_path / "out")


# Disk and death


def test_too_little_disk_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan, real = plan_conversion(V2.checkpoint, ("int8",)), finished_folder.psutil.disk_usage(str(tmp_path))
    monkeypatch.setattr(finished_folder.psutil, "disk_usage", lambda path: real._replace(free=plan.disk_bytes - 1))
    with pytest.raises(ChatGLMError, match=r"out: free disk space is 1\.\d+ MB, expected 9\.\d+ MB for int8"):
        to_int8(V2.checkpoint, tmp_path / "new" / "out")
    assert not names(tmp_path)


SMALL = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "kv_channels": 8,
    "multi_query_group_num": 1,
    "ffn_hidden_size": 16,
    "num_layers": 4,
}


@pytest.mark.parametrize(
    ("vocab", "wanted"), [(65536, "File too large"), (16, r"openvino_model\.xml: .*")], ids=["at the bin", "at the xml"]
)
def test_full_disk_is_told_and_nothing_is_left(vocab, wanted, tmp_path: Path):
    """A limit to the size of files is what a process can have of a full disk: writing fails half-way. The XML of a
    model that is small enough is larger than its weights."""
    resource = pytest.importorskip("resource")
    fields = config_json("chatglm3-6b", padded_vocab_size=vocab, **SMALL)
    config = parse_config(fields)
    shapes = architecture(config).weight_shapes(config)
    zeros = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", V2.checkpoint, zeros, **fields)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(ChatGLMError, match=rf"out: output is not writable \({wanted}\), expected a folder"):
            to_int8(checkpoint, tmp_path / "out", ops="stock")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert names(tmp_path) == ["checkpoint"]


def test_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graph, "write_ir", interrupted)
    with pytest.raises(KeyboardInterrupt):
        to_int8(V2.checkpoint, tmp_path / "out")
    assert not names(tmp_path)


@pytest.mark.parametrize("moment", ["-replaced", "out"])
def test_an_interrupted_replacement_leaves_one_folder(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Right behind the renaming of the old folder, and of the new one."""
    out = to_int8(V2.checkpoint, tmp_path / "out")
    rename = Path.rename

    def interrupting(self: Path, target: Path) -> Path:
        made = rename(self, target)
        if str(target).endswith(moment):
            monkeypatch.setattr(Path, "rename", rename)
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(Path, "rename", interrupting)
    with pytest.raises(KeyboardInterrupt):
        to_int8(V2.checkpoint, out, overwrite=True)
    assert names(tmp_path) == ["out"]
    assert load_model(out).weight_format == "int8"


def test_an_interrupt_of_the_cleaning_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rmtree, left = shutil.rmtree, [2]

    def interrupting(folder: Path, ignore_errors: bool) -> None:
        if left[0]:
            left[0] -= 1
            raise KeyboardInterrupt
        rmtree(folder, ignore_errors=ignore_errors)

    monkeypatch.setattr(finished_folder.shutil, "rmtree", interrupting)
    with pytest.raises(KeyboardInterrupt):
        to_int8(V2.checkpoint, tmp_path / "out", overwrite=True)
    assert left == [0] and names(tmp_path) == ["out"]


def test_a_link_to_itself_is_told(tmp_path: Path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ChatGLMError, match="output is a link that leads to itself"):
        to_int8(V2.checkpoint, tmp_path / "loop")


KILLED = """
import os, signal, sys
from chatglm_ov import convert
from chatglm_ov.conversion import graph
graph.write_ir = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2], ("int8",), progress=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="wants SIGKILL")
def test_killed_conversion_leaves_nothing_finished_and_the_next_one_cleans_up(tmp_path: Path):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, V2.checkpoint, out], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.startswith(".out.partial-")
    to_int8(V2.checkpoint, out)
    assert names(tmp_path) == ["out"]


def test_leftovers_are_told_from_running_conversions(tmp_path: Path):
    """By the process: one that is gone, ours that is younger than the folder (the number was another's), ours, and
    another one that runs."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        gone, reused, own, other = (
            tmp_path / f".out.partial-{pid}-{i}"
            for i, pid in enumerate([dead_process(), os.getpid(), os.getpid(), running.pid])
        )
        unrelated = tmp_path / ".out.partial-notes"
        for folder in (gone, reused, own, other, unrelated, tmp_path / ".outer.partial-1-2"):
            folder.mkdir()
        os.utime(reused, (0, 0))
        to_int8(V2.checkpoint, tmp_path / "out")
        running.communicate(b"\n")
    assert names(tmp_path) == sorted(["out", own.name, other.name, ".outer.partial-1-2"])


def test_output_behind_a_folder_that_is_not_there_yet(tmp_path: Path):
    """`new/..` is the folder that it would be in, which is not empty."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ChatGLMError, match="full: output is not empty"):
        to_int8(V2.checkpoint, tmp_path / "full" / "new" / "..")
    assert "file" in names(tmp_path / "full")
