from __future__ import annotations

import torch
from tests.train.losses.example import example

from hashattention.train import labels, losses


def test_it_is_a_weighted_pairwise_logistic_loss():
    teacher, scores = example()
    target = labels.soft_targets(teacher, 4, 0.0)
    found = losses.rank(scores, target, teacher.heavy, top=2, negatives=16)
    expected = torch.zeros(2, 1)
    for layer in range(2):
        for row in range(3):
            s, t, inside = scores[layer, 0, row], target[layer, 0, row], teacher.heavy[row]
            favourites = s.masked_fill(~inside, -1e9).topk(8).indices.tolist()
            others = [*favourites, *range(0, 16, 2)]
            pairs = [(i, j) for i in t.topk(2).indices.tolist() for j in others if inside[j] and t[i] > t[j]]
            gains = torch.tensor([float(t[i] - t[j]) for i, j in pairs])
            margins = torch.tensor([float(s[i] - s[j]) for i, j in pairs])
            expected[layer, 0] += (torch.log1p(torch.exp(-margins)) * gains).sum() / gains.sum() / 3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_teachers_order_is_better_than_its_reverse():
    teacher, _ = example()
    target = labels.soft_targets(teacher, 4, 0.0)
    own = teacher.logits.masked_fill(~teacher.heavy, 0)
    best, worst = (losses.rank(sign * own, target, teacher.heavy, 4, 8) for sign in (1, -1))
    assert (best < worst).all()


def test_a_query_without_candidates_has_no_part():
    teacher, scores = example()
    found = losses.rank(scores, torch.zeros_like(scores), torch.zeros_like(teacher.heavy), 4, 8)
    assert found.tolist() == [[0.0], [0.0]]
