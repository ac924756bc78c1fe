"""Budgets: how a mean heavy budget is best shared among layers and index sets, from their measured error curves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from hashattention.config import BaseModel, Budget
from hashattention.maps import HashMaps
from hashattention.train import metrics
from hashattention.train.shards import Samples

#: Multiples of the mean budget at which the curves are measured: no share is outside their range.
MULTIPLES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)

Shares = tuple[tuple[float, ...], ...]


def curves(
    calibration: Samples, base: BaseModel, maps: HashMaps, budget: Budget, device: torch.device
) -> dict[str, Tensor]:
    """Output error of `maps` at each of `MULTIPLES` of the heavy budget, which must be a fraction: under "hash",
    float64 ``[multiples, layers, Hkv, 3]`` (`metrics.measure_heads`).
    """
    assert isinstance(budget.heavy, float), "a mean budget is a fraction of the context"
    budgets = [
        Budget(heavy=min(1.0, budget.heavy * multiple), sink=budget.sink, local=budget.local) for multiple in MULTIPLES
    ]
    return metrics.measure_heads(calibration, base, {"hash": maps}, budgets, device=device)


def allocate(errors: Tensor, multiples: Sequence[float] = MULTIPLES, mean: float = 1.0) -> Tensor:
    """The shares ``[...]`` with that mean and the least mean error, given errors ``[multiples, ...]``.

    Each curve is replaced by its lower convex hull; then the steepest piece of any curve is taken first (Fox, 1966:
    greedy marginal gain is optimal for convex curves), and the last piece in part.

    Examples
    --------
    >>> flat, steep = [0.3, 0.3, 0.3], [0.9, 0.5, 0.3]
    >>> allocate(torch.tensor([flat, steep]).T, (0.5, 1.0, 1.5)).tolist()
    [0.5, 1.5]
    """
    places = torch.tensor(multiples, dtype=torch.float64)
    flat = errors.double().flatten(1).T.tolist()
    pieces = []
    for head, curve in enumerate(flat):
        corners = _hull(list(zip(multiples, curve, strict=True)))
        for (x, y), (further, lower) in itertools.pairwise(corners):
            if lower < y:
                pieces.append(((lower - y) / (further - x), head, further - x))
    shares = torch.full((len(flat),), float(places[0]), dtype=torch.float64)
    left = (mean - float(places[0])) * len(flat)
    # Equal slopes of one head lie on one line, so that their order does not matter.
    for _, head, width in sorted(pieces):
        taken = min(width, left)
        shares[head] += taken
        left -= taken
    if left > 0:  # every curve is flat by now: what is left changes nothing, and is spent evenly
        shares = _spend(shares, left, float(places[-1]))
    return shares.view(errors.shape[1:])


def _spend(shares: Tensor, left: float, most: float) -> Tensor:
    room = most - shares
    return shares + room * min(1.0, left / max(float(room.sum()), 1e-12))


def _hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Lower convex hull of points with ascending x."""
    kept: list[tuple[float, float]] = []
    for x, y in points:
        while len(kept) > 1:
            (x1, y1), (x2, y2) = kept[-2:]
            if (y2 - y1) * (x - x1) < (y - y1) * (x2 - x1):
                break
            kept.pop()
        kept.append((x, y))
    return kept


def as_shares(table: Tensor, selection_heads: int) -> Shares:
    """Shares per layer and KV head ``[L, Hkv]`` as plain numbers per index set, rounded so that none grows."""
    repeated = table.repeat_interleave(selection_heads // table.shape[1], dim=1)
    return tuple(tuple(int(share * 1e4) / 1e4 for share in row) for row in repeated.tolist())
