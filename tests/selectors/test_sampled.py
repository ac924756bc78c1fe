from __future__ import annotations

import math

import pytest
import torch
from tests.selectors.steps import BUDGETS, SHAPES, chosen, ragged_step, replaced, rows_of, valid_tokens

from hashattention import ops
from hashattention.config import Budget
from hashattention.errors import ConfigError
from hashattention.selectors.oracle import OracleSelector
from hashattention.selectors.quest import QuestSelector
from hashattention.selectors.sampled import SampledTail


def exact(step, share="query_head"):
    """Dense attention in float64, [B, Hq, D]."""
    rows = []
    for request, _, head, queries, keys in rows_of(step, share):
        valid = valid_tokens(step, request)
        weights = (queries @ keys[valid].T * step.scale).softmax(-1)
        rows.append(weights @ step.value[request, head, valid].double())
    return torch.cat(rows).unflatten(0, step.query.shape[:2])


@pytest.mark.parametrize("share", ["group", "query_head"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sample_of_everything_left_is_dense_attention(shape, share):
    step = ragged_step(shape, Budget(heavy=1000, sink=3, local=2))
    selection = SampledTail(QuestSelector(4, share=share), 0.6).select(step)
    assert selection.tail.sampled.counts.sum() > 0
    out = selection.attend(step.query, step.key, step.value, scale=step.scale, softcap=0.0)
    torch.testing.assert_close(out[:, :, 0].double(), exact(step), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.99])
def test_two_disjoint_parts_of_the_right_sizes(shape, budget, fraction):
    step = ragged_step(shape, budget)
    selection = SampledTail(OracleSelector(), fraction).select(step)
    for request, row, *_ in rows_of(step, "group"):
        kept, sampled = (chosen(part, request, row) for part in (selection.tail.kept, selection.tail.sampled))
        sink, local, heavy = budget.counts(len(valid_tokens(step, request)))
        spared = heavy - math.floor(heavy * (1 - fraction))
        assert len(sampled) == spared
        assert len(kept) == sink + local + heavy - spared
        assert sorted({*kept, *sampled}) == chosen(selection, request, row)
        left = len(valid_tokens(step, request)) - len(kept)
        if sampled:
            assert selection.tail.log_weight[request, row].item() == pytest.approx(math.log(left / len(sampled)))


@pytest.mark.parametrize("share", ["group", "query_head"])
def test_attention_is_the_weighted_softmax(share):
    step = ragged_step(SHAPES[3], Budget(heavy=20, sink=2, local=3))
    selection = SampledTail(OracleSelector(share), 0.5).select(step)
    out = selection.attend(step.query, step.key, step.value, scale=step.scale, softcap=0.0)
    group = step.query.shape[1] // step.key.shape[1]
    for request, row, head, queries, keys in rows_of(step, share):
        kept, sampled = (chosen(part, request, row) for part in (selection.tail.kept, selection.tail.sampled))
        logits = queries @ keys[kept + sampled].T * step.scale
        logits[:, len(kept) :] += selection.tail.log_weight[request, row].double()
        naive = logits.softmax(-1) @ step.value[request, head, kept + sampled].double()
        heads = slice(row * group, row * group + group) if share == "group" else slice(row, row + 1)
        torch.testing.assert_close(out[request, heads, 0].double(), naive, rtol=1e-5, atol=1e-5)


def test_numerator_and_denominator_are_unbiased():
    """Over N seeds the mean of each sum lies within Hoeffding's bound of the sum over all tokens left out.

    A sample of n without replacement from m values in [a, b] has a mean that concentrates at least as fast as one with
    replacement (Hoeffding, 1963, section 6), so N seeds behave as N * n draws: the mean is off by more than
    ``(b - a) * sqrt(log(2 / d) / (2 * N * n))`` with probability below d; here d = 1e-9 for each of the sums.
    """
    seeds, step = 1000, ragged_step((1, 1, 200, (8,)), Budget(heavy=40, sink=2, local=2))
    logits = (step.query[0, 0, 0].double() @ step.key[0, 0].double().T * step.scale)[None]
    each = torch.cat([logits.exp().T, logits.exp().T * step.value[0, 0].double()], -1)
    sums = []
    for seed in range(seeds):
        selection = SampledTail(OracleSelector(), 0.5, seed).select(step)
        sampled, weight = chosen(selection.tail.sampled, 0, 0), selection.tail.log_weight[0, 0].double().exp()
        sums.append(each[sampled].sum(0) * weight)
    kept = chosen(selection.tail.kept, 0, 0)
    terms = each[[token for token in valid_tokens(step, 0) if token not in kept]]
    number, drawn = len(terms), len(sampled)
    assert (number, drawn) == (168, 20)
    spread = terms.amax(0) - terms.amin(0)
    bound = number * spread * math.sqrt(math.log(2e9) / (2 * seeds * drawn))
    error = (torch.stack(sums).mean(0) - terms.sum(0)).abs()
    assert (error < bound).all()
    # The bound would catch a sample that counts once, and one that leaves a tenth out.
    assert bound[0] < 0.1 * terms[:, 0].sum()


def test_every_token_left_is_drawn_equally_often():
    step, times, seeds = ragged_step((1, 1, 60, (0,)), Budget(heavy=20, sink=2, local=2)), torch.zeros(60), 600
    for seed in range(seeds):
        selection = SampledTail(OracleSelector(), 0.5, seed).select(step)
        times[chosen(selection.tail.sampled, 0, 0)] += 1
    left = [token for token in range(60) if token not in chosen(selection.tail.kept, 0, 0)]
    # Hoeffding, all of the tokens at once, wrong once in 1e9.
    bound = math.sqrt(math.log(2 * len(left) * 1e9) / (2 * seeds))
    assert ((times[left] / seeds - 10 / len(left)).abs() < bound).all()
    assert times.sum() == times[left].sum() == 10 * seeds


def test_the_same_seed_and_step_draw_the_same():
    step = ragged_step(SHAPES[3], Budget(heavy=30, sink=2, local=2))
    one = SampledTail(OracleSelector(), seed=3)
    assert torch.equal(one.select(step).indices, SampledTail(OracleSelector(), seed=3).select(step).indices)
    others = [SampledTail(OracleSelector(), seed=4).select(step), one.select(replaced(step, layer=1))]
    assert all(not torch.equal(one.select(step).indices, other.indices) for other in others)


def test_a_request_of_padding_alone_gives_zero():
    step = ragged_step((2, 1, 30, (30, 4)), Budget(heavy=6, sink=1, local=1))
    selection = SampledTail(OracleSelector()).select(step)
    out = selection.attend(step.query, step.key, step.value, scale=step.scale, softcap=0.0)
    assert out[0].eq(0).all()
    assert out[1].isfinite().all()


def test_without_a_tail_a_selection_is_attended_as_before():
    step = ragged_step(SHAPES[0], Budget(heavy=6, sink=1, local=1))
    selection = OracleSelector().select(step)
    out = selection.attend(step.query, step.key, step.value, scale=step.scale, softcap=2.0)
    plain, _ = ops.attend(
        step.query, step.key, step.value, selection.indices, selection.counts, scale=step.scale, softcap=2.0
    )
    assert torch.equal(out, plain)


def test_bits_and_share_are_the_methods():
    sampled = SampledTail(QuestSelector(16, share="query_head"))
    assert sampled.auxiliary_bits(128) == 256
    assert sampled.share == "query_head"


@pytest.mark.parametrize("fraction", [0, 1, -0.5])
def test_a_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(ConfigError, match=r"fraction must be in \(0, 1\)"):
        SampledTail(OracleSelector(), fraction)


def test_a_tail_of_a_tail_is_refused():
    with pytest.raises(ConfigError, match="wrap it once"):
        SampledTail(SampledTail(OracleSelector()))
