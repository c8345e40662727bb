"""Norm and RotaryEmbedding."""

from __future__ import annotations

import numpy as np
import openvino.opset15 as opset
import pytest
from operations import compiled, create, needs_library, parameter, rotated

from chatglm_ov.native import native

pytestmark = needs_library


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm(kind, residual):
    rng = np.random.default_rng(2)
    values = rng.standard_normal((2, 3, 37)).astype(np.float32) * 3 + 1
    weight, bias = rng.standard_normal((2, 37)).astype(np.float32)
    x = parameter([-1, -1, 37])
    constants = [weight] if kind == "rms" else [weight, bias]
    inputs = [x.output(0), *(opset.constant(c).output(0) for c in constants)]
    added = rng.standard_normal((2, 3, 37)).astype(np.float32)
    others = [parameter([-1, -1, 37])] if residual else []
    inputs += [other.output(0) for other in others]
    node = create("Norm", inputs, {"kind": kind, "eps": 1e-5, "residual": int(residual)})
    seen = compiled([node.output(0)], [x, *others])([values, added][: 1 + residual])[0]
    v = values.astype(np.float64)
    if kind == "rms":
        wanted = v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-5) * weight
    else:
        wanted = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-5) * weight + bias
    atol = 37 * 2**-23 * np.abs(wanted).max()
    np.testing.assert_allclose(seen, wanted + added if residual else wanted, rtol=0, atol=atol)


def test_a_residual_of_another_shape_is_refused():
    inputs = [parameter(shape).output(0) for shape in ([1, 3, 37], [37], [1, 3, 36])]
    with pytest.raises(RuntimeError, match="a residual of shape"):
        create("Norm", inputs, {"kind": "rms", "eps": 1e-5, "residual": 1})


def test_rotary_embedding():
    head_dim = 16
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 3, 4 * head_dim)).astype(np.float32)
    angles = rng.uniform(-3, 3, (2, 3, 4)).astype(np.float32)
    inputs = [parameter([-1, -1, 4 * head_dim]), parameter([-1, -1, 4]), parameter([-1, -1, 4])]
    node = create("RotaryEmbedding", [i.output(0) for i in inputs], {"head_dim": head_dim})
    seen = compiled([node.output(0)], inputs)([x, np.cos(angles), np.sin(angles)])[0]
    wanted = rotated(x.reshape(2, 3, 4, head_dim).astype(np.float64), angles[:, :, None]).reshape(2, 3, -1)
    np.testing.assert_allclose(seen, wanted, rtol=0, atol=4 * 2**-23 * np.abs(x).max())


def test_another_packing_version_is_refused():
    x = parameter([-1, -1, 37])
    inputs = [x.output(0), opset.constant(np.ones(37, np.float32)).output(0)]
    version = native().PACKING_VERSION + 1
    with pytest.raises(RuntimeError, match=f"packing_version {version}, wanted {version - 1}"):
        create("Norm", inputs, {"kind": "rms", "eps": 1e-5, "packing_version": version})
