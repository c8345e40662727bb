"""Folders of fused operations where the native library cannot be used: the same model in stock operations."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from command_line import PROGRAM, Outcome, finish, make_checkpoint, spawn
from conversions import dead_process
from glm_models import EDGE, reference, saved
from golden_cases import V2, each_small, own_prompt
from golden_sets import here, without_library
from unpacked import REASON, check_same

from chatglm_ov import ChatGLMError, convert
from chatglm_ov.conversion import finished_folder
from chatglm_ov.conversion.finished_folder import psutil
from chatglm_ov.native import native
from chatglm_ov.runtime.loading import load_model
from chatglm_ov.weights import store
from chatglm_ov.weights.choices import FormatChoices
from chatglm_ov.weights.paged_file import PagedFile
from chatglm_ov.weights.unpacking import UNPACKED_VERSION

pytestmark = without_library
FORMATS = ("f32", "bf16", "int8", "int4")
MIXED = FormatChoices(
    group_size=32,
    lm_head_format="int4",
    embedding_format="f32",
    layer_formats={"*.layers.0.*": "bf16", "*dense_4h_to_h*": "int8"},
)
CHECKPOINTS = [golden.checkpoint for golden in here("golden.npz")]
IDS = np.array([[5, 6, 7, 8, 9, 10, 11]])


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatglm_ov.runtime.ir_reading.unavailable", lambda: REASON)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in both lowerings. Not to be changed."""
    made = tmp_path_factory.mktemp("folders")
    return {
        ops: convert(V2.checkpoint, made / ops, ("int8", "bf16"), ops, progress=False) for ops in ("fused", "stock")
    }


# Weights


def test_it_knows_the_layouts_of_the_library():
    assert native().PACKING_VERSION == UNPACKED_VERSION


@each_small
def test_weights_are_those_of_the_stock_lowering(golden, tmp_path: Path):
    check_same(golden.checkpoint, FORMATS, tmp_path)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda path: path.parent.name)
def test_each_golden_checkpoint(checkpoint: Path, tmp_path: Path):
    check_same(checkpoint, ("int8",), tmp_path)


@pytest.mark.parametrize(("kind", "fields"), [("glm", {}), ("glm", EDGE), ("glm4", {})], ids=str)
def test_glm(kind: str, fields: dict[str, Any], tmp_path: Path):
    check_same(saved(reference(kind, **fields), tmp_path / "checkpoint"), FORMATS, tmp_path)


@each_small
def test_in_small_blocks(golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "BLOCK_BYTES", 1)
    check_same(golden.checkpoint, ("int8", "int4"), tmp_path)


@each_small
def test_formats_of_their_own(golden, tmp_path: Path):
    check_same(golden.checkpoint, ("int4", "int8"), tmp_path, choices=MIXED)


def test_tied_table_in_int4(tmp_path: Path):
    checkpoint = saved(reference("glm", **EDGE), tmp_path / "checkpoint")
    check_same(checkpoint, ("int4",), tmp_path, choices=FormatChoices(group_size=32, lm_head_format="int4"))


@pytest.mark.parametrize("features", [1, 16, 100, 107])
def test_gated_layers_of_any_size(features: int, tmp_path: Path):
    """Gate and up fill up panels of their own."""
    fields = json.loads((V2.checkpoint / "config.json").read_text(encoding="utf-8"))
    make_checkpoint(tmp_path / "checkpoint", {**fields, "ffn_hidden_size": features, "padded_vocab_size": 77})
    check_same(tmp_path / "checkpoint", ("f32", "bf16", "int8"), tmp_path)


# Models


def in_a_process_without(*command: object, **environment: object) -> Outcome:
    """The library is looked for once a process."""
    return finish(spawn(*command, env={"CHATGLM_OV_NATIVE": "/nonexistent", **environment}))


