"""The native library's operations by name, for models of one or a few of them, and what their tests share."""

from __future__ import annotations

from functools import cache

import numpy as np
import openvino as ov
import openvino.opset15 as opset
import pytest
from inference import Inference
from openvino.utils.node_factory import NodeFactory

from chatglm_ov.native import library_path, native, unavailable

needs_library = pytest.mark.skipif(unavailable() is not None, reason=f"no native library: {unavailable()}")


@cache
def _core():
    core = ov.Core()
    core.add_extension(library_path())
    return core


@cache
def _factory():
    factory = NodeFactory("opset15")
    factory.add_extension(library_path())
    return factory


def create(name, inputs, attributes=None):
    """An operation; its inputs are outputs of other nodes."""
    return _factory().create(name, inputs, attributes or {})


def parameter(shape, element_type=np.float32):
    return opset.parameter(list(shape), element_type)


def compiled(outputs, parameters, sinks=()):
    model = ov.Model([opset.result(o) for o in outputs], list(sinks), list(parameters))
    return Inference(_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}))


def packed_int8(rng, n, k):
    layout = native().PackedLayout("int8", n, k)
    codes = rng.integers(-127, 128, (n, k), dtype=np.int8)
    scale = rng.uniform(0.5, 2, n).astype(np.float32) / 127
    payload = np.zeros(layout.bytes, np.uint8)
    layout.pack(codes, payload[: layout.scale_offset])
    payload[layout.scale_offset :].view(np.float32)[:n] = scale
    return layout, payload, codes * scale[:, None].astype(np.float64)


def weight_attributes(layout):
    return {"format": "int8", "in_features": layout.in_features, "out_features": layout.out_features}


def rotated(x, angles):
    """Rotate-half over the first 2 n dims of the last axis; angles [..., n]."""
    n = angles.shape[-1]
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles), rest], -1)
