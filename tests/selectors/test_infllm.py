from __future__ import annotations

import pytest
import torch
from tests.selectors.steps import CASES, best, chosen, pool, ragged_step, rows_of, valid_tokens

from hashattention.errors import ConfigError
from hashattention.selectors.infllm import InfLlmSelector


def block_logits(queries, keys, step, request, block, representatives):
    """Mean logit of each block's representatives: the keys with the smallest norm."""
    valid, first = valid_tokens(step, request), int(step.extent.start[request])
    out = torch.full((len(queries), step.extent.tokens), -torch.inf, dtype=torch.float64)
    for border in range(first, step.extent.tokens, block):
        members = [token for token in range(border, border + block) if token in valid]
        if members:
            ranked = sorted(members, key=lambda token: keys[token].norm().item())[:representatives]
            out[:, members] = (sum(queries @ keys[token] for token in ranked) / len(ranked))[:, None]
    return out * step.scale


@pytest.mark.parametrize(("block", "representatives"), [(8, 2), (5, 1), (6, 6), (128, 4)])
@pytest.mark.parametrize(("shape", "budget"), CASES)
def test_blocks_by_their_representatives(shape, budget, block, representatives):
    step = ragged_step(shape, budget)
    selector = InfLlmSelector(block, representatives)
    selection, estimate = selector.select(step), selector.estimate(step)
    for request, row, head, queries, keys in rows_of(step, "group"):
        naive, valid = block_logits(queries, keys, step, request, block, representatives), valid_tokens(step, request)
        torch.testing.assert_close(estimate[request, head][:, valid].double(), naive[:, valid], rtol=1e-5, atol=1e-5)
        scores = pool(estimate[request, head].double(), step, request, "logits")
        assert chosen(selection, request, row) == best(scores, step, request)


def test_more_representatives_than_tokens_are_all_of_them():
    step = ragged_step((2, 1, 40, (3, 0)), CASES[0][1])
    few, many = InfLlmSelector(4, 4), InfLlmSelector(4, 99)
    assert torch.equal(few.select(step).indices, many.select(step).indices)


@pytest.mark.parametrize(("block", "expected"), [(128, 16.0), (8, 256.0)])
def test_auxiliary_bits_by_hand(block, expected):
    assert InfLlmSelector(block).auxiliary_bits(128) == expected


@pytest.mark.parametrize("name", ["block", "representatives"])
def test_an_empty_block_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} must be a whole number >= 1; given 0"):
        InfLlmSelector(**{name: 0})
