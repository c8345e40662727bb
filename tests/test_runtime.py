"""Request against the goldens, and its own invariants."""

# ruff: noqa: F811 (a fixture is imported)

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from golden_cases import (  # noqa: F401
    CHATS,
    TOLERANCE,
    V1,
    V2,
    Opener,
    Prompt,
    chat_prompts,
    each_golden,
    each_small,
    golden_prompt,
    open_compiled,
    open_either,
    own_prompt,
    teacher_forced,
)
from golden_sets import Golden, cases

# Two ways through the same f32 graph: the sums may be taken in another order.
SAME = 1e-4


def original_cache(golden: Golden, prompt: str, part: str) -> np.ndarray:
    """Layer 0's keys or values of a set as [B, heads, T, D]."""
    stored = golden[f"{prompt}_final_{part}0"]
    return stored if golden.folder.name.startswith("glm4") else stored.transpose(1, 2, 0, 3)


@pytest.mark.parametrize(("golden", "prompt"), cases("dec_logits"))
def test_goldens(golden, prompt, open_either: Opener, record_property):
    model = open_either(golden.checkpoint)
    given, request = golden_prompt(golden, prompt, model), model.create_request()
    wanted = golden[f"{prompt}_dec_logits"]
    tokens = golden[f"{prompt}_dec_tokens"]
    prefill, decoded = teacher_forced(request, given, tokens)
    errors = {"decode": np.abs(decoded[:, : wanted.shape[1]] - wanted).max()}
    if f"{prompt}_prefill_logits" in golden:
        real = given.keep.astype(bool)
        errors["prefill"] = np.abs(prefill - golden[f"{prompt}_prefill_logits"])[real].max()
    if f"{prompt}_final_k0" in golden:
        real = given.extended(tokens[:, :-1]).keep.astype(bool)[:, None, :, None]
        for name, ours in zip("kv", request.cached(0), strict=True):
            errors[name] = np.abs(np.where(real, ours - original_cache(golden, prompt, name), 0)).max()
    for name, error in errors.items():
        record_property(name, float(error))
        print(f"{name}: max error {error:.1e}")
        assert error < TOLERANCE
    np.testing.assert_array_equal(decoded[:, : wanted.shape[1]].argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize("golden", CHATS, ids=str)
def test_chat_goldens(golden, open_either: Opener):
    model = open_either(golden.checkpoint)
    request = model.create_request()
    for i, ids in enumerate(chat_prompts(golden)):
        tokens = golden[f"q{i}_dec_tokens"][None]
        _, decoded = teacher_forced(request, own_prompt(ids, model), tokens)
        assert np.abs(decoded[0, 0] - golden[f"q{i}_last_logits"]).max() < TOLERANCE
        best = np.take_along_axis(decoded[0], golden[f"q{i}_dec_top16_ids"], axis=1)
        assert np.abs(best - golden[f"q{i}_dec_top16_logits"]).max() < TOLERANCE
        np.testing.assert_array_equal(decoded.argmax(-1), tokens)


def test_first_generation_scales_the_residual_for_28_layers(open_either: Opener, shared: Path):
    """The other reading, sqrt(2 num_layers), gives other logits by far, unless there are 28 layers."""
    folder = shared / "golden" / "v1" / "v1_tiny"
    other = np.load(folder / "golden_alpha_from_num_layers.npz")
    model = open_either(folder / "checkpoint")
    prompt = golden_prompt(Golden("shared", folder), "p17", model)
    ours = prompt.feed(model.create_request())
    assert np.abs(ours - other["p17_prefill_logits"]).max() > 100 * TOLERANCE


def test_padding_without_a_mask_is_seen(shared: Path, open_either: Opener):
    golden = Golden("shared", shared / "golden" / "v3" / "v3_tiny")
    model = open_either(golden.checkpoint)
    ours = own_prompt(golden["batch_input_ids"], model).feed(model.create_request())
    assert np.abs(ours - golden["batch_nomask_prefill_logits"]).max() < TOLERANCE


@each_golden
def test_batch_row_is_the_row_alone(golden, open_either: Opener):
    model = open_either(golden.checkpoint)
    batch = golden_prompt(golden, "batch", model)
    tokens = golden["batch_dec_tokens"]
    _, together = teacher_forced(model.create_request(), batch, tokens)
    for i in range(batch.rows):
        _, alone = teacher_forced(model.create_request(), batch.row(i), tokens[i : i + 1])
        assert np.abs(together[i] - alone[0]).max() < SAME


@each_small
def test_stepwise_is_full(golden, open_either: Opener):
    """From the end of the prompt on: the first generation's prefix must be in one call."""
    model = open_either(golden.checkpoint)
    prompt, tokens = golden_prompt(golden, "p5", model), golden["p5_dec_tokens"]
    _, stepwise = teacher_forced(model.create_request(), prompt, tokens)
    full = prompt.extended(tokens[:, :-1]).feed(model.create_request(), logits_to_keep=tokens.shape[1])
    assert np.abs(stepwise - full).max() < SAME


@pytest.mark.parametrize("cuts", [(1,), (16,), (3, 4, 11)], ids=str)
def test_chunked_prompt_is_the_whole(cuts, open_either: Opener):
    model = open_either(V2.checkpoint)
    prompt = golden_prompt(V2, "batch", model)
    whole, request = prompt.feed(model.create_request()), model.create_request()
    ends = (*cuts, prompt.ids.shape[1])
    chunks = [prompt.feed(request, start, end) for start, end in zip((0, *cuts), ends, strict=True)]
    real = prompt.keep.astype(bool)
    assert np.abs(np.concatenate(chunks, axis=1) - whole)[real].max() < SAME


def test_chunk_after_the_prefix_is_the_whole(open_either: Opener):
    """The first generation: `mid` has seven columns from <sop> on, which are causal."""
    model = open_either(V1.checkpoint)
    prompt = golden_prompt(V1, "mid", model)
    whole, request = prompt.feed(model.create_request()), model.create_request()
    first_end = int(prompt.prefix[0]) + 1
    chunks = [prompt.feed(request, 0, first_end), prompt.feed(request, first_end, None)]
    assert np.abs(np.concatenate(chunks, axis=1) - whole).max() < SAME


@each_small
@pytest.mark.parametrize("precision", ["f32", None])
def test_reset_is_fresh(golden, precision, open_either: Opener):
    model = open_either(golden.checkpoint, "int8", precision)
    prompt, batch = golden_prompt(golden, "p5", model), golden_prompt(golden, "batch", model)
    fresh = teacher_forced(model.create_request(), prompt, golden["p5_dec_tokens"])
    used = model.create_request()
    teacher_forced(used, batch, golden["batch_dec_tokens"])
    used.reset()
    assert (used.past_length, used.rows) == (0, 0)
    for ours, theirs in zip(teacher_forced(used, prompt, golden["p5_dec_tokens"]), fresh, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@each_small
def test_warm_up_leaves_no_trace(golden, open_either: Opener):
    model = open_either(golden.checkpoint)
    prompt, tokens = golden_prompt(golden, "p5", model), golden["p5_dec_tokens"]
    request = model.create_request()
    alone = teacher_forced(request, prompt, tokens)[1]
    request.reset()
    prompt.feed(request)
    model.warm_up()
    assert request.past_length == prompt.ids.shape[1]
    for used in (request, model.create_request()):
        used.reset()
        np.testing.assert_array_equal(teacher_forced(used, prompt, tokens)[1], alone)


@each_small
def test_requests_do_not_disturb_each_other(golden, open_either: Opener):
    model = open_either(golden.checkpoint)
    one, other = golden_prompt(golden, "p5", model), golden_prompt(golden, "batch", model)
    tokens, other_tokens = golden["p5_dec_tokens"], golden["batch_dec_tokens"]
    alone = teacher_forced(model.create_request(), one, tokens)[1]
    request, second = model.create_request(), model.create_request()
    steps = [one.feed(request)[:, -1]]
    other.feed(second)
    whole, other_whole = one.extended(tokens[:, :-1]), other.extended(other_tokens[:, :-1])
    for i in range(tokens.shape[1] - 1):
        at, other_at = one.ids.shape[1] + i, other.ids.shape[1] + i
        other_whole.feed(second, other_at, other_at + 1)
        steps.append(whole.feed(request, at, at + 1)[:, -1])
    np.testing.assert_array_equal(np.stack(steps, axis=1), alone)


@each_small
def test_beam_idx_continues_the_rows_it_names(golden, open_either: Opener):
    """Reordered, repeated, more and fewer rows: as if each row had been computed from its start."""
    model = open_either(golden.checkpoint)
    prompt = golden_prompt(golden, "batch", model)
    history = prompt
    request, rng = model.create_request(), np.random.default_rng(0)
    prompt.feed(request)
    for beams in ([2, 0, 1], [1, 1, 2], [0, 0, 1, 2, 2], [4, 1], [0, 1]):
        rows = np.array(beams)
        tokens = rng.integers(0, model.config.vocab_rows, (rows.size, 1))
        prefix = None if history.prefix is None else history.prefix[rows]
        chosen = Prompt(history.ids[rows], history.keep[rows], history.position_ids[rows], prefix)
        history = chosen.extended(tokens)
        last = history.ids.shape[1] - 1
        ours = request.infer(tokens, history.keep, history.position_ids[..., last:], rows, 1, prefix)
        assert np.abs(ours - history.feed(model.create_request(), logits_to_keep=1)).max() < SAME
    assert request.rows == 2


@each_small
@pytest.mark.parametrize("kept", [1, 2, 30, 31])
def test_logits_to_keep_are_the_last(golden, kept, open_either: Opener):
    model = open_either(golden.checkpoint)
    prompt = golden_prompt(golden, "batch", model)
    whole = prompt.feed(model.create_request())
    np.testing.assert_allclose(prompt.feed(model.create_request(), logits_to_keep=kept), whole[:, -kept:], atol=SAME)


@each_small
def test_default_precision_computes_the_same_model(golden, open_either: Opener):
    """Where the device prefers bf16, unit roundoff 2^-8 over some dozens of operations in a row stays far below 10 %
    of the logits' norm; a wrong kernel does not."""
    prompt = golden_prompt(golden, "batch", open_either(golden.checkpoint))
    exact, ours = (
        teacher_forced(open_either(golden.checkpoint, "f32", p).create_request(), prompt, golden["batch_dec_tokens"])[1]
        for p in ("f32", None)
    )
    assert np.linalg.norm(ours - exact) < 0.1 * np.linalg.norm(exact)


def test_device_may_be_written_in_small_letters(open_either: Opener):
    usual, small = open_either(V2.checkpoint), open_either(V2.checkpoint, device="cpu")
    prompt = golden_prompt(V2, "p5", usual)
    np.testing.assert_array_equal(prompt.feed(small.create_request()), prompt.feed(usual.create_request()))
