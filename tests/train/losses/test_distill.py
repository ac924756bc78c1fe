from __future__ import annotations

import torch
from tests.train.losses.example import example

from hashattention.train import labels, losses


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
    found = losses.distill(scores, labels.soft_targets(teacher, 4, 0.5), teacher.heavy)
    torch.testing.assert_close(found, expected)


def test_its_gradient_is_autograds():
    teacher, scores = example()
    target = labels.soft_targets(teacher, 4, 0.5)
    grads = []
    for own in (True, False):
        x = scores.clone().requires_grad_()
        if own:
            loss = losses.distill(x, target, teacher.heavy)
        else:
            masked = x.masked_fill(~teacher.heavy, -1e9)
            loss = -(target * masked.log_softmax(-1)).sum(-1).mean(-1)
        (loss * torch.tensor([[2.0], [-3.0]])).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-5)


def test_distillation_is_least_at_the_teacher():
    teacher, scores = example()
    target = labels.soft_targets(teacher, 4, 0.0)
    own = teacher.logits.masked_fill(~teacher.heavy, 0)
    assert (losses.distill(own, target, teacher.heavy) < losses.distill(scores, target, teacher.heavy)).all()


def test_a_query_without_candidates_has_no_part():
    teacher, scores = example()
    empty, x = torch.zeros_like(teacher.heavy), scores.requires_grad_()
    found = losses.distill(x, torch.zeros_like(scores), empty)
    found.sum().backward()
    assert found.tolist() == [[0.0], [0.0]] and x.grad.abs().max() == 0
