"""The fused lowering: what the graph is made of, what it computes, and how far from the originals."""

# ruff: noqa: F811 (a fixture is imported)

from __future__ import annotations

import sys
import threading
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from golden_cases import (  # noqa: F401
    TOLERANCE,
    V1,
    V2,
    AnyProperties,
    Opener,
    each_golden,
    each_small,
    golden_prompt,
    open_compiled,
    own_prompt,
    stored_weights,
    teacher_forced,
    without_library,
    write_checkpoint,
)
from golden_sets import Golden, rounds_to_bf16

from chatglm_ov import convert
from chatglm_ov.config import load_config
from chatglm_ov.models import chatglm2
from chatglm_ov.runtime import loading as runtime
from chatglm_ov.runtime.loading import CompiledModel

pytestmark = without_library
formats = pytest.mark.parametrize("weight_format", ["f32", "bf16", "int8", "int4"])


# The graph


def types(model: CompiledModel) -> Counter[str]:
    return Counter(node.get_type_name() for node in model.model.get_ops())


@formats
@each_small
def test_a_block_is_five_operations(golden, weight_format, open_compiled: Opener, monkeypatch: pytest.MonkeyPatch):
    """Seven in ChatGLM-6B, where what a norm gives is a residual too; before all of them become one."""
    monkeypatch.setattr(runtime, "chain_operations", lambda model: None)
    model = open_compiled(golden.checkpoint, weight_format, ops="fused", properties=AnyProperties())
    count, layers = types(model), model.config.num_layers
    assert count["FullyConnected"] == 4 * layers + 1
    assert count["Norm"] == (2 * layers if golden is V1 else 0)
    assert (count["LastRows"], count["Slice"]) == (2, 0)
    assert count["MultiHeadAttention"] == layers
    assert count["CacheTable"] == 1
    assert count["MatMul"] == count["ScaledDotProductAttention"] == 0
    assert count["Cos"] == count["Sin"] == 1
    assert len(model.model.get_variables()) == layers + 1


@formats
@each_small
def test_norms_are_the_same_in_the_operation_behind_them(
    golden, weight_format, open_compiled: Opener, monkeypatch: pytest.MonkeyPatch
):
    """Bit for bit, a prompt and a step; the properties only keep the two models apart."""
    monkeypatch.setattr(runtime, "chain_operations", lambda model: None)
    fused = open_compiled(golden.checkpoint, weight_format, None, ops="fused", properties=AnyProperties())
    monkeypatch.setattr(runtime, "fuse_norms", lambda model: None)
    apart = open_compiled(golden.checkpoint, weight_format, None, ops="fused", properties=AnyProperties())
    assert types(apart)["Norm"] == 2 * apart.config.num_layers + 1
    prompt = golden_prompt(golden, "p5", fused)
    seen = [teacher_forced(model.create_request(), prompt, np.full((prompt.rows, 2), 7)) for model in (fused, apart)]
    for one, two in zip(*seen, strict=True):
        np.testing.assert_array_equal(one, two)


@formats
@each_small
def test_rows_without_logits_are_left_out(
    golden, weight_format, open_compiled: Opener, monkeypatch: pytest.MonkeyPatch
):
    """Rows of unequal length, any number of logits: those of the graph that computes all rows. Which kernel runs may
    depend on the number of rows: with int8 weights bit for bit all the same, else to rounding."""
    early = open_compiled(golden.checkpoint, weight_format, None, ops="fused")
    monkeypatch.setattr(runtime, "take_last_rows_early", lambda model: None)
    late = open_compiled(golden.checkpoint, weight_format, None, ops="fused", properties=AnyProperties())
    prompt = golden_prompt(golden, "batch", early)
    length = prompt.ids.shape[1]
    for kept in (1, 2, length - 1, length, length + 3, 0):
        one, two = (prompt.feed(model.create_request(), logits_to_keep=kept) for model in (early, late))
        assert one.shape == two.shape == (prompt.rows, min(kept or length, length), one.shape[2])
        if weight_format == "int8":
            np.testing.assert_array_equal(one, two)
        # A kernel for many rows rounds x to bf16, one for few may not.
        step = 2**-8 if rounds_to_bf16(weight_format) else 2**-20
        np.testing.assert_allclose(one, two, rtol=0, atol=step * np.abs(two).max())


