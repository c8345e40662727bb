"""The FullyConnected kernels of every instruction set level, against double precision with bounds from the operands.

u is half a unit in the last place of float32. The bound of a result before its epilogue is, with A = sum |x| |w|:

  f32, bf16            2 (K + 2) u A, and 2^-8 A (twice half a unit of bfloat16) where the level rounds x to bfloat16
  int8, int4           sum of |w| times half a step of x, block by block, and a few u A for each block or group

A step of x is the largest |x| of a row's 512 columns by 32639 or 127. Exact cases need no bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_end import at_page_end

from chatglm_ov.native import native, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no native library: {unavailable()}")

U = 2.0**-24
TINY = 2.0**-126
BLOCK = 512
LEVELS = ("avx2", "avx_vnni", "avx512", "avx512_bf16", "amx", "amx_emulated")
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 24, 25, 33, 64)


@dataclass(frozen=True)
class Case:
    format: str
    bits: int = 16
    group: int = 0

    def __str__(self):
        return "-".join(str(part) for part in (self.format, self.bits, self.group) if part)

    @property
    def quantized(self):
        return self.format in ("int8", "int4")


FLOATS = (Case("f32"), Case("bf16"))
INTEGERS = (
    Case("int8"),
    Case("int8", 8),
    Case("int4", 16, 32),
    Case("int4", 16, 64),
    Case("int4", 16, 128),
    Case("int4", 8, 128),
    Case("int4", 8, 32),
)
each_case = pytest.mark.parametrize("case", FLOATS + INTEGERS, ids=str)
each_integer_case = pytest.mark.parametrize("case", INTEGERS, ids=str)


def levels():
    """Those of this machine. The kernels of amx run on emulated tiles wherever there is avx512_bf16."""
    present = native().present_isa_levels()
    return [*present, "amx_emulated"] if "avx512_bf16" in present else present


@pytest.fixture(params=LEVELS)
def isa(request):
    if request.param not in levels():
        pytest.skip(f"this machine has no {request.param}")
    return request.param


class Weight:
    """A packed weight [n, k] and its exact values in float64. What pads K has scales and zero points of its own,
    which must not matter; what pads N has them too, and codes."""

    def __init__(self, case, codes, scale=None, zero_point=None):
        self.case = case
        self.n, self.k = codes.shape
        self.layout = native().PackedLayout(case.format, self.n, self.k, case.group)
        self.payload = np.full(self.layout.bytes, 0x11, np.uint8)
        section = self.payload[: self.layout.panels * self.layout.panel_bytes]
        bits = codes.astype(np.float32).view(np.uint32) >> 16 if case.format == "bf16" else codes
        stored = {"f32": np.float32, "bf16": np.uint16, "int8": np.int8, "int4": np.uint8}[case.format]
        self.layout.pack(np.ascontiguousarray(bits.astype(stored)), section)
        self.values = codes.astype(np.float64)
        if case.format == "int8":
            self._put(self.layout.scale_offset, np.pad(scale, (0, -self.n % 16), constant_values=3).astype(np.float32))
            self.values *= scale.astype(np.float64)[:, None]
        elif case.format == "int4":
            self._put(self.layout.scale_offset, self._by_panel(scale, 9).astype(np.float16))
            self._put(self.layout.zero_point_offset, self._by_panel(zero_point, 200).astype(np.uint8))
            each = np.repeat(np.arange(self.k // case.group), case.group)
            self.reach = (scale.astype(np.float64) * np.maximum(zero_point, 15 - zero_point))[:, each]
            self.values = scale.astype(np.float64)[:, each] * (self.values - zero_point[:, each])

    def _put(self, offset, values):
        self.payload[offset : offset + values.nbytes] = np.ascontiguousarray(values).view(np.uint8).ravel()

    def _by_panel(self, values, padding):
        wide = np.full((self.layout.panels * 16, self.layout.padded_in // self.case.group), padding, np.float32)
        wide[: self.n, : values.shape[1]] = values
        return wide.reshape(self.layout.panels, 16, -1).transpose(0, 2, 1)


@cache
def random_weight(case, n, k, seed=0):
    rng = np.random.default_rng([n, k, seed])
    if case.format == "f32":
        return Weight(case, rng.standard_normal((n, k)).astype(np.float32))
    if case.format == "bf16":
        return Weight(
            case, (rng.standard_normal((n, k)).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
        )
    if case.format == "int8":
        return Weight(case, rng.integers(-127, 128, (n, k)), rng.uniform(0.001, 0.02, n).astype(np.float32))
    shape = (n, k // case.group)
    scale = rng.uniform(0.01, 0.2, shape).astype(np.float16)
    return Weight(case, rng.integers(0, 16, (n, k)), scale, rng.integers(0, 16, shape))


def random_rows(m, k, seed=1):
    return np.random.default_rng([m, k, seed]).standard_normal((m, k)).astype(np.float32)


def multiply(isa, weight, x, **options):
    options.setdefault("y_features", weight.n)
    return native().fully_connected(isa, weight.layout, weight.payload, x, activation_bits=weight.case.bits, **options)


def steps(x, bits):
    """[rows, blocks]: the step of x."""
    limit = 32639 if bits == 16 else 127
    blocks = range(0, x.shape[1], BLOCK)
    return np.stack([np.maximum(np.abs(x[:, b : b + BLOCK]).max(1).astype(float) / limit, TINY) for b in blocks], 1)


def rounds_x(isa, weight, rows):
    return weight.case.format == "bf16" and isa not in ("avx2", "avx512") and rows > 4


def expands(isa, case, rows):
    """Whether int4 is multiplied as bf16 (16-bit activations) or int8 (8-bit ones): with tiles."""
    return case.format == "int4" and isa.startswith("amx") and rows >= 16


def steps_in_int8(weight):
    """Of int4 weights as int8, [n, k]: 127 are the largest weight that a group of their block can have."""
    blocks = range(0, weight.k, BLOCK)
    largest = [weight.reach[:, b : b + BLOCK].max(1, keepdims=True) for b in blocks]
    return np.repeat(np.hstack(largest) / 127, BLOCK, axis=1)[:, : weight.k]


def bound(isa, weight, x):
    """Of |result - exact| before the epilogue, [rows, n]."""
    absolute = np.abs(weight.values)
    total = np.abs(x).astype(float) @ absolute.T
    if expands(isa, weight.case, len(x)) and weight.case.bits == 16:
        # Both factors of each product are rounded to bfloat16; numbers that become subnormal, to zero.
        return (2.0**-7 + 2.0**-16 + 2 * (weight.k + 2) * U) * total + TINY * (absolute.sum(1) + weight.k)
    if expands(isa, weight.case, len(x)):
        # Half a step of each weight, and what the multiplier that rounds it is off by: 2^-12 for each of 15 codes.
        off = steps_in_int8(weight) * (1 / 2 + 1 / 256)
        absolute = absolute + off
        of_weights = (np.abs(x).astype(float) + np.repeat(steps(x, 8), BLOCK, axis=1)[:, : weight.k]) @ off.T
    else:
        of_weights = 0
    if not weight.case.quantized:
        relative = 2 * (weight.k + 2) * U + (2.0**-8 if rounds_x(isa, weight, len(x)) else 0)
        # Instructions for bfloat16 take subnormal numbers for zero.
        return relative * total + TINY * (absolute.sum(1) + weight.k)
    step = steps(x, weight.case.bits)
    starts = range(0, weight.k, BLOCK)
    of_steps = sum(0.51 * step[:, [i]] * absolute[:, b : b + BLOCK].sum(1) for i, b in enumerate(starts))
    terms = weight.k // weight.case.group if weight.case.group else len(starts)
    return of_steps + of_weights + 2 * (terms + 4) * U * (total + of_steps + of_weights)


def check(isa, weight, x, rows=None):
    """Compares the result of each number of rows from the first on, or of all."""
    exact = x.astype(float) @ weight.values.T
    for m in rows or (len(x),):
        y = multiply(isa, weight, x[:m])
        assert y.shape == (m, weight.n)
        assert (np.abs(y - exact[:m]) <= bound(isa, weight, x[:m])).all(), f"{m} rows of {weight.k} to {weight.n}"


def fitting(k, case):
    """The size nearest to k that the format takes."""
    return max(1, round(k / case.group)) * case.group if case.group else k


@each_case
def test_result_is_within_the_bound(isa, case):
    for n, k in ((1, 1), (3, 17), (16, 63), (33, 65), (50, 131), (96, 512), (130, 1100)):
        weight = random_weight(case, n, fitting(k, case))
        check(isa, weight, random_rows(ROWS[-1], weight.k), ROWS)


@each_case
def test_more_rows_than_a_task_takes(isa, case):
    weight = random_weight(case, 40, fitting(577, case))
    check(isa, weight, random_rows(1027, weight.k), (512, 513, 1027))


@settings(max_examples=60)
@given(st.sampled_from(FLOATS + INTEGERS), st.integers(1, 140), st.integers(1, 200), st.integers(1, 1300), st.data())
def test_any_size(case, m, n, k, data):
    isa = data.draw(st.sampled_from(levels()))
    weight = random_weight(case, n, fitting(k, case))
    check(isa, weight, random_rows(m, weight.k))


@pytest.mark.parametrize("m", (1, 4, 9, 40))
@each_case
def test_small_integers_are_exact(isa, case, m):
    """Where x and w are small integers and the steps of x are 1, nothing is rounded."""
    rng = np.random.default_rng(m)
    k, n = fitting(1100, case), 70
    if case.quantized:
        limit = 32639 if case.bits == 16 else 127
        x = rng.integers(-100, 101, (m, k))
        if not expands(isa, case, m):  # bf16 has all whole numbers up to 256 only
            x[:, ::BLOCK] = rng.choice((-limit, limit), (m, len(range(0, k, BLOCK))))
        scales = (n,) if case.format == "int8" else (n, k // case.group)
        scale, zero_point = 2.0 ** rng.integers(-3, 1, scales), rng.integers(0, 16, scales)
        codes = rng.integers(-3, 4, (n, k)) if case.format == "int8" else rng.integers(0, 16, (n, k))
        weight = Weight(case, codes, scale, zero_point)
    else:
        x = rng.integers(-8, 9, (m, k))
        weight = Weight(case, rng.integers(-8, 9, (n, k)))
    if expands(isa, weight.case, m) and case.bits == 8:
        check(isa, weight, x.astype(np.float32))  # weights are rounded
    else:
        np.testing.assert_array_equal(multiply(isa, weight, x.astype(np.float32)), x @ weight.values.T)


@pytest.mark.parametrize("bits", (16, 8))
def test_int8_is_the_sum_of_exact_blocks_in_order(isa, bits):
    """Bit for bit what table.h defines, with any code: steps of 1 make fma(float(T), s, y) one addition."""
    rng = np.random.default_rng(bits)
    m, n, k, limit = 7, 33, 1500, 32639 if bits == 16 else 127
    x = rng.integers(-limit, limit + 1, (m, k))
    x[:, ::BLOCK] = limit
    codes = rng.integers(-127, 128, (n, k))
    scale = rng.uniform(0.5, 2, n).astype(np.float32)
    expected = np.zeros((m, n), np.float32)
    for start in range(0, k, BLOCK):
        block = slice(start, start + BLOCK)
        exact = (x[:, block] @ codes[:, block].T).astype(np.float32)
        expected = (expected.astype(float) + exact).astype(np.float32)
    expected = (expected.astype(float) * scale).astype(np.float32)
    np.testing.assert_array_equal(
        multiply(isa, Weight(Case("int8", bits), codes, scale), x.astype(np.float32)), expected
    )


@pytest.mark.parametrize("m", (1, 7, 13, 40))
@each_integer_case
def test_the_largest_sums_fit(isa, case, m):
    """Every product of a block as large as it can be, of either sign."""
    n, k, limit = 34, BLOCK, 32639 if case.bits == 16 else 127
    x = np.full((m, k), limit, np.float32) * np.where(np.arange(m) % 2, 1, -1)[:, None]
    smallest, largest = (-128, 127) if case.format == "int8" else (0, 15)
    codes = np.repeat(np.where(np.arange(n) % 2, smallest, largest)[:, None], k, 1)
    shape = (n,) if case.format == "int8" else (n, k // case.group)
    zero_point = np.repeat(np.where(np.arange(n) % 2, 15, 0)[:, None], shape[-1], 1)
    weight = Weight(case, codes, np.ones(shape), zero_point)
    check(isa, weight, x.astype(np.float32))


@pytest.mark.parametrize("n, k", ((1, 5), (50, 700), (33, 1025)))
@each_integer_case
def test_a_row_is_the_same_alone_and_in_any_batch(isa, case, n, k):
    weight = random_weight(case, n, fitting(k, case))
    x = random_rows(61, weight.k)
    whole = multiply(isa, weight, x)
    for start, stop in ((0, 1), (60, 61), (7, 9), (0, 6), (12, 25), (20, 53), (1, 61)):
        y = multiply(isa, weight, x[start:stop])
        if expands(isa, weight.case, 61) and not expands(isa, weight.case, stop - start):
            allowed = bound(isa, weight, x)[start:stop] + bound(isa, weight, x[start:stop])
            assert (np.abs(y - whole[start:stop]) <= allowed).all()
        else:
            np.testing.assert_array_equal(y, whole[start:stop])


@pytest.mark.parametrize("m", (2, 5, 12, 40))
@each_case
def test_a_row_does_not_depend_on_the_others(isa, case, m):
    weight = random_weight(case, 50, fitting(700, case))
    x, other = random_rows(m, weight.k), 50 * random_rows(m, weight.k, seed=2)
    row = m // 2
    other[row] = x[row]
    np.testing.assert_array_equal(multiply(isa, weight, x)[row], multiply(isa, weight, other)[row])


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("m", (1, 3, 13, 40))
@each_case
def test_a_row_that_is_not_finite_spoils_only_itself(isa, case, m, bad):
    weight = random_weight(case, 50, fitting(700, case))
    x = random_rows(m, weight.k)
    clean = multiply(isa, weight, x)
    row = m - 1
    x[row, weight.k // 2] = bad
    y = multiply(isa, weight, x)
    np.testing.assert_array_equal(np.delete(y, row, 0), np.delete(clean, row, 0))
    assert not np.isfinite(y[row]).any()
    in_bf16 = not case.quantized or (expands(isa, weight.case, m) and case.bits == 16)
    assert in_bf16 or np.isnan(y[row]).all()


@each_case
def test_rows_of_zeros_and_of_extreme_size(isa, case):
    weight = random_weight(case, 50, fitting(1100, case))
    x = random_rows(6, weight.k)
    factors = np.array([0, 1e-42, 1e-37, 1e-20, 1e20, 1e33], np.float32)
    check(isa, weight, x * factors[:, None])
    for row in range(6):
        check(isa, weight, x[[row]] * factors[row])
    assert not multiply(isa, weight, np.zeros((3, weight.k), np.float32)).any()


@pytest.mark.parametrize("largest", (300, 1000))
@pytest.mark.parametrize("case", [case for case in INTEGERS if case.bits == 16], ids=str)
def test_outlier_channels_cost_no_more_than_bf16_arithmetic(isa, case, largest):
    weight = random_weight(case, 64, fitting(1024, case))
    x = random_rows(20, weight.k)
    x[:, [5, 600, weight.k - 1]] *= largest
    check(isa, weight, x)
    exact = x.astype(float) @ weight.values.T
    in_bf16 = rounded_to_bf16(x) @ rounded_to_bf16(weight.values.astype(np.float32)).T
    error, of_bf16 = (np.sqrt(np.mean((y - exact) ** 2)) for y in (multiply(isa, weight, x), in_bf16))
    # Sums in float32 are off by far less.
    assert error <= of_bf16 * (1.001 if expands(isa, weight.case, 20) else 1)


def rounded_to_bf16(x):
    """Nearest bfloat16, ties to even, as float64."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(float)