LOAD = """
import sys
import numpy as np
from chatglm_ov.runtime.loading import load_model
model = load_model(sys.argv[1], "int8", activation_bits=int(sys.argv[2]))
ids = np.arange(5, 12)[None]
logits = [model.create_request().infer(ids, np.ones_like(ids), ids - 5, np.zeros(1)) for _ in range(2)]
np.save(sys.argv[3], logits)
print(model.ops)
"""


@pytest.mark.parametrize("activation_bits", [16, 8])
def test_without_the_library(activation_bits: int, folders: dict[str, Path], tmp_path: Path):
    """The logits of the stock folder, one warning, and no file that stays. 8-bit activations are those of fused
    operations: what runs in their place has more."""
    (tmp_path / "temporary").mkdir()
    arguments = folders["fused"], activation_bits, tmp_path / "logits.npy"
    done = in_a_process_without(sys.executable, "-c", LOAD, *arguments, TMPDIR=str(tmp_path / "temporary"))
    assert (done.code, done.out) == (0, "stock\n"), done
    (line,) = done.err.splitlines()
    assert line.startswith("no fused operations (/nonexistent is no Python module): ") and "--ops stock" in line
    assert list((tmp_path / "temporary").iterdir()) == []
    stock = load_model(folders["stock"], "int8")
    wanted = own_prompt(IDS, stock).feed(stock.create_request())
    for logits in np.load(tmp_path / "logits.npy"):
        np.testing.assert_array_equal(logits, wanted)


@pytest.mark.usefixtures("no_library")
def test_a_model_outlives_its_temporary_files(folders: dict[str, Path], temporary: Path):
    formats = ("int8", "bf16", "int8")
    models = [load_model(folders["fused"], name) for name in formats]
    assert list(temporary.iterdir()) == []
    for model, name in zip(models, formats, strict=True):
        wanted = own_prompt(IDS, model).feed(load_model(folders["stock"], name).create_request())
        np.testing.assert_array_equal(own_prompt(IDS, model).feed(model.create_request()), wanted)


def test_info(folders: dict[str, Path]):
    """All of a folder but the parts of its weights."""
    info = in_a_process_without(*PROGRAM, "info", folders["fused"])
    assert info.code == 0, info.err
    found = [line.split() for line in info.out.splitlines()]
    (int8,) = (line for line in found if line[:1] == ["int8"])
    size = sum(file.stat().st_size for file in (folders["fused"] / "int8").iterdir())
    assert f"{size / 1e6:.2f} MB, fused ops, 4 states" in " ".join(int8) and "13 FullyConnected" in " ".join(int8)
    assert any(line[:2] == ["runs", "with"] and "arithmetic," in line for line in found)
    # Nothing is unpacked for it.
    assert info.err == ""


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda xml: os.truncate(xml, 5000), "IR is unreadable"),
        (lambda xml: xml.with_suffix(".bin").unlink(), "openvino_model.bin: file is missing"),
    ],
)
def test_info_of_damaged_formats(damage: Callable[[Path], object], told: str, folders: dict[str, Path], tmp_path: Path):
    """Of one that is not the default, too."""
    folder = Path(shutil.copytree(folders["fused"], tmp_path / "folder"))
    damage(folder / "bf16" / "openvino_model.xml")
    assert told in in_a_process_without(*PROGRAM, "info", folder).error


# Refusals


def change(xml: Path, old: str, new: str) -> None:
    text = xml.read_text(encoding="utf-8")
    assert old in text
    xml.write_text(text.replace(old, new), encoding="utf-8")


