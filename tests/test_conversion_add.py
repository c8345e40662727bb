"""Formats that are added to a converted folder."""

# ruff: noqa: F811 (a fixture is imported)

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Run, run  # noqa: F401
from conversions import names, to_int8
from golden_cases import V1, V2, each_small
from golden_sets import each_ops
from lora_files import low_rank, write_lora
from safetensors.numpy import save_file

from chatglm_ov import ChatGLMError, convert
from chatglm_ov.config import read_config_json
from chatglm_ov.conversion import convert as conversion
from chatglm_ov.conversion.convert import available_ops
from chatglm_ov.runtime.loading import load_model, weight_formats


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@each_small
@each_ops
def test_it_is_the_folder_that_was_made_at_once(golden, ops, tmp_path: Path):
    once = convert(golden.checkpoint, tmp_path / "once", ("int8", "int4"), ops, progress=False)
    folder = to_int8(golden.checkpoint, tmp_path / "folder", ops=ops)
    (folder / "notes.txt").write_text("mine")
    before = (folder / "int8" / "openvino_model.bin").stat()
    convert(golden.checkpoint, folder, ("int4",), ops, add=True, progress=False)
    assert (folder / "int8" / "openvino_model.bin").stat() == before
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    assert names(folder.parent) == ["folder", "once"]
    found, wanted = contents(folder), contents(once)
    assert found.keys() == wanted.keys()
    # Numbers in the names of small constants go on from one graph of a process to the next.
    assert all(found[name] == wanted[name] for name in wanted if not name.endswith(".xml"))
    assert [load_model(folder, name).weight_format for name in weight_formats(folder)] == ["int4", "int8"]


def test_a_format_that_is_there_is_written_over_if_that_is_said(tmp_path: Path):
    folder = convert(V2.checkpoint, tmp_path / "out", ("int8", "bf16"), progress=False)
    before = contents(folder)
    with pytest.raises(ChatGLMError, match="weight_formats is int8, which is there, expected other formats, or --over"):
        to_int8(V2.checkpoint, folder, add=True)
    assert contents(folder) == before
    (folder / "int8" / "openvino_model.bin").write_bytes(b"damaged")
    to_int8(V2.checkpoint, folder, add=True, overwrite=True)
    assert {name: data for name, data in contents(folder).items() if not name.endswith(".xml")} == {
        name: data for name, data in before.items() if not name.endswith(".xml")
    }


