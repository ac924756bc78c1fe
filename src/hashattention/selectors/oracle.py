"""Exact selection: the attention weights themselves choose (the quality ceiling of any selector at this budget)."""

from __future__ import annotations

from torch import Tensor

from hashattention.selectors.base import Step, query_logits
from hashattention.selectors.scored import ScoredSelector


def exact_logits(step: Step) -> Tensor:
    """Attention logits of every query head and token (no softcap), float32 ``[B, Hkv, G, T]``."""
    return query_logits(step.query, step.keys(), step.scale)


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
