"""The native kernels on torch tensors: addresses and strides go in, nothing is copied."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattention.ops import reference
from hashattention.ops.cpu import _native

#: The kernels' names of the floating-point types.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

#: Rows up to which reading the weights costs more than multiplying, and stages that the encode kernel holds.
MOST_ROWS = 8
MOST_STAGES = 4


def instruction_set() -> str:
    """The instruction set whose kernels run: avx512, avx2 or plain."""
    return _native.active()


def fits_encode(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> bool:
    """Whether the encode kernel, whose cost is reading the weights, serves these few rows."""
    rows, tensors = x.shape[0] * x.shape[2], [*weights, *biases]
    dtypes = {tensor.dtype for tensor in tensors}
    adjacent = all(weight.stride(2) == 1 and weight.stride(1) == weight.shape[2] for weight in weights)
    flat = all(bias.stride(1) == 1 for bias in biases)
    few = 0 < rows <= MOST_ROWS and len(weights) <= MOST_STAGES
    return few and adjacent and flat and len(dtypes) == 1 and dtypes <= DTYPES.keys()


def _encode(x: Tensor, weights: list[Tensor], biases: list[Tensor], levels: int, out: Tensor, scales: Tensor) -> None:
    x = x.float().contiguous()
    stages = [
        _native.Stage(w.data_ptr(), w.stride(0), w.shape[1], w.shape[2], b.data_ptr(), b.stride(0))
        for w, b in zip(weights, biases, strict=True)
    ]
    batch, heads, tokens, _ = x.shape
    dtype = DTYPES[weights[0].dtype]
    _native.encode(x.data_ptr(), batch, heads, tokens, stages, dtype, levels, out.data_ptr(), scales.data_ptr())


def encode_query(x: Tensor, weights: list[Tensor], biases: list[Tensor], levels: int) -> tuple[Tensor, Tensor]:
    """As `reference.encode_query`, up to the order of float32 sums; many rows are a matrix product of torch's."""
    if not fits_encode(x, weights, biases):
        return reference.encode_query(x, weights, biases, levels)
    code = x.new_empty((*x.shape[:3], weights[-1].shape[-1]), dtype=torch.int8)
    scales = x.new_empty(x.shape[:3], dtype=torch.float32)
    _encode(x, weights, biases, levels, code, scales)
    return code, scales


