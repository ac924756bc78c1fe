"""Launchers of the two CUDA kernels: encode (queries and the new key), and step (score, select, attend at once)."""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor

from hashattention.errors import BackendError
from hashattention.ops.cuda.build import load

LONG, INT, FLOAT, POINTER = ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_void_p
#: Shared memory a block may have: alone on its multiprocessor, with one other, with three others.
ALONE, PAIRED, QUARTER = 227 * 1024, 113 * 1024, 56 * 1024


class Step(ctypes.Structure):
    """`Arguments` of step.cu."""

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
                "page_shift_s",
                "ratio",
                "segment_capacity",
                "list_capacity",
                "waits",
            )
        ),
        ("scale", FLOAT),
        ("softcap", FLOAT),
    )


class Map(ctypes.Structure):
    """`Map` of encode.cu."""

    _fields_ = (
        ("x", POINTER),
        ("weights", POINTER * 3),
        ("biases", POINTER * 3),
        ("x0", LONG),
        ("x1", LONG),
        ("heads", INT),
    )


class Encode(ctypes.Structure):
    """`Arguments` of encode.cu."""

    _fields_ = (
        ("query", Map),
        ("key", Map),
        *((n, POINTER) for n in ("planes", "signatures", "position", "table")),
        *((n, LONG) for n in ("s0", "s1")),
        *((n, INT) for n in ("batch", "tokens", "table_width", "page")),
    )


def _check(error: int, what: str) -> None:
    if error:
        raise BackendError(f"CUDA error {error} launching {what}. Use backend='triton'.")


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def planes_of(levels: int) -> int:
    """Bit planes of a weight's magnitude; a bit code's is 1."""
    return max(levels, 1).bit_length()


@functools.cache
def choose(library: ctypes.CDLL, rows: int, tokens: int, capacity: int) -> tuple[int, int, int, int, int] | None:
    """Threads, blocks a row, slots and entries a block keeps, shared bytes: the smallest cluster that fills the chip
    and fits.
    """
    options: list[tuple[int, int, int, int, int]] = []
    for blocks in (16, 8, 4, 2, 1):
        segment = math.ceil((tokens + 8) / (blocks * 8)) * 8
        slots = math.ceil(capacity / blocks / 4) * 4
        for threads, most in ((512, ALONE), (256, PAIRED), (128, QUARTER)):
            shared = library.shared_bytes(slots, segment, threads)
            if shared <= most:
                options.append((threads, blocks, slots, segment, shared))
    paired = [o for o in options if o[0] == 256]
    for option in options:
        if option[0] == 512 and option[1] == 16 and rows <= library.most_clusters(512, 16, option[4]):
            return option
    # Many rows: small blocks, of which a multiprocessor runs several at different stages.
    small = [o for o in options if o[0] == 128 and o[1] <= 4 and rows * o[1] >= 256]
    if small:
        return small[-1]
    fitting = [o for o in paired if rows * o[1] <= 264]
    if fitting:
        return fitting[0]
    either = paired or options
    return either[-1] if either else None


def encode(
    q: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    levels: int,
    planes: Tensor,
    new_key: tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor, Tensor | None] | None = None,
) -> None:
    """Queries ``[B, H, 1, in]`` to bit planes, and, if given, the new key (k, weights, biases, cache, end, block table)
    to its signature.
    """
    hidden = [w.shape[-1] for w in weights]
    key_in = new_key[1][0].shape[1] if new_key else 0
    library = load(
        "encode", QUERY_IN=weights[0].shape[1], KEY_IN=key_in, HIDDEN0=hidden[0], HIDDEN1=hidden[1], BITS=hidden[2],
        LEVELS=levels, PLANES=planes_of(levels), HALF=int(q.dtype == torch.float16),
    )  # fmt: skip

    def describe(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Map:
        pointers = (POINTER * 3)(*map(_pointer, weights)), (POINTER * 3)(*map(_pointer, biases))
        return Map(x.data_ptr(), *pointers, x.stride(0), x.stride(1), weights[0].shape[0])

    arguments = Encode(query=describe(q, weights, biases), planes=planes.data_ptr(), batch=q.shape[0])
    if new_key:
        k, key_weights, key_biases, cache, end, table = new_key
        arguments.key = describe(k, key_weights, key_biases)
        arguments.signatures, arguments.position, arguments.table = cache.data_ptr(), end.data_ptr(), _pointer(table)
        arguments.s0, arguments.s1, arguments.page = cache.stride(0), cache.stride(1), cache.shape[2]
        arguments.table_width = 0 if table is None else table.shape[1]
        arguments.tokens = cache.shape[2] * (1 if table is None else table.shape[1])
    stream = torch.cuda.current_stream(q.device).cuda_stream
    _check(library.run(ctypes.byref(arguments), int(new_key is not None), POINTER(stream)), "encode")


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
    waits: bool = False,
    shape: tuple[int, int] | None = None,
) -> None:
    """Launch step.cu on named tensors; mode 0: the whole step, 1: select only, 2: attend only. `shape` forces (threads,
    blocks).
    """
    q, k, v, signatures, table = (tensors.get(name) for name in ("q", "k", "v", "signatures", "table"))
    dim = 64 if q is None else q.shape[-1]
    per_row = 1 if q is None else q.shape[1] // heads
    bins = max(64, 1 << (bits * max(levels, 1) + 1).bit_length())
    constants = {"HEAD_DIM": dim, "ROWS": per_row, "WORDS": bits // 32, "PLANES": planes_of(levels), "BINS": bins}
    library = load(
        "step", **constants, PAGED=int(table is not None), HALF=int(q is not None and q.dtype == torch.float16)
    )
    chosen = choose(library, heads * batch, tokens if mode < 2 else 0, capacity if mode != 1 else 4)
    if shape:
        threads, blocks = shape[:2]
        slots, segment = math.ceil(capacity / blocks / 4) * 4, math.ceil((tokens + 8) / (blocks * 8)) * 8
        chosen = threads, blocks, slots, segment, max(library.shared_bytes(slots, segment, threads), *shape[2:], 0)
    if chosen is None:
        raise BackendError(f"{tokens} tokens a row do not fit the shared memory of a cluster. Use backend='triton'.")
    threads, blocks, slots, segment, shared = chosen
    arguments = Step(**{name: _pointer(tensor) for name, tensor in tensors.items()})
    if signatures is not None:
        arguments.s0, arguments.s1 = signatures.stride(0), signatures.stride(1)
        arguments.page_shift_s = arguments.page_shift = signatures.shape[2].bit_length() - 1 if table is not None else 0
    if q is not None and k is not None and v is not None:
        arguments.k0, arguments.k1, arguments.k2 = k.stride()[:3]
        arguments.v0, arguments.v1, arguments.v2 = v.stride()[:3]
        arguments.q0, arguments.q1 = q.stride()[:2]
        arguments.ratio = heads // k.shape[1]
        arguments.page_shift = k.shape[2].bit_length() - 1 if table is not None else 0
    arguments.table_width = 0 if table is None else table.shape[1]
    arguments.tokens, arguments.capacity, arguments.waits = tokens, capacity, int(waits)
    arguments.list_capacity, arguments.segment_capacity = slots, segment
    arguments.scale, arguments.softcap = scale, softcap
    device = next(t for t in tensors.values() if t is not None).device
    stream = torch.cuda.current_stream(device).cuda_stream
    _check(library.run(ctypes.byref(arguments), mode, threads, blocks, heads, batch, shared, POINTER(stream)), "step")
