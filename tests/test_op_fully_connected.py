"""FullyConnected in a model, with the norm before it; the kernels have tests of their own."""

from __future__ import annotations

import numpy as np
import openvino.opset15 as opset
import pytest
from operations import compiled, create, needs_library, packed_int8, parameter, weight_attributes

from chatglm_ov.native import native

pytestmark = needs_library


def test_fully_connected_in_a_model():
    rng = np.random.default_rng(0)
    layout, payload, weight = packed_int8(rng, 40, 70)
    bias = np.zeros(16 * layout.panels, np.float32)
    bias[:40] = rng.standard_normal(40)
    x, residual = parameter([-1, -1, 70]), parameter([-1, -1, 40])
    attributes = weight_attributes(layout) | {"y_features": 40, "bias": 1, "residual": 1, "residual_scale": 2.5}
    constants = [opset.constant(payload), opset.constant(bias)]
    inputs = [x, *constants, residual]
    node = create("FullyConnected", [i.output(0) for i in inputs], attributes)
    model = compiled([node.output(0)], [x, residual])
    a = rng.standard_normal((2, 3, 70)).astype(np.float32)
    r = rng.standard_normal((2, 3, 40)).astype(np.float32)
    seen = model([a, r])[0]
    wanted = a.astype(np.float64) @ weight.T + bias[:40] + 2.5 * r
    step = np.abs(a).max(axis=-1, keepdims=True) / 32639
    bound = step / 2 * np.abs(weight).sum(axis=1) + 1e-5 * (np.abs(a) @ np.abs(weight).T + np.abs(wanted))
    assert (np.abs(seen - wanted) <= bound).all()
    with pytest.raises(RuntimeError, match=r"FullyConnected: a residual of .* wanted 6 rows of 40"):
        model([a, r[:1]])


def test_a_gate_beside_nothing_is_refused():
    layout, payload, _ = packed_int8(np.random.default_rng(0), 16, 64)
    attributes = weight_attributes(layout) | {"y_features": 8, "activation": "silu_gate"}
    with pytest.raises(RuntimeError, match="1 panels of a gate and what it multiplies"):
        create("FullyConnected", [parameter([1, 64]).output(0), opset.constant(payload).output(0)], attributes)
    with pytest.raises(ValueError, match="panels are not as many of the gate"):
        x = np.ones((1, 64), np.float32)
        native().fully_connected("avx2", layout, payload, x, y_features=8, activation="silu_gate")


@pytest.mark.parametrize("rows", [1, 3, 70, 600])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_fully_connected_with_the_norm_before_it(kind, rows):
    """Bit for bit what the two operations give; more rows than are multiplied at once, too."""
    rng = np.random.default_rng(rows)
    layout, payload, _ = packed_int8(rng, 40, 70)
    values = rng.standard_normal((1, rows, 70)).astype(np.float32) * 3 + 1
    bias = np.zeros(16 * layout.panels, np.float32)
    bias[:40] = rng.standard_normal(40)
    norms = list(rng.standard_normal((1 if kind == "rms" else 2, 70)).astype(np.float32))
    x, norms = parameter([-1, -1, 70]), [opset.constant(each) for each in norms]
    rest = [opset.constant(payload), opset.constant(bias)]
    attributes = weight_attributes(layout) | {"y_features": 40, "bias": 1}
    apart = create("Norm", [i.output(0) for i in (x, *norms)], {"kind": kind, "eps": 1e-3})
    behind = create("FullyConnected", [i.output(0) for i in (apart, *rest)], attributes)
    attributes |= {"norm": kind, "norm_eps": 1e-3}
    fused = create("FullyConnected", [i.output(0) for i in (x, *rest, *norms)], attributes)
    two, one = compiled([behind.output(0), fused.output(0)], [x])([values])
    np.testing.assert_array_equal(one, two)


def test_a_norm_that_does_not_fit_is_refused():
    layout, payload, _ = packed_int8(np.random.default_rng(0), 16, 64)
    attributes = weight_attributes(layout) | {"y_features": 16}
    inputs = [parameter([-1, 64]).output(0), opset.constant(payload).output(0)]
    short = opset.constant(np.ones(63, np.float32)).output(0)
    for wrong, more, message in (
        ("group", [], "norm 'group', wanted none, rms or layer"),
        ("rms", [], "2 inputs, wanted 3"),
        ("layer", [short], "3 inputs, wanted 4"),
        ("rms", [short], "wanted 64 elements"),
    ):
        with pytest.raises(RuntimeError, match=message):
            create("FullyConnected", [*inputs, *more], attributes | {"norm": wrong})
