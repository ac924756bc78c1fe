"""Launchers of the CUDA kernels: encode (queries and the new key), and step (score, select, attend at once) or wide."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from hashattention.errors import BackendError
from hashattention.ops.cuda.board import find_board
from hashattention.ops.cuda.build import load

LONG, INT, FLOAT, POINTER = ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_void_p


class Map(ctypes.Structure):
    """`Map` of common.cuh and encode.cu."""

    _fields_ = (
        ("x", POINTER),
        ("weights", POINTER * 3),
        ("biases", POINTER * 3),
        ("x0", LONG),
        ("x1", LONG),
        ("heads", INT),
    )


class Step(ctypes.Structure):
    """`Arguments` of common.cuh."""

    _fields_ = (
        *(
            (n, POINTER)
            for n in (
                "planes",
                "signatures",
                "start",
                "end",
                "budgets",
                "table",
                "q",
                "k",
                "v",
                "out",
                "logsumexp",
                "indices",
                "counts",
            )
        ),
        *((n, LONG) for n in ("s0", "s1", "k0", "k1", "k2", "v0", "v1", "v2", "q0", "q1")),
        *(
            (n, INT)
            for n in (
                "tokens",
                "capacity",
                "table_width",
                "page_shift",
                "ratio",
                "list_capacity",
                "prefetch",
                "held",
            )
        ),
        ("scale", FLOAT),
        ("softcap", FLOAT),
        ("query", Map),
        ("key", Map),
        ("board", POINTER),
        ("board_row", LONG),
        *((n, POINTER) for n in ("sums", "lengths", "coefficients")),
        *((n, LONG) for n in ("m0", "m1")),
    )


class Encode(ctypes.Structure):
    """`Arguments` of encode.cu."""

    _fields_ = (
        ("query", Map),
        ("key", Map),
        *((n, POINTER) for n in ("planes", "signatures", "position", "table")),
        *((n, LONG) for n in ("s0", "s1")),
        *((n, INT) for n in ("batch", "tokens", "table_width", "page", "early")),
    )


def _check(error: int, what: str) -> None:
    if error:
        raise BackendError(f"CUDA error {error} launching {what}. Use backend='triton'.")


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def planes_of(levels: int) -> int:
    """Bit planes of a weight's magnitude; a bit code's is 1."""
    return max(levels, 1).bit_length()


def describe(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Map:
    """The inputs ``[B, H, 1, in]`` and the map of one code."""
    pointers = (POINTER * 3)(*map(_pointer, weights)), (POINTER * 3)(*map(_pointer, biases))
    return Map(x.data_ptr(), *pointers, x.stride(0), x.stride(1), weights[0].shape[0])


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
#: Slots of a cache from which on 384 threads are faster than 256: on one H100, 8 KV heads, 64 bits, 21.2 us against
#: 21.7 at 128K, and 16.5 against 16.1 at 64K.
MORE_THREADS_SLOTS = 1 << 17
#: Slots from which on wide.cu is faster than clusters: there, launched plain, 90.5 us against 105.9 at 1M, 28.7 against
#: 27.5 at 128K.
WIDE_SLOTS = 1 << 19
#: Blocks of a row in wide.cu, all of them running at once on multiprocessors of their own, and their threads.
WIDE_BLOCKS, WIDE_THREADS = 16, 384
#: Tokens of a block that only selects: 32 rows of 128K take 109 us, of twice as many tokens 119.
SELECTED_TOKENS = 1 << 15
#: Multiprocessors, shared memory of one, and what each block takes of it beside its own.
PROCESSORS, SHARED_BYTES, BLOCK_BYTES = 132, 228 * 1024, 1024
#: Shared bytes of the barriers of messages.
INBOX_BYTES = 112
#: Signatures asked for ahead: more would push each other out of the second-level cache.
PREFETCH_BYTES = 20 << 20


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
) -> Shape | None:
    """The shape for `rows` rows of `tokens` tokens of which `capacity` are taken, `outputs` numbers a row, `workspace`
    floats for the encoding, queries of `mixture` codes, `known` bytes for a remainder and signatures of so many bytes
    each that the shared memory of a block alone on its multiprocessor holds if it can; None if a block's shared
    memory is too small. `Shared` of common.cuh.
    """
    segment = math.ceil(tokens / (blocks * 128)) * 128
    # A list of wide.cu may be filled up to a whole turn of the gather.
    turn = threads // 2 if wide else 4
    slots = math.ceil(math.ceil(capacity / blocks) / turn) * turn
    parts = 0 if mode == 1 else threads // 32 * (outputs + 16) * 4
    rest = max(segment, parts, workspace * 4)
    resident = residents(mode, threads, blocks, rows)
    shared = (
        INBOX_BYTES + blocks * (128 * 2 + 64) + 128 * 4 + 128 + 128 * mixture + outputs * 4 + slots * 4 + known + rest
    )
    held = segment * signature
    if resident > 1 or shared + held + BLOCK_BYTES > SHARED_BYTES:
        held = 0
    shared += held
    fits = (shared + BLOCK_BYTES) * resident <= SHARED_BYTES and segment <= 1 << 16
    return Shape(threads, blocks, resident, slots, shared, wide, held) if fits else None


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
) -> Shape | None:
    """The fewest blocks a row that fill the chip; None if a row is too long for any.

    Selection alone is faster with shorter segments, and with half the chip where its blocks are alone there (8 rows of
    128K: 11.7 us after 12.6).
    """
    size = functools.partial(fit, mode, mixture=mixture, known=known, signature=signature)
    shapes = [shape for pair in SHAPES if (shape := size(*pair, rows, tokens, capacity, outputs))]
    if mode == 1:
        shapes = [s for s in shapes if tokens <= s.blocks * SELECTED_TOKENS] or shapes
    filling = [s for s in shapes if rows * s.blocks >= FULL] or shapes[:1]
    alone = [s for s in shapes if s.resident == 1 and rows * s.blocks >= FULL // 2]
    if mode == 1 and alone and filling[-1].resident > 1:
        return alone[-1]
    return filling[-1] if filling else None


def starts_early(shape: Shape, rows: int, tokens: int, bits: int) -> bool:
    """Whether the step gains by starting at once under the encoding before it, as measured at batch 8 and 32.

    Blocks that share multiprocessors must be more than there is room for, or they crowd where the encoding left some;
    blocks that are alone lose where they ask for only a part of their signatures ahead.
    """
    blocks = rows * shape.blocks
    if shape.resident > 1:
        return blocks >= PROCESSORS * shape.resident
    return blocks >= FULL and rows * tokens * bits // 8 <= PREFETCH_BYTES


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
        workspace = 2 * _query_workspace(hidden, bits, WIDE_BLOCKS)
        shape = fit(3, WIDE_THREADS, WIDE_BLOCKS, 1, tokens, capacity, outputs, workspace, wide=True, known=known)
        if shape:
            return shape
    few = 384 if tokens >= MORE_THREADS_SLOTS else 256
    threads, blocks = 512 if max(hidden) > 256 else few, 8
    workspace = _workspace(hidden, bits, threads, blocks, head_dim, mixture)
    clusters = batch * (heads + math.ceil(heads / blocks))
    sizes, signature = (tokens, capacity, outputs, workspace), held_signature(tokens, bits, paged)
    return fit(3, threads, blocks, clusters, *sizes, mixture=mixture, known=known, signature=signature)


def held_signature(tokens: int, bits: int, paged: bool) -> int:
    """Bytes of a signature that shared memory may hold: from pages they come 16 bytes at a time, too many instructions
    where there are many.
    """
    return 0 if paged and tokens >= MORE_THREADS_SLOTS else bits // 8


@functools.cache
def count_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


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


def encode(
    q: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    levels: int,
    planes: Tensor,
    new_key: tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor, Tensor | None] | None = None,
    early: bool = False,
) -> None:
    """Queries ``[B, H, 1, in]`` to bit `planes` ``[B, H, M, P, W]`` of M codes, and, if given, the new key (k, weights,
    biases, cache, end, block table) to its signature. `early`: the step after it may start on what multiprocessors this
    launch leaves free.
    """
    hidden = [w.shape[-1] for w in weights[:-1]]
    mixture, bits, query_in = planes.shape[2], planes.shape[4] * 32, weights[0].shape[1]
    key_in = new_key[1][0].shape[1] if new_key else 0
    blocks, tile = encode_blocks(query_in, key_in, hidden, bits, mixture), 16 if q.shape[0] <= 16 else 32
    library = load(
        "encode", QUERY_IN=query_in, KEY_IN=key_in, HIDDEN0=hidden[0], HIDDEN1=hidden[1] if len(hidden) > 1 else 0,
        LEVELS=levels, PLANES=planes_of(levels), WORDS=bits // 32, MIXED=mixture, HALF=int(q.dtype == torch.float16),
        TILE=tile, THREADS=tile * 16, BLOCKS=blocks, HEAD_DIM=64, ROWS=1, PAGED=0, MODE=0, RESIDENT=1,
    )  # fmt: skip
    arguments = Encode(query=describe(q, weights, biases), planes=planes.data_ptr(), batch=q.shape[0], early=int(early))
    if new_key:
        k, key_weights, key_biases, cache, end, table = new_key
        arguments.key = describe(k, key_weights, key_biases)
        arguments.signatures, arguments.position, arguments.table = cache.data_ptr(), end.data_ptr(), _pointer(table)
        arguments.s0, arguments.s1, arguments.page = cache.stride(0), cache.stride(1), cache.shape[2]
        arguments.table_width = 0 if table is None else table.shape[1]
        arguments.tokens = cache.shape[2] * (1 if table is None else table.shape[1])
    stream = torch.cuda.current_stream(q.device).cuda_stream
    _check(library.run(ctypes.byref(arguments), int(new_key is not None), POINTER(stream)), "encode")


def fuses(
    q: Tensor, heads: int, weights: list[Tensor], new_key: list[Tensor] | None, mixture: int = 1
) -> tuple[int, int] | None:
    """Widths of the hidden layers if the step can encode by itself, else None."""
    hidden = [w.shape[-1] for w in weights[:-1]]
    if len(hidden) not in (1, 2) or any(width not in (128, 256, 512) for width in hidden):
        return None
    if weights[0].shape[1] != q.shape[1] // heads * q.shape[-1]:
        return None
    if new_key is not None:
        widths = [w.shape[-1] for w in new_key]
        if widths != [*hidden, weights[-1].shape[-1] // mixture] or new_key[0].shape[:2] != (heads, q.shape[-1]):
            return None
    return hidden[0], hidden[1] if len(hidden) == 2 else 0


def launch(
    mode: int,
    *,
    heads: int,
    batch: int,
    capacity: int,
    bits: int,
    levels: int,
    tokens: int,
    tensors: dict[str, Tensor | None],
    scale: float = 1.0,
    softcap: float = 0.0,
    shape: tuple[int, int] | Shape | None = None,
    hidden: tuple[int, int] = (0, 0),
    maps: tuple[Map, Map] | None = None,
    mixture: int = 1,
) -> None:
    """Launch step.cu, or wide.cu if the shape is, on named tensors; mode 0: the whole step, 1: select only, 2: attend
    only, 3: the whole step with the encoding by `maps` of these `hidden` widths, in the `shape` of `choose_fused`.
    `shape` forces (threads, blocks); a query is a `mixture` of so many codes. Sums, lengths and coefficients among the
    tensors are a remainder, in modes 0 and 3.
    """
    q, k, v, signatures, table, sums = (tensors.get(n) for n in ("q", "k", "v", "signatures", "table", "sums"))
    rows, held, taken = heads * batch, tokens if mode != 2 else 0, capacity if mode != 1 else 4
    outputs = 64 if q is None else q.shape[1] // heads * q.shape[-1]
    known = 0 if sums is None or q is None else remainder_bytes(q.shape[1] // heads, q.shape[-1])
    if isinstance(shape, Shape):
        chosen: Shape | None = shape
    else:
        size = functools.partial(fit, mode, *shape) if shape else functools.partial(choose, mode)
        signature = 0 if mode == 2 else held_signature(tokens, bits, table is not None)
        chosen = size(rows, held, taken, outputs, mixture=mixture, known=known, signature=signature)
    if chosen is None:
        raise BackendError(f"{tokens} tokens a row do not fit the shared memory of a cluster. Use backend='triton'.")
    widths = hidden if mode == 3 else (0, 0)
    library = load_step(mode, chosen, q, heads, bits, levels, table is not None, widths, mixture, known)
    arguments = Step(**{name: _pointer(tensor) for name, tensor in tensors.items()})
    if signatures is not None:
        arguments.s0, arguments.s1 = signatures.stride(0), signatures.stride(1)
        arguments.page_shift = signatures.shape[2].bit_length() - 1 if table is not None else 0
    if q is not None and k is not None and v is not None:
        arguments.k0, arguments.k1, arguments.k2 = k.stride()[:3]
        arguments.v0, arguments.v1, arguments.v2 = v.stride()[:3]
        arguments.q0, arguments.q1 = q.stride()[:2]
        arguments.ratio = heads // k.shape[1]
        arguments.page_shift = k.shape[2].bit_length() - 1 if table is not None else 0
    if sums is not None:
        arguments.m0, arguments.m1 = sums.stride()[:2]
    arguments.table_width = 0 if table is None else table.shape[1]
    arguments.tokens, arguments.capacity = tokens, capacity
    arguments.held = chosen.held
    arguments.list_capacity, arguments.scale, arguments.softcap = chosen.slots, scale, softcap
    running = min(rows * chosen.blocks, PROCESSORS * chosen.resident)
    arguments.prefetch = PREFETCH_BYTES // (running * bits // 8) // 128 * 128
    if maps is not None:
        arguments.query, arguments.key = maps
    device = next(t for t in tensors.values() if t is not None).device
    stream = torch.cuda.current_stream(device).cuda_stream
    if chosen.wide:
        board, arguments.board_row = find_board(library, device, stream, rows, capacity)
        arguments.board = board.data_ptr()
    _check(library.run(ctypes.byref(arguments), heads, batch, chosen.shared, POINTER(stream)), "step")


def load_step(
    mode: int,
    shape: Shape,
    q: Tensor | None,
    heads: int,
    bits: int,
    levels: int,
    paged: bool,
    hidden: tuple[int, int],
    mixture: int = 1,
    known: int = 0,
) -> ctypes.CDLL:
    """The step compiled for one mode and shape, and a remainder of `known` shared bytes or none."""
    return load(
        "wide" if shape.wide else "step",
        HEAD_DIM=64 if q is None else q.shape[-1], ROWS=1 if q is None else q.shape[1] // heads,
        WORDS=bits // 32, PLANES=planes_of(levels), LEVELS=levels, MIXED=mixture, PAGED=int(paged),
        HALF=int(q is not None and q.dtype == torch.float16), HIDDEN0=hidden[0], HIDDEN1=hidden[1],
        MODE=mode, THREADS=shape.threads, BLOCKS=shape.blocks, RESIDENT=shape.resident, REMAINDER=known,
        HELD=int(shape.held > 0),
    )  # fmt: skip


def _workspace(hidden: tuple[int, int], bits: int, threads: int, blocks: int, head_dim: int, mixture: int) -> int:
    """Floats of shared memory that encoding takes: a query's (`Workspace` of encode_one.cuh) or a key's."""
    return max(_query_workspace(hidden, bits * mixture, blocks), threads * 8 + head_dim + sum(hidden) + bits)


def _query_workspace(hidden: tuple[int, int], columns: int, blocks: int) -> int:
    return 4096 + 128 + hidden[1] + blocks * columns
