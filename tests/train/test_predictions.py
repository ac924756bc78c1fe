from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from tests.tiny import build

from hashattention import attach
from hashattention.config import Budget, MapsConfig
from hashattention.errors import ConfigError
from hashattention.maps import HashMaps
from hashattention.models.describe import describe
from hashattention.models.rotary import rotary_frequencies
from hashattention.ops import reference
from hashattention.train import predictions
from hashattention.train.predictions import Excerpt, attending, tune

BUDGET = Budget(heavy=1 / 16, sink=4, local=16)
KINDS = {
    "group": MapsConfig(32, (16,)),
    "two codes": MapsConfig(32, (16,), mixture=2),
    "before rope": MapsConfig(32, (16,), rope="before"),
    "own": MapsConfig(32, (16,), score="symmetric", query_input="head", selection_share="query_head"),
}


def some_model(family="llama"):
    """Of gemma3's six layers one is no sliding window."""
    return build(family, seed=0, **({} if family == "gemma3" else {"num_hidden_layers": 3}))


def some_maps(model, kind="group", layers=None, **changes):
    config, base = KINDS[kind], describe(model)
    if layers is not None:
        base = dataclasses.replace(base, layers=layers)
    if config.rope != "after":
        base = dataclasses.replace(base, frequencies=rotary_frequencies(model))
    torch.manual_seed(1)
    maps = HashMaps(config, base, **changes).requires_grad_(False)
    maps.remainder = some_coefficients(maps).tolist()
    return maps


def some_coefficients(maps, seed=0):
    shape = len(maps.model.layers), maps.model.num_attention_heads, 3
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.tensor([-2.0, 0.3, 0.1]) + 0.05 * noise


def some_tokens(count=700, seed=0):
    return torch.randint(1, 120, (count,), generator=torch.Generator().manual_seed(seed))


def serve(model, maps, excerpt):
    """The tail's predictions by `attach`."""
    cache = copy.deepcopy(excerpt.prefix)
    with torch.no_grad(), attach(model, maps, BUDGET, min_context=0, sparse_tail=predictions.TAIL):
        logits = model(input_ids=excerpt.tail, past_key_values=cache, use_cache=True).logits[0]
    return logits.float().log_softmax(-1)


def predict(model, excerpt):
    return predictions._predict(model, excerpt.prefix, excerpt.tail)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_tail_is_attended_as_it_is_served(family, kind):
    """Every position of the tail selects on its own, and leaves its mark on those after it."""
    model = some_model(family)
    maps = some_maps(model, kind)
    excerpt, table = Excerpt.of(model, some_tokens()), torch.tensor(maps.remainder)
    dense = predict(model, excerpt)
    with torch.no_grad(), attending(model, maps, table, BUDGET):
        found = predict(model, excerpt)
    served = serve(model, maps, excerpt)
    torch.testing.assert_close(found, served, rtol=1e-3, atol=1e-4)
    assert (found - dense).abs().max() > 0.01


def test_a_model_of_16_bits():
    """Logits and weights are those of its keys and values, in float32; what leaves the attention is rounded once."""
    model = some_model().bfloat16()
    maps, excerpt = some_maps(model), Excerpt.of(model, some_tokens())
    table = torch.tensor(maps.remainder).requires_grad_()
    with attending(model, maps, table, BUDGET):
        divergence = excerpt.divergence(model)
        (slope,) = torch.autograd.grad(divergence, [table])
        found = predict(model, excerpt).detach()
    assert slope.isfinite().all() and (slope.abs().amax((1, 2)) > 0).all()
    served = serve(model, maps, excerpt)
    apart = torch.nn.functional.kl_div(found, served, log_target=True, reduction="batchmean")
    assert apart < 0.2 * divergence


def test_shares_and_layers_without_a_map():
    model = some_model()
    maps = some_maps(model, layers=(0, 2), shares=((0.5, 1.5), (1.0, 0.0)))
    excerpt, table = Excerpt.of(model, some_tokens()), torch.tensor(maps.remainder)
    with torch.no_grad(), attending(model, maps, table, BUDGET):
        found = predict(model, excerpt)
    served = serve(model, maps, excerpt)
    torch.testing.assert_close(found, served, rtol=1e-3, atol=1e-4)


def test_a_whole_budget_is_dense_attention():
    model = some_model()
    maps, excerpt = some_maps(model), Excerpt.of(model, some_tokens())
    with torch.no_grad(), attending(model, maps, torch.tensor(maps.remainder), Budget(density=1.0)):
        assert excerpt.divergence(model) < 1e-6


def test_the_gradient_is_the_slope(monkeypatch):
    """Of what is selected as it is: a choice has no slope."""
    chosen, select = {}, predictions.TailAttention._select
    monkeypatch.setattr(
        predictions.TailAttention,
        "_select",
        lambda self, row, *rest: chosen.setdefault(row, select(self, row, *rest)),
    )
    model = some_model()
    maps, excerpt = some_maps(model), Excerpt.of(model, some_tokens())
    table = torch.tensor(maps.remainder).requires_grad_()
    with attending(model, maps, table, BUDGET) as attention:
        (slope,) = torch.autograd.grad(excerpt.divergence(model), [table])
        assert (slope.abs().amax((1, 2)) > 0).all(), "every layer counts"
        for place in [(0, 0, 0), (1, 2, 1), (2, 3, 2)]:
            around = []
            for step in (-1e-2, 1e-2):
                attention.coefficients = table.detach().clone()
                attention.coefficients[place] += step
                with torch.no_grad():
                    around.append(excerpt.divergence(model))
            torch.testing.assert_close(slope[place], (around[1] - around[0]) / 2e-2, rtol=0.02, atol=1e-5)


