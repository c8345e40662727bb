"""Weight formats: errors as derived, block-wise equal to whole, sizes as told."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stored_formats import stored_format

from chatglm_ov.weight_formats import FORMATS, LARGEST_INT4, SMALLEST_SCALE, pack_u4

UNIT = 2.0**-24
"""Unit roundoff of float32."""

HALF_TINY = 2.0**-24
"""The smallest float16."""

COLUMNS = [1, 2, 7, 8, 24, 128, 129, 136, 256, 344]
each_format = pytest.mark.parametrize("name", FORMATS)


@st.composite
def weights(draw: st.DrawFn, largest_exponent: int = 12) -> np.ndarray:
    """float32 [n, K]: normal rows of very unequal scale, some with zeros, some zero altogether, some of one sign."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, columns = draw(st.integers(1, 9)), draw(st.sampled_from(COLUMNS))
    values = rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-12, largest_exponent, (rows, 1))
    values *= rng.random((rows, columns)) < draw(st.sampled_from([0.5, 1.0]))
    values[rng.random(rows) < 0.2] = 0
    one_sign = rng.random(rows) < 0.3
    values[one_sign] = np.abs(values[one_sign]) * rng.choice([-1, 1])
    return values.astype(np.float32)


def unpack_u4(packed: np.ndarray, count: int) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], axis=1).ravel()[:count]


def decoded_int4(parts: tuple[np.ndarray, ...], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Weights (data - zero_point) * scale as float64 [n, K], and the scale of each of them."""
    data, zero_point, scale = (part.astype(np.float64) for part in parts)
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


@given(weights(largest_exponent=5))
def test_int4_is_within_half_a_step_and_keeps_zero(block):
    """A level is round(w / s) + round(-low / s). Where the two roundings leave 0..15 they were both ties, and the
    clipped level is a tie too: the range is at most 15 steps, as the scale was rounded up."""
    parts = FORMATS["int4"].encode(block)
    decoded, scale = decoded_int4(parts, block.shape)
    assert (np.abs(block - decoded) <= scale * (0.5 + 32 * UNIT)).all()
    assert (decoded[block == 0] == 0).all()


@given(weights(largest_exponent=5))
def test_scales_of_int4_are_float16_values_next_to_the_range(block):
    data, zero_point, scale = FORMATS["int4"].encode(block)
    assert (data.dtype, zero_point.dtype, scale.dtype) == (np.uint8, np.uint8, np.float32)
    assert max(data.max(), zero_point.max()) <= 15
    np.testing.assert_array_equal(scale.astype(np.float16).astype(np.float32), scale)
    groups = block.reshape(data.shape).astype(np.float64)
    steps = (np.maximum(groups.max(2), 0) - np.minimum(groups.min(2), 0)) / 15
    used = steps > 0
    # One unit in the last place of a float16: 2^-10 of it, or the smallest one.
    assert (scale[..., 0][used] <= steps[used] * (1 + 2**-10 + 4 * UNIT) + HALF_TINY).all()
    assert (scale[..., 0] >= steps * (1 - 4 * UNIT)).all()


def test_the_largest_weights_of_int4():
    block = np.full((1, 128), LARGEST_INT4, np.float32)
    block[0, ::2] *= -1
    decoded, scale = decoded_int4(FORMATS["int4"].encode(block), block.shape)
    assert scale.max() == np.finfo(np.float16).max
    assert (np.abs(decoded - block) <= 0.5 * scale).all()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_subnormal_rows_become_zeros(name):
    tiny = np.float32(1.4e-45)
    block = tiny * np.array([[180, -180, 90, 1] * 4, [200, 0, -3, 5] * 4], dtype=np.float32)
    parts = FORMATS[name].encode(block)
    decoded = parts[0] * parts[1] if name == "int8" else decoded_int4(parts, block.shape)[0]
    assert np.abs(block - decoded).max() <= 127 * SMALLEST_SCALE
    assert (parts[-1] >= (SMALLEST_SCALE if name == "int8" else HALF_TINY)).all()


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
@given(block=weights(largest_exponent=5), step=st.integers(1, 3).map(lambda n: 2 * n))
def test_blocks_of_rows_are_the_whole(name, block, step):
    fmt = FORMATS[name]
    parts = fmt.parts(block.shape[1])
    pieces = [fmt.encode(block[start : start + step]) for start in range(0, len(block), step)]
    for i, whole in enumerate(fmt.encode(block)):
        joined = b"".join(parts[i].stored(piece[i]).tobytes() for piece in pieces)
        assert joined == parts[i].stored(whole).tobytes()


@each_format
@given(block=weights(largest_exponent=5))
def test_sizes_are_as_told(name, block):
    fmt, parts = FORMATS[name], FORMATS[name].parts(block.shape[1])
    encoded = fmt.encode(block)
    assert [values.shape for values in encoded] == [(len(block), *part.shape) for part in parts]
    sizes = [part.stored(values).nbytes for part, values in zip(parts, encoded, strict=True)]
    assert sizes == [part.nbytes(len(block)) for part in parts]
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
    assert FORMATS["int4"].group_size(columns) == group


def test_released_sizes():
    """Bytes a weight, of a matrix of ChatGLM3-6B: int8 one and a scale a row, int4 a half, a scale and half a byte
    per 128."""
    shape = (27392, 4096)
    assert FORMATS["bf16"].nbytes(shape) == 2 * 27392 * 4096
    assert FORMATS["int8"].nbytes(shape) == 27392 * (4096 + 4)
    assert FORMATS["int4"].nbytes(shape) == 27392 * 32 * (64 + 4) + 27392 * 32 // 2


def test_what_int4_does_not_suit_is_int8():
    """Tables, and columns that 32 does not divide, in whose groups the scales would take what the weights save."""
    assert stored_format("int4", 4096) is FORMATS["int4"]
    assert stored_format("int4", 96) is FORMATS["int4"]
    assert stored_format("int4", 96, table=True) is stored_format("int4", 344) is FORMATS["int8"]
    assert all(stored_format(name, 344, table) is FORMATS[name] for name in ("f32", "bf16", "int8") for table in (0, 1))
