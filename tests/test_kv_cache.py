"""The cache in blocks of slots: its layout, its room, and what is done with it."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from conversions import interrupted
from golden_cases import (  # noqa: F401
    V1,
    V2,
    Opener,
    Prompt,
    each_small,
    golden_prompt,
    open_compiled,
    own_prompt,
    teacher_forced,
    without_library,
)

from chatglm_ov.errors import ChatGLMError
from chatglm_ov.runtime import kv_cache
from chatglm_ov.runtime.kv_cache import BLOCK_SLOTS, FIRST_SLOTS, LARGEST_STEP, BlockLayout, capacity
from chatglm_ov.runtime.loading import CompiledModel

ELEMENTS = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "int8": np.int8}
each_element_type = pytest.mark.parametrize("element_type", ELEMENTS)


def fused(open_compiled: Opener, golden, *how: object, **options: object) -> CompiledModel:
    return open_compiled(golden.checkpoint, *(how or ("f32", "f32")), ops="fused", **options)


# Layout


def encoded(keys: np.ndarray, values: np.ndarray, element_type: str, scales: np.ndarray) -> np.ndarray:
    """One block of slots by the formulas of csrc/kernels/cache_layout.h, element by element. keys and values
    [32, D] as elements, scales float32 [2, 32]."""
    dim = keys.shape[1]
    padded = -(-dim // 16) * 16
    parts = np.zeros((2, BLOCK_SLOTS * padded), ELEMENTS[element_type])
    for slot in range(BLOCK_SLOTS):
        for d in range(dim):
            parts[0, ((slot // 16 * (padded // 2) + d // 2) * 16 + slot % 16) * 2 + d % 2] = keys[slot, d]
            parts[1, ((d // 16 * 16 + slot // 2) * 16 + d % 16) * 2 + slot % 2] = values[slot, d]
    block = parts.reshape(-1).view(np.uint8)
    return np.append(block, scales.reshape(-1).view(np.uint8)) if element_type == "int8" else block


@each_element_type
@pytest.mark.parametrize("dim", [16, 12, 40, 128])
def test_blocks_are_read_as_they_are_documented(element_type, dim):
    rng, layout = np.random.default_rng(dim), BlockLayout(element_type, 2, dim)
    elements = (rng.standard_normal((3, 2, 2, BLOCK_SLOTS, dim)) * 50).astype(ELEMENTS[element_type])
    scales = rng.random((3, 2, 2, BLOCK_SLOTS), np.float32)
    blocks = np.stack([[encoded(*elements[n, g], element_type, scales[n, g]) for g in range(2)] for n in range(3)])
    assert blocks.shape[-1] == layout.block_bytes
    assert layout.nbytes(1, 3) == blocks.nbytes
    wanted = elements.astype(np.float32) * (scales[..., None] if element_type == "int8" else 1)
    for ours, part in zip(layout.decode(blocks), np.moveaxis(wanted, 2, 0), strict=True):
        np.testing.assert_array_equal(ours, part.transpose(1, 0, 2, 3).reshape(2, 3 * BLOCK_SLOTS, dim))


def test_room_grows_in_steps():
    assert [capacity(slots) for slots in (1, 256, 257, 600, 2048, 2049, 4097)] == [
        256,
        256,
        512,
        1024,
        2048,
        4096,
        6144,
    ]
    rooms = np.unique([capacity(slots) for slots in range(1, 40_000, 7)])
    assert rooms[0] == FIRST_SLOTS and (rooms % BLOCK_SLOTS == 0).all()
    assert np.diff(rooms).max() == LARGEST_STEP


# Growth, rollback, reset

LENGTH = 600


@pytest.fixture
def long_prompt(open_compiled: Opener) -> Prompt:
    """Three rows of 600 columns with padding at the left and holes inside, positions within the model's 512."""
    model = fused(open_compiled, V2)
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, model.config.vocab_rows, (3, LENGTH)), np.ones((3, LENGTH), np.int64)
    mask[0, :90], mask[1, 100:110], mask[2, 333] = 0, 0, 0
    prompt = own_prompt(ids, model, mask)
    return Prompt(prompt.ids, prompt.keep, prompt.position_ids % 512, None)


