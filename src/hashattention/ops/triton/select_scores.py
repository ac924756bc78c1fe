"""select: an exact selection of given scores by counting their digits, one program a row.

Scores become integers of the same order, of 8 bits at a time: a histogram of the candidates that share the digits
found so far gives the next digit of the lowest score that is taken. One more pass writes the indices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hashattention.ops.triton.select import _border, _row_bounds

TILE = 4096


@triton.jit
def _key(scores, token, inside, FLOAT: tl.constexpr):
    """int32 in the order of the scores; the two zeros of a float are one."""
    bits = tl.load(scores + token, mask=inside, other=0)
    if FLOAT:
        bits = tl.where((bits & 0x7FFFFFFF) == 0, 0, bits)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits


@triton.jit
def _digit(
    scores, first, sink_stop, local_begin, lowest, wanted,
    SHIFT: tl.constexpr, FLOAT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`lowest` with one more digit, how many tokens that have all of its digits are wanted, and how many there are."""
    histogram = tl.zeros((256,), tl.int32)
    for tile in range(first, local_begin, TILE):
        token = tile + tl.arange(0, TILE)
        inside = (token >= sink_stop) & (token < local_begin)
        key = _key(scores, token, inside, FLOAT)
        value = (key >> SHIFT) & 255
        if SHIFT == 24:
            # The sign's bit comes first in the order, turned round.
            value = value ^ 128
        else:
            inside = inside & ((key >> (SHIFT + 8)) == (lowest >> (SHIFT + 8)))
        histogram += tl.histogram(value, 256, mask=inside)
    found, wanted = _border(histogram, wanted, 256)
    ties = tl.sum(tl.where(tl.arange(0, 256) == found, histogram, 0), 0)
    if SHIFT == 24:
        found = found ^ 128
    return lowest | (found << SHIFT), wanted, ties


@triton.jit
def _select(
    scores, start, end, budgets, indices, counts, tokens, capacity, heads, FLOAT: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    begin, stop, sink_stop, local_begin, heavy = _row_bounds(start, end, budgets, row // heads, row, tokens, capacity)
    scores += row * tokens
    indices += row * capacity
    wanted = tl.minimum(heavy, local_begin - sink_stop)
    first = sink_stop // TILE * TILE
    lowest, wanted, ties = _digit(scores, first, sink_stop, local_begin, 0, wanted, 24, FLOAT, TILE)
    lowest, wanted, ties = _digit(scores, first, sink_stop, local_begin, lowest, wanted, 16, FLOAT, TILE)
    lowest, wanted, ties = _digit(scores, first, sink_stop, local_begin, lowest, wanted, 8, FLOAT, TILE)
    lowest, wanted, ties = _digit(scores, first, sink_stop, local_begin, lowest, wanted, 0, FLOAT, TILE)
    # Ties go to the more recent token: the first ones are left out.
    skipped = ties - wanted
    slot = 0
    for tile in range(begin // TILE * TILE, stop, TILE):
        token = tile + tl.arange(0, TILE)
        candidate = (token >= sink_stop) & (token < local_begin)
        covered = (token >= begin) & (token < stop) & (candidate == 0)
        key = _key(scores, token, candidate, FLOAT)
        tied = candidate & (key == lowest)
        sure = covered | (candidate & (key > lowest))
        # One scan counts both: a tile has fewer than 2 ** 16 tokens.
        both = tl.cumsum((tied.to(tl.int32) << 16) + sure.to(tl.int32), 0)
        rank = both >> 16
        chosen = sure | (tied & (rank > skipped))
        place = slot + (both & 0xFFFF) + tl.maximum(rank - skipped, 0) - 1
        tl.store(indices + place, token, mask=chosen)
        held = tl.sum(tied.to(tl.int32), 0)
        slot += tl.sum(sure.to(tl.int32), 0) + tl.maximum(held - skipped, 0)
        skipped = tl.maximum(skipped - held, 0)
    tl.store(counts + row, slot)
    for empty in range(slot // TILE * TILE, capacity, TILE):
        place = empty + tl.arange(0, TILE)
        tl.store(indices + place, tl.full((TILE,), -1, tl.int32), mask=(place >= slot) & (place < capacity))


def select(
    scores: Tensor, start: Tensor, end: Tensor, budgets: Tensor, capacity: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.select`, for rows without holes and scores that are numbers."""
    batch, heads, tokens = scores.shape
    indices = torch.empty((batch, heads, capacity), dtype=torch.int32, device=scores.device)
    counts = torch.empty((batch, heads), dtype=torch.int32, device=scores.device)
    row = start.contiguous(), end.contiguous(), budgets.contiguous()
    _select[(batch * heads,)](
        scores.contiguous().view(torch.int32), *row, indices, counts, tokens, capacity, heads,
        FLOAT=scores.is_floating_point(), TILE=TILE, num_warps=16,
    )  # fmt: skip
    return indices, counts
