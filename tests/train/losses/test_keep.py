from __future__ import annotations

import torch
from tests.train.losses.example import example

from hashattention.train import labels, losses


def test_sharp_scores_lose_what_selection_leaves_out():
    teacher, scores = example()
    target = labels.soft_targets(teacher, 4, 0.0)
    share = 0.25
    found = losses.keep(scores * 1e4, target, teacher.heavy, [share])
    expected = torch.zeros(2, 1)
    for layer in range(2):
        for row in range(3):
            inside = teacher.heavy[row].nonzero()[:, 0]
            order = inside[scores[layer, 0, row, inside].argsort(descending=True)]
            place = int(len(inside) * share)
            at_threshold = target[layer, 0, row, order[place]] / 2
            expected[layer, 0] += (target[layer, 0, row, order[place + 1 :]].sum() + at_threshold) / 3
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_teachers_own_order_loses_least_and_gradients_point_there():
    teacher, scores = example()
    target = labels.soft_targets(teacher, 4, 0.0)
    own = teacher.logits.masked_fill(~teacher.heavy, -30)
    shares = [0.5, 0.25]
    assert (
        losses.keep(own * 50, target, teacher.heavy, shares) < losses.keep(scores * 50, target, teacher.heavy, shares)
    ).all()
    x = scores.clone().requires_grad_()
    losses.keep(x, target, teacher.heavy, shares).sum().backward()
    assert (x.grad[..., ~teacher.heavy] == 0).all() and (x.grad < 0).any() and (x.grad > 0).any()
    # All scores together move nothing.
    torch.testing.assert_close(x.grad.sum(-1), torch.zeros(2, 1, 3), atol=1e-6, rtol=0)


def test_a_query_without_candidates_has_no_part():
    teacher, scores = example()
    found = losses.keep(scores, torch.zeros_like(scores), torch.zeros_like(teacher.heavy), [0.5])
    assert found.tolist() == [[0.0], [0.0]]
