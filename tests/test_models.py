"""Shapes, positions, prefixes and row orders of the model definitions, against the originals and slow loops."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch
from golden_cases import given_mask
from golden_sets import GOLDENS, cases
from hypothesis import given
from hypothesis import strategies as st

from chatglm_ov.config import load_config, parse_config
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.models import architecture, chatglm, chatglm2
from chatglm_ov.models.rows import interleaved_to_half, per_head_qkv, planar_qkv, two_halves_to_one
from chatglm_ov.presets import config_json

# Weights


@pytest.mark.parametrize(
    ("preset", "changes", "parameters", "tensors"),
    [
        # Tensors: those of the released index files, less the rotary frequencies, which are no parameters.
        ("chatglm-6b", {"tie_word_embeddings": False}, 6_707_929_088, 368 - 28),
        ("chatglm-6b", {}, 6_173_286_400, 368 - 28 - 1),
        ("chatglm2-6b", {}, 6_243_584_000, 200 - 1),
        ("chatglm3-6b", {}, 6_243_584_000, 200 - 1),
        ("codegeex2-6b", {}, 6_243_584_000, 200 - 1),
        ("glm-4-9b-chat", {}, 9_399_951_360, 284 - 1),
        ("glm-4-9b-chat-1m", {}, 9_483_857_920, 284 - 1),
        ("glm-4-9b-chat-hf", {}, 9_399_951_360, 443),
        ("glm-edge-1.5b-chat", {}, 1_472_055_296, 227 - 1),
        ("glm-edge-4b-chat", {}, 4_327_984_128, 323),
        ("glm-4-9b-0414", {}, 9_400_279_040, 523),
        ("glm-4-32b-0414", {}, 32_566_081_536, 613),
    ],
)
def test_parameters_of_released_models(preset, changes, parameters, tensors):
    config = parse_config(config_json(preset, **changes))
    shapes = architecture(config).weight_shapes(config)
    assert sum(prod(shape) for shape in shapes.values()) == parameters
    assert len(shapes) == tensors


@pytest.mark.parametrize(("preset", "elements"), [("chatglm-6b", 201_379_840), ("chatglm3-6b", 203_960_832)])
def test_parameters_of_one_block(preset, elements):
    one, two = (parse_config(config_json(preset, num_layers=n)) for n in (1, 2))
    sizes = [sum(map(prod, architecture(c).weight_shapes(c).values())) for c in (one, two)]
    assert sizes[1] - sizes[0] == elements


@pytest.mark.parametrize("preset", ["chatglm-6b", "chatglm3-6b"])
def test_ignored_tensors(preset):
    tied, untied = (parse_config(config_json(preset, tie_word_embeddings=tie)) for tie in (True, False))
    module = architecture(tied)
    assert module.is_ignored(untied, "transformer.rotary_pos_emb.inv_freq")
    assert module.is_ignored(tied, module.LM_HEAD)
    assert not module.is_ignored(untied, module.LM_HEAD)
    assert not any(
        module.is_ignored(config, name) for config in (tied, untied) for name in module.weight_shapes(config)
    )
    assert module.is_ignored(tied, "transformer.prefix_encoder.embedding.weight")


def test_qkv_bias_follows_the_config():
    for bias in (True, False):
        shapes = chatglm2.weight_shapes(parse_config(config_json("chatglm3-6b", add_qkv_bias=bias)))
        assert (f"{chatglm2.LAYER}.0.self_attention.query_key_value.bias" in shapes) == bias


# Positions and prefixes


@pytest.mark.parametrize(("golden", "prompt"), cases("position_ids"))
def test_positions_of_the_goldens(golden, prompt):
    config = load_config(golden.checkpoint)
    ids, mask = golden[f"{prompt}_input_ids"], given_mask(golden, prompt)
    ours = architecture(config).position_ids(config, ids, mask)
    wanted = golden[f"{prompt}_position_ids"]
    if prompt == "both_tok":
        # The tokenizer takes [MASK], the model [gMASK].
        c = ids[0].tolist().index(config.bos_token_id)
        assert (wanted[0, 0, c:] == ids[0].tolist().index(config.mask_token_id)).all()
        wanted = golden["both_position_ids"]
    np.testing.assert_array_equal(ours, wanted)
    assert ours.dtype == np.int64


@pytest.mark.parametrize("golden", [golden for golden in GOLDENS if "mask_input_ids" in golden], ids=str)
@pytest.mark.parametrize("prompt", ["p5", "mask", "mid", "both", "batch"])
def test_prefix_of_the_goldens(golden, prompt):
    """The original's mask is open, for its first real query, exactly at the real columns before the prefix ends."""
    config = load_config(golden.checkpoint)
    ids, mask = golden[f"{prompt}_input_ids"], given_mask(golden, prompt)
    blocked = golden[f"{prompt}_attention_mask"][:, 0].astype(bool)
    for row, prefix in enumerate(chatglm.prefix_length(config, ids, mask)):
        start = 0 if mask is None else int(np.count_nonzero(mask[row] == 0))
        np.testing.assert_array_equal(np.flatnonzero(~blocked[row, start]), np.arange(start, prefix))


