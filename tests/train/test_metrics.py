from __future__ import annotations

import functools

import pytest
import torch

from hashattention import ops
from hashattention.cache import TokenCache
from hashattention.config import BaseModel, Budget, MapsConfig
from hashattention.maps import HashMaps
from hashattention.models.capture import Sample
from hashattention.rows import Extent
from hashattention.selectors.base import Step
from hashattention.selectors.hash import HashSelector
from hashattention.selectors.oracle import OracleSelector
from hashattention.train import metrics
from hashattention.train.shards import MemoryShards

BASE = BaseModel("LlamaForCausalLM", 2, 6, 2, 16, (0, 3), "theta")
BUDGETS = [Budget(heavy=share, sink=3, local=5) for share in (0.25, 0.1)]
CONFIGS = [
    MapsConfig(32, (8,)),
    MapsConfig(32, (8,), query_input="head", selection_share="query_head"),
    MapsConfig(32, (8, 8), "symmetric", "head", "query_head", "query_head"),
]


def held_out(tokens=70):
    torch.manual_seed(0)
    store = MemoryShards()
    for _ in range(2):
        key, query, value = torch.randn(2, 2, tokens, 16), torch.randn(2, 6, 4, 16), torch.randn(2, 2, tokens, 16)
        positions = torch.tensor([9, 33, 50, tokens - 1], dtype=torch.int32)
        store.obtain("", functools.partial(Sample, key, query, positions, torch.full((2,), 0.3), value))
    return store


def served_error(selector, store, budget):
    """Mean error per layer, one query at a time through the selector and `ops.attend`."""
    total = torch.zeros(2, dtype=torch.float64)
    for index in range(2):
        sample = store.read(index, 0, 2)
        for row in range(2):
            for n, position in enumerate(sample.positions.tolist()):
                key, value = (t[row, :, : position + 1][None].contiguous() for t in (sample.key, sample.value))
                extent = Extent.full(1, position + 1, key.device)
                query = sample.query[row, :, n : n + 1][None].contiguous()
                step = Step(BASE.layers[row], query, key, value, 0.3, extent, budget, TokenCache())
                chosen = selector.select(step)
                rows = torch.arange(position + 1, dtype=torch.int32).expand(1, 6, -1).contiguous()
                full = rows, torch.full((1, 6), position + 1, dtype=torch.int32)
                dense, _ = ops.attend(query, key, value, *full, scale=0.3, backend="reference")
                out = step.attend(chosen)
                error = (out - dense).norm(dim=-1) / dense.norm(dim=-1)
                total[row] += error.double().mean() / 8
    return total


