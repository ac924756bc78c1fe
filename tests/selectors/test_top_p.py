from __future__ import annotations

import pytest
import torch
from tests.selectors.steps import CASES, SHAPES, best, chosen, pool, ragged_step, rows_of, split

from hashattention.config import Budget
from hashattention.errors import ConfigError
from hashattention.selectors.top_p import TopPSelector, reach


def needed(weights, step, request, p):
    """The fewest candidates, largest first, with sink and local, to reach p."""
    covered, candidates, _ = split(step, request)
    mass, taken = weights[covered].sum().item(), []
    for token in sorted(candidates, key=lambda token: (weights[token].item(), token), reverse=True):
        if mass >= p:
            break
        mass, taken = mass + weights[token].item(), [*taken, token]
    return taken


@pytest.mark.parametrize(("share", "union"), [("group", True), ("group", False), ("query_head", True)])
@pytest.mark.parametrize("p", [0.3, 0.8, 0.97, 1.0])
@pytest.mark.parametrize(("shape", "budget"), CASES)
def test_the_smallest_set_that_reaches_p(shape, budget, p, share, union):
    step = ragged_step(shape, budget)
    selection = TopPSelector(p, share, union).select(step)
    for request, row, _, queries, keys in rows_of(step, share):
        logits = queries @ keys.T * step.scale
        first = int(step.extent.start[request])
        logits[:, :first] = -torch.inf
        weights = logits.softmax(-1)
        sets = [needed(head, step, request, p) for head in (weights if union else weights.mean(0, keepdim=True))]
        wanted = set().union(*sets)
        pooled = pool(logits, step, request, "peak_max" if union else "mean")
        pooled[[token for token in range(step.extent.tokens) if token not in wanted]] = -torch.inf
        assert chosen(selection, request, row) == best(pooled, step, request, len(wanted))


def test_rows_differ_in_how_many_they_take():
    step = ragged_step(SHAPES[3], Budget(heavy=60, sink=1, local=1))
    counts = TopPSelector(0.6, "query_head").select(step).counts
    assert len(counts.unique()) > 3
    assert (counts < 62).all()


@pytest.mark.parametrize("p", [0, 1.5, float("nan")])
def test_a_share_outside_its_range_is_refused(p):
    with pytest.raises(ConfigError, match=r"p must be in \(0, 1\]"):
        TopPSelector(p)


def test_every_key_is_read():
    assert TopPSelector().auxiliary_bits(128) == 2048


def test_tokens_without_weight_are_never_needed():
    weights = torch.tensor([[0.1, 0.2, 0.0, 0.6, 0.0]], dtype=torch.float64)
    candidates = torch.tensor([[True, True, True, False, True]])
    assert reach(weights, candidates, 1.0).tolist() == [[True, True, False, False, False]]
    assert reach(weights, candidates, 0.75).tolist() == [[False, True, False, False, False]]
    assert not reach(weights, candidates, 0.6).any()