def without_scales_of_the_embedding(xml: Path) -> None:
    tree = ElementTree.parse(xml)
    (embedding,) = (layer.get("id") for layer in tree.iter("layer") if layer.get("type") == "EmbeddingRows")
    edges = tree.getroot().find("edges")
    (edge,) = (edge for edge in edges if (edge.get("to-layer"), edge.get("to-port")) == (embedding, "2"))
    edges.remove(edge)
    tree.write(xml)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "short file": (lambda xml: os.truncate(xml.with_suffix(".bin"), 1000), "IR is damaged"),
    "no file": (lambda xml: xml.with_suffix(".bin").unlink(), "openvino_model.bin: file is missing"),
    "empty file": (lambda xml: os.truncate(xml.with_suffix(".bin"), 0), "size is 0 bytes"),
    "no XML": (lambda xml: os.truncate(xml, 5000), "IR is unreadable"),
    "another version": (
        lambda xml: change(xml, '<packing_version value="2"', '<packing_version value="1"'),
        "packing_version is 1, expected 2",
    ),
    "another shape": (
        lambda xml: change(xml, 'in_features="344"', 'in_features="345"'),
        r"shape of .* is \[128, 345\], expected \[128, 344\]",
    ),
    "another format": (lambda xml: change(xml, 'format="int8"', 'format="int7"'), "IR is damaged"),
    "no attribute": (lambda xml: change(xml, "y_features", "z_features"), "IR is damaged"),
    "no file of weights": (
        lambda xml: [xml.with_suffix(".bin").unlink(), xml.with_suffix(".bin").mkdir()],
        "file is a folder, expected the weights beside the IR",
    ),
    "no groups": (lambda xml: change(xml, 'format="int8"', 'format="int4"'), "IR is damaged"),
    "a part of a weight": (without_scales_of_the_embedding, "IR is damaged"),
    "another operation": (lambda xml: change(xml, 'type="Norm"', 'type="Form"'), "input_layernorm.weight is missing"),
}


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(damage: str, folders: dict[str, Path], tmp_path: Path, temporary: Path):
    folder = shutil.copytree(folders["fused"], tmp_path / "folder")
    spoil, told = DAMAGES[damage]
    spoil(folder / "int8" / "openvino_model.xml")
    with pytest.raises(ChatGLMError, match=told) as error:
        load_model(folder, "int8")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert list(temporary.iterdir()) == []


@pytest.mark.usefixtures("no_library")
def test_no_room_for_temporary_files(folders: dict[str, Path], temporary: Path, monkeypatch: pytest.MonkeyPatch):
    usage = psutil.disk_usage(str(temporary))
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
        with pytest.raises(ChatGLMError, match=r"free disk space is 1.00 MB, expected .* TMPDIR"):
            load_model(folders["fused"], "int8")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PagedFile, "flush", full)
    with pytest.raises(ChatGLMError, match=r"not writable \(No space left on device\), expected .* TMPDIR"):
        load_model(folders["fused"], "int8")
    assert list(temporary.iterdir()) == []


@pytest.mark.usefixtures("no_library")
def test_no_place_for_temporary_files(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.raises(ChatGLMError, match=r"not writable \(No usable temporary directory .*\), expected .* TMPDIR"):
        load_model(folders["fused"], "int8")


@pytest.mark.usefixtures("no_library")
def test_what_a_killed_one_leaves_goes_with_the_next(folders: dict[str, Path], temporary: Path):
    left = temporary / f".chatglm-ov-unpacked.partial-{dead_process()}-0123abcd"
    left.mkdir()
    (left / "openvino_model.bin").write_bytes(b"weights")
    load_model(folders["fused"], "int8")
    assert list(temporary.iterdir()) == []


def test_nothing_else_is_measured_in_the_place_of_fused_operations(folders: dict[str, Path]):
    options = ["--weight-format", "int8", "--prompt-tokens", "8"]
    done = in_a_process_without(*PROGRAM, "bench", folders["fused"], *options)
    assert "native library: import is /nonexistent is no Python module" in done.error


def test_a_leftover_that_another_process_removes_meanwhile_is_none(tmp_path: Path):
    """Processes that load at once look at each other's."""
    assert not finished_folder._owner_runs(tmp_path / "gone", str(os.getpid()))