V1 = parse_config(
    config_json("chatglm-6b", vocab_size=64, bos_token_id=60, eos_token_id=61, mask_token_id=56, gmask_token_id=57)
)
V2 = parse_config(config_json("chatglm3-6b"))
SOP, MASK, GMASK = V1.bos_token_id, V1.mask_token_id, V1.gmask_token_id

# A real sequence of the first generation: any ids, at least one mask and one <sop>, both anywhere and any number.
sequences = (
    st.tuples(
        st.lists(st.sampled_from([1, 2, SOP, MASK, GMASK]), max_size=8),
        st.sampled_from([MASK, GMASK]),
        st.integers(0, 99),
    )
    .map(lambda drawn: np.random.default_rng(drawn[2]).permutation([*drawn[0], drawn[1], SOP]).tolist())
    .filter(lambda row: SOP in row)
)
# Padding may hold any id, those with a meaning too.
pads = st.sampled_from([0, 3, SOP, GMASK, MASK])


def padded(rows: list[list[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of unequal length, left-padded: ids and mask int64 [B, L]."""
    length = max(map(len, rows))
    ids = np.array([[pad] * (length - len(row)) + row for row in rows])
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def slow_positions(row: list[int]) -> tuple[list[int], list[int], int]:
    """Positions, block positions and prefix of one sequence, from the rules as written down: c is the place of the
    first <sop>, p that of the first [gMASK], else of the first [MASK]."""
    c = row.index(SOP)
    p = row.index(GMASK) if GMASK in row else row.index(MASK)
    position, block = [], []
    for i in range(len(row)):
        position.append(i if i < c else p)
        block.append(0 if i < c else i - c + 1)
    return position, block, c


@given(st.lists(sequences, min_size=1, max_size=4), pads)
def test_first_generation_positions_and_prefix(rows, pad):
    ids, mask = padded(rows, pad)
    positions, prefix = chatglm.position_ids(V1, ids, mask), chatglm.prefix_length(V1, ids, mask)
    assert positions.shape == (len(rows), 2, ids.shape[1])
    for i, row in enumerate(rows):
        padding = ids.shape[1] - len(row)
        position, block, c = slow_positions(row)
        assert positions[i].tolist() == [[0] * padding + position, [0] * padding + block]
        assert prefix[i] == padding + c


@given(sequences)
def test_first_generation_without_a_mask_counts_every_column(row):
    ids = np.array([row])
    position, block, c = slow_positions(row)
    assert chatglm.position_ids(V1, ids, None).tolist() == [[position, block]]
    assert chatglm.prefix_length(V1, ids, None).tolist() == [c]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_later_generations_positions(lengths):
    ids, mask = padded([[7] * length for length in lengths], 0)
    positions = chatglm2.position_ids(V2, ids, mask)
    wanted = [[0] * (max(lengths) - length) + list(range(length)) for length in lengths]
    assert positions.tolist() == wanted
    assert chatglm2.position_ids(V2, ids, None).tolist() == [list(range(max(lengths)))] * len(lengths)
    assert chatglm2.prefix_length(V2, ids, mask) is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, GMASK, SOP], [1, GMASK, 2]], r"input_ids row 1: <sop> is missing, expected token id 60"),
        ([[1, 2, SOP]], r"input_ids row 0: \[gMASK\] / \[MASK\] is missing, expected token id 57 or 56"),
        # What only the padding holds does not count.
        ([[1, GMASK, 1, 1], [GMASK, 2]], r"input_ids row 0: <sop> is missing"),
    ],
    ids=["no sop", "no mask", "in the padding"],
)
def test_prompt_without_its_special_tokens_is_refused(rows, message):
    ids, mask = padded(rows, SOP)
    with pytest.raises(ChatGLMError, match=message):
        chatglm.position_ids(V1, ids, mask)


# Rotary


def test_first_generation_frequencies_are_the_originals_halves():
    for head_dim in (16, 32, 64, 128):
        config = parse_config(config_json("chatglm-6b", hidden_size=2 * head_dim, num_attention_heads=2))
        dim = head_dim // 2
        wanted = (1.0 / 10000 ** (torch.arange(0, dim, 2).float() / dim)).half().float().numpy()
        ours = chatglm.rotary(config)
        np.testing.assert_array_equal(ours.inv_freq, [wanted, wanted])
        assert ours.dim == head_dim


@pytest.mark.parametrize(
    ("ratio", "meaning"), [(1, "base"), (16, "position"), (50, "base"), (500, "base"), (10000, "base")]
)
def test_later_frequencies_follow_rope_ratio(ratio, meaning):
    config = parse_config(config_json("chatglm3-6b", rope_ratio=ratio, rope_ratio_meaning=meaning))
    ours = chatglm2.rotary(config)
    exponent = np.arange(0, 64, 2) / 64
    exact = 10000.0**-exponent / ratio if meaning == "position" else (10000.0 * ratio) ** -exponent
    # A power in float32 is within two units in the last place, the quotient within another.
    np.testing.assert_allclose(ours.inv_freq, exact[None], rtol=3 * 2**-23)
    assert (ours.inv_freq.dtype, ours.dim) == (np.float32, 64)


def rotated_pairs(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """The later generations' own form: adjacent pairs (2i, 2i+1) of the first dims turn by angle i, the rest stays."""
    y = x.copy()
    for i, angle in enumerate(angles):
        a, b = x[2 * i], x[2 * i + 1]
        y[2 * i], y[2 * i + 1] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return y


def rotated_halves(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Rotate-half of all dims: (i, i + n) turn by angle i. The one form that the lowering knows."""
    n = angles.size
    a, b = x[:n], x[n:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)])


def lowered(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Rotate-half of the first dims, as many as there are angles for."""
    dim = 2 * angles.size
    return np.concatenate([rotated_halves(x[:dim], angles), x[dim:]])


head_dims = st.integers(1, 32).map(lambda n: 4 * n)
seeds = st.integers(0, 2**32 - 1)
positions = st.integers(0, 4096)


@given(head_dims, seeds, positions, positions)
def test_interleaved_scores_do_not_change(head_dim, seed, at, other):
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, head_dim))
    dim = head_dim // 2
    frequencies = 10000.0 ** (-np.arange(0, dim, 2) / dim)
    order = interleaved_to_half(head_dim, dim)
    original = rotated_pairs(q, at * frequencies) @ rotated_pairs(k, other * frequencies)
    ours = lowered(q[order], at * frequencies) @ lowered(k[order], other * frequencies)
    assert abs(ours - original) < 1e-12
    np.testing.assert_allclose(
        lowered(k[order], other * frequencies), rotated_pairs(k, other * frequencies)[order], rtol=0, atol=1e-12
    )


@given(head_dims, seeds, st.tuples(positions, positions), st.tuples(positions, positions))
def test_two_dimensional_scores_do_not_change(head_dim, seed, at, other):
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, head_dim))
    dim = head_dim // 2
    frequencies = 10000.0 ** (-np.arange(0, dim, 2) / dim)
    order = two_halves_to_one(head_dim)

    def original(x: np.ndarray, place: tuple[int, int]) -> np.ndarray:
        return np.concatenate(
            [rotated_halves(x[half * dim : (half + 1) * dim], place[half] * frequencies) for half in (0, 1)]
        )

    def ours(x: np.ndarray, place: tuple[int, int]) -> np.ndarray:
        return lowered(x[order], np.concatenate([place[0] * frequencies, place[1] * frequencies]))

    assert abs(ours(q, at) @ ours(k, other) - original(q, at) @ original(k, other)) < 1e-12
    np.testing.assert_allclose(ours(k, other), original(k, other)[order], rtol=0, atol=1e-12)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3).map(lambda n: 4 * n))
