from __future__ import annotations

import pytest
import torch
from tests.selectors.steps import CASES, SHAPES, best, chosen, ragged_step, rows_of, valid_tokens
from tests.selectors.test_lsh import matches, model_of

from hashattention.errors import InputError
from hashattention.selectors.hata import HataSelector
from hashattention.selectors.lsh import draw_hyperplanes


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(("shape", "budget"), CASES)
def test_most_matching_bits_over_the_group(shape, budget, given):
    step, model = ragged_step(shape, budget), model_of(shape)
    torch.manual_seed(4)
    weights = torch.randn(2, shape[1], 16, 64) if given else None
    selection = HataSelector(model, 64, weights, seed=9).select(step)
    hashes = (weights if given else draw_hyperplanes(model, 64, 9, orthogonal=True))[0].double()
    for request, row, head, queries, keys in rows_of(step, "group"):
        scores = matches(queries, keys, hashes[head], valid_tokens(step, request), step.extent.tokens)
        assert chosen(selection, request, row) == best(scores, step, request)


def test_weights_of_another_shape_are_refused():
    with pytest.raises(InputError, match=r"weights is \[2, 2, 16, 32\]; expected \[2, 2, 16, 128\]"):
        HataSelector(model_of(SHAPES[0]), weights=torch.zeros(2, 2, 16, 32))


def test_auxiliary_bits_by_hand():
    assert HataSelector(model_of(SHAPES[0])).auxiliary_bits(16) == 128
