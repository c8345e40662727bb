import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from chatglm_ov.generation.nucleus import Nucleus, without_sorting

pytestmark = pytest.mark.transformers_matrix
NO_IDS = torch.zeros(1, 0, dtype=torch.int64)


def normal(rows, size, spread, seed):
    return spread * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def both(scores, **options):
    return [warper(**options)(NO_IDS[: len(scores)], scores) for warper in (TopPLogitsWarper, Nucleus)]


@given(
    rows=st.integers(1, 3),
    size=st.sampled_from([5, 17, 100, 3000]),
    spread=st.floats(0.1, 30),
    top_p=st.floats(0, 1),
    least=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_what_stays_is_what_transformers_leaves(rows, size, spread, top_p, least, seed):
    scores = normal(rows, size, spread, seed)
    given = scores.clone()
    wanted, ours = both(scores, top_p=top_p, min_tokens_to_keep=least)
    # A token at whose place the sum meets top_p to rounding may stay or go.
    rising = scores.double().sort().values.softmax(-1).cumsum(-1)
    doubtful = (rising - (1 - top_p)).abs() < 2**-22
    assert ((wanted != ours).sum(-1) <= doubtful.sum(-1)).all()
    assert torch.equal(scores, given)


@pytest.mark.parametrize("size", [65024, 151552])
def test_whole_vocabularies(size):
    for spread in (0.0, 1.0, 3.0, 8.0):
        scores = normal(2, size, spread, size)
        wanted, ours = both(scores, top_p=0.8)
        counts = [made.isfinite().sum(-1) for made in (wanted, ours)]
        assert (counts[0] - counts[1]).abs().max() <= 1
        if spread >= 3:
            assert torch.equal(wanted, ours)


def test_only_likely_tokens_are_sorted(monkeypatch):
    sizes = []
    argsort = torch.Tensor.argsort
    monkeypatch.setattr(torch.Tensor, "argsort", lambda scores: sizes.append(len(scores)) or argsort(scores))
    monkeypatch.setattr(TopPLogitsWarper, "__call__", None)
    Nucleus(0.8)(NO_IDS, normal(1, 65024, 6.0, 0))
    assert 0 < sizes[0] < 2000


def test_of_equal_scores_as_many_stay():
    scores = normal(3, 1000, 5.0, 1).round()
    for top_p in (0.0, 0.3, 0.8, 0.95):
        wanted, ours = both(scores, top_p=top_p)
        assert torch.equal(wanted.sort().values, ours.sort().values)


def test_masked_tokens_and_another_filter_value():
    scores = normal(2, 100, 2.0, 2)
    scores[:, 3:90] = -torch.inf
    wanted, ours = both(scores, top_p=0.9, filter_value=-1e4, min_tokens_to_keep=2)
    assert torch.equal(wanted, ours)
    assert (ours == -1e4).any()


def test_scores_that_are_no_numbers_are_left_to_transformers():
    wanted, ours = both(torch.full((1, 8), torch.nan), top_p=0.9)
    assert torch.equal(wanted.isnan(), ours.isnan())


def test_processors_keep_their_order_and_settings():
    mine = type("Mine", (TopPLogitsWarper,), {})(0.4)
    given = LogitsProcessorList([TemperatureLogitsWarper(0.5), TopPLogitsWarper(0.7, -1.0, 3), mine])
    first, second, third = without_sorting(given)
    assert (first, third) == (given[0], mine)
    assert (type(second), second.top_p, second.filter_value, second.min_tokens_to_keep) == (Nucleus, 0.7, -1.0, 3)
