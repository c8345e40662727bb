"""tools/nncf_int4.py: its inputs are the model's; where NNCF is installed, what it makes is a converted folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from chatglm_ov import convert
from chatglm_ov.cli.demo import CHECKPOINT
from chatglm_ov.runtime import load_model


@pytest.fixture
def tool(import_tool):
    return import_tool("nncf_int4")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(CHECKPOINT, tmp_path_factory.mktemp("demo") / "out", ("f32",), "stock", progress=False)


def test_inputs_are_those_of_the_model(tool, stock: Path):
    model = load_model(stock, "f32", "f32")
    items = tool.inputs_of(stock, {port.any_name for port in model.compiled.inputs})
    assert sum(item["input_ids"].size for item in items) == 16384
    request = model.compiled.create_infer_request()
    request.infer(items[0])
    item = items[0]
    wanted = model.create_request().infer(
        item["input_ids"], item["attention_mask"], item["position_ids"], item["beam_idx"], 1
    )
    np.testing.assert_array_equal(request.get_tensor("logits").data, wanted)


def test_result_is_a_converted_folder(tool, stock: Path, tmp_path: Path):
    pytest.importorskip("nncf", reason="NNCF is not installed: what it makes is not tried")
    tool.compress(stock, tmp_path / "out", "plain")
    assert load_model(tmp_path / "out").weight_format == "int4"
