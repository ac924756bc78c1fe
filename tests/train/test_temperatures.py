from __future__ import annotations

import pytest
import torch
from tests.train.bytes_model import tiny_model, tiny_recipe, write_texts
from tests.train.test_fit import BASE, CPU, samples

from hashattention import ops
from hashattention.config import MapsConfig
from hashattention.errors import ConfigError
from hashattention.maps import HashMaps
from hashattention.models.describe import describe
from hashattention.selectors.mass import histogram
from hashattention.train import metrics, temperatures
from hashattention.train.fit import fit
from hashattention.train.labels import attention_logits, heavy_candidates
from hashattention.train.run import train

CONFIGS = [
    MapsConfig(32, (16,)),
    MapsConfig(32, (16,), "symmetric", "head", "query_head", "query_head"),
    MapsConfig(32, (16,), query_input="head"),
]


def test_the_temperature_that_made_the_attention_is_found():
    random = torch.Generator().manual_seed(0)
    scores = torch.randint(-40, 41, (3, 7, 200), generator=random)
    candidates = torch.rand(7, 200, generator=random) < 0.8
    candidates[2] = False
    scale = torch.rand(3, 7, generator=random).double() + 0.5
    wanted = torch.tensor([1e-3, 0.05, 2.0], dtype=torch.float64)
    logits = scores * (scale * wanted[:, None])[..., None]
    target = logits.masked_fill(~candidates, -torch.inf).softmax(-1).nan_to_num(0.0)
    counts = histogram(scores, candidates.expand_as(scores), 40)
    found = temperatures._minimise(counts, scale, (target * scores).sum(-1))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_attention_against_the_scores_has_the_least_temperature():
    scores = torch.arange(-20, 21)[None, None]
    counts = histogram(scores, torch.ones(41, dtype=torch.bool), 20)
    one = torch.ones(1, 1, dtype=torch.float64)
    assert temperatures._minimise(counts, one, -5 * one).tolist() == [1e-6]


def entropy(held, maps, table, row, factor):
    """Cross-entropy of one layer's scores at `factor` times its temperatures, from its definition."""
    sample, heads = held.read(0, row, row + 1), maps.config.selection_heads(BASE)
    layer = maps.layer(BASE.layers[row])
    scores = metrics.hash_scores(layer, sample, heads)
    scale = layer.scale_queries(sample.query)[1][0].view(heads, -1, len(sample.positions)).mean(1)
    heavy = heavy_candidates(sample.positions, sample.key_positions(), 4, 16)
    own = (scores * scale[..., None]).double() * table[row][:, None, None] * factor
    own = own.masked_fill(~heavy, -torch.inf).log_softmax(-1).masked_fill(~heavy, 0.0)
    attention = attention_logits(sample)[0].softmax(-1)
    attention = (attention.mean(1) if heads == 2 else attention.flatten(0, 1)) * heavy
    return -(attention / attention.sum(-1, keepdim=True) * own).sum(-1).mean(-1)


@pytest.mark.parametrize("config", CONFIGS, ids=["group code", "paper", "summed"])
def test_no_other_temperature_is_closer_to_the_attention(tmp_path, config):
    recipe = tiny_recipe(steps=60, learning_rate=1e-2, maps=config)
    maps, held = fit(samples(recipe), BASE, recipe, tmp_path, device=CPU), samples(recipe, 1, seed=5)
    table = temperatures.fit(held, BASE, maps, sink=4, local=16, device=CPU)
    assert table.shape == (3, config.selection_heads(BASE)) and (table > 1e-4).all()
    for row in range(3):
        best = entropy(held, maps, table, row, 1.0)
        for factor in (0.9, 1.1):
            assert (entropy(held, maps, table, row, factor) > best).all()


def test_training_stores_temperatures_and_calibration_gives_them_to_maps_without(tmp_path):
    texts, loaded = write_texts(tmp_path / "texts"), tiny_model()
    train(loaded, texts, tmp_path / "maps", tiny_recipe())
    maps = HashMaps.from_pretrained(tmp_path / "maps", describe(loaded.model))
    assert torch.tensor(maps.temperatures).shape == (3, 2)
    train(loaded, texts, tmp_path / "alone", tiny_recipe(held_out=0))
    assert HashMaps.from_pretrained(tmp_path / "alone").temperatures is not None
    before, maps.temperatures = maps.temperatures, None
    maps.save_pretrained(tmp_path / "old")
    old = HashMaps.from_pretrained(tmp_path / "old")
    assert old.temperatures is None
    temperatures.calibrate(loaded, old, texts, context=256, count=2, sink=4, local=16)
    ratio = torch.tensor(old.temperatures) / torch.tensor(before)
    assert 0.5 < ratio.median() < 2 and (ratio != 1).any()
    old.save_pretrained(tmp_path / "old")
    assert HashMaps.from_pretrained(tmp_path / "old").temperatures == old.temperatures


@pytest.mark.parametrize(
    ("given", "message"),
    [([[1.0, 1.0]], "3 layers of 2"), ([[1, 0]] * 3, "above 0"), ([[1, float("nan")]] * 3, "above 0"), (3, "a list")],
)
def test_bad_temperatures_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        HashMaps(MapsConfig(32, (8,)), BASE, None, None, given)


def test_the_scale_is_that_of_the_code():
    maps = HashMaps(CONFIGS[0], BASE)
    query = torch.randn(2, 4, 1, 16)
    layer = maps.layer(1)
    code, scale = layer.scale_queries(query)
    weights = layer.query_weights, layer.query_biases
    wanted = ops.encode_query(ops.group_queries(query, 2), *weights, 7)
    assert torch.equal(code, wanted[0]) and torch.equal(scale, wanted[1])
    assert (HashMaps(CONFIGS[1], BASE).layer(0).scale_queries(query)[1] == 1).all()
