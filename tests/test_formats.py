"""Weight formats: errors as derived, block-wise equal to whole, sizes as told."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatglm_ov.weights.formats import FORMATS, SMALLEST_SCALE, TABLE_FORMATS, group_size, pack_u4

UNIT = 2.0**-24
"""Unit roundoff of float32."""

COLUMNS = [1, 2, 7, 8, 24, 128, 129, 136, 256, 344]
each_format = pytest.mark.parametrize("name", FORMATS)


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    """float32 [n, K]: normal rows of very unequal scale, some with zeros, some zero altogether, some of one sign."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, columns = draw(st.integers(1, 9)), draw(st.sampled_from(COLUMNS))
    values = rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-12, 12, (rows, 1))
    values *= rng.random((rows, columns)) < draw(st.sampled_from([0.5, 1.0]))
    values[rng.random(rows) < 0.2] = 0
    one_sign = rng.random(rows) < 0.3
    values[one_sign] = np.abs(values[one_sign]) * rng.choice([-1, 1])
    return values.astype(np.float32)


def unpack_u4(packed: np.ndarray, count: int) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], axis=1).ravel()[:count]


def decoded_int4(parts: tuple[np.ndarray, ...], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Weights (data - zero_point) * scale as float64 [n, K], and the scale of each of them."""
    rows, groups = shape[0], shape[1] // group_size(shape[1])
    data = unpack_u4(parts[0], shape[0] * shape[1]).reshape(rows, groups, -1).astype(np.int64)
    zero_point = unpack_u4(parts[1], rows * groups).reshape(rows, groups, 1)
    scale = parts[2].astype(np.float64)
    return ((data - zero_point) * scale).reshape(shape), np.broadcast_to(scale, data.shape).reshape(shape)


@given(weights())
def test_int8_is_within_half_a_step(block):
    data, scale = FORMATS["int8"].encode(block)
    assert (data.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (len(block), 1))
    assert (np.abs(data.astype(int)) <= 127).all()
    # |w / s| <= 127 and the quotient is rounded to float32 before it is rounded to a level.
    bound = scale * (0.5 + 128 * UNIT)
    assert (np.abs(block - data * scale.astype(np.float64)) <= bound).all()
    assert (data[block == 0] == 0).all()


@given(weights())
def test_int8_holds_the_largest_weight_of_a_row(block):
    data, scale = FORMATS["int8"].encode(block)
    largest = np.abs(block).max(axis=1)
    decoded = (np.abs(data.astype(np.float64)) * scale).max(axis=1)
    np.testing.assert_allclose(decoded, largest, rtol=2 * UNIT)


@given(weights())
def test_int4_is_within_half_a_step_and_keeps_zero(block):
    """A level is round(w / s) + round(-low / s). Where the two roundings leave 0..15 they were both ties, and the
    clipped level is a tie too."""
    parts = FORMATS["int4"].encode(block)
    decoded, scale = decoded_int4(parts, block.shape)
    assert (np.abs(block - decoded) <= scale * (0.5 + 32 * UNIT)).all()
    assert (decoded[block == 0] == 0).all()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_subnormal_rows_become_zeros(name):
    tiny = np.float32(1.4e-45)
    block = tiny * np.array([[180, -180, 90, 1] * 4, [200, 0, -3, 5] * 4], dtype=np.float32)
    parts = FORMATS[name].encode(block)
    decoded = parts[0] * parts[1] if name == "int8" else decoded_int4(parts, block.shape)[0]
    assert np.abs(block - decoded).max() <= 127 * SMALLEST_SCALE
    assert (parts[-1] >= SMALLEST_SCALE).all()


@pytest.mark.parametrize(("name", "levels", "unharmed"), [("int8", 127, 0), ("int4", 15, 128)])
def test_an_outlier_coarsens_its_own_row_or_group_only(name, levels, unharmed):
    """A weight 1000 times the others: other rows as without it, in int4 also the other groups of its row."""
    block = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    with_outlier = block.copy()
    with_outlier[2, 200] = 1000

    def decoded(weights: np.ndarray) -> np.ndarray:
        parts = FORMATS[name].encode(weights)
        return parts[0] * parts[1] if name == "int8" else decoded_int4(parts, weights.shape)[0]

    before, after = decoded(block), decoded(with_outlier)
    np.testing.assert_array_equal(after[[0, 1, 3]], before[[0, 1, 3]])
    np.testing.assert_array_equal(after[2, :unharmed], before[2, :unharmed])
    step = (1000 - min(block[2, 128:].min(), 0)) / levels
    assert np.abs(after[2, 128:] - with_outlier[2, 128:]).max() <= 0.5001 * step
    assert np.abs(after[2, 128:200]).max() < np.abs(block[2, 128:200]).max()


@given(weights())
def test_bf16_rounds_to_nearest_even(block):
    (ours,) = FORMATS["bf16"].encode(block)
    theirs = torch.from_numpy(block).bfloat16().view(torch.int16).numpy()
    np.testing.assert_array_equal(ours.view(np.int16), theirs)
    assert ours.dtype == ml_dtypes.bfloat16


@given(weights())
def test_f32_is_the_weight(block):
    (ours,) = FORMATS["f32"].encode(block)
    np.testing.assert_array_equal(ours, block)


@each_format
@given(block=weights(), step=st.integers(1, 3).map(lambda n: 2 * n))
def test_blocks_of_rows_are_the_whole(name, block, step):
    fmt = FORMATS[name]
    pieces = [fmt.encode(block[start : start + step]) for start in range(0, len(block), step)]
    for part, whole in enumerate(fmt.encode(block)):
        joined = b"".join(piece[part].tobytes() for piece in pieces)
        assert joined == whole.tobytes()


@each_format
@given(block=weights())
def test_sizes_are_as_told(name, block):
    fmt = FORMATS[name]
    sizes = [part.nbytes for part in fmt.encode(block)]
    assert sizes == [part.nbytes(len(block)) for part in fmt.parts(block.shape[1])]
    assert sum(sizes) == fmt.nbytes(block.shape)


@given(st.lists(st.integers(0, 15), max_size=9))
def test_pack_u4_keeps_order(values):
    packed = pack_u4(np.array(values, dtype=np.float32))
    assert packed.dtype == np.uint8
    assert packed.size == (len(values) + 1) // 2
    assert unpack_u4(packed, len(values)).tolist() == values


@pytest.mark.parametrize(
    ("columns", "group"), [(4096, 128), (13696, 128), (16384, 128), (128, 128), (344, 8), (96, 32), (64, 64), (7, 1)]
)
def test_group_size_divides_the_columns(columns, group):
    assert group_size(columns) == group


def test_released_sizes():
    """Bytes a weight, of a matrix of ChatGLM3-6B: int8 one and a scale a row, int4 a half, a scale and half a byte
    per 128."""
    shape = (27392, 4096)
    assert FORMATS["bf16"].nbytes(shape) == 2 * 27392 * 4096
    assert FORMATS["int8"].nbytes(shape) == 27392 * (4096 + 4)
    assert FORMATS["int4"].nbytes(shape) == 27392 * 32 * (64 + 4) + 27392 * 32 // 2


def test_tables_are_int8_where_the_rest_is_int4():
    assert TABLE_FORMATS["int4"] is FORMATS["int8"]
    assert all(TABLE_FORMATS[name] is FORMATS[name] for name in ("f32", "bf16", "int8"))
