"""Checkpoints that are stored quantized: the codes are taken over to the last bit, by an independent reading."""

# ruff: noqa: F811 (a fixture is imported)

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import openvino as ov
import pytest
from command_line import Run, run  # noqa: F401
from golden_cases import V1, V2, own_prompt, write_checkpoint
from golden_sets import each_ops, without_library
from quantized_checkpoints import LAYOUTS, Made, Tensors, awq, gptq, make, read_gptq
from safetensors.numpy import save_file
from unpacked import check_same

from chatglm_ov import convert
from chatglm_ov.checkpoint.model_weights import model_weights
from chatglm_ov.checkpoint.prequantized import open_checkpoint
from chatglm_ov.cli.parts import weight_parts
from chatglm_ov.config import parse_config, read_config_json
from chatglm_ov.conversion.plan import make_plan
from chatglm_ov.models import architecture
from chatglm_ov.native import native
from chatglm_ov.presets import config_json
from chatglm_ov.runtime.ir_reading import read_ir
from chatglm_ov.runtime.loading import load_model
from chatglm_ov.weight_formats import FORMATS, int4_format
from chatglm_ov.weights.choices import FormatChoices
from chatglm_ov.weights.packing import PADDING, gate_up_rows
from chatglm_ov.weights.unpacking import PackedRows

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
F32_TABLES = FormatChoices(lm_head_format="f32", embedding_format="f32")
PROMPT_END = {V1.checkpoint: (2001, 2004), V2.checkpoint: ()}


