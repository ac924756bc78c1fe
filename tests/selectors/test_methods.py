"""What every method owes: within the budget, never padding, the same however a context came about, inside a model."""

from __future__ import annotations

import pytest
import torch
from tests.selectors.steps import BUDGETS, CASES, SHAPES, chosen, context, ragged_step, step_at, valid_tokens
from tests.tiny import build

import hashattention
from hashattention import BaseModel, Budget, HashMaps, MapsConfig
from hashattention.cache import TokenCache
from hashattention.models.describe import describe
from hashattention.selectors.double_sparsity import DoubleSparsitySelector
from hashattention.selectors.registry import create

SPECS = [
    "oracle",
    "oracle:share=query_head",
    "oracle:pooling=rank",
    "top_p:p=0.7",
    "top_p:p=0.7,union=no",
    "top_p:p=0.7,share=query_head",
    "hash",
    "streaming",
    "h2o",
    "h2o:evict=no",
    "infllm:block=8,representatives=2",
    "infllm:block=5,share=query_head",
    "quest:page=4",
    "quest:page=5,bits=4,share=query_head",
    "quest:page=1",
    "double_sparsity:channels=4",
    "double_sparsity:channels=4,bits=16,share=query_head",
    "lsh:bits=32",
    "lsh:bits=64,share=query_head",
    "hata:bits=32",
]
#: Their state remembers queries, or how long the context was when first seen.
REMEMBERING = ("h2o", "double_sparsity")
STATELESS = [spec for spec in SPECS if not spec.startswith(REMEMBERING)]


def method(spec, query_heads=4, kv_heads=2, dim=16, layers=(0, 1)):
    model = BaseModel("LlamaForCausalLM", 2, query_heads, kv_heads, dim, layers, "{}")
    torch.manual_seed(3)
    return create(spec, model=model, maps=HashMaps(MapsConfig(32, (8,)), model) if spec.startswith("hash") else None)


@pytest.mark.parametrize("spec", [*SPECS, *(f"{spec}+sampled" for spec in SPECS)])
@pytest.mark.parametrize(("shape", "budget"), CASES)
def test_within_the_budget_and_never_padding(spec, shape, budget):
    step = ragged_step(shape, budget)
    selector = method(spec, *shape[:2])
    selection = selector.select(step)
    assert selection.counts.shape[1] == (shape[1] if selector.share == "group" else shape[0])
    for request in range(selection.counts.shape[0]):
        valid = valid_tokens(step, request)
        sink, local, heavy = budget.counts(len(valid))
        for head in range(selection.counts.shape[1]):
            held = chosen(selection, request, head)
            assert held == sorted(set(held))
            assert set(held) <= set(valid)
            assert set(held) >= set(valid[:sink]) | set(valid[len(valid) - local :])
            assert len(held) <= sink + local + heavy
            if not spec.startswith("top_p"):
                assert len(held) == sink + local + heavy


@pytest.mark.parametrize("spec", STATELESS)
@pytest.mark.parametrize("shape", SHAPES)
def test_token_by_token_equals_all_at_once(spec, shape):
    query_heads, kv_heads, tokens, padding = shape
    selector, side, data = method(spec, query_heads, kv_heads), TokenCache(), context(*shape)
    for length in (*range(tokens - 20, tokens - 10), tokens - 4, tokens):
        step = step_at(length, *data, padding, BUDGETS[1], side)
        fresh = step_at(length, *data, padding, BUDGETS[1])
        assert torch.equal(selector.select(step).indices, selector.select(fresh).indices)


@pytest.mark.parametrize("spec", STATELESS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kept", [1, 13, 24, 30])
def test_after_a_crop_and_a_beam_step_nothing_stale_is_left(spec, shape, kept):
    query_heads, kv_heads, tokens, padding = shape
    selector, side = method(spec, query_heads, kv_heads), TokenCache()
    selector.select(step_at(tokens, *context(*shape), padding, BUDGETS[1], side))
    side.crop(kept)
    order = torch.tensor([1, 0, 1])
    side.select(order)
    before, after = context(*shape), context(*shape, seed=1)
    data = [torch.cat([old[:, :, :kept], new[:, :, kept:]], 2)[order] for old, new in zip(before, after, strict=True)]
    padding = tuple(padding[row] for row in order)
    step = step_at(tokens, *data, padding, BUDGETS[1], side)
    assert torch.equal(
        selector.select(step).indices, selector.select(step_at(tokens, *data, padding, BUDGETS[1])).indices
    )


@pytest.mark.parametrize("spec", REMEMBERING)
def test_what_is_remembered_follows_the_beams(spec):
    shape, order = SHAPES[0], torch.tensor([1, 1, 0])
    selector, sides = method(spec), (TokenCache(), TokenCache())
    data, padding = context(*shape), shape[3]
    for length in (40, 41, 42):
        selector.select(step_at(length, *data, padding, BUDGETS[1], sides[0]))
        selector.select(step_at(length, *(tensor[order] for tensor in data), (0, 0, 7), BUDGETS[1], sides[1]))
    sides[0].select(order)
    mine, theirs = (
        selector.select(step_at(45, *(tensor[order] for tensor in data), (0, 0, 7), BUDGETS[1], side)) for side in sides
    )
    assert torch.equal(mine.indices, theirs.indices)


@pytest.mark.parametrize("spec", SPECS)
def test_in_a_model_a_padded_row_decodes_as_it_does_alone(spec):
    model = build("llama")
    torch.manual_seed(2)
    ids = torch.randint(3, 128, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    maps = HashMaps(MapsConfig(32, (16,)), describe(model))
    selector = create(spec, model=describe(model), maps=maps if spec.startswith("hash") else None)
    counts = []
    settings = {"min_context": 1, "sparse_tail": 3, "observer": lambda step, chosen, out: counts.append(chosen.counts)}
    wanted = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    with hashattention.attach(model, selector, Budget(heavy=5, sink=2, local=3), **settings):
        batch = model.generate(ids, attention_mask=mask, **wanted)
        assert len(counts) == 2 * (3 + 5)
        assert all((count <= 10).all() for count in counts)
        alone = model.generate(ids[:1, 7:], **wanted)
    dense = model.generate(ids, attention_mask=mask, **wanted)
    mine, theirs = (torch.stack(run.logits)[:, 0] for run in (batch, alone))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert (torch.stack(dense.logits)[0] - torch.stack(batch.logits)[0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "spec", ["quest:page=4", "infllm:block=8", "h2o", "double_sparsity:channels=4", "oracle+sampled"]
)
def test_beam_search_in_a_model_with_sliding_layers(spec):
    model = build("gemma3")
    served = set()
    settings = {"min_context": 1, "observer": lambda step, *_: served.add(step.layer)}
    torch.manual_seed(2)
    ids = torch.randint(3, 128, (2, 30))
    with hashattention.attach(model, create(spec, model=describe(model)), Budget(heavy=5, sink=2, local=3), **settings):
        out = model.generate(ids, max_new_tokens=5, num_beams=3)
    assert out.shape == (2, 35)
    assert served == set(describe(model).layers)
    assert 0 < len(served) < model.config.num_hidden_layers


def test_calibrated_double_sparsity_forgets_how_the_context_came_about():
    shape = SHAPES[3]
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    selector, side = DoubleSparsitySelector(5, 3, {0: order}), TokenCache()
    for length in (50, 51, 80, 101):
        step = step_at(length, *context(*shape), shape[3], BUDGETS[1], side)
        fresh = step_at(length, *context(*shape), shape[3], BUDGETS[1])
        assert torch.equal(selector.select(step).indices, selector.select(fresh).indices)
