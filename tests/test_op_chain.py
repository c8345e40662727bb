"""Chain: operations that run one after the other as one."""

from __future__ import annotations

import gc

import numpy as np
import openvino as ov
import openvino.opset15 as opset
import pytest
from operations import compiled, create, needs_library, packed_int8, parameter, weight_attributes

from chatglm_ov.errors import ChatGLMError
from chatglm_ov.native import native
from chatglm_ov.runtime.ir_reading import read_ir
from chatglm_ov.weights.ir import FORMAT_VERSION, RT_INFO

pytestmark = needs_library


def test_a_chain_runs_its_steps():
    """Two norms and a layer behind them, one of whose inputs is the result of the first step, in turns with the same
    operations apart, for numbers of rows that go up and down."""
    rng = np.random.default_rng(5)
    layout, payload, _ = packed_int8(rng, 40, 40)
    weights = [opset.constant(rng.standard_normal(40).astype(np.float32)) for _ in range(2)]
    weights.append(opset.constant(payload))
    attributes = weight_attributes(layout) | {"y_features": 40, "residual": 1, "residual_scale": 0.5}
    x = parameter([-1, -1, 40])
    first = create("Norm", [x.output(0), weights[0].output(0)], {"kind": "rms", "eps": 1e-5})
    second = create("Norm", [first.output(0), weights[1].output(0)], {"kind": "rms", "eps": 1e-3})
    inputs = [second.output(0), weights[2].output(0), first.output(0)]
    third = create("FullyConnected", inputs, attributes)

    def step(node, *sources):
        words = [node.get_type_name(), *sources]
        return " ".join([*words, *(f"{name}={value}" for name, value in node.get_attributes().items())])

    steps = [step(first, "0", "1"), step(second, "@0", "2"), step(third, "@1", "3", "@0")]
    chain = create("Chain", [i.output(0) for i in (x, *weights)], {"steps": steps, "results": [0, 2]})
    apart = compiled([first.output(0), third.output(0)], [x])
    chained = compiled([chain.output(0), chain.output(1)], [x])
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
        (["{norm} 0 1"], [0, 0], "result 0 twice"),
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
def test_a_chain_that_cannot_run_is_refused(steps, results, message):
    inputs = [parameter([-1, -1, 40]).output(0), opset.constant(np.ones(40, np.float32)).output(0)]
    version = f"packing_version={native().PACKING_VERSION}"
    lines = [line.replace("{version}", version) for line in steps]
    lines = [
        f"{line.replace('{norm}', 'Norm')} kind=rms eps=1e-5 residual=0 {version}" if "{norm}" in line else line
        for line in lines
    ]
    with pytest.raises(RuntimeError, match=message):
        create("Chain", inputs, {"steps": lines, "results": results})


DENSE = "FullyConnected {sources} format={format} out_features=40 in_features=40 group_size=0 y_features=40 \
activation=none bias=0 residual=0 residual_scale=1 activation_bits=16 norm=none norm_eps=0 packing_version={version}"
NORM = "Norm {sources} kind={kind} eps=1e-5 residual={residual} packing_version={version}"
FILLED = {"format": "int8", "kind": "rms", "residual": 0}


def filled(step, words):
    """The step, and the one constant that it names."""
    arrays = {
        "short": np.zeros(64, np.uint8),
        "payload": packed_int8(np.random.default_rng(7), 40, 40)[1],
        "ones": np.ones(40, np.float32),
        "one": np.ones(1, np.int32),
    }
    line = step.format(**FILLED | {"version": native().PACKING_VERSION} | words)
    for name, array in arrays.items():
        if f"#{name} " in line:
            return line.replace(f"#{name} ", "#0 "), [array]
    return line, []


