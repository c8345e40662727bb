"""Formats chosen part by part: what is stored, what the model computes, what is refused."""

# ruff: noqa: F811 (a fixture is imported)

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import openvino as ov
import pytest
from command_line import Run, run  # noqa: F401
from golden_cases import V1, V2, own_prompt, stored_weights, write_checkpoint
from golden_sets import each_ops, without_library

from chatglm_ov import ChatGLMError, convert
from chatglm_ov.checkpoint.reader import Checkpoint
from chatglm_ov.cli.parts import weight_parts
from chatglm_ov.config import load_config
from chatglm_ov.conversion.plan import make_plan
from chatglm_ov.models import architecture
from chatglm_ov.native import native
from chatglm_ov.runtime.ir_reading import read_ir
from chatglm_ov.runtime.loading import load_model
from chatglm_ov.weight_formats import FORMATS, GROUP_SIZES, WeightFormat, int4_format
from chatglm_ov.weights.choices import DEFAULT_CHOICES, FormatChoices, LayerFormats, read_layer_formats
from chatglm_ov.weights.ir import IR_NAME

DOWN = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"
IDS = np.array([[5, 6, 7, 8, 9, 10, 11]])


def test_patterns_count_in_order():
    choices = FormatChoices(layer_formats={"*.layers.0.*": "int8", "*dense*": "bf16", "*": "f32"})
    for name, fmt in (("a.layers.0.dense", "int8"), ("a.layers.1.dense", "bf16"), ("a.layers.1.qkv", "f32")):
        assert choices.linear("int4", name, 128) is FORMATS[fmt]
    assert DEFAULT_CHOICES.linear("int4", "a.layers.0.dense", 128) == int4_format(128)


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_group_size(group):
    fmt = FormatChoices(group_size=group).linear("int4", "w", 512)
    assert fmt.group_size(512) == group and fmt.group_size(96) == 32 and fmt.group_size(512 + 64) == min(group, 64)
    data, zero_point, scale = fmt.encode(np.ones((2, 512), np.float32))
    assert data.shape == (2, 512 // group, group) and zero_point.shape == scale.shape == (2, 512 // group, 1)
    np.testing.assert_allclose(fmt.decode((data, zero_point, scale)), 1, rtol=2**-10)


def stored_graph(folder: Path) -> ov.Model:
    return read_ir(folder / IR_NAME)


def dequantized(fmt: WeightFormat, weight: np.ndarray) -> np.ndarray:
    return fmt.decode(fmt.encode(weight))


MIXED = FormatChoices(
    group_size=32, lm_head_format="bf16", embedding_format="f32", layer_formats={DOWN: "int8", "*.layers.0.*": "bf16"}
)


@each_ops
def test_mixed_model_is_the_f32_model_of_its_weights(ops, tmp_path: Path):
    """bf16 weights meet rounded activations in fused operations: 2^-9 of a layer's sums, and there are six of them."""
    weights = stored_weights(V2.checkpoint)
    module = architecture(config := load_config(V2.checkpoint))
    parts = {"lm_head": FORMATS["bf16"], "embedding": FORMATS["f32"]}
    for name, weight in weights.items():
        if weight.ndim == 2:
            role = {module.LM_HEAD: "lm_head", module.EMBEDDING: "embedding"}.get(name)
            fmt = parts[role] if role else MIXED.linear("int4", name, weight.shape[1])
            weights[name] = dequantized(fmt, weight)
    plain = write_checkpoint(tmp_path / "plain", V2.checkpoint, weights)
    convert(V2.checkpoint, tmp_path / "mixed", ("int4",), ops, choices=MIXED, progress=False)
    convert(plain, tmp_path / "exact", ("f32",), ops, progress=False)
    models = [load_model(tmp_path / name, None, "f32") for name in ("mixed", "exact")]
    logits = [own_prompt(IDS, model).feed(model.create_request()) for model in models]
    tolerance = 1e-4 if ops == "stock" else 6 * 2**-9
    np.testing.assert_allclose(*logits, rtol=0, atol=tolerance * np.abs(logits[1]).max())
    told = weight_parts(stored_graph(tmp_path / "mixed" / "int4"), config)
    assert told["lm_head"]["formats"] == {"bf16": 1} and told["embedding"]["formats"] == {"f32": 1}
    # 344 columns of the last layer are no multiple of 32.
    assert told["mlp"]["formats"] == {"bf16": 2, "int8": 2, "int4 in groups of 32": 2}
    assert told["attention"]["formats"] == {"bf16": 2, "int4 in groups of 32": 4}


@each_ops
def test_plan_and_parts_are_what_is_stored(ops, tmp_path: Path):
    config = load_config(V2.checkpoint)
    with Checkpoint.open(V2.checkpoint) as weights:
        plan = make_plan(config, weights, ("int4",), ops, MIXED)
    convert(V2.checkpoint, tmp_path / "out", ("int4",), ops, choices=MIXED, progress=False)
    model = stored_graph(tmp_path / "out" / "int4")
    stored = sum(part["bytes"] for part in weight_parts(model, config).values())
    # Features are filled up to panels of 16, in both halves of a gated layer; small constants come on top.
    assert stored == pytest.approx(plan.disk_bytes, rel=0.02)
    assert (tmp_path / "out" / "int4" / "openvino_model.bin").stat().st_size >= stored


@pytest.mark.parametrize("fmt", ["int4", "bf16"])
@each_ops
def test_tied_head_in_any_format_is_the_embedding_too(ops, fmt, tmp_path: Path):
    weights = stored_weights(V1.checkpoint)
    weights.pop("lm_head.weight", None)
    tied = write_checkpoint(tmp_path / "tied", V1.checkpoint, weights, tie_word_embeddings=True)
    convert(tied, tmp_path / "out", ("int8",), ops, choices=FormatChoices(lm_head_format=fmt), progress=False)
    weights = stored_weights(tied)
    name = "transformer.word_embeddings.weight"
    for each, weight in weights.items():
        if weight.ndim == 2:
            weights[each] = dequantized(FORMATS[fmt if each == name else "int8"], weight)
    plain = write_checkpoint(tmp_path / "plain", V1.checkpoint, weights, tie_word_embeddings=True)
    convert(plain, tmp_path / "exact", ("f32",), ops, progress=False)
    models = [load_model(tmp_path / each, None, "f32") for each in ("out", "exact")]
    ids = np.concatenate([IDS, [[2001, 2004, 30]]], axis=1)
    logits = [own_prompt(ids, model).feed(model.create_request()) for model in models]
    tolerance = 1e-4 if ops == "stock" else 6 * 2**-9
    np.testing.assert_allclose(*logits, rtol=0, atol=tolerance * np.abs(logits[1]).max())
    assert "embedding" not in weight_parts(stored_graph(tmp_path / "out" / "int8"), models[0].config)


X_OUTLIERS = [3, 100, 300]


@pytest.mark.parametrize(
    ("w_outliers", "x_outliers"),
    [([], []), ([], X_OUTLIERS), (X_OUTLIERS, X_OUTLIERS), ([7, 210, 400], X_OUTLIERS)],
    ids=["none", "of the activations", "of both, the same channels", "of both, other channels"],
)
@without_library
def test_int8_arithmetic_is_as_exact_as_bf16(w_outliers, x_outliers):
    """What the arithmetic alone loses: the rms error of an output against the double-precision product of the weights
    as the format stores them. The int8 kernel, which rounds activations to 16 bits, loses at most twice what rounding
    them to bf16 does, also where a few input channels are 300 times the others. Worst are such channels in the weights
    and others in the activations: these set the step, and those multiply it."""
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((64, 512), np.float32), rng.standard_normal((256, 512), np.float32)
    weight[:, w_outliers] *= 300
    x[:, x_outliers] *= 300
    int8, bf16 = (FORMATS[name].encode(weight) for name in ("int8", "bf16"))
    layout = native().PackedLayout("int8", 64, 512, 0)
    payload = np.zeros(layout.bytes, np.uint8)
    layout.pack(int8[0], packed := np.empty(layout.panels * layout.panel_bytes, np.uint8))
    payload[: packed.size] = packed
    payload[layout.scale_offset :] = int8[1].ravel().view(np.uint8)
    y = native().fully_connected(native().isa(), layout, payload, x, 64)
    loss = relative_error(y, exact_product(x, FORMATS["int8"].decode(int8)))
    stored = FORMATS["bf16"].decode(bf16)
    rounded = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert 0 < loss < 2 * relative_error(exact_product(rounded, stored), exact_product(x, stored))


def exact_product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ weight.astype(np.float64).T


def relative_error(y: np.ndarray, exact: np.ndarray) -> float:
    """rms over the rows, of each output; the mean of the outputs."""
    return np.sqrt(((y - exact) ** 2).mean(axis=0) / (exact**2).mean(axis=0)).mean()


def test_embedding_format_of_a_tied_model_is_refused(tmp_path: Path):
    weights = stored_weights(V1.checkpoint)
    weights.pop("lm_head.weight", None)
    tied = write_checkpoint(tmp_path / "tied", V1.checkpoint, weights, tie_word_embeddings=True)
    with pytest.raises(ChatGLMError, match="embedding_format is bf16, expected not given"):
        convert(tied, tmp_path / "out", choices=FormatChoices(embedding_format="bf16"), progress=False)
    assert not (tmp_path / "out").exists()


# By the command


def test_hidden_pattern_is_told(tmp_path: Path, run: Run):
    patterns = tmp_path / "formats.json"
    patterns.write_text(json.dumps({"*": "int8", DOWN: "bf16"}))
    done = run("convert", V2.checkpoint, tmp_path / "out", "--weight-format", "int8", "--layer-formats", patterns)
    assert done.code == 0, done.err
    assert f"formats.json: layer_formats of {DOWN!r} chooses nothing" in done.out + done.err


def test_choices_by_the_command(tmp_path: Path, run: Run):
    patterns = tmp_path / "formats.json"
    patterns.write_text(json.dumps({DOWN: "bf16"}))
    done = run(
        "convert", V2.checkpoint, tmp_path / "out", "--weight-format", "int4", "--group-size", 64, "--lm-head-format",
        "f32", "--embedding-format", "bf16", "--layer-formats", patterns,
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(run("info", tmp_path / "out", "--json").out)["folder"]["weight_formats"]["int4"]
    assert found["calibration"] is None
    assert found["parts"]["lm_head"]["formats"] == {"f32": 1}
    assert found["parts"]["embedding"]["formats"] == {"bf16": 1}
    assert found["parts"]["mlp"]["formats"]["bf16"] == 1
    assert found["parts"]["attention"]["formats"] == {"int4 in groups of 64": 6}
    shown = run("info", tmp_path / "out").out
    assert "6 x" not in shown and "5 x int4" not in shown and "1 x bf16" in shown


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"group_size": 48}, "group_size is 48, expected one of 32, 64, 128"),
        ({"lm_head_format": "int3"}, "lm_head_format is 'int3', expected one of f32, bf16, int8, int4"),
        ({"embedding_format": "int4"}, "embedding_format is 'int4', expected one of f32, bf16, int8"),
        ({"layer_formats": {"*": "fp8"}}, r"layer_formats of '\*' is 'fp8', expected one of"),
    ],
    ids=str,
)
def test_formats_that_there_are_not(choices: dict[str, Any], message):
    with pytest.raises(ChatGLMError, match=message):
        FormatChoices(**choices)


