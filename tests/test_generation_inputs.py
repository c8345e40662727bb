"""Masks and positions on their way to the runtime, without a model."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatglm_ov import ChatGLMError
from chatglm_ov.config import ChatGLM2Config, ChatGLMConfig
from chatglm_ov.generation.cache import Session
from chatglm_ov.generation.inputs import leading_padding, next_positions, prepare
from chatglm_ov.models import chatglm, chatglm2

pytestmark = pytest.mark.transformers_matrix

SIZES = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}
V1 = SimpleNamespace(
    architecture=chatglm,
    config=ChatGLMConfig(**SIZES, vocab_size=40, inner_hidden_size=8, bos_token_id=34, eos_token_id=35, pad_token_id=3),
)
V2 = SimpleNamespace(architecture=chatglm2, config=ChatGLM2Config(**SIZES, padded_vocab_size=40, ffn_hidden_size=8))
GMASK, SOP = 31, 34


def v1_prompt(text: int, answer: int, padding: int) -> list[int]:
    """`text` ids, [gMASK] <sop>, `answer` ids, all behind `padding` ids."""
    return [3] * padding + [5] * text + [GMASK, SOP] + [6] * answer


def v1_blocked(text: int, answer: int, padding: int) -> np.ndarray:
    """The original's mask [L, L] of such a prompt, entry by entry; 1 in all rows of the padding, as its tokenizer
    writes them."""
    length = padding + text + 2 + answer
    sop = padding + text + 1
    mask = np.ones((length, length), dtype=bool)
    for i in range(padding, length):
        for j in range(length):
            mask[i, j] = j < padding or (j > i and j >= sop)
    return mask


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=3))
def test_v1_masks_of_both_forms_give_the_same_step(shapes):
    longest = max(sum(shape) for shape in shapes)
    shapes = [(text, answer, longest - text - answer) for text, answer, _ in shapes]
    ids = torch.tensor([v1_prompt(*shape) for shape in shapes])
    blocked = torch.from_numpy(np.stack([v1_blocked(*shape) for shape in shapes]))[:, None]
    keep = torch.tensor([[0] * padding + [1] * (text + 2 + answer) for text, answer, padding in shapes])
    one, other = prepare(V1, ids, blocked), prepare(V1, ids, keep)
    assert np.array_equal(one.keep, other.keep)
    assert np.array_equal(one.position_ids, other.position_ids)
    assert one.prefix.tolist() == other.prefix.tolist() == [padding + text + 1 for text, _, padding in shapes]


@given(st.integers(1, 6), st.integers(0, 4), st.integers(0, 5), st.data())
def test_any_other_v1_mask_is_refused(text, answer, padding, data):
    """One entry turned over, in a token's row above the last one, which says what is padding."""
    ids, mask = torch.tensor([v1_prompt(text, answer, padding)]), v1_blocked(text, answer, padding)
    i = data.draw(st.integers(padding, len(mask) - 2))
    j = data.draw(st.integers(0, len(mask) - 1))
    mask[i, j] ^= True
    with pytest.raises(ChatGLMError, match="attention_mask row 0: column"):
        prepare(V1, ids, torch.from_numpy(mask)[None, None])


def test_v1_positions_follow_the_prompt():
    step = prepare(V1, torch.tensor([v1_prompt(2, 2, 1)]), torch.tensor([[0, 1, 1, 1, 1, 1, 1]]))
    assert step.position_ids.tolist() == [[[0, 0, 1, 2, 2, 2, 2], [0, 0, 0, 0, 1, 2, 3]]]
    assert step.prefix.tolist() == [4]


def test_v2_positions_count_from_the_first_token():
    ids = torch.tensor([[0, 0, 7, 8], [5, 6, 7, 8]])
    assert prepare(V2, ids).position_ids.tolist() == [[0, 1, 2, 3]] * 2
    step = prepare(V2, ids, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    assert step.position_ids.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert step.prefix is None


def continued(compiled, ids: torch.Tensor, mask: torch.Tensor | None = None):
    """The handle after a first call with these arguments."""
    step = prepare(compiled, ids, mask)
    request = SimpleNamespace(reset=lambda: None, past_length=step.ids.shape[1])
    cache = Session(request, 1).restart(len(ids), step.prefix)
    cache.columns.append(step.ids, step.keep, step.position_ids)
    return cache


def test_a_continuation_remembers_padding_positions_and_prefix():
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    ids = torch.tensor([v1_prompt(2, 0, 1), v1_prompt(3, 0, 0)])
    step = prepare(V1, torch.tensor([[6, 6], [6, 6]]), cache=continued(V1, ids, mask))
    assert step.keep.astype(int).tolist() == [[0, 1, 1, 1, 1, 1, 1], [1] * 7]
    assert step.position_ids.tolist() == [[[2, 2], [2, 3]], [[3, 3], [2, 3]]]
    assert step.prefix.tolist() == [4, 4]


def test_a_continuation_takes_masks_of_its_own():
    cache = continued(V2, torch.tensor([[1, 2, 3]]))
    told = prepare(V2, torch.tensor([[4]]), torch.tensor([[0, 1, 1, 1]]), cache=cache)
    assert told.keep.tolist() == [[False, True, True, True]]
    assert told.position_ids.tolist() == [[3]]
    with pytest.raises(ChatGLMError, match=r"shape is \[1, 1\], expected \[1, 4\]"):
        prepare(V2, torch.tensor([[4]]), torch.tensor([[1]]), cache=cache)


def test_four_dimensions_are_the_first_generations_alone():
    with pytest.raises(ChatGLMError, match="attention_mask: dimensions is 4, expected 2"):
        prepare(V2, torch.tensor([[1, 2]]), torch.zeros(1, 1, 2, 2, dtype=torch.bool))
    with pytest.raises(ChatGLMError, match=r"shape is \[1, 2, 2\], expected \[1, 2\] .* or \[1, 1, 2, 2\]"):
        prepare(V2, torch.tensor([[1, 2]]), torch.zeros(1, 2, 2, dtype=torch.bool))


def test_positions_in_two_rows_are_the_first_generations_alone():
    ids = torch.tensor([v1_prompt(1, 0, 0)])
    with pytest.raises(ChatGLMError, match=r"position_ids: shape is \[1, 3\], expected \[1, 2, 3\]"):
        prepare(V1, ids, position_ids=torch.tensor([[0, 1, 2]]))
    with pytest.raises(ChatGLMError, match=r"position_ids: shape is \[1, 2, 3\], expected \[1, 3\]"):
        prepare(V2, ids, position_ids=torch.tensor([[[0, 1, 2]] * 2]))
    with pytest.raises(ChatGLMError, match=r"position_ids: dtype is torch.float32"):
        prepare(V2, ids, position_ids=torch.zeros(1, 3))


def test_next_positions():
    assert next_positions(np.array([4, 0]), 3).tolist() == [[5, 6, 7], [1, 2, 3]]
    assert next_positions(np.array([[4, 1], [2, 7]]), 2).tolist() == [[[4, 4], [2, 3]], [[2, 2], [8, 9]]]


def test_leading_padding_is_the_run_at_the_left():
    ids = np.array([[0, 0, 5, 0], [5, 0, 5, 5]])
    assert leading_padding(ids, 0, [2]).astype(int).tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert leading_padding(ids[1:], 0, [2]) is None
    assert leading_padding(ids, 0, [2, 0]) is None
    assert leading_padding(ids, None, []) is None