@pytest.mark.parametrize(
    ("step", "words", "shape", "message"),
    [
        (DENSE, {"sources": "0 #short"}, [1, 1, 40], "FullyConnected: input 1 of shape .64., wanted 3264"),
        (DENSE, {"sources": "0"}, [1, 1, 40], "FullyConnected: 1 inputs, wanted 2"),
        (DENSE, {"sources": "0 #payload", "format": "int4"}, [1, 1, 40], "FullyConnected: .*group"),
        (DENSE, {"sources": "0 #payload"}, [1, 5, 64], r"input 0 of shape \[1,5,64\], wanted a last dimension of 40"),
        (NORM, {"sources": "0 #ones 0", "residual": 1, "kind": "layer"}, [2, 40], "Norm: 3 inputs, wanted 4"),
        (NORM, {"sources": "0 #ones 1", "residual": 1}, [9, 200, 40], "Norm: a residual of shape .1,1,40., wanted"),
        (NORM, {"sources": "0 #ones", "version": 999}, [1, 1, 40], "Norm: packing_version 999, wanted"),
        (NORM, {"sources": "0 #ones", "kind": "other"}, [1, 1, 40], "Norm: kind 'other', wanted rms or layer"),
        ("LastRows 0 #one packing_version={version}", {}, [2, 40], "LastRows: input 0 of shape .2,40., wanted"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(step, words, shape, message):
    line, constants = filled(step, words)
    given = [parameter(shape), parameter([1, 1, 40])][: 2 if "1" in words.get("sources", "").split() else 1]
    inputs = [*given, *map(opset.constant, constants)]
    with pytest.raises(RuntimeError, match=message):
        create("Chain", [node.output(0) for node in inputs], {"steps": [line], "results": [0]})


@pytest.mark.parametrize(
    ("step", "words", "values", "message"),
    [
        (DENSE, {"sources": "0 #payload"}, [(1, 5, 64)], r"FullyConnected: x of .*, wanted 40 columns"),
        (DENSE, {"sources": "0 1"}, [(1, 5, 40), (64,)], "input 1 of shape .64., wanted 3264"),
        (
            NORM,
            {"sources": "0 #ones 1", "residual": 1},
            [(9, 20, 40), (1, 1, 40)],
            r"Norm: input 2 of shape .*, wanted 7200",
        ),
        (NORM, {"sources": "0 1", "residual": 0}, [(9, 20, 40), (41,)], "wanted 41 columns"),
    ],
)
def test_inputs_of_shapes_that_do_not_fit_are_told_when_it_runs(step, words, values, message):
    line, constants = filled(step, words)
    types = [np.float32, np.uint8 if step is DENSE else np.float32]
    given = [parameter([-1] * len(shape), kind) for shape, kind in zip(values, types, strict=False)]
    inputs = [node.output(0) for node in (*given, *map(opset.constant, constants))]
    chain = create("Chain", inputs, {"steps": [line], "results": [0]})
    model = compiled([chain.output(0)], given)
    with pytest.raises(RuntimeError, match=message):
        model([np.ones(shape, kind) for shape, kind in zip(values, types, strict=False)])


def test_constants_of_a_chain_are_no_inputs():
    """They live as long as the compiled model, whatever else is dropped."""
    rng = np.random.default_rng(6)
    table, weight = rng.standard_normal((50, 24)).astype(np.float32), rng.standard_normal(24).astype(np.float32)
    version = f"packing_version={native().PACKING_VERSION}"
    steps = [f"EmbeddingRows 0 #0 hidden_size=24 {version}", f"Norm @0 #1 kind=rms eps=1e-5 residual=0 {version}"]
    ids = parameter([-1, -1], np.int32)
    inputs = [ids.output(0), *(opset.constant(array).output(0) for array in (table, weight))]
    chain = create("Chain", inputs, {"steps": steps, "results": [0, 1]})
    assert len(chain.input_values()) == 1
    model = compiled([chain.output(0), chain.output(1)], [ids])
    del inputs, chain
    gc.collect()
    for picked in ([[3]], [[0, 49], [7, 7]]):
        rows, normed = model([np.array(picked, np.int32)])
        np.testing.assert_array_equal(rows, table[picked])
        wanted = table[picked] / np.sqrt((table[picked] ** 2).mean(-1, keepdims=True) + 1e-5) * weight
        np.testing.assert_allclose(normed, wanted, rtol=1e-5)


def test_what_varies_is_no_constant_of_a_chain():
    inputs = [parameter([-1, -1, 40]).output(0), parameter([40]).output(0)]
    step = f"Norm 0 #0 kind=rms eps=1e-5 residual=0 packing_version={native().PACKING_VERSION}"
    with pytest.raises(RuntimeError, match="wanted a constant"):
        create("Chain", inputs, {"steps": [step], "results": [0]})


def test_an_ir_with_a_chain_is_refused(tmp_path):
    """Its steps are not checked against their weights."""
    given = [parameter([-1, -1, 40]), parameter([40])]
    line, _ = filled(NORM, {"sources": "0 1"})
    chain = create("Chain", [node.output(0) for node in given], {"steps": [line], "results": [0]})
    model = ov.Model([opset.result(opset.add(chain.output(0), np.ones(40, np.float32)))], given)
    described = {"format_version": FORMAT_VERSION, "ops": "fused", "packing_version": native().PACKING_VERSION}
    for name, value in described.items():
        model.set_rt_info(str(value), [RT_INFO, name])
    ov.serialize(model, tmp_path / "openvino_model.xml")
    with pytest.raises(ChatGLMError, match="IR is with an operation Chain, expected an IR as `convert` writes it"):
        read_ir(tmp_path / "openvino_model.xml")