def in_pieces(prompt: Prompt, request, ends: list[int], start: int = 0) -> np.ndarray:
    pieces = []
    for end in ends:
        pieces.append(prompt.feed(request, start, end))
        start = end
    return np.concatenate(pieces, axis=1)


@without_library
@each_element_type
def test_a_cache_that_grows_in_a_sequence(element_type, long_prompt: Prompt, open_compiled: Opener):
    """Bit for bit as if it had been large enough from the start: what is moved is the whole block."""
    model = fused(open_compiled, V2, kv_cache_format=element_type)
    ends = [200, *range(201, 270), 400, 520, *range(521, 530), LENGTH]
    grown, roomy = model.create_request(), model.create_request()
    roomy.cache.make_room(3, LENGTH, keep=False)
    ours, wanted = in_pieces(long_prompt, grown, ends[:1]), in_pieces(long_prompt, roomy, ends[:1])
    sizes = [grown.cache.blocks]
    np.testing.assert_array_equal(ours, wanted)
    for start, end in pairwise(ends):
        np.testing.assert_array_equal(long_prompt.feed(grown, start, end), long_prompt.feed(roomy, start, end))
        sizes.append(grown.cache.blocks)
    assert sorted(set(sizes)) == [8, 16, 32]
    assert roomy.cache.blocks == 32
    real = long_prompt.keep.astype(bool)
    for ours, wanted in zip(grown.cached(1), roomy.cached(1), strict=True):
        np.testing.assert_array_equal(ours, wanted)
        assert (ours.transpose(0, 2, 1, 3)[~real] == 0).all() and (ours.transpose(0, 2, 1, 3)[real] != 0).any()


@without_library
def test_rows_of_an_earlier_sequence_stay_while_slots_are_added(open_compiled: Opener):
    model = fused(open_compiled, V2)
    ids = np.random.default_rng(1).integers(3, 200, (1, 300))
    long, wide = own_prompt(ids, model), own_prompt(np.full((8, 3), 7), model)
    request = model.create_request()
    wide.feed(request)
    request.reset()
    ours, wanted = (in_pieces(long, each, [250, 300]) for each in (request, model.create_request()))
    np.testing.assert_array_equal(ours, wanted)
    assert (request.cache.rows, request.cache.blocks) == (8, 16)


@without_library
def test_slots_of_an_earlier_sequence_stay_while_rows_are_added(open_compiled: Opener):
    model = fused(open_compiled, V2)
    long, short = (own_prompt(np.arange(5, 5 + length)[None], model) for length in (400, 5))
    request = model.create_request()
    long.feed(request)
    request.reset()
    results = []
    for each in (request, model.create_request()):
        short.feed(each)
        step = np.array([[4], [5], [6]])
        results.append(each.infer(step, np.ones((3, 6), np.int64), np.full((3, 1), 5), np.zeros(3, np.int32)))
    np.testing.assert_array_equal(*results)
    assert (request.cache.rows, request.cache.blocks) == (3, 16)


@without_library
def test_rollback_overwrites(long_prompt: Prompt, open_compiled: Opener):
    model = fused(open_compiled, V2)
    request, ends = model.create_request(), [150, 300]
    whole = in_pieces(long_prompt, request, ends)
    nbytes = request.cache.nbytes
    # Other tokens behind column 150, then back again.
    other = Prompt(long_prompt.ids[:, ::-1], long_prompt.keep, long_prompt.position_ids, None)
    request.truncate(150)
    assert np.abs(other.feed(request, 150, 300) - whole[:, 150:]).max() > 0.1
    request.truncate(150)
    assert request.past_length == 150
    np.testing.assert_array_equal(long_prompt.feed(request, 150, 300), whole[:, 150:])
    for i in (299, 298, 280):
        request.truncate(i)
        np.testing.assert_allclose(long_prompt.feed(request, i, 300), whole[:, i:], atol=1e-4)
    assert request.cache.nbytes == nbytes
    request.truncate(0)
    assert (request.past_length, request.rows) == (0, 0)
    assert all(part.shape[2] == 0 for part in request.cached(0))
    row = long_prompt.row(1)
    np.testing.assert_array_equal(row.feed(request, 0, 50), row.feed(model.create_request(), 0, 50))


