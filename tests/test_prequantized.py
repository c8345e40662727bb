"""Checkpoints that are stored quantized: the codes are taken over to the last bit, by an independent reading.

The files are written here in the layouts of the originals and of GPTQ and AWQ; what they stand for is read back from
them element by element, without the package.
"""

# ruff: noqa: F811 (a fixture is imported)

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
from safetensors.numpy import save_file
from unpacked import check_same

from chatglm_ov import ChatGLMError, convert
from chatglm_ov.calibration.text import Calibration
from chatglm_ov.cli.parts import weight_parts
from chatglm_ov.config import parse_config, read_config_json
from chatglm_ov.ir_reading import read_ir
from chatglm_ov.model_weights import model_weights
from chatglm_ov.models import architecture
from chatglm_ov.native import native
from chatglm_ov.plan import make_plan
from chatglm_ov.prequantized import open_checkpoint
from chatglm_ov.presets import config_json
from chatglm_ov.runtime import load_model
from chatglm_ov.weights.choices import FormatChoices
from chatglm_ov.weights.formats import FORMATS, int4_format

Tensors = dict[str, np.ndarray]
LINEARS = ("query_key_value.weight", "dense.weight", "dense_h_to_4h.weight", "dense_4h_to_h.weight")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The row that nibble 0, 1, ... of a word holds."""


# Writers


def in_rows(bits: int) -> Callable[[str, np.ndarray], Tensors]:
    def write(name: str, weight: np.ndarray) -> Tensors:
        scale = (np.abs(weight).max(axis=1) / (2 ** (bits - 1) - 1)).astype(np.float16)
        codes = np.rint(weight / scale[:, None].astype(np.float32)).astype(np.int8)
        if bits == 4:
            codes[:, 0] = -8
            codes = ((codes[:, 0::2] & 15) << 4 | codes[:, 1::2] & 15).astype(np.int8)
        return {name: codes, f"{name}_scale": scale}

    return write


def random_groups(weight: np.ndarray, group: int, zeros: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """codes [K, N], zero points and scales [groups, N]: any numbers are a weight to be read."""
    rng = np.random.default_rng(weight.shape)
    columns, rows = weight.shape[::-1]
    codes = rng.integers(0, 16, (columns, rows))
    zero = rng.integers(*zeros, (columns // group, rows), endpoint=True)
    scale = (rng.random((columns // group, rows)) * 0.02 + 1e-3).astype(np.float16)
    return codes, zero, scale


def words(numbers: np.ndarray, axis: int, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """Eight neighbours along an axis in 32 bits, the lowest nibble that of order[0]."""
    moved = np.moveaxis(numbers.astype(np.uint32), axis, -1)
    moved = moved.reshape(*moved.shape[:-1], -1, 8)[..., list(order)]
    packed = sum(moved[..., i] << np.uint32(4 * i) for i in range(8))
    return np.moveaxis(packed, -1, axis).view(np.int32)


def gptq(group: int, zeros: tuple[int, int] = (1, 16), offset: int = 1) -> Callable[[str, np.ndarray], Tensors]:
    def write(name: str, weight: np.ndarray) -> Tensors:
        base, size = name.removesuffix(".weight"), weight.shape[1] if group == -1 else group
        codes, zero, scale = random_groups(weight, size, zeros)
        return {
            f"{base}.qweight": words(codes, 0),
            f"{base}.qzeros": words(zero - offset, 1),
            f"{base}.scales": scale,
            f"{base}.g_idx": np.arange(len(codes), dtype=np.int32) // size,
        }

    return write


def awq(group: int) -> Callable[[str, np.ndarray], Tensors]:
    def write(name: str, weight: np.ndarray) -> Tensors:
        base = name.removesuffix(".weight")
        codes, zero, scale = random_groups(weight, group, (0, 15))
        return {
            f"{base}.qweight": words(codes, 1, AWQ_ORDER),
            f"{base}.qzeros": words(zero, 1, AWQ_ORDER),
            f"{base}.scales": scale,
        }

    return write


# The independent reading


def nibble(word: np.int32, number: int) -> int:
    return int(np.uint32(word) >> np.uint32(4 * number)) & 15


def read_rows(stored: Tensors, name: str) -> np.ndarray:
    codes, scale = stored[name], stored[f"{name}_scale"].astype(np.float32)
    if codes.shape[1] * 2 == stored["columns"][name]:
        wide = np.empty((len(codes), codes.shape[1] * 2), np.float32)
        for (row, i), byte in np.ndenumerate(codes.view(np.uint8)):
            for column, code in ((2 * i, byte >> 4), (2 * i + 1, byte & 15)):
                wide[row, column] = int(code) - 16 if code > 7 else int(code)
        codes = wide
    return codes.astype(np.float32) * scale[:, None]


def read_gptq(stored: Tensors, name: str, offset: int) -> np.ndarray:
    base = name.removesuffix(".weight")
    words, zeros, scales, groups = (stored[f"{base}.{kind}"] for kind in ("qweight", "qzeros", "scales", "g_idx"))
    values = np.empty((words.shape[1], len(groups)), np.float32)
    for (row, column), _ in np.ndenumerate(values):
        group = groups[column]
        zero = nibble(zeros[group, row // 8], row % 8) + offset
        code = nibble(words[column // 8, row], column % 8)
        values[row, column] = np.float32(scales[group, row]) * np.float32(code - zero)
    return values


def read_awq(stored: Tensors, name: str) -> np.ndarray:
    base = name.removesuffix(".weight")
    words, zeros, scales = (stored[f"{base}.{kind}"] for kind in ("qweight", "qzeros", "scales"))
    values = np.empty((scales.shape[1], len(words)), np.float32)
    group_size = len(words) // len(scales)
    for (row, column), _ in np.ndenumerate(values):
        at, group = AWQ_ORDER.index(row % 8), column // group_size
        difference = nibble(words[column, row // 8], at) - nibble(zeros[group, row // 8], at)
        values[row, column] = np.float32(scales[group, row]) * np.float32(difference)
    return values


@dataclass(frozen=True)
class Layout:
    """fields: of config.json. files: other JSON files."""

    write: Callable[[str, np.ndarray], Tensors]
    read: Callable[[Tensors, str], np.ndarray]
    fields: dict[str, Any]
    files: dict[str, Any] = field(default_factory=dict)
    like: Path = V2.checkpoint
    format: str = "int4"


def quantization(method: str, **fields: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, "bits": 4, **fields}}


def as_stored(stored: Tensors, name: str) -> np.ndarray:
    return read_gptq(stored, name, 1)


LAYOUTS = {
    "chatglm-int4": Layout(in_rows(4), read_rows, {"quantization_bit": 4}, like=V1.checkpoint),
    "chatglm-int8": Layout(in_rows(8), read_rows, {"quantization_bit": 8}, like=V1.checkpoint, format="int8"),
    "chatglm2-int4": Layout(in_rows(4), read_rows, {"quantization_bit": 4}),
    "gptq": Layout(gptq(32), as_stored, quantization("gptq", group_size=32, desc_act=False)),
    "gptq, zero points of 4 bits": Layout(gptq(64, (1, 15)), as_stored, quantization("gptq", group_size=64)),
    "gptq, one group": Layout(gptq(-1), as_stored, quantization("gptq", group_size=-1)),
    "gptq, its own file": Layout(
        gptq(32), as_stored, {}, {"quantize_config.json": {"bits": 4, "group_size": 32, "desc_act": False}}
    ),
    "gptq_v2": Layout(
        gptq(32, (0, 15), 0),
        lambda stored, name: read_gptq(stored, name, 0),
        quantization("gptq", group_size=32, checkpoint_format="gptq_v2"),
    ),
    "awq": Layout(awq(32), read_awq, quantization("awq", group_size=32, version="gemm")),
    "awq, its own file": Layout(
        awq(64), read_awq, {}, {"quant_config.json": {"w_bit": 4, "q_group_size": 64, "version": "GEMM"}}
    ),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
SIZES = {"hidden_size": 128, "num_layers": 1}
F32_TABLES = FormatChoices(lm_head_format="f32", embedding_format="f32")
PROMPT_END = {V1.checkpoint: (2001, 2004), V2.checkpoint: ()}


@dataclass(frozen=True)
class Made:
    """A quantized checkpoint, what its linear weights stand for, and its other tensors in float32."""

    folder: Path
    linears: Tensors
    others: Tensors
    fields: dict[str, Any]


def make(layout: Layout, folder: Path, spoil: Callable[[Tensors], object] = lambda stored: None) -> Made:
    fields = {**read_config_json(layout.like), **SIZES}
    fields["inner_hidden_size" if layout.like == V1.checkpoint else "ffn_hidden_size"] = 192
    shapes = architecture(config := parse_config(fields)).weight_shapes(config)
    rng = np.random.default_rng(0)
    weights = {name: (0.05 * rng.standard_normal(shape)).astype(np.float16) for name, shape in shapes.items()}
    linears = [name for name in weights if name.endswith(LINEARS)]
    stored = {name: tensor for name, tensor in weights.items() if name not in linears}
    for name in linears:
        stored |= layout.write(name, weights[name].astype(np.float32))
    spoil(stored)
    write_checkpoint(folder, layout.like, stored, **{**fields, **layout.fields})
    for name, contents in layout.files.items():
        (folder / name).write_text(json.dumps(contents))
    described: Any = {**stored, "columns": {name: weights[name].shape[1] for name in linears}}
    others = {name: stored[name].astype(np.float32) for name in weights if name in stored}
    values = {name: layout.read(described, name) for name in linears} if spoil.__name__ == "<lambda>" else {}
    return Made(folder, values, others, fields)


@pytest.fixture(scope="module")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Function from the name of a layout to its checkpoint: to read one element by element takes a second."""
    return cache(lambda layout: make(LAYOUTS[layout], tmp_path_factory.mktemp("made") / "checkpoint"))


