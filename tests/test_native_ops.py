"""The operations of the extension library inside OpenVINO models."""

from __future__ import annotations

import gc

import ml_dtypes
import numpy as np
import openvino as ov
import openvino.opset15 as opset
import pytest
from inference import Inference
from openvino.op.util import Variable, VariableInfo
from openvino.utils.node_factory import NodeFactory

from chatglm_ov.native import library_path, native, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no native library: {unavailable()}")

H, G, D = 8, 2, 16
WIDTH = (H + 2 * G) * D


@pytest.fixture(scope="module")
def core():
    core = ov.Core()
    core.add_extension(library_path())
    return core


@pytest.fixture(scope="module")
def factory():
    factory = NodeFactory("opset15")
    factory.add_extension(library_path())
    return factory


def parameter(shape, element_type=np.float32):
    return opset.parameter(list(shape), element_type)


def compiled(core, outputs, parameters, sinks=()):
    model = ov.Model([opset.result(o) for o in outputs], list(sinks), list(parameters))
    return Inference(core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}))


# CacheTable


@pytest.fixture(scope="module")
def cache_table(core, factory):
    def build(prefix):
        inputs = [parameter([-1, -1], np.int32) for _ in range(3)] + [parameter([-1], np.int32)]
        inputs += [parameter([-1], np.int32)] if prefix else []
        node = factory.create("CacheTable", [i.output(0) for i in inputs], {"prefix": int(prefix)})
        model = compiled(core, [node.output(i) for i in range(3)], inputs)
        return lambda *arrays: model([np.ascontiguousarray(a, np.int32) for a in arrays])

    return {prefix: build(prefix) for prefix in (False, True)}


def test_padding_takes_no_slot(cache_table):
    mask = [[0, 0, 1, 1], [1, 1, 1, 1]]
    table, slots, visible = cache_table[False](np.zeros((2, 0)), mask, np.zeros((2, 4)), [0, 1])
    assert slots.tolist() == [[-1, -1, 0, 1], [0, 1, 2, 3]]
    assert visible.tolist() == [[0, 0, 1, 2], [1, 2, 3, 4]]
    assert table[0, :2].tolist() == [0, 0]
    assert table[1].tolist() == [1, 1, 1, 1]


def test_a_hole_in_the_mask_takes_no_slot(cache_table):
    _, slots, visible = cache_table[False](np.zeros((1, 0)), [[1, 0, 1]], np.zeros((1, 3)), [0])
    assert slots.tolist() == [[0, -1, 1]]
    assert visible.tolist() == [[1, 0, 2]]


def test_columns_before_the_prefix_are_seen_by_all(cache_table):
    mask, ids = [[0, 1, 1, 1], [1, 1, 1, 1]], np.zeros((2, 4))
    _, _, visible = cache_table[True](np.zeros((2, 0)), mask, ids, [0, 1], [3, 2])
    assert visible.tolist() == [[0, 2, 2, 3], [2, 2, 3, 4]]


def test_a_row_goes_on_from_another_without_moving_it(cache_table):
    past = [[0, 0, 0], [1, 1, 1]]
    table, slots, _ = cache_table[False](past, np.ones((2, 4)), np.zeros((2, 1)), [1, 1])
    assert table[:, :3].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert sorted(table[:, 3].tolist()) == [0, 1]
    assert slots.tolist() == [[3], [3]]


def test_swapped_rows_of_unequal_length_keep_what_each_refers_to(cache_table):
    mask = [[1] * 4, [0, 0, 1, 1]]
    past, _, _ = cache_table[False](np.zeros((2, 0)), mask, np.zeros((2, 4)), [0, 1])
    mask = [[0, 0, 1, 1, 1], [1] * 5]
    table, slots, _ = cache_table[False](past, mask, np.zeros((2, 1)), [1, 0])
    assert slots.tolist() == [[2], [4]]
    # Row 0 of the cache holds the longer sequence's slot 2.
    assert table[0, :3].tolist() == [1, 1, 1]
    assert table[1].tolist()[:4] == [0, 0, 0, 0]


