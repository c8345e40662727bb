"""What load_model refuses, and what it tells of a folder, a machine and a process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import Outcome, finish, spawn
from golden_cases import OPS, V2, own_prompt, without_library

from chatglm_ov import ChatGLMError, convert
from chatglm_ov.native import native, unavailable
from chatglm_ov.runtime.loading import default_weight_format, load_model, weight_formats


def present_levels() -> list[str]:
    return [] if unavailable() is not None else native().present_isa_levels()


Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    return convert(V2.checkpoint, folder, ("bf16", "f32"), ops="stock", progress=False)


@pytest.fixture
def folder(whole_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_folder, tmp_path / "model"))


def shorten(path: Path, missing_bytes: int) -> None:
    os.truncate(path, path.stat().st_size - missing_bytes)


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_ir(folder: Path, old: str, new: str) -> None:
    path = folder / "f32" / "openvino_model.xml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no bin": (lambda f: (f / "f32" / "openvino_model.bin").unlink(), r"openvino_model\.bin: file is missing"),
    "empty bin": (lambda f: (f / "f32" / "openvino_model.bin").write_bytes(b""), r"model\.bin: size is 0 bytes"),
    "pointer for a bin": (
        lambda f: (f / "f32" / "openvino_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n"),
        r"openvino_model\.bin: contents is a Git LFS pointer",
    ),
    "bin short of a byte": (lambda f: shorten(f / "f32" / "openvino_model.bin", 1), "IR is unreadable .*bin file"),
    "half an xml": (
        lambda f: shorten(f / "f32" / "openvino_model.xml", 9999),
        r"openvino_model\.xml: IR is unreadable",
    ),
    "empty xml": (lambda f: (f / "f32" / "openvino_model.xml").write_bytes(b""), "IR is unreadable"),
    "no xml": (
        lambda f: (f / "f32" / "openvino_model.xml").unlink(),
        r"weight_format is 'f32', expected one of \['bf16'\]",
    ),
    "another version": (
        lambda f: edit_config(f, chatglm_ov={"format_version": 99}),
        r"config\.json: chatglm_ov\.format_version is 99, expected 1",
    ),
    "IR of another version": (
        lambda f: edit_ir(f, '<format_version value="1"', '<format_version value="7"'),
        r"openvino_model\.xml: format_version is 7, expected 1: convert the checkpoint again",
    ),
    "IR of another maker": (
        lambda f: edit_ir(f, "chatglm_ov>", "somebody>"),
        r"openvino_model\.xml: format_version is missing, expected 1",
    ),
    "another marker": (lambda f: edit_config(f, chatglm_ov="yes"), "format_version is missing"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "other config": (lambda f: edit_config(f, num_layers=0), "num_layers is 0, expected greater than 0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_named(damage, folder: Path):
    spoil, message = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(ChatGLMError, match=message) as error:
        load_model(folder, "f32", "f32")
    assert "\n" not in str(error.value)


def test_checkpoint_is_no_converted_folder():
    with pytest.raises(ChatGLMError, match=r"format_version is missing \(a checkpoint, not converted\)"):
        load_model(V2.checkpoint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_format": "int3"}, r"weight_format is 'int3', expected one of \['bf16', 'f32'\]"),
        ({"inference_precision": "f64"}, "inference_precision is 'f64', expected one of"),
        ({"kv_cache_format": "u4"}, r"kv_cache_format is 'u4', expected one of \('f32', 'bf16', 'int8'\)"),
        ({"activation_bits": 4}, r"activation_bits is 4, expected one of \(16, 8\)"),
        ({"activation_bits": 16.0}, r"activation_bits is 16\.0, expected one of \(16, 8\)"),
        ({"weight_format": "../model/f32"}, r"weight_format is '\.\./model/f32', expected one of \['bf16', 'f32'\]"),
        ({"properties": ["a"]}, r"properties is \['a'\], expected a dict of OpenVINO properties"),
        ({"device": None}, "device is None, expected the name of a device"),
        ({"activation_bits": 8}, "activation_bits is 8, expected 16 with stock operations"),
        ({"device": "TOASTER"}, "device TOASTER: compilation is .*TOASTER.*, expected a device of .*CPU"),
        (
            {"properties": {"NO_SUCH_PROPERTY": "1"}},
            "NO_SUCH_PROPERTY.*, expected properties that it takes",
        ),
    ],
    ids=str,
)
def test_wrong_options_are_named(options, message, whole_folder: Path):
    with pytest.raises(ChatGLMError, match=message) as error:
        load_model(whole_folder, **options)
    assert "\n" not in str(error.value)


def test_weights_larger_than_the_memory_are_told(whole_folder: Path, monkeypatch, caplog):
    monkeypatch.setattr("chatglm_ov.runtime.loading.available", lambda: 1000)
    load_model(whole_folder, "f32")
    assert "free memory of 1.00 kB: what does not fit is read from the disk for each token" in caplog.text


def test_a_folder_that_is_none_is_told(tmp_path: Path):
    with pytest.raises(ChatGLMError, match="gone: folder is missing"):
        default_weight_format(tmp_path / "gone")
    (tmp_path / "file").write_text("{}")
    with pytest.raises(ChatGLMError, match=r"file: folder is a file, expected a folder with config\.json$"):
        load_model(tmp_path / "file")


def test_weight_format_is_chosen(folder: Path):
    assert weight_formats(folder) == ["bf16", "f32"]
    assert default_weight_format(folder) == "bf16"
    (folder / "bf16").rename(folder / "int8")
    assert default_weight_format(folder) == "int8"
    shutil.rmtree(folder / "int8")
    assert default_weight_format(folder) == "f32"
    shutil.rmtree(folder / "f32")
    with pytest.raises(ChatGLMError, match="weight formats is none"):
        load_model(folder)


@pytest.mark.parametrize("cache_format", ["f32", "bf16", "int8"])
def test_cache_format_of_stock_operations(cache_format, whole_folder: Path):
    model = load_model(whole_folder, "f32", kv_cache_format=cache_format)
    plugins = {"int8": "u8"}.get(cache_format, cache_format)
    assert model.compiled.get_property("KV_CACHE_PRECISION").to_string() == plugins
    assert model.kv_cache_format == cache_format
    # A property wins, and is what is told.
    assert load_model(whole_folder, "f32", properties={"KV_CACHE_PRECISION": plugins}).kv_cache_format == cache_format


@pytest.mark.parametrize("ops", OPS)
def test_weights_in_f32_are_computed_in_f32(ops, tmp_path: Path):
    """Without being told so: who takes them wants the reference."""
    folder = convert(V2.checkpoint, tmp_path / "out", ("f32", "bf16"), ops, progress=False)
    plain, told = (load_model(folder, "f32", precision) for precision in (None, "f32"))
    assert plain.kv_cache_format == "f32"
    prompt = own_prompt(V2["p17_input_ids"], plain)
    results = [prompt.feed(model.create_request()) for model in (plain, told)]
    np.testing.assert_array_equal(*results)
    assert load_model(folder, "bf16").kv_cache_format == "bf16"
    assert load_model(folder, "f32", "bf16").kv_cache_format == "bf16"


FORK = """
import os, sys, traceback
from chatglm_ov import OVChatGLMForCausalLM
model = OVChatGLMForCausalLM.from_pretrained(sys.argv[1], properties={"INFERENCE_NUM_THREADS": 1})
import torch
ids = torch.tensor([[5, 6, 7]])
model.generate(ids, max_new_tokens=2)
for use in (lambda: model.generate(ids, max_new_tokens=2), lambda: OVChatGLMForCausalLM.from_pretrained(sys.argv[1])):
    sys.stdout.flush()
    if os.fork() == 0:
        try:
            use()
        except Exception as error:
            print(error, flush=True)
        os._exit(0)
    os.wait()