def divergences(model, maps, table, excerpts, budgets):
    with torch.no_grad(), attending(model, maps, table.float(), budgets[0]) as attention:
        found = 0.0
        for attention.budget in budgets:
            found += sum(excerpt.divergence(model).item() for excerpt in excerpts)
    return found


def test_tuning_brings_predictions_closer():
    """On the sequences it has seen and on others; twice the same; the model stays as it was."""
    model, told = some_model(), []
    maps, budgets = some_maps(model), [BUDGET, Budget(heavy=1 / 32, sink=4, local=16)]
    tokens, own = [some_tokens(500, seed) for seed in range(3)], model.config._attn_implementation
    start = torch.tensor(maps.remainder)
    found = tune(model, maps, tokens, start, budgets, steps=24, progress=lambda *what: told.append(what))
    assert found.shape == start.shape and found.dtype == torch.float64
    assert told[-1] == ("fitting the remainder to predictions", 24, 24) and len(told) == 24
    seen, unseen = ([Excerpt.of(model, each) for each in some] for some in (tokens, [some_tokens(500, 9)]))
    for excerpts in (seen, unseen):
        assert divergences(model, maps, found, excerpts, budgets) < divergences(model, maps, start, excerpts, budgets)
    assert torch.equal(found, tune(model, maps, tokens, start, budgets, steps=24))
    assert model.config._attn_implementation == own
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    # Adam's steps are no longer than its rate, which falls.
    assert (found - start).abs().max() < 24 * predictions.RATE


def test_where_nothing_is_left_out_nothing_moves():
    model = some_model()
    maps = some_maps(model)
    start = torch.tensor(maps.remainder)
    found = tune(model, maps, [some_tokens(200)], start, [Budget(density=1.0)], steps=3)
    torch.testing.assert_close(found.float(), start, rtol=0, atol=1e-3)


def test_an_attached_model_teaches_nothing():
    model = some_model()
    maps = some_maps(model)
    with attach(model, maps, 0.1), pytest.raises(ConfigError, match="is attached"):
        tune(model, maps, [some_tokens(200)], torch.tensor(maps.remainder), [BUDGET], steps=1)


def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    model = some_model()
    maps, own = some_maps(model), model.config._attn_implementation
    excerpt = Excerpt.of(model, some_tokens(200))
    monkeypatch.setattr(predictions, "_attend", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError), attending(model, maps, torch.tensor(maps.remainder), BUDGET):
        excerpt.divergence(model)
    assert model.config._attn_implementation == own
    model(input_ids=excerpt.tail)


def test_tokens_that_a_model_rules_out_do_not_count(monkeypatch):
    model = some_model()

    def ruled_out(module, arguments, output):
        output.logits[..., 5] = -torch.inf

    maps = some_maps(model)
    with model.register_forward_hook(ruled_out):
        excerpt = Excerpt.of(model, some_tokens(300))
        with torch.no_grad(), attending(model, maps, torch.tensor(maps.remainder), BUDGET):
            assert excerpt.divergence(model).isfinite()


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_attending_is_the_ops_fed_by_hand(softcap):
    """In float32, some slots unused, heads sharing a selection."""
    random = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, count, 8, generator=random) for heads, count in ((4, 5), (2, 40), (2, 40))
    )
    indices = torch.rand(5, 2, 40, generator=random).argsort(-1)[..., :12].sort(-1).values.int()
    taken = torch.randint(1, 13, (5, 2), generator=random, dtype=torch.int32)
    sums, lengths = torch.randn(5, 2, 17, generator=random).abs(), torch.arange(36, 41, dtype=torch.int32)
    coefficients = torch.randn(4, 3, generator=random)
    chosen = predictions._chosen(indices, taken, 40)
    assert torch.equal(chosen.sum(-1), taken.T)
    found = predictions._attend(query, key, value, chosen, taken, sums, lengths, coefficients, 0.3, softcap)
    for n in range(5):
        q, rows = query[:, :, n, None], slice(n, n + 1)
        out, lse = reference.attend(q, key, value, indices[rows], taken[rows], 0.3, softcap)
        known = sums[rows], taken[rows], lengths[rows], coefficients
        expected = reference.add_remainder(out, lse, q, *known, 0.3, softcap)
        torch.testing.assert_close(found[:, :, n], expected[:, :, 0], rtol=1e-4, atol=1e-5)


def test_as_many_sequences_are_read_as_fit():
    """In their order, whatever turns their lengths take; one always."""
    sizes = [8, 16, 32, 32] * 4
    assert predictions._fitting(sizes, math.inf) == list(range(16))
    kept = predictions._fitting(sizes, 180)
    assert kept == sorted(set(kept)) and sum(sizes[number] for number in kept) <= 180
    assert {sizes[number] for number in kept} == {8, 16, 32}
    assert all(sum(sizes[number] for number in {*kept, other}) > 180 for other in set(range(16)) - set(kept))
    assert len(predictions._fitting(sizes, 0)) == 1 and predictions._fitting([], 0) == []


@pytest.mark.gpu
def test_on_a_gpu_sequences_that_do_not_fit_are_left_out(monkeypatch):
    model = some_model().to("cuda", torch.bfloat16)
    tokens = [some_tokens(500, seed) for seed in range(6)]
    read, of = [], Excerpt.of
    monkeypatch.setattr(Excerpt, "of", lambda model, each, chunk: read.append(each) or of(model, each, chunk))
    free = 3.5 * predictions._bytes(model, 500) / predictions.SHARE
    monkeypatch.setattr(predictions, "free_bytes", lambda device: free)
    maps = some_maps(model)
    start = torch.tensor(maps.remainder)
    found = tune(model, maps.cuda(), tokens, start, [BUDGET], steps=4)
    assert len(read) == 3
    assert found.isfinite().all() and (found - start).abs().max() > 0
