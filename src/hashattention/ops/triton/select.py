"""score_select: exact counting selection in two launches: score and count levels; find the border, write the indices.

Scores have few levels, so counting them is a selection. A histogram costs in the number of its bins: more than
`DIRECT_BINS` levels are counted in a window alone, laid low enough by an even sample of the row that its border lies in
the window or above. What lies above is little and counted level by level, by atomics on the program's own table. Where
the sample was wrong and the border lies below, the second launch counts the stored scores again: slower, with the same
result. Every program of it works out from the counts where its own indices go.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hashattention.ops.shapes import mixture_of
from hashattention.ops.triton.score import count_matches, planes_of, tokens_of

#: More score levels than this are refused: two digits of 6 bits.
MOST_LEVELS = 4096
#: Up to so many levels are counted as they are.
DIRECT_BINS = 128
#: Tokens the window is guessed from, at most.
SAMPLES = tl.constexpr(512)


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
def _window(
    code, signatures, table, request, head, sink_stop, local_begin, heavy,
    code_heads, signature_heads, s0, s1, s2, table_width, page,
    W: tl.constexpr, WP: tl.constexpr, CODES: tl.constexpr, PLANES: tl.constexpr, MIXED: tl.constexpr,
    PAGED: tl.constexpr, BINS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """The window's first level, which counts all that lie below it too: beneath the border of a sample of the
    candidates, taken three deviations of its count lower.
    """
    # An odd step keeps clear of what repeats every 2 ** n tokens.
    step = ((local_begin - sink_stop + SAMPLES - 1) // SAMPLES) | 1
    token = sink_stop + tl.arange(0, SAMPLES) * step
    inside = token < local_begin
    matches = count_matches(
        code, signatures, table, request, head, token, inside, code_heads, signature_heads, s0, s1, s2, table_width,
        page,
        W, WP, CODES, PLANES, MIXED, PAGED, True,
    )  # fmt: skip
    width: tl.constexpr = LEVELS // BINS
    wanted = (heavy + step - 1) // step
    wanted += 3 + (3 * tl.sqrt(wanted.to(tl.float32))).to(tl.int32)
    border, _ = _border(tl.histogram(matches // width, BINS, mask=inside), wanted, BINS)
    return tl.minimum(tl.maximum(border * width - 1, 0), LEVELS - BINS)


@triton.jit
def _score_count(
    code, signatures, table, start, end, budgets, scores, windows, counted, tails,
    tokens, capacity, chunk_tokens, code_heads, signature_heads, s0, s1, s2, table_width, page,
    W: tl.constexpr, WP: tl.constexpr, CODES: tl.constexpr, PLANES: tl.constexpr, MIXED: tl.constexpr,
    PAGED: tl.constexpr, TILE: tl.constexpr, BINS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Scores (halved and raised to 0) of a chunk's candidates, and how many have each level of the row's window and of
    what lies above.
    """
    chunk, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = request.to(tl.int64) * tl.num_programs(1) + head
    _, _, sink_stop, local_begin, heavy = _row_bounds(start, end, budgets, request, row, tokens, capacity)
    first = chunk * chunk_tokens
    # Sink and local tokens need no score, nor do candidates that are all taken or none.
    low = tl.maximum(first, sink_stop)
    scored = (heavy > 0) & (heavy < local_begin - sink_stop)
    high = tl.where(scored, tl.minimum(first + chunk_tokens, local_begin), low)
    place = row * tl.num_programs(0) + chunk
    window = 0
    if BINS < LEVELS:
        if low < high:
            window = _window(
                code, signatures, table, request, head, sink_stop, local_begin, heavy,
                code_heads, signature_heads, s0, s1, s2, table_width, page,
                W, WP, CODES, PLANES, MIXED, PAGED, BINS, LEVELS,
            )  # fmt: skip
            if low == sink_stop:
                tl.store(windows + row, window)
        tails += place * LEVELS
        tl.store(tails + tl.arange(0, LEVELS), tl.zeros((LEVELS,), tl.int32))
        tl.debug_barrier()
    histogram = tl.zeros((BINS,), tl.int32)
    for tile in range(first, first + chunk_tokens, TILE):
        if (tile < high) & (tile + TILE > low):
            token = tile + tl.arange(0, TILE)
            inside = (token >= low) & (token < high)
            matches = count_matches(
                code, signatures, table, request, head, token, inside, code_heads, signature_heads, s0, s1, s2,
                table_width, page,
                W, WP, CODES, PLANES, MIXED, PAGED, True,
            )  # fmt: skip
            tl.store(scores + row * tokens + token, matches.to(tl.int16), mask=inside)
            if BINS < LEVELS:
                tl.atomic_add(tails + matches, 1, mask=inside & (matches >= window + BINS - 1), sem="relaxed")
                matches = tl.minimum(tl.maximum(matches - window, 0), BINS - 1)
            histogram += tl.histogram(matches, BINS, mask=inside)
    tl.store(counted + place * BINS + tl.arange(0, BINS), histogram)


