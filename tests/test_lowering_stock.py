"""The stock lowering: what the CPU plugin makes of it, and that compressed weights are the weights they stand for."""

# ruff: noqa: F811 (a fixture is imported)

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from golden_cases import (
    V1,
    V2,
    Opener,
    each_small,
    golden_prompt,
    open_compiled,  # noqa: F401
    own_prompt,
    stored_weights,
    teacher_forced,
    write_checkpoint,
)
from golden_sets import Golden
from stored_formats import stored_format

from chatglm_ov.config import load_config
from chatglm_ov.models import architecture, chatglm2
from chatglm_ov.runtime.loading import CompiledModel

WEIGHT_TYPE = {"f32": "f32", "bf16": "bf16", "int8": "i8", "int4": "u4"}
formats = pytest.mark.parametrize("weight_format", WEIGHT_TYPE)
precisions = pytest.mark.parametrize("precision", ["f32", None])


# Fusions


def executed(model: CompiledModel, golden: Golden) -> list[ov.Node]:
    """Nodes as the plugin runs them; types are settled by the first inference."""
    golden_prompt(golden, "p5", model).feed(model.create_request())
    return model.compiled.get_runtime_model().get_ordered_ops()


def told(node: ov.Node, what: str) -> str:
    return node.get_rt_info()[what].value


def kind(node: ov.Node) -> str:
    return told(node, "layerType")


@formats
@precisions
@each_small
def test_every_part_is_one_node(golden, weight_format, precision, open_compiled: Opener):
    """Per layer: four linear layers, q and k rotated by one node each, attention with its cache inside, two norms.
    What is there once (mask, angles, tables) must not be there once a layer."""
    model = open_compiled(golden.checkpoint, weight_format, precision)
    nodes = executed(model, golden)
    count, layers = Counter(map(kind, nodes)), model.config.num_layers
    assert count["FullyConnected"] == 4 * layers + 1
    assert count["MatMul"] == 0
    assert count["RoPE"] == 2 * layers
    assert count["ScaledDotProductAttention"] == layers
    assert count["MemoryInput"] == count["MemoryOutput"] == 2 * layers
    assert count["MVN" if golden is V1 else "RMS"] == 2 * layers + 1
    assert count["Math"] == 2  # cos and sin
    assert count["Concatenation"] == 2  # angles beside themselves; the shape of an empty cache
    assert count["Gather"] <= 7


@precisions
@each_small
def test_attention_owns_the_cache(golden, precision, open_compiled: Opener):
    """The state goes nowhere but into the attention node: no copy for a Concat, a Gather or a repeat of its heads."""
    nodes = executed(open_compiled(golden.checkpoint, "f32", precision), golden)
    for node in (node for node in nodes if kind(node) == "MemoryInput"):
        assert {kind(target.get_node()) for target in node.output(0).get_target_inputs()} == {
            "ScaledDotProductAttention"
        }
    for node in (node for node in nodes if kind(node) == "ScaledDotProductAttention"):
        inputs = [kind(node.input_value(i).get_node()) for i in range(node.get_input_size())]
        assert inputs[:2] == ["RoPE", "RoPE"]
        assert inputs.count("MemoryInput") == 2


@formats
@precisions
@each_small
def test_weights_stay_as_they_are_stored(golden, weight_format, precision, open_compiled: Opener):
    model = open_compiled(golden.checkpoint, weight_format, precision)
    nodes = executed(model, golden)
    types = Counter()
    for node in nodes:
        if kind(node) == "FullyConnected":
            weight = node.input_value(1).get_node()
            assert kind(weight) == "Const"
            types[told(weight, "runtimePrecision")] += 1
    wanted = Counter()
    for name, shape in model.architecture.weight_shapes(model.config).items():
        if len(shape) == 2 and name != model.architecture.EMBEDDING:
            fmt = stored_format(weight_format, shape[1], table=name == model.architecture.LM_HEAD)
            wanted[WEIGHT_TYPE[fmt.name]] += 1
    if weight_format == "f32" and precision is None:
        # The plugin itself takes f32 weights down to what it computes in.
        assert types.total() == wanted.total()
    else:
        assert types == wanted


@formats
@each_small
def test_table_is_gathered_as_it_is_stored(golden, weight_format, open_compiled: Opener):
    model = open_compiled(golden.checkpoint, weight_format, "f32")
    tables = [
        node.input_value(0).get_node()
        for node in executed(model, golden)
        if kind(node) == "Gather"
        and list(node.input_value(0).get_shape()) == [model.config.vocab_rows, model.config.hidden_size]
    ]
    assert [told(table, "runtimePrecision") for table in tables] == [
        {"int4": "i8"}.get(weight_format, WEIGHT_TYPE[weight_format])
    ]


@formats
def test_tied_head_reads_the_embeddings_constant(weight_format, tmp_path: Path, open_compiled: Opener):
    checkpoint = write_checkpoint(
        tmp_path / "tied", V1.checkpoint, stored_weights(V1.checkpoint), tie_word_embeddings=None
    )
    model = open_compiled(checkpoint, weight_format, "f32")
    table = [model.config.vocab_size, model.config.hidden_size]
    (constant,) = [
        node
        for node in model.model.get_ops()
        if node.get_type_name() == "Constant" and list(node.get_output_shape(0)) == table
    ]
    readers = Counter(target.get_node().get_type_name() for target in constant.output(0).get_target_inputs())
    assert readers == {"Gather": 1, "MatMul" if weight_format == "f32" else "Convert": 1}


# Compressed weights


