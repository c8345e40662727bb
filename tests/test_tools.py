"""tools/gen_chatglm.py, tools/test_chatglm.py and the tools of the demo model."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from command_line import DATA, TOOLS, Outcome, Run, checkpoint, converted, copy_of, finish, names, run, spawn  # noqa: F401
from glm_models import reference, saved
from safetensors.torch import save_file
from tokenizer_cases import fast_folder
from transformers import dynamic_module_utils

from chatglm_ov import OVChatGLMForCausalLM, convert, load_tokenizer
from chatglm_ov.cli.answer import as_text

Tool = Callable[..., Outcome]
FIGURES = re.compile(
    r"^(\d+) tokens, first token [\d.]+ ms, next tokens [\d.]+ ms each, [\d.]+ tokens/s\n"
    r"memory: ([\d.]+ [MG]B) resident, ([\d.]+ [MG]B) anonymous$",
    re.MULTILINE,
)


def in_bytes(told: str) -> float:
    number, unit = told.split()
    return float(number) * {"MB": 1e6, "GB": 1e9}[unit]


@pytest.fixture
def tool(capfd: pytest.CaptureFixture[str]) -> Tool:
    """Function from a tool's name and arguments to how it ends, in this process."""

    def execute(name: str, *arguments: object) -> Outcome:
        spec = spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        capfd.readouterr()
        return Outcome(module.main([str(argument) for argument in arguments]), *capfd.readouterr())

    return execute


def greedy(folder: Path, weight_format: str, prompts: list[str], count: int) -> list[str]:
    model, tokenizer = OVChatGLMForCausalLM.from_pretrained(folder, weight_format), load_tokenizer(folder)
    options = {"do_sample": False, "max_new_tokens": count}
    return [as_text(model.chat(tokenizer, prompt, history=[], **options)[0]) for prompt in prompts]


def parts(out: str) -> list[tuple[str, str]]:
    """(prompt, answer) of each block."""
    return re.findall(r"^prompt: (.*?)\nanswer: (.*?)\n\d+ tokens, ", out, re.MULTILINE | re.DOTALL)


def test_gen_chatglm_as_a_program(checkpoint: Path, tmp_path: Path) -> None:
    done = finish(spawn(sys.executable, TOOLS / "gen_chatglm.py", checkpoint, tmp_path / "out"))
    assert done.code == 0, done.err
    assert {"bf16", "int8", "config.json", "tokenizer.model"} < set(names(tmp_path / "out"))


def test_gen_chatglm_options(checkpoint: Path, tmp_path: Path, tool: Tool) -> None:
    formats = ["bf16", "int8", "int4", "f32"]
    done = tool("gen_chatglm", checkpoint, tmp_path / "out", "--weight-format", *formats, "--ops", "stock")
    assert done.code == 0
    assert set(formats) < set(names(tmp_path / "out"))
    assert "stock lowering" not in done.out
    assert tool("gen_chatglm", checkpoint, tmp_path / "out").error.endswith("or --overwrite")
    assert "invalid choice: 'int3'" in tool("gen_chatglm", checkpoint, tmp_path / "x", "--weight-format", "int3").error


def test_test_chatglm_as_a_program(checkpoint: Path, converted: Path) -> None:
    """Answers are greedy; USE_INT8_WEIGHT=1 takes the int8 weights."""
    prompts = ["床前明月光", "Write a function."]
    command = (sys.executable, TOOLS / "test_chatglm.py", checkpoint, converted, "--use=ov", "--max-new-tokens", 8)
    done = finish(spawn(*command, "--prompt", *prompts, env={"USE_INT8_WEIGHT": "1"}))
    assert done.code == 0, done.err
    assert parts(done.out) == list(zip(prompts, greedy(converted, "int8", prompts, 8), strict=True))