def test_bf16_multiplies_x_as_it_is_in_few_rows_and_rounded_in_many():
    """What the level adds: in few rows x keeps its float32, in many the result is that of x rounded to bfloat16."""
    if "avx512_bf16" not in native().present_isa_levels():
        pytest.skip("this machine has no avx512_bf16")
    weight, x = random_weight(Case("bf16"), 40, 700), random_rows(12, 700)
    few = np.abs(multiply("avx512_bf16", weight, x[:4]) - x[:4].astype(float) @ weight.values.T)
    assert (few <= bound("avx512", weight, x[:4])).all()
    rounded = rounded_to_bf16(x)
    many = np.abs(multiply("avx512_bf16", weight, x) - rounded @ weight.values.T)
    assert (many <= bound("avx512", weight, rounded)).all()


# Epilogues. gelu and silu have slopes within 1.13; a sigmoid's relative error is a few units and that of its argument.


def gelu_argument(z):
    return 2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)


def gated_sigmoid(z, argument, error):
    """z sigmoid(argument), and its bound where z has that error."""
    with np.errstate(over="ignore"):
        value = z / (1 + np.exp(-argument))
    return value, 1.13 * error + (16 + 8 * np.abs(argument)) * U * np.abs(value) + TINY


def epilogue_of(z, error, activation, y_features, residual=None, residual_scale=1.0, bias=None):
    """Exact y and its bound, from the packed features z [rows, 16 panels], bias added, with that error."""
    if activation == "gelu_tanh":
        y, error = gated_sigmoid(z, gelu_argument(z), error)
    elif activation == "silu_gate":
        panels = z.reshape(len(z), -1, 2, 16).transpose(2, 0, 1, 3).reshape(2, len(z), -1)
        errors = error.reshape(len(z), -1, 2, 16).transpose(2, 0, 1, 3).reshape(2, len(z), -1)
        gate, of_gate = gated_sigmoid(panels[0], panels[0], errors[0])
        y = gate * panels[1]
        error = of_gate * np.abs(panels[1]) + np.abs(gate) * errors[1] + of_gate * errors[1] + U * np.abs(y)
    else:
        y = z
    y, error = y[:, :y_features], error[:, :y_features]
    if residual is None:
        return y, error
    added = residual_scale * residual.astype(float)
    return y + added, error + 2 * U * (np.abs(y) + np.abs(added))


