"""Selection by estimated attention logits, per query head or pooled over a group: what most methods share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor

from hashattention import ops
from hashattention.config import SelectionShare
from hashattention.errors import ConfigError
from hashattention.rows import Rows
from hashattention.selectors.base import Selection, Selector, Step, select_best

Pooling = Literal["peak_max", "peak_sum", "mean", "rank", "logits"]


def pool_group(logits: Tensor, pooling: Pooling, rows: Rows) -> Tensor:
    """One score per token and KV head from the logits of its group's heads; only their order has a meaning.

    Parameters
    ----------
    logits : Tensor, float32 ``[B, Hkv, G, T]``
        Tokens outside `rows` count for nothing, whatever theirs are.
    pooling : str
        ``"peak_max"`` and ``"peak_sum"``: attention weights divided by their head's peak, maximum or sum over heads
        (no head is outvoted); ``"mean"``: mean of the attention weights; ``"rank"``: the best rank among the
        candidates in any head; ``"logits"``: mean of the logits.
    rows : Rows

    Returns
    -------
    Tensor, float32 ``[B, Hkv, T]``
    """
    tokens = logits.shape[-1]
    if pooling == "rank":
        ranked = logits.masked_fill(~rows.candidates(tokens)[:, :, None], -torch.inf).flip(-1)
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        place = torch.arange(tokens, device=order.device).expand_as(order)
        return -torch.empty_like(order).scatter_(-1, order, place).flip(-1).amin(2).float()
    if pooling == "mean" or rows.mask is not None:
        logits = logits.masked_fill(~rows.valid(tokens)[:, None, None], -torch.inf)
    if pooling == "mean":
        total = logits.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
        return (logits - total).logsumexp(2)
    return ops.pool(logits, rows.start, rows.end, pooling)


class ScoredSelector(Selector):
    """A method that estimates attention logits; the budget's heavy tokens are those with the highest.

    Parameters
    ----------
    share : {"group", "query_head"}
        One index set per KV head (each K and V row is read once for the group), or one per query head.
    pooling : str
        How the estimates of a group become one score (see `pool_group`); of no effect per query head.
    """

    def __init__(self, share: SelectionShare = "group", pooling: Pooling = "peak_max") -> None:
        require_choice("share", share, get_args(SelectionShare))
        require_choice("pooling", pooling, get_args(Pooling))
        self.share, self.pooling = share, pooling

    @abstractmethod
    def estimate(self, step: Step) -> Tensor:
        """Estimated attention logits of every query head and token, float32 ``[B, Hkv, G, T]``."""

    def select(self, step: Step) -> Selection:
        """Score every token by its estimated logit and take the best."""
        rows, tokens = step.rows(self.share), step.extent.tokens
        logits = self.estimate(step)
        if self.share == "group":
            return select_best(pool_group(logits, self.pooling, rows), rows)
        logits = logits.masked_fill(~rows.valid(tokens)[:, None, None], -torch.inf)
        peak = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
        return select_best((logits - peak).flatten(1, 2), rows)


def require_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise `ConfigError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}; given {value!r}.")


def require_count(name: str, value: int) -> None:
    """Raise `ConfigError` unless `value` is a whole number of at least 1."""
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number >= 1; given {value!r}.")