def test_more_rows_than_before(cache_table):
    table, slots, _ = cache_table[False]([[0, 0]], np.ones((3, 3)), np.zeros((3, 1)), [0, 0, 0])
    assert table[:, :2].tolist() == [[0, 0]] * 3
    assert sorted(table[:, 2].tolist()) == [0, 1, 2]
    assert slots.tolist() == [[2]] * 3


def test_going_back_drops_the_later_slots(cache_table):
    table, slots, _ = cache_table[False]([[0] * 6], np.ones((1, 4)), np.zeros((1, 2)), [0])
    assert table.shape == (1, 4)
    assert slots.tolist() == [[2, 3]]


@pytest.mark.parametrize("seed", range(5))
def test_no_two_sequences_ever_write_the_same_slot(cache_table, seed):
    """Random reorders of unequal rows: what a sequence wrote is what it reads, as if each had a cache of its own."""
    rng = np.random.default_rng(seed)
    rows, prompt = 4, 5
    keep = np.arange(prompt) >= rng.integers(0, prompt, (rows, 1))
    table, slots, _ = cache_table[False](np.zeros((rows, 0)), keep, np.zeros((rows, prompt)), np.arange(rows))
    cache, own = {}, [[] for _ in range(rows)]
    stamp = 0

    def write():
        nonlocal stamp
        for row in range(rows):
            for slot in slots[row][slots[row] >= 0]:
                stamp += 1
                cache[(table[row, slot], slot)] = stamp
                own[row] = [*own[row][:slot], stamp]

    write()
    for _ in range(20):
        order = rng.integers(0, rows, rows)
        keep = np.concatenate([keep[order], np.ones((rows, 1), bool)], axis=1)
        own = [list(own[i]) for i in order]
        table, slots, _ = cache_table[False](table, keep, np.zeros((rows, 1)), order)
        write()
        for row in range(rows):
            assert [cache[(table[row, s], s)] for s in range(len(own[row]))] == own[row]


def test_a_row_that_is_not_there_is_refused(cache_table):
    with pytest.raises(RuntimeError, match="goes on from row 3"):
        cache_table[False]([[0, 0]], np.ones((1, 3)), np.zeros((1, 1)), [3])


@pytest.mark.parametrize(
    ("mask", "ids", "beam_idx", "prefix"),
    [((2, 3), (2, 5), 2, 2), ((2, 3), (1, 3), 2, 2), ((2, 3), (2, 3), 1, 2), ((2, 3), (2, 3), 2, 1)],
)
def test_inputs_of_a_table_that_do_not_fit_are_refused(cache_table, mask, ids, beam_idx, prefix):
    with pytest.raises(RuntimeError, match=r"CacheTable: .* wanted"):
        cache_table[True](np.zeros((2, 0)), np.ones(mask), np.zeros(ids), np.zeros(beam_idx), np.zeros(prefix))


# FullyConnected, Embedding, Norm, RotaryEmbedding


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


def test_fully_connected_in_a_model(core, factory):
    rng = np.random.default_rng(0)
    layout, payload, weight = packed_int8(rng, 40, 70)
    bias = np.zeros(16 * layout.panels, np.float32)
    bias[:40] = rng.standard_normal(40)
    x, residual = parameter([-1, -1, 70]), parameter([-1, -1, 40])
    attributes = weight_attributes(layout) | {"y_features": 40, "bias": 1, "residual": 1, "residual_scale": 2.5}
    constants = [opset.constant(payload), opset.constant(bias)]
    inputs = [x, *constants, residual]
    node = factory.create("FullyConnected", [i.output(0) for i in inputs], attributes)
    model = compiled(core, [node.output(0)], [x, residual])
    a = rng.standard_normal((2, 3, 70)).astype(np.float32)
    r = rng.standard_normal((2, 3, 40)).astype(np.float32)
    seen = model([a, r])[0]
    wanted = a.astype(np.float64) @ weight.T + bias[:40] + 2.5 * r
    step = np.abs(a).max(axis=-1, keepdims=True) / 32639
    bound = step / 2 * np.abs(weight).sum(axis=1) + 1e-5 * (np.abs(a) @ np.abs(weight).T + np.abs(wanted))
    assert (np.abs(seen - wanted) <= bound).all()
    with pytest.raises(RuntimeError, match=r"FullyConnected: a residual of .* wanted 6 rows of 40"):
        model([a, r[:1]])


