"""The remainder: all tokens that were not selected, for which their mean key and mean value stand."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hashattention import ops
from hashattention.cache import TokenCache
from hashattention.rows import Extent, Rows

SUMS = "sums"
#: Sums are kept at the end of every block of this many tokens; a last block that is not whole stays out of the mean.
BLOCK = 256
#: Tokens summed at once: bounds the copies that a long prompt takes.
CHUNK = 32 * BLOCK


class Remainder(NamedTuple):
    """What `ops.add_remainder` takes of a step besides its attention, and `ops.decode` as a whole: sums float32
    ``[B, Hkv, D + Dv + 1]``, lengths int32 ``[B]``, coefficients float32 ``[Hq, 3]``.
    """

    sums: Tensor
    lengths: Tensor
    coefficients: Tensor

    def add(
        self, out: Tensor, logsumexp: Tensor, query: Tensor, taken: Tensor, *, scale: float, softcap: float
    ) -> Tensor:
        """Attention `out` over `taken` int32 ``[B, Hsel]`` tokens, with the mean value for the others."""
        known = self.sums, taken, self.lengths, self.coefficients
        return ops.add_remainder(out, logsumexp, query, *known, scale=scale, softcap=softcap)


def running_sums(key: Tensor, value: Tensor, rows: Rows, extent: Extent, side: TokenCache) -> Tensor | None:
    """The keys and values of all valid tokens in whole blocks of the cache, summed, and their number: float32
    ``[B, Hkv, D + Dv + 1]``; None where no block is whole.

    Each block's sum is made once and holds all before it, so that a step reads one row of them, and a crop goes back.
    Blocks are of slots, padding counted: it moves the border behind which the newest tokens are left out of the mean.
    """
    whole = extent.tokens // BLOCK
    if not whole:
        return None

    def make(first: int) -> Tensor:
        valid = rows.valid(whole * BLOCK)
        starts = range(first * BLOCK, whole * BLOCK, CHUNK)
        spans = [slice(start, min(start + CHUNK, whole * BLOCK)) for start in starts]
        sums = torch.cat([sum_blocks(key[:, :, s], value[:, :, s], valid[:, s]) for s in spans], 2).cumsum(2)
        return sums + side.held(SUMS)[:, :, -1:] if first else sums

    sums = side.extend(SUMS, whole, make, stride=BLOCK)
    if extent.ends_full:
        return sums[:, :, -1]
    # Slots may lie behind every row's end, in a cache with room: the last block that is filled is known there alone.
    filled = extent.whole_blocks(BLOCK)
    return sums.index_select(2, (filled - 1).clamp(min=0)).squeeze(2) * (filled > 0)


def sum_blocks(key: Tensor, value: Tensor, valid: Tensor) -> Tensor:
    """float32 ``[B, Hkv, blocks, D + Dv + 1]`` of keys and values ``[B, Hkv, T, D]``, valid bool ``[B, T]``."""
    hidden = ~valid[:, None, :, None]
    sums = [part.masked_fill(hidden, 0).unflatten(2, (-1, BLOCK)).sum(3, dtype=torch.float32) for part in (key, value)]
    number = valid.unflatten(1, (-1, BLOCK)).sum(2, dtype=torch.float32)[:, None, :, None]
    return torch.cat([*sums, number.expand(-1, key.shape[1], -1, -1)], -1)
