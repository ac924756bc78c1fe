from __future__ import annotations

from typing import get_args

import pytest
import torch
from tests.selectors.steps import CASES, best, chosen, pool, ragged_step, rows_of

from hashattention.errors import ConfigError
from hashattention.rows import Rows
from hashattention.selectors.oracle import OracleSelector
from hashattention.selectors.scored import Pooling, pool_group


@pytest.mark.parametrize("pooling", get_args(Pooling))
@pytest.mark.parametrize(("shape", "budget"), CASES)
def test_every_pooling_by_its_definition(shape, budget, pooling):
    step = ragged_step(shape, budget)
    selection = OracleSelector(pooling=pooling).select(step)
    for request, row, _, queries, keys in rows_of(step, "group"):
        scores = pool(queries @ keys.T * step.scale, step, request, pooling)
        assert chosen(selection, request, row) == best(scores, step, request)


@pytest.mark.parametrize(("shape", "budget"), CASES)
def test_a_query_head_of_its_own_takes_its_largest_logits(shape, budget):
    step = ragged_step(shape, budget)
    selection = OracleSelector("query_head").select(step)
    for request, row, _, queries, keys in rows_of(step, "query_head"):
        assert chosen(selection, request, row) == best((queries @ keys.T)[0], step, request)


def all_heavy(tokens: int) -> Rows:
    """One request whose tokens are all candidates."""
    start, budgets = torch.zeros(1, dtype=torch.int32), torch.tensor([[[0, 0, tokens]]], dtype=torch.int32)
    return Rows(start, start + tokens, budgets, tokens)


def test_a_quiet_head_is_outvoted_by_the_mean_and_not_by_the_peaks():
    # Head 0 is sure of token 0; head 1 spreads its weight over tokens 1 to 4 and likes token 1 best.
    logits = torch.tensor([[[[9.0, 3.0, 8.9, 0.0, 0.0], [0.0, 1.2, 0.0, 1.0, 1.0]]]])
    rows = all_heavy(5)
    first_two = {name: set(pool_group(logits, name, rows)[0, 0].topk(2).indices.tolist()) for name in get_args(Pooling)}
    assert first_two["mean"] == {0, 2}
    assert first_two["peak_max"] == first_two["rank"] == {0, 1}


def test_weights_far_below_a_peak_keep_their_order():
    logits = torch.tensor([[[[0.0, -300.0, -200.0, -400.0]]]])
    for name in get_args(Pooling):
        assert pool_group(logits, name, all_heavy(4))[0, 0].argsort(descending=True).tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize(("name", "value"), [("share", "kv_head"), ("pooling", "max")])
def test_an_unknown_choice_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be one of .*given '{value}'"):
        OracleSelector(**{name: value})
