"""LastRows."""

from __future__ import annotations

import numpy as np
import openvino.opset15 as opset
import pytest
from operations import compiled, create, needs_library, parameter

from chatglm_ov.native import native

pytestmark = needs_library


@pytest.mark.parametrize("chained", [False, True])
def test_last_rows(chained):
    """Alone, and with a norm before and behind it as a chain: all for 0 and for more than there are, the shapes going
    up and down."""
    rng = np.random.default_rng(8)
    x, count = parameter([-1, -1, 24]), parameter([1], np.int32)
    ones = opset.constant(np.ones(24, np.float32)).output(0)
    if chained:
        norm = f"kind=rms eps=0.25 residual=0 packing_version={native().PACKING_VERSION}"
        version = f"packing_version={native().PACKING_VERSION}"
        steps = [f"Norm 0 1 {norm}", f"LastRows @0 2 {version}", f"Norm @1 1 {norm}"]
        inputs = [x.output(0), ones, count.output(0)]
        node = create("Chain", inputs, {"steps": steps, "results": [2]})
    else:
        node = create("LastRows", [x.output(0), count.output(0)])
    assert node.get_output_partial_shape(0).to_string() == "[?,?,24]"
    model = compiled([node.output(0)], [x, count])
    for rows, length, wanted in ((2, 5, 2), (1, 9, 0), (3, 4, 4), (2, 3, 8), (1, 1, 1), (2, 7, 1)):
        values = rng.standard_normal((rows, length, 24)).astype(np.float32)
        kept = values[:, -wanted:] if 0 < wanted < length else values
        seen = model([values, np.array([wanted], np.int32)])[0]
        if chained:
            for _ in range(2):
                kept = kept / np.sqrt((kept**2).mean(-1, keepdims=True) + 0.25)
            np.testing.assert_allclose(seen, kept, rtol=1e-5)
        else:
            np.testing.assert_array_equal(seen, kept)


def test_last_rows_of_something_else_are_refused():
    x, flat, count = parameter([-1, -1, 24]), parameter([-1, 24]), parameter([1], np.int32)
    for inputs, message in (
        ((flat, count), r"wanted \[B, L, C\]"),
        ((x, x), "input 1 is f32, wanted i32"),
        ((x,), "wanted 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            create("LastRows", [node.output(0) for node in inputs])
