from __future__ import annotations

import pytest
import torch

from hashattention.attention import SparseAttention
from hashattention.cache import TokenCache
from hashattention.config import Budget
from hashattention.errors import ConfigError
from hashattention.rows import Extent
from hashattention.selectors.oracle import OracleSelector


def sparse(**changes):
    settings = {"selector": OracleSelector(), "budget": Budget(heavy=4, sink=1, local=1), "min_context": 8}
    return SparseAttention(**{**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "layer", "queries", "tokens", "expected"),
    [
        ({}, 0, 1, 8, 1),
        ({}, 0, 1, 7, 0),
        ({}, 0, 5, 100, 0),
        ({"sparse_tail": 3}, 0, 5, 100, 3),
        ({"sparse_tail": 9}, 0, 5, 100, 5),
        ({"dense_layers": (2,)}, 2, 1, 100, 0),
        ({"budget": Budget(heavy=100)}, 0, 1, 100, 0),
        ({"budget": Budget(density=1.0)}, 0, 1, 100, 0),
        ({"budget": Budget(heavy=97, sink=1, local=1)}, 0, 1, 100, 1),
    ],
)
def test_which_positions_are_sparse(changes, layer, queries, tokens, expected):
    assert sparse(**changes).sparse_positions(layer, queries, tokens) == expected


def test_a_selector_without_a_map_for_the_layer_leaves_it_dense():
    selector = OracleSelector()
    selector.layers = (0, 2)
    assert sparse(selector=selector).sparse_positions(1, 1, 100) == 0
    assert sparse(selector=selector).sparse_positions(2, 1, 100) == 1


def test_one_position_is_attention_over_the_selected_tokens():
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8)
    seen = []
    out = sparse(observer=lambda *row: seen.append(row)).attend(
        0,
        query,
        key,
        value,
        extent=Extent.full(1, 30, key.device),
        side=TokenCache(),
        scale=0.5,
        softcap=0.0,
        dense=lambda: pytest.fail("not needed"),
    )
    (_, chosen, observed) = seen[0]
    assert torch.equal(observed, out)
    for head in range(4):
        rows = chosen.indices[0, head // 2].long()
        weights = (query[0, head] @ key[0, head // 2, rows].T * 0.5).softmax(-1)
        torch.testing.assert_close(out[0, head], weights @ value[0, head // 2, rows])


@pytest.mark.parametrize("name", ["min_context", "sparse_tail"])
def test_negative_lengths_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} must be >= 0"):
        sparse(**{name: -1})
