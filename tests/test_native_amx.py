"""The kernels of the AMX level, on emulated tiles (csrc/kernels/amx/tiles_emulated.h), which need AVX-512 BF16 only,
and where the machine has AMX on its own."""

from __future__ import annotations

import struct

import ml_dtypes
import numpy as np
import pytest

from chatglm_ov.native import native, unavailable

pytestmark = [
    pytest.mark.skipif(unavailable() is not None, reason=f"no native library: {unavailable()}"),
    pytest.mark.skipif(
        unavailable() is None and "avx512_bf16" not in native().present_isa_levels(),
        reason="this machine lacks avx512_bf16, which the emulated AMX level is compiled for",
    ),
]

EPS = 2.0**-24  # half a unit in the last place of 1 in float32
BF16_EPS = 2.0**-8  # the same in bfloat16


# Tiles


def configuration(shapes, palette=1, start_row=0, reserved=b"\0" * 14):
    """The operand of LDTILECFG from (rows, column bytes) by tile."""
    shapes = shapes + [(0, 0)] * (16 - len(shapes))
    return struct.pack("<BB14s16H16B", palette, start_row, reserved, *[c for _, c in shapes], *[r for r, _ in shapes])


def product_shapes(rows, depth, columns):
    """Sum in tile 0, A in 4, B in 6; depth and columns in groups of 4 bytes."""
    none = (0, 0)
    return [(rows, 4 * columns), none, none, none, (rows, 4 * depth), none, (depth, 4 * columns), none]


@pytest.mark.parametrize(("rows", "depth", "columns"), [(16, 16, 16), (1, 1, 1), (5, 8, 16), (16, 3, 7)])
@pytest.mark.parametrize("kind", ["s8_s8", "s8_u8"])
def test_integer_tile_product_is_the_triple_loop(kind, rows, depth, columns):
    rng = np.random.default_rng(rows)
    a, b, sums = (rng.integers(0, 256, (16, 64), np.uint8) for _ in range(3))
    wide_a = a.view(np.int8).astype(np.int64)
    wide_b = (b.view(np.int8) if kind == "s8_s8" else b).astype(np.int64)
    expected = sums.copy()
    out = expected.view(np.int32)
    for m in range(rows):
        for n in range(columns):
            for k in range(depth):
                dot = sum(wide_a[m, 4 * k + j] * wide_b[k, 4 * n + j] for j in range(4))
                out[m, n] = (int(out[m, n]) + int(dot) + 2**31) % 2**32 - 2**31
    native().tile_product(kind, configuration(product_shapes(rows, depth, columns)), a, b, sums)
    np.testing.assert_array_equal(sums, expected)


@pytest.mark.parametrize(("rows", "depth", "columns"), [(16, 16, 16), (2, 5, 9)])
def test_bf16_tile_product_sums_even_and_odd_apart(rows, depth, columns):
    """Bit for bit, with products of integers: those are exact, so only the order of the sums rounds."""
    rng = np.random.default_rng(depth)
    a, b = (rng.integers(-255, 256, (16, 32)).astype(ml_dtypes.bfloat16) for _ in range(2))
    sums = (rng.standard_normal((16, 16)) * 1e6).astype(np.float32)
    expected = sums.copy()
    for m in range(rows):
        for n in range(columns):
            parts = [np.float32(0), np.float32(0)]
            for k in range(depth):
                for j in range(2):
                    # The product has 16 bits, so adding it in float64 is exact and rounding once is the FMA's.
                    product = float(a[m, 2 * k + j]) * float(b[k, 2 * n + j])
                    parts[j] = np.float32(float(parts[j]) + product)
            expected[m, n] += np.float32(parts[0] + parts[1])
    native().tile_product(
        "bf16",
        configuration(product_shapes(rows, depth, columns)),
        a.view(np.uint8),
        b.view(np.uint8),
        sums.view(np.uint8),
    )
    np.testing.assert_array_equal(sums, expected)