def test_row_orders_of_merged_weights(groups, share, dim):
    """Rows carry their own names; the planes must be the heads in order, q and k with their dims in head order."""
    heads, order = groups * share, np.random.default_rng(dim).permutation(dim)
    planar = [
        (part, head, d)
        for part, n in (("q", heads), ("k", groups), ("v", groups))
        for head in range(n)
        for d in range(dim)
    ]
    per_head = [(part, head, d) for head in range(heads) for part in "qkv" for d in range(dim)]

    def planes(groups: int) -> list[tuple[str, int, int]]:
        rotated = [
            (part, head, d) for part, n in (("q", heads), ("k", groups)) for head in range(n) for d in order.tolist()
        ]
        return rotated + [("v", head, d) for head in range(groups) for d in range(dim)]

    assert [planar[row] for row in planar_qkv(heads, groups, order)] == planes(groups)
    assert [per_head[row] for row in per_head_qkv(heads, order)] == planes(heads)


def test_key_order_is_the_row_order_of_a_head():
    v1, v2 = parse_config(config_json("chatglm-6b")), parse_config(config_json("chatglm3-6b"))
    np.testing.assert_array_equal(chatglm.key_order(v1), two_halves_to_one(128))
    np.testing.assert_array_equal(chatglm2.key_order(v2), interleaved_to_half(128, 64))
    np.testing.assert_array_equal(chatglm2.qkv_rows(v2, 64)[:128], chatglm2.key_order(v2))