def test_file_of_patterns_may_begin_with_a_mark_of_its_encoding(tmp_path: Path):
    (tmp_path / "formats.json").write_text('\ufeff{"*": "int8"}', encoding="utf-8")
    assert read_layer_formats(tmp_path / "formats.json") == {"*": "int8"}


LAYERS = ("a.0.qkv", "a.0.dense", "a.1.qkv", "a.1.dense")


def test_pattern_that_fits_nothing_is_told_with_its_file(tmp_path: Path):
    for formats, where in (
        ({"b.*": "int8"}, "convert"),
        (LayerFormats(tmp_path / "f.json", {"b.*": "int8"}), "f.json"),
    ):
        with pytest.raises(ChatGLMError, match=rf"{where}: layer_formats is 'b\.\*', expected .* such as a\.0\.qkv"):
            FormatChoices(layer_formats=formats).check_layers(LAYERS)


@pytest.mark.parametrize(
    ("patterns", "hidden"),
    [
        (("*dense", "a.0.*", "*"), []),
        (("*", "*dense"), ["*dense"]),
        (("a.0.*", "*.1.*", "*qkv", "a*"), ["*qkv", "a*"]),
    ],
)
def test_pattern_that_earlier_ones_hide_is_warned_of(patterns, hidden, caplog: pytest.LogCaptureFixture):
    FormatChoices(layer_formats=dict.fromkeys(patterns, "int8")).check_layers(LAYERS)
    told = [record.getMessage() for record in caplog.records]
    assert [re.search(r"layer_formats of '(.*)' chooses nothing", message)[1] for message in told] == hidden


