"""StreamingLLM: attention sinks and a window of recent tokens (Xiao et al., arXiv 2309.17453)."""

from __future__ import annotations

import torch

from hashattention.selectors.base import Selection, Selector, Step, select_best


class StreamingSelector(Selector):
    """The first and the most recent tokens: the whole heavy budget goes to local.

    The paper renumbers positions inside its small cache; here tokens keep the positions that the model gave them.
    """

    def select(self, step: Step) -> Selection:
        """Sink, and local + heavy recent tokens."""
        rows = step.rows(self.share)
        # With one score for all, heavy falls to the most recent of the rest: the tokens just before local.
        scores = torch.zeros(*rows.budgets.shape[:2], step.extent.tokens, device=step.key.device)
        return select_best(scores, rows)

    def auxiliary_bits(self, head_dim: int) -> float:
        """Nothing is kept and nothing is scored."""
        return 0.0