@without_library
@pytest.mark.parametrize("columns", [-1, 6])
def test_rollback_to_where_nothing_is(columns, open_compiled: Opener):
    model = fused(open_compiled, V2)
    request = model.create_request()
    golden_prompt(V2, "p5", model).feed(request)
    with pytest.raises(ChatGLMError, match=rf"past_length is {columns}, expected 0 to 5"):
        request.truncate(columns)
    assert request.past_length == 5


@without_library
def test_no_rollback_into_a_prefix(open_compiled: Opener):
    model = fused(open_compiled, V1)
    request, prompt = model.create_request(), golden_prompt(V1, "mid", model)
    whole, prefix = prompt.feed(request), int(prompt.prefix[0])
    with pytest.raises(ChatGLMError, match=rf"expected 0, or {prefix} \(the prefix\) or more"):
        request.truncate(prefix - 1)
    request.truncate(prefix)
    np.testing.assert_allclose(prompt.feed(request, prefix), whole[:, prefix:], atol=1e-4)


@pytest.mark.parametrize("precision", ["f32", None])
def test_stock_operations_go_back(precision: str | None, open_compiled: Opener):
    """What is left of the plugin's cache is what it was, rounded as it was."""
    model = open_compiled(V2.checkpoint, precision=precision)
    request, prompt = model.create_request(), golden_prompt(V2, "p17", model)
    whole = prompt.feed(request)
    for columns in (16, 9, 3):
        request.truncate(columns)
        assert request.past_length == columns
        tolerance = 1e-4 if precision == "f32" else 0.05 * np.abs(whole).max()
        np.testing.assert_allclose(prompt.feed(request, columns), whole[:, columns:], rtol=0, atol=tolerance)
    request.truncate(0)
    np.testing.assert_array_equal(prompt.feed(request), whole)


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("cache_format", ["int8", "bf16", "f32"])
def test_a_plugins_cache_takes_more_rows_than_before(cache_format: str, rows: int, open_compiled: Opener):
    """Only one of integers begins anew for them."""
    model = open_compiled(V2.checkpoint, precision="f32", kv_cache_format=cache_format)
    ids = np.random.default_rng(1).integers(3, 200, (rows, 12))
    (one, batch), tokens = (own_prompt(each, model) for each in (ids[:1, :7], ids[:, :3])), ids[:, 3:]
    wanted = teacher_forced(model.create_request(), batch, tokens)
    request = model.create_request()
    first = teacher_forced(request, one, tokens[:1])
    before = request.infer_request
    for _ in range(2):
        for ours, fresh in zip(teacher_forced(request, batch, tokens), wanted, strict=True):
            np.testing.assert_array_equal(ours, fresh)
    infer_request = request.infer_request
    assert (infer_request is not before) == (cache_format == "int8")
    for ours, fresh in zip(teacher_forced(request, one, tokens[:1]), first, strict=True):
        np.testing.assert_array_equal(ours, fresh)
    assert request.infer_request is infer_request