# What is converted


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


# What is refused


def changed(kind: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], None]:
    """Of the first tensor of this kind."""

    def spoil(stored: Tensors) -> None:
        name = next(name for name in stored if name.endswith(kind))
        stored[name] = np.ascontiguousarray(change(stored[name]))

    return spoil


def other_type(kind: str, dtype: type) -> Callable[[Tensors], None]:
    return changed(kind, lambda tensor: tensor.astype(dtype))


def with_value(kind: str, value: float, dtype: type | None = None) -> Callable[[Tensors], None]:
    """In the place of the last one."""

    def change(tensor: np.ndarray) -> np.ndarray:
        tensor = tensor.astype(dtype or tensor.dtype)
        tensor.flat[-1] = value
        return tensor

    return changed(kind, change)


def with_tensor(kind: str, values: np.ndarray) -> Callable[[Tensors], None]:
    """One more, beside the last qweight."""

    def spoil(stored: Tensors) -> None:
        base = [name for name in stored if name.endswith("qweight")][-1].removesuffix("qweight")
        stored[base + kind] = values

    return spoil


def every_one_without(kind: str) -> Callable[[Tensors], None]:
    def spoil(stored: Tensors) -> None:
        for name in [name for name in stored if name.endswith(kind)]:
            del stored[name]

    return spoil


