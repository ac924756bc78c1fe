from __future__ import annotations

import pytest
import torch
from tests.train.bytes_model import tiny_recipe
from tests.train.test_fit import BASE, CPU, samples

from hashattention.train import labels, targets


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
            for tokens in (None, torch.tensor([0, 7, 20, 21, 90, 254])):
                expected = live.of(index, queries, sample, tokens)
                found = held.of(index, queries, sample, tokens)
                torch.testing.assert_close(found, expected, rtol=0.07, atol=2e-6)
                if tokens is None:
                    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2, 3), atol=0.02, rtol=0)
    assert sum(part.numel() for part in held.bytes) == targets.stored_bytes(recipe, BASE, 4, 2)


def test_a_draw_takes_one_token_of_every_stretch():
    for tokens, wanted in ((100, 30), (8192, 2048), (101, 2), (64, 63)):
        drawn = [targets.draw_tokens(tokens, wanted, torch.Generator().manual_seed(seed)) for seed in range(300)]
        edges = torch.arange(wanted + 1) * tokens // wanted
        for places in drawn:
            assert ((places >= edges[:-1]) & (places < edges[1:])).all()
        assert torch.cat(drawn).unique().numel() >= min(tokens, 8000)
    generator = torch.Generator()
    assert targets.draw_tokens(64, 64, generator) is None and targets.draw_tokens(64, 0, generator) is None


def test_a_lesson_of_some_tokens_is_that_of_all_normalised():
    recipe = tiny_recipe()
    store, queries, tokens = samples(recipe), torch.tensor([2, 30]), torch.tensor([3, 4, 100, 101, 250])
    sample, live = store.read(2, 1, 3).pick(queries), targets.LiveTargets(recipe, BASE)
    whole = targets.lesson(live, recipe, 2, queries, sample)
    some = targets.lesson(live, recipe, 2, queries, sample, tokens)
    share = whole.target[..., tokens]
    torch.testing.assert_close(some.target, share / share.sum(-1, keepdim=True).clamp(min=1e-30))
    assert torch.equal(some.sample.key, sample.key[:, :, tokens])
    assert torch.equal(some.heavy, whole.heavy[:, tokens]) and some.target[:, :, ~some.heavy].eq(0).all()


def test_labels_of_the_papers_loss_stay_labels():
    recipe = tiny_recipe(loss="bce")
    store, queries = samples(recipe), torch.tensor([2, 30])
    sample = store.read(2, 1, 3).pick(queries)
    found = targets.LiveTargets(recipe, BASE).of(2, queries, sample, torch.arange(0, 256, 3))
    assert found.unique().tolist() == [0, 1]


@pytest.mark.parametrize("changes", [{}, {"pool": "peak_sum"}, {"loss": "bce"}, {"weigh": "output"}], ids=str)
def test_a_thinned_sample_teaches_what_the_whole_one_does(monkeypatch, changes):
    recipe = tiny_recipe(keep_tokens=100, **changes)
    for chunk in (targets.CHUNK_BYTES, 1):
        monkeypatch.setattr(targets, "CHUNK_BYTES", chunk)
        whole = samples(recipe).read(1, 0, 3)
        thinned = targets.thin(whole, recipe, BASE, torch.Generator().manual_seed(3))
        assert thinned.value is None and thinned.key.shape == (3, 2, 100, 16) and thinned.target.dtype == torch.uint8
        assert torch.equal(thinned.key, whole.key[:, :, thinned.tokens])
        logits = [labels.attention_logits(sample) for sample in (whole, thinned)]
        torch.testing.assert_close(logits[1], logits[0][..., thinned.tokens])
        queries, some = torch.tensor([1, 5, 31]), torch.tensor([0, 44, 45, 99])
        held = samples(recipe)
        held.samples = [thinned]
        for tokens in (None, some):
            sample = held.read(0, 1, 3).pick(queries)
            found = targets.lesson(targets.KeptTargets(recipe), recipe, 0, queries, sample, tokens)
            places = thinned.tokens if tokens is None else thinned.tokens[tokens]
            whole_sample = whole.layers(1, 3).pick(queries)
            wanted = targets.lesson(targets.LiveTargets(recipe, BASE), recipe, 0, queries, whole_sample, places)
            assert torch.equal(found.heavy, wanted.heavy) and torch.equal(found.sample.key, wanted.sample.key)
            assert torch.equal(found.sample.key_positions(), places)
            torch.testing.assert_close(found.target, wanted.target, rtol=0.07, atol=2e-6)


def test_planted_facts_are_among_the_tokens_that_stay():
    recipe, facts = tiny_recipe(keep_tokens=100), torch.tensor([3, 4, 5, 200, 255])
    whole = samples(recipe).read(1, 0, 3)
    thinned = targets.thin(whole, recipe, BASE, torch.Generator().manual_seed(3), facts)
    assert len(thinned.tokens.unique()) == 100 and torch.equal(thinned.tokens, thinned.tokens.sort().values)
    assert torch.isin(facts, thinned.tokens).all() and torch.equal(thinned.key, whole.key[:, :, thinned.tokens])


def test_a_short_sequence_is_kept_whole():
    recipe = tiny_recipe(keep_tokens=4096)
    whole = samples(recipe).read(0, 0, 3)
    thinned = targets.thin(whole, recipe, BASE, torch.Generator())
    assert torch.equal(thinned.key, whole.key) and thinned.tokens.tolist() == list(range(256))