@triton.jit
def _find_border(counted, row, chunk, chunks, wanted, BINS: tl.constexpr):
    """The border's bin, how many of the row's tokens in it are left out, and the tokens of earlier chunks above and in
    it.
    """
    block: tl.constexpr = 2048 // BINS if BINS <= 2048 else 1
    level = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    earlier = tl.zeros((BINS,), tl.int32)
    for begin in range(0, chunks, block):
        other = begin + tl.arange(0, block)
        place = counted + (row * chunks + other[:, None]) * BINS + level[None, :]
        counts = tl.load(place, mask=(other < chunks)[:, None], other=0)
        total += tl.sum(counts, 0)
        earlier += tl.sum(tl.where((other < chunk)[:, None], counts, 0), 0)
    border, ties = _border(total, wanted, BINS)
    dropped = tl.sum(tl.where(level == border, total, 0), 0) - ties
    above = tl.sum(tl.where(level > border, earlier, 0), 0)
    return border, dropped, above, tl.sum(tl.where(level == border, earlier, 0), 0)


@triton.jit
def _count_digit(scores, sink_stop, local_begin, lead, SHIFT: tl.constexpr, TILE: tl.constexpr):
    """How many candidates whose bits above are `lead` have each value of the 6 bits from SHIFT on."""
    histogram = tl.zeros((64,), tl.int32)
    for tile in range(sink_stop // TILE * TILE, local_begin, TILE):
        token = tile + tl.arange(0, TILE)
        inside = (token >= sink_stop) & (token < local_begin)
        matches = tl.load(scores + token, mask=inside, other=0).to(tl.int32)
        histogram += tl.histogram((matches >> SHIFT) & 63, 64, mask=inside & ((matches >> (SHIFT + 6)) == lead))
    return histogram


@triton.jit
def _find_border_again(scores, sink_stop, local_begin, first, wanted, TILE: tl.constexpr):
    """As `_find_border`, from a row's scores, for the chunk that begins at `first`."""
    lead, wanted = _border(_count_digit(scores, sink_stop, local_begin, 0, 6, TILE), wanted, 64)
    counts = _count_digit(scores, sink_stop, local_begin, lead, 0, TILE)
    digit, ties = _border(counts, wanted, 64)
    dropped = tl.sum(tl.where(tl.arange(0, 64) == digit, counts, 0), 0) - ties
    border = lead * 64 + digit
    above, equal = 0, 0
    for tile in range(sink_stop // TILE * TILE, tl.minimum(first, local_begin), TILE):
        token = tile + tl.arange(0, TILE)
        inside = (token >= sink_stop) & (token < tl.minimum(first, local_begin))
        matches = tl.load(scores + token, mask=inside, other=-1).to(tl.int32)
        above += tl.sum((matches > border).to(tl.int32), 0)
        equal += tl.sum((matches == border).to(tl.int32), 0)
    return border, dropped, above, equal


@triton.jit
def _write_indices(
    scores, windows, counted, tails, counts, start, end, budgets, indices, tokens, capacity, chunk_tokens, heads,
    BINS: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The indices of a chunk's tokens that are taken, at their places in the row."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunks = tl.num_programs(0)
    begin, stop, sink_stop, local_begin, heavy = _row_bounds(start, end, budgets, row // heads, row, tokens, capacity)
    scores += row * tokens
    first = chunk * chunk_tokens
    candidates = local_begin - sink_stop
    scored = (heavy > 0) & (heavy < candidates)
    # Unless scores decide, all candidates lie above the border or none does.
    border = tl.where(heavy > 0, -1, LEVELS)
    dropped = 0
    equal = 0
    above = tl.where(heavy > 0, _overlap(0, first, sink_stop, local_begin), 0)
    if scored:
        border, dropped, above, equal = _find_border(counted, row, chunk, chunks, heavy, BINS)
        if BINS < LEVELS:
            window = tl.load(windows + row)
            # The window's ends are single levels only where the levels themselves end.
            below = (border == 0) & (window > 0)
            beyond = (border == BINS - 1) & (window < LEVELS - BINS)
            border += window
            if beyond:
                border, dropped, above, equal = _find_border(tails, row, chunk, chunks, heavy, LEVELS)
            if below:
                border, dropped, above, equal = _find_border_again(scores, sink_stop, local_begin, first, heavy, TILE)
    # Ties go to the more recent token: the row's earliest are the ones left out.
    skipped = tl.maximum(dropped - equal, 0)
    slot = above + tl.maximum(equal - dropped, 0)
    slot += _overlap(0, first, begin, sink_stop) + _overlap(0, first, local_begin, stop)
    count = stop - begin - candidates + tl.minimum(heavy, candidates)
    if chunk == 0:
        tl.store(counts + row, count)
    indices += row * capacity
    for tile in range(first, first + chunk_tokens, TILE):
        if (tile < stop) & (tile + TILE > begin):
            token = tile + tl.arange(0, TILE)
            candidate = (token >= sink_stop) & (token < local_begin)
            covered = (token >= begin) & (token < stop) & (candidate == 0)
            matches = tl.load(scores + token, mask=candidate & scored, other=0).to(tl.int32)
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


def levels_of(heads: int, bits: int, levels: int, mixture: int = 1) -> int:
    """Score levels of a row with so many codes of so many bits, the largest weight of `levels` (0: bit codes): those of
    a mixture are not halved, and lie within what their bit planes can hold.
    """
    if mixture == 1:
        return heads * bits * max(levels, 1) + 1
    return heads * 2 * bits * ((1 << levels.bit_length()) - 1) + 1


def bins_of(levels: int) -> tuple[int, int]:
    """Bins of a histogram and levels they are laid over, both powers of 2."""
    padded = max(32, triton.next_power_of_2(levels))
    if padded <= DIRECT_BINS:
        return padded, padded
    return (64 if padded <= 512 else 128 if padded <= 1024 else 256), padded


def chunk_of(tokens: int, rows: int) -> int:
    """Tokens a program: four programs a multiprocessor where there is enough to do, and at most 128 chunks a row, whose
    counts every program of the second launch reads.
    """
    wanted = triton.next_power_of_2(triton.cdiv(tokens * rows, 528))
    return max(1024, min(8192, wanted), triton.next_power_of_2(triton.cdiv(tokens, 128)))


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
    largest = levels if code.dtype == torch.int8 else 0
    bins, padded = bins_of(levels_of(code_heads // heads, words * 32, largest, mixture_of(code, words)))
    chunk_tokens = chunk_of(tokens, rows)
    chunks = triton.cdiv(tokens, chunk_tokens)
    scores = torch.empty(rows * tokens, dtype=torch.int16, device=device)
    sizes = [rows * chunks * bins, rows * chunks * padded if bins < padded else 0, rows]
    counted, tails, windows = torch.empty(sum(sizes), dtype=torch.int32, device=device).split(sizes)
    indices = torch.empty((batch, heads, capacity), dtype=torch.int32, device=device)
    counts = torch.empty((batch, heads), dtype=torch.int32, device=device)
    start, end, budgets = start.contiguous(), end.contiguous(), budgets.contiguous()
    _score_count[(chunks, heads, batch)](
        code.contiguous(), signatures, block_table, start, end, budgets, scores, windows, counted, tails,
        tokens, capacity, chunk_tokens, code_heads, signatures.shape[1], *signatures.stride()[:3],
        0 if block_table is None else block_table.stride(0), signatures.shape[2],
        W=words, WP=triton.next_power_of_2(words), CODES=code_heads // heads, PLANES=planes_of(code, levels),
        MIXED=mixture_of(code, words), PAGED=block_table is not None, TILE=1024 if words <= 2 else 512, BINS=bins,
        LEVELS=padded, num_warps=4,
    )  # fmt: skip
    _write_indices[(chunks, rows)](
        scores, windows, counted, tails, counts, start, end, budgets, indices, tokens, capacity, chunk_tokens, heads,
        BINS=bins, LEVELS=padded, TILE=min(4096, chunk_tokens), num_warps=4,
    )  # fmt: skip
    return indices, counts
