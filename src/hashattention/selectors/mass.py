"""Estimated attention mass: how many candidates hold a share of it, from a histogram of their integer scores."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattention.config import BaseModel, MapsConfig

#: A product that is whole but for its last bit is not rounded up.
SLACK = 1e-9


def largest_score(config: MapsConfig, model: BaseModel) -> int:
    """The largest magnitude of a score: that of one code, times the codes that a selection head adds up."""
    one = config.bits * (config.levels if config.score == "asymmetric" else 1)
    return one * (config.code_heads(model) // config.selection_heads(model))


def pool_scale(scale: Tensor, selection_heads: int) -> Tensor:
    """What a unit of the score is worth in each selection head ``[B, Hsel, T]``: the mean over its codes' `scale`
    ``[B, Hc, T]``.
    """
    return scale.unflatten(1, (selection_heads, -1)).mean(2)


def histogram(scores: Tensor, candidates: Tensor, largest: int) -> Tensor:
    """How many candidates have each score, from `largest` down to ``-largest``: int32 ``[..., 2 largest + 1]``.

    `scores` ``[..., T]`` are whole numbers of at most that magnitude where `candidates` (bool, broadcast to them) says
    so; elsewhere they may be anything.
    """
    spare = 2 * largest + 1
    place = (largest - scores.long()).masked_fill(~candidates, spare)
    counts = torch.zeros((*scores.shape[:-1], spare + 1), dtype=torch.int32, device=scores.device)
    one = torch.ones((), dtype=torch.int32, device=scores.device)
    return counts.scatter_add_(-1, place, one.expand_as(place))[..., :spare]


def levels(largest: int, temperature: Tensor) -> Tensor:
    """The estimated logit of every score from `largest` down, float64 ``[..., 2 largest + 1]``."""
    steps = torch.arange(largest, -largest - 1, -1, dtype=torch.float64, device=temperature.device)
    return steps * temperature.double()[..., None]


def count_needed(
    counts: Tensor, logits: Tensor, *, top_p: float | None = None, threshold: float | None = None
) -> Tensor:
    """How many candidates are needed, those of the highest score first.

    The estimated weight of a candidate is the softmax, over the row's candidates, of its score times a temperature.
    Nothing is sorted or read on the host, and no shape depends on data.

    Parameters
    ----------
    counts, logits : Tensor
        What `histogram` and `levels` give; broadcast to each other.
    top_p : float, optional
        The fewest candidates that hold this share of the estimated weight (top-p), in (0, 1].
    threshold : float, optional
        Only candidates whose estimated weight is at least this.

    Returns
    -------
    Tensor, int32 ``[...]``
        The smaller of the two numbers.

    Examples
    --------
    >>> counts = histogram(torch.tensor([2, 0, 0, -1]), torch.tensor([True, True, True, True]), 2)
    >>> logits = levels(2, torch.tensor(1.0))  # weights 0.755, 0.102, 0.102, 0.038
    >>> [int(count_needed(counts, logits, top_p=p)) for p in (0.7, 0.8, 0.9, 1.0)]
    [1, 2, 3, 4]
    >>> int(count_needed(counts, logits, threshold=0.05))
    3
    """
    held = logits.masked_fill(counts == 0, -torch.inf)
    weight = (held - held.amax(-1, keepdim=True).clamp(min=torch.finfo(held.dtype).min)).exp()
    mass = counts * weight
    total = mass.sum(-1, keepdim=True)
    needed = counts.sum(-1, dtype=torch.int32)
    if top_p is not None and top_p < 1:
        short = top_p * total - (mass.cumsum(-1) - mass)
        taken = (short / weight.clamp(min=torch.finfo(weight.dtype).tiny) - SLACK).ceil().clamp(min=0)
        needed = torch.minimum(taken, counts).sum(-1).to(torch.int32)
    if threshold is not None:
        needed = torch.minimum(needed, (counts * (weight >= threshold * total)).sum(-1, dtype=torch.int32))
    return needed
