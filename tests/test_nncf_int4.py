"""tools/nncf_int4.py: its inputs are the model's; where NNCF is installed, what it makes is a converted folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from chatglm_ov import convert
from chatglm_ov.cli.demo import CHECKPOINT
from chatglm_ov.runtime.ir_reading import core, read_ir
from chatglm_ov.runtime.loading import load_model
from chatglm_ov.weights.ir import IR_NAME


@pytest.fixture
def tool(import_tool):
    return import_tool("nncf_int4")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(CHECKPOINT, tmp_path_factory.mktemp("demo") / "out", ("f32",), "stock", progress=False)


def test_inputs_are_those_of_the_model(tool, stock: Path):
    graph = read_ir(stock / "f32" / IR_NAME)
    items = tool.inputs_of(stock, {port.any_name for port in graph.inputs})
    assert sum(item["input_ids"].size for item in items) == 16384
    f32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    item, logits = items[0], core().compile_model(graph, "CPU", f32)(items[0])["logits"]
    request = load_model(stock, "f32", "f32").create_request()
    wanted = request.infer(item["input_ids"], item["attention_mask"], item["position_ids"], item["beam_idx"])
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4)


def test_result_is_a_converted_folder(tool, stock: Path, tmp_path: Path):
    pytest.importorskip("nncf", reason="NNCF is not installed: what it makes is not tried")
    tool.compress(stock, tmp_path / "out", "plain")
    assert load_model(tmp_path / "out").weight_format == "int4"
