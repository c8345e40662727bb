"""Folders of stock operations in OpenVINO GenAI: its stateful pipeline, and the one with paged attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
import pytest
import torch
from glm_models import EDGE, reference, saved
from golden_cases import V1, V2

from chatglm_ov import OVChatGLMForCausalLM, convert
from chatglm_ov.passes.last_rows import add_logits_to_keep
from chatglm_ov.weights.choices import FormatChoices
from chatglm_ov.weights.ir import IR_NAME

F32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
MODELS: dict[str, Callable[[Path], Path]] = {
    "chatglm2": lambda folder: V2.checkpoint,
    "glm": lambda folder: saved(reference("glm"), folder),
    "glm, tied": lambda folder: saved(reference("glm", **EDGE), folder),
    "glm4": lambda folder: saved(reference("glm4"), folder),
}
each_model = pytest.mark.parametrize("name", MODELS)
PROMPT = [[5, 6, 7, 8, 9, 10, 11, 25, 42]]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def convert_once(name: str) -> Path:
        made, formats = tmp_path_factory.mktemp("genai"), ("f32", "bf16", "int8", "int4")
        choices = FormatChoices(group_size=32, lm_head_format="int4") if "tied" in name else FormatChoices()
        return convert(
            MODELS[name](made / "checkpoint"), made / "ov", formats, "stock", choices=choices, progress=False
        )

    return convert_once


def pipeline(folder: Path, backend: str, weight_format: str = "f32") -> genai.LLMPipeline:
    return genai.LLMPipeline(folder / weight_format, "CPU", ATTENTION_BACKEND=backend, **F32)


def settings(count: int) -> genai.GenerationConfig:
    config = genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.apply_chat_template = count, False, False
    # No token ends a text: all that are asked for are made.
    config.ignore_eos, config.eos_token_id, config.stop_token_ids = True, 0, {0}
    return config


@pytest.mark.parametrize("backend", ["SDPA", "PA"])
@pytest.mark.parametrize("weight_format", ["f32", "bf16", "int8", "int4"])
@each_model
def test_tokens_are_those_of_generate(
    name: str, weight_format: str, backend: str, folder_of: Callable[[str], Path]
) -> None:
    """Greedy, in f32: 24 tokens, so that what is in the cache is read as well. The tied table is int4 with int4."""
    folder = folder_of(name)
    model = OVChatGLMForCausalLM.from_pretrained(folder, weight_format, "f32")
    wanted = model.generate(torch.tensor(PROMPT), max_new_tokens=24, do_sample=False, eos_token_id=-1)
    found = pipeline(folder, backend, weight_format).generate(ov.Tensor(np.array(PROMPT)), settings(24))
    assert found.tokens == wanted[:, len(PROMPT[0]) :].tolist()


def test_rows_of_a_padded_batch(folder_of: Callable[[str], Path]) -> None:
    made = pipeline(folder_of("chatglm2"), "SDPA")
    ids = np.array([[0, 0, 0, 5, 6, 7], [8, 9, 10, 11, 25, 42]])
    mask = np.array([[0, 0, 0, 1, 1, 1], [1] * 6])
    batch = made.generate(genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(mask)), settings(8)).tokens
    alone = [made.generate(ov.Tensor(ids[i : i + 1, ids[i] > 0]), settings(8)).tokens[0] for i in (0, 1)]
    assert batch == alone


def input_names(model: ov.Model) -> set[str]:
    return {port.any_name for port in model.inputs}


@each_model
def test_inputs_are_those_that_genai_knows(name: str, folder_of: Callable[[str], Path]) -> None:
    model = ov.Core().read_model(folder_of(name) / "f32" / IR_NAME)
    wanted = {"input_ids", "attention_mask", "position_ids", "beam_idx"}
    assert input_names(model) == wanted
    for _ in range(2):
        # A folder may have the input already.
        add_logits_to_keep(model)
        assert input_names(model) == {*wanted, "logits_to_keep"}


def test_chatglm_6b_has_inputs_of_its_own(tmp_path: Path) -> None:
    """A prefix, and two rows of positions, which GenAI does not make."""
    folder = convert(V1.checkpoint, tmp_path / "ov", ("f32",), "stock", progress=False)
    assert "prefix_length" in input_names(ov.Core().read_model(folder / "f32" / IR_NAME))
    with pytest.raises(RuntimeError, match="you have '5' inputs"):
        pipeline(folder, "SDPA").generate(ov.Tensor(np.array(PROMPT)), settings(8))
