from __future__ import annotations

import math

import torch
from tests.train.losses.example import example

from hashattention.train import labels, losses
from hashattention.train.recipe import Recipe


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
    found = losses.bce(scores, labels.top_labels(teacher, 2).float(), teacher.heavy, 7.5)[0, 0].item()
    assert math.isclose(found, expected / count, rel_tol=1e-4)


def test_the_papers_weight_grows_with_the_context():
    teacher, scores = example()
    recipe = Recipe(loss="bce", alpha=3.0, beta=0.5, context=1024, top=2)
    target = labels.targets(teacher, recipe)
    assert torch.equal(target, labels.top_labels(teacher, 2).float())
    torch.testing.assert_close(
        losses.selection_loss(scores, target, teacher.heavy, recipe),
        losses.bce(scores, target, teacher.heavy, 3 + 0.5 * 1024),
    )


def test_a_query_without_candidates_has_no_part():
    teacher, scores = example()
    empty = torch.zeros_like(teacher.heavy)
    assert losses.bce(scores, torch.zeros_like(scores), empty, 2.0).tolist() == [[0.0], [0.0]]
