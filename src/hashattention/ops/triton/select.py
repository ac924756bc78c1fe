"""score_select: exact counting selection in two launches: score, count and find every row's threshold; then write
the indices.

The first launch keeps one histogram a chunk of tokens. The last program of a row to finish turns them into the
threshold, and into what every chunk must know to write its indices alone: how many of its ties to take and where its
first index goes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hashattention.ops.triton.score import count_matches, planes_of, tokens_of

#: Histogram entries; more score levels than this are refused.
MOST_LEVELS = 4096
#: int32 facts kept of a chunk: index of its first slot, ties to take, ties it has, threshold.
FACTS = 4


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
def _threshold(histograms, chunks, heavy, BINS: tl.constexpr, GROUP: tl.constexpr):
    """The level whose tokens tie at the border (-1: all are taken), and how many of the border's tokens are taken."""
    level = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    for begin in range(0, chunks, GROUP):
        chunk = begin + tl.arange(0, GROUP)
        counts = tl.load(
            histograms + chunk[:, None] * BINS + level[None, :],
            mask=(chunk < chunks)[:, None],
            other=0,
            cache_modifier=".cg",
        )
        total += tl.sum(counts, 0)
    candidates = tl.sum(total, 0)
    below = tl.cumsum(total, 0)
    reached = candidates - below + total
    border = tl.max(tl.where(reached >= heavy, level, -1), 0)
    above = tl.sum(tl.where(level > border, total, 0), 0)
    return border, tl.where(border < 0, 0, heavy - above), above + tl.where(border < 0, 0, heavy - above)


@triton.jit
def _overlap(first, last, begin, stop):
    return tl.maximum(tl.minimum(last, stop) - tl.maximum(first, begin), 0)


