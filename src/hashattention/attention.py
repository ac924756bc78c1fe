"""The whole algorithm on one page: select, then attend (a selector may fuse the two); or dense attention where
selecting does not pay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from hashattention.cache import TokenCache
from hashattention.config import Budget
from hashattention.errors import ConfigError
from hashattention.rows import Extent
from hashattention.selectors.base import Selection, Selector, Step

Observer = Callable[[Step, Selection, Tensor], None]


@dataclasses.dataclass(frozen=True)
class SparseAttention:
    """How a model's attention is to be served.

    Parameters
    ----------
    selector : Selector
        The method that chooses tokens.
    budget : Budget
        How many.
    min_context : int
        Shorter caches (in tokens, padding included) are attended densely.
    dense_layers : tuple of int
        Layers that always stay dense.
    sparse_tail : int
        How many of the last positions of a prefill are sparse too (0: prefill is dense; the paper's evaluation uses 32
        or 128).
    observer : callable, optional
        Called as ``observer(step, selection, out)`` after every sparse step; for measuring, not for serving.
    """

    selector: Selector
    budget: Budget
    min_context: int = 1024
    dense_layers: tuple[int, ...] = ()
    sparse_tail: int = 0
    observer: Observer | None = None

    def __post_init__(self) -> None:
        for name in ("min_context", "sparse_tail"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be >= 0 tokens; given {getattr(self, name)}.")
        self.selector.check_budget(self.budget)

    def sparse_positions(self, layer: int, queries: int, tokens: int) -> int:
        """How many of the last query positions of this call are sparse; 0 where the layer, the context or the budget
        says dense.
        """
        unserved = self.selector.layers is not None and layer not in self.selector.layers
        covered = self.budget.capacity(tokens) >= tokens and not self.budget.estimated
        if unserved or covered or layer in self.dense_layers or tokens < self.min_context:
            return 0
        return 1 if queries == 1 else min(self.sparse_tail, queries)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        extent: Extent,
        side: TokenCache,
        scale: float,
        softcap: float,
        dense: Callable[[], Tensor],
    ) -> Tensor:
        """Attention output ``[B, Hq, Tq, D]`` of one layer; `dense` computes the model's own and is called only if
        needed.
        """
        queries = query.shape[2]
        sparse = self.sparse_positions(layer, queries, extent.tokens)
        if not sparse:
            return dense()
        outputs = [] if sparse == queries else [dense()[:, :, : queries - sparse]]
        for later in reversed(range(sparse)):
            position = queries - 1 - later
            seen = extent.before(later) if later else extent
            one = query[:, :, position : position + 1]
            step = Step(layer, one, key, value, scale, seen, self.budget, side, softcap=softcap)
            outputs.append(self._observed(step) if self.observer else self.selector.attend(step))
        return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]

    def _observed(self, step: Step) -> Tensor:
        """`Selector.attend` in its two parts, so that the observer sees what was selected."""
        assert self.observer is not None
        selection = self.selector.select(step)
        out = step.attend(selection)
        self.observer(step, selection, out)
        return out
