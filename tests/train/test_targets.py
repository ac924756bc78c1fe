from __future__ import annotations

import torch
from tests.train.bytes_model import tiny_recipe
from tests.train.test_fit import BASE, CPU, samples

from hashattention.train import targets


def test_a_byte_keeps_a_target_to_three_percent():
    given = torch.cat([torch.tensor([0.0, 1.0, 1e-9]), torch.logspace(-6.8, 0, 200)])
    steps = targets.encode(given)
    assert steps.dtype == torch.uint8 and steps[:3].tolist() == [255, 0, 255]
    found = targets.decode(steps)
    assert found[0] == found[2] == 0
    torch.testing.assert_close(found[3:], given[3:], rtol=0.032, atol=0)


def test_stored_targets_are_those_made_in_every_step(monkeypatch):
    recipe = tiny_recipe()
    store = samples(recipe)
    live, queries = targets.LiveTargets(recipe, BASE), torch.tensor([0, 3, 31])
    for chunk in (targets.CHUNK_BYTES, 1):
        monkeypatch.setattr(targets, "CHUNK_BYTES", chunk)
        held = targets.StoredTargets(store, recipe, BASE, 1, 3, CPU)
        for index in (0, 3):
            sample = store.read(index, 1, 3).pick(queries)
            expected = live.of(index, queries, sample)
            found = held.of(index, queries, sample)
            torch.testing.assert_close(found, expected, rtol=0.035, atol=2e-7)
            torch.testing.assert_close(found.sum(-1), torch.ones(2, 2, 3), atol=0.02, rtol=0)
    assert sum(part.numel() for part in held.bytes) == targets.stored_bytes(recipe, BASE, 4, 2)
