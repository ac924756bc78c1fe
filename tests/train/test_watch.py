from __future__ import annotations

import dataclasses

import torch
from tests.train.bytes_model import tiny_recipe
from tests.train.test_fit import BASE, CPU, equal, samples

from hashattention.train import watch as module
from hashattention.train.fit import fit
from hashattention.train.student import Student, measure_moments
from hashattention.train.watch import Watch


def student(recipe, store):
    return Student(recipe, BASE, 0, 3, measure_moments(store, 0, 3, recipe.maps, BASE, CPU))


def test_training_ends_with_the_weights_of_the_least_loss(monkeypatch):
    """Losses 3, 2, 2.5, 2.5 at steps 2, 4, 6, 8, patience 2: step 8 is the last, the weights are those of step 4."""
    losses, told = iter([3.0, 2.0, 2.5, 2.5]), []
    monkeypatch.setattr(module.Watch, "loss", lambda self, tensors: next(losses))
    recipe = tiny_recipe(steps=40, patience=2, check_every=2, schedule="constant", straight_through=1.0)
    store = samples(recipe)
    options = {"device": CPU, "held_out": samples(recipe, 1, seed=5)}
    maps = fit(store, BASE, recipe, None, **options, progress=lambda *what: told.append(what[1]))
    assert told == [0, 1, 2, 3, 4, 5, 6, 7, 40]
    short = dataclasses.replace(recipe, steps=4, patience=0)
    assert equal(maps.state_dict(), fit(store, BASE, short, None, **options).state_dict())


def test_an_end_that_came_early_is_kept(tmp_path, monkeypatch):
    recipe = tiny_recipe(steps=40, patience=1, check_every=2)
    store, held_out = samples(recipe), samples(recipe, 1, seed=5)
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(module.Watch, "loss", lambda self, tensors: next(losses))
    first = fit(store, BASE, recipe, tmp_path, device=CPU, held_out=held_out)
    again = fit(store, BASE, recipe, tmp_path, device=CPU, held_out=held_out)
    assert equal(first.state_dict(), again.state_dict())


def test_the_loss_falls_while_training_and_leaves_the_student_alone():
    recipe = tiny_recipe(steps=100, learning_rate=1e-2, patience=1)
    store, held_out = samples(recipe), samples(recipe, 2, seed=5)
    one = student(recipe, store)
    watch = Watch(one, held_out, CPU)
    other = {name: torch.zeros_like(tensor) for name, tensor in one.tensors.items()}
    before, own = watch.loss(other), one.tensors
    assert watch.look(other) and one.tensors is own and equal(watch.best, other)
    assert not watch.look(other), "no less than before is a miss"
    assert watch.loss(one.tensors) != before
    fresh = watch.loss(one.tensors)
    trained = Watch(one, held_out, CPU)
    fit_maps = fit(store, BASE, dataclasses.replace(recipe, check_every=20), None, device=CPU, held_out=held_out)
    assert all(tensor.isfinite().all() for tensor in fit_maps.state_dict().values())
    assert trained.loss(one.tensors) == fresh
