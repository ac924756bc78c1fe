from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from hashattention import ops
from hashattention.config import BaseModel, MapsConfig
from hashattention.errors import ConfigError
from hashattention.maps import HashMaps
from hashattention.models.capture import Sample
from hashattention.train.recipe import Recipe
from hashattention.train.shards import MemoryShards
from hashattention.train.student import Student, key_input, measure_moments, query_input, soft_round, soft_sign
from hashattention.train.targets import LiveTargets, lesson

BASE = BaseModel("LlamaForCausalLM", 2, 6, 2, 16, (0, 1), "theta", frequencies=(1.0, 0.3, 0.1, 0.03, 0.01))
CONFIGS = [
    MapsConfig(32, (8,)),
    MapsConfig(64, (), levels=127),
    MapsConfig(32, (8,), query_widths=(12, 4)),
    MapsConfig(32, (8, 8), "symmetric"),
    MapsConfig(32, (8,), query_input="head"),
    MapsConfig(32, (8,), query_input="head", selection_share="query_head"),
    MapsConfig(32, (8, 8), "symmetric", "head", "query_head", "query_head"),
    MapsConfig(32, (8,), "symmetric", "head", "query_head", "group"),
    MapsConfig(32, (8,), mixture=2),
    MapsConfig(32, (8,), rope="before"),
    MapsConfig(32, (8,), rope="before_keys"),
]


def samples(count=2, tokens=40, queries=5):
    torch.manual_seed(0)
    store = MemoryShards()
    for _ in range(count):
        key, query = torch.randn(2, 2, tokens, 16) * 3 + 5, torch.randn(2, 6, queries, 16) - 2
        positions = torch.arange(tokens - queries, tokens, dtype=torch.int32)
        store.obtain("", functools.partial(Sample, key, query, positions, torch.full((2,), 0.25)))
    return store


def student(config, store):
    moments = measure_moments(store, 0, 2, config, BASE, torch.device("cpu"))
    return Student(Recipe(maps=config), BASE, 0, 2, moments)


@pytest.mark.parametrize("config", CONFIGS)
def test_hard_scores_are_what_the_ops_compute_with_the_exported_maps(config):
    """Normalisation folded in, integer codes, sharing and sums over heads: up to one positive factor a query."""
    store = samples()
    trained = student(config, store)
    sample = store.read(0, 0, 2)
    found = trained.scores(sample, hard=True).detach()
    maps = HashMaps(config, BASE)
    maps.load_state_dict(trained.folded(torch.float32))
    heads = config.selection_heads(BASE)
    for row in range(2):
        layer = maps.layer(row)
        signatures = layer.sign_keys(sample.key[row][None], torch.arange(40)[None], backend="reference")
        codes = layer.code_queries(sample.query[row][None], sample.positions[None], backend="reference")
        for n in range(5):
            expected = ops.score(codes[:, :, n : n + 1], signatures, heads, backend="reference")[0].double()
            mine = found[row, :, n].double()
            aligned = mine / mine.abs().amax(-1, keepdim=True) * expected.abs().amax(-1, keepdim=True)
            torch.testing.assert_close(aligned, expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_reach_every_tensor_soft_and_hard(config):
    store = samples()
    for hard in (False, True):
        trained = student(config, store)
        trained.scores(store.read(1, 0, 2), hard).square().sum().backward()
        assert all(tensor.grad.abs().sum() > 0 for tensor in trained.tensors.values())


def test_moments_are_those_of_all_samples():
    store = samples(3)
    query, key = measure_moments(store, 0, 2, MapsConfig(32, (8,)), BASE, torch.device("cpu"))
    keys = torch.cat([store.read(i, 0, 2).key for i in range(3)], dim=2)
    torch.testing.assert_close(key.mean, keys.mean(2))
    torch.testing.assert_close(key.std, keys.std(2, correction=0))
    queries = torch.cat([query_input(store.read(i, 0, 2).query, 2) for i in range(3)], dim=2)
    assert queries.shape == (2, 2, 15, 48)
    torch.testing.assert_close(query.normalise(queries).mean(2), torch.zeros(2, 2, 48), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rope", ["after", "before", "before_keys"])
def test_a_lesson_of_some_tokens_knows_their_positions(rope):
    config, store, tokens = MapsConfig(32, (8,), rope=rope), samples(), torch.tensor([0, 3, 17, 39])
    trained, recipe = student(config, store), Recipe(maps=config, sink=1, local=2)
    sample, every = store.read(0, 0, 2), torch.arange(5)
    some = lesson(LiveTargets(recipe, BASE), recipe, 0, every, sample, tokens).sample
    query, key = trained.codes(sample, hard=False)
    few = trained.codes(some.to("cpu").layers(0, 2), hard=False)
    torch.testing.assert_close(few[0], query)
    torch.testing.assert_close(few[1], key[:, :, tokens])


def test_maps_before_rope_need_the_models_frequencies():
    config, store = MapsConfig(32, (8,), rope="before"), samples()
    with pytest.raises(ConfigError, match="need 1 to 8 rotary frequencies"):
        measure_moments(store, 0, 2, config, dataclasses.replace(BASE, frequencies=()), torch.device("cpu"))


def test_a_constant_channel_stays_finite():
    store = samples(1)
    store.samples[0].key[:, :, :, 3] = 7.0
    trained = student(MapsConfig(32, (8,)), store)
    assert all(tensor.isfinite().all() for tensor in trained.folded(torch.bfloat16).values())


def test_inputs_are_ordered_as_the_ops_order_them():
    sample = samples(1).read(0, 0, 2)
    for heads in (2, 6):
        assert torch.equal(query_input(sample.query, heads), ops.group_queries(sample.query, heads))
    assert torch.equal(key_input(sample.key, 6)[:, 4], sample.key[:, 1])


def test_first_weights_do_not_depend_on_how_layers_are_grouped():
    store, config = samples(), MapsConfig(32, (8,))
    both = student(config, store)
    alone = Student(Recipe(maps=config), BASE, 1, 2, measure_moments(store, 1, 2, config, BASE, torch.device("cpu")))
    assert all(torch.equal(both.tensors[name][1:], alone.tensors[name]) for name in both.tensors)


def test_hard_codes_keep_a_gradient():
    x = torch.tensor([-0.5, 0.0, 2.0], requires_grad=True)
    hard = soft_sign(x, True)
    assert hard.tolist() == [-1, -1, 1], "bit = logit > 0"
    hard.sum().backward()
    torch.testing.assert_close(x.grad, 1 - torch.tanh(x.detach()).square())
    y = torch.tensor([[0.3, -1.0, 0.0]], requires_grad=True)
    rounded = soft_round(y, 7)
    torch.testing.assert_close(rounded.detach() * 7, torch.tensor([[2.0, -7.0, 0.0]]))
    rounded.sum().backward()
    assert y.grad.tolist() == [[1, 1, 1]]
    assert soft_round(torch.zeros(1, 3), 7).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("hard", [False, True])
def test_bfloat16_products_give_about_the_same_scores(hard):
    store = samples()
    trained = student(MapsConfig(64, (32, 16), query_widths=(24,)), store)
    exact = trained.scores(store.read(0, 0, 2), hard)
    trained.dtype = torch.bfloat16
    found = trained.scores(store.read(0, 0, 2), hard)
    assert found.dtype == torch.float32
    # Hard codes jump where a logit is near a border.
    assert (found - exact).abs().mean() < (0.1 if hard else 0.02) * exact.abs().mean()
    found.sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in trained.tensors.values())
