"""Launchers of the CUDA kernels: encode (queries and the new key), and step (score, select, attend at once) or wide."""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor

from hashattention.errors import BackendError
from hashattention.ops.cuda.board import find_board, find_codes
from hashattention.ops.cuda.build import load
from hashattention.ops.cuda.layout import PREFETCH_BYTES, PROCESSORS, Shape, encode_blocks, remainder_bytes

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
        *((n, INT) for n in ("batch", "tokens", "table_width", "page", "carveout")),
    )


def _check(error: int, what: str) -> None:
    if error:
        raise BackendError(f"CUDA error {error} launching {what}. Use backend='triton'.")


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def planes_of(levels: int) -> int:
    """Bit planes of a weight's magnitude; a bit code's is 1."""
    return max(levels, 1).bit_length()


def slots_of(levels: int, bits: int) -> int:
    """Slots of a weight's magnitude: `SLOTS` of common.cuh."""
    planes = planes_of(levels)
    return 4 if planes == 3 and bits > 32 else planes


def describe(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Map:
    """The inputs ``[B, H, 1, in]`` and the map of one code."""
    pointers = (POINTER * 3)(*map(_pointer, weights)), (POINTER * 3)(*map(_pointer, biases))
    return Map(x.data_ptr(), *pointers, x.stride(0), x.stride(1), weights[0].shape[0])


@functools.cache
def count_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def encode(
    q: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    levels: int,
    mixture: int,
    new_key: tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor, Tensor | None] | None = None,
    *,
    carveout: int,
) -> Tensor:
    """Queries ``[B, H, 1, in]`` to planes ``[B, H, M, S, W]`` of M codes, which are returned (signs and slots; int64: a
    word, and 1 above it once it is there), and, if given, the new key (k, weights, biases, cache, end, block table) to
    its signature. The step after it, which must come and leaves zeros, starts on what multiprocessors this launch
    leaves free, which are divided by `carveout`, as `carveout_of` has it.
    """
    hidden = [w.shape[-1] for w in weights[:-1]]
    (batch, heads), query_in, bits = q.shape[:2], weights[0].shape[1], weights[-1].shape[-1] // mixture
    key_in = new_key[1][0].shape[1] if new_key else 0
    blocks = encode_blocks(query_in, key_in, hidden, bits, mixture)
    tile = 8 if batch <= 8 else 16 if batch <= 16 else 32
    library = load(
        "encode", QUERY_IN=query_in, KEY_IN=key_in, HIDDEN0=hidden[0], HIDDEN1=hidden[1] if len(hidden) > 1 else 0,
        LEVELS=levels, PLANES=planes_of(levels), WORDS=bits // 32, MIXED=mixture, HALF=int(q.dtype == torch.float16),
        TILE=tile, THREADS=max(tile, 16) * 16, BLOCKS=blocks, HEAD_DIM=64, ROWS=1, PAGED=0, MODE=0, RESIDENT=1,
    )  # fmt: skip
    stream = torch.cuda.current_stream(q.device).cuda_stream
    shape = batch, heads, mixture, slots_of(levels, bits) + 1, bits // 32
    planes = find_codes(library, q.device, stream, math.prod(shape)).view(shape)
    arguments = Encode(query=describe(q, weights, biases), planes=planes.data_ptr(), batch=batch, carveout=carveout)
    if new_key:
        k, key_weights, key_biases, cache, end, table = new_key
        arguments.key = describe(k, key_weights, key_biases)
        arguments.signatures, arguments.position, arguments.table = cache.data_ptr(), end.data_ptr(), _pointer(table)
        arguments.s0, arguments.s1, arguments.page = cache.stride(0), cache.stride(1), cache.shape[2]
        arguments.table_width = 0 if table is None else table.shape[1]
        arguments.tokens = cache.shape[2] * (1 if table is None else table.shape[1])
    _check(library.run(ctypes.byref(arguments), int(new_key is not None), POINTER(stream)), "encode")
    return planes


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
    shape: Shape,
    scale: float = 1.0,
    softcap: float = 0.0,
    hidden: tuple[int, int] = (0, 0),
    maps: tuple[Map, Map] | None = None,
    mixture: int = 1,
) -> None:
    """Launch step.cu, or wide.cu if the shape is, on named tensors; mode 0: the whole step, 1: select only, 2: attend
    only, 3: the whole step with the encoding by `maps` of these `hidden` widths. The `shape` is of `choose`, in mode 3
    of `choose_fused`; a query is a `mixture` of so many codes. Sums, lengths and coefficients among the tensors are a
    remainder, in modes 0 and 3.
    """
    q, k, v, signatures, table, sums = (tensors.get(n) for n in ("q", "k", "v", "signatures", "table", "sums"))
    known = 0 if sums is None or q is None else remainder_bytes(q.shape[1] // heads, q.shape[-1])
    widths = hidden if mode == 3 else (0, 0)
    library = load_step(mode, shape, q, heads, bits, levels, table is not None, widths, mixture, known)
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
    arguments.held, arguments.list_capacity = shape.held, shape.slots
    arguments.scale, arguments.softcap = scale, softcap
    running = min(heads * batch * shape.blocks, PROCESSORS * shape.resident)
    arguments.prefetch = PREFETCH_BYTES // (running * bits // 8) // 128 * 128
    if maps is not None:
        arguments.query, arguments.key = maps
    device = next(t for t in tensors.values() if t is not None).device
    stream = torch.cuda.current_stream(device).cuda_stream
    if shape.wide:
        board, arguments.board_row = find_board(library, device, stream, heads * batch, capacity)
        arguments.board = board.data_ptr()
    _check(library.run(ctypes.byref(arguments), heads, batch, shape.shared, POINTER(stream)), "step")


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
