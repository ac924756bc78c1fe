"""Kept mass: how much of the target the best scores hold at the budgets that will be served, made differentiable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Tokens whose scores stand for all when a threshold is sought.
PROBED = 1024


def keep(scores: Tensor, target: Tensor, heavy: Tensor, shares: Sequence[float]) -> Tensor:
    """Share of `target` lost by selecting the best scores, per head ``[..., Hsel]``: mean over the budgets `shares`.

    A token counts as selected by ``sigmoid(score - threshold)``, where the threshold leaves that share of the
    candidates above it; it is read off every few tokens, and moves with the scores near it, so that no score rises but
    at the cost of others. Shapes as in `distill`.
    """
    thresholds = _thresholds(scores.detach(), heavy, shares)
    some = heavy.any(-1)
    lost = []
    for fixed in thresholds.unbind(-1):
        left = torch.sigmoid(_moving(fixed, scores, heavy) - scores)
        lost.append(((left * target).sum(-1) * some).mean(-1))
    return torch.stack(lost).mean(0)


def _moving(threshold: Tensor, scores: Tensor, heavy: Tensor) -> Tensor:
    """The threshold with the gradient that keeps the sum of ``sigmoid(score - threshold)`` as it is (an implicit
    function of the scores).
    """
    with torch.no_grad():
        chosen = torch.sigmoid(scores - threshold)
        slope = chosen * (1 - chosen) * heavy
        slope /= slope.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    moved = (slope * scores).sum(-1, keepdim=True)
    return threshold + moved - moved.detach()


def _thresholds(scores: Tensor, heavy: Tensor, shares: Sequence[float]) -> Tensor:
    """Scores ``[..., N, 1, len(shares)]`` above which each share of the candidates lies."""
    step = max(1, scores.shape[-1] // PROBED)
    probe = scores[..., ::step].masked_fill(~heavy[..., ::step], -torch.inf)
    ordered = probe.sort(-1, descending=True).values
    count = heavy[..., ::step].sum(-1)
    places = [(count * share).long().clamp(max=ordered.shape[-1] - 1) for share in shares]
    index = torch.stack(places, -1).expand(*ordered.shape[:-1], len(shares))
    found = ordered.gather(-1, index)
    return found.masked_fill(found.isneginf(), 0)[..., None, :]