@formats
@each_small
def test_the_layers_are_one_operation(golden, weight_format, open_compiled: Opener, monkeypatch: pytest.MonkeyPatch):
    """Which gives, bit for bit, what its steps give one by one: rows of unequal length, prompt and steps."""
    chained = open_compiled(golden.checkpoint, weight_format, None, ops="fused")
    count = types(chained)
    ours = ("Chain", "FullyConnected", "Norm", "MultiHeadAttention", "LastRows", "EmbeddingRows")
    assert [count[name] for name in ours] == [1, 0, 0, 0, 0, 0]
    left = [node for node in chained.model.get_ops() if node.get_type_name() == "Constant"]
    # Frequencies, and the numbers that empty states are made of.
    assert all(np.prod(node.shape) <= chained.config.head_dim for node in left)
    monkeypatch.setattr(runtime, "chain_operations", lambda model: None)
    apart = open_compiled(golden.checkpoint, weight_format, None, ops="fused", properties=AnyProperties())
    assert types(apart)["Chain"] == 0
    prompt, tokens = golden_prompt(golden, "batch", chained), golden["batch_dec_tokens"]
    seen = [teacher_forced(model.create_request(), prompt, tokens) for model in (chained, apart)]
    for one, two in zip(*seen, strict=True):
        np.testing.assert_array_equal(one, two)


@formats
@each_small
def test_nothing_lies_between_the_operations(golden, weight_format, open_compiled: Opener):
    """No Reorder, Convert or copy of the plugin's: activations go from one operation to the next, a cache only into
    its attention, and weights come from the graph as they are."""
    model = open_compiled(golden.checkpoint, weight_format, None, ops="fused")
    golden_prompt(golden, "p5", model).feed(model.create_request())
    nodes = model.compiled.get_runtime_model().get_ordered_ops()
    kinds = Counter(node.get_rt_info()["layerType"].value for node in nodes)
    moved = [node for node in nodes if node.get_rt_info()["layerType"].value in ("Reorder", "Broadcast")]
    # The numbers that empty states are made of.
    assert all(np.prod(node.output(0).get_partial_shape().get_max_shape()) <= 4 for node in moved)
    ours = ("Chain", "FullyConnected", "CacheTable")
    assert kinds["Reference"] == sum(types(model)[name] for name in ours)
    assert kinds["MemoryInput"] == model.config.num_layers + 1
    assert kinds["MemoryOutput"] == 1


@formats
def test_tied_head_reads_the_embeddings_payload(
    weight_format, tmp_path: Path, open_compiled: Opener, monkeypatch: pytest.MonkeyPatch
):
    checkpoint = write_checkpoint(
        tmp_path / "tied", V1.checkpoint, stored_weights(V1.checkpoint), tie_word_embeddings=None
    )
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "chain_operations", lambda model: None)
        apart = open_compiled(checkpoint, weight_format, None, ops="fused", properties=AnyProperties())
    (embedding,) = [node for node in apart.model.get_ops() if node.get_type_name() == "Embedding"]
    readers = embedding.input_value(1).get_target_inputs()
    assert sorted(reader.get_node().get_type_name() for reader in readers) == ["Embedding", "FullyConnected"]
    fused, stock = (open_compiled(checkpoint, weight_format, "f32", ops=ops) for ops in ("fused", "stock"))
    prompt = golden_prompt(V1, "batch", fused)
    real = prompt.keep.astype(bool)
    ours, wanted = (prompt.feed(model.create_request())[real] for model in (fused, stock))
    # Forty products round one after the other: 8 bits, or 16 of the largest of 512, which is some 4 times the others.
    step = 2**-8 if rounds_to_bf16(weight_format) else 2**-14
    assert np.linalg.norm(ours - wanted) < np.sqrt(40) * step * np.linalg.norm(wanted)


def test_a_model_cache_never_takes_one_checkpoint_for_another(tmp_path: Path):
    """The weights of a chain are not part of the graph that OpenVINO keeps in CACHE_DIR, and tells models apart by."""
    weights, prompts = stored_weights(V1.checkpoint), []
    for i, factor in enumerate((1, 2)):
        changed = {name: w * factor if "query_key_value" in name else w for name, w in weights.items()}
        checkpoint = write_checkpoint(tmp_path / f"checkpoint {i}", V1.checkpoint, changed)
        folder = convert(checkpoint, tmp_path / f"converted {i}", ("int8",), ops="fused", progress=False)
        prompts.append([])
        for properties in ({}, {"CACHE_DIR": str(tmp_path / "cache")}, {"CACHE_DIR": str(tmp_path / "cache")}):
            model = runtime.load_model(folder, properties=properties)
            prompts[i].append(golden_prompt(V1, "p5", model).feed(model.create_request()))
    for i in range(2):
        for kept in prompts[i][1:]:
            np.testing.assert_array_equal(kept, prompts[i][0])
    assert not np.array_equal(prompts[0][0], prompts[1][0])


