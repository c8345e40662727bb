"""What a conversion writes, and where."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversions import dead_process, interrupted, listing, names, plan_conversion, to_int8
from golden_cases import V1, V2, each_ops, each_small, own_prompt, stored_weights, write_checkpoint
from tqdm import tqdm

from chatglm_ov import ChatGLMError, convert
from chatglm_ov.config import load_config
from chatglm_ov.conversion import convert as conversion
from chatglm_ov.conversion import finished_folder, graph
from chatglm_ov.conversion.convert import available_ops
from chatglm_ov.models.chatglm import EMBEDDING, LM_HEAD
from chatglm_ov.runtime.loading import load_model, weight_formats

# What is written


@each_small
def test_folder_is_complete(golden, tmp_path: Path):
    assert convert(golden.checkpoint, tmp_path / "out", ("int8", "f32", "int8"), progress=False) == tmp_path / "out"
    irs = [f"{name}/openvino_model.{kind}" for name in ("f32", "int8") for kind in ("bin", "xml")]
    assert listing(tmp_path / "out") == sorted(["config.json", "f32", "generation_config.json", "int8", *irs])
    assert listing(tmp_path)[0] == "out"
    assert weight_formats(tmp_path / "out") == ["f32", "int8"]


def test_config_json_points_to_no_code_and_carries_the_marker(tmp_path: Path):
    before = json.loads((V2.checkpoint / "config.json").read_text())
    after = json.loads((to_int8(V2.checkpoint, tmp_path / "out", ops="stock") / "config.json").read_text())
    assert "auto_map" in before
    marker = after.pop("chatglm_ov")
    assert marker == {"format_version": 1, "architecture": "chatglm2", "ops": "stock"}
    assert after.pop("rope_ratio_meaning") == "position"
    del before["auto_map"]
    assert after == before
    assert load_config(tmp_path / "out") == load_config(V2.checkpoint)


def test_default_ops_are_those_that_are_there(tmp_path: Path):
    config = json.loads((to_int8(V1.checkpoint, tmp_path / "out") / "config.json").read_text())
    assert config["chatglm_ov"]["ops"] == available_ops("fused")


@pytest.mark.parametrize("meaning", ["base", "position"])
def test_given_rope_ratio_meaning_is_kept(meaning, tmp_path: Path):
    to_int8(V2.checkpoint, tmp_path / "out", rope_ratio_meaning=meaning)
    assert load_config(tmp_path / "out").rope_ratio_meaning == meaning


def test_generation_config_is_the_checkpoints(tmp_path: Path):
    checkpoint = Path(shutil.copytree(V2.checkpoint, tmp_path / "checkpoint"))
    (checkpoint / "generation_config.json").write_text(
        '\ufeff{"top_p": 0.8,  "eos_token_id": [2, 5]}', encoding="utf-8"
    )
    copied = to_int8(checkpoint, tmp_path / "out") / "generation_config.json"
    assert copied.read_text() == '{"top_p": 0.8,  "eos_token_id": [2, 5]}'


@pytest.mark.parametrize(
    ("golden", "ids"),
    [
        (V1, {"bos_token_id": 2004, "eos_token_id": 2005, "pad_token_id": 3}),
        (V2, {"eos_token_id": 2, "pad_token_id": 0}),
    ],
    ids=str,
)
def test_generation_config_is_made_of_the_special_ids(golden, ids, tmp_path: Path):
    made = to_int8(golden.checkpoint, tmp_path / "out") / "generation_config.json"
    assert json.loads(made.read_text()) == ids


def test_tokenizer_goes_with_the_model(data: Path, tmp_path: Path):
    checkpoint = Path(shutil.copytree(V1.checkpoint, tmp_path / "checkpoint"))
    for name in ("ice_text.model", "tokenizer_config.json"):
        shutil.copy(data / "tokenizer_v1" / name, checkpoint / name)
    out = to_int8(checkpoint, tmp_path / "out")
    assert (out / "ice_text.model").read_bytes() == (checkpoint / "ice_text.model").read_bytes()
    assert "auto_map" not in (out / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("told", [None, True])
@each_ops
def test_tied_head_is_stored_once(ops, told, tmp_path: Path):
    """The stored head is left aside, as in the original, and the file is smaller by it (fused operations need fewer
    small constants then)."""
    weights = stored_weights(V1.checkpoint)
    assert np.abs(weights[LM_HEAD] - weights[EMBEDDING]).max() > 0
    tied = write_checkpoint(tmp_path / "tied", V1.checkpoint, weights, tie_word_embeddings=told)
    weights[LM_HEAD] = weights[EMBEDDING]
    untied = write_checkpoint(tmp_path / "untied", V1.checkpoint, weights)
    folders = [convert(c, tmp_path / f"{c.name}-out", ("bf16", "f32"), ops, progress=False) for c in (tied, untied)]
    for name, size in (("bf16", 2), ("f32", 4)):
        one, two = ((folder / name / "openvino_model.bin").stat().st_size for folder in folders)
        assert 0 <= two - one - size * weights[EMBEDDING].size < (1 if ops == "stock" else 200)
    models = [load_model(folder, "f32", "f32") for folder in folders]
    ids = V1["p17_input_ids"]
    one, two = (own_prompt(ids, model).feed(model.create_request()) for model in models)
    assert np.abs(one - two).max() < 1e-5


@each_ops
@pytest.mark.parametrize("formats", [("f32",), ("bf16", "int8"), ("int4", "int8", "int4")], ids=str)
def test_plan_is_what_happens(ops, formats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bars: list[tqdm] = []

    def noted_bar(*args: Any, **kwargs: Any) -> tqdm:
        bars.append(tqdm(*args, **kwargs))
        return bars[0]

    monkeypatch.setattr(conversion, "tqdm", noted_bar)
    plan = plan_conversion(V2.checkpoint, formats, ops)
    assert plan.weight_formats == tuple(dict.fromkeys(formats))
    convert(V2.checkpoint, tmp_path / "out", formats, ops)
    (bar,) = bars
    assert bar.n == bar.total == plan.read_bytes
    sizes = [(tmp_path / "out" / name / "openvino_model.bin").stat().st_size for name in plan.weight_formats]
    # Weights and biases; what the rest of the graph, the alignment and padded features add is small.
    assert plan.disk_bytes <= sum(sizes) < plan.disk_bytes + 32_000 * len(sizes)


def test_plan_is_told_in_one_line():
    assert re.fullmatch(
        r"chatglm2, 3 layers: bf16, int8\. Reads 4\.\d+ MB, writes 3\.\d+ MB, needs about 3\d\d\.\d+ MB of memory\.",
        str(plan_conversion(V2.checkpoint)),
    )


# Where it is written


@pytest.mark.parametrize("name", ["model [v2]*?", "模型 一", ".hidden", "a.partial-1-b", "a/new/folder", "x/../y"])
def test_any_name_will_do(name, tmp_path: Path):
    target = tmp_path / name
    killed = target.parent / f".{target.name}.partial-{dead_process()}-0123abcd"
    killed.mkdir(parents=True)
    to_int8(V2.checkpoint, target)
    assert load_model(target).weight_format == "int8"
    assert not killed.exists()
    assert not list(target.parent.glob(".*.partial-*"))


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert to_int8(V2.checkpoint, Path("out")) == Path("out")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    to_int8(V2.checkpoint, Path())
    assert listing(tmp_path / "here") == listing(tmp_path / "out")


def test_link_to_a_folder_stays_one(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out", target_is_directory=True)
    for _ in range(2):
        to_int8(V2.checkpoint, tmp_path / "link", overwrite=True)
        assert (tmp_path / "link").is_symlink()
        assert weight_formats(tmp_path / "disk" / "out") == ["int8"]


def test_overwrite_replaces_everything(tmp_path: Path):
    out = tmp_path / "out"
    convert(V1.checkpoint, out, ("f32",), progress=False)
    (out / "notes.txt").write_text("old")
    with pytest.raises(ChatGLMError, match="output is not empty, expected a new or empty folder, or --overwrite"):
        to_int8(V2.checkpoint, out)
    assert (out / "notes.txt").exists()
    to_int8(V2.checkpoint, out, overwrite=True)
    assert weight_formats(out) == ["int8"]
    assert not (out / "notes.txt").exists()
    assert names(tmp_path) == ["out"]


def test_old_folder_is_removed_when_the_new_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    convert(V1.checkpoint, tmp_path / "out", ("f32",), progress=False)
    removed, remove = [], shutil.rmtree

    def noted(folder: Path, **options: Any) -> None:
        removed.append((weight_formats(folder), weight_formats(tmp_path / "out")))
        remove(folder, **options)

    monkeypatch.setattr(finished_folder.shutil, "rmtree", noted)
    to_int8(V2.checkpoint, tmp_path / "out", overwrite=True)
    assert removed[0] == (["f32"], ["int8"])


def test_a_folder_that_the_current_one_is_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = to_int8(V2.checkpoint, tmp_path / "out")
    before = listing(tmp_path)
    monkeypatch.chdir(folder / "int8")
    with pytest.raises(ChatGLMError, match="output is the current folder, which cannot be replaced"):
        to_int8(V2.checkpoint, folder, overwrite=True)
    assert listing(tmp_path) == before


def test_what_makes_a_folder_a_finished_one_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    moved: list[str] = []
    replace = Path.replace

    def noted(self: Path, target: Path) -> Path:
        moved.append(self.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    to_int8(V2.checkpoint, tmp_path / "out", overwrite=True)
    assert sorted(moved) == ["config.json", "generation_config.json", "int8"] and moved[-1] == "config.json"


def test_failed_overwrite_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    to_int8(V2.checkpoint, tmp_path / "out")
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in listing(tmp_path / "out")}
    monkeypatch.setattr(graph, "write_ir", interrupted)
    with pytest.raises(KeyboardInterrupt):
        to_int8(V1.checkpoint, tmp_path / "out", overwrite=True)
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in listing(tmp_path / "out")} == before
    assert names(tmp_path) == ["out"]


def test_of_two_conversions_the_faster_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original = graph.write_ir

    def overtaken(*args: Any) -> None:
        monkeypatch.setattr(graph, "write_ir", original)
        convert(V1.checkpoint, tmp_path / "out", ("f32",), progress=False)
        original(*args)

    monkeypatch.setattr(graph, "write_ir", overtaken)
    with pytest.raises(ChatGLMError, match=r"output is not writable .*not empty"):
        to_int8(V2.checkpoint, tmp_path / "out")
    assert weight_formats(tmp_path / "out") == ["f32"]
    assert names(tmp_path) == ["out"]