@pytest.fixture(scope="module")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Function from the name of a layout to its checkpoint: to read one element by element takes a second."""
    return cache(lambda layout: make(LAYOUTS[layout], tmp_path_factory.mktemp("made") / "checkpoint"))


def converted_values(xml: Path, name: str, shape: tuple[int, int]) -> np.ndarray:
    """A linear weight in the order of its constants in the IR, float32."""
    nodes = {node.get_friendly_name(): node for node in read_ir(xml).get_ordered_ops()}
    if f"{name}.scale" not in nodes:
        return packed_values(nodes[name], shape)
    kinds = [kind for kind in ("", ".scale", ".zero_point") if f"{name}{kind}" in nodes]
    parts = {kind: elements(nodes[f"{name}{kind}"]) for kind in kinds}
    values = parts[""].astype(np.float32) - parts.get(".zero_point", np.float32(0))
    return (values * parts[".scale"]).reshape(shape)


def elements(constant: Any) -> np.ndarray:
    """Its values; 4-bit ones, which lie two a byte, one a byte."""
    if constant.get_element_type() != ov.Type.u4:
        return constant.data
    flat = constant.data.view(np.uint8).ravel()
    return np.stack([flat & 15, flat >> 4], axis=1).ravel()[: np.prod(constant.shape)].reshape(constant.shape)


def packed_values(constant: Any, shape: tuple[int, int]) -> np.ndarray:
    attributes = next(iter(constant.output(0).get_target_inputs())).get_node().get_attributes()
    sizes = (attributes[key] for key in ("format", "out_features", "in_features", "group_size"))
    layout, payload = native().PackedLayout(*sizes), constant.data.copy()
    rows = np.empty((layout.out_features, shape[1]), np.float32)
    for i, row in enumerate(rows):
        layout.unpack_row(payload, i, row)
    return rows


def rows_in_any_order(values: np.ndarray) -> list[bytes]:
    """Rows without those of padding, which are zeros: query and key rows are in another order in a model."""
    return sorted(row.tobytes() for row in values + np.float32(0) if row.any())


@each_layout
@each_ops
def test_values_are_those_of_the_file(ops, layout, make_once, tmp_path: Path):
    made = make_once(layout)
    own = LAYOUTS[layout].format
    convert(made.folder, tmp_path / "out", (own,), ops, progress=False)
    for name, values in made.linears.items():
        found = converted_values(tmp_path / "out" / own / "openvino_model.xml", name, values.shape)
        assert rows_in_any_order(found) == rows_in_any_order(values), name


@without_library
def test_what_fills_panels_of_a_gated_layer_up_is_zeros(tmp_path: Path):
    made = make(replace(LAYOUTS["chatglm-int8"], like=V2.checkpoint), tmp_path / "checkpoint", features=100)
    convert(made.folder, tmp_path / "out", ("int8",), "fused", progress=False)
    xml = tmp_path / "out" / "int8" / "openvino_model.xml"
    for name, values in made.linears.items():
        assert rows_in_any_order(converted_values(xml, name, values.shape)) == rows_in_any_order(values), name
    payloads = {node.get_friendly_name(): node for node in read_ir(xml).get_ordered_ops()}
    order, (name,) = gate_up_rows(100), (name for name in made.linears if "dense_h_to_4h" in name)
    rows = PackedRows(payloads[name].data, "int8", order.size, 128, 0).parts(np.flatnonzero(order == PADDING))
    assert len(rows[0]) == 24 and not any(part.any() for part in rows)


@each_layout
@each_ops
def test_model_is_the_f32_model_of_the_values(ops, layout, make_once, tmp_path: Path):
    """Embedding and head in f32 too, so that nothing but the linear weights is rounded; fused operations round the
    activations of each of four layers to 16 bits, 2^-15 of the largest."""
    made = make_once(layout)
    plain = write_checkpoint(tmp_path / "plain", LAYOUTS[layout].like, {**made.others, **made.linears}, **made.fields)
    own = LAYOUTS[layout].format
    for source, fmt in ((made.folder, own), (plain, "f32")):
        convert(source, tmp_path / f"{source.name}-ov", (fmt,), ops, choices=F32_TABLES, progress=False)
    models = [load_model(tmp_path / f"{name}-ov", None, "f32") for name in ("checkpoint", "plain")]
    ids = np.array([[5, 6, 7, 8, 9, *PROMPT_END[LAYOUTS[layout].like]]])
    logits = [own_prompt(ids, model).feed(model.create_request()) for model in models]
    tolerance = 1e-4 if ops == "stock" else 4 * 2**-15
    np.testing.assert_allclose(*logits, rtol=0, atol=tolerance * np.abs(logits[1]).max())


@each_layout
@without_library
def test_codes_without_the_library_are_the_same(layout, make_once, tmp_path: Path):
    check_same(make_once(layout).folder, (LAYOUTS[layout].format,), tmp_path)


GLM_SIZES = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "intermediate_size": 192}
Writer = Callable[[str, np.ndarray], Tensors]


def make_glm(folder: Path, fields: dict[str, Any], writer: Callable[[str], Writer | None], **more: Any) -> Tensors:
    """What a checkpoint with weights under their names in transformers holds. fields: of config.json. writer(name): how
    this linear weight is written; None: in float16."""
    fields = config_json("glm-4-9b-chat-hf", num_hidden_layers=1, vocab_size=256, **GLM_SIZES) | fields | more
    rng = np.random.default_rng(0)
    stored: Tensors = {}
    for name, shape in architecture(config := parse_config(fields)).weight_shapes(config).items():
        weight = (0.05 * rng.standard_normal(shape)).astype(np.float16)
        write = writer(name) if name.endswith(("_proj.weight", "lm_head.weight")) else None
        stored |= {name: weight} if write is None else write(name, weight.astype(np.float32))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(stored, folder / "model.safetensors")
    return stored


def narrow(layout: str) -> Writer:
    return gptq(32, (1, 15)) if layout == "gptq" else awq(32)


QKV = "model.layers.0.self_attn.qkv_proj.weight"


@pytest.mark.parametrize("layout", ["gptq", "awq"])
@each_ops
def test_stacked_weights_keep_their_codes(ops, layout, tmp_path: Path):
    """Query, key and value weights quantized apart, with zero points of 4 and of 8 bits, are one afterwards."""

    def writer(name: str) -> Writer | None:
        if "lm_head" in name:
            return None
        return gptq(32, (1, 16)) if layout == "gptq" and "k_proj" in name else narrow(layout)

    stored = make_glm(tmp_path / "checkpoint", LAYOUTS[layout].fields, writer)
    convert(tmp_path / "checkpoint", tmp_path / "out", ("int4",), ops, progress=False)
    values = np.concatenate([LAYOUTS[layout].read(stored, QKV.replace("qkv", part)) for part in "qkv"])
    found = converted_values(tmp_path / "out/int4/openvino_model.xml", QKV, values.shape)
    assert rows_in_any_order(found) == rows_in_any_order(values)


@each_ops
def test_stack_of_which_a_part_is_quantized_keeps_that(ops, tmp_path: Path):
    """As int4 the key weight, which is float16, is rounded in groups as wide as those of the others; in another format
    all are what they would be without the quantization."""

    def writer(name: str) -> Writer | None:
        return None if name.endswith(("k_proj.weight", "lm_head.weight")) else narrow("gptq")

    stored = make_glm(tmp_path / "checkpoint", LAYOUTS["gptq"].fields, writer)
    quantized = [name.replace("qweight", "weight") for name in stored if name.endswith("qweight")]
    values = stored | {name: read_gptq(stored, name, 1) for name in quantized}
    convert(tmp_path / "checkpoint", tmp_path / "out", ("int4", "bf16"), ops, progress=False)
    q, k, v = (values[QKV.replace("qkv", part)].astype(np.float32) for part in "qkv")
    whole = np.concatenate([q, int4_format(32).decode(int4_format(32).encode(k)), v])
    found = converted_values(tmp_path / "out/int4/openvino_model.xml", QKV, whole.shape)
    assert rows_in_any_order(found) == rows_in_any_order(whole)

    plain = make_glm(tmp_path / "plain", {}, lambda name: None)
    save_file({name: values[name] for name in plain}, tmp_path / "plain" / "model.safetensors")
    convert(tmp_path / "plain", tmp_path / "plain-ov", ("bf16",), ops, progress=False)
    files = [tmp_path / name / "bf16/openvino_model.bin" for name in ("out", "plain-ov")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("layout", ["gptq", "awq"])
@each_ops
def test_quantized_lm_head_is_taken_over_unless_another_format_is_chosen(ops, layout, tmp_path: Path):
    stored = make_glm(tmp_path / "checkpoint", LAYOUTS[layout].fields, lambda name: narrow(layout))
    values = LAYOUTS[layout].read(stored, "lm_head.weight")
    int8 = FORMATS["int8"]
    fields = read_config_json(tmp_path / "checkpoint")
    for chosen, wanted in ((None, values), ("int4", values), ("int8", int8.decode(int8.encode(values)))):
        out = tmp_path / str(chosen)
        choices = FormatChoices(lm_head_format=chosen)
        convert(tmp_path / "checkpoint", out, ("int4",), ops, choices=choices, progress=False)
        found = converted_values(out / "int4/openvino_model.xml", "lm_head.weight", values.shape)
        np.testing.assert_array_equal(found, wanted, str(chosen))
        with open_checkpoint(tmp_path / "checkpoint", fields) as weights:
            read = model_weights(config := parse_config(fields), weights)
            planned = make_plan(config, read, ("int4",), ops, choices).disk_bytes
        parts = weight_parts(read_ir(out / "int4/openvino_model.xml"), config)
        assert sum(part["bytes"] for part in parts.values()) == pytest.approx(planned, rel=0.02)


def test_stored_head_of_a_tied_model_is_not_read(tmp_path: Path):
    """Nor told as unknown, whatever parts it has."""
    fields = LAYOUTS["gptq"].fields
    stored = make_glm(tmp_path / "checkpoint", fields, lambda name: narrow("gptq"), tie_word_embeddings=True)
    head = narrow("gptq")("lm_head.weight", np.ones((256, 128), np.float32))
    save_file(stored | head, tmp_path / "checkpoint" / "model.safetensors")
    convert(tmp_path / "checkpoint", tmp_path / "out", ("int4",), progress=False)


@pytest.mark.parametrize("layout", ["gptq", "awq"])
@each_ops
def test_scales_in_bfloat16_are_float16_numbers(ops, layout, tmp_path: Path):
    def in_bfloat16(name: str, weight: np.ndarray) -> Tensors:
        tensors = LAYOUTS[layout].write(name, weight)
        return {
            key: tensor.astype(ml_dtypes.bfloat16) if key.endswith(".scales") else tensor
            for key, tensor in tensors.items()
        }

    made = make(replace(LAYOUTS[layout], write=in_bfloat16), tmp_path / "checkpoint")
    convert(made.folder, tmp_path / "out", ("int4",), ops, progress=False)
    for name, values in made.linears.items():
        found = converted_values(tmp_path / "out" / "int4" / "openvino_model.xml", name, values.shape)
        assert rows_in_any_order(found) == rows_in_any_order(values), name


@each_ops
def test_biases_of_zeros_where_the_model_has_none_are_left_out(ops, make_once, tmp_path: Path):
    """Some tools write them; the files are those of a checkpoint without."""

    def with_bias(name: str, weight: np.ndarray) -> Tensors:
        # The model has the first one, so that its values are kept.
        bias = {} if "query_key_value" in name else {name.replace("weight", "bias"): np.zeros(len(weight), np.float16)}
        return {**LAYOUTS["gptq"].write(name, weight), **bias}

    made = make(replace(LAYOUTS["gptq"], write=with_bias), tmp_path / "biased")
    for folder in (made.folder, make_once("gptq").folder):
        convert(folder, tmp_path / f"{folder.name}-ov", ("int4",), ops, progress=False)
    files = [tmp_path / f"{name}-ov/int4/openvino_model.bin" for name in ("biased", "checkpoint")]
    assert files[0].read_bytes() == files[1].read_bytes()


@each_ops
def test_other_formats_are_made_of_the_values(ops, make_once, tmp_path: Path):
    made = make_once("gptq")
    plain = write_checkpoint(tmp_path / "plain", V2.checkpoint, {**made.others, **made.linears}, **made.fields)
    for source in (made.folder, plain):
        convert(source, tmp_path / f"{source.name}-ov", ("bf16", "int8"), ops, progress=False)
    for fmt in ("bf16", "int8"):
        files = [tmp_path / name / fmt / "openvino_model.bin" for name in ("checkpoint-ov", "plain-ov")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_converted_config_tells_nothing_of_it(tmp_path: Path):
    made = make(LAYOUTS["gptq"], tmp_path / "checkpoint")
    convert(made.folder, tmp_path / "out", ("int4",), progress=False)
    assert "quantization_config" not in read_config_json(tmp_path / "out")


@pytest.mark.parametrize(("layout", "own"), [("chatglm-int8", "int8"), ("chatglm2-int4", "int4"), ("awq", "int4")])
def test_own_format_is_the_default_of_the_command(layout, own, tmp_path: Path, run: Run):
    make(LAYOUTS[layout], tmp_path / "checkpoint")
    done = run("convert", tmp_path / "checkpoint", tmp_path / "out")
    assert done.code == 0, done.err
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == [own]
    assert run("info", tmp_path / "checkpoint").code == 0
