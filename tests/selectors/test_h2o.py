from __future__ import annotations

import pytest
from tests.selectors.steps import BUDGETS, SHAPES, chosen, context, split, step_at, valid_tokens

from hashattention.cache import TokenCache
from hashattention.config import Budget
from hashattention.selectors.h2o import H2oSelector


def weights(queries, keys, tokens, scale):
    return (queries @ keys[tokens].T * scale).softmax(-1).sum(0)


@pytest.mark.parametrize("evict", [True, False])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_by_the_papers_rule(shape, budget, evict):
    """A dictionary a row: token -> attention received, None once evicted."""
    query_heads, kv_heads, tokens, padding = shape
    data, side, selector = context(*shape), TokenCache(), H2oSelector(evict)
    group = query_heads // kv_heads
    rows = {(request, head): {} for request in range(len(padding)) for head in range(kv_heads)}
    for length in range(tokens - 8, tokens + 1):
        step = step_at(length, *data, padding, budget, side)
        selection = selector.select(step)
        for (request, head), received in rows.items():
            valid = valid_tokens(step, request)
            if not valid:
                continue
            queries = step.query[request, head * group : (head + 1) * group, 0].double()
            keys = step.key[request, head].double()
            if length == tokens - 8:
                received.update(zip(valid, weights(queries, keys, valid, step.scale).tolist(), strict=True))
            for token in valid:
                received.setdefault(token, 0.0)
            covered, candidates, heavy = split(step, request)
            alive = [token for token in candidates if received[token] is not None]
            ranked = sorted(alive, key=lambda token, received=received: (received[token], token), reverse=True)
            held = sorted(covered + ranked[:heavy])
            assert chosen(selection, request, head) == held
            if length > tokens - 8:
                for token, weight in zip(held, weights(queries, keys, held, step.scale).tolist(), strict=True):
                    if received[token] is not None:
                        received[token] += weight
            if evict:
                received.update({token: None for token in valid if token not in held})


def test_an_evicted_token_stays_away_however_well_it_would_fit():
    queries, key, value = context(1, 1, 40, (0,))
    key[..., 20, :] = 0.0
    side, budget = TokenCache(), BUDGETS[1]
    for evict, back in ((True, False), (False, True)):
        selector = H2oSelector(evict)
        queries[:, :, 29] = -10 * key[:, :, 12]
        first = selector.select(step_at(30, queries, key, value, (0,), budget, side))
        assert 12 not in chosen(first, 0, 0)
        received = side.extend((selector, "weights"), 30, lambda first: None)
        if not evict:
            received[0, 0, 12] += 100
        second = selector.select(step_at(31, queries, key, value, (0,), budget, side))
        assert (12 in chosen(second, 0, 0)) is back


def test_one_number_a_token():
    assert H2oSelector().auxiliary_bits(128) == 32


def test_a_larger_budget_does_not_bring_evicted_tokens_back():
    data, side, selector = context(2, 1, 40, (0,)), TokenCache(), H2oSelector()
    first = selector.select(step_at(39, *data, (0,), Budget(heavy=5, sink=1, local=2), side))
    second = selector.select(step_at(40, *data, (0,), Budget(heavy=30, sink=1, local=2), side))
    assert chosen(second, 0, 0) == [*chosen(first, 0, 0), 39]
