"""Rows: which tokens each request of a ragged batch may attend to, and its budget, as device tensors."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hashattention.config import Budget

#: So that a third of 300 is 100, whatever the last bit of a share.
ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Rows:
    """The bounds and budgets that `ops.select` takes: start, end int32 ``[B]``, budgets int32 ``[B, Hsel, 3]``, mask
    bool ``[B, T]``.
    """

    start: Tensor
    end: Tensor
    budgets: Tensor
    capacity: int
    mask: Tensor | None = None

    def valid(self, tokens: int) -> Tensor:
        """Which of the first `tokens` slots of the cache may be attended to, bool ``[B, tokens]``."""
        position = torch.arange(tokens, device=self.start.device)
        inside = (position >= self.start[:, None]) & (position < self.end[:, None])
        return inside if self.mask is None else inside & self.mask[:, :tokens]

    def candidates(self, tokens: int) -> Tensor:
        """The valid tokens that are neither sink nor local, bool ``[B, Hsel, tokens]``: heavy is chosen from these."""
        valid = self.valid(tokens)[:, None]
        if self.mask is None:
            position, bounds = torch.arange(tokens, device=self.start.device), (self.start, self.end)
            first, last = (bound[:, None, None] for bound in bounds)
            sink, local = self.budgets[..., :1], self.budgets[..., 1:2]
            return valid & (position >= first + sink) & (position < last - local)
        before = valid.cumsum(-1) - 1
        after = valid.sum(-1, keepdim=True) - 1 - before
        return valid & (before >= self.budgets[..., :1]) & (after >= self.budgets[..., 1:2])

    def limit_heavy(self, heavy: Tensor) -> Rows:
        """The same rows with at most `heavy` ``[B, Hsel]`` heavy tokens each."""
        fewer = torch.minimum(self.budgets[..., 2], heavy.to(torch.int32))
        return dataclasses.replace(self, budgets=torch.cat([self.budgets[..., :2], fewer[..., None]], -1))


def count_budget(budget: Budget, lengths: Tensor) -> Tensor:
    """`Budget.counts` for a tensor of lengths ``[B]``, on its device: int32 ``[B, 3]`` (sink, local, heavy)."""
    # Scalars enter through clamp alone: a tensor made from one would wait for the device.
    length = lengths.to(torch.int64)
    if budget.density is not None:
        total = torch.minimum((length.double() * budget.density).floor().long().clamp(min=1), length)
        local = torch.minimum((total - budget.sink).clamp(min=1).clamp(max=budget.local), total)
        sink = (total - local).clamp(max=budget.sink)
        heavy = total - sink - local
    else:
        sink = length.clamp(max=budget.sink)
        local = (length - sink).clamp(max=budget.local)
        heavy = length - sink - local
        if isinstance(budget.heavy, float):
            heavy = torch.minimum((length.double() * budget.heavy).floor().long(), heavy)
        else:
            heavy = heavy.clamp(max=int(budget.heavy or 0))
    return torch.stack([sink, local, heavy], -1).to(torch.int32)


class Extent:
    """The valid tokens of every request in a cache of `tokens` slots; its rows are built once per budget.

    Parameters
    ----------
    start, end : Tensor, int32 ``[B]``
        Request b holds tokens ``start[b] <= t < end[b]``.
    tokens : int
        T, slots of the cache (host-side, so that shapes never depend on data).
    mask : Tensor, bool ``[B, T]``, optional
        Holes inside start..end.
    ends_full : bool
        Known on the host: every request's last token is in the cache's last slot.
    by_slot : bool
        A token's rotary position is its slot, padding counted; by default it is its place among the valid tokens.
    """

    def __init__(
        self,
        start: Tensor,
        end: Tensor,
        tokens: int,
        mask: Tensor | None = None,
        ends_full: bool = False,
        by_slot: bool = False,
    ) -> None:
        self.start, self.end, self.tokens, self.mask, self.ends_full = start, end, tokens, mask, ends_full
        self.by_slot = by_slot
        self._positions: dict[tuple[int, int], Tensor] = {}
        self._rows: dict[tuple[Budget, int], Rows] = {}
        self._scaled: dict[tuple[Budget, int], Tensor] = {}
        self._before: dict[int, Extent] = {}
        self._lengths: Tensor | None = None
        self._whole: dict[int, Tensor] = {}

    @classmethod
    def full(cls, batch: int, tokens: int, device: torch.device) -> Extent:
        """Every slot valid."""
        start = torch.zeros(batch, dtype=torch.int32, device=device)
        return cls(start, start + tokens, tokens, ends_full=True)

    @classmethod
    def from_mask(cls, mask: Tensor, holes: bool = True, by_slot: bool = False) -> Extent:
        """From a mask ``[B, T]`` (nonzero = a real token); `holes` says whether padding may lie between real tokens."""
        valid = mask.bool()
        tokens = mask.shape[1]
        position = torch.arange(tokens, device=mask.device)
        end = torch.where(valid, position + 1, 0).amax(1).to(torch.int32)
        start = torch.where(valid, position, tokens).amin(1).to(torch.int32)
        return cls(torch.minimum(start, end), end, tokens, valid if holes else None, by_slot=by_slot)

    def before(self, tokens: int) -> Extent:
        """The same requests when the last `tokens` slots of the cache did not exist yet; built once for all layers."""
        if tokens not in self._before:
            kept = self.tokens - tokens
            mask = None if self.mask is None else self.mask[:, :kept]
            bounds = self.start.clamp(max=kept), self.end.clamp(max=kept)
            self._before[tokens] = Extent(*bounds, kept, mask, by_slot=self.by_slot)
        return self._before[tokens]

    def positions(self, first: int, last: int) -> Tensor:
        """Rotary positions of slots ``first <= t < last``, int32 ``[B, last - first]``; those of padding mean nothing.
        Built once for all layers.
        """
        if (first, last) not in self._positions:
            slots = torch.arange(first, last, dtype=torch.int32, device=self.start.device)
            if self.by_slot:
                found = slots.expand(len(self.start), -1)
            elif self.mask is None:
                found = slots - self.start[:, None]
            else:
                found = (self.mask.cumsum(1, dtype=torch.int32) - 1)[:, first:last]
            self._positions[first, last] = found
        return self._positions[first, last]

    def last_positions(self) -> Tensor:
        """Rotary position of every request's last valid token, int32 ``[B, 1]``."""
        return ((self.end if self.by_slot else self.lengths()) - 1)[:, None]

    def lengths(self) -> Tensor:
        """Valid tokens of every request, int32 ``[B]``; counted once."""
        if self._lengths is None:
            whole = (self.end - self.start).clamp(min=0) if self.mask is None else self.mask.sum(1, dtype=torch.int32)
            self._lengths = whole
        return self._lengths

    def whole_blocks(self, size: int) -> Tensor:
        """How many blocks of `size` slots are filled, int64 ``[1]``, where `tokens` counts slots that are not; counted
        once for all layers.
        """
        if size not in self._whole:
            self._whole[size] = self.end.amax().long().reshape(1) // size
        return self._whole[size]

    def rows(self, budget: Budget, selection_heads: int) -> Rows:
        """Bounds and budgets for `selection_heads` index sets a request."""
        key = budget, selection_heads
        if key not in self._rows:
            budgets = count_budget(budget, self.lengths())[:, None].expand(-1, selection_heads, -1).contiguous()
            capacity = budget.capacity(self.tokens)
            self._rows[key] = Rows(self.start, self.end, budgets, capacity, self.mask)
        return self._rows[key]

    def rows_of_layer(self, budget: Budget, shares: Shares, row: int) -> Rows:
        """`rows` with the heavy budget of each index set multiplied by its share; all layers' are made at once."""
        rows = self.rows(budget, shares.table.shape[1])
        key = budget, id(shares)
        if key not in self._scaled:
            self._scaled[key] = scale_heavy(rows.budgets, self.lengths()[:, None], shares.table[:, None])
        sink, local, heavy = budget.counts(self.tokens)
        most = min(int(heavy * shares.largest[row] + ROUNDING), self.tokens - sink - local)
        capacity = max(1, sink + local + most)
        return dataclasses.replace(rows, budgets=self._scaled[key][row], capacity=capacity)


@dataclasses.dataclass(frozen=True, eq=False)
class Shares:
    """Multiples of the heavy budget: `table` float64 ``[L, Hsel]`` on the device, and each layer's `largest` on the
    host.
    """

    table: Tensor
    largest: tuple[float, ...]

    @classmethod
    def of(cls, shares: tuple[tuple[float, ...], ...], device: torch.device) -> Shares:
        """From plain numbers."""
        return cls(torch.tensor(shares, dtype=torch.float64, device=device), tuple(max(row) for row in shares))


def scale_heavy(budgets: Tensor, lengths: Tensor, shares: Tensor) -> Tensor:
    """Budgets int32 ``[..., 3]`` with heavy multiplied by `shares` (float64), rounded down and at most what is left of
    `lengths`; sink and local stay. All broadcast to one shape.
    """
    fixed = budgets[..., 0] + budgets[..., 1]
    wanted = (budgets[..., 2].double() * shares + ROUNDING).floor().to(torch.int32)
    heavy = torch.minimum(wanted, lengths - fixed)
    others = budgets[..., :2].expand(*heavy.shape, 2)
    return torch.cat([others, heavy[..., None]], -1).contiguous()