def encode_signature(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """As `reference.encode_signature`, up to the order of float32 sums; many rows are a matrix product of torch's."""
    bits = weights[-1].shape[-1]
    words = x.new_empty((*x.shape[:3], bits // 32), dtype=torch.int32)
    if fits_encode(x, weights, biases):
        _encode(x, weights, biases, 0, words, words)
        return words
    logits = reference.mlp(x, weights, biases).contiguous()
    _native.pack(logits.data_ptr(), logits.numel() // bits, bits, words.data_ptr())
    return words


def write_signature(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    signatures: Tensor,
    first: Tensor,
    block_table: Tensor | None = None,
) -> None:
    """As `reference.write_signature`."""
    new, size, tokens = encode_signature(x, weights, biases), signatures.shape[2], _tokens(signatures, block_table)
    for request, position in enumerate(first.tolist()):
        last = min(position + x.shape[2], tokens)
        if block_table is None:
            begin = max(position, 0)
            if begin < last:
                signatures[request, :, begin:last] = new[request, :, begin - position : last - position]
            continue
        for token in range(max(position, 0), last):
            page = int(block_table[request, token // size])
            signatures[page, :, token % size] = new[request, :, token - position]


def _pages(cache: Tensor, block_table: Tensor | None) -> _native.Pages:
    if block_table is None:
        return _native.Pages(0, 0, 1, 0)
    return _native.Pages(block_table.data_ptr(), block_table.shape[1], cache.shape[2], cache.shape[0])


def _tokens(cache: Tensor, block_table: Tensor | None) -> int:
    return cache.shape[2] if block_table is None else block_table.shape[1] * cache.shape[2]


def token_rows_adjacent(signatures: Tensor) -> bool:
    """Whether the words of successive tokens lie side by side, as the score kernels read them."""
    words = signatures.shape[3]
    return signatures.stride(3) == 1 and (signatures.shape[2] == 1 or signatures.stride(2) == words)


def _codes(
    code: Tensor, signatures: Tensor, selection_heads: int, block_table: Tensor | None
) -> tuple[_native.Codes, tuple[Tensor | None, ...]]:
    """The codes as the kernels take them, and the tensors that must outlive the call."""
    code = code.contiguous()
    if not token_rows_adjacent(signatures):
        signatures = signatures.contiguous()
    table = None if block_table is None else block_table.contiguous()
    batch, heads = code.shape[:2]
    sizes = signatures.shape[1], selection_heads, signatures.shape[3], _tokens(signatures, table)
    shape = _native.Shape(batch, heads, *sizes)
    strides = signatures.stride(0), signatures.stride(1)
    packed = code.dtype == torch.int32
    codes = _native.Codes(code.data_ptr(), packed, shape, signatures.data_ptr(), *strides, _pages(signatures, table))
    return codes, (code, signatures, table)


def _bounds(
    start: Tensor, end: Tensor, budgets: Tensor, capacity: int, mask: Tensor | None
) -> tuple[_native.Bounds, tuple[Tensor | None, ...]]:
    start, end, budgets = start.contiguous(), end.contiguous(), budgets.contiguous()
    if mask is not None and mask.stride(-1) != 1:
        mask = mask.contiguous()
    masked = (0, 0) if mask is None else (mask.data_ptr(), mask.stride(0))
    bounds = _native.Bounds(start.data_ptr(), end.data_ptr(), budgets.data_ptr(), *masked, capacity)
    return bounds, (start, end, budgets, mask)


def score(code: Tensor, signatures: Tensor, selection_heads: int, block_table: Tensor | None = None) -> Tensor:
    """As `reference.score`."""
    codes, kept = _codes(code, signatures, selection_heads, block_table)
    out = torch.empty(code.shape[0], selection_heads, _tokens(signatures, block_table), dtype=torch.int32)
    _native.score(codes, out.data_ptr())
    del kept
    return out


def select(
    scores: Tensor, start: Tensor, end: Tensor, budgets: Tensor, capacity: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.select`."""
    scores = scores.contiguous()
    bounds, kept = _bounds(start, end, budgets, capacity, mask)
    indices, counts = budgets.new_empty((*scores.shape[:2], capacity)), budgets.new_empty(scores.shape[:2])
    batch, heads, tokens = scores.shape
    real = scores.dtype == torch.float32
    _native.select(scores.data_ptr(), real, batch, heads, tokens, bounds, indices.data_ptr(), counts.data_ptr())
    del kept
    return indices, counts


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
    """As `reference.score_select`; `levels` is not needed, the kernel reads the largest score off the code."""
    codes, kept = _codes(code, signatures, budgets.shape[1], block_table)
    bounds, also_kept = _bounds(start, end, budgets, capacity, mask)
    indices, counts = budgets.new_empty((*budgets.shape[:2], capacity)), budgets.new_empty(budgets.shape[:2])
    _native.score_select(codes, bounds, indices.data_ptr(), counts.data_ptr())
    del kept, also_kept
    return indices, counts


def _cache(cache: Tensor) -> _native.Cache:
    return _native.Cache(cache.data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2), cache.shape[3])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    scale: float,
    softcap: float = 0.0,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.attend`."""
    if q.stride(-1) != 1:
        q = q.contiguous()
    indices, counts = indices.contiguous(), counts.contiguous()
    table = None if block_table is None else block_table.contiguous()
    batch, query_heads = q.shape[:2]
    out = q.new_empty((batch, query_heads, 1, v.shape[-1]))
    logsumexp = q.new_empty((batch, query_heads, 1), dtype=torch.float32)
    sizes = batch, query_heads, k.shape[1], indices.shape[1], _tokens(k, table), indices.shape[2]
    caches = _cache(k), _cache(v), _pages(k, table)
    query = q.data_ptr(), DTYPES[q.dtype], q.stride(0), q.stride(1), DTYPES[k.dtype]
    rows, outputs = (indices.data_ptr(), counts.data_ptr()), (out.data_ptr(), logsumexp.data_ptr())
    _native.attend(*query, *sizes, *caches, *rows, scale, softcap, *outputs)
    return out, logsumexp


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    signatures: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    start: Tensor,
    end: Tensor,
    budgets: Tensor,
    capacity: int,
    levels: int,
    scale: float,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The whole sparse step: encode, score and select, attend."""
    batch, query_heads, _, dim = q.shape
    heads = weights[0].shape[0]
    x = q.reshape(batch, heads, 1, query_heads // heads * dim)
    code = encode_query(x, weights, biases, levels)[0] if levels else encode_signature(x, weights, biases)
    indices, counts = score_select(code, signatures, start, end, budgets, capacity, mask, block_table)
    return attend(q, k, v, indices, counts, scale, softcap, block_table)
