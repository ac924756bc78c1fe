"""How rows are laid over a GPU of compute capability 9.0: threads, blocks and shared memory of every launch."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from hashattention.errors import BackendError

#: So many blocks keep every multiprocessor busy.
FULL = 128


class Shape(NamedTuple):
    """How rows are launched: threads of a block, blocks of a row, blocks that share a multiprocessor (the registers a
    thread may take follow from it), slots of a block's list, shared bytes of a block, whether by wide.cu, and shared
    bytes that hold signatures.
    """

    threads: int
    blocks: int
    resident: int
    slots: int
    shared: int
    wide: bool = False
    held: int = 0


#: (threads, blocks a row), from few rows to many.
SHAPES = ((256, 16), (256, 8), (256, 4), (256, 2), (256, 1))
#: Blocks a row -> rows whose clusters find a multiprocessor for every block: a cluster lies in one of eight groups of
#: 16 or 18 multiprocessors, less those that are switched off.
ALONE = {16: 7, 8: 14, 4: 30, 2: 64, 1: 132}
#: Slots from which on signatures in pages are not copied to shared memory.
PAGED_SLOTS = 1 << 17
#: Slots from which on a row is spread over 16 blocks where every cluster of so many finds room: 2 KV heads on one H100,
#: 16.1 us against 18.8 at 128K, 11.7 against 11.9 at 32K, 11.0 against 10.5 at 4K.
SPREAD_SLOTS = 1 << 15
#: Slots from which on wide.cu is faster than clusters: there, launched plain, 90.5 us against 105.9 at 1M, 28.7 against
#: 27.5 at 128K.
WIDE_SLOTS = 1 << 19
#: Blocks of a row in wide.cu, all of them running at once on multiprocessors of their own, and their threads.
WIDE_BLOCKS, WIDE_THREADS = 16, 384
#: Tokens of a block that only selects: 32 rows of 128K take 109 us, of twice as many tokens 119.
SELECTED_TOKENS = 1 << 15
#: Up to as many rows (requests times selection heads) the step encodes by itself, in clusters of 8 blocks with
#: multiprocessors of their own; more share a launch before it, which reads the maps once for all.
FEW_ROWS = 12
#: Clusters up to which short rows are one launch too, two blocks a multiprocessor: 2 requests of 8 heads take 16.8 us
#: at 32K (in two launches 18.9) and 14.0 at 4K (15.6); 72 clusters 40 at 32K (30).
SHORT_CLUSTERS, SHORT_SLOTS = 18, 1 << 15
#: Multiprocessors, shared memory of one, and what each block takes of it beside its own.
PROCESSORS, SHARED_BYTES, BLOCK_BYTES = 132, 228 * 1024, 1024
#: KiB of it that can be shared; the rest is first-level cache.
DIVISIONS = (8, 16, 32, 64, 100, 132, 164, 196, 228)
#: Shared bytes of the barriers of messages.
INBOX_BYTES = 112
#: Signatures asked for ahead: more would push each other out of the second-level cache.
PREFETCH_BYTES = 20 << 20


def are_few(heads: int, batch: int, tokens: int, hidden: tuple[int, int]) -> bool:
    """Whether rows of so many slots, encoded through such hidden layers, are faster in one launch than in two."""
    if heads * batch <= FEW_ROWS:
        return True
    return tokens <= SHORT_SLOTS and max(hidden) <= 256 and clusters_of(heads, batch, 8) <= SHORT_CLUSTERS


def clusters_of(heads: int, batch: int, blocks: int) -> int:
    """Clusters of one launch: one a row, and of each request so many that every head's newest key has a block."""
    return batch * (heads + math.ceil(heads / blocks))


def residents(mode: int, threads: int, blocks: int, rows: int) -> int:
    """Blocks that share a multiprocessor; selection alone takes fewer registers."""
    if threads > 256 or rows <= ALONE[blocks]:
        return 1
    return 3 if mode == 1 else 2


def fit(
    mode: int,
    threads: int,
    blocks: int,
    rows: int,
    tokens: int,
    capacity: int,
    outputs: int,
    workspace: int = 0,
    wide: bool = False,
    mixture: int = 1,
    known: int = 0,
    signature: int = 0,
    logits: int = 0,
) -> Shape | None:
    """The shape for `rows` rows of `tokens` tokens of which `capacity` are taken, `outputs` numbers a row, `workspace`
    floats for the encoding and `logits` floats of it that scores must not overwrite, queries of `mixture` codes,
    `known` bytes for a remainder and signatures of so many bytes each that the shared memory of a block alone on its
    multiprocessor holds if it can; None if a block's shared memory is too small. `Shared` of common.cuh.
    """
    segment = math.ceil(tokens / (blocks * 128)) * 128
    # A list of wide.cu may be filled up to a whole turn of the gather.
    turn = threads // 2 if wide else 4
    slots = math.ceil(math.ceil(capacity / blocks) / turn) * turn
    parts = 0 if mode == 1 else threads // 32 * (outputs + 16) * 4
    rest = max(segment, parts, workspace * 4)
    resident = residents(mode, threads, blocks, rows)
    messages = INBOX_BYTES + blocks * (128 * 2 + 64) + (outputs + logits) * 4
    shared = messages + 128 * 4 + 128 + 128 * mixture + slots * 4 + known + rest
    held, spare = segment * signature, max(segment + spare_scores(threads, signature) - rest, 0)
    if resident > 1 or shared + held + spare + BLOCK_BYTES > SHARED_BYTES:
        held = 0
    shared += held + spare if held else 0
    fits = (shared + BLOCK_BYTES) * resident <= SHARED_BYTES and segment <= 1 << 16
    return Shape(threads, blocks, resident, slots, shared, wide, held) if fits else None


