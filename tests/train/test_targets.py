from __future__ import annotations

import torch
from tests.train.bytes_model import tiny_recipe
from tests.train.test_fit import BASE, CPU, samples

from hashattention.train import targets


def test_a_byte_keeps_a_target_to_three_percent():
    given = torch.cat([torch.tensor([0.0, 1.0, 1e-9]), torch.logspace(-6.8, 0, 200)])
    steps = targets.encode(given, torch.tensor(True))
    assert steps.dtype == torch.uint8 and steps[:3].tolist() == [254, 0, 254]
    assert targets.encode(given, torch.tensor(False)).eq(targets.NONE).all()
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
            expected = live.lesson(index, queries, sample)
            found = held.lesson(index, queries, sample)
            torch.testing.assert_close(found.target, expected.target, rtol=0.035, atol=2e-7)
            torch.testing.assert_close(found.target.sum(-1), torch.ones(2, 2, 3), atol=0.02, rtol=0)
            assert torch.equal(found.heavy, expected.heavy.expand_as(found.heavy))
            assert found.offset is None and torch.equal(found.sample.key, sample.key)
    assert sum(part.numel() for part in held.bytes) == targets.stored_bytes(recipe, BASE, 4, 2)


def test_every_token_is_in_exactly_one_sample():
    for tokens, wanted in ((100, 30), (8192, 2048), (101, 2), (64, 63)):
        chosen = [targets.thin(tokens, wanted, start / 997) for start in range(997)]
        seen = [each.take(torch.arange(tokens)) for each in chosen]
        assert {len(places) for places in seen} == {chosen[0].top + wanted // 2}
        assert len(seen[0]) <= 1.5 * wanted
        assert torch.cat(seen).unique().tolist() == list(range(tokens))
        # What the tokens stand for adds up to all of them.
        weight = chosen[0].offset(len(seen[0]), CPU).exp().sum().item()
        assert abs(weight - tokens) < 1e-3 * tokens
    assert targets.thin(64, 64, 0.0) is None and targets.thin(64, 0, 0.0) is None


def test_a_sample_holds_the_heaviest_tokens_with_their_own_keys():
    recipe = tiny_recipe(step_tokens=64)
    store, queries = samples(recipe), torch.arange(32)
    sample, chosen = store.read(2, 1, 3), targets.thin(recipe.context, 64, 0.7)
    whole = targets.LiveTargets(recipe, BASE).lesson(2, queries, sample)
    order = targets.mass_order(whole.target, 2)
    for teacher in (targets.LiveTargets(recipe, BASE), targets.StoredTargets(store, recipe, BASE, 1, 3, CPU)):
        found = teacher.lesson(2, queries, sample, chosen)
        tokens = chosen.take(order)
        assert found.target.shape == (2, 2, 32, tokens.shape[-1]) and found.offset.shape == tokens.shape[-1:]
        for layer in range(2):
            for head in range(2):
                places = tokens[layer, head]
                heavy = whole.heavy[:, places]
                share = whole.target[layer, head][:, places] * found.offset.exp()
                expected = share / share.sum(-1, keepdim=True).clamp(min=1e-30)
                torch.testing.assert_close(found.target[layer, head], expected, rtol=0.08, atol=1e-5)
                assert torch.equal(found.sample.key[layer, head], sample.key[layer, head][places])
                assert torch.equal(found.heavy.expand_as(found.target)[layer, head], heavy)
        kept = whole.target.sum(2).gather(-1, tokens[..., : chosen.top]).sum() / whole.target.sum()
        assert kept > 2 * chosen.top / recipe.context


def test_all_tokens_of_a_short_sequence_are_seen():
    recipe = tiny_recipe(step_tokens=64)
    store, queries = samples(recipe), torch.tensor([1, 30])
    sample = store.read(0, 0, 3).pick(queries)
    found = targets.StoredTargets(store, recipe, BASE, 0, 3, CPU).lesson(0, queries, sample)
    live = targets.LiveTargets(recipe, BASE).lesson(0, queries, sample)
    # In another order, key and target together.
    weighed = [lesson.target @ lesson.sample.key for lesson in (found, live)]
    torch.testing.assert_close(*weighed, rtol=0, atol=0.03)
