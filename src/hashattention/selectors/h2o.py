"""H2O: the tokens that received the most attention so far (Zhang et al., arXiv 2306.14048)."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattention.ops.reference import gather_tokens
from hashattention.selectors.base import Selection, Selector, Step, select_best
from hashattention.selectors.oracle import exact_logits


class H2oSelector(Selector):
    """Keep the heavy hitters by accumulated attention weight, per KV head (the group's weights are summed).

    The paper accumulates the weights of every query, the prompt's included. A selector sees the sparse queries alone,
    so the first of a context starts the accumulation with its weights over all tokens, which is kinder than the paper
    to queries that resemble it; from then on each step adds its weights over the tokens that it attended to (the
    paper's rule: what was evicted gains nothing). A longer `sparse_tail` accumulates more of the prompt. A crop of the
    cache forgets tokens, not the attention that they paid to others.

    Parameters
    ----------
    evict : bool
        True, the paper's: a token that once was not selected never comes back as a heavy one.
    """

    accumulates = True

    def __init__(self, evict: bool = True) -> None:
        self.evict = evict

    def select(self, step: Step) -> Selection:
        """Choose by the weights of earlier steps, then add this step's."""
        rows, tokens, name = step.rows("group"), step.extent.tokens, (self, "weights")
        started = step.side.length(name) > 0
        received = step.side.extend(name, tokens, lambda first: self._begin(step, first))[..., 0]
        chosen = select_best(received, rows, received > -torch.inf)
        if started:
            received.scatter_add_(2, chosen.indices.clamp(min=0).long(), self._pay(step, chosen))
        if self.evict:
            # Slots that no token has filled yet are not lost to the one that comes.
            received.masked_fill_(~chosen.held(tokens) & rows.valid(tokens)[:, None], -torch.inf)
        return chosen

    def _begin(self, step: Step, first: int) -> Tensor:
        if first:
            return step.key.new_zeros((*step.key.shape[:2], step.extent.tokens - first, 1), dtype=torch.float32)
        outside = ~step.rows("group").valid(step.extent.tokens)
        weights = exact_logits(step).masked_fill(outside[:, None, None], -torch.inf).softmax(-1)
        return weights.nan_to_num(0.0).sum(2)[..., None]

    def _pay(self, step: Step, chosen: Selection) -> Tensor:
        used = torch.arange(chosen.indices.shape[-1], device=step.key.device) < chosen.counts[..., None]
        keys = gather_tokens(step.key, chosen.indices).float()
        logits = step.grouped_query() @ keys.transpose(-1, -2) * step.scale
        weights = logits.masked_fill(~used[:, :, None], -torch.inf).softmax(-1)
        return weights.masked_fill(~used[:, :, None], 0).sum(2)

    def auxiliary_bits(self, head_dim: int) -> float:
        """One float32 a token (with `evict`, only tokens still kept are read: this is the upper bound)."""
        return 32.0
