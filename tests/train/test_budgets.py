from __future__ import annotations

import itertools

import pytest
import torch
from tests.train.bytes_model import tiny_model, tiny_recipe, write_texts
from tests.train.test_fit import BASE, CPU, samples

from hashattention.config import Budget, MapsConfig
from hashattention.errors import ConfigError
from hashattention.maps import HashMaps
from hashattention.train import budgets, metrics
from hashattention.train.fit import fit
from hashattention.train.run import train

MULTIPLES = (0.25, 0.5, 1.0, 2.0)


def convex(curves=6, seed=0):
    """Falling convex curves of different steepness, ``[multiples, curves]``."""
    generator = torch.Generator().manual_seed(seed)
    size, fall = torch.rand(2, curves, generator=generator, dtype=torch.float64)
    return size * torch.tensor(MULTIPLES, dtype=torch.float64)[:, None] ** -fall


def cost(errors, shares):
    """Error at `shares`, on straight lines between the measured points."""
    total = 0.0
    for head, share in enumerate(shares.tolist()):
        for (a, b), (y, z) in zip(
            itertools.pairwise(MULTIPLES), itertools.pairwise(errors[:, head].tolist()), strict=True
        ):
            if a <= share <= b:
                total += y + (z - y) * (share - a) / (b - a)
                break
    return total


@pytest.mark.parametrize("seed", range(4))
def test_no_exchange_between_two_heads_is_better(seed):
    errors = convex(seed=seed)
    shares = budgets.allocate(errors, MULTIPLES)
    assert shares.mean().item() == pytest.approx(1) and shares.min() >= 0.25 and shares.max() <= 2
    best = cost(errors, shares)
    assert best <= cost(errors, torch.ones(6))
    for one, other in itertools.permutations(range(6), 2):
        moved = shares.clone()
        moved[one] += 0.05
        moved[other] -= 0.05
        if moved.min() >= 0.25 and moved.max() <= 2:
            assert cost(errors, moved) >= best - 1e-9


def test_a_bump_is_bridged():
    """A curve that falls late is worth its whole way or nothing: the hull sees through the flat part before it."""
    errors = torch.tensor([[0.9, 0.2], [0.9, 0.19], [0.9, 0.18], [0.1, 0.17]], dtype=torch.float64)
    assert budgets.allocate(errors, MULTIPLES, mean=1.125).tolist() == pytest.approx([2.0, 0.25])


def test_flat_curves_share_alike_and_the_mean_is_kept():
    found = budgets.allocate(torch.full((4, 3, 2), 0.3), MULTIPLES)
    assert found.shape == (3, 2)
    torch.testing.assert_close(found, torch.ones(3, 2, dtype=torch.float64))


def test_error_on_the_calibration_falls_at_the_same_mean(tmp_path):
    recipe = tiny_recipe(steps=60, learning_rate=1e-2)
    maps = fit(samples(recipe), BASE, recipe, tmp_path, device=CPU)
    held, budget = samples(recipe, 3, seed=5), Budget(heavy=0.1, sink=recipe.sink, local=recipe.local)
    for layer in (1, 2):  # a layer that is easy, one that is hard
        for sample in held.samples:
            sample.query[layer] *= (0.0, 3.0)[layer - 1]
    errors = budgets.curves(held, BASE, maps, budget, CPU)["hash"][..., 0]
    table = budgets.allocate(errors)
    assert table.mean().item() == pytest.approx(1) and table.std() > 0.2
    before = metrics.measure_heads(held, BASE, {"hash": maps}, [budget], device=CPU)["hash"][..., 0].mean()
    maps.shares = budgets.as_shares(table, 2)
    after = metrics.measure_heads(held, BASE, {"hash": maps}, [budget], device=CPU)["hash"][..., 0].mean()
    assert after < before


def test_training_finds_shares_and_stores_them(tmp_path):
    recipe = tiny_recipe(held_out=4, fit_budgets=1 / 16)
    texts = write_texts(tmp_path / "texts")
    report = train(tiny_model(), texts, tmp_path / "maps", recipe)
    maps = HashMaps.from_pretrained(tmp_path / "maps")
    table = torch.tensor(maps.shares)
    assert table.shape == (3, 2) and 0.98 < table.mean() <= 1 and maps.training_info["recipe"]["fit_budgets"] == 1 / 16
    plain = train(tiny_model(), texts, tmp_path / "plain", tiny_recipe(held_out=4))
    assert HashMaps.from_pretrained(tmp_path / "plain").shares is None
    assert report["metrics"]["budgets"][0]["hash"] != plain["metrics"]["budgets"][0]["hash"]


@pytest.mark.parametrize(
    ("shares", "message"),
    [([[1.0, 1.0]], "3 layers of 2"), ([[1.0]] * 3, "3 layers of 2"), ([[1, -1]] * 3, "at least 0"), (3, "a list")],
)
def test_bad_shares_are_refused(shares, message):
    with pytest.raises(ConfigError, match=message):
        HashMaps(MapsConfig(32, (8,)), BASE, None, shares)
