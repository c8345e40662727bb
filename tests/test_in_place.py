"""Attention that writes into the value of a state: whether that is so is noticed, and what is done where it is not."""

# ruff: noqa: F811 (a fixture is imported)

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from golden_cases import (  # noqa: F401
    V1,
    V2,
    AnyProperties,
    Opener,
    each_small,
    golden_prompt,
    open_compiled,
    teacher_forced,
    without_library,
)

from chatglm_ov import convert
from chatglm_ov.runtime import in_place
from chatglm_ov.runtime import loading as runtime
from chatglm_ov.runtime.loading import CompiledModel, load_model

pytestmark = without_library


def test_this_openvino_keeps_one_buffer():
    assert in_place.works_in_place()


def test_a_model_that_copies_is_noticed():
    model = in_place.trial_model()
    assert in_place.is_kept_in_place(model)
    in_place.copy_caches(model)
    assert not in_place.is_kept_in_place(model)


def copying(open_compiled: Opener, checkpoint: Path, *how: str | None) -> CompiledModel:
    """A model by the fall-back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "chain_operations", in_place.copy_caches)
        return open_compiled(checkpoint, *how, ops="fused", properties=AnyProperties())


@each_small
@pytest.mark.parametrize("how", [("f32", "f32"), ("int8", None)], ids=str)
def test_the_fall_back_gives_the_same(golden, how, open_compiled: Opener):
    """Bit for bit: logits, and the cache, over a prompt and steps, a reorder, growth and a reset."""
    model = open_compiled(golden.checkpoint, *how, ops="fused")
    prompt = golden_prompt(golden, "batch", model)
    requests = [each.create_request() for each in (model, copying(open_compiled, golden.checkpoint, *how))]
    tokens = golden["batch_dec_tokens"]
    for _ in range(2):
        ours, wanted = (teacher_forced(request, prompt, tokens)[1] for request in requests)
        np.testing.assert_array_equal(ours, wanted)
    whole = prompt.extended(tokens)
    for request in requests:
        request.cache.make_room(5, 300, keep=True)
    rows = np.array([2, 0, 0, 1])
    prefix = None if prompt.prefix is None else prompt.prefix[rows]
    step = (whole.ids[rows, -1:], whole.keep[rows], whole.position_ids[rows, ..., -1:], rows, 1, prefix)
    ours, wanted = (request.infer(*step) for request in requests)
    np.testing.assert_array_equal(ours, wanted)
    for layer in range(model.config.num_layers):
        for ours, wanted in zip(*(request.cached(layer) for request in requests), strict=True):
            np.testing.assert_array_equal(ours, wanted)


def test_the_fall_back_has_no_state_written_in_place(open_compiled: Opener):
    model = copying(open_compiled, V2.checkpoint)
    nodes = model.model.get_ops()
    attention = [node for node in nodes if node.get_type_name() == "MultiHeadAttention"]
    assert len(attention) == model.config.num_layers
    for node in attention:
        assert node.get_attributes()["in_place"] == 0
        assert [t.get_node().get_type_name() for t in node.output(1).get_target_inputs()] == ["Assign"]


def test_two_requests_of_the_fall_back(open_compiled: Opener):
    model = copying(open_compiled, V1.checkpoint)
    one, other = golden_prompt(V1, "p5", model), golden_prompt(V1, "batch", model)
    first, second = model.create_request(), model.create_request()
    one.feed(first)
    other.feed(second)
    steps = [
        one.extended(V1["p5_dec_tokens"][:, :1]).feed(first, 5),
        other.extended(V1["batch_dec_tokens"][:, :1]).feed(second, other.ids.shape[1]),
    ]
    for name, step in zip(("p5", "batch"), steps, strict=True):
        assert np.abs(step[:, -1] - V1[f"{name}_dec_logits"][:, 1]).max() < 1e-3


def test_a_model_is_loaded_with_the_fall_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, open_compiled: Opener
):
    """As on an OpenVINO that copies: one warning, and the same logits."""
    trial = in_place.trial_model()
    in_place.copy_caches(trial)
    monkeypatch.setattr(in_place, "trial_model", lambda: trial)
    monkeypatch.setattr(in_place, "works_in_place", cache(in_place.works_in_place.__wrapped__))
    folder = convert(V2.checkpoint, tmp_path / "out", ("f32", "int8"), progress=False)
    for weight_format in ("f32", "int8"):
        model = load_model(folder, weight_format, "f32")
        (copies,) = {
            node.get_attributes()["in_place"]
            for node in model.model.get_ops()
            if node.get_type_name() == "MultiHeadAttention"
        }
        assert copies == 0
    prompt, kept = golden_prompt(V2, "batch", model), open_compiled(V2.checkpoint, "int8", "f32", ops="fused")
    ours, wanted = (teacher_forced(each.create_request(), prompt, V2["batch_dec_tokens"])[1] for each in (model, kept))
    np.testing.assert_array_equal(ours, wanted)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == "this OpenVINO copies the state of a model: the KV cache is copied for every token"
