from __future__ import annotations

import json

import pytest
import torch
from tests.train.bytes_model import tiny_model, tiny_recipe, write_texts
from tests.train.test_fit import BASE, samples

from hashattention import ops
from hashattention.config import Budget, MapsConfig
from hashattention.maps import HashMaps
from hashattention.models.describe import describe
from hashattention.train import metrics, predictions, remainder
from hashattention.train.metrics import Exact, LeftOut, choose, method_scores
from hashattention.train.remainder import Fit, calibrate
from hashattention.train.run import train

CONFIG = MapsConfig(32, (16,))
NOTHING = torch.tensor([-1e3, 0.0, 0.0]).repeat(4, 1)


def some_maps(config=CONFIG):
    torch.manual_seed(3)
    return HashMaps(config, BASE).requires_grad_(False)


def gathered(store, maps=None, order=None):
    fit = Fit(maps, BASE, sink=4, local=16)
    for index in order or range(len(store)):
        fit.add(store.read(index, 0, 3))
    return fit


def left_out(store, maps, row, heavy=remainder.HEAVY):
    """What each sequence and budget leaves out of a layer."""
    budgets = [Budget(heavy=share, sink=4, local=16) for share in heavy]
    for index in range(len(store)):
        sample = store.read(index, row, row + 1)
        exact = Exact.of(sample, 4, 16)
        name = "exact_shared" if maps is None else "hash"
        scores = method_scores(name, maps, exact, sample, BASE, row)
        for one in choose(scores, sample.positions, budgets):
            yield sample, exact.leave_out(one), exact.attend(one)[0]


def error(store, maps, row, coefficients):
    """The mean error of the output of every query head, ``[Hq]``."""
    rests = [rest for _, rest, _ in left_out(store, maps, row)]
    dense, filled = (torch.stack(each) for each in zip(*((r.dense, r.fill(coefficients)) for r in rests), strict=True))
    return ((filled - dense).norm(dim=-1) / dense.norm(dim=-1)).double().mean((0, 2))


@pytest.mark.parametrize("config", [CONFIG, MapsConfig(32, (16,), query_input="head", selection_share="query_head")])
def test_filling_is_the_op_fed_by_hand(config):
    store, maps = samples(tiny_recipe(queries=5, step_queries=5), 2), some_maps(config)
    coefficients = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for sample, rest, chosen in left_out(store, maps, 1, (1 / 8, 1 / 32, 1.0)):
        filled = rest.fill(coefficients)
        for n, position in enumerate(sample.positions.tolist()):
            q, key, value = sample.query[:, :, n, None], sample.key[:, :, : position + 1], sample.value
            rows = [row[n].nonzero()[:, 0].int() for row in chosen]
            taken = torch.tensor([[len(row) for row in rows]], dtype=torch.int32)
            indices = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)[None]
            value, scale = value[:, :, : position + 1], sample.scale[0].item()
            out, lse = ops.attend(q, key, value, indices, taken, scale=scale)
            number = torch.full((1, 2, 1), position + 1.0)
            sums, length = torch.cat([key.sum(2), value.sum(2), number], -1), number[:, 0, 0].int()
            expected = ops.add_remainder(out, lse, q, sums, taken, length, coefficients, scale=scale)
            torch.testing.assert_close(filled[:, n], expected[0, :, 0], rtol=1e-4, atol=1e-5)


def test_the_statistics_give_the_error():
    store, maps = samples(tiny_recipe(), 1), some_maps()
    coefficients = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for _, rest, _ in left_out(store, maps, 0):
        found = rest.statistics().double()
        less = coefficients[:, None, 0] + (found[..., :2] * coefficients[:, None, 1:]).sum(-1)
        share = (found[..., 2] + less.clamp(max=0)).sigmoid()
        squared = found[..., 3] + 2 * share * found[..., 4] + share * share * found[..., 5]
        expected = (rest.fill(coefficients) - rest.dense).norm(dim=-1) / rest.dense.norm(dim=-1)
        torch.testing.assert_close(squared.sqrt(), expected.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["hash", "exact"])
def test_no_coefficients_nearby_err_less(kind):
    store, maps = samples(tiny_recipe(), 2), None if kind == "exact" else some_maps()
    table = gathered(store, maps).solve()
    assert table.shape == (3, 4, 3) and table.dtype == torch.float64

    def loss(row, coefficients):
        return error(store, maps, row, coefficients) + remainder.HOLD * coefficients.square().sum(-1)

    for row in range(3):
        best = loss(row, table[row])
        assert (best <= error(store, maps, row, NOTHING)).all()
        assert best.sum() < 0.98 * error(store, maps, row, NOTHING).sum()
        for place in range(3):
            for change in (-0.2, 0.2):
                moved = table[row].clone()
                moved[:, place] += change
                # The clamp makes the loss neither smooth nor convex: nothing nearby is better by more than that.
                assert (loss(row, moved) > best - 1e-3).all()


