from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.selectors.steps import CASES, SHAPES, best, chosen, ragged_step, replaced, rows_of, valid_tokens

from hashattention.config import BaseModel, Budget
from hashattention.errors import ConfigError
from hashattention.selectors.lsh import LshSelector, draw_hyperplanes


def model_of(shape, layers=(0, 2)):
    return BaseModel("LlamaForCausalLM", 3, shape[0], shape[1], 16, layers, "{}")


def matches(queries, keys, planes, valid, tokens):
    """Equal sign bits, summed over the queries."""
    out = torch.full((tokens,), -torch.inf, dtype=torch.float64)
    key_bits = keys[valid] @ planes > 0
    out[valid] = sum(((query @ planes > 0) == key_bits).sum(-1).double() for query in queries)
    return out


@pytest.mark.parametrize(("bits", "share"), [(32, "group"), (96, "group"), (32, "query_head")])
@pytest.mark.parametrize(("shape", "budget"), CASES)
def test_most_hyperplanes_on_the_same_side(shape, budget, bits, share):
    step, model = replaced(ragged_step(shape, budget), layer=2), model_of(shape)
    selection = LshSelector(model, bits, seed=7, share=share).select(step)
    planes = draw_hyperplanes(model, bits, 7)[1].double()
    for request, row, head, queries, keys in rows_of(step, share):
        scores = matches(queries, keys, planes[head], valid_tokens(step, request), step.extent.tokens)
        assert chosen(selection, request, row) == best(scores, step, request)


def test_collisions_follow_the_angle():
    """P(same side) = 1 - angle / pi for one random hyperplane (Goemans and Williamson, 1995)."""
    model = BaseModel("LlamaForCausalLM", 64, 8, 8, 16, tuple(range(64)), "{}")
    planes = draw_hyperplanes(model, 256, 0).permute(2, 0, 1, 3).reshape(16, -1).double()
    torch.manual_seed(1)
    for one, other in torch.randn(5, 2, 16, dtype=torch.float64):
        same = ((one @ planes > 0) == (other @ planes > 0)).double().mean()
        angle = torch.arccos(torch.cosine_similarity(one, other, dim=0))
        # Hoeffding: more than this once in 1e9 draws.
        assert abs(same - (1 - angle / torch.pi)) < (torch.tensor(2e9).log() / (2 * planes.shape[1])).sqrt()


def test_hyperplanes_depend_on_seed_layer_and_head_alone():
    model = model_of(SHAPES[0])
    planes = draw_hyperplanes(model, 32, 0)
    assert torch.equal(planes[1], draw_hyperplanes(dataclasses.replace(model, layers=(2,)), 32, 0)[0])
    every = [*planes.flatten(0, 1), *draw_hyperplanes(model, 32, 1).flatten(0, 1)]
    assert all(not torch.equal(one, other) for i, one in enumerate(every) for other in every[:i])


def test_orthogonal_ones_are():
    planes = draw_hyperplanes(model_of(SHAPES[0]), 40, 0, orthogonal=True)
    assert planes.shape == (2, 2, 16, 40)
    for first in (0, 16, 32):
        block = planes[..., first : first + 16]
        torch.testing.assert_close(
            block.transpose(-1, -2) @ block, torch.eye(block.shape[-1]).expand(2, 2, -1, -1), rtol=0, atol=1e-5
        )


def test_auxiliary_bits_by_hand():
    assert LshSelector(model_of(SHAPES[0]), 128).auxiliary_bits(16) == 128


def test_bits_that_do_not_pack_are_refused():
    with pytest.raises(ConfigError, match="bits must be a multiple of 32"):
        LshSelector(model_of(SHAPES[0]), 40)
    with pytest.raises(ConfigError, match="selection_share must be one of"):
        LshSelector(model_of(SHAPES[0]), 32, share="kv_head")


def test_layers_without_hyperplanes_are_not_served():
    assert LshSelector(model_of(SHAPES[0]), 32).layers == (0, 2)
    with pytest.raises(ConfigError, match="layer 1 has no hash map"):
        LshSelector(model_of(SHAPES[0]), 32).select(replaced(ragged_step(SHAPES[0], Budget(heavy=1)), layer=1))