def test_a_gate_beside_nothing_is_refused(factory):
    layout, payload, _ = packed_int8(np.random.default_rng(0), 16, 64)
    attributes = weight_attributes(layout) | {"y_features": 8, "activation": "silu_gate"}
    with pytest.raises(RuntimeError, match="1 panels of a gate and what it multiplies"):
        factory.create("FullyConnected", [parameter([1, 64]).output(0), opset.constant(payload).output(0)], attributes)
    with pytest.raises(ValueError, match="panels are not as many of the gate"):
        x = np.ones((1, 64), np.float32)
        native().fully_connected("avx2", layout, payload, x, y_features=8, activation="silu_gate")


@pytest.mark.parametrize("rows", [1, 3, 70, 600])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_fully_connected_with_the_norm_before_it(core, factory, kind, rows):
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
    apart = factory.create("Norm", [i.output(0) for i in (x, *norms)], {"kind": kind, "eps": 1e-3})
    behind = factory.create("FullyConnected", [i.output(0) for i in (apart, *rest)], attributes)
    attributes |= {"norm": kind, "norm_eps": 1e-3}
    fused = factory.create("FullyConnected", [i.output(0) for i in (x, *rest, *norms)], attributes)
    two, one = compiled(core, [behind.output(0), fused.output(0)], [x])([values])
    np.testing.assert_array_equal(one, two)


def test_a_norm_that_does_not_fit_is_refused(factory):
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
            factory.create("FullyConnected", [*inputs, *more], attributes | {"norm": wrong})


# Chain


