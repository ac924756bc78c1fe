"""The one abstraction: a selector looks at one decoding step of one layer and returns the tokens to attend to."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod

from torch import Tensor

from hashattention.cache import TokenCache
from hashattention.config import Budget, SelectionShare
from hashattention.rows import Extent, Rows


@dataclasses.dataclass(frozen=True)
class Selection:
    """indices int32 ``[B, Hsel, K]`` (ascending, packed left, -1 = none) and counts int32 ``[B, Hsel]``."""

    indices: Tensor
    counts: Tensor


@dataclasses.dataclass(frozen=True)
class Step:
    """One new token of every request at one layer.

    `query` ``[B, Hq, 1, D]``; `key` and `value` ``[B, Hkv, T, D]``, the new token included; `scale` multiplies the
    logits; `side` keeps the method's own per-token tensors of this layer between steps.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    extent: Extent
    budget: Budget
    side: TokenCache

    def rows(self, share: SelectionShare) -> Rows:
        """Bounds and budgets for one index set per KV head or per query head."""
        return self.extent.rows(self.budget, self.key.shape[1] if share == "group" else self.query.shape[1])


class Selector(ABC):
    """A method of choosing tokens. Sink, local and the budget are the step's; the method decides what is heavy.

    Attributes
    ----------
    share : {"group", "query_head"}
        One index set per KV head, or one per query head.
    layers : tuple of int or None
        Layers it can serve (None: all); the others stay dense.
    """

    share: SelectionShare = "group"
    layers: tuple[int, ...] | None = None

    @abstractmethod
    def select(self, step: Step) -> Selection:
        """The tokens each selection head attends to, within the step's budget."""

    @abstractmethod
    def auxiliary_bits(self, head_dim: int) -> float:
        """Bits kept beside K and V per token and KV head, as the method really reads them."""