# What it computes


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@each_small
def test_quantized_weights_are_those_of_the_stock_lowering(golden, weight_format, open_compiled: Opener):
    """16-bit activations are within 2^-16 of a block's largest: far less than what bf16 rounds away. Both in f32
    otherwise; and the stock lowering in bf16 is further away from itself in f32."""
    fused = open_compiled(golden.checkpoint, weight_format, "f32", ops="fused")
    stock = open_compiled(golden.checkpoint, weight_format, "f32")
    rounded = open_compiled(golden.checkpoint, weight_format, "bf16")
    prompt, tokens = golden_prompt(golden, "batch", fused), golden["batch_dec_tokens"]
    ours, exact, bf16 = (teacher_forced(m.create_request(), prompt, tokens)[1] for m in (fused, stock, rounded))
    error, of_bf16 = (np.abs(each - exact).mean() for each in (ours, bf16))
    if rounds_to_bf16(weight_format):
        assert error < of_bf16
    else:
        assert np.abs(ours - exact).max() < 5e-3
        assert error < of_bf16 / 10


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@each_small
def test_8_bit_activations(golden, weight_format, open_compiled: Opener):
    """Another result than 16 bits, further from the exact one, and still the same model."""
    exact = open_compiled(golden.checkpoint, weight_format, "f32")
    prompt, tokens = golden_prompt(golden, "batch", exact), golden["batch_dec_tokens"]
    wanted = teacher_forced(exact.create_request(), prompt, tokens)[1]
    errors = {}
    for bits in (16, 8):
        model = open_compiled(golden.checkpoint, weight_format, "f32", ops="fused", activation_bits=bits)
        errors[bits] = np.linalg.norm(teacher_forced(model.create_request(), prompt, tokens)[1] - wanted)
    assert (2 if rounds_to_bf16(weight_format) else 10) * errors[16] < errors[8] < 0.1 * np.linalg.norm(wanted)


@each_small
def test_cache_formats(golden, open_compiled: Opener):
    """f32 is exact, bf16 rounds, int8 rounds more; none is another model. None is bf16, or f32 with f32 in
    weights or precision."""
    prompt = golden_prompt(golden, "batch", open_compiled(golden.checkpoint, ops="fused"))
    logits = {}
    for cache_format in (None, "f32", "bf16", "int8"):
        model = open_compiled(golden.checkpoint, "f32", "f32", ops="fused", kv_cache_format=cache_format)
        assert model.kv_cache_format == (cache_format or "f32")
        logits[cache_format] = teacher_forced(model.create_request(), prompt, golden["batch_dec_tokens"])[1]
    np.testing.assert_array_equal(logits[None], logits["f32"])
    errors = {name: np.linalg.norm(values - logits["f32"]) for name, values in logits.items()}
    assert 0 < errors["bf16"] < errors["int8"] < 0.1 * np.linalg.norm(logits["f32"])
    for weight_format, usual in (("f32", "f32"), ("bf16", "bf16")):
        assert open_compiled(golden.checkpoint, weight_format, None, ops="fused").kv_cache_format == usual


@formats
@each_small
def test_a_row_does_not_depend_on_the_others(golden, weight_format, open_compiled: Opener):
    """Bit for bit: the same row among rows of other content."""
    model = open_compiled(golden.checkpoint, weight_format, None, ops="fused")
    prompt, tokens = golden_prompt(golden, "batch", model), golden["batch_dec_tokens"]
    wanted = teacher_forced(model.create_request(), prompt, tokens)[1]
    rng = np.random.default_rng(0)
    for row in range(prompt.rows):
        ids, others = prompt.ids.copy(), tokens.copy()
        for i in set(range(prompt.rows)) - {row}:
            # Special ids stay where they are: the first generation's positions hang on them.
            plain = ids[i] < load_config(golden.checkpoint).vocab_rows // 2
            ids[i, plain] = rng.integers(5, 500, np.count_nonzero(plain))
            others[i] = rng.integers(5, 500, others.shape[1])
        changed = type(prompt)(ids, prompt.keep, prompt.position_ids, prompt.prefix)
        ours = teacher_forced(model.create_request(), changed, others)[1]
        np.testing.assert_array_equal(ours[row], wanted[row])


@each_small
def test_int8_row_of_a_batch_is_the_row_alone(golden, open_compiled: Opener):
    """Bit for bit: with padding and without, prompt and steps."""
    model = open_compiled(golden.checkpoint, "int8", None, ops="fused")
    batch, tokens = golden_prompt(golden, "batch", model), golden["batch_dec_tokens"]
    together = teacher_forced(model.create_request(), batch, tokens)
    for i in range(batch.rows):
        alone = teacher_forced(model.create_request(), batch.row(i), tokens[i : i + 1])
        np.testing.assert_array_equal(together[0][i][batch.keep[i] != 0], alone[0][0])
        np.testing.assert_array_equal(together[1][i], alone[1][0])


