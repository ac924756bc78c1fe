"""Targets: what the maps should find, from exact attention over the heavy candidates."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from hashattention.models.capture import Sample
from hashattention.train.recipe import Pool, Recipe, Weigh

#: How many tokens of a head are ranked by pool "rank"; the others share the next rank.
RANKED = 1024


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Pooled exact attention of some queries: `logits` float32 ``[..., Hsel, N, T]``, -inf outside the causal tokens,
    and `heavy` bool ``[N, T]``, the candidates (causal, neither sink nor local).
    """

    logits: Tensor
    heavy: Tensor


@contextlib.contextmanager
def tensor_float32(device: torch.device) -> Iterator[None]:
    """Matrix products of float32 tensors on a GPU's tensor cores: exact for bfloat16 captures and integer codes, whose
    values need no more than TF32's 11 significant bits; sums stay float32. Nothing changes on a CPU.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def attention_logits(sample: Sample) -> Tensor:
    """Causal logits float32 ``[L, Hkv, G, N, T]`` of all queries of a sample against its keys."""
    key = sample.key
    layers, heads, tokens, _ = key.shape
    grouped = sample.query.float().unflatten(1, (heads, -1)) * sample.scale.float()[:, None, None, None, None]
    size, count = grouped.shape[2:4]
    with tensor_float32(key.device):
        logits = grouped.flatten(2, 3) @ key.float().transpose(-1, -2)
    logits = logits.view(layers, heads, size, count, tokens)
    future = sample.key_positions() > sample.positions[:, None]
    return logits.masked_fill_(future, -torch.inf)


def heavy_candidates(positions: Tensor, token: Tensor, sink: int, local: int) -> Tensor:
    """Which keys, of positions `token` ``[T]``, the query at ``positions[n]`` may select, bool ``[N, T]``: no sink,
    none of its last `local`.
    """
    return (token >= sink) & (token <= positions[:, None] - local)


def pool_logits(logits: Tensor, pool: Pool, weight: Tensor | None = None) -> Tensor:
    """Pool logits ``[..., G, N, T]`` over the group to log-weights ``[..., N, T]`` (up to a constant per query).

    "mean": of the softmax; "peak_sum": the softmax divided by its head's peak, summed; "peak_max": the same, maximum;
    "rank": one over the best rank in any head. With a peak of 1 in every head, no head is outvoted by one whose
    attention is concentrated. `weight`, log-weights of the tokens of the same shape, multiplies the softmax of each
    head before it is pooled.
    """
    if pool == "mean":
        logits = logits - logits.logsumexp(-1, keepdim=True)
    weighted = logits if weight is None else logits + weight
    if logits.shape[-3] == 1:
        return weighted.squeeze(-3)
    if pool == "mean":
        return torch.logsumexp(weighted, dim=-3)
    if pool == "rank":
        return (-torch.log1p(_best_rank(weighted))).masked_fill(weighted.isneginf().all(-3), -torch.inf)
    relative = weighted - weighted.amax(-1, keepdim=True)
    return relative.amax(-3) if pool == "peak_max" else torch.logsumexp(relative, dim=-3)


def _best_rank(weights: Tensor) -> Tensor:
    """The best rank (0 is the heaviest) of each token in any head, float32 ``[..., N, T]``."""
    count = min(RANKED, weights.shape[-1])
    best = weights.topk(count, dim=-1).indices
    rank = torch.full_like(weights, float(count))
    rank.scatter_(-1, best, torch.arange(count, device=weights.device, dtype=weights.dtype).expand(best.shape))
    return rank.amin(-3)


def token_weights(sample: Sample, logits: Tensor, weigh: Weigh) -> Tensor | None:
    """Log-weights of the tokens: what a selected token is worth beside its attention weight.

    "value": log |v|, ``[L, Hkv, 1, 1, T]``; "output": ``log(|v - o| / |o|)`` with the head's dense output o, in the
    shape of `logits` ``[L, Hkv, G, N, T]``: times the attention weight, it is the relative output error that leaving
    this one token out makes, to first order.
    """
    if weigh == "none":
        return None
    assert sample.value is not None, "weighted targets need captured values"
    value = sample.value.float()
    size = value.square().sum(-1)[:, :, None, None]
    if weigh == "value":
        return size.clamp(min=1e-12).log() / 2
    with tensor_float32(sample.key.device):
        out = torch.softmax(logits, -1).flatten(2, 3) @ value
        cross = (out @ value.transpose(-1, -2)).view(logits.shape)
    square = out.square().sum(-1).view(logits.shape[:-1]).clamp(min=1e-12)[..., None]
    return ((size - 2 * cross + square) / square).clamp(min=1e-6).log() / 2


def teach(sample: Sample, recipe: Recipe, *, shared: bool) -> Teacher:
    """The teacher of one sequence: pooled over the GQA group where the selection is `shared`, else one a query head."""
    logits = attention_logits(sample)
    weight = token_weights(sample, logits, recipe.weigh)
    heavy = heavy_candidates(sample.positions, sample.key_positions(), recipe.sink, recipe.local)
    if shared:
        return Teacher(pool_logits(logits, recipe.pool, weight), heavy)
    return Teacher((logits if weight is None else logits + weight).flatten(1, 2), heavy)


def top_labels(teacher: Teacher, count: int) -> Tensor:
    """The `count` heaviest candidates of every query (fewer where there are fewer), bool ``[..., Hsel, N, T]``."""
    weights = teacher.logits.masked_fill(~teacher.heavy, -torch.inf)
    index = weights.topk(min(count, weights.shape[-1]), dim=-1).indices
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, index, True) & teacher.heavy


def soft_targets(teacher: Teacher, top: int, top_mix: float, temper: float = 1.0) -> Tensor:
    """Distributions over the candidates, float32 ``[..., Hsel, N, T]``: pooled attention mixed with a uniform one.

    The attention is raised to the power `temper` (below 1: flatter) and normalised. The uniform one, on the `top`
    heaviest candidates, has weight `top_mix`. Rows sum to 1; a query without candidates has zeros.
    """
    logits = teacher.logits if temper == 1 else teacher.logits * temper
    weights = logits.masked_fill(~teacher.heavy, torch.finfo(torch.float32).min)
    target = torch.softmax(weights, dim=-1).masked_fill_(~teacher.heavy, 0)
    if not top_mix:
        return target
    labels = top_labels(teacher, top)
    share = top_mix / labels.sum(-1, keepdim=True).clamp(min=1)
    return target.mul_(1 - top_mix).add_(labels * share)


def targets(teacher: Teacher, recipe: Recipe) -> Tensor:
    """What the recipe's loss is given: label weights 0 and 1 for "bce", else distributions over the candidates."""
    if recipe.loss == "bce":
        return top_labels(teacher, recipe.top).float()
    return soft_targets(teacher, recipe.top, 1.0 if recipe.loss == "topk" else recipe.top_mix, recipe.temper)