def test_a_chain_runs_its_steps(core, factory):
    """Two norms and a layer behind them, one of whose inputs is the result of the first step, in turns with the same
    operations apart, for numbers of rows that go up and down."""
    rng = np.random.default_rng(5)
    layout, payload, _ = packed_int8(rng, 40, 40)
    weights = [opset.constant(rng.standard_normal(40).astype(np.float32)) for _ in range(2)]
    weights.append(opset.constant(payload))
    attributes = weight_attributes(layout) | {"y_features": 40, "residual": 1, "residual_scale": 0.5}
    x = parameter([-1, -1, 40])
    first = factory.create("Norm", [x.output(0), weights[0].output(0)], {"kind": "rms", "eps": 1e-5})
    second = factory.create("Norm", [first.output(0), weights[1].output(0)], {"kind": "rms", "eps": 1e-3})
    inputs = [second.output(0), weights[2].output(0), first.output(0)]
    third = factory.create("FullyConnected", inputs, attributes)

    def step(node, *sources):
        words = [node.get_type_name(), *sources]
        return " ".join([*words, *(f"{name}={value}" for name, value in node.get_attributes().items())])

    steps = [step(first, "0", "1"), step(second, "@0", "2"), step(third, "@1", "3", "@0")]
    chain = factory.create("Chain", [i.output(0) for i in (x, *weights)], {"steps": steps, "results": [0, 2]})
    apart = compiled(core, [first.output(0), third.output(0)], [x])
    chained = compiled(core, [chain.output(0), chain.output(1)], [x])
    for rows in (3, 1, 20, 2):
        values = rng.standard_normal((2, rows, 40)).astype(np.float32)
        for one, two in zip(chained([values]), apart([values]), strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("steps", "results", "message"),
    [
        (["Nothing 0"], [0], "step 'Nothing', wanted FullyConnected, MultiHeadAttention, Norm, LastRows, Embedding or"),
        (["Norm 0 1 kind=rms residual=0"], [0], "no attribute eps"),
        (["{norm} 1 0"], [0], "wanted input 0 in the first step"),
        (["{norm} 0 1", "{norm} 0 1"], [0], "wanted input 0 in the first step and a result in others"),
        (["{norm} 0 1", "{norm} @1 1"], [1], "step 1 reads the result 1"),
        (["{norm} 0 1"], [], "no results"),
        (["{norm} 0 1"], [1], "result 1 of 1"),
        (["{norm} 0 2"], [0], "2 inputs, fewer than its steps name"),
        (["{norm} 0 #0", "{norm} @0 #1"], [1], "1 constants, wanted 2"),
        (["{norm} 0 #1"], [0], "1 constants, wanted 2"),
        (["{norm} #0 0"], [0], "wanted input 0 in the first step"),
        (["Norm 0 1 kind=rms eps=1,5 residual=0 {version}"], [0], "'1,5', wanted a number"),
        (["{norm} 0 1x"], [0], "'1x', wanted a number"),
        (["{norm} 0 #"], [0], "'', wanted a number"),
        (["EmbeddingRows 0 #0 hidden_size=40 {version}"], [0], "input 0 is f32, wanted i32"),
    ],
)
def test_a_chain_that_cannot_run_is_refused(factory, steps, results, message):
    inputs = [parameter([-1, -1, 40]).output(0), opset.constant(np.ones(40, np.float32)).output(0)]
    version = f"packing_version={native().PACKING_VERSION}"
    lines = [line.replace("{version}", version) for line in steps]
    lines = [
        f"{line.replace('{norm}', 'Norm')} kind=rms eps=1e-5 residual=0 {version}" if "{norm}" in line else line
        for line in lines
    ]
    with pytest.raises(RuntimeError, match=message):
        factory.create("Chain", inputs, {"steps": lines, "results": results})


def test_constants_of_a_chain_are_no_inputs(core, factory):
    """They live as long as the compiled model, whatever else is dropped."""
    rng = np.random.default_rng(6)
    table, weight = rng.standard_normal((50, 24)).astype(np.float32), rng.standard_normal(24).astype(np.float32)
    version = f"packing_version={native().PACKING_VERSION}"
    steps = [f"EmbeddingRows 0 #0 hidden_size=24 {version}", f"Norm @0 #1 kind=rms eps=1e-5 residual=0 {version}"]
    ids = parameter([-1, -1], np.int32)
    inputs = [ids.output(0), *(opset.constant(array).output(0) for array in (table, weight))]
    chain = factory.create("Chain", inputs, {"steps": steps, "results": [0, 1]})
    assert len(chain.input_values()) == 1
    model = compiled(core, [chain.output(0), chain.output(1)], [ids])
    del inputs, chain
    gc.collect()
    for picked in ([[3]], [[0, 49], [7, 7]]):
        rows, normed = model([np.array(picked, np.int32)])
        np.testing.assert_array_equal(rows, table[picked])
        wanted = table[picked] / np.sqrt((table[picked] ** 2).mean(-1, keepdims=True) + 1e-5) * weight
        np.testing.assert_allclose(normed, wanted, rtol=1e-5)


def test_what_varies_is_no_constant_of_a_chain(factory):
    inputs = [parameter([-1, -1, 40]).output(0), parameter([40]).output(0)]
    step = f"Norm 0 #0 kind=rms eps=1e-5 residual=0 packing_version={native().PACKING_VERSION}"
    with pytest.raises(RuntimeError, match="wanted a constant"):
        factory.create("Chain", inputs, {"steps": [step], "results": [0]})


# LastRows