def test_a_format_that_is_a_link_is_replaced_by_a_folder(tmp_path: Path):
    """What it leads to stays as it is."""
    folder = to_int8(V2.checkpoint, tmp_path / "out")
    disk = (folder / "int8").rename(tmp_path / "disk")
    (folder / "int8").symlink_to(disk, target_is_directory=True)
    before = contents(disk)
    to_int8(V2.checkpoint, folder, add=True, overwrite=True)
    assert not (folder / "int8").is_symlink()
    assert load_model(folder).weight_format == "int8"
    assert contents(disk) == before and names(tmp_path) == ["disk", "out"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
def test_what_is_written_over_comes_back_where_that_fails(fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = to_int8(V2.checkpoint, tmp_path / "out")
    before, rename = contents(folder), Path.rename

    def fails(self: Path, target: Path) -> Path:
        if ".partial-" in str(self.parent) and target == folder / "int8" and not self.name.endswith(".replaced"):
            raise fault("now")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(ChatGLMError if fault is OSError else fault):
        to_int8(V2.checkpoint, folder, add=True, overwrite=True)
    assert contents(folder) == before and names(tmp_path) == ["out"]


def test_files_of_the_folder_stay_as_they_are(tmp_path: Path):
    folder = to_int8(V2.checkpoint, tmp_path / "out")
    (folder / "generation_config.json").write_text('{"temperature": 0.3}')
    convert(V2.checkpoint, folder, ("bf16",), add=True, progress=False)
    assert (folder / "generation_config.json").read_text() == '{"temperature": 0.3}'


def test_a_damaged_format_is_told_or_written_anew(tmp_path: Path):
    folder = to_int8(V2.checkpoint, tmp_path / "out")
    os.truncate(folder / "int8" / "openvino_model.xml", 5000)
    with pytest.raises(ChatGLMError, match="IR is unreadable") as error:
        convert(V2.checkpoint, folder, ("bf16",), add=True, progress=False)
    assert "\n" not in str(error.value)
    to_int8(V2.checkpoint, folder, add=True, overwrite=True)
    assert load_model(folder, "int8").weight_format == "int8"


MEANWHILE: dict[str, tuple[Path, tuple[str, ...], dict[str, bool], str]] = {
    "the same format": (V2.checkpoint, ("bf16",), {"add": True}, "weight_formats is bf16, which is there"),
    "another model": (V1.checkpoint, ("int8",), {"overwrite": True}, "config.json: .*, as in what is added"),
}


@pytest.mark.parametrize("meanwhile", MEANWHILE)
def test_the_folder_is_looked_at_again_at_the_end(meanwhile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = to_int8(V2.checkpoint, tmp_path / "out")
    checkpoint, formats, options, told = MEANWHILE[meanwhile]
    write, others = conversion.write_model, []

    def interfered(*arguments: Any) -> None:
        write(*arguments)
        monkeypatch.setattr(conversion, "write_model", write)
        convert(checkpoint, folder, formats, progress=False, **options)
        others.append(contents(folder))

    monkeypatch.setattr(conversion, "write_model", interfered)
    with pytest.raises(ChatGLMError, match=told):
        convert(V2.checkpoint, folder, ("bf16",), add=True, progress=False)
    assert [contents(folder)] == others and names(tmp_path) == ["out"]


def another_config(folder: Path) -> dict[str, Any]:
    checkpoint = Path(shutil.copytree(V2.checkpoint, folder / "other"))
    fields = read_config_json(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps({**fields, "layernorm_epsilon": 1e-6}))
    return {"checkpoint": checkpoint}


def another_lora(folder: Path) -> dict[str, Any]:
    write_lora(folder / "poet", low_rank("transformer.encoder.layers.0.self_attention.dense", (128, 128)))
    return {"lora": folder / "poet"}


def another_prefix(folder: Path) -> dict[str, Any]:
    (folder / "tuned").mkdir()
    tensors = {"transformer.prefix_encoder.embedding.weight": np.ones((4, 3 * 2 * 2 * 32), np.float32)}
    save_file(tensors, folder / "tuned" / "model.safetensors")
    return {"p_tuning": folder / "tuned"}


OTHERS = {
    "another model": (lambda folder: {"checkpoint": V1.checkpoint}, r"config.json: \w+ is "),
    "another field": (another_config, r"layernorm_epsilon is 1e-05, expected 1e-06, as in what is added"),
    "another scaling": (lambda folder: {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling is null"),
    "an adapter": (another_lora, "openvino_model.xml: lora is none, expected poet, as in what is added"),
    "a prefix": (another_prefix, "pre_seq_len is null, expected 4"),
    "other operations": (
        lambda folder: {"ops": "stock"},
        'config.json: ops is "fused", expected "stock", as in what is added',
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_not_the_same_model_is_refused(other: str, tmp_path: Path):
    if other == "other operations" and available_ops("fused") == "stock":
        pytest.skip("no native library: there is one kind of operations")
    folder = to_int8(V2.checkpoint, tmp_path / "out")
    before, (change, told) = contents(folder), OTHERS[other]
    options = {"checkpoint": V2.checkpoint, **change(tmp_path)}
    with pytest.raises(ChatGLMError, match=told) as error:
        convert(options.pop("checkpoint"), folder, ("bf16",), add=True, progress=False, **options)
    assert "\n" not in str(error.value)
    assert contents(folder) == before


def test_a_marker_that_is_no_object_is_refused(tmp_path: Path):
    folder = to_int8(V2.checkpoint, tmp_path / "out")
    (folder / "config.json").write_text(json.dumps({**read_config_json(folder), "chatglm_ov": "converted"}))
    with pytest.raises(ChatGLMError, match=r"config\.json: architecture is null, expected "):
        convert(V2.checkpoint, folder, ("bf16",), add=True, progress=False)
    assert weight_formats(folder) == ["int8"]


def test_a_prefix_has_to_be_the_same_one(tmp_path: Path):
    options = another_prefix(tmp_path)
    folder = to_int8(V2.checkpoint, tmp_path / "out", **options)
    convert(V2.checkpoint, folder, ("bf16",), add=True, progress=False, **options)
    tensors = {"transformer.prefix_encoder.embedding.weight": np.zeros((4, 3 * 2 * 2 * 32), np.float32)}
    save_file(tensors, options["p_tuning"] / "model.safetensors")
    with pytest.raises(ChatGLMError, match="trained prefix is another one"):
        convert(V2.checkpoint, folder, ("int4",), add=True, progress=False, **options)


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "something else", "a checkpoint"])
def test_only_a_converted_folder_is_added_to(there: str, tmp_path: Path):
    folder = tmp_path / "out"
    if there == "a checkpoint":
        shutil.copytree(V1.checkpoint, folder)
    elif there != "nothing":
        folder.mkdir()
        (folder / "file").write_text("x") if there == "something else" else None
    with pytest.raises(ChatGLMError, match="expected a converted folder, which formats can be added to"):
        to_int8(V2.checkpoint, folder, add=True)
    assert folder.exists() == (there != "nothing")


def test_on_the_command_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The current folder too, which cannot be replaced."""
    folder = to_int8(V2.checkpoint, tmp_path / "out")
    monkeypatch.chdir(folder)
    done = run("convert", V2.checkpoint, ".", "--weight-format", "bf16", "--add")
    assert done.code == 0 and "int8" in done.out and "bf16" in done.out
    assert weight_formats(Path()) == ["bf16", "int8"]