@pytest.mark.parametrize("config", CONFIGS)
def test_errors_are_those_of_the_served_path(config):
    store = held_out()
    torch.manual_seed(1)
    maps = HashMaps(config, BASE).requires_grad_(False)
    found = metrics.measure(store, BASE, {"hash": maps}, BUDGETS, device=torch.device("cpu"))["hash"]
    for place, budget in enumerate(BUDGETS):
        expected = served_error(HashSelector(maps, backend="reference"), store, budget)
        torch.testing.assert_close(found[place, :, 0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
def test_shares_are_served_as_they_are_measured(config):
    store = held_out()
    torch.manual_seed(1)
    heads = config.selection_heads(BASE)
    shares = tuple(tuple(0.3 + 0.4 * head + row for head in range(heads)) for row in range(2))
    maps = HashMaps(config, BASE, None, shares).requires_grad_(False)
    found = metrics.measure(store, BASE, {"hash": maps}, BUDGETS, device=torch.device("cpu"))["hash"]
    expected = served_error(HashSelector(maps, backend="reference"), store, BUDGETS[0])
    torch.testing.assert_close(found[0, :, 0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_remainder_is_served_as_it_is_measured(config, monkeypatch):
    """Blocks of one token, so that the served mean is of all tokens, as the measured one is."""
    monkeypatch.setattr("hashattention.selectors.remainder.BLOCK", 1)
    store = held_out()
    torch.manual_seed(1)
    remainder = (torch.randn(2, 6, 3) * 0.5 - 0.3).tolist()
    maps = HashMaps(config, BASE, remainder=remainder).requires_grad_(False)
    methods = {"hash": maps, metrics.FILLED: maps}
    found = metrics.measure(store, BASE, methods, BUDGETS, device=torch.device("cpu"))
    for place, budget in enumerate(BUDGETS):
        for name, filled in (("hash", False), (metrics.FILLED, True)):
            expected = served_error(HashSelector(maps, backend="reference", remainder=filled), store, budget)
            torch.testing.assert_close(found[name][place, :, 0], expected, atol=1e-5, rtol=1e-4)
    assert (found["hash"][..., 0] - found[metrics.FILLED][..., 0]).abs().min() > 1e-3
    assert torch.equal(found["hash"][..., 1:], found[metrics.FILLED][..., 1:])


@pytest.mark.parametrize(("name", "share"), [("exact_shared_peak", "group"), ("exact_per_head", "query_head")])
def test_exact_selections_are_the_oracles(name, share):
    store = held_out()
    found = metrics.measure(store, BASE, {name: None}, BUDGETS, device=torch.device("cpu"))[name]
    expected = served_error(OracleSelector(share), store, BUDGETS[1])
    torch.testing.assert_close(found[1, :, 0], expected, atol=1e-5, rtol=1e-4)


def test_the_whole_context_costs_nothing_and_finds_everything():
    budgets = [Budget(heavy=1.0, sink=3, local=5)]
    found = metrics.measure(held_out(), BASE, dict.fromkeys(metrics.EXACT), budgets, device=torch.device("cpu"))
    for table in found.values():
        assert table[0, :, 0].max() < 1e-6
        torch.testing.assert_close(table[0, :, 1:], torch.ones(2, 2, dtype=torch.float64))


def test_nothing_heavy_finds_nothing():
    budgets = [Budget(heavy=0, sink=3, local=5)]
    found = metrics.measure(held_out(), BASE, {"exact_per_head": None}, budgets, device=torch.device("cpu"))
    assert (found["exact_per_head"][0, :, 2] == 0).all() and (found["exact_per_head"][0, :, 0] > 0.1).all()


def test_ties_go_to_the_more_recent_token():
    positions = torch.tensor([19, 12], dtype=torch.int32)
    budget = Budget(heavy=3, sink=2, local=4)
    chosen = metrics.choose(torch.zeros(1, 2, 25), positions, [budget])[0]
    for row, position in enumerate(positions.tolist()):
        one = torch.tensor([[list(budget.counts(position + 1))]], dtype=torch.int32)
        bounds = torch.zeros(1, dtype=torch.int32), torch.tensor([position + 1], dtype=torch.int32)
        indices, counts = ops.select(torch.zeros(1, 1, 25), *bounds, one, 9, backend="reference")
        assert chosen[0, row].nonzero()[:, 0].tolist() == indices[0, 0, : counts[0, 0]].tolist()


def test_a_summary_is_plain_and_complete():
    store = held_out()
    maps = HashMaps(MapsConfig(32, (8,)), BASE).requires_grad_(False)
    methods = {"hash": maps, **dict.fromkeys(metrics.EXACT)}
    told = []
    found = metrics.measure(
        store, BASE, methods, BUDGETS, device=torch.device("cpu"), progress=lambda *w: told.append(w)
    )
    summary = metrics.summarise(found, BUDGETS, BASE)
    assert told[-1] == ("measuring", 4, 4)
    assert summary["layers"] == [0, 3] and [row["heavy"] for row in summary["budgets"]] == [0.25, 0.1]
    row = summary["budgets"][1]
    assert row["exact_shared"]["ratio"] == 1.0
    assert len(row["hash"]["error_by_layer"]) == len(row["hash"]["recall_by_layer"]) == 2
    expected = found["hash"][1, :, 0].mean() / found["exact_shared"][1, :, 0].mean()
    assert row["hash"]["ratio"] == pytest.approx(expected.item(), abs=1e-4)
