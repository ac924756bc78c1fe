"""Pages: runs of tokens, counted from each row's first valid token, with one summary of their keys a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from hashattention.rows import Rows
from hashattention.selectors.base import Step

#: keys ``[B, H, P, size, D]`` and present bool ``[B, 1, P, size, 1]`` -> summaries ``[B, H, P, C]``
Summarise = Callable[[Tensor, Tensor], Tensor]
#: summaries ``[B, H, P, C]`` -> scores float32 ``[B, H, G, P]``
Score = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class PageGrid:
    """Pages of `size` tokens whose borders meet the start of every row: token t of row b lies on page
    ``(t + offset[b]) // size`` with ``offset = -start % size``.

    So page p of any row is whole once the cache has ``(p + 1) * size`` slots, whatever the padding, and the number of
    pages does not depend on data.
    """

    rows: Rows
    tokens: int
    size: int

    def page_of(self) -> Tensor:
        """The page of every token, int64 ``[B, T]``."""
        position = torch.arange(self.tokens, device=self.rows.start.device)
        return (position + self._offset()) // self.size

    def spread(self, step: Step, name: Hashable, summarise: Summarise, score: Score) -> Tensor:
        """The score of each token's page by its summary, ``[B, Hkv, G, T]``: those of whole pages are kept beside the
        cache, the last ones made anew.
        """
        whole, pages = self.tokens // self.size, (self.tokens + 2 * self.size - 2) // self.size
        scores = score(summarise(*self._cut(step.key, whole, pages)))
        if whole:
            kept = step.side.extend(
                name, whole, lambda first: summarise(*self._cut(step.key, first, whole)), stride=self.size
            )
            scores = torch.cat([score(kept), scores], -1)
        page = self.page_of()[:, None, None]
        return scores.gather(-1, page.expand(*scores.shape[:3], -1))

    def _offset(self) -> Tensor:
        return (-self.rows.start.long() % self.size)[:, None]

    def _cut(self, key: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        slots = torch.arange(first * self.size, last * self.size, device=key.device) - self._offset()
        inside = (slots >= 0) & (slots < self.tokens)
        slots = slots.clamp(0, self.tokens - 1)
        present = inside & self.rows.valid(self.tokens).gather(1, slots)
        picked = key.gather(2, slots[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3]))
        shape = (last - first, self.size)
        return picked.unflatten(2, shape), present.unflatten(1, shape)[:, None, ..., None]