def test_test_chatglm_takes_bf16_and_its_own_prompts(
    checkpoint: Path, converted: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("USE_INT8_WEIGHT", raising=False)
    done = tool("test_chatglm", checkpoint, converted, "--max-new-tokens", 8)
    asked = [prompt for prompt, _ in parts(done.out)]
    assert any(prompt.isascii() for prompt in asked) and not all(prompt.isascii() for prompt in asked)
    assert parts(done.out) == list(zip(asked, greedy(converted, "bf16", asked, 8), strict=True))
    figures = FIGURES.findall(done.out)
    assert len(figures) == len(asked)
    for tokens, resident, anonymous in figures:
        assert int(tokens) == 8
        assert 0 < in_bytes(anonymous) < in_bytes(resident)


def test_test_chatglm_weight_format_is_stronger_than_the_environment(
    checkpoint: Path, converted: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USE_INT8_WEIGHT", "1")
    arguments = ("--prompt", "你好", "--max-new-tokens", 8)
    done = tool("test_chatglm", checkpoint, converted, *arguments, "--weight-format", "f32")
    assert [answer for _, answer in parts(done.out)] == greedy(converted, "f32", ["你好"], 8)


def test_test_chatglm_without_the_wanted_format(checkpoint: Path, converted: Path, tool: Tool) -> None:
    told = tool("test_chatglm", checkpoint, converted, "--weight-format", "int4").error
    assert "weight_format is 'int4'" in told


# The original through PyTorch


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that brings code: a model that repeats its prompt, with a tokenizer of characters."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    monkeypatch.delenv("REMOTE_CODE_WAS_RUN", raising=False)
    folder = copy_of(DATA / "remote_code", tmp_path / "remote")
    save_file({"scale": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_torch_has_no_weight_format(remote: Path, converted: Path, tool: Tool) -> None:
    told = tool("test_chatglm", remote, converted, "--use=torch", "--weight-format", "int8").error
    assert "--weight-format is for --use=ov" in told


def test_torch_needs_consent(remote: Path, converted: Path, tool: Tool) -> None:
    told = tool("test_chatglm", remote, converted, "--use=torch", "--prompt", "你好").error
    assert "--trust-remote-code is missing" in told
    assert "REMOTE_CODE_WAS_RUN" not in os.environ


def test_torch_runs_the_checkpoints_own_code(remote: Path, converted: Path, tool: Tool) -> None:
    arguments = ("--use=torch", "--trust-remote-code", "--prompt", "你好", "abc", "--max-new-tokens", 5)
    done = tool("test_chatglm", remote, converted, *arguments)
    assert done.code == 0, done.err
    assert parts(done.out) == [("你好", "你好你好你"), ("abc", "abcab")]
    assert len(FIGURES.findall(done.out)) == 2


def test_torch_code_that_fails_is_told_in_one_line(remote: Path, converted: Path, tool: Tool) -> None:
    code = remote / "modeling_echo.py"
    code.write_text("raise RuntimeError('too\\nold')\n" + code.read_text())
    arguments = ("test_chatglm", remote, converted, "--use=torch", "--trust-remote-code")
    assert "remote code is a failure (RuntimeError: too old), expected code that runs with" in tool(*arguments).error


def test_torch_for_a_checkpoint_without_code(checkpoint: Path, converted: Path, tmp_path: Path, tool: Tool) -> None:
    source = copy_of(checkpoint, tmp_path / "plain")
    config = json.loads((source / "config.json").read_text())
    del config["auto_map"]
    (source / "config.json").write_text(json.dumps(config))
    told = tool("test_chatglm", source, converted, "--use=torch", "--trust-remote-code").error
    assert "auto_map is missing" in told


def test_torch_has_classes_of_its_own_for_glm(tmp_path: Path, tool: Tool) -> None:
    source = fast_folder(saved(reference("glm", vocab_size=480), tmp_path / "checkpoint"))
    folder = convert(source, tmp_path / "out", ("f32",), progress=False)
    told = tool("test_chatglm", source, folder, "--use=torch", "--prompt", "你好", "--max-new-tokens", 5)
    assert told.code == 0, told.err
    assert [answer for _, answer in parts(told.out)] == greedy(folder, "f32", ["你好"], 5)


def test_test_chatglm_takes_the_only_format(checkpoint: Path, tmp_path: Path, tool: Tool) -> None:
    folder = convert(checkpoint, tmp_path / "out", ("int4",), progress=False)
    done = tool("test_chatglm", checkpoint, folder, "--prompt", "你好", "--max-new-tokens", 3)
    assert done.code == 0 and "has no bf16: int4" in done.err


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("evaluate_demo", ["demo"]),
        ("train_demo", ["--evaluate-only", "--output", "demo"]),
        ("make_calibration_text", ["text.jsonl.xz"]),
    ],
)
def test_tools_of_the_demo_tell_a_missing_file_in_one_line(name: str, arguments: list[str], tmp_path: Path) -> None:
    command = (sys.executable, TOOLS / f"{name}.py", *arguments, "--data", tmp_path)
    assert "tang300.jsonl: No such file" in finish(spawn(*command, cwd=tmp_path)).error
    assert not list(tmp_path.iterdir())
