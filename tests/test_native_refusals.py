"""Shapes that do not fit, and indices that are not there: each operation says so instead of reading something else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import openvino as ov
import openvino.opset15 as opset
import pytest
from inference import Inference
from openvino.utils.node_factory import NodeFactory

from chatglm_ov.native import library_path, native, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no native library: {unavailable()}")

D = 16
Array = np.ndarray
Run = Callable[..., list[Array]]


def floats(*shape: int) -> Array:
    return np.ones(shape, np.float32)


def ints(*shape: int, value: int = 0) -> Array:
    return np.full(shape, value, np.int32)


@pytest.fixture(scope="module")
def run() -> Run:
    """Function from an operation's name, its inputs and its attributes to the outputs. Inputs are parameters of unknown
    sizes, except those at `constants`."""
    core, factory = ov.Core(), NodeFactory("opset15")
    core.add_extension(library_path())
    factory.add_extension(library_path())

    def result(name: str, inputs: list[Array], constants: tuple[int, ...] = (), **attributes: object) -> list[Array]:
        nodes = [
            opset.constant(x) if i in constants else opset.parameter([-1] * x.ndim, x.dtype)
            for i, x in enumerate(inputs)
        ]
        node = factory.create(name, [each.output(0) for each in nodes], attributes)
        given = [i for i in range(len(inputs)) if i not in constants]
        model = ov.Model([opset.result(output) for output in node.outputs()], [nodes[i] for i in given])
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return Inference(compiled)([inputs[i] for i in given])

    return result


@pytest.mark.parametrize("constants", [(), (1, 2)])
@pytest.mark.parametrize(
    ("kind", "shapes", "message"),
    [
        ("rms", [(32,)], "Norm: .*32"),
        ("rms", [(128,)], "Norm: .*128"),
        ("rms", [(0,)], "Norm: "),
        ("layer", [(64,), (1,)], "Norm: .*wanted 64"),
    ],
)
def test_norm(run: Run, kind: str, shapes: list, message: str, constants: tuple[int, ...]) -> None:
    inputs = [floats(1, 2, 64), *(floats(*shape) for shape in shapes)]
    attributes = {"kind": kind, "eps": 1e-5, "residual": 0}
    with pytest.raises(RuntimeError, match=message):
        run("Norm", inputs, constants[: len(shapes)], **attributes)


@pytest.mark.parametrize(
    ("weight", "scales", "message"),
    [
        (floats(64), None, "wanted 2 dimensions"),
        (np.ones((9, 8), np.int8), floats(1, 1), "wanted 9 elements"),
        (np.ones((9, 8), np.int8), floats(10, 1), "wanted 9 elements"),
        (np.ones((9, 8), np.int8), floats(9, 8), "wanted 9 elements"),
    ],
)
def test_rows_of_an_embedding(run: Run, weight: Array, scales: Array | None, message: str) -> None:
    inputs = [ints(1, 1), weight, *([] if scales is None else [scales])]
    with pytest.raises(RuntimeError, match=message):
        run("EmbeddingRows", inputs, (1, 2)[: len(inputs) - 1], hidden_size=weight.shape[-1])


@pytest.mark.parametrize("features", [(1 << 62, 64), (64, 1 << 62), (1 << 29, 64), (0, 64)])
def test_sizes_of_a_packed_weight(run: Run, features: tuple[int, int]) -> None:
    attributes = {"format": "int8", "out_features": features[0], "in_features": features[1]}
    for name, x in (("Embedding", ints(1, 1)), ("FullyConnected", floats(1, 1, 64))):
        with pytest.raises(RuntimeError, match=r"weight: .*wanted sizes of 1 to 268435456"):
            run(name, [x, np.zeros(1088, np.uint8)], (1,), **attributes)


@pytest.mark.parametrize(
    ("x", "cos", "sin"),
    [
        (floats(1, 40, D), floats(1, 1, 8), floats(1, 1, 8)),
        (floats(1, 40, D), floats(1, 40, 8), floats(1, 39, 8)),
        (floats(1, 40, D), floats(1, 40, 9), floats(1, 40, 9)),
        (floats(1, 40, D + 1), floats(1, 40, 8), floats(1, 40, 8)),
        (floats(40, D), floats(40, 8), floats(40, 8)),
    ],
)
def test_rotary_embedding(run: Run, x: Array, cos: Array, sin: Array) -> None:
    with pytest.raises(RuntimeError, match=r"RotaryEmbedding: .*wanted"):
        run("RotaryEmbedding", [x, cos, sin], head_dim=D)


@pytest.mark.parametrize("flat", range(3))
def test_cache_table(run: Run, flat: int) -> None:
    inputs = [ints(1, 4), ints(1, 4), ints(1, 4), ints(1)]
    inputs[flat] = ints(4)
    with pytest.raises(RuntimeError, match=f"CacheTable: input {flat} of shape .*wanted 2 dimensions"):
        run("CacheTable", inputs, prefix=0)


def attention(
    run: Run,
    slot: int,
    visible: int,
    table: int = 1,
    blocks: int = 1,
    batch: int = 1,
    length: int = 1,
    row: int = 0,
    copied: int = -1,
) -> Array:
    block = native().CacheLayout("f32", 1, D).block_bytes
    inputs = [
        floats(batch, length, 4 * D),
        floats(batch, length, 8),
        floats(batch, length, 8),
        ints(batch, table, value=row),
    ]
    inputs += [ints(batch, length, value=slot), ints(batch, length, value=visible), ints(batch, value=copied)]
    inputs += [np.zeros((1, blocks, 1, block), np.uint8)]
    attributes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": D, "in_place": 0}
    return run("MultiHeadAttention", inputs, **attributes)[0]


@pytest.mark.parametrize(
    ("slot", "visible", "sizes", "message"),
    [
        (3, 1 << 20, {}, "1048576 visible slots in row 0, wanted at most 4"),
        (3, 5, {"blocks": 2, "table": 2}, "5 visible slots in row 0, wanted at most 4"),
        (32, 4, {"blocks": 2}, "33 slots in row 0, wanted at most 32"),
        (2**31 - 1, 4, {"blocks": 2}, "2147483648 slots in row 0, wanted at most 32"),
        (3, 4, {"blocks": 0}, "4 slots in row 0, wanted at most 0"),
        (3, 4, {"table": 0}, "4 slots in row 0, wanted at most 0"),
        (3, 4, {"row": 1}, "row 1, wanted less than 1"),
        (3, 4, {"copied": 1}, "row 1, wanted less than 1"),
        (3, 4, {"copied": -2}, "row -2, wanted less than 1"),
    ],
)
def test_slots_of_attention(run: Run, slot: int, visible: int, sizes: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"KV cache: {message}"):
        attention(run, slot, visible, **sizes)


def test_attention_of_nothing(run: Run) -> None:
    assert attention(run, 3, 4).shape == (1, 1, 2 * D)
    assert attention(run, 3, 4, batch=0).shape == (0, 1, 2 * D)
    assert attention(run, 3, 4, length=0).shape == (1, 0, 2 * D)