def test_bf16_tile_product_takes_subnormal_numbers_as_zero():
    a, b = np.zeros((16, 32), ml_dtypes.bfloat16), np.zeros((16, 32), ml_dtypes.bfloat16)
    sums = np.zeros((16, 16), np.float32)
    a[0, 0], b[0, 0] = 1e-39, 1e30  # a subnormal operand
    a[1, 2], b[1, 2] = 1e-30, 1e-10  # a subnormal product
    sums[2, 3] = 1e-40  # a subnormal sum
    native().tile_product(
        "bf16", configuration(product_shapes(16, 16, 16)), a.view(np.uint8), b.view(np.uint8), sums.view(np.uint8)
    )
    assert not sums.any()


FITTING = product_shapes(16, 16, 16)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (configuration(FITTING, palette=0), "palette 0"),
        (configuration(FITTING, start_row=1), "start row 1"),
        (configuration(FITTING, reserved=b"\0" * 13 + b"\1"), "reserved byte 15"),
        (configuration([(17, 64), *FITTING[1:]]), "tile 0 of 17 rows"),
        (configuration([(16, 68), *FITTING[1:]]), "tile 0 of 16 rows, 68 bytes"),
        (configuration([(16, 0), *FITTING[1:]]), "wanted both or none to be 0"),
        (configuration([*FITTING, (16, 64)]), "wanted 8 tiles"),
        (configuration([*FITTING[:6], (0, 0)]), "tile 6 is not configured"),
        (configuration([*FITTING[:6], (8, 64)]), "shapes of a product do not match"),
        (configuration([(15, 64), *FITTING[1:]]), "shapes of a product do not match"),
    ],
)
def test_what_the_processor_refuses_is_refused(bad, message):
    tile = np.zeros((16, 64), np.uint8)
    with pytest.raises(RuntimeError, match=message):
        native().tile_product("s8_u8", bad, tile, tile, tile.copy())


def test_tiles_are_released_by_a_kernel():
    layout, payload, _ = make_weight("int8", 32, 64)
    native().fully_connected("amx_emulated", layout, payload, np.ones((16, 64), np.float32), 32)
    native().tile_product("bf16", configuration(FITTING), *(np.zeros((16, 64), np.uint8) for _ in range(3)))
    with pytest.raises(RuntimeError, match="tiles are not configured"):
        native().zero_unconfigured_tile()


@pytest.fixture(params=["amx_emulated", "amx"])
def level(request):
    if request.param == "amx" and "amx" not in native().present_isa_levels():
        pytest.skip("this machine has no amx")
    return request.param


# Fully connected


def make_weight(fmt, out_features, in_features, group_size=0, seed=0):
    """A random weight: (layout, payload, its values float64 [out_features, in_features])."""
    rng = np.random.default_rng(seed)
    layout = native().PackedLayout(fmt, out_features, in_features, group_size)
    payload = np.zeros(layout.bytes, np.uint8)
    shape, padded = (out_features, in_features), layout.panels * 16
    if fmt == "bf16":
        values = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
        codes = values.view(np.uint16)
    elif fmt == "int8":
        codes = rng.integers(-127, 128, shape, np.int8)
        scale = rng.uniform(0.001, 0.1, out_features).astype(np.float32)
        payload[layout.scale_offset :].view(np.float32)[:out_features] = scale
        values = codes * scale[:, None].astype(np.float64)
    else:
        groups, stored = in_features // group_size, layout.padded_in // group_size
        codes = rng.integers(0, 16, shape, np.uint8)
        scale = np.zeros((padded, stored), np.float16)
        zero = np.zeros((padded, stored), np.uint8)
        scale[:out_features, :groups] = rng.uniform(0.001, 0.1, (out_features, groups))
        zero[:out_features, :groups] = rng.integers(0, 16, (out_features, groups))
        for offset, part in ((layout.scale_offset, scale), (layout.zero_point_offset, zero)):
            by_panel = np.ascontiguousarray(part.reshape(-1, 16, stored).transpose(0, 2, 1))
            payload[offset : offset + by_panel.nbytes] = by_panel.view(np.uint8).ravel()
        wide = np.repeat(scale[:out_features, :groups].astype(np.float64), group_size, axis=1)
        values = wide * (codes.astype(np.float64) - np.repeat(zero[:out_features, :groups], group_size, axis=1))
    layout.pack(codes, payload[: layout.panels * layout.panel_bytes])
    return layout, payload, values.astype(np.float64)


