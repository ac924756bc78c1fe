"""InfLLM: blocks of the context ranked by a few representative keys (Xiao et al., arXiv 2402.04617)."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattention.config import SelectionShare
from hashattention.selectors.base import Step, query_logits
from hashattention.selectors.pages import PageGrid
from hashattention.selectors.scored import Pooling, ScoredSelector, require_count


class InfLlmSelector(ScoredSelector):
    """Select whole blocks by the summed logits of their representative keys, the last block cut to the budget.

    The paper's representatives are the tokens that the queries after them attended to most: these queries belong to
    the prompt, which a selector does not see. Here they are the keys with the smallest norm, which attract the most
    attention (Devoto et al., arXiv 2406.11430). The sum of q.k over representatives needs their mean alone, so one
    vector a block is kept (as in the authors' code). The paper gives all heads of a layer one selection by the sum of
    their scores; here each KV head has its own (``pooling="logits"``), and tokens keep the positions that the model
    gave them.

    Parameters
    ----------
    block : int
        Tokens a block.
    representatives : int
        Representative keys a block.
    share, pooling
        As in `ScoredSelector`.
    """

    def __init__(
        self,
        block: int = 128,
        representatives: int = 4,
        share: SelectionShare = "group",
        pooling: Pooling = "logits",
    ) -> None:
        super().__init__(share, pooling)
        require_count("block", block)
        require_count("representatives", representatives)
        self.block, self.representatives = block, min(representatives, block)

    def estimate(self, step: Step) -> Tensor:
        """The mean logit of the representatives of each token's block."""
        grid = PageGrid(step.rows(self.share), step.extent.tokens, self.block)
        return grid.spread(
            step, (self, "blocks"), self._summarise, lambda means: query_logits(step.query, means, step.scale)
        )

    def _summarise(self, keys: Tensor, present: Tensor) -> Tensor:
        real = keys.float().masked_fill(~present, 0)
        score = (-real.norm(dim=-1)).masked_fill(~present[..., 0], -torch.inf)
        best = score.topk(self.representatives, dim=-1)
        chosen = real.gather(3, best.indices[..., None].expand(*best.indices.shape, keys.shape[-1]))
        number = best.values.isfinite().sum(-1, keepdim=True).clamp(min=1)
        return (chosen.sum(3) / number).to(keys.dtype)

    def auxiliary_bits(self, head_dim: int) -> float:
        """One key-sized vector a block."""
        return 16 * head_dim / self.block
