from __future__ import annotations

import pytest
import torch

from hashattention.cache import TokenCache
from hashattention.config import Budget
from hashattention.rows import Extent
from hashattention.selectors.base import Step
from hashattention.selectors.oracle import OracleSelector


@pytest.mark.parametrize("share", ["group", "query_head"])
def test_selects_the_largest_attention_weights(share):
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 40, 16)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :6] = 0
    extent = Extent.from_mask(mask)
    one = Step(0, query, key, key, 0.25, extent, Budget(heavy=5, sink=1, local=2), TokenCache())
    chosen = OracleSelector(share).select(one)
    logits = (query[:, :, 0, None] * key.repeat_interleave(2, 1)).sum(-1) * 0.25
    weights = logits.masked_fill(mask[:, None] == 0, -torch.inf).softmax(-1)
    if share == "group":
        weights = (weights / weights.amax(-1, keepdim=True)).unflatten(1, (2, 2)).amax(2)
    for request in range(2):
        first = 6 if request == 0 else 0
        for head in range(chosen.indices.shape[1]):
            best = weights[request, head, first + 1 : 38].topk(5).indices + first + 1
            expected = sorted([first, 38, 39, *best.tolist()])
            assert chosen.indices[request, head].tolist() == expected


def test_padding_only_rows_select_nothing():
    extent = Extent.from_mask(torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]))
    tensor = torch.randn(2, 2, 4, 8)
    one = Step(0, torch.randn(2, 2, 1, 8), tensor, tensor, 1.0, extent, Budget(heavy=1, sink=0, local=1), TokenCache())
    assert OracleSelector().select(one).counts.tolist() == [[0, 0], [2, 2]]
