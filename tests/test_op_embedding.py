"""Embedding and EmbeddingRows."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import openvino as ov
import openvino.opset15 as opset
import pytest
from operations import compiled, create, needs_library, packed_int8, parameter, weight_attributes

pytestmark = needs_library


def test_embedding_reads_rows_of_a_packed_weight():
    layout, payload, weight = packed_int8(np.random.default_rng(1), 50, 24)
    ids = parameter([-1, -1], np.int32)
    node = create("Embedding", [ids.output(0), opset.constant(payload).output(0)], weight_attributes(layout))
    seen = compiled([node.output(0)], [ids])([np.array([[0, 49], [7, 7]], np.int32)])[0]
    np.testing.assert_allclose(seen, weight[[[0, 49], [7, 7]]], rtol=1e-6)


@pytest.mark.parametrize("element_type", ["f32", "bf16", "i8"])
def test_rows_of_an_embedding(element_type):
    """As OpenVINO's own Gather, Convert and Multiply compute them, bit for bit."""
    rng = np.random.default_rng(4)
    stored = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "i8": np.int8}[element_type]
    table = (rng.standard_normal((50, 40)) * 30).astype(stored)
    scales = rng.random((50, 1), np.float32)
    ids = parameter([-1, -1], np.int32)
    parts = [opset.constant(ov.Tensor(table.view(np.uint16), table.shape, ov.Type.bf16)) if element_type == "bf16"
             else opset.constant(table)]  # fmt: skip
    parts += [opset.constant(scales)] if element_type == "i8" else []
    inputs = [ids.output(0), *(part.output(0) for part in parts)]
    node = create("EmbeddingRows", inputs, {"hidden_size": 40})
    model = compiled([node.output(0)], [ids])
    for picked in ([[0, 49], [7, 7]], [[3]], [list(range(50))]):
        wanted = table[picked].astype(np.float32) * (scales[picked] if element_type == "i8" else np.float32(1))
        np.testing.assert_array_equal(model([np.array(picked, np.int32)])[0], wanted)


def test_an_embedding_that_cannot_be_read_is_refused():
    ids = parameter([-1, -1], np.int32).output(0)
    floats, bytes_, scales = (
        opset.constant(array).output(0)
        for array in (np.ones((9, 8), np.float32), np.ones((9, 8), np.int8), np.ones((9, 1), np.float32))
    )
    for inputs, hidden_size, message in (
        ([ids, bytes_], 8, "a weight of i8, wanted f32 or bf16"),
        ([ids, floats, scales], 8, "a weight of f32, wanted f32 or bf16, or i8 with scales"),
        ([ids, floats], 7, "wanted a last dimension of 7"),
        ([ids, floats], -1, "hidden_size -1, wanted a positive number"),
        ([ids, bytes_, floats], 8, "wanted 9 elements"),
    ):
        with pytest.raises(RuntimeError, match=message):
            create("EmbeddingRows", inputs, {"hidden_size": hidden_size})
    node = create("EmbeddingRows", [ids, floats], {"hidden_size": 8})
    model = compiled([node.output(0)], [ids.get_node()])
    for wrong in (-1, 9):
        with pytest.raises(RuntimeError, match=f"token id {wrong}, wanted 0 to 8"):
            model([np.array([[wrong]], np.int32)])
