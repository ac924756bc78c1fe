from __future__ import annotations

import math

import torch

from hashattention.train import labels, losses
from hashattention.train.labels import Teacher
from hashattention.train.recipe import Recipe


def example():
    torch.manual_seed(1)
    positions = torch.tensor([6, 12, 15])
    heavy = labels.heavy_candidates(positions, 16, 2, 3)
    logits = torch.randn(2, 1, 3, 16) * 3
    logits = logits.masked_fill(torch.arange(16) > positions[:, None], -torch.inf)
    return Teacher(logits, heavy), torch.randn(2, 1, 3, 16)


def test_distillation_is_cross_entropy():
    teacher, scores = example()
    expected = torch.zeros(2, 1)
    for layer in range(2):
        for row in range(3):
            inside = teacher.heavy[row]
            target = teacher.logits[layer, 0, row, inside].softmax(-1)
            top = torch.zeros_like(target)
            top[target.topk(min(4, len(target))).indices] = 1 / min(4, len(target))
            expected[layer, 0] -= (0.5 * (target + top) * scores[layer, 0, row, inside].log_softmax(-1)).sum() / 3
    torch.testing.assert_close(losses.distill(scores, teacher, 4, 0.5), expected)


def test_distillation_is_least_at_the_teacher():
    teacher, scores = example()
    own = teacher.logits.masked_fill(~teacher.heavy, 0)
    assert (losses.distill(own, teacher, 4, 0.0) < losses.distill(scores, teacher, 4, 0.0)).all()


def test_bce_weighs_labels():
    teacher, scores = example()
    expected, count = 0.0, 0
    for row in range(3):
        inside = teacher.heavy[row].nonzero()[:, 0].tolist()
        best = sorted(inside, key=lambda t: -teacher.logits[0, 0, row, t].item())[:2]
        for token in inside:
            p = 1 / (1 + math.exp(-scores[0, 0, row, token].item()))
            expected -= 7.5 * math.log(p) if token in best else math.log(1 - p)
            count += 1
    found = losses.bce(scores, teacher, 2, 7.5)[0, 0].item()
    assert math.isclose(found, expected / count, rel_tol=1e-4)


def test_the_papers_weight_grows_with_the_context():
    teacher, scores = example()
    recipe = Recipe(loss="bce", alpha=3.0, beta=0.5, context=1024, top=2)
    torch.testing.assert_close(
        losses.loss_per_head(scores, teacher, recipe), losses.bce(scores, teacher, 2, 3 + 0.5 * 1024)
    )


def test_a_query_without_candidates_has_no_part():
    teacher, scores = example()
    empty = Teacher(teacher.logits, torch.zeros_like(teacher.heavy))
    assert losses.distill(scores, empty, 4, 0.5).tolist() == [[0.0], [0.0]]
    assert losses.bce(scores, empty, 4, 2.0).tolist() == [[0.0], [0.0]]