@triton.jit
def _plan(
    histograms, facts, chunks, chunk_tokens, begin, sink_stop, local_begin, stop, border, ties, count,
    BINS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write every chunk's facts, from the most recent chunk back: ties go to the more recent token."""
    level = tl.arange(0, BINS)
    left, slots = ties, count
    groups = (chunks + GROUP - 1) // GROUP
    for step in range(0, groups):
        chunk = (groups - 1 - step) * GROUP + tl.arange(0, GROUP)
        inside = chunk < chunks
        counts = tl.load(
            histograms + chunk[:, None] * BINS + level[None, :], mask=inside[:, None], other=0, cache_modifier=".cg"
        )
        equal = tl.sum(tl.where(level[None, :] == border, counts, 0), 1)
        above = tl.sum(tl.where(level[None, :] > border, counts, 0), 1)
        # Ties of the chunks after this one: all of the group, less those up to and with this one.
        later = tl.sum(equal, 0) - tl.cumsum(equal, 0)
        take = tl.minimum(equal, tl.maximum(left - later, 0))
        first = chunk * chunk_tokens
        covered = _overlap(first, first + chunk_tokens, begin, sink_stop) + _overlap(
            first, first + chunk_tokens, local_begin, stop
        )
        used = tl.where(inside, above + take + covered, 0)
        base = slots - tl.sum(used, 0) + tl.cumsum(used, 0) - used
        place = facts + chunk * 4
        tl.store(place, base, mask=inside)
        tl.store(place + 1, take, mask=inside)
        tl.store(place + 2, equal, mask=inside)
        tl.store(place + 3, tl.zeros_like(chunk) + border, mask=inside)
        left = tl.maximum(left - tl.sum(equal, 0), 0)
        slots -= tl.sum(used, 0)


@triton.jit
def _score_count(
    code, signatures, table, start, end, budgets, scores, histograms, facts, tickets, counts,
    tokens, capacity, chunk_tokens, code_heads, signature_heads, s0, s1, s2, table_width, page,
    W: tl.constexpr, WP: tl.constexpr, CODES: tl.constexpr, PLANES: tl.constexpr, PAGED: tl.constexpr,
    TILE: tl.constexpr, BINS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    chunk, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    chunks = tl.num_programs(0)
    row = request.to(tl.int64) * tl.num_programs(1) + head
    begin, stop, sink_stop, local_begin, heavy = _row_bounds(start, end, budgets, request, row, tokens, capacity)
    first = chunk * chunk_tokens
    histogram = tl.zeros((BINS,), tl.int32)
    # Sink and local tokens need no score.
    low = tl.maximum(first, sink_stop)
    high = tl.minimum(first + chunk_tokens, local_begin)
    for tile in range(first, first + chunk_tokens, TILE):
        if (tile < high) & (tile + TILE > low):
            token = tile + tl.arange(0, TILE)
            inside = (token >= low) & (token < high)
            matches = count_matches(
                code, signatures, table, request, head, token, inside, code_heads, signature_heads, s0, s1, s2,
                table_width, page,
                W, WP, CODES, PLANES, PAGED, True,
            )  # fmt: skip
            tl.store(scores + row * tokens + token, matches.to(tl.int16), mask=inside)
            histogram += tl.histogram(matches, BINS, mask=inside)
    tl.store(histograms + (row * chunks + chunk) * BINS + tl.arange(0, BINS), histogram)
    tl.debug_barrier()
    if tl.atomic_add(tickets + row, 1, sem="acq_rel") == chunks - 1:
        border, ties, taken = _threshold(histograms + row * chunks * BINS, chunks, heavy, BINS, GROUP)
        count = (sink_stop - begin) + (stop - local_begin) + taken
        tl.store(counts + row, count)
        _plan(
            histograms + row * chunks * BINS, facts + row * chunks * 4, chunks, chunk_tokens,
            begin, sink_stop, local_begin, stop, border, ties, count, BINS, GROUP,
        )  # fmt: skip


@triton.jit
def _write_indices(
    scores, facts, counts, start, end, budgets, indices, tokens, capacity, chunk_tokens, heads, TILE: tl.constexpr
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunks = tl.num_programs(0)
    begin, stop, sink_stop, local_begin, _ = _row_bounds(start, end, budgets, row // heads, row, tokens, capacity)
    place = facts + (row * chunks + chunk) * 4
    slot, take, equal, border = tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)
    skipped = equal - take
    indices += row * capacity
    first = chunk * chunk_tokens
    for tile in range(first, first + chunk_tokens, TILE):
        if (tile < stop) & (tile + TILE > begin):
            token = tile + tl.arange(0, TILE)
            candidate = (token >= sink_stop) & (token < local_begin)
            covered = (token >= begin) & (token < stop) & (candidate == 0)
            matches = tl.load(scores + row * tokens + token, mask=candidate, other=-1).to(tl.int32)
            tied = (candidate & (matches == border)).to(tl.int32)
            # The chunk's earliest ties are the ones left out.
            kept = (tied > 0) & (tl.cumsum(tied, 0) > skipped)
            chosen = (covered | (candidate & (matches > border)) | kept).to(tl.int32)
            tl.store(indices + slot + tl.cumsum(chosen, 0) - 1, token, mask=chosen > 0)
            skipped -= tl.sum(tied, 0)
            slot += tl.sum(chosen, 0)
    # Every chunk fills its share of the unused slots.
    count = tl.load(counts + row)
    share = (capacity + chunks - 1) // chunks
    last = tl.minimum(chunk * share + share, capacity)
    for begin_slot in range(chunk * share, last, TILE):
        empty = begin_slot + tl.arange(0, TILE)
        tl.store(indices + empty, tl.full((TILE,), -1, tl.int32), mask=(empty < last) & (empty >= count))


def levels_of(code: Tensor, selection_heads: int, levels: int) -> int:
    """Score levels a row can have."""
    heads = code.shape[1] // selection_heads
    return heads * (code.shape[-1] * 32 if code.dtype == torch.int32 else code.shape[-1] * levels) + 1


def chunk_of(tokens: int, rows: int, tile: int) -> int:
    """Tokens a program: at least two programs a multiprocessor where there is enough to do, at most 64 chunks a row."""
    wanted = triton.cdiv(tokens * rows, 528)
    least = triton.cdiv(tokens, 64)
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
    tickets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.score_select`; `tickets` are int32 zeros, one a row (made here if not given)."""
    batch, code_heads = code.shape[:2]
    heads, device = budgets.shape[1], code.device
    rows = batch * heads
    signatures = signatures if signatures.stride(-1) == 1 else signatures.contiguous()
    tokens, words = tokens_of(signatures, block_table), signatures.shape[-1]
    bins = max(16, triton.next_power_of_2(levels_of(code, heads, levels)))
    tile = 1024
    chunk_tokens = chunk_of(tokens, rows, tile)
    chunks = triton.cdiv(tokens, chunk_tokens)
    scores = torch.empty(rows * tokens, dtype=torch.int16, device=device)
    scratch = torch.empty(rows * chunks * (bins + FACTS), dtype=torch.int32, device=device)
    histograms, facts = scratch.split([rows * chunks * bins, rows * chunks * FACTS])
    if tickets is None:
        tickets = torch.zeros(rows, dtype=torch.int32, device=device)
    indices = torch.empty((batch, heads, capacity), dtype=torch.int32, device=device)
    counts = torch.empty((batch, heads), dtype=torch.int32, device=device)
    start, end, budgets = start.contiguous(), end.contiguous(), budgets.contiguous()
    _score_count[(chunks, heads, batch)](
        code.contiguous(), signatures, block_table, start, end, budgets, scores, histograms, facts, tickets, counts,
        tokens, capacity, chunk_tokens, code_heads, signatures.shape[1], *signatures.stride()[:3],
        0 if block_table is None else block_table.stride(0), signatures.shape[2],
        W=words, WP=triton.next_power_of_2(words), CODES=code_heads // heads, PLANES=planes_of(code, levels),
        PAGED=block_table is not None, TILE=tile, BINS=bins, GROUP=max(1, min(16, 8192 // bins)), num_warps=4,
    )  # fmt: skip
    _write_indices[(chunks, rows)](
        scores,
        facts,
        counts,
        start,
        end,
        budgets,
        indices,
        tokens,
        capacity,
        chunk_tokens,
        heads,
        TILE=tile,
        num_warps=4,
    )
    return indices, counts