@pytest.mark.parametrize("calls", [[(6, [2]), (1, [70]), (4, [2, 100])], [(5, [1]), (3, [100]), (5, [100, 70])]])
def test_a_plugins_int8_cache_whose_rows_come_and_go(calls, open_compiled: Opener):
    model = open_compiled(V2.checkpoint, precision="f32", kv_cache_format="int8")
    request, rng = model.create_request(), np.random.default_rng(3)
    for rows, lengths in calls:
        prompt = own_prompt(rng.integers(3, 200, (rows, sum(lengths))), model)
        request.reset()
        ends = np.cumsum(lengths).tolist()
        ours, wanted = (in_pieces(prompt, each, ends) for each in (request, model.create_request()))
        np.testing.assert_array_equal(ours, wanted)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Ctrl-C at a tensor that the cache makes for one of its states."""
    made, tensor = [], kv_cache.ov.Tensor

    def interrupted(*args: object, **options: object) -> object:
        made.append(args)
        if len(made) > calls:
            raise KeyboardInterrupt
        return tensor(*args, **options)

    monkeypatch.setattr(kv_cache.ov, "Tensor", interrupted)


def test_a_rollback_that_is_interrupted(open_compiled: Opener, monkeypatch: pytest.MonkeyPatch):
    """Layers of different lengths are not gone on with, not even after a reset."""
    model = open_compiled(V2.checkpoint, precision="f32")
    request, prompt = model.create_request(), golden_prompt(V2, "p17", model)
    wanted = prompt.feed(request)
    interrupt_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        request.truncate(9)
    monkeypatch.undo()
    assert request.past_length == 0
    np.testing.assert_array_equal(prompt.feed(request), wanted)
    request.truncate(9)
    np.testing.assert_allclose(prompt.feed(request, 9), wanted[:, 9:], rtol=0, atol=1e-4)


def test_a_reset_that_is_interrupted(open_compiled: Opener, monkeypatch: pytest.MonkeyPatch):
    """The next call begins a sequence all the same."""
    model = open_compiled(V2.checkpoint, precision="f32")
    request, prompt = model.create_request(), golden_prompt(V2, "p17", model)
    wanted = prompt.feed(request)
    monkeypatch.setattr(request.cache, "forget", interrupted)
    with pytest.raises(KeyboardInterrupt):
        request.reset()
    assert request.past_length == 0
    np.testing.assert_array_equal(prompt.feed(request), wanted)


@without_library
def test_an_allocation_that_is_interrupted(open_compiled: Opener, monkeypatch: pytest.MonkeyPatch):
    model = fused(open_compiled, V2)
    request = model.create_request()
    long, rows = (own_prompt(np.full(shape, 7), model) for shape in ((1, 400), (8, 2)))
    wanted = long.feed(request)
    request.reset()
    interrupt_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        rows.feed(request)
    monkeypatch.undo()
    np.testing.assert_array_equal(long.feed(request), wanted)


def buffers(request) -> dict[str, int]:
    """Addresses of the caches of all layers."""
    states = request.infer_request.query_state()
    return {state.name: state.state.data.ctypes.data for state in states if state.name != "beam_table"}


@without_library
@each_small
@pytest.mark.parametrize("weight_format", ["f32", "int8"])
def test_a_reset_keeps_the_memory_and_nothing_else(golden, weight_format, open_compiled: Opener):
    model = fused(open_compiled, golden, weight_format, None)
    one, batch = golden_prompt(golden, "p5", model), golden_prompt(golden, "batch", model)
    fresh = teacher_forced(model.create_request(), one, golden["p5_dec_tokens"])
    request = model.create_request()
    teacher_forced(request, batch, golden["batch_dec_tokens"])
    places, room = buffers(request), request.cache.nbytes
    for _ in range(2):
        for ours, wanted in zip(teacher_forced(request, one, golden["p5_dec_tokens"]), fresh, strict=True):
            np.testing.assert_array_equal(ours, wanted)
    assert (buffers(request), request.cache.nbytes) == (places, room)


@without_library
@each_small
def test_reset_state_of_the_infer_request(golden, open_compiled: Opener):
    """OpenVINO's own reset, by somebody who does not know this class."""
    model = fused(open_compiled, golden)
    prompt, request = golden_prompt(golden, "batch", model), model.create_request()
    wanted = teacher_forced(request, prompt, golden["batch_dec_tokens"])[1]
    request.infer_request.reset_state()
    np.testing.assert_array_equal(teacher_forced(request, prompt, golden["batch_dec_tokens"])[1], wanted)


@without_library
@each_small
def test_beams_across_rows_of_different_lengths(golden, open_compiled: Opener):
    """Rows that change places, with slots of one where the other's next one would be."""
    model = fused(open_compiled, golden)
    history = golden_prompt(golden, "batch", model)
    request, rng = model.create_request(), np.random.default_rng(1)
    history.feed(request)
    for _ in range(12):
        rows = rng.integers(0, history.rows, rng.integers(1, 6))
        tokens = rng.integers(0, model.config.vocab_rows, (rows.size, 1))
        prefix = None if history.prefix is None else history.prefix[rows]
        history = Prompt(history.ids[rows], history.keep[rows], history.position_ids[rows], prefix).extended(tokens)
        last = history.ids.shape[1] - 1
        ours = request.infer(tokens, history.keep, history.position_ids[..., last:], rows, 1, prefix)
        fresh = model.create_request()
        assert np.abs(ours - history.feed(fresh, logits_to_keep=1)).max() < 1e-4
        for stored, wanted in zip(request.cached(0), fresh.cached(0), strict=True):
            np.testing.assert_allclose(stored, wanted, atol=1e-4)


