"""score_select: exact counting selection: score and count levels, find the border, write the indices.

Scores have few levels, so counting them is a selection. A histogram costs in the number of its bins: up to
`DIRECT_BINS` levels are counted as they are, in two launches; more of them first by their high bits, and then, in a
launch between, the low bits of those tokens alone that lie in the border's bin. Every program of the last launch works
out from all counts where its own indices go; so nothing is passed on by atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hashattention.ops.triton.score import count_matches, planes_of, tokens_of

#: More score levels than this are refused.
MOST_LEVELS = 4096
#: Levels counted in one histogram; more are split into high bits and `LOW_BITS` low ones.
DIRECT_BINS = 128
LOW_BITS = 5


@triton.jit
def _row_bounds(start, end, budgets, request, row, tokens, capacity):
    """Valid tokens begin..stop of a row, where its sink ends and its local begins, and its heavy count."""
    begin = tl.maximum(tl.load(start + request), 0)
    stop = tl.maximum(tl.minimum(tl.load(end + request), tokens), begin)
    sink = tl.maximum(tl.load(budgets + row * 3), 0)
    local = tl.minimum(tl.maximum(tl.load(budgets + row * 3 + 1), 0), capacity)
    heavy = tl.maximum(tl.load(budgets + row * 3 + 2), 0)
    sink = tl.minimum(sink, capacity - local)
    heavy = tl.minimum(heavy, capacity - local - sink)
    sink_stop = begin + tl.minimum(sink, stop - begin)
    local_begin = tl.maximum(stop - local, sink_stop)
    return begin, stop, sink_stop, local_begin, heavy


@triton.jit
def _overlap(first, last, begin, stop):
    return tl.maximum(tl.minimum(last, stop) - tl.maximum(first, begin), 0)


@triton.jit
def _counts(table, row, chunks, CHUNKS: tl.constexpr, BINS: tl.constexpr):
    """int32 [CHUNKS, BINS]: the counts of every chunk of a row."""
    chunk, level = tl.arange(0, CHUNKS), tl.arange(0, BINS)
    place = table + (row * chunks + chunk[:, None]) * BINS + level[None, :]
    return tl.load(place, mask=(chunk < chunks)[:, None], other=0)


@triton.jit
def _border(total, wanted, BINS: tl.constexpr):
    """The highest level with at least `wanted` tokens in it and above (-1: there are fewer, all are taken), and how
    many of the level's own tokens are taken.
    """
    level = tl.arange(0, BINS)
    reached = tl.sum(total, 0) - tl.cumsum(total, 0) + total
    border = tl.max(tl.where(reached >= wanted, level, -1), 0)
    above = tl.sum(tl.where(level > border, total, 0), 0)
    return border, tl.where(border < 0, 0, wanted - above)


@triton.jit
def _score_count(
    code, signatures, table, start, end, budgets, scores, high,
    tokens, capacity, chunk_tokens, code_heads, signature_heads, s0, s1, s2, table_width, page,
    W: tl.constexpr, WP: tl.constexpr, CODES: tl.constexpr, PLANES: tl.constexpr, PAGED: tl.constexpr,
    TILE: tl.constexpr, BINS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Scores (halved and raised to 0) of a chunk's candidates, and how many have each value of the high bits."""
    chunk, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = request.to(tl.int64) * tl.num_programs(1) + head
    _, _, sink_stop, local_begin, _ = _row_bounds(start, end, budgets, request, row, tokens, capacity)
    first = chunk * chunk_tokens
    histogram = tl.zeros((BINS,), tl.int32)
    # Sink and local tokens need no score.
    low = tl.maximum(first, sink_stop)
    high_end = tl.minimum(first + chunk_tokens, local_begin)
    for tile in range(first, first + chunk_tokens, TILE):
        if (tile < high_end) & (tile + TILE > low):
            token = tile + tl.arange(0, TILE)
            inside = (token >= low) & (token < high_end)
            matches = count_matches(
                code, signatures, table, request, head, token, inside, code_heads, signature_heads, s0, s1, s2,
                table_width, page,
                W, WP, CODES, PLANES, PAGED, True,
            )  # fmt: skip
            tl.store(scores + row * tokens + token, matches.to(tl.int16), mask=inside)
            histogram += tl.histogram(matches >> SHIFT, BINS, mask=inside)
    tl.store(high + (row * tl.num_programs(0) + chunk) * BINS + tl.arange(0, BINS), histogram)


