"""Kept mass: how much of the target the best scores hold at the budgets that will be served, made differentiable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Tokens whose scores stand for all when a threshold is sought.
PROBED = 1024


def keep(scores: Tensor, target: Tensor, heavy: Tensor, shares: Sequence[float]) -> Tensor:
    """Share of `target` lost by selecting the best scores, per head ``[..., Hsel]``: mean over the budgets `shares`.

    A token counts as selected by ``sigmoid(score - threshold)``, where the threshold (no gradient) leaves that share
    of the candidates above it; it is read off every few tokens. Shapes as in `distill`.
    """
    thresholds = _thresholds(scores.detach(), heavy, shares)
    some = heavy.any(-1)
    lost = [
        ((torch.sigmoid(threshold - scores) * target).sum(-1) * some).mean(-1) for threshold in thresholds.unbind(-1)
    ]
    return torch.stack(lost).mean(0)


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
