"""Norms and the rotary rotation of every level, against double precision with bounds from the operands.

u is half a unit in the last place of float32. A sum of n floats is a chain of at most n / 8 additions, in lanes, and
then 6 more over the lanes: it is off by S = (n / 8 + 6) u times the sum of absolute values.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_end import at_page_end

from chatglm_ov.native import native, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no native library: {unavailable()}")

U = 2.0**-24
EPS = float(np.float32(1e-5))
LEVELS = ("avx2", "avx512")  # those above have the functions of avx512
SIZES = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 255, 1000, 4096, 4101)


@pytest.fixture(params=LEVELS)
def isa(request):
    if request.param not in native().present_isa_levels():
        pytest.skip(f"this machine has no {request.param}")
    return request.param


def rows(size):
    """Plain, with an outlier, far from zero, tiny beside eps."""
    rng = np.random.default_rng(size)
    plain = rng.standard_normal(size)
    outlier = plain.copy()
    outlier[size // 3] = 3000
    return [x.astype(np.float32) for x in (plain, outlier, plain + 1000, plain * 1e-6)]


def weight_and_bias(size):
    return np.random.default_rng(size + 1).uniform(-2, 2, (2, size)).astype(np.float32)


def empty_row(size):
    return at_page_end(np.full(size, np.nan, np.float32))


def chain(size):
    return (size / 8 + 6) * U


@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(isa, size):
    """The mean of squares is off by S and 3 u; half of that reaches the root, which takes 2 u to invert; 2 products."""
    weight, _ = weight_and_bias(size)
    for x in rows(size):
        y = empty_row(size)
        native().rms_norm(isa, at_page_end(x), at_page_end(weight), EPS, y)
        wide = x.astype(np.float64)
        expected = wide / np.sqrt(np.mean(wide**2) + EPS) * weight
        assert (np.abs(y - expected) <= np.abs(expected) * ((chain(size) + 3 * U) / 2 + 5 * U)).all()


@pytest.mark.parametrize("size", SIZES)
def test_layer_norm(isa, size):
    """The mean is off by m = S mean|x| + u |mean|, and with it every difference. So the mean of squared differences
    is off by m^2 and, relatively, by S and 5 u; the rest as in rms_norm, and the sum with the bias by u."""
    weight, bias = weight_and_bias(size)
    for x in rows(size):
        y = empty_row(size)
        native().layer_norm(isa, at_page_end(x), at_page_end(weight), at_page_end(bias), EPS, y)
        wide = x.astype(np.float64)
        difference = wide - wide.mean()
        variance = np.mean(difference**2) + EPS
        scaled = difference / np.sqrt(variance) * weight
        of_mean = chain(size) * np.mean(np.abs(wide)) + U * abs(wide.mean())
        relative = (of_mean**2 / variance + chain(size) + 5 * U) / 2 + 6 * U
        shifted = of_mean / np.sqrt(variance) * np.abs(weight) * (1 + relative)
        error = shifted + np.abs(scaled) * relative + (np.abs(scaled) + shifted + np.abs(bias)) * U
        assert (np.abs(y - (scaled + bias)) <= error).all()


def test_norms_of_zeros(isa):
    weight, bias = weight_and_bias(37)
    zeros, y = np.zeros(37, np.float32), empty_row(37)
    native().rms_norm(isa, zeros, weight, EPS, y)
    assert not y.any()
    native().layer_norm(isa, zeros, weight, bias, EPS, y)
    np.testing.assert_array_equal(y, bias)


def test_norms_in_place(isa):
    weight, bias = weight_and_bias(100)
    x, y = rows(100)[0], empty_row(100)
    for norm, operands in ((native().rms_norm, (weight, EPS)), (native().layer_norm, (weight, bias, EPS))):
        norm(isa, x, *operands, y)
        same = x.copy()
        norm(isa, same, *operands, same)
        np.testing.assert_array_equal(same, y)


def check_rotation(isa, half, head_dim, scale, seed):
    """Two products, one of them and their sum rounded, then the product by the scale: 3 u of their absolute values."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(head_dim).astype(np.float32)
    cos, sin = rng.uniform(-1, 1, (2, half)).astype(np.float32)
    y = empty_row(head_dim)
    native().rotate(isa, at_page_end(x), at_page_end(cos), at_page_end(sin), scale, y)
    a, b = x[:half].astype(np.float64), x[half : 2 * half].astype(np.float64)
    turned = np.concatenate([a * cos - b * sin, b * cos + a * sin]) * scale
    size = np.concatenate([np.abs(a * cos) + np.abs(b * sin), np.abs(b * cos) + np.abs(a * sin)]) * abs(scale)
    assert (np.abs(y[: 2 * half] - turned) <= 3.01 * U * size).all()
    np.testing.assert_array_equal(y[2 * half :], x[2 * half :] * np.float32(scale))
    native().rotate(isa, x, cos, sin, scale, x)
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("half", "head_dim"), [(32, 64), (64, 128), (32, 128), (16, 64), (5, 20), (3, 7), (0, 4)])
def test_rotate(isa, half, head_dim):
    for scale in (1.0, float(np.float32(head_dim**-0.5)), -0.5):
        check_rotation(isa, half, head_dim, scale, 0)


@settings(max_examples=40)
@given(half=st.integers(0, 70), rest=st.integers(0, 40), seed=st.integers(0, 1000))
def test_rotate_any_size(half, rest, seed):
    for isa in set(LEVELS) & set(native().present_isa_levels()):
        check_rotation(isa, half, max(2 * half + rest, 1), 0.25, seed)


def test_what_does_not_fit_is_refused(isa):
    x, y = np.zeros(8, np.float32), np.zeros(7, np.float32)
    with pytest.raises(ValueError, match="rms_norm: arrays do not fit"):
        native().rms_norm(isa, x, x, EPS, y)
    with pytest.raises(ValueError, match="layer_norm: arrays do not fit"):
        native().layer_norm(isa, x, x, y, EPS, x)
    with pytest.raises(ValueError, match="rotate: arrays do not fit"):
        native().rotate(isa, x, np.zeros(5, np.float32), np.zeros(5, np.float32), 1.0, x)