@triton.jit
def _count_low(
    scores, high, fine, start, end, budgets, tokens, capacity, chunk_tokens, heads,
    CHUNKS: tl.constexpr, BINS: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """How many of a chunk's tokens in the border's bin have each value of the low bits."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunks = tl.num_programs(0)
    _, _, sink_stop, local_begin, heavy = _row_bounds(start, end, budgets, row // heads, row, tokens, capacity)
    border, _ = _border(tl.sum(_counts(high, row, chunks, CHUNKS, BINS), 0), heavy, BINS)
    first = chunk * chunk_tokens
    low = tl.maximum(first, sink_stop)
    high_end = tl.minimum(first + chunk_tokens, local_begin)
    levels: tl.constexpr = 1 << SHIFT
    histogram = tl.zeros((levels,), tl.int32)
    for tile in range(first, first + chunk_tokens, TILE):
        if (tile < high_end) & (tile + TILE > low):
            token = tile + tl.arange(0, TILE)
            inside = (token >= low) & (token < high_end)
            matches = tl.load(scores + row * tokens + token, mask=inside, other=0).to(tl.int32)
            counted = inside & ((matches >> SHIFT) == border)
            histogram += tl.histogram(matches & (levels - 1), levels, mask=counted)
    tl.store(fine + (row * chunks + chunk) * levels + tl.arange(0, levels), histogram)


@triton.jit
def _place(
    high, fine, row, chunks, chunk_tokens, begin, sink_stop, local_begin, stop, heavy,
    CHUNKS: tl.constexpr, BINS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The border level, and of every chunk: ties it leaves out and slots it fills."""
    chunk, level = tl.arange(0, CHUNKS), tl.arange(0, BINS)
    counts = _counts(high, row, chunks, CHUNKS, BINS)
    border, ties = _border(tl.sum(counts, 0), heavy, BINS)
    above = tl.sum(tl.where(level[None, :] > border, counts, 0), 1)
    if SHIFT == 0:
        equal = tl.sum(tl.where(level[None, :] == border, counts, 0), 1)
    else:
        levels: tl.constexpr = 1 << SHIFT
        low = tl.arange(0, levels)
        counts_low = _counts(fine, row, chunks, CHUNKS, levels)
        border_low, ties = _border(tl.sum(counts_low, 0), ties, levels)
        above += tl.sum(tl.where(low[None, :] > border_low, counts_low, 0), 1)
        equal = tl.sum(tl.where(low[None, :] == border_low, counts_low, 0), 1)
        border = tl.where(border < 0, -1, border * levels + border_low)
    # Ties go to the more recent token: to the last chunks first.
    later = tl.sum(equal, 0) - tl.cumsum(equal, 0)
    take = tl.minimum(equal, tl.maximum(ties - later, 0))
    first = chunk * chunk_tokens
    covered = _overlap(first, first + chunk_tokens, begin, sink_stop)
    covered += _overlap(first, first + chunk_tokens, local_begin, stop)
    return border, equal - take, above + take + tl.where(chunk < chunks, covered, 0)


@triton.jit
def _write_indices(
    scores, high, fine, counts, start, end, budgets, indices, tokens, capacity, chunk_tokens, heads,
    CHUNKS: tl.constexpr, BINS: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunks = tl.num_programs(0)
    begin, stop, sink_stop, local_begin, heavy = _row_bounds(start, end, budgets, row // heads, row, tokens, capacity)
    border, dropped, used = _place(
        high, fine, row, chunks, chunk_tokens, begin, sink_stop, local_begin, stop, heavy, CHUNKS, BINS, SHIFT
    )
    every = tl.arange(0, CHUNKS)
    skipped = tl.sum(tl.where(every == chunk, dropped, 0), 0)
    slot = tl.sum(tl.where(every < chunk, used, 0), 0)
    count = tl.sum(used, 0)
    if chunk == 0:
        tl.store(counts + row, count)
    indices += row * capacity
    first = chunk * chunk_tokens
    for tile in range(first, first + chunk_tokens, TILE):
        if (tile < stop) & (tile + TILE > begin):
            token = tile + tl.arange(0, TILE)
            candidate = (token >= sink_stop) & (token < local_begin)
            covered = (token >= begin) & (token < stop) & (candidate == 0)
            matches = tl.load(scores + row * tokens + token, mask=candidate, other=-1).to(tl.int32)
            tied = candidate & (matches == border)
            sure = covered | (candidate & (matches > border))
            # One scan counts both: a tile has fewer than 2 ** 16 tokens.
            both = tl.cumsum((tied.to(tl.int32) << 16) + sure.to(tl.int32), 0)
            tied_rank = both >> 16
            # The chunk's earliest ties are the ones left out.
            chosen = sure | (tied & (tied_rank > skipped))
            place = slot + (both & 0xFFFF) + tl.maximum(tied_rank - skipped, 0) - 1
            tl.store(indices + place, token, mask=chosen)
            ties, sures = tl.sum(tied.to(tl.int32), 0), tl.sum(sure.to(tl.int32), 0)
            slot += sures + tl.maximum(ties - skipped, 0)
            skipped = tl.maximum(skipped - ties, 0)
    # Every chunk fills its share of the unused slots.
    share = (capacity + chunks - 1) // chunks
    last = tl.minimum(chunk * share + share, capacity)
    for begin_slot in range(chunk * share, last, TILE):
        empty = begin_slot + tl.arange(0, TILE)
        tl.store(indices + empty, tl.full((TILE,), -1, tl.int32), mask=(empty < last) & (empty >= count))


def levels_of(code: Tensor, selection_heads: int, levels: int) -> int:
    """Score levels a row can have."""
    heads = code.shape[1] // selection_heads
    return heads * (code.shape[-1] * 32 if code.dtype == torch.int32 else code.shape[-1] * levels) + 1


def bins_of(levels: int) -> tuple[int, int]:
    """Bins of the first histogram, and the low bits it leaves out."""
    bins = max(32, triton.next_power_of_2(levels))
    return (bins, 0) if bins <= DIRECT_BINS else (max(32, bins >> LOW_BITS), LOW_BITS)


def chunk_of(tokens: int, rows: int, tile: int, bins: int) -> int:
    """Tokens a program: four programs a multiprocessor where there is enough to do, and no more chunks a row than one
    program can read the counts of.
    """
    wanted = triton.cdiv(tokens * rows, 528)
    least = triton.cdiv(tokens, min(128, 4096 // bins))
    return max(tile, min(8192, triton.next_power_of_2(wanted)), triton.next_power_of_2(least))


def score_select(
    code: Tensor,
    signatures: Tensor,
    start: Tensor,
    end: Tensor,
    budgets: Tensor,
    capacity: int,
    mask: Tensor | None = None,
    block_table: Tensor | None = None,
    levels: int = 127,
) -> tuple[Tensor, Tensor]:
    """As `reference.score_select`."""
    batch, code_heads = code.shape[:2]
    heads, device = budgets.shape[1], code.device
    rows = batch * heads
    signatures = signatures if signatures.stride(-1) == 1 else signatures.contiguous()
    tokens, words = tokens_of(signatures, block_table), signatures.shape[-1]
    bins, shift = bins_of(levels_of(code, heads, levels))
    tile = 1024
    chunk_tokens = chunk_of(tokens, rows, tile, bins)
    chunks = triton.cdiv(tokens, chunk_tokens)
    scores = torch.empty(rows * tokens, dtype=torch.int16, device=device)
    scratch = torch.empty(rows * chunks * (bins + (1 << shift)), dtype=torch.int32, device=device)
    high, fine = scratch.split([rows * chunks * bins, rows * chunks << shift])
    indices = torch.empty((batch, heads, capacity), dtype=torch.int32, device=device)
    counts = torch.empty((batch, heads), dtype=torch.int32, device=device)
    start, end, budgets = start.contiguous(), end.contiguous(), budgets.contiguous()
    _score_count[(chunks, heads, batch)](
        code.contiguous(), signatures, block_table, start, end, budgets, scores, high,
        tokens, capacity, chunk_tokens, code_heads, signatures.shape[1], *signatures.stride()[:3],
        0 if block_table is None else block_table.stride(0), signatures.shape[2],
        W=words, WP=triton.next_power_of_2(words), CODES=code_heads // heads, PLANES=planes_of(code, levels),
        PAGED=block_table is not None, TILE=tile, BINS=bins, SHIFT=shift, num_warps=4,
    )  # fmt: skip
    row = start, end, budgets
    sizes = tokens, capacity, chunk_tokens, heads
    shape = {"CHUNKS": triton.next_power_of_2(chunks), "BINS": bins, "SHIFT": shift, "num_warps": 4}
    wide = min(4096, chunk_tokens)
    if shift:
        _count_low[(chunks, rows)](scores, high, fine, *row, *sizes, **shape, TILE=wide)
    _write_indices[(chunks, rows)](scores, high, fine, counts, *row, indices, *sizes, **shape, TILE=wide)
    return indices, counts