@without_library
def test_a_mask_that_changes_for_columns_in_the_cache(open_compiled: Opener):
    """They have slots, or none: it is too late. The cache stays as it was."""
    model = fused(open_compiled, V2)
    prompt, request = golden_prompt(V2, "batch", model), model.create_request()
    prompt.feed(request)
    step = prompt.extended(V2["batch_dec_tokens"][:, :1])
    wrong = Prompt(step.ids, step.keep.copy(), step.position_ids, None)
    wrong.keep[1, 20] ^= 1
    with pytest.raises(ChatGLMError, match=r"attention_mask\[1, 20\] is 0, expected 1, as when the column was fed"):
        wrong.feed(request, prompt.ids.shape[1])
    ours = step.feed(request, prompt.ids.shape[1])
    assert np.abs(ours[:, -1] - V2["batch_dec_logits"][:, 1]).max() < 1e-3


@without_library
@pytest.mark.parametrize("keep", [True, False])
def test_a_cache_that_the_memory_cannot_hold(keep, open_compiled: Opener):
    model = fused(open_compiled, V2)
    prompt, request = golden_prompt(V2, "p5", model), model.create_request()
    prompt.feed(request)
    room = request.cache.rows, request.cache.blocks
    with pytest.raises(ChatGLMError, match=r"KV cache: free memory is .* GB, expected .* GB more, for 4096 rows of"):
        request.cache.make_room(4096, 1 << 20, keep=keep)
    assert (request.cache.rows, request.cache.blocks) == room
    step = prompt.extended(V2["p5_dec_tokens"][:, :1])
    assert np.abs(step.feed(request, 5)[:, -1] - V2["p5_dec_logits"][:, 1]).max() < 1e-3


@without_library
def test_memory_that_a_cache_grows_in(open_compiled: Opener, monkeypatch: pytest.MonkeyPatch):
    """What is new in each layer, and one layer a second time while it is moved."""
    model = fused(open_compiled, V2)
    cache, layers = model.create_request().cache, model.config.num_layers
    cache.allocate(1, 8, keep=False)
    small, large = (cache.layout.nbytes(1, blocks) for blocks in (8, 16))
    needed = layers * (large - small) + large
    monkeypatch.setattr(kv_cache, "available", lambda: needed - 1)
    with pytest.raises(ChatGLMError, match="KV cache: free memory is"):
        cache.allocate(1, 16, keep=True)
    monkeypatch.setattr(kv_cache, "available", lambda: needed)
    cache.allocate(1, 16, keep=True)
    assert cache.blocks == 16


@without_library
@pytest.mark.parametrize("element_type", ["bf16", "int8"])
@each_small
def test_elements_are_rounded_once(golden, element_type, open_compiled: Opener):
    """Layer 0's keys and values, against those of an f32 cache: half a unit of bf16, half a step of int8."""
    exact, ours = (fused(open_compiled, golden, kv_cache_format=each) for each in ("f32", element_type))
    prompt = golden_prompt(golden, "batch", ours)
    caches = []
    for model in (exact, ours):
        request = model.create_request()
        prompt.feed(request)
        caches.append(request.cached(0))
    for wanted, rounded in zip(*caches, strict=True):
        largest = np.abs(wanted).max(axis=-1, keepdims=True)
        # The scale itself, and its product with an integer, are rounded too.
        bound = np.abs(wanted) * 2.0**-8 if element_type == "bf16" else largest / 127 * (0.5 + 2.0**-14)
        assert (np.abs(rounded - wanted) <= bound * (1 + 2.0**-20)).all()
        assert np.abs(rounded - wanted).max() > 0
