"""MultiHeadAttention with its states, as the lowering builds it."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset15 as opset
import pytest
from openvino.op.util import Variable, VariableInfo
from operations import compiled, create, needs_library, parameter, rotated

from chatglm_ov.native import native

pytestmark = needs_library

H, G, D = 8, 2, 16
WIDTH = (H + 2 * G) * D


class Layer:
    """One attention layer with its states, as the lowering builds it."""

    def __init__(self, cache_type, in_place=1, capacity=(4, 3)):
        self.block_bytes = native().CacheLayout(cache_type, G, D).block_bytes
        self.capacity = capacity
        names = ["qkv", "cos", "sin", "mask", "ids", "beam_idx", "cache_shape", "prefix"]
        shapes = [[-1, -1, WIDTH], [-1, -1, 4], [-1, -1, 4], [-1, -1], [-1, -1], [-1], [3], [-1]]
        types = [np.float32] * 3 + [np.int32] * 3 + [np.int64, np.int32]
        p = {name: parameter(s, t) for name, s, t in zip(names, shapes, types, strict=True)}
        table_variable = self._variable("beam_table", [-1, -1], ov.Type.i32)
        cache_variable = self._variable("cache", [-1, -1, G, -1], ov.Type.u8)
        past = opset.read_value(opset.constant(np.zeros((1, 0), np.int32)), table_variable)
        rows = create(
            "CacheTable", [v.output(0) for v in (past, p["mask"], p["ids"], p["beam_idx"], p["prefix"])], {"prefix": 1}
        )
        ends = opset.split(p["cache_shape"], np.int64(0), 3)
        shape = opset.concat([ends.output(0), ends.output(1), opset.constant(np.array([G])), ends.output(2)], 0)
        cache = opset.read_value(opset.broadcast(opset.constant(np.uint8(0)), shape), cache_variable)
        inputs = [p[n].output(0) for n in names[:3]] + rows.outputs() + [cache.output(0)]
        attributes = {"num_attention_heads": H, "num_key_value_heads": G, "head_dim": D, "in_place": in_place}
        node = create("MultiHeadAttention", inputs, attributes)
        new_cache = cache if in_place else opset.convert(node.output(1), "u8")
        sinks = [opset.assign(rows, table_variable), opset.assign(new_cache, cache_variable)]
        self.model = compiled([node.output(0)], list(p.values()), sinks)

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
def test_a_prompt_and_steps_behind_it(cache_type, length):
    layer = Layer(cache_type)
    qkv, angles = sequences(length, 2, length + 3)
    mask = np.ones((2, length + 3))
    mask[0, : length // 2] = 0
    seen = [layer(qkv[:, :length], angles[:, :length], mask[:, :length])]
    for i in range(length, length + 3):
        seen.append(layer(qkv[:, i : i + 1], angles[:, i : i + 1], mask[:, : i + 1]))
    wanted = reference(qkv, angles, mask)
    assert np.abs(np.concatenate(seen, axis=1) - wanted).max() <= BOUND[cache_type]


def test_prefix_is_seen_by_all():
    layer = Layer("f32")
    qkv, angles = sequences(0, 2, 9)
    mask = np.ones((2, 9))
    mask[1, :2] = 0
    prefix = np.array([6, 7])
    seen = layer(qkv, angles, mask, prefix=prefix)
    assert np.abs(seen - reference(qkv, angles, mask, prefix)).max() <= BOUND["f32"]


@pytest.mark.parametrize("cache_type", ["f32", "bf16", "int8"])
def test_beams_read_through_the_table(cache_type):
    """Reordered rows give what a fresh cache gives for the sequences that they stand for."""
    rng = np.random.default_rng(5)
    layer = Layer(cache_type)
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
    fresh = Layer(cache_type)
    fresh(history[:, :-1], turn[:, :-1], mask[:, :-1])
    np.testing.assert_array_equal(seen, fresh(history[:, -1:], turn[:, -1:], mask))


def test_a_row_does_not_depend_on_the_others():
    qkv, angles = sequences(6, 3, 50)
    together = Layer("bf16")(qkv, angles, np.ones((3, 50)))
    for row in range(3):
        alone = Layer("bf16")(qkv[row : row + 1], angles[row : row + 1], np.ones((1, 50)))
        np.testing.assert_array_equal(together[row], alone[0])


@pytest.mark.parametrize("cache_type", ["f32", "bf16", "int8"])
def test_a_row_behind_padding_is_the_row_alone(cache_type):
    """Bit for bit, with a past of several parts, and few new tokens beside a row that has many."""
    past, few, many = 300, 5, 60
    qkv, angles = sequences(11, 2, past + many)
    mask = np.ones((2, past + many))
    mask[1, past : past + many - few] = 0
    together = Layer(cache_type, capacity=(2, 12))
    together(qkv[:, :past], angles[:, :past], mask[:, :past])
    seen = together(qkv[:, past:], angles[:, past:], mask)
    alone = Layer(cache_type, capacity=(1, 12))
    alone(qkv[1:, :past], angles[1:, :past], np.ones((1, past)))
    wanted = alone(qkv[1:, -few:], angles[1:, -few:], np.ones((1, past + few)))
    np.testing.assert_array_equal(seen[1:, -few:], wanted)
    assert not seen[1, :-few].any()


@pytest.mark.parametrize("cache_type", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("past", [255, 256, 260])
def test_nan_in_the_last_key_is_seen(cache_type, past):
    """Wherever the part of the cache begins that holds it."""
    qkv, angles = sequences(12, 1, past + 1)
    qkv[0, past, H * D : (H + G) * D] = np.nan
    layer = Layer(cache_type, capacity=(1, 12))
    layer(qkv[:, :past], angles[:, :past], np.ones((1, past)))
    assert np.isnan(layer(qkv[:, past:], angles[:, past:], np.ones((1, past + 1)))).all()


def test_going_back_overwrites():
    layer = Layer("bf16")
    qkv, angles = sequences(7, 1, 60)
    whole = layer(qkv, angles, np.ones((1, 60)))
    layer(qkv[:, :7] * 3, angles[:, :7], np.ones((1, 40)))
    again = layer(qkv[:, 33:], angles[:, 33:], np.ones((1, 60)))
    np.testing.assert_allclose(again, whole[:, 33:], rtol=0, atol=2e-5)


def test_another_sequence_without_a_reset_is_as_fresh():
    layer = Layer("bf16")
    nan = np.full((1, 80, WIDTH), np.nan, np.float32)
    layer(nan, np.zeros((1, 80, 4)), np.ones((1, 80)))
    qkv, angles = sequences(8, 1, 37)
    seen = layer(qkv, angles, np.ones((1, 37)))
    np.testing.assert_array_equal(seen, Layer("bf16")(qkv, angles, np.ones((1, 37))))


def test_in_place_and_copied_states_agree():
    qkv, angles = sequences(9, 2, 20)
    kept, copied = Layer("bf16"), Layer("bf16", in_place=0)
    for begin, end in [(0, 15), (15, 16), (16, 20)]:
        arguments = qkv[:, begin:end], angles[:, begin:end], np.ones((2, end))
        np.testing.assert_array_equal(kept(*arguments), copied(*arguments))


@pytest.mark.parametrize(
    ("capacity", "message"), [((2, 1), "KV cache: 40 slots in row 0, wanted at most 32"), ((1, 2), "KV cache: row 1")]
)
def test_a_cache_that_is_too_small_is_refused(capacity, message):
    layer = Layer("bf16", capacity=capacity)
    qkv, angles = sequences(10, 2, 40)
    with pytest.raises(RuntimeError, match=message):
        layer(qkv, angles, np.ones((2, 40)))


@pytest.mark.parametrize("rows", [1, 3])
def test_angles_of_other_tokens_are_refused(rows):
    layer = Layer("bf16")
    qkv, angles = sequences(10, 2, 5)
    with pytest.raises(RuntimeError, match=r"MultiHeadAttention: angles of .* wanted those of .* tokens"):
        layer(qkv, np.resize(angles, (rows, *angles.shape[1:])), np.ones((2, 5)))


@pytest.mark.parametrize("heads", [(-2, 1, 16), (2, -1, 16), (0, 1, 16), (2, 1, 1 << 62), (1 << 40, 1, 16)])
def test_numbers_of_heads_that_cannot_be_are_refused(heads):
    h, g, d = heads
    names = {"num_attention_heads": h, "num_key_value_heads": g, "head_dim": d, "in_place": 0}
    shapes = [([1, 1, -1], np.float32), *[([1, 1, 8], np.float32)] * 2, *[([1, 1], np.int32)] * 3, ([1], np.int32)]
    inputs = [parameter(*each).output(0) for each in [*shapes, ([1, 1, 1, -1], np.uint8)]]
    with pytest.raises(RuntimeError, match="wanted 1 to 1048576"):
        create("MultiHeadAttention", inputs, names)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("at", [5, 20, 300])
@pytest.mark.parametrize("cache_type", ["f32", "bf16", "int8"])
def test_what_is_not_finite_does_not_reach_tokens_before_it(cache_type, at, value):
    """Not even those in its tile, of whose weights its own are 0; alone, in a tile of several parts, and in chunks."""
    length = at + 9
    qkv, angles = sequences(0, 1, length)
    qkv[0, at, (H + G) * D :] = value
    capacity = (4, length // 32 + 1)
    whole = Layer(cache_type, capacity=capacity)(qkv, angles, np.ones((1, length)))[0]
    before = Layer(cache_type, capacity=capacity)(qkv[:, :at], angles[:, :at], np.ones((1, at)))[0]
    assert np.isfinite(before).all() and np.isfinite(whole[:at]).all()
    # Probabilities are rounded to bf16 or int16 where values are no floats, to other maxima in other parts.
    error = np.abs(whole[:at] - before).max() / np.abs(qkv[0, :at, (H + G) * D :]).max()
    assert error < (1e-6 if cache_type == "f32" else 2**-8)
    assert not np.isfinite(whole[at:]).all(1).any()
    layer = Layer(cache_type, capacity=capacity)
    layer(qkv[:, : at - 2], angles[:, : at - 2], np.ones((1, at - 2)))
    chunk = layer(qkv[:, at - 2 :], angles[:, at - 2 :], np.ones((1, length)))[0]
    assert np.isfinite(chunk[:2]).all() and not np.isfinite(chunk[2:]).all(1).any()