print(model.generate(ids, max_new_tokens=2).shape[1])
"""


@pytest.mark.parametrize("ops", OPS)
def test_a_fork_is_told_and_does_not_wait_forever(ops, tmp_path: Path):
    folder = convert(V2.checkpoint, tmp_path / "out", ("f32",), ops, progress=False)
    *told, last = in_another_process(FORK, folder).out.splitlines()
    wanted = "model: process is a fork of one that has loaded a model, expected from_pretrained() in each process"
    assert len(told) == 2 and all(line.startswith(wanted) for line in told), told
    assert last == "5"


# Fused operations


@pytest.fixture(scope="module")
def whole_fused_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(V2.checkpoint, tmp_path_factory.mktemp("whole") / "model", ("f32",), ops="fused", progress=False)


@pytest.fixture
def fused_folder(whole_fused_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_fused_folder, tmp_path / "model"))


@without_library
def test_another_packing_version(fused_folder: Path):
    version = native().PACKING_VERSION
    edit_ir(fused_folder, f'<packing_version value="{version}"', '<packing_version value="99"')
    with pytest.raises(
        ChatGLMError, match=rf"packing_version is 99, expected {version}: convert the checkpoint again"
    ) as error:
        load_model(fused_folder)
    assert "\n" not in str(error.value)


FUSED_DAMAGES: dict[str, tuple[str, str]] = {
    "an operation of another version": ('packing_version="2"', 'packing_version="1"'),
    "sizes that do not fit": ('in_features="128"', 'in_features="160"'),
    "an unknown format": ('format="f32"', 'format="f31"'),
    "an unknown operation": ('type="Norm" version="chatglm"', 'type="Mron" version="chatglm"'),
}


@without_library
@pytest.mark.parametrize("damage", FUSED_DAMAGES)
def test_damaged_fused_ir(damage, fused_folder: Path):
    edit_ir(fused_folder, *FUSED_DAMAGES[damage])
    with pytest.raises(ChatGLMError, match=r"openvino_model\.xml: IR is unreadable") as error:
        load_model(fused_folder)
    assert "\n" not in str(error.value)


@without_library
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "GPU"}, "device is 'GPU', expected 'CPU', or a folder converted with --ops stock"),
        ({"inference_precision": "f16"}, "inference_precision is 'f16', expected f32 or bf16 with fused operations"),
        ({"properties": {"NO_SUCH_PROPERTY": "1"}}, "NO_SUCH_PROPERTY"),
    ],
    ids=str,
)
def test_options_that_fused_operations_do_not_take(options, message, whole_fused_folder: Path):
    with pytest.raises(ChatGLMError, match=message) as error:
        load_model(whole_fused_folder, **options)
    assert "\n" not in str(error.value)


def in_another_process(script: str, *arguments: object, **environment: str) -> Outcome:
    """The library is looked for once a process."""
    return finish(spawn(sys.executable, "-c", script, *arguments, env=environment))


LOAD = """
import sys
from chatglm_ov import ChatGLMError
from chatglm_ov.runtime.loading import load_model
try:
    print(load_model(sys.argv[1]).ops)
