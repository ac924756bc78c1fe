"""Ranking: heavy tokens against hard negatives, the student's own current favourites and random ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rank(scores: Tensor, target: Tensor, heavy: Tensor, top: int, negatives: int) -> Tensor:
    """Pairwise logistic loss per head ``[..., Hsel]``: each of the `top` heaviest tokens should outscore `negatives`.

    Half of the negatives are the tokens with the highest scores now, half are spread over the context; a pair weighs
    the difference of its targets (RankNet, with LambdaRank's weights by what a swap costs). Shapes as in `distill`.
    """
    positive, at = target.topk(min(top, target.shape[-1]), dim=-1)
    other = _negatives(scores.detach(), heavy, negatives)
    gain = (positive[..., :, None] - target.gather(-1, other)[..., None, :]).clamp(min=0)
    gain = gain * heavy.expand_as(scores).gather(-1, other)[..., None, :]
    margin = scores.gather(-1, at)[..., :, None] - scores.gather(-1, other)[..., None, :]
    lost = (functional.softplus(-margin) * gain).sum((-2, -1))
    return (lost / gain.sum((-2, -1)).clamp(min=torch.finfo(torch.float32).tiny)).mean(-1)


def _negatives(scores: Tensor, heavy: Tensor, count: int) -> Tensor:
    """Tokens int64 ``[..., N, count]``: the best scores, and tokens at equal distances."""
    tokens = scores.shape[-1]
    hard = max(1, min(count // 2, tokens))
    best = scores.masked_fill(~heavy, torch.finfo(scores.dtype).min).topk(hard, dim=-1).indices
    spread = torch.arange(0, tokens, max(1, tokens // max(1, count - hard)), device=scores.device)[: count - hard]
    return torch.cat([best, spread.expand(*best.shape[:-1], -1)], -1)