@pytest.mark.parametrize("chained", [False, True])
def test_last_rows(core, factory, chained):
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
        node = factory.create("Chain", inputs, {"steps": steps, "results": [2]})
    else:
        node = factory.create("LastRows", [x.output(0), count.output(0)], {})
    assert node.get_output_partial_shape(0).to_string() == "[?,?,24]"
    model = compiled(core, [node.output(0)], [x, count])
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


def test_last_rows_of_something_else_are_refused(factory):
    x, flat, count = parameter([-1, -1, 24]), parameter([-1, 24]), parameter([1], np.int32)
    for inputs, message in (
        ((flat, count), r"wanted \[B, L, C\]"),
        ((x, x), "input 1 is f32, wanted i32"),
        ((x,), "wanted 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            factory.create("LastRows", [node.output(0) for node in inputs], {})


# Embedding


def test_embedding_reads_rows_of_a_packed_weight(core, factory):
    layout, payload, weight = packed_int8(np.random.default_rng(1), 50, 24)
    ids = parameter([-1, -1], np.int32)
    node = factory.create("Embedding", [ids.output(0), opset.constant(payload).output(0)], weight_attributes(layout))
    seen = compiled(core, [node.output(0)], [ids])([np.array([[0, 49], [7, 7]], np.int32)])[0]
    np.testing.assert_allclose(seen, weight[[[0, 49], [7, 7]]], rtol=1e-6)


@pytest.mark.parametrize("element_type", ["f32", "bf16", "i8"])
def test_rows_of_an_embedding(core, factory, element_type):
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
    node = factory.create("EmbeddingRows", inputs, {"hidden_size": 40})
    model = compiled(core, [node.output(0)], [ids])
    for picked in ([[0, 49], [7, 7]], [[3]], [list(range(50))]):
        wanted = table[picked].astype(np.float32) * (scales[picked] if element_type == "i8" else np.float32(1))
        np.testing.assert_array_equal(model([np.array(picked, np.int32)])[0], wanted)


def test_an_embedding_that_cannot_be_read_is_refused(core, factory):
    ids = parameter([-1, -1], np.int32).output(0)
    floats, bytes_, scales = (
        opset.constant(array).output(0)
        for array in (np.ones((9, 8), np.float32), np.ones((9, 8), np.int8), np.ones((9, 1), np.float32))
    )
    for inputs, hidden_size, message in (
        ([ids, bytes_], 8, "a weight of i8, wanted f32 or bf16"),
        ([ids, floats, scales], 8, "a weight of f32, wanted f32 or bf16, or i8 with scales"),
        ([ids, floats], 7, "wanted a last dimension of 7"),
        ([ids, bytes_, floats], 8, "wanted 9 elements"),
    ):
        with pytest.raises(RuntimeError, match=message):
            factory.create("EmbeddingRows", inputs, {"hidden_size": hidden_size})
    node = factory.create("EmbeddingRows", [ids, floats], {"hidden_size": 8})
    model = compiled(core, [node.output(0)], [ids.get_node()])
    for wrong in (-1, 9):
        with pytest.raises(RuntimeError, match=f"token id {wrong}, wanted 0 to 8"):
            model([np.array([[wrong]], np.int32)])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm(core, factory, kind, residual):
    rng = np.random.default_rng(2)
    values = rng.standard_normal((2, 3, 37)).astype(np.float32) * 3 + 1
    weight, bias = rng.standard_normal((2, 37)).astype(np.float32)
    x = parameter([-1, -1, 37])
    constants = [weight] if kind == "rms" else [weight, bias]
    inputs = [x.output(0), *(opset.constant(c).output(0) for c in constants)]
    added = rng.standard_normal((2, 3, 37)).astype(np.float32)
    others = [parameter([-1, -1, 37])] if residual else []
    inputs += [other.output(0) for other in others]
    node = factory.create("Norm", inputs, {"kind": kind, "eps": 1e-5, "residual": int(residual)})
    seen = compiled(core, [node.output(0)], [x, *others])([values, added][: 1 + residual])[0]
    v = values.astype(np.float64)
    if kind == "rms":
        wanted = v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-5) * weight
    else:
        wanted = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-5) * weight + bias
    atol = 37 * 2**-23 * np.abs(wanted).max()
    np.testing.assert_allclose(seen, wanted + added if residual else wanted, rtol=0, atol=atol)