@pytest.mark.parametrize("activation", ("none", "gelu_tanh", "silu_gate"))
@each_case
def test_epilogues(isa, case, activation):
    panels, k = 6, fitting(600, case)
    weight = random_weight(case, 16 * panels, k)
    bias = np.random.default_rng(5).standard_normal(16 * panels).astype(np.float32)
    for m, y_features in ((1, 48), (2, 33), (5, 48), (13, 41), (30, 1)):
        x, residual = random_rows(m, k) / 8, random_rows(m, y_features, seed=5)
        product, limit = x.astype(float) @ weight.values.T, bound(isa, weight, x)
        for options in (
            {},
            {"bias": bias},
            {"residual": residual},
            {"bias": bias, "residual": residual, "residual_scale": 0.75},
        ):
            y = multiply(isa, weight, x, y_features=y_features, activation=activation, **options)
            z = product + options.get("bias", 0)
            exact, error = epilogue_of(z, limit + 2 * U * np.abs(z), activation, y_features, **options)
            assert y.shape == exact.shape
            assert (np.abs(y - exact) <= error).all(), (m, y_features, options.keys())


@each_case
def test_gates_of_more_panels_than_are_finished_together(isa, case):
    panels, k = 130, fitting(64, case)
    weight = random_weight(case, 16 * panels, k)
    for m in (1, 2, 20):
        x = random_rows(m, k) / 8
        y = multiply(isa, weight, x, y_features=8 * panels, activation="silu_gate")
        z = x.astype(float) @ weight.values.T
        exact, error = epilogue_of(z, bound(isa, weight, x) + 2 * U * np.abs(z), "silu_gate", 8 * panels)
        assert (np.abs(y - exact) <= error).all(), m


