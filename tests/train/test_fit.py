from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from tests.train.bytes_model import tiny_recipe

from hashattention.config import BaseModel, Budget, MapsConfig
from hashattention.maps import HashMaps
from hashattention.models.capture import Sample
from hashattention.train import fit as fit_module
from hashattention.train import metrics
from hashattention.train.fit import draw, fit, layer_bytes
from hashattention.train.recipe import Recipe
from hashattention.train.shards import MemoryShards
from hashattention.train.targets import StoredTargets, stored_bytes

BASE = BaseModel("LlamaForCausalLM", 3, 4, 2, 16, (0, 1, 2), "theta")
CPU = torch.device("cpu")


def samples(recipe, count=4, seed=0):
    """Keys and queries in a few directions: something that signatures can learn."""
    generator = torch.Generator().manual_seed(seed)
    store = MemoryShards()
    topics = torch.randn(12, 16, generator=torch.Generator().manual_seed(9))
    for _ in range(count):
        key = topics[torch.randint(12, (3, 2, recipe.context), generator=generator)]
        key = key + 0.3 * torch.randn(key.shape, generator=generator)
        query = topics[torch.randint(12, (3, 4, recipe.queries), generator=generator)]
        allowed = torch.tensor(list(recipe.positions_from()))
        positions = allowed[torch.randperm(len(allowed), generator=generator)[: recipe.queries]].sort().values.int()
        value = torch.randn(key.shape, generator=generator)
        store.obtain("", functools.partial(Sample, key, query, positions, torch.full((3,), 0.5), value))
    return store


def equal(one, two):
    return all(torch.equal(one[name], two[name]) for name in one) and one.keys() == two.keys()


@pytest.mark.parametrize(
    "recipe", [tiny_recipe(steps=150, learning_rate=1e-2), tiny_recipe(steps=150, pool="peak_sum", learning_rate=1e-2)]
)
def test_training_finds_what_attention_finds(tmp_path, recipe):
    budgets = [Budget(heavy=0.125, sink=recipe.sink, local=recipe.local)]
    maps = {
        "fresh": fit(samples(recipe), BASE, dataclasses.replace(recipe, steps=1), tmp_path / "a", device=CPU),
        "hash": fit(samples(recipe), BASE, recipe, tmp_path / "b", device=CPU),
    }
    found = metrics.measure(samples(recipe, 1, seed=5), BASE, maps, budgets, device=CPU)
    assert found["hash"][0, :, 0].mean() < 0.75 * found["fresh"][0, :, 0].mean()
    assert found["hash"][0, :, 2].mean() > 1.2 * found["fresh"][0, :, 2].mean()


def test_the_papers_loss_learns_too(tmp_path):
    maps_config = MapsConfig(32, (16, 16), "symmetric", "head", "query_head", "query_head")
    recipe = tiny_recipe(maps=maps_config, loss="bce", straight_through=1.0, steps=150, learning_rate=1e-2)
    one = fit(samples(recipe), BASE, dataclasses.replace(recipe, steps=1), tmp_path / "a", device=CPU)
    maps = {"fresh": one, "hash": fit(samples(recipe), BASE, recipe, tmp_path / "b", device=CPU)}
    budgets = [Budget(heavy=0.125, sink=recipe.sink, local=recipe.local)]
    found = metrics.measure(samples(recipe, 1, seed=5), BASE, maps, budgets, device=CPU)
    assert found["hash"][0, :, 0].mean() < 0.9 * found["fresh"][0, :, 0].mean()


class Stop(Exception):
    pass


def stop_at(step):
    def progress(text, done, total):
        if done == step:
            raise Stop

    return progress


KINDS = {
    "distill": {},
    "bce": {"loss": "bce"},
    "some tokens, watched": {"step_tokens": 64, "patience": 9, "check_every": 3, "average": 0.9},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [1, 5, 11, 17, 35])
def test_an_interrupted_fit_ends_in_the_same_bits(tmp_path, kind, stop):
    """Three groups of 12 steps, a checkpoint every 4: stopped before the first one, between two, in the last group."""
    recipe = tiny_recipe(step_sequences=2, **KINDS[kind])
    options = {"device": CPU, "memory_bytes": layer_bytes(recipe, BASE), "held_out": samples(recipe, 1, seed=5)}
    whole = fit(samples(recipe), BASE, recipe, tmp_path / "whole", **options).state_dict()
    with pytest.raises(Stop):
        fit(samples(recipe), BASE, recipe, tmp_path / "cut", **options, progress=stop_at(stop))
    told = []
    again = fit(samples(recipe), BASE, recipe, tmp_path / "cut", **options, progress=lambda *what: told.append(what[1]))
    assert equal(whole, again.state_dict())
    assert told[0] == min(12, (stop - 1) // 4 * 4)
    assert stop < 12 or 1 not in told, "a finished group is not trained again"


def test_a_damaged_checkpoint_costs_time_only(tmp_path):
    recipe = tiny_recipe()
    whole = fit(samples(recipe), BASE, recipe, tmp_path, device=CPU).state_dict()
    (path,) = tmp_path.glob("layers-*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    assert equal(whole, fit(samples(recipe), BASE, recipe, tmp_path, device=CPU).state_dict())


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "float32"])
def test_weights_are_rounded_to_what_is_saved(tmp_path, weights):
    recipe = tiny_recipe(weights=weights, maps=MapsConfig(32, (16, 12), query_widths=(24,)))
    maps = fit(samples(recipe), BASE, recipe, tmp_path, device=CPU)
    maps.save_pretrained(tmp_path / "maps", recipe.stored)
    saved = HashMaps.from_pretrained(tmp_path / "maps").state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in maps.state_dict().items())
    assert not any(tensor.requires_grad for tensor in maps.parameters())