def test_a_residual_of_another_shape_is_refused(factory):
    inputs = [parameter(shape).output(0) for shape in ([1, 3, 37], [37], [1, 3, 36])]
    with pytest.raises(RuntimeError, match="a residual of shape"):
        factory.create("Norm", inputs, {"kind": "rms", "eps": 1e-5, "residual": 1})


def rotated(x, angles):
    """Rotate-half over the first 2 n dims of the last axis; angles [..., n]."""
    n = angles.shape[-1]
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles), rest], -1)


def test_rotary_embedding(core, factory):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 3, 4 * D)).astype(np.float32)
    angles = rng.uniform(-3, 3, (2, 3, 4)).astype(np.float32)
    inputs = [parameter([-1, -1, 4 * D]), parameter([-1, -1, 4]), parameter([-1, -1, 4])]
    node = factory.create("RotaryEmbedding", [i.output(0) for i in inputs], {"head_dim": D})
    seen = compiled(core, [node.output(0)], inputs)([x, np.cos(angles), np.sin(angles)])[0]
    wanted = rotated(x.reshape(2, 3, 4, D).astype(np.float64), angles[:, :, None]).reshape(2, 3, -1)
    np.testing.assert_allclose(seen, wanted, rtol=0, atol=4 * 2**-23 * np.abs(x).max())


# MultiHeadAttention


class Layer:
    """One attention layer with its states, as the lowering builds it."""

    def __init__(self, core, factory, cache_type, in_place=1, capacity=(4, 3)):
        self.block_bytes = native().CacheLayout(cache_type, G, D).block_bytes
        self.capacity = capacity
        names = ["qkv", "cos", "sin", "mask", "ids", "beam_idx", "cache_shape", "prefix"]
        shapes = [[-1, -1, WIDTH], [-1, -1, 4], [-1, -1, 4], [-1, -1], [-1, -1], [-1], [3], [-1]]
        types = [np.float32] * 3 + [np.int32] * 3 + [np.int64, np.int32]
        p = {name: parameter(s, t) for name, s, t in zip(names, shapes, types, strict=True)}
        table_variable = self._variable("beam_table", [-1, -1], ov.Type.i32)
        cache_variable = self._variable("cache", [-1, -1, G, -1], ov.Type.u8)
        past = opset.read_value(opset.constant(np.zeros((1, 0), np.int32)), table_variable)
        rows = factory.create(
            "CacheTable", [v.output(0) for v in (past, p["mask"], p["ids"], p["beam_idx"], p["prefix"])], {"prefix": 1}
        )
        ends = opset.split(p["cache_shape"], np.int64(0), 3)
        shape = opset.concat([ends.output(0), ends.output(1), opset.constant(np.array([G])), ends.output(2)], 0)
        cache = opset.read_value(opset.broadcast(opset.constant(np.uint8(0)), shape), cache_variable)
        inputs = [p[n].output(0) for n in names[:3]] + [rows.output(i) for i in range(3)] + [cache.output(0)]
        attributes = {"num_attention_heads": H, "num_key_value_heads": G, "head_dim": D, "in_place": in_place}
        node = factory.create("MultiHeadAttention", inputs, attributes)
        new_cache = cache if in_place else opset.convert(node.output(1), "u8")
        sinks = [opset.assign(rows, table_variable), opset.assign(new_cache, cache_variable)]
        self.model = compiled(core, [node.output(0)], list(p.values()), sinks)

    @staticmethod
    def _variable(name, shape, element_type):
        info = VariableInfo()
        info.data_shape, info.data_type, info.variable_id = ov.PartialShape(shape), element_type, name
        return Variable(info)

    def __call__(self, qkv, angles, mask, beam_idx=None, prefix=None):
        batch, length, _ = qkv.shape
        beam_idx = np.arange(batch) if beam_idx is None else beam_idx
        prefix = np.zeros(batch) if prefix is None else prefix
        arrays = [qkv, np.cos(angles), np.sin(angles), mask, np.zeros((batch, length)), beam_idx]
        arrays += [np.array([*self.capacity, self.block_bytes]), prefix]
        types = [np.float32] * 3 + [np.int32] * 3 + [np.int64, np.int32]
        return self.model([np.ascontiguousarray(a, t) for a, t in zip(arrays, types, strict=True)])[0]


