from __future__ import annotations

import pytest
import torch

from hashattention import ops
from hashattention.cache import TokenCache
from hashattention.config import BaseModel, Budget, MapsConfig
from hashattention.maps import HashMaps
from hashattention.rows import Extent
from hashattention.selectors.base import Step
from hashattention.selectors.hash import HashSelector

MODEL = BaseModel("LlamaForCausalLM", 2, 4, 2, 16, (0, 1), "{}")


def step(key, side, extent=None, layer=0):
    batch, _, tokens, dim = key.shape
    query = torch.randn(batch, 4, 1, dim, generator=torch.Generator().manual_seed(tokens))
    extent = extent or Extent.full(batch, tokens, key.device)
    return Step(layer, query, key, key, dim**-0.5, extent, Budget(heavy=5, sink=1, local=2), side)


@pytest.mark.parametrize("config", [MapsConfig(64, (8,)), MapsConfig.paper()])
def test_selection_is_the_ops_composed(config):
    torch.manual_seed(0)
    maps = HashMaps(config, MODEL)
    selector, side, key = HashSelector(maps), TokenCache(), torch.randn(2, 2, 30, 16)
    for tokens in (29, 30):
        one = step(key[:, :, :tokens], side)
        chosen = selector.select(one)
        layer, rows = maps.layer(0), one.rows(selector.share)
        scores = ops.score(layer.code_queries(one.query), layer.sign_keys(one.key), config.selection_heads(MODEL))
        indices, counts = ops.select(scores, rows.start, rows.end, rows.budgets, rows.capacity)
        assert torch.equal(chosen.indices, indices)
        assert torch.equal(chosen.counts, counts)
        assert chosen.counts.eq(8).all()


def test_keys_are_signed_once():
    torch.manual_seed(0)
    selector, side, key = HashSelector(HashMaps(MapsConfig(32, ()), MODEL)), TokenCache(), torch.randn(1, 2, 20, 16)
    selector.select(step(key[:, :, :19], side))
    poisoned = key.clone()
    poisoned[:, :, :19] = float("nan")
    after = selector.select(step(poisoned, side))
    assert torch.equal(after.indices, selector.select(step(key, TokenCache())).indices)


def test_two_maps_on_one_cache_do_not_share_signatures():
    torch.manual_seed(0)
    first, second = (HashSelector(HashMaps(MapsConfig(32, ()), MODEL)) for _ in range(2))
    side, key = TokenCache(), torch.randn(1, 2, 60, 16)
    first.select(step(key, side))
    assert torch.equal(second.select(step(key, side)).indices, second.select(step(key, TokenCache())).indices)


def test_auxiliary_bits_are_those_kept():
    assert HashSelector(HashMaps(MapsConfig(), MODEL)).auxiliary_bits(16) == 64
    assert (
        HashSelector(HashMaps(MapsConfig.paper(), MODEL)).auxiliary_bits(16) == 64
    )  # 32 bits, two query heads a KV head