# Memory


@each_case
def test_nothing_is_read_behind_the_operands(isa, case):
    for n, k in ((1, 1), (16, 65), (47, 253), (64, 1151)):
        weight = random_weight(case, n, fitting(k, case))
        assert weight.layout.bytes % 64 == 0 or case.format == "int4"
        panels = 16 * weight.layout.panels
        bias, residual = at_page_end(np.ones(panels, np.float32)), at_page_end(np.ones((5, n), np.float32))
        for m in (1, 5, 13, 20, 33):
            x = random_rows(m, weight.k)
            expected = multiply(isa, weight, x)
            y = native().fully_connected(
                isa, weight.layout, at_page_end(weight.payload), at_page_end(x), n, activation_bits=case.bits
            )
            np.testing.assert_array_equal(y, expected)
        multiply(isa, weight, at_page_end(random_rows(5, weight.k)), bias=bias, residual=residual)


# Levels


@pytest.mark.parametrize("bits", (16, 8))
@pytest.mark.parametrize("activation", ("none", "gelu_tanh", "silu_gate"))
def test_int8_is_the_same_at_every_level(bits, activation):
    names = levels()
    if len(names) < 2:
        pytest.skip(f"this machine has {names[0]} only")
    weight = random_weight(Case("int8", bits), 96, 1300)
    for m in (1, 4, 13, 50):
        options = {"y_features": 48 if activation == "silu_gate" else 96, "activation": activation}
        options["bias"] = random_rows(1, 96)[0]
        options["residual"] = random_rows(m, options["y_features"], seed=4)
        first, *others = (multiply(level, weight, random_rows(m, 1300) / 8, **options) for level in names)
        for other in others:
            np.testing.assert_array_equal(other, first)