def test_what_shares_select_is_what_is_fitted():
    store, shared = samples(tiny_recipe(), 1), some_maps()
    shared.shares = ((1.0, 1.0), (0.5, 1.5), (1.0, 1.0))
    plain, found = (gathered(store, maps).solve() for maps in (some_maps(), shared))
    assert torch.equal(found[::2], plain[::2]) and (found[1] != plain[1]).any(-1).all()


def planted(noise):
    """Sequences whose dense output is the mean value in a share of known coefficients, and noise beside it."""
    random = torch.Generator().manual_seed(0)
    heads, queries = 3, 400
    constant = torch.randn(heads, 1, 8, generator=random)
    wanted = torch.tensor([[-0.8, 0.5, 0.2], [-0.3, 0.2, 0.5], [-1.5, 0.9, -0.2]], dtype=torch.float64)
    mean_value = constant + 0.1 * torch.randn(heads, queries, 8, generator=random)
    kept = -constant + 0.1 * torch.randn(heads, queries, 8, generator=random)
    length = torch.randint(200, 3000, (queries,), generator=random)
    taken = (length * torch.rand(heads, queries, generator=random).clamp(0.02, 0.3)).long()
    less = torch.randn(heads, queries, generator=random) - 3
    dense = torch.zeros_like(kept)
    rest = LeftOut(kept, dense, mean_value, less, taken, length)
    dense = rest.fill(wanted) + noise * torch.randn(kept.shape, generator=random)
    return wanted, LeftOut(kept, dense, mean_value, less, taken, length)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_planted_share_is_found(noise):
    wanted, rest = planted(noise)
    found = remainder._minimise(rest.statistics().double())

    def missed(coefficients):
        return ((rest.fill(coefficients) - rest.dense).norm(dim=-1) / rest.dense.norm(dim=-1)).mean(-1)

    assert (missed(found) < missed(wanted) + 0.01).all()
    assert (missed(found) < 0.2 * missed(NOTHING[:3])).all()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.2)


def test_the_order_of_the_sequences_changes_little():
    store, maps = samples(tiny_recipe(), 3), some_maps()
    one, other = (gathered(store, maps, order).solve() for order in ([0, 1, 2], [2, 0, 1]))
    torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_training_stores_one_and_calibration_gives_one_to_maps_without(tmp_path):
    texts, loaded, told = write_texts(tmp_path / "texts"), tiny_model(), []
    report = train(loaded, texts, tmp_path / "maps", tiny_recipe(), progress=lambda *what: told.append(what))
    assert ("fitting the remainder", 4, 4) in told and ("fitting the remainder to predictions", 4, 4) in told
    for row in report["metrics"]["budgets"]:
        plain, filled = row["hash"], row[metrics.FILLED]
        assert filled["error"] < plain["error"] and filled["ratio"] < plain["ratio"]
        assert filled["kept_mass"] == plain["kept_mass"] and filled["recall"] == plain["recall"]
        assert len(filled["error_by_layer"]) == 3
    maps = HashMaps.from_pretrained(tmp_path / "maps", describe(loaded.model))
    stored = json.loads((tmp_path / "maps/config.json").read_text())["remainder"]
    assert torch.tensor(maps.remainder).shape == (3, 4, 3) and torch.tensor(stored).equal(torch.tensor(maps.remainder))
    before, maps.remainder = maps.remainder, None
    maps.save_pretrained(tmp_path / "old")
    old = HashMaps.from_pretrained(tmp_path / "old")
    assert old.remainder is None
    told.clear()
    calibrate(
        loaded, old, texts, lengths=(256, 192), count=3, sink=4, local=16, progress=lambda *what: told.append(what)
    )
    assert ("fitting the remainder", 3, 3) in told
    assert torch.tensor(old.remainder).shape == (3, 4, 3) and old.remainder != before
    old.save_pretrained(tmp_path / "old")
    assert HashMaps.from_pretrained(tmp_path / "old").remainder == old.remainder


def test_without_prediction_steps_outputs_alone_are_fitted(tmp_path):
    texts, told = write_texts(tmp_path / "texts"), []
    for name, steps in (("one", 0), ("other", 4)):
        train(
            tiny_model(),
            texts,
            tmp_path / name,
            tiny_recipe(prediction_steps=steps),
            progress=lambda *w: told.append(w),
        )
    assert sum(what == "fitting the remainder to predictions" for what, _, _ in told) == 4
    one, other = (HashMaps.from_pretrained(tmp_path / name) for name in ("one", "other"))
    away = (torch.tensor(one.remainder) - torch.tensor(other.remainder)).abs()
    assert 0 < away.max() < 4 * predictions.RATE
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_training_without_held_out_sequences_or_fixed_tokens_stores_one(tmp_path):
    """With no sink and no local window the least budgets take nothing of a short context."""
    texts = write_texts(tmp_path / "texts")
    train(tiny_model(), texts, tmp_path / "maps", tiny_recipe(held_out=0, sink=0, local=0))
    assert HashMaps.from_pretrained(tmp_path / "maps").remainder is not None


def test_coefficients_are_kept_in_five_digits():
    table = torch.tensor([[[1.2345678, -1e-7, 123456.0]]], dtype=torch.float64)
    assert remainder.as_remainder(table) == (((1.2346, -1e-7, 123460.0),),)