def reference(qkv, angles, mask, prefix=None):
    """float64 attention of whole sequences [B, L, H D]; columns of padding are 0."""
    batch, length, _ = qkv.shape
    heads = qkv.astype(np.float64).reshape(batch, length, H + 2 * G, D)
    turned = rotated(heads, angles[:, :, None].astype(np.float64))
    out = np.zeros((batch, length, H, D))
    for b in range(batch):
        for i in np.flatnonzero(mask[b]):
            columns = np.arange(length)
            sees = (mask[b] != 0) & ((columns <= i) | (columns < (0 if prefix is None else prefix[b])))
            for h in range(H):
                g = h // (H // G)
                scores = turned[b, sees, H + g] @ turned[b, i, h] / np.sqrt(D)
                p = np.exp(scores - scores.max())
                out[b, i, h] = p / p.sum() @ heads[b, sees, H + G + g]
    return out.reshape(batch, length, H * D)


def sequences(seed, batch, length):
    rng = np.random.default_rng(seed)
    qkv = rng.standard_normal((batch, length, WIDTH)).astype(np.float32)
    return qkv, rng.uniform(-3, 3, (batch, length, 4)).astype(np.float32)


# Rounding of keys and values: bf16 2^-9, int8 2^-8 of the largest element (here at most 4), both through a score
# of at most 16 dims / 4 and the values themselves.
BOUND = {"f32": 2e-5, "bf16": 2**-9 * 4 * 4, "int8": 2**-8 * 4 * 4}


