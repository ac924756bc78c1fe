"""Exact top-p: as many tokens as it takes to hold a share of the attention weight."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from hashattention.config import SelectionShare
from hashattention.errors import ConfigError
from hashattention.selectors.base import Selection, Selector, Step, select_best
from hashattention.selectors.oracle import exact_logits
from hashattention.selectors.scored import pool_group, require_choice


class TopPSelector(Selector):
    """The smallest set that holds a share `p` of the exact attention weight (top-p, as Twilight prunes; arXiv
    2502.02770), never more than the budget.

    Sink and local are always taken and count towards `p`, so the number of heavy tokens differs from row to row.

    Parameters
    ----------
    p : float
        Attention weight to be covered, in (0, 1].
    share : {"group", "query_head"}
        One index set per KV head, or one per query head.
    union : bool
        Shared only. True: every head's own top-p set, united (the best by peak-normalised weight where the budget is
        too small); False: one top-p set of the group's mean weights.
    """

    def __init__(self, p: float = 0.95, share: SelectionShare = "group", union: bool = True) -> None:
        if not 0 < p <= 1:
            raise ConfigError(f"p must be in (0, 1], the attention weight to be covered; given {p!r}.")
        require_choice("share", share, get_args(SelectionShare))
        self.p, self.share, self.union = p, share, union

    def select(self, step: Step) -> Selection:
        """Sort the candidates of every row by weight and keep those needed to reach `p`."""
        rows, tokens = step.rows(self.share), step.extent.tokens
        valid, candidates = rows.valid(tokens)[:, None], rows.candidates(tokens)
        logits = exact_logits(step).masked_fill(~valid[:, None], -torch.inf)
        weights = logits.double().softmax(-1).nan_to_num(0.0)
        if self.share == "query_head":
            weights = weights.flatten(1, 2)[:, :, None]
        elif not self.union:
            weights = weights.mean(2, keepdim=True)
        wanted = reach(weights, candidates[:, :, None], self.p).any(2)
        pooled: Literal["peak_max", "mean"] = "peak_max" if self.union else "mean"
        scores = logits.flatten(1, 2) if self.share == "query_head" else pool_group(logits, pooled, rows)
        return select_best(scores, rows, wanted)

    def auxiliary_bits(self, head_dim: int) -> float:
        """Nothing is kept; every key is read (16 bits a channel)."""
        return 16.0 * head_dim


def reach(weights: Tensor, candidates: Tensor, p: float) -> Tensor:
    """The fewest candidates, largest first, that bring the covered weight to `p`: bool, the shape of `weights`."""
    open_weights = weights.masked_fill(~candidates, 0.0)
    # A stable sort of the reversed row: of equal weights the more recent token comes first, as in `ops.select`.
    ranked, order = open_weights.flip(-1).sort(dim=-1, descending=True, stable=True)
    covered = (weights - open_weights).sum(-1, keepdim=True)
    needed = (covered + ranked.cumsum(-1) - ranked < p) & (ranked > 0)
    return torch.zeros_like(needed).scatter_(-1, order, needed).flip(-1)