def dequantized(weight_format: str, table: bool, weight: np.ndarray) -> np.ndarray:
    """What a weight [N, K] is after a trip through a format, float32."""
    fmt = stored_format(weight_format, weight.shape[1], table)
    parts = dict(zip((part.name for part in fmt.parts(weight.shape[1])), fmt.encode(weight), strict=True))
    values = parts["weight"].astype(np.float32)
    return ((values - parts.get("zero_point", np.float32(0))) * parts.get("scale", np.float32(1))).reshape(weight.shape)


@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4"])
@each_small
def test_compressed_model_is_the_f32_model_of_its_weights(golden, weight_format, tmp_path: Path, open_compiled: Opener):
    """A checkpoint of the dequantized weights, in f32, gives the same logits: the graph adds no error of its own."""
    compressed = open_compiled(golden.checkpoint, weight_format, "f32")
    module, weights = architecture(compressed.config), stored_weights(golden.checkpoint)
    tables = (module.EMBEDDING, module.LM_HEAD)
    for name, weight in weights.items():
        if weight.ndim == 2:
            weights[name] = dequantized(weight_format, name in tables, weight)
    exact = open_compiled(write_checkpoint(tmp_path / "exact", golden.checkpoint, weights), "f32", "f32")
    prompt, tokens = golden_prompt(golden, "batch", exact), golden["batch_dec_tokens"]
    ours, theirs = (teacher_forced(model.create_request(), prompt, tokens)[1] for model in (compressed, exact))
    assert np.abs(ours - theirs).max() < 1e-4
    # And it is another model than the one that was not compressed.
    assert np.abs(ours - golden["batch_dec_logits"][:, -1:]).max() > 1e-2


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize(("hidden", "ffn"), [(64, 129), (96, 200), (64, 7)], ids=str)
def test_odd_sizes(weight_format, hidden, ffn, tmp_path: Path, open_compiled: Opener):
    """K that is no multiple of 128, of 16, or of 2; odd numbers of rows. Rows and groups of zeros among them."""
    sizes = {"hidden_size": hidden, "ffn_hidden_size": ffn, "padded_vocab_size": 101, "kv_channels": 12}
    rng, shapes = (
        np.random.default_rng(ffn),
        chatglm2.weight_shapes(load_config(V2.checkpoint).model_copy(update=sizes)),
    )
    weights, exact = {}, {}
    for name, shape in shapes.items():
        weights[name] = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))
        if len(shape) == 2:
            weights[name][1], weights[name][2, : shape[1] // 2], weights[name][3, ::2] = 0, 0, 0
            exact[name] = dequantized(weight_format, shape[0] == 101, weights[name])
    ids, logits = rng.integers(0, 101, (3, 11)), []
    for fmt, tensors in ((weight_format, weights), ("f32", {**weights, **exact})):
        model = open_compiled(write_checkpoint(tmp_path / fmt, V2.checkpoint, tensors, **sizes), fmt, "f32")
        logits.append(own_prompt(ids, model).feed(model.create_request()))
    assert np.abs(logits[0] - logits[1]).max() < 1e-4


# Rotary angles


@pytest.fixture(scope="module")
def long_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long") / "checkpoint"
    return write_checkpoint(folder, V2.checkpoint, stored_weights(V2.checkpoint), seq_length=1 << 20)


PLACES = np.array([[0, 1, 255, 257, 2049, 30011, 131071, 1048575]])


def keys_at(model: CompiledModel, positions: np.ndarray) -> np.ndarray:
    """Layer 0's keys [G, T, D] of one token at these positions."""
    request, ids = model.create_request(), np.full_like(positions, 77)
    request.infer(ids, np.ones_like(ids), positions, np.array([0]), 1)
    return request.cached(0)[0][0]


def test_angles_are_float32_products(long_checkpoint: Path, open_compiled: Opener):
    """Position times frequency rounded to float32, cos and sin of that: the original's arithmetic, at any position."""
    model = open_compiled(long_checkpoint, "f32", "f32")
    keys = keys_at(model, PLACES).astype(np.float64)
    frequencies = chatglm2.rotary(model.config).inv_freq[0]
    angles = (PLACES[0].astype(np.float32)[:, None] * frequencies).astype(np.float64)
    a, b = keys[:, :1, 0 : 2 * frequencies.size : 2], keys[:, :1, 1 : 2 * frequencies.size : 2]
    wanted = np.repeat(keys[:, :1], PLACES.size, axis=1)
    wanted[..., 0 : 2 * frequencies.size : 2] = a * np.cos(angles) - b * np.sin(angles)
    wanted[..., 1 : 2 * frequencies.size : 2] = b * np.cos(angles) + a * np.sin(angles)
    # One unit in the last place of cos and sin, and of the sums.
    assert np.abs(keys - wanted).max() < 8 * 2**-24 * np.abs(keys).max()


def test_angles_are_not_rounded_where_the_rest_is(long_checkpoint: Path, open_compiled: Opener):
    """The default precision rounds keys to bf16 where the device has it. A rotation adds no more to that at a large
    position than at 0; an angle in bf16 would be off by up to 64 radians at 30011."""
    exact, ours = (keys_at(open_compiled(long_checkpoint, "f32", precision), PLACES) for precision in ("f32", None))
    error, size = np.abs(ours - exact).max(axis=(0, 2)), np.abs(exact).max()
    # The key before rotation, cos and sin, and the sum: three roundings to 8 bits, of two terms.
    assert error.max() < error[0] + 2 * 3 * 2**-8 * size
