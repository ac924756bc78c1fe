"""Targets: what the maps should find, from exact attention over the heavy candidates."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hashattention.train.recipe import Pool


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Pooled exact attention of some queries: `logits` float32 ``[..., Hsel, N, T]``, -inf outside the causal tokens,
    and `heavy` bool ``[N, T]``, the candidates (causal, neither sink nor local).
    """

    logits: Tensor
    heavy: Tensor


def attention_logits(query: Tensor, key: Tensor, positions: Tensor, scale: Tensor) -> Tensor:
    """Causal logits float32 ``[L, Hkv, G, N, T]``: query ``[L, Hq, N, D]``, key ``[L, Hkv, T, D]``, scale ``[L]``."""
    layers, heads, tokens, _ = key.shape
    grouped = query.float().unflatten(1, (heads, -1)) * scale.float()[:, None, None, None, None]
    size, count = grouped.shape[2:4]
    logits = grouped.flatten(2, 3) @ key.float().transpose(-1, -2)
    logits = logits.view(layers, heads, size, count, tokens)
    future = torch.arange(tokens, device=key.device) > positions[:, None]
    return logits.masked_fill_(future, -torch.inf)


def heavy_candidates(positions: Tensor, tokens: int, sink: int, local: int) -> Tensor:
    """Tokens that the query at ``positions[n]`` may select, bool ``[N, T]``: no sink, none of its last `local`."""
    token = torch.arange(tokens, device=positions.device)
    return (token >= sink) & (token <= positions[:, None] - local)


def pool_logits(logits: Tensor, pool: Pool) -> Tensor:
    """Pool logits ``[..., G, N, T]`` over the group to log-weights ``[..., N, T]`` (up to a constant per query).

    "mean": of the softmax; "peak_sum": the softmax divided by its head's peak, summed; "peak_max": the same, maximum.
    With a peak of 1 in every head, no head is outvoted by one whose attention is concentrated.
    """
    if logits.shape[-3] == 1:
        return logits.squeeze(-3)
    if pool == "mean":
        return torch.logsumexp(logits - logits.logsumexp(-1, keepdim=True), dim=-3)
    relative = logits - logits.amax(-1, keepdim=True)
    return relative.amax(-3) if pool == "peak_max" else torch.logsumexp(relative, dim=-3)


def teach(
    query: Tensor, key: Tensor, positions: Tensor, scale: Tensor, *, shared: bool, pool: Pool, sink: int, local: int
) -> Teacher:
    """The teacher of one sequence: pooled over the GQA group where the selection is `shared`, else one a query head."""
    logits = attention_logits(query, key, positions, scale)
    pooled = pool_logits(logits, pool) if shared else logits.flatten(1, 2)
    return Teacher(pooled, heavy_candidates(positions, key.shape[2], sink, local))


def top_labels(teacher: Teacher, count: int) -> Tensor:
    """The `count` heaviest candidates of every query (fewer where there are fewer), bool ``[..., Hsel, N, T]``."""
    weights = teacher.logits.masked_fill(~teacher.heavy, -torch.inf)
    index = weights.topk(min(count, weights.shape[-1]), dim=-1).indices
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, index, True) & teacher.heavy


def soft_targets(teacher: Teacher, top: int, top_mix: float) -> Tensor:
    """Distributions over the candidates, float32 ``[..., Hsel, N, T]``: pooled attention mixed with a uniform one.

    The uniform one, on the `top` heaviest candidates, has weight `top_mix`. Rows sum to 1;
    a query without candidates has zeros.
    """
    weights = teacher.logits.masked_fill(~teacher.heavy, torch.finfo(torch.float32).min)
    target = torch.softmax(weights, dim=-1).masked_fill_(~teacher.heavy, 0)
    if not top_mix:
        return target
    labels = top_labels(teacher, top)
    share = top_mix / labels.sum(-1, keepdim=True).clamp(min=1)
    return target.mul_(1 - top_mix).add_(labels * share)