def carveout_of(shape: Shape) -> int:
    """Percent of a multiprocessor's memory that is shared while blocks of this shape run."""
    needed = (shape.shared + BLOCK_BYTES) * shape.resident
    division = next(kib for kib in DIVISIONS if needed <= kib * 1024)
    return round(100 * division / DIVISIONS[-1])


def remainder_bytes(group: int, head_dim: int) -> int:
    """Shared bytes that a remainder takes of a block: `Known` of remainder.cuh."""
    return math.ceil((group * (28 + head_dim * 2) + (2 * head_dim + 2) * 4) / 16) * 16


def choose(
    mode: int,
    rows: int,
    tokens: int,
    capacity: int,
    outputs: int,
    mixture: int = 1,
    known: int = 0,
    signature: int = 0,
    forced: tuple[int, int] | None = None,
) -> Shape | None:
    """The fewest blocks a row that fill the chip, or the `forced` (threads, blocks); None if a row is too long for any.

    Selection alone is faster with shorter segments, and with half the chip where its blocks are alone there (8 rows of
    128K: 11.7 us after 12.6).
    """
    size = functools.partial(fit, mode, mixture=mixture, known=known, signature=signature)
    if forced:
        return size(*forced, rows, tokens, capacity, outputs)
    shapes = [shape for pair in SHAPES if (shape := size(*pair, rows, tokens, capacity, outputs))]
    if mode == 1:
        shapes = [s for s in shapes if tokens <= s.blocks * SELECTED_TOKENS] or shapes
    filling = [s for s in shapes if rows * s.blocks >= FULL] or shapes[:1]
    alone = [s for s in shapes if s.resident == 1 and rows * s.blocks >= FULL // 2]
    if mode == 1 and alone and filling[-1].resident > 1:
        return alone[-1]
    return filling[-1] if filling else None


def require(shape: Shape | None, tokens: int) -> Shape:
    """The shape, or a `BackendError` where rows of so many tokens have none."""
    if shape is None:
        raise BackendError(f"{tokens} tokens a row do not fit the shared memory of a cluster. Use backend='triton'.")
    return shape


def choose_fused(
    heads: int,
    batch: int,
    tokens: int,
    capacity: int,
    outputs: int,
    hidden: tuple[int, int],
    bits: int,
    head_dim: int,
    processors: int = PROCESSORS,
    mixture: int = 1,
    known: int = 0,
    paged: bool = False,
) -> Shape | None:
    """The shape in which the step encodes by itself, whatever the number of rows; None if they are too long."""
    alone = batch * heads * WIDE_BLOCKS <= processors
    if tokens >= WIDE_SLOTS and alone and hidden[0] <= 256 and not hidden[1] and mixture == 1:
        workspace = 2 * _query_workspace(hidden)
        shape = fit(3, WIDE_THREADS, WIDE_BLOCKS, 1, tokens, capacity, outputs, workspace, wide=True, known=known)
        if shape:
            return shape
    many = tokens >= SPREAD_SLOTS and clusters_of(heads, batch, 16) <= ALONE[16]
    blocks = 16 if many else 8
    threads = 512 if max(hidden) > 256 else 256
    # A query's workspace (`Workspace` of encode_one.cuh), or what the encoding of a key takes in its place.
    workspace = max(_query_workspace(hidden), threads * 8 + head_dim + sum(hidden) + bits)
    size = functools.partial(fit, mixture=mixture, known=known, signature=held_signature(tokens, bits, paged))
    rows, logits = clusters_of(heads, batch, blocks), blocks * bits * mixture
    return size(3, threads, blocks, rows, tokens, capacity, outputs, workspace, logits=logits)


def held_signature(tokens: int, bits: int, paged: bool) -> int:
    """Bytes of a signature that shared memory may hold: from pages they come 16 bytes at a time, too many instructions
    where there are many.
    """
    return 0 if paged and tokens >= PAGED_SLOTS else bits // 8


def spare_scores(threads: int, signature: int) -> int:
    """Bytes behind the scores of a block that holds its signatures: its warps score `TOGETHER` chunks of score.cuh at
    once, and go so far beyond the last.
    """
    chunk, together = 128 if signature == 4 else 64, 8 if threads <= 256 and signature < 16 else 4
    return (together - 1) * threads // 32 * chunk


def encode_blocks(query_in: int, key_in: int, hidden: list[int], bits: int, mixture: int = 1) -> int | None:
    """Blocks of a cluster of encode.cu: the fewest whose slices of these widths fit their shared memory, or None."""
    columns = bits * mixture
    first, second = hidden[0], hidden[1] if len(hidden) > 1 else 0
    widest = max(query_in, key_in)
    if any(width % 64 for width in (query_in, key_in, *hidden)):
        return None
    for blocks in (4, 8):
        weights = (widest * first + first * second + hidden[-1] * columns) // blocks * 2
        held = weights + 64 * max(widest, 2 * second) + 128 * first + 32 // blocks * columns * 4 + INBOX_BYTES
        if held <= SHARED_BYTES - BLOCK_BYTES and bits % (8 * blocks) == 0:
            return blocks
    return None


def _query_workspace(hidden: tuple[int, int]) -> int:
    return 4096 + 128 + hidden[1]
