from __future__ import annotations

import pytest
import torch

from hashattention.models.capture import Sample
from hashattention.train import labels
from hashattention.train.recipe import Recipe

POSITIONS = torch.tensor([0, 5, 11, 19])
SINK, LOCAL, TOKENS = 2, 3, 20


def teacher(group=3, pool="mean", shared=True, weigh="none"):
    torch.manual_seed(0)
    query, key = torch.randn(2, 2 * group, 4, 8) * 2, torch.randn(2, 2, TOKENS, 8)
    recipe = Recipe(pool=pool, weigh=weigh, sink=SINK, local=LOCAL)
    sample = Sample(key, query, POSITIONS, torch.tensor([0.5, 0.25]), torch.randn(2, 2, TOKENS, 8) * 3)
    return query, key, labels.teach(sample, recipe, shared=shared)


def dense(query, key, layer, head, n, scale):
    position = int(POSITIONS[n])
    logits = key[layer, head // (query.shape[1] // 2), : position + 1] @ query[layer, head, n] * scale
    return logits.softmax(-1)


def test_candidates_are_neither_future_nor_sink_nor_local():
    heavy = labels.heavy_candidates(POSITIONS, torch.arange(TOKENS), SINK, LOCAL)
    for row, position in enumerate(POSITIONS.tolist()):
        expected = [SINK <= t <= position - LOCAL for t in range(TOKENS)]
        assert heavy[row].tolist() == expected


@pytest.mark.parametrize("pool", ["mean", "peak_sum", "peak_max"])
def test_pooling_is_what_it_says(pool):
    query, key, taught = teacher(pool=pool)
    weights = torch.stack([dense(query, key, 1, head, 3, 0.25) for head in (3, 4, 5)])
    relative = weights / weights.amax(-1, keepdim=True)
    expected = {"mean": weights.mean(0), "peak_sum": relative.sum(0), "peak_max": relative.amax(0)}[pool]
    pooled = taught.logits[1, 1, 3].exp()
    torch.testing.assert_close(pooled / pooled.sum(), expected / expected.sum(), atol=1e-6, rtol=1e-4)


def test_rows_are_distributions_over_candidates():
    _, _, taught = teacher(pool="peak_max")
    target = labels.soft_targets(taught, top=4, top_mix=0.5)
    assert (target[..., ~taught.heavy] == 0).all()
    assert (target[:, :, 0] == 0).all(), "position 0 has no candidate"
    assert torch.allclose(target[:, :, 1:].sum(-1), torch.ones(2, 2, 3))


def test_top_labels_are_the_heaviest_candidates():
    _, _, taught = teacher()
    found = labels.top_labels(taught, 4)
    assert found.sum(-1)[0, 0].tolist() == [0, 1, 4, 4]
    for row in (2, 3):
        inside = taught.logits[0, 0, row].masked_fill(~taught.heavy[row], -torch.inf)
        assert set(found[0, 0, row].nonzero()[:, 0].tolist()) == set(inside.topk(4).indices.tolist())


def test_unshared_rows_are_each_query_head():
    query, key, taught = teacher(shared=False)
    assert taught.logits.shape == (2, 6, 4, TOKENS)
    expected = dense(query, key, 0, 4, 2, 0.5)
    torch.testing.assert_close(taught.logits[0, 4, 2].softmax(-1)[:12], expected, atol=1e-6, rtol=1e-4)


def test_a_head_is_not_outvoted():
    """By the mean, a sharp head's second token beats a flat head's best one; by its peak, the flat one is heard."""
    logits = torch.zeros(1, 1, 2, 1, 100)
    logits[0, 0, 0, 0, 3], logits[0, 0, 0, 0, 5], logits[0, 0, 1, 0, 7] = 20.0, 18.0, 1.0
    first = {pool: labels.pool_logits(logits, pool)[0, 0, 0].topk(2).indices.tolist() for pool in ("mean", "peak_max")}
    assert first["mean"] == [3, 5]
    assert set(first["peak_max"]) == {3, 7}


def test_ranks_are_pooled_by_the_best():
    _, _, taught = teacher(pool="rank")
    query, key, _ = teacher()
    weights = torch.stack([dense(query, key, 1, head, 3, 0.25) for head in (3, 4, 5)])
    best = weights.argsort(-1, descending=True).argsort(-1).amin(0)
    torch.testing.assert_close(taught.logits[1, 1, 3].exp(), 1 / (1 + best))
    assert (taught.logits[1, 1, 1, 6:] == -torch.inf).all() and taught.logits[1, 1, 1, :6].isfinite().all()


@pytest.mark.parametrize("weigh", ["value", "output"])
def test_tokens_weigh_what_their_values_are_worth(weigh):
    query, key, taught = teacher(pool="mean", weigh=weigh)
    torch.manual_seed(0)
    torch.randn(2, 6, 4, 8), torch.randn(2, 2, TOKENS, 8)
    value = (torch.randn(2, 2, TOKENS, 8) * 3)[1, 1]
    expected = 0
    for head in (3, 4, 5):
        weights = dense(query, key, 1, head, 3, 0.25)
        out = weights @ value
        worth = value.norm(dim=-1) if weigh == "value" else (value - out).norm(dim=-1) / out.norm()
        expected = expected + weights * worth
    torch.testing.assert_close(taught.logits[1, 1, 3].exp(), expected, atol=1e-5, rtol=1e-3)


def test_leaving_one_token_out_costs_its_weight_to_first_order():
    """What "output" promises: the relative output error of dropping a token of small weight."""
    query, key, taught = teacher(group=1, pool="mean", weigh="output")
    torch.manual_seed(0)
    torch.randn(2, 2, 4, 8), torch.randn(2, 2, TOKENS, 8)
    value = (torch.randn(2, 2, TOKENS, 8) * 3)[0, 1]
    weights = dense(query, key, 0, 1, 3, 0.5)
    out = weights @ value
    for token in weights.argsort()[10:17].tolist():
        kept = weights.clone()
        kept[token] = 0
        error = (kept @ value / kept.sum() - out).norm() / out.norm()
        expected = taught.logits[0, 1, 3, token].exp().item() / (1 - weights[token].item())
        assert error.item() == pytest.approx(expected, rel=1e-2)


def test_a_temper_flattens_the_target():
    _, _, taught = teacher()
    sharp, flat = (labels.soft_targets(taught, 4, 0.0, temper) for temper in (1.0, 0.5))
    inside = taught.heavy[3]
    expected = sharp[0, 0, 3, inside].sqrt()
    torch.testing.assert_close(flat[0, 0, 3, inside], expected / expected.sum())