@pytest.mark.parametrize("cache_type", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("length", [1, 5, 33, 70])
def test_a_prompt_and_steps_behind_it(core, factory, cache_type, length):
    layer = Layer(core, factory, cache_type)
    qkv, angles = sequences(length, 2, length + 3)
    mask = np.ones((2, length + 3))
    mask[0, : length // 2] = 0
    seen = [layer(qkv[:, :length], angles[:, :length], mask[:, :length])]
    for i in range(length, length + 3):
        seen.append(layer(qkv[:, i : i + 1], angles[:, i : i + 1], mask[:, : i + 1]))
    wanted = reference(qkv, angles, mask)
    assert np.abs(np.concatenate(seen, axis=1) - wanted).max() <= BOUND[cache_type]


def test_prefix_is_seen_by_all(core, factory):
    layer = Layer(core, factory, "f32")
    qkv, angles = sequences(0, 2, 9)
    mask = np.ones((2, 9))
    mask[1, :2] = 0
    prefix = np.array([6, 7])
    seen = layer(qkv, angles, mask, prefix=prefix)
    assert np.abs(seen - reference(qkv, angles, mask, prefix)).max() <= BOUND["f32"]


@pytest.mark.parametrize("cache_type", ["f32", "bf16", "int8"])
def test_beams_read_through_the_table(core, factory, cache_type):
    """Reordered rows give what a fresh cache gives for the sequences that they stand for."""
    rng = np.random.default_rng(5)
    layer = Layer(core, factory, cache_type)
    qkv, angles = sequences(5, 3, 40)
    layer(qkv, angles, np.ones((3, 40)))
    history, turn = qkv, angles
    for step in range(6):
        order = rng.integers(0, 3, 3)
        new, new_angles = sequences(100 + step, 3, 1)
        history = np.concatenate([history[order], new], axis=1)
        turn = np.concatenate([turn[order], new_angles], axis=1)
        mask = np.ones(history.shape[:2])
        seen = layer(new, new_angles, mask, beam_idx=order)
    fresh = Layer(core, factory, cache_type)
    fresh(history[:, :-1], turn[:, :-1], mask[:, :-1])
    np.testing.assert_array_equal(seen, fresh(history[:, -1:], turn[:, -1:], mask))


def test_a_row_does_not_depend_on_the_others(core, factory):
    qkv, angles = sequences(6, 3, 50)
    together = Layer(core, factory, "bf16")(qkv, angles, np.ones((3, 50)))
    for row in range(3):
        alone = Layer(core, factory, "bf16")(qkv[row : row + 1], angles[row : row + 1], np.ones((1, 50)))
        np.testing.assert_array_equal(together[row], alone[0])


def test_going_back_overwrites(core, factory):
    layer = Layer(core, factory, "bf16")
    qkv, angles = sequences(7, 1, 60)
    whole = layer(qkv, angles, np.ones((1, 60)))
    layer(qkv[:, :7] * 3, angles[:, :7], np.ones((1, 40)))
    again = layer(qkv[:, 33:], angles[:, 33:], np.ones((1, 60)))
    np.testing.assert_allclose(again, whole[:, 33:], rtol=0, atol=2e-5)


def test_another_sequence_without_a_reset_is_as_fresh(core, factory):
    layer = Layer(core, factory, "bf16")
    nan = np.full((1, 80, WIDTH), np.nan, np.float32)
    layer(nan, np.zeros((1, 80, 4)), np.ones((1, 80)))
    qkv, angles = sequences(8, 1, 37)
    seen = layer(qkv, angles, np.ones((1, 37)))
    np.testing.assert_array_equal(seen, Layer(core, factory, "bf16")(qkv, angles, np.ones((1, 37))))


def test_in_place_and_copied_states_agree(core, factory):
    qkv, angles = sequences(9, 2, 20)
    kept, copied = Layer(core, factory, "bf16"), Layer(core, factory, "bf16", in_place=0)
    for begin, end in [(0, 15), (15, 16), (16, 20)]:
        arguments = qkv[:, begin:end], angles[:, begin:end], np.ones((2, end))
        np.testing.assert_array_equal(kept(*arguments), copied(*arguments))


@pytest.mark.parametrize(
    ("capacity", "message"), [((2, 1), "KV cache: 40 slots in row 0, wanted at most 32"), ((1, 2), "KV cache: row 1")]
)
def test_a_cache_that_is_too_small_is_refused(core, factory, capacity, message):
    layer = Layer(core, factory, "bf16", capacity=capacity)
    qkv, angles = sequences(10, 2, 40)
    with pytest.raises(RuntimeError, match=message):
        layer(qkv, angles, np.ones((2, 40)))


@pytest.mark.parametrize("rows", [1, 3])
def test_angles_of_other_tokens_are_refused(core, factory, rows):
    layer = Layer(core, factory, "bf16")
    qkv, angles = sequences(10, 2, 5)
    with pytest.raises(RuntimeError, match=r"MultiHeadAttention: angles of .* wanted those of .* tokens"):
        layer(qkv, np.resize(angles, (rows, *angles.shape[1:])), np.ones((2, 5)))


def test_another_packing_version_is_refused(factory):
    x = parameter([-1, -1, 37])
    inputs = [x.output(0), opset.constant(np.ones(37, np.float32)).output(0)]
    version = native().PACKING_VERSION + 1
    with pytest.raises(RuntimeError, match=f"packing_version {version}, wanted {version - 1}"):
        factory.create("Norm", inputs, {"kind": "rms", "eps": 1e-5, "packing_version": version})