except ChatGLMError as error:
    print(error)
"""
READ = """
import sys
from pathlib import Path
from chatglm_ov import ChatGLMError
from chatglm_ov.runtime.ir_reading import read_ir
try:
    read_ir(next(Path(sys.argv[1]).glob("*/openvino_model.xml")))
except ChatGLMError as error:
    print(error)
"""
CONVERT = """
import sys
from chatglm_ov import convert
from chatglm_ov.runtime.loading import load_model
convert(sys.argv[1], sys.argv[2], ("int8", "bf16"), progress=False)
print(load_model(sys.argv[2]).ops)
"""
absent = next((name for name in ("amx", "avx512_bf16", "avx512") if name not in present_levels()), None)
COMPLETE = "this machine has every instruction set level"
REASONS = [
    pytest.param({"CHATGLM_OV_NATIVE": "/nonexistent"}, "/nonexistent is no Python module", id="missing"),
    pytest.param({"CHATGLM_OV_NATIVE": str(V2.checkpoint / "config.json")}, "is no Python module", id="no library"),
]


@without_library
@pytest.mark.parametrize(("environment", "reason"), REASONS)
def test_fused_folder_without_a_usable_library(environment, reason, whole_fused_folder: Path):
    """It is run in stock operations; what reads its graph as it is does not."""
    done = in_another_process(LOAD, whole_fused_folder, **environment)
    assert done.out == "stock\n"
    (line,) = done.err.splitlines()
    assert line.startswith("no fused operations (") and reason in line
    done = in_another_process(READ, whole_fused_folder, **environment)
    (line,) = done.out.splitlines()
    assert "ops is fused, which cannot run here (" in line
    assert reason in line and "--ops stock" in line
    assert done.err == ""


@pytest.mark.parametrize(("environment", "reason"), REASONS)
def test_conversion_without_a_usable_library(environment, reason, tmp_path: Path):
    """The stock lowering, with one warning."""
    done = in_another_process(CONVERT, V2.checkpoint, tmp_path / "out", **environment)
    assert done.out == "stock\n"
    (line,) = done.err.splitlines()
    assert line.startswith("no fused operations (") and reason in line


@without_library
@pytest.mark.parametrize(
    "level", ["sse9", pytest.param(absent, marks=pytest.mark.skipif(absent is None, reason=COMPLETE))]
)
def test_a_level_that_is_not_there(level: str, whole_fused_folder: Path, tmp_path: Path):
    """Whoever asks for a level wants that one: nothing is converted, or loaded, in another way."""
    told = f"CHATGLM_OV_ISA: level is {level}, expected one of this machine: {', '.join(present_levels())}"
    assert told in in_another_process(LOAD, whole_fused_folder, CHATGLM_OV_ISA=level).out
    done = in_another_process(CONVERT, V2.checkpoint, tmp_path / "out", CHATGLM_OV_ISA=level)
    assert told in done.err and not (tmp_path / "out").exists()


@without_library
@pytest.mark.parametrize("threads", [1, 2])
def test_an_operation_that_fails_is_told_with_any_number_of_threads(whole_fused_folder: Path, threads: int):
    """OpenVINO's `infer` says nothing with one thread."""
    model = load_model(whole_fused_folder, properties={"INFERENCE_NUM_THREADS": threads})
    request = model.create_request()
    request.cache.allocate(1, 1, keep=False)
    request.cache.prepare = lambda *columns: None
    ids = np.ones((1, 50), np.int64)
    with pytest.raises(RuntimeError, match="wanted at most 32"):
        request.infer(ids, ids, np.arange(50)[None], np.zeros(1), logits_to_keep=1)
    assert request.past_length == 0


