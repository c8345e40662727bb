"""Packed weights: the payload holds the same numbers as the parts of the format, whatever the blocks and the order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from stored_formats import stored_format

from chatglm_ov.checkpoint.reader import Checkpoint
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.native import native, unavailable
from chatglm_ov.runtime.kv_cache import BLOCK_SLOTS
from chatglm_ov.weight_formats import FORMATS, WeightFormat
from chatglm_ov.weights.file import WeightsFile
from chatglm_ov.weights.packing import PADDING, PANEL, PackedWeight, filled, gate_up_rows, layout_of
from chatglm_ov.weights.store import WeightStore

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no native library: {unavailable()}")

SIZES = [(1, 32), (16, 64), (17, 96), (40, 200), (33, 129), (64, 7), (5, 384)]
ORDERS = {
    "as stored": lambda n: None,
    "reversed": lambda n: np.arange(n)[::-1],
    "repeated, with zeros": lambda n: np.append(np.repeat(np.arange(n), 2), [PADDING] * 3 + [0]),
    "gate and up": lambda n: gate_up_rows(n // 2) if n > 1 else None,
}
each_format = pytest.mark.parametrize("name", FORMATS)
sizes = pytest.mark.parametrize("shape", SIZES, ids=str)
orders = pytest.mark.parametrize("order", ORDERS)


def random_weight(shape: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(shape)
    weight = rng.standard_normal(shape, np.float32) * np.float32(0.02)
    weight[0, : shape[1] // 2] = 0
    weight[-1, -1] = 3
    return weight


def stored(weight: np.ndarray, name: str, folder: Path, rows: np.ndarray | None) -> tuple[PackedWeight, np.ndarray]:
    """The packed weight and the bytes of its payload."""
    save_file({"w": weight}, folder / "model.safetensors")
    with Checkpoint.open(folder) as checkpoint, WeightsFile(folder / "w.bin") as file:
        store = WeightStore(checkpoint, file, name, lambda *_: None)
        packed = store.packed_linear("w", rows)
        assert store.packed_linear("w", rows) is packed
        file.flush()
        return packed, packed.payload.data.copy()


def dequantized(fmt: WeightFormat, weight: np.ndarray) -> np.ndarray:
    parts = dict(zip((part.name for part in fmt.parts(weight.shape[1])), fmt.encode(weight), strict=True))
    values = parts["weight"].astype(np.float32) - parts.get("zero_point", np.float32(0))
    return (values * parts.get("scale", np.float32(1))).reshape(weight.shape)


def in_order(weight: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    if rows is None:
        return weight
    return np.where((rows == PADDING)[:, None], np.float32(0), weight[rows])


def unpacked(packed: PackedWeight, payload: np.ndarray) -> np.ndarray:
    layout = layout_of(FORMATS[packed.format], packed.out_features, packed.in_features)
    rows = np.empty((packed.out_features, packed.in_features), np.float32)
    for i, row in enumerate(rows):
        layout.unpack_row(payload, i, row)
    return rows


@orders
@sizes
@each_format
def test_payload_holds_the_rows_in_order(name, shape, order, tmp_path: Path):
    weight, rows = random_weight(shape), ORDERS[order](shape[0])
    packed, payload = stored(weight, name, tmp_path, rows)
    fmt = stored_format(name, shape[1])
    assert packed.format == fmt.name
    np.testing.assert_array_equal(unpacked(packed, payload), dequantized(fmt, in_order(weight, rows)))


@orders
@each_format
def test_payload_does_not_depend_on_the_blocks(name, order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weight = random_weight((70, 96))
    rows = ORDERS[order](70)
    _, whole = stored(weight, name, tmp_path, rows)
    monkeypatch.setattr("chatglm_ov.weights.store.BLOCK_BYTES", 1)
    np.testing.assert_array_equal(stored(weight, name, tmp_path, rows)[1], whole)


def codes_at(name: str, payload: np.ndarray, rows: np.ndarray, columns: np.ndarray, padded: int) -> np.ndarray:
    """What csrc/kernels/packing.h says lies at a row and column."""
    panel, channel = rows // 16, rows % 16
    if name == "f32":
        return payload.view(np.float32)[(panel * padded + columns) * 16 + channel]
    if name == "bf16":
        return payload.view(np.uint16)[((panel * padded // 2 + columns // 2) * 16 + channel) * 2 + columns % 2]
    if name == "int8":
        return payload[((panel * padded // 4 + columns // 4) * 16 + channel) * 4 + columns % 4].astype(int) - 128
    bytes_ = payload[((panel * padded // 8 + columns // 8) * 16 + channel) * 4 + columns % 4]
    return np.where(columns % 8 < 4, bytes_ & 15, bytes_ >> 4)


@pytest.mark.parametrize(
    ("name", "padded", "bytes_"),
    [
        ("f32", 384, 3 * 16 * 384 * 4),
        ("bf16", 384, 3 * 16 * 384 * 2),
        ("int8", 384, 3 * 16 * (384 + 4)),
        ("int4", 384, 3 * 16 * (384 // 2) + 320 + 3 * 16 * 3),
    ],
)
def test_layout_is_the_documented_one(name: str, padded: int, bytes_: int, tmp_path: Path):
    """Element by element, for version 2: a folder of this version has to be read right by all that call it so."""
    assert native().PACKING_VERSION == 2
    weight, fmt = random_weight((40, 384)), FORMATS[name]
    payload = stored(weight, name, tmp_path, None)[1]
    parts = dict(zip((part.name for part in fmt.parts(384)), fmt.encode(weight), strict=True))
    rows, columns = np.arange(40)[:, None], np.arange(384)
    wanted = parts["weight"].reshape(40, 384)
    seen = codes_at(name, payload, rows, columns, padded)
    np.testing.assert_array_equal(seen, wanted.view(np.uint16) if name == "bf16" else wanted)
    assert payload.size == bytes_
    if name == "int8":
        np.testing.assert_array_equal(payload[3 * 16 * padded :].view(np.float32)[:40], parts["scale"][:, 0])
    if name == "int4":
        # 3 x 3 x 16 scales of 2 bytes, up to a multiple of 64.
        at, start = (rows // 16 * 3 + np.arange(3)) * 16 + rows % 16, 3 * 16 * padded // 2
        scales, zero_points = payload[start : start + 288].view(np.float16), payload[start + 320 :]
        np.testing.assert_array_equal(scales[at], parts["scale"][..., 0])
        np.testing.assert_array_equal(zero_points[at], parts["zero_point"][..., 0])


def test_numbers_that_both_sides_know_are_the_same():
    assert native().PANEL == PANEL
    assert native().BLOCK_SLOTS == BLOCK_SLOTS


@each_format
def test_padding_is_zeros(name, tmp_path: Path):
    """Rows and columns of padding: codes of zero, scales and zero points 0."""
    packed, payload = stored(random_weight((17, 96)), name, tmp_path, None)
    layout = layout_of(FORMATS[packed.format], 17, 96)
    assert layout.panels == 2
    if name == "int8":
        # Codes are bytes from 128 on, in lines of 16 features by 4 columns.
        codes = payload[: layout.scale_offset].reshape(2, -1, PANEL, 4)
        assert (codes[1, :, 1:] == 128).all() and (codes[:, 96 // 4 :] == 128).all()
        scales = payload[layout.scale_offset :].view(np.float32)
        assert (scales[:17] > 0).all() and (scales[17:] == 0).all()
    elif name == "int4":
        codes = payload[: layout.scale_offset].reshape(2, -1, PANEL, 4)
        assert (codes[1, :, 1:] == 0).all() and (codes[:, 96 // 8 :] == 0).all()
        end = layout.scale_offset + 2 * 4 * PANEL * 2
        scales = payload[layout.scale_offset : end].view(np.float16).reshape(2, 4, PANEL)
        assert (scales[0, :3] > 0).all() and (scales[:, 3] == 0).all() and (scales[1, :, 1:] == 0).all()
        assert (payload[end : layout.zero_point_offset] == 0).all()
        zero_points = payload[layout.zero_point_offset :].reshape(2, 4, PANEL)
        assert (zero_points[1, :, 1:] == 0).all() and (zero_points[:, 3] == 0).all()
    else:
        width = {"f32": 1, "bf16": 2}[name]
        codes = payload.view({"f32": np.uint32, "bf16": np.uint16}[name]).reshape(2, -1, PANEL, width)
        assert (codes[1, :, 1:] == 0).all() and (codes[:, 96 // width :] == 0).all()


@given(st.integers(1, 200))
def test_gate_and_up_rows_alternate_by_panel(features):
    rows = gate_up_rows(features)
    panels = rows.reshape(-1, 2, PANEL)
    assert len(panels) == -(-features // PANEL)
    gate, up = panels[:, 0].ravel(), panels[:, 1].ravel()
    assert gate[:features].tolist() == list(range(features))
    assert up[:features].tolist() == list(range(features, 2 * features))
    assert (gate[features:] == PADDING).all() and (up[features:] == PADDING).all()


@pytest.mark.parametrize("size", [1, 15, 16, 17])
def test_biases_fill_whole_panels(size, tmp_path: Path):
    bias, rows = np.random.default_rng(size).standard_normal(size, np.float32), filled(np.arange(size)[::-1])
    save_file({"b": bias}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint, WeightsFile(tmp_path / "w.bin") as file:
        values = WeightStore(checkpoint, file, "int8", lambda *_: None).vector("b", rows).data
        file.flush()
        assert values.size % PANEL == 0
        np.testing.assert_array_equal(values, np.pad(bias[::-1], (0, -size % PANEL)))


@pytest.mark.parametrize("method", ["linear", "packed_linear"])
def test_a_weight_too_large_for_int4_is_named(method, tmp_path: Path):
    weight = random_weight((16, 128))
    weight[3, 5] = -1e6
    save_file({"w": weight}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint, WeightsFile(tmp_path / "w.bin") as file:
        store = WeightStore(checkpoint, file, "int4", lambda *_: None)
        with pytest.raises(ChatGLMError, match=r"a value of w is -1000000.0, expected at most 491280"):
            getattr(store, method)("w")
