from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hashattention.config import BaseModel, MapsConfig
from hashattention.selectors.mass import count_needed, histogram, largest_score, levels, pool_scale

LARGEST = 9
MODEL = BaseModel("LlamaForCausalLM", 2, 8, 2, 16, (0, 1), "{}")


def weights_of(scores, candidates, temperature):
    """Estimated weights of the candidates of one row, heaviest first, in plain float64."""
    found = sorted((s for s, one in zip(scores, candidates, strict=True) if one), reverse=True)
    return torch.tensor(found, dtype=torch.float64).mul(temperature).softmax(0) if found else torch.zeros(0).double()


rows = st.lists(st.tuples(st.integers(-LARGEST, LARGEST), st.booleans()), max_size=60)


@given(rows, st.floats(1e-3, 30), st.floats(0.01, 0.9999))
def test_the_count_is_the_smallest_that_holds_the_share(row, temperature, p):
    scores, candidates = [s for s, _ in row], [one for _, one in row]
    held = weights_of(scores, candidates, temperature).cumsum(0)
    counts = histogram(torch.tensor(scores, dtype=torch.int32), torch.tensor(candidates, dtype=torch.bool), LARGEST)
    assert counts.sum() == len(held)
    found = int(count_needed(counts, levels(LARGEST, torch.tensor(temperature)), top_p=p))
    assert found <= len(held) and (found > 0 or not len(held))
    if found:
        assert held[found - 1] >= p - 1e-9
        assert found == 1 or held[found - 2] < p + 1e-9


@given(rows, st.floats(1e-3, 30), st.floats(1e-4, 1.0))
def test_the_threshold_counts_the_tokens_at_or_above_it(row, temperature, threshold):
    scores, candidates = [s for s, _ in row], [one for _, one in row]
    weights = weights_of(scores, candidates, temperature)
    counts = histogram(torch.tensor(scores, dtype=torch.int32), torch.tensor(candidates, dtype=torch.bool), LARGEST)
    found = int(count_needed(counts, levels(LARGEST, torch.tensor(temperature)), threshold=threshold))
    assert (weights >= threshold * (1 + 1e-9)).sum() <= found <= (weights >= threshold * (1 - 1e-9)).sum()


@pytest.mark.parametrize(("p", "number", "wanted"), [(0.07, 100, 7), (0.29, 100, 29), (0.95, 20, 19), (0.951, 20, 20)])
@pytest.mark.parametrize("score", [-9, 0, 9])
def test_ties_count_by_their_number(p, number, wanted, score):
    counts = histogram(torch.full((2, number), score), torch.ones(number, dtype=torch.bool), LARGEST)
    found = count_needed(counts, levels(LARGEST, torch.tensor([0.1, 1e5])), top_p=p)
    assert found.tolist() == [wanted, wanted]


def test_weights_that_vanish_are_counted_only_if_needed():
    """At this temperature a step of the score is exp(-1000), which is 0."""
    counts = histogram(torch.tensor([1, 0, 0, -1]), torch.ones(4, dtype=torch.bool), 1)
    logits = levels(1, torch.tensor(1000.0))
    assert int(count_needed(counts, logits, top_p=0.999)) == 1
    assert int(count_needed(counts, logits, top_p=1.0)) == 4
    assert int(count_needed(counts, logits, top_p=1.0, threshold=1e-300)) == 1


def test_what_is_no_candidate_may_hold_anything():
    scores = torch.tensor([[2**31 - 1, 1, -(2**31), 0]], dtype=torch.int32)
    candidates = torch.tensor([[False, True, False, True]])
    assert histogram(scores, candidates, 1).tolist() == [[1, 1, 0]]


def test_both_together_take_the_smaller_number():
    counts = histogram(torch.tensor([3, 2, 1, 0]), torch.ones(4, dtype=torch.bool), 3)
    logits = levels(3, torch.tensor(1.0))
    assert int(count_needed(counts, logits, top_p=0.99, threshold=0.2)) == 2
    assert int(count_needed(counts, logits, top_p=0.5, threshold=0.01)) == 1


@pytest.mark.parametrize(
    ("config", "largest"),
    [
        (MapsConfig(), 448),
        (MapsConfig.paper(), 32),
        (MapsConfig(32, (8,), score="symmetric"), 32),
        (MapsConfig(64, (8,), query_input="head"), 4 * 448),
    ],
)
def test_no_score_is_larger(config, largest):
    assert largest_score(config, MODEL) == largest


def test_the_scale_of_summed_codes_is_their_mean():
    scale = torch.tensor([[[1.0], [3.0], [5.0], [5.0]]])
    assert pool_scale(scale, 2).tolist() == [[[2.0], [5.0]]]