def without(kind: str) -> Callable[[Tensors], None]:
    def spoil(stored: Tensors) -> None:
        del stored[next(name for name in stored if name.endswith(kind))]

    return spoil


def short(kind: str) -> Callable[[Tensors], None]:
    return changed(kind, lambda tensor: tensor[..., 8:])


def nothing(stored: Tensors) -> None:
    """The fields are what is wrong."""


GPTQ, AWQ, ROWS = (LAYOUTS[name] for name in ("gptq", "awq", "chatglm2-int4"))
PLAIN = Layout(lambda name, weight: {name: weight}, lambda stored, name: stored[name], {})


def own_file(**fields: Any) -> Layout:
    return replace(LAYOUTS["gptq, its own file"], files={"quantize_config.json": fields})


REFUSED = [
    # What a tensor holds
    (GPTQ, with_value("scales", np.nan), {}, r"a value of .*\.scales is nan, expected a finite number"),
    (AWQ, with_value("scales", np.inf), {}, r"a value of .*\.scales is inf, expected a finite number"),
    (ROWS, with_value("weight_scale", np.nan), {}, r"a value of .*weight_scale is nan, expected a finite number"),
    (
        GPTQ,
        with_value("scales", 2**-30, ml_dtypes.bfloat16),
        {},
        r"\.scales is 9\.31\d*e-10, expected numbers that float16",
    ),
    (
        AWQ,
        with_value("scales", 2**30, ml_dtypes.bfloat16),
        {},
        r"\.scales is 1073741824\.0, expected numbers that float16 has",
    ),
    (GPTQ, changed("g_idx", lambda g: g[::-1]), {}, r"g_idx is groups of scattered columns, expected .*: act-order"),
    (GPTQ, with_value("g_idx", 9), {}, r"a value of .*g_idx is 9, expected a group: 0 to 3"),
    (GPTQ, with_value("g_idx", -1), {}, r"a value of .*g_idx is -1, expected a group: 0 to 3"),
    (
        GPTQ,
        with_tensor("bias", np.array([0, 0.5], np.float16)),
        {},
        r"a value of .*\.bias is 0.5, expected 0: the model has no bias there",
    ),
    # Which tensors there are, and of what shape and type
    (GPTQ, without("scales"), {}, r"\.scales is missing, expected a tensor of float16"),
    (GPTQ, without("qweight"), {}, r"\.qweight is missing, expected a tensor of int32"),
    (ROWS, without("weight_scale"), {}, r"\.weight_scale is missing, expected a tensor of float16"),
    (ROWS, without("query_key_value.weight"), {}, r"query_key_value\.weight is missing, expected a tensor of int8"),
    (
        GPTQ,
        every_one_without("g_idx"),
        quantization("gptq", group_size=32, desc_act=True),
        r"\.g_idx is missing, expected the group of each column, as desc_act is set",
    ),
    (
        GPTQ,
        with_tensor("weight", np.zeros((256, 128), np.float16)),
        {},
        r"\.weight is stored beside its qweight, expected one of them",
    ),
    (GPTQ, short("scales"), {}, r"shape of .*scales is \[4, 248\], expected \[4, 256\]"),
    (GPTQ, short("g_idx"), {}, r"shape of .*g_idx is \[120\], expected \[128\]"),
    (GPTQ, changed("qweight", lambda words: words[1:]), {}, r"shape of .*qweight is \[15, 256\], expected \[16, 256\]"),
    (
        GPTQ,
        changed("qweight", lambda words: np.tile(words, (2, 1))),
        {},
        r"shape of .*qweight is \[32, 256\], expected \[16, 256\]",
    ),
    (AWQ, changed("qweight", lambda words: words[1:]), {}, r"shape of .*qweight is \[127, 32\], expected \[128, 32\]"),
    (ROWS, short("weight_scale"), {}, r"shape of .*weight_scale is \[248\], expected \[256\]"),
    (GPTQ, other_type("qzeros", np.int8), {}, "dtype of .*qzeros is int8, expected int32"),
    # What the fields say
    (GPTQ, nothing, quantization("gptq", bits=8), "config.json: quantization_config.bits is 8, expected 4"),
    (
        GPTQ,
        nothing,
        quantization("gptq", group_size=48),
        "quantization_config.group_size is 48, expected a multiple of",
    ),
    (
        GPTQ,
        nothing,
        quantization("gptq", group_size="32"),
        "quantization_config.group_size is '32', expected a multiple",
    ),
    (GPTQ, nothing, quantization("gptq"), "quantization_config.group_size is missing, expected a multiple of 32 that"),
    (
        GPTQ,
        nothing,
        {"quantization_config": {"quant_method": "gptq", "group_size": 32}},
        "quantization_config.bits is missing, expected 4",
    ),
    (own_file(bits=8, group_size=32), nothing, {}, "quantize_config.json: bits is 8, expected 4"),
    (own_file(bits=4, desc_act=False), nothing, {}, "quantize_config.json: group_size is missing, expected a multiple"),
    (own_file(group_size=32), nothing, {}, "quantize_config.json: bits is missing, expected 4"),
    (
        GPTQ,
        nothing,
        quantization("gptq", checkpoint_format="marlin"),
        "checkpoint_format is 'marlin', expected gptq",
    ),
    (GPTQ, nothing, quantization("bitsandbytes"), "quant_method is 'bitsandbytes', expected gptq or awq"),
    (GPTQ, nothing, {"quantization_config": 4}, "quantization_config is 4, expected an object"),
    (AWQ, nothing, quantization("awq", group_size=32, version="gemv"), "version is 'gemv', expected gemm"),
    (ROWS, nothing, quantization("gptq"), "quant_method is 'gptq', expected a checkpoint that has"),
    (ROWS, nothing, {"quantization_bit": 3}, "quantization_bit is 3"),
    (PLAIN, nothing, {"quantization_bit": 4}, "quantization_bit is 4, expected a checkpoint that has .weight_scale"),
]


@pytest.mark.parametrize(("layout", "spoil", "fields", "message"), REFUSED, ids=[case[3] for case in REFUSED])
def test_what_cannot_be_taken_over_is_refused(layout, spoil, fields, message, tmp_path: Path):
    made = make(layout, tmp_path / "checkpoint", spoil)
    path = made.folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(ChatGLMError, match=message) as error:
        convert(made.folder, tmp_path / "out", ("int4",), progress=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_no_calibration_of_quantized_weights(tmp_path: Path):
    made = make(GPTQ, tmp_path / "checkpoint")
    with pytest.raises(ChatGLMError, match="weights is quantized already, expected no calibration"):
        convert(made.folder, tmp_path / "out", ("int4",), calibration=Calibration(), progress=False)