def test_some_tokens_teach_almost_as_well_as_all():
    budgets = [Budget(heavy=0.125, sink=4, local=16)]
    recipe = tiny_recipe(steps=150, learning_rate=1e-2)
    maps = {
        "fresh": fit(samples(recipe), BASE, dataclasses.replace(recipe, steps=1), None, device=CPU),
        "all": fit(samples(recipe), BASE, recipe, None, device=CPU),
        "some": fit(samples(recipe), BASE, dataclasses.replace(recipe, step_tokens=64), None, device=CPU),
    }
    found = metrics.measure(samples(recipe, 1, seed=5), BASE, maps, budgets, device=CPU)
    fresh, whole, some = (found[name][0, :, 0].mean() for name in maps)
    assert some - whole < 0.2 * (fresh - whole)


def test_sequences_of_several_lengths_are_one_course():
    recipe = tiny_recipe(lengths=(256, 128), queries=16, steps=8, step_tokens=64)
    store = samples(recipe)
    for index in (1, 3):
        store.samples[index] = dataclasses.replace(
            store.samples[index], key=store.samples[index].key[:, :, :128],
            positions=store.samples[index].positions.clamp(max=127),
        )  # fmt: skip
    stored = StoredTargets(store, recipe, BASE, 0, 3, CPU)
    assert sum(part.numel() for part in stored.bytes) == stored_bytes(recipe, BASE, 4, 3)
    for targets in (None, stored):
        maps = fit(store, BASE, recipe, None, device=CPU, targets=targets)
        assert all(tensor.isfinite().all() for tensor in maps.state_dict().values())


def test_a_step_with_stored_targets_has_room_for_more_layers(monkeypatch):
    recipe, gpu = tiny_recipe(context=4096, step_tokens=256), torch.device("cuda")
    assert layer_bytes(recipe, BASE, live=False) < layer_bytes(recipe, BASE) / 4
    needed = stored_bytes(recipe, BASE, 4, len(BASE.layers))
    for free, held in ((2 * needed, True), (needed, False)):
        monkeypatch.setattr(fit_module, "free_bytes", lambda device, free=free: free)
        assert fit_module._has_room(samples(tiny_recipe()), recipe, BASE, gpu) is held
    assert not fit_module._has_room(samples(tiny_recipe()), recipe, BASE, CPU)


def test_draws_are_planned_many_steps_at_once(monkeypatch, tmp_path):
    """Planned anew in every step they took most of its time; a resumed course plans from where it stopped."""
    planned = []
    plan = fit_module._plan
    monkeypatch.setattr(fit_module, "PLANNED", 4)
    monkeypatch.setattr(
        fit_module, "_plan", lambda recipe, steps, *rest: planned.append(steps) or plan(recipe, steps, *rest)
    )
    recipe = tiny_recipe(steps=10)
    fit(samples(recipe), BASE, recipe, tmp_path, device=CPU)
    assert planned == [range(4), range(4, 8), range(8, 10)]


def test_every_epoch_sees_every_sequence_once():
    recipe = tiny_recipe(step_sequences=2)
    drawn = [turn for step in range(4) for turn in draw(recipe, step, [256] * 4, 32)]
    assert sorted(turn.sequence for turn in drawn[:4]) == sorted(turn.sequence for turn in drawn[4:]) == [0, 1, 2, 3]
    assert all(len(set(turn.queries.tolist())) == 16 and turn.queries.max() < 32 for turn in drawn)
    assert all(turn.tokens is None for turn in drawn)
    again = draw(recipe, 3, [256] * 4, 32)
    assert [turn.queries.tolist() for turn in drawn[6:]] == [turn.queries.tolist() for turn in again]
    some = tiny_recipe(step_tokens=64, lengths=(256, 128))
    lengths = {turn.sequence: turn.tokens for step in range(4) for turn in draw(some, step, [256, 128, 64, 128], 32)}
    assert lengths[2] is None and [int(lengths[at].max()) // 128 for at in (0, 1, 3)] == [1, 0, 0]


def test_the_papers_step_sees_one_block():
    recipe = Recipe.paper()
    blocks = {int(draw(recipe, step, [32768] * 48, 8192)[0].queries[0]) for step in range(100)}
    assert all(first % 256 == 0 for first in blocks) and len(blocks) > 20
    assert draw(recipe, 0, [32768] * 48, 8192)[0].queries.diff().eq(1).all()
