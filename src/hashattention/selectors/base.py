"""The one abstraction: a selector looks at one decoding step of one layer and returns the tokens to attend to."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hashattention import ops
from hashattention.cache import TokenCache
from hashattention.config import BaseModel, Budget, SelectionShare
from hashattention.errors import ConfigError
from hashattention.rows import Extent, Rows
from hashattention.selectors.selection import Selection

__all__ = ["Selection", "Selector", "Step", "query_logits", "select_best"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One new token of every request at one layer.

    `query` ``[B, Hq, 1, D]``; `key` and `value` ``[B, Hkv, T, D]``, the new token included; `scale` multiplies the
    logits and `softcap` (0: none) bounds them; `side` keeps the method's own per-token tensors of this layer between
    steps. `heavy_share` is the part of the heavy budget that the method may spend, in (0, 1].
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    extent: Extent
    budget: Budget
    side: TokenCache
    heavy_share: float = 1.0
    softcap: float = 0.0

    def rows(self, share: SelectionShare) -> Rows:
        """Bounds and budgets for one index set per KV head or per query head."""
        heads = self.key.shape[1] if share == "group" else self.query.shape[1]
        return self.limit(self.extent.rows(self.budget, heads))

    def limit(self, rows: Rows) -> Rows:
        """The rows with the part of the heavy budget that the method may spend."""
        if self.heavy_share == 1.0:
            return rows
        return rows.limit_heavy((rows.budgets[..., 2].double() * self.heavy_share).floor())

    def keys(self, first: int = 0) -> Tensor:
        """The keys of this step's tokens from `first` on, ``[B, Hkv, tokens - first, D]``."""
        return self.key[:, :, first : self.extent.tokens]

    def attend(self, selection: Selection) -> Tensor:
        """Attention output ``[B, Hq, 1, D]`` of this step's queries over the selected tokens."""
        return selection.attend(self.query, self.key, self.value, scale=self.scale, softcap=self.softcap)

    def grouped_query(self) -> Tensor:
        """The queries of every KV head, float32 ``[B, Hkv, G, D]``."""
        return self.query.float().unflatten(1, (self.key.shape[1], -1)).squeeze(3)


def query_logits(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """``scale * q . k`` of queries ``[B, Hq, 1, D]`` and `keys` (or what stands for some) ``[B, Hkv, N, D]``, summed in
    float32: ``[B, Hkv, G, N]``.
    """
    if query.dtype != keys.dtype:
        query, keys = query.float(), keys.float()
    return ops.logits(query, keys, scale=scale).unflatten(1, (keys.shape[1], -1))


def select_best(scores: Tensor, rows: Rows, wanted: Tensor | None = None) -> Selection:
    """Sink, local and the heavy tokens with the highest `scores` float32 ``[B, Hsel, T]``; heavy only where `wanted`
    (bool, same shape), if given.
    """
    if wanted is not None:
        scores = scores.masked_fill(~wanted, -torch.inf)
        # Tokens that are not wanted sort last, so counting the others keeps every one of these out.
        rows = rows.limit_heavy((wanted & rows.candidates(scores.shape[-1])).sum(-1))
    return Selection(*ops.select(scores, rows.start, rows.end, rows.budgets, rows.capacity, mask=rows.mask))


class Selector(ABC):
    """A method of choosing tokens. Sink, local and the budget are the step's; the method decides what is heavy.

    Attributes
    ----------
    share : {"group", "query_head"}
        One index set per KV head, or one per query head.
    layers : tuple of int or None
        Layers it can serve (None: all); the others stay dense.
    reads_positions : bool
        It reads the tokens' rotary positions (`Extent.positions`).
    accumulates : bool
        What it keeps beside the cache grows with every step, and cannot be made again from the keys.
    """

    share: SelectionShare = "group"
    layers: tuple[int, ...] | None = None
    reads_positions: bool = False
    accumulates: bool = False

    @abstractmethod
    def select(self, step: Step) -> Selection:
        """The tokens each selection head attends to, within the step's budget."""

    def attend(self, step: Step) -> Tensor:
        """Attention output ``[B, Hq, 1, D]`` over the tokens of `select`; a method may fuse the two."""
        return step.attend(self.select(step))

    @abstractmethod
    def auxiliary_bits(self, head_dim: int) -> float:
        """Bits kept beside K and V per token and KV head, as the method really reads them."""

    def check_budget(self, budget: Budget) -> None:
        """Raise `ConfigError` unless the method can keep to `budget`: most estimate no share of the attention."""
        if budget.estimated:
            raise ConfigError(
                f"{type(self).__name__} takes no top_p or threshold (given {budget.top_p}, {budget.threshold}): its "
                "scores estimate no share of the attention. Leave them out, or serve trained maps; the method 'top_p' "
                "is the exact one."
            )

    def refuse(self, model: BaseModel) -> str | None:
        """Why the method cannot run on `model`; None if it can."""
        return None
