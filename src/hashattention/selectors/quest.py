"""Quest: pages ranked by an upper bound of their logits, from each channel's minimum and maximum (Tang et al., arXiv
2406.10774).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hashattention.config import SelectionShare
from hashattention.selectors.base import Step, query_logits
from hashattention.selectors.pages import PageGrid
from hashattention.selectors.rounding import FULL, check_bits, round_to_bits, vector_bits
from hashattention.selectors.scored import Pooling, ScoredSelector, require_count


class QuestSelector(ScoredSelector):
    """Select whole pages by ``sum_d max(q_d * min_d, q_d * max_d)``, the last page cut to the budget (its most recent
    tokens stay).

    The paper has one selection per head of an MHA model. Here the group shares one by default, pooled as for every
    other method, so that methods differ in their scores alone; ``share="query_head"`` is the paper's.

    Parameters
    ----------
    page : int
        Tokens a page.
    bits : int
        Bits a channel of the page's minimum and maximum: 16 as computed, 1 to 8 rounded, each vector on its own grid.
    share, pooling
        As in `ScoredSelector`.
    """

    def __init__(
        self, page: int = 16, bits: int = FULL, share: SelectionShare = "group", pooling: Pooling = "peak_max"
    ) -> None:
        super().__init__(share, pooling)
        require_count("page", page)
        check_bits(bits)
        self.page, self.bits = page, bits

    def estimate(self, step: Step) -> Tensor:
        """The upper bound of the logits of each token's page."""
        # max(q * min, q * max) is q * max where q is positive and q * min where it is not.
        rising, falling = step.query.clamp(min=0), step.query.clamp(max=0)

        def bound(summaries: Tensor) -> Tensor:
            lowest, highest = summaries.chunk(2, dim=-1)
            return query_logits(rising, highest, step.scale) + query_logits(falling, lowest, step.scale)

        grid = PageGrid(step.rows(self.share), step.extent.tokens, self.page)
        return grid.spread(step, (self, "pages"), self._summarise, bound)

    def _summarise(self, keys: Tensor, present: Tensor) -> Tensor:
        lowest = keys.masked_fill(~present, torch.inf).amin(3)
        highest = keys.masked_fill(~present, -torch.inf).amax(3)
        some = present.any(3)
        ends = [torch.where(some, end, 0) for end in (lowest, highest)]
        return torch.cat([round_to_bits(end, self.bits) for end in ends], dim=-1)

    def auxiliary_bits(self, head_dim: int) -> float:
        """Two vectors a page."""
        return 2 * vector_bits(head_dim, self.bits) / self.page
