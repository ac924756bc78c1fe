from __future__ import annotations

import pytest
from tests.selectors.steps import CASES, chosen, ragged_step, valid_tokens

from hashattention.selectors.streaming import StreamingSelector


@pytest.mark.parametrize(("shape", "budget"), CASES)
def test_the_first_and_the_last_tokens(shape, budget):
    step = ragged_step(shape, budget)
    selection = StreamingSelector().select(step)
    for request in range(len(shape[3])):
        valid = valid_tokens(step, request)
        sink, local, heavy = budget.counts(len(valid))
        for head in range(shape[1]):
            assert chosen(selection, request, head) == valid[:sink] + valid[len(valid) - local - heavy :]


def test_nothing_is_kept():
    assert StreamingSelector().auxiliary_bits(128) == 0
