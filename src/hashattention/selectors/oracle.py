"""Exact selection: the attention weights themselves choose (the quality ceiling of any selector at this budget)."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattention.selectors.base import Step
from hashattention.selectors.scored import ScoredSelector


def exact_logits(step: Step) -> Tensor:
    """Attention logits of every query head and token (no softcap), float32 ``[B, Hkv, G, T]``."""
    query, keys = step.grouped_query(), step.keys()
    if keys.is_cuda and keys.dtype == step.query.dtype != torch.float32:
        # The same products and sums, without a float32 copy of all keys.
        flat = query.to(keys.dtype).flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)
        return torch.bmm(*flat, out_dtype=torch.float32).unflatten(0, keys.shape[:2]) * step.scale
    return query @ keys.float().transpose(-1, -2) * step.scale


class OracleSelector(ScoredSelector):
    """Top-k by exact attention, per query head or shared by the group.

    Shared selection pools the group's softmax weights, by default each head divided by its peak, by their maximum: no
    head is outvoted (see `pool_group` for the other poolings).
    """

    def estimate(self, step: Step) -> Tensor:
        """The exact logits."""
        return exact_logits(step)

    def auxiliary_bits(self, head_dim: int) -> float:
        """Nothing is kept; every key is read (16 bits a channel)."""
        return 16.0 * head_dim
