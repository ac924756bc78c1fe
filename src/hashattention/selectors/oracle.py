"""Exact top-k: the attention weights themselves choose (the quality ceiling of any selector at this budget)."""

from __future__ import annotations

import torch

from hashattention import ops
from hashattention.config import SelectionShare
from hashattention.selectors.base import Selection, Selector, Step


class OracleSelector(Selector):
    """Select by exact attention, per query head or shared by the group.

    Shared selection pools the group's softmax weights, each head divided by its peak, by their maximum: no head is
    outvoted.
    """

    def __init__(self, share: SelectionShare = "group") -> None:
        self.share = share

    def select(self, step: Step) -> Selection:
        """Score every token by its exact attention weight."""
        rows = step.rows(self.share)
        key = step.key[:, :, : step.extent.tokens].float()
        grouped = step.query.float().unflatten(1, (key.shape[1], -1)).squeeze(3)
        logits = grouped @ key.transpose(-1, -2) * step.scale
        position = torch.arange(key.shape[2], device=key.device)
        outside = (position < rows.start[:, None]) | (position >= rows.end[:, None])
        if rows.mask is not None:
            outside = outside | ~rows.mask
        logits = logits.masked_fill(outside[:, None, None], -torch.inf)
        relative = logits - logits.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
        scores = relative.amax(2) if self.share == "group" else relative.flatten(1, 2)
        bounds = rows.start, rows.end, rows.budgets, rows.capacity
        return Selection(*ops.select(scores, *bounds, mask=rows.mask))

    def auxiliary_bits(self, head_dim: int) -> float:
        """Nothing is kept; every key is read (16 bits a channel)."""
        return 16.0 * head_dim