def make_rows(rows, columns, seed=1):
    """Rows with outlier columns, 300 times the rest."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    x[:, rng.integers(0, columns, 1 + columns // 200)] *= 300
    return x


def group_parts(layout, payload):
    """Scales and zero points of int4, float64 [out_features, groups]."""
    found = []
    for offset, dtype in ((layout.scale_offset, np.float16), (layout.zero_point_offset, np.uint8)):
        count = layout.panels * 16 * layout.padded_in // layout.group_size
        part = payload[offset : offset + count * np.dtype(dtype).itemsize].view(dtype)
        by_feature = part.reshape(layout.panels, -1, 16).transpose(0, 2, 1).reshape(layout.panels * 16, -1)
        found.append(by_feature[: layout.out_features].astype(np.float64))
    return found


def expanded_steps(layout, payload):
    """What each int4 weight is rounded to a multiple of, with 8-bit activations: [out_features, in_features].

    127 of them are the largest weight that any group of the block of 512 columns can have.
    """
    scales, zero_points = group_parts(layout, payload)
    reach = np.repeat(scales * np.maximum(zero_points, 15 - zero_points), layout.group_size, axis=1)
    steps = np.empty_like(reach)
    for start in range(0, reach.shape[1], 512):
        steps[:, start : start + 512] = reach[:, start : start + 512].max(axis=1, keepdims=True) / 127
    return steps[:, : layout.in_features]


def product(fmt, x, w, bits, weight_steps=0.0):
    """x w^T in float64, [rows, out_features], and what the kernel's result may be off by.

    bf16, and int4 with 16 bits: of x and w rounded to bfloat16; float32 rounds the sums, whose products are exact: at
    most k + 4 roundings.
    Other integers: x is rounded to half a step of its block of 512 columns, the step being max|x| / 32639 or / 127,
    found and divided by in float32. int4 weights are rounded to half of their step, and the multiplier that does it to
    2^-12 of a step for each of at most 15 steps of the codes: 1/256 of a step together. Sums are exact; each block
    rounds its sum, its scale and an addition; scale and result are rounded once more.
    """
    in_bf16 = fmt == "bf16" or (fmt == "int4" and bits == 16)
    if in_bf16:
        x, w = x.astype(ml_dtypes.bfloat16), w.astype(ml_dtypes.bfloat16)
    x, w = x.astype(np.float64), w.astype(np.float64)
    exact, absolute = x @ w.T, np.abs(x) @ np.abs(w).T
    k = x.shape[1]
    if in_bf16:
        return exact, absolute * (k + 4) * EPS
    steps = np.empty_like(x)
    for start in range(0, k, 512):
        block = np.abs(x[:, start : start + 512])
        steps[:, start : start + 512] = block.max(axis=1, keepdims=True) / (32639 if bits == 16 else 127)
    off = np.broadcast_to(weight_steps, w.shape) * (1 / 2 + 1 / 256)
    quantized = steps @ (np.abs(w) + off).T
    rounded = (np.abs(x) + steps / 2) @ off.T
    return exact, (quantized / 2 + rounded + (absolute + quantized + rounded) * (-(-k // 512) + 8) * EPS) * (1 + 1e-5)


def expected(fmt, layout, payload, w, x, bits):
    """`product` of a weight of make_weight."""
    rounds_weights = fmt == "int4" and bits == 8
    return product(fmt, x, w, bits, expanded_steps(layout, payload) if rounds_weights else 0.0)


# (format, activation bits, group size)
FORMATS = [("bf16", 16, 0), ("int8", 16, 0), ("int8", 8, 0)] + [
    ("int4", bits, group) for bits in (16, 8) for group in (32, 64, 128)
]
# Rows around the tiles and the least rows for tiles; features with odd panels and parts of panels; columns with parts
# of tiles, more than one block of 256 (bf16) and 512 (integers).
SIZES = [(16, 16, 128), (17, 40, 384), (31, 33, 640), (32, 96, 512), (33, 130, 1152), (48, 16, 1280), (65, 1, 256)]


def run(isa, layout, payload, x, bits=16, **epilogue):
    y_features = epilogue.pop("y_features", layout.out_features)
    return native().fully_connected(isa, layout, payload, x, y_features, activation_bits=bits, **epilogue)


@pytest.mark.parametrize(("rows", "out_features", "in_features"), SIZES)
@pytest.mark.parametrize(("fmt", "bits", "group"), FORMATS)
def test_fully_connected_is_near_the_double_precision_product(level, fmt, bits, group, rows, out_features, in_features):
    layout, payload, w = make_weight(fmt, out_features, in_features, group)
    x = make_rows(rows, in_features)
    y = run(level, layout, payload, x, bits)
    exact, bound = expected(fmt, layout, payload, w, x, bits)
    assert (np.abs(y - exact) <= bound).all()


@pytest.mark.parametrize(
    ("fmt", "in_features", "bits"),
    [("bf16", 35, 16), ("bf16", 300, 16), ("int8", 13, 16), ("int8", 579, 16), ("int4", 96, 16), ("int4", 672, 8)],
)
def test_columns_that_fill_no_tile(level, fmt, in_features, bits):
    layout, payload, w = make_weight(fmt, 50, in_features, 32 if fmt == "int4" else 0)
    x = make_rows(19, in_features)
    y = run(level, layout, payload, x, bits)
    exact, bound = expected(fmt, layout, payload, w, x, bits)
    assert (np.abs(y - exact) <= bound).all()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_becomes_the_nearest_int8(level, group):
    """With whole x, whose steps are 1, all that is rounded are weights: each to the nearest multiple of its step, but
    for those so near the middle of two that the multiplier may decide it."""
    layout, payload, w = make_weight("int4", 40, 1152, group)
    rng = np.random.default_rng(group)
    x = rng.integers(-127, 128, (18, 1152)).astype(np.float64)
    x[:, ::512] = 127
    steps = expanded_steps(layout, payload)
    nearest = np.rint(w / steps)
    open_ones = np.abs(np.abs(w / steps - nearest) - 1 / 2) < 1 / 256
    assert open_ones.mean() < 0.02
    wanted = x @ (nearest * steps).T
    allowed = np.abs(x) @ (open_ones * steps).T + np.abs(x) @ np.abs(nearest * steps).T * 12 * EPS
    y = run(level, layout, payload, x.astype(np.float32), 8)
    assert (np.abs(y - wanted) <= allowed).all()


@pytest.mark.parametrize(
    ("rows", "out_features", "in_features"), [*SIZES, (5, 40, 640), (512, 32, 1152), (700, 72, 512)]
)
@pytest.mark.parametrize("bits", [16, 8])
def test_int8_has_the_bits_of_avx512(level, bits, rows, out_features, in_features):
    layout, payload, _ = make_weight("int8", out_features, in_features)
    x = make_rows(rows, in_features)
    np.testing.assert_array_equal(
        run(level, layout, payload, x, bits), run("avx512", layout, payload, x, bits), strict=True
    )


@pytest.mark.parametrize(("fmt", "bits", "group"), [("int8", 16, 0), ("int8", 8, 0), ("int4", 8, 128)])
def test_tiles_of_integers_have_the_bits_of_their_emulation(fmt, bits, group):
    if "amx" not in native().present_isa_levels():
        pytest.skip("this machine has no amx")
    layout, payload, _ = make_weight(fmt, 16 * 19, 2304, group)
    x = make_rows(37, 2304)
    results = [run(level, layout, payload, x, bits) for level in ("amx", "amx_emulated")]
    np.testing.assert_array_equal(*results, strict=True)


@pytest.mark.parametrize(("fmt", "bits", "group"), FORMATS)
def test_a_group_of_pairs_goes_through_all_blocks(level, fmt, bits, group):
    """More prepared rows than stay in L2 at once: 16 panels and more keep their sums from block to block."""
    layout, payload, w = make_weight(fmt, 16 * 19, 2304, group)
    x = make_rows(400, 2304)
    y = run(level, layout, payload, x, bits)
    exact, bound = expected(fmt, layout, payload, w, x, bits)
    assert (np.abs(y - exact) <= bound).all()


@pytest.mark.parametrize(
    ("fmt", "bits", "group"), [("bf16", 16, 0), ("int8", 16, 0), ("int4", 16, 64), ("int4", 8, 128)]
)
def test_epilogues(level, fmt, bits, group):
    layout, payload, w = make_weight(fmt, 96, 384, group)
    x, rng = make_rows(21, 384) / 100, np.random.default_rng(5)
    bias = rng.standard_normal(96).astype(np.float32)
    exact, bound = expected(fmt, layout, payload, w, x, bits)
    linear = exact + bias
    bound += 4 * EPS * np.abs(linear)
    residual = rng.standard_normal((21, 40)).astype(np.float32)

    y = run(
        level,
        layout,
        payload,
        x,
        bits,
        bias=bias,
        residual=np.tile(residual, (1, 3))[:, :96].copy(),
        residual_scale=0.5,
    )
    wanted = linear + 0.5 * np.tile(residual, (1, 3))[:, :96]
    assert (np.abs(y - wanted) <= bound + 4 * EPS * (np.abs(wanted) + 5)).all()

    y = run(level, layout, payload, x, bits, bias=bias, activation="silu_gate", y_features=40, residual=residual)
    pairs = linear.reshape(21, 3, 2, 16)
    bounds = bound.reshape(21, 3, 2, 16)
    gate, up = pairs[:, :, 0].reshape(21, 48)[:, :40], pairs[:, :, 1].reshape(21, 48)[:, :40]
    gate_bound, up_bound = bounds[:, :, 0].reshape(21, 48)[:, :40], bounds[:, :, 1].reshape(21, 48)[:, :40]
    silu = gate / (1 + np.exp(-gate))
    # The slope of silu is at most 1.1 in size; 32 EPS for its own arithmetic.
    silu_bound = 1.1 * gate_bound + 32 * EPS * np.abs(silu)
    allowed = silu_bound * (np.abs(up) + up_bound) + np.abs(silu) * up_bound + 8 * EPS * (np.abs(silu * up) + 5)
    assert (np.abs(y - (silu * up + residual)) <= allowed).all()


@pytest.mark.parametrize(("fmt", "bits", "group"), FORMATS)
def test_a_row_does_not_depend_on_the_other_rows(level, fmt, bits, group):
    layout, payload, _ = make_weight(fmt, 48, 640, group)
    x = make_rows(40, 640)
    others = make_rows(40, 640, seed=9)
    others[3], others[20] = np.inf, np.nan
    others[[0, 17, 39]] = x[[0, 17, 39]]
    one, other = (run(level, layout, payload, rows, bits)[[0, 17, 39]] for rows in (x, others))
    np.testing.assert_array_equal(one, other, strict=True)


# Attention


def make_cache(level, head_dim, slots, seed=0):
    """Blocks of a bf16 cache, u8 [blocks, block_bytes], that is NaN behind `slots`, and its keys and values."""
    rng = np.random.default_rng(seed)
    layout = native().CacheLayout("bf16", 1, head_dim)
    blocks = np.full((-(-slots // 32), layout.block_bytes), 0xFF, np.uint8)
    keys = rng.standard_normal((slots, head_dim)).astype(ml_dtypes.bfloat16).astype(np.float32)
    values = (rng.standard_normal((slots, head_dim)) + 1).astype(ml_dtypes.bfloat16).astype(np.float32)
    for slot in range(slots):
        native().append(level, "bf16", head_dim, blocks[slot // 32], slot % 32, keys[slot], values[slot])
    return blocks, keys, values


def check_attention(level, query, visible, blocks, keys, values, begin, end):
    """Against double precision. Scores: queries are two bfloat16 numbers, off by BF16_EPS^2, and 2 dim products are
    summed. p = exp(score - max) is off by that, by exp's error and by rounding to bfloat16, which also its sum has;
    the context is a sum of p times value over all slots."""
    head_dim = query.shape[1]
    context, peak, total = native().attend(level, "bf16", head_dim, query, visible, blocks, begin, end)
    for row, q in enumerate(query.astype(np.float64)):
        seen = slice(begin, max(begin, min(end, visible[row])))
        if seen.start == seen.stop:
            assert peak[row] == -np.inf and total[row] == 0 and not context[row].any()
            continue
        k, v = keys[seen].astype(np.float64), values[seen].astype(np.float64)
        scores = k @ q
        score_bound = (np.abs(k) @ np.abs(q) * (BF16_EPS**2 + (2 * head_dim + 4) * EPS)).max()
        assert abs(peak[row] - scores.max()) <= score_bound
        # Relative to p: both score and max are off, and each step of 256 slots rescales what came before.
        n = len(scores)
        relative = np.expm1(2 * score_bound + 8 * EPS + 2 * EPS * np.abs(scores - scores.max()).max())
        relative += BF16_EPS + (n / 128 * 4 + n) * EPS
        p = np.exp(scores - scores.max())
        assert abs(total[row] - p.sum()) <= relative * p.sum()
        assert (np.abs(context[row] - p @ v) <= relative * (p @ np.abs(v))).all()


@pytest.mark.parametrize("head_dim", [128, 64, 96, 32, 60])
@pytest.mark.parametrize(
    ("rows", "slots"), [(16, 1), (16, 33), (8, 64), (11, 300), (16, 515), (13, 767), (1, 300), (3, 64)]
)
def test_attention_is_near_double_precision(level, head_dim, rows, slots):
    blocks, keys, values = make_cache(level, head_dim, slots)
    rng = np.random.default_rng(slots)
    query = (rng.standard_normal((rows, head_dim)) * 2 / np.sqrt(head_dim)).astype(np.float32)
    everything = np.full(rows, slots, np.int64)
    check_attention(level, query, everything, blocks, keys, values, 0, slots)
    causal = np.maximum(0, slots - np.arange(rows)[::-1] * 3).astype(np.int64)
    causal[rows // 2] = 0
    check_attention(level, query, causal, blocks, keys, values, 0, slots)
    check_attention(level, query, causal, blocks, keys, values, slots // 64 * 32, slots)


def test_attention_leaves_out_what_lies_behind_the_end(level):
    """Slots from `end` on, and those that no row sees, are NaN."""
    blocks, keys, values = make_cache(level, 128, 290)
    query = np.random.default_rng(3).standard_normal((16, 128)).astype(np.float32) / 8
    check_attention(level, query, np.full(16, 1000, np.int64), blocks, keys, values, 0, 290)
    damaged = blocks.copy()
    damaged[205 // 32 + 1 :] = 0xFF
    check_attention(level, query, np.arange(190, 206, dtype=np.int64), damaged, keys, values, 0, 206)


def test_attention_rows_do_not_depend_on_each_other(level):
    blocks, _, _ = make_cache(level, 128, 333)
    rng = np.random.default_rng(4)
    query = rng.standard_normal((16, 128)).astype(np.float32) / 8
    visible = np.arange(318, 334, dtype=np.int64)
    whole = native().attend(level, "bf16", 128, query, visible, blocks, 0, 333)
    part = native().attend(level, "bf16", 128, query[4:14].copy(), visible[4:14].copy(), blocks, 0, 333)
    for one, other in zip(whole, part, strict=True):
        np.testing.assert_array_equal(one[4:14], other)


def test_attention_of_steps_merges_to_that_of_all(level):
    """Two ranges, merged, are one: the split of a long cache over threads."""
    blocks, keys, values = make_cache(level, 64, 600)
    rng = np.random.default_rng(6)
    query = rng.standard_normal((8, 64)).astype(np.float32) / 4
    visible = np.full(8, 600, np.int64)
    first = native().attend(level, "bf16", 64, query, visible, blocks, 0, 320)
    second = native().attend(level, "bf16", 64, query, visible, blocks, 320, 600)
    scores = keys.astype(np.float64) @ query.T.astype(np.float64)
    weights = np.exp(scores - scores.max(axis=0))
    expected = (weights / weights.sum(axis=0)).T @ values.astype(np.float64)
    for row in range(8):
        context = first[0][row].copy()
        _, total = native().merge(
            level, second[0][row].copy(), second[1][row], second[2][row], context, first[1][row], first[2][row]
        )
        # As in check_attention with |score| < 64; the sums of 600 slots.
        relative = 2 * (BF16_EPS + np.abs(query[row]).sum() * 5 * BF16_EPS**2 + 1000 * EPS)
        allowed = relative * (weights[:, row] / weights[:, row].sum()) @ np.abs(values)
        assert (np.abs(context / total - expected[row]) <= allowed).all()