@each_small
def test_holes_in_a_mask_are_not_there(golden, open_compiled: Opener):
    """Columns that are masked in the middle of a prompt: as if they had been left out."""
    model = open_compiled(golden.checkpoint, ops="fused")
    prompt = golden_prompt(golden, "p17", model)
    keep, rng = prompt.keep.copy(), np.random.default_rng(0)
    keep[0, [2, 3, 7]] = 0
    ids = prompt.ids.copy()
    ids[keep == 0] = rng.integers(5, 500, 3)
    full = type(prompt)(ids, keep, prompt.position_ids, prompt.prefix)
    real = keep[0] != 0
    prefix = None if prompt.prefix is None else prompt.prefix - 3
    short = type(prompt)(ids[:, real], keep[:, real], prompt.position_ids[..., real], prefix)
    np.testing.assert_array_equal(full.feed(model.create_request())[:, real], short.feed(model.create_request()))


@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize(("hidden", "ffn"), [(64, 129), (96, 200), (64, 7)], ids=str)
def test_odd_sizes(weight_format, hidden, ffn, tmp_path: Path, open_compiled: Opener):
    """Sizes that fill no panel, head dims that fill no line: the stock lowering's result."""
    sizes = {"hidden_size": hidden, "ffn_hidden_size": ffn, "padded_vocab_size": 101, "kv_channels": 12}
    shapes = chatglm2.weight_shapes(load_config(V2.checkpoint).model_copy(update=sizes))
    rng = np.random.default_rng(ffn)
    weights = {
        name: rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1])) for name, shape in shapes.items()
    }
    checkpoint = write_checkpoint(tmp_path / "odd", V2.checkpoint, weights, **sizes)
    ids, logits = rng.integers(0, 101, (3, 11)), []
    for ops in ("fused", "stock"):
        model = open_compiled(checkpoint, weight_format, "f32", ops=ops)
        logits.append(own_prompt(ids, model).feed(model.create_request()))
    assert np.abs(logits[0] - logits[1]).max() < (0.1 if weight_format == "bf16" else 5e-3)


# At once


def run_together(model: CompiledModel, golden: Golden, names: list[str]) -> list[np.ndarray]:
    """A request for each prompt, all at once in threads of their own, five times over: the decode logits of each."""
    fed = [(golden_prompt(golden, name, model), golden[f"{name}_dec_tokens"]) for name in names]
    results: list[list[np.ndarray]] = [[] for _ in names]

    def work(i: int) -> None:
        request = model.create_request()
        for _ in range(5):
            results[i].append(teacher_forced(request, *fed[i])[1])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for repeated in results:
        assert len(repeated) == 5
        for one in repeated[1:]:
            np.testing.assert_array_equal(one, repeated[0])
    return [repeated[0] for repeated in results]


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("weight_format", ["f32", "int8"])
@each_small
def test_requests_at_once(golden, weight_format, streams, open_compiled: Opener):
    alone = open_compiled(golden.checkpoint, weight_format, None, ops="fused")
    shared = open_with_streams(open_compiled, golden, weight_format, streams)
    wanted = {
        name: teacher_forced(alone.create_request(), golden_prompt(golden, name, alone), golden[f"{name}_dec_tokens"])[
            1
        ]
        for name in ("p5", "batch")
    }
    names = ["p5", "batch"] * 2
    for name, ours in zip(names, run_together(shared, golden, names), strict=True):
        np.testing.assert_array_equal(ours, wanted[name])


@cache
def open_with_streams(open_compiled: Opener, golden: Golden, weight_format: str, streams: int) -> CompiledModel:
    properties = Frozen({"NUM_STREAMS": str(streams), "INFERENCE_NUM_THREADS": "2"})
    return open_compiled(golden.checkpoint, weight_format, None, ops="fused", properties=properties)


class Frozen(dict):
    """Properties as part of a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


# How far from the originals


@pytest.mark.parametrize("weight_format", ["bf16", "int8"])
@each_golden
def test_no_further_from_the_originals_than_the_stock_lowering(golden, weight_format, open_compiled: Opener):
    """Mean error over every prompt, teacher-forced, against the stock lowering in bf16, both with a bf16 cache."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
    from golden_report import compared

    errors = {}
    for ops, precision in (("fused", None), ("stock", "bf16")):
        model = open_compiled(golden.checkpoint, weight_format, precision, ops=ops)
        errors[ops] = np.concatenate([np.abs(ours - wanted).mean(axis=1) for ours, wanted in compared(golden, model)])
        assert np.isfinite(errors[ops]).all()
    assert errors["fused"].mean() <= errors["stock"].mean()
