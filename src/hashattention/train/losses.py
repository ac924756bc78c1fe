"""Losses: distillation of the pooled attention, and the paper's weighted binary cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hashattention.train import labels
from hashattention.train.labels import Teacher
from hashattention.train.recipe import Recipe


def distill(scores: Tensor, teacher: Teacher, top: int, top_mix: float) -> Tensor:
    """Cross-entropy of the candidates' softmax against `labels.soft_targets`, per head: ``[..., Hsel]``.

    `scores` float32 ``[..., Hsel, N, T]``, already divided by the student's temperature.
    """
    with torch.no_grad():
        target = labels.soft_targets(teacher, top, top_mix)
    masked = scores.masked_fill(~teacher.heavy, torch.finfo(scores.dtype).min)
    # sum(target) is 1: cross-entropy needs no log-softmax tensor of its own.
    own = torch.logsumexp(masked, dim=-1) - (target * scores).sum(-1)
    return (own * teacher.heavy.any(-1)).mean(-1)


def bce(scores: Tensor, teacher: Teacher, top: int, label_weight: float) -> Tensor:
    """Weighted binary cross-entropy of ``sigmoid(scores)`` against the top labels, per head: ``[..., Hsel]``.

    HashAttention, arXiv 2412.14468, section 4; `label_weight` is its ``alpha + beta * context``.
    """
    with torch.no_grad():
        target = labels.top_labels(teacher, top).to(scores.dtype)
    weight = scores.new_tensor(label_weight)
    each = functional.binary_cross_entropy_with_logits(scores, target, pos_weight=weight, reduction="none")
    candidates = teacher.heavy.sum().clamp(min=1)
    return (each * teacher.heavy).sum((-2, -1)) / candidates


def loss_per_head(scores: Tensor, teacher: Teacher, recipe: Recipe) -> Tensor:
    """The recipe's loss, one value per layer and selection head."""
    if recipe.loss == "bce":
        return bce(scores, teacher, recipe.top, recipe.alpha + recipe.beta * recipe.context)
    return distill(scores, teacher, recipe.top, recipe.top_mix)
