"""Distillation: cross-entropy of the candidates' softmax against a target distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _CrossEntropy(torch.autograd.Function):
    """Its gradient, softmax - target, is made in the forward pass: a third of the memory traffic of autograd's."""

    @staticmethod
    def forward(context: Any, scores: Tensor, target: Tensor, heavy: Tensor) -> Tensor:
        masked = scores.masked_fill(~heavy, torch.finfo(scores.dtype).min)
        own = torch.softmax(masked, dim=-1)
        # logsumexp = best - log softmax(best); sum(target) is 1, so no log-softmax tensor is needed.
        normaliser = masked.amax(-1) - own.amax(-1).log()
        inner = (target * scores).sum(-1)
        some = heavy.any(-1)
        context.save_for_backward(own.sub_(target).mul_(some[..., None]))
        return (normaliser - inner) * some

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        (gradient,) = context.saved_tensors
        return gradient.mul_(gradients[0][..., None]), None, None


def distill(scores: Tensor, target: Tensor, heavy: Tensor) -> Tensor:
    """Cross-entropy per head ``[..., Hsel]`` of ``softmax(scores)`` over the candidates against `target`.

    `scores` and `target` float32 ``[..., Hsel, N, T]``; `heavy` bool, broadcast to them. Rows of `target` sum to 1 on
    the candidates; a query without candidates has no part.
    """
    each: Tensor = _CrossEntropy.apply(scores, target, heavy)
    return each.mean(-1)