def test_tied_embedding_has_no_format_of_its_own():
    with pytest.raises(ChatGLMError, match="embedding_format is bf16, expected not given, as the embedding is the LM"):
        FormatChoices(embedding_format="bf16").check_tied()
    for choices in (
        DEFAULT_CHOICES,
        FormatChoices(lm_head_format="f32"),
        FormatChoices(lm_head_format="bf16", embedding_format="bf16"),
    ):
        choices.check_tied()


def test_what_cannot_be_packed_is_refused(tmp_path: Path):
    choices = FormatChoices(layer_formats={"*dense_4h_to_h*": "int4"})
    message = r"layer_formats of '\*dense_4h_to_h\*' for .* is int4, expected a format for 344 columns"
    with pytest.raises(ChatGLMError, match=message):
        convert(V2.checkpoint, tmp_path / "out", ("int8",), choices=choices, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "file is missing, expected a JSON object"),
        ("{", "contents is not JSON"),
        ("[]", "contents is a JSON list, expected a JSON object of pattern: format"),
        ("[" * 100_000, r"formats.json: contents is not JSON \(maximum recursion depth"),
        (
            '{"*": "int8", "*dense*": 5}',
            r"formats.json: layer_formats of '\*dense\*' is 5, expected one of f32, bf16, int8",
        ),
        (
            '{"*": ["int8"]}',
            r"formats.json: layer_formats of '\*' is \['int8'\], expected one of f32, bf16, int8, int4",
        ),
        ('{"*": "int5"}', r"formats.json: layer_formats of '\*' is 'int5', expected one of"),
        ('{"*": "int8", "*": "bf16"}', r"formats.json: layer_formats of '\*' is there 2 times, expected one format"),
        (
            '{"*4h_to_h*": "int4"}',
            r"formats.json: layer_formats of '\*4h_to_h\*' for .* is int4, expected a format for",
        ),
        (
            '{"*.layer.0.*": "int8"}',
            r"formats.json: layer_formats is '\*.layer.0.\*', expected a pattern of linear weights",
        ),
    ],
    ids=str,
)
def test_bad_pattern_files(contents, message, tmp_path: Path, run: Run):
    file = tmp_path / "formats.json"
    if contents is not None:
        file.write_text(contents)
    done = run("convert", V2.checkpoint, tmp_path / "out", "--layer-formats", file)
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert re.search(message, done.err)