LOCALE = """
import locale, sys
import numpy as np
from chatglm_ov.runtime.loading import load_model

if sys.argv[2]:
    locale.setlocale(locale.LC_ALL, sys.argv[2])
    assert locale.localeconv()["decimal_point"] == ","
request = load_model(sys.argv[1]).create_request()
ids = np.arange(8)[None]
logits = request.infer(ids, np.ones_like(ids), ids, np.zeros(1))
np.save(sys.argv[3], logits)
"""


@without_library
def test_numbers_do_not_depend_on_the_locale(whole_fused_folder: Path, tmp_path: Path):
    """Programs with windows, among others, set one in which a comma stands for the point."""
    made = shutil.which("localedef") and subprocess.run(
        ["localedef", "-i", "de_DE", "-f", "UTF-8", tmp_path / "de_DE.UTF-8"], capture_output=True
    )
    if not made or not (tmp_path / "de_DE.UTF-8").exists():
        pytest.skip("localedef, or what it makes locales of, is not there")
    for name, file in (("", "point.npy"), ("de_DE.UTF-8", "comma.npy")):
        command = [sys.executable, "-c", LOCALE, whole_fused_folder, name, tmp_path / file]
        subprocess.run(command, check=True, env={**os.environ, "LOCPATH": str(tmp_path)})
    np.testing.assert_array_equal(np.load(tmp_path / "comma.npy"), np.load(tmp_path / "point.npy"))


@pytest.mark.parametrize("ops", [pytest.param("fused", marks=without_library), "stock"])
@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("num_layers", 5, r"layers is \d+, expected 5"),
        ("multi_query_group_num", 1, r"num_key_value_heads is 2, expected 1"),
        ("kv_channels", 16, r"head_dim is 32, expected 16"),
        ("padded_vocab_size", 96, r"vocabulary is \d+, expected 96"),
    ],
)
def test_a_config_of_another_model(ops: str, field: str, value: int, told: str, tmp_path: Path) -> None:
    folder = convert(V2.checkpoint, tmp_path / "out", ("bf16",), ops=ops, progress=False)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ChatGLMError, match=f"{told}, as config.json has it"):
        load_model(folder)
