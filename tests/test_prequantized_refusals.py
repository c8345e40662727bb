"""Checkpoints that are stored quantized: what cannot be taken over is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from quantized_checkpoints import LAYOUTS, Layout, Tensors, make, quantization

from chatglm_ov import ChatGLMError, convert
from chatglm_ov.calibration.text import Calibration


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
