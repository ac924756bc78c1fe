"""The native kernels on torch tensors: addresses and strides go in, nothing is copied."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattention.ops import reference
from hashattention.ops.cpu import _native
from hashattention.ops.shapes import Remainder, mixture_of

#: The newest token's key ``[B, Hs, 1, D]`` and phi_k's weights and biases.
NewKey = tuple[Tensor, list[Tensor], list[Tensor]]

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
    rows = x.shape[0] * x.shape[2]
    adjacent = all(weight.stride(2) == 1 and weight.stride(1) == weight.shape[2] for weight in weights)
    flat = all(bias.stride(1) == 1 for bias in biases)
    few = 0 < rows <= MOST_ROWS and len(weights) <= MOST_STAGES and x.dtype in DTYPES
    return few and adjacent and flat and all(_one_dtype(tensors) for tensors in (weights, biases))


def _one_dtype(tensors: list[Tensor]) -> bool:
    return tensors[0].dtype in DTYPES and all(tensor.dtype == tensors[0].dtype for tensor in tensors)


def _encoding(x: Tensor, weights: list[Tensor], biases: list[Tensor], levels: int) -> _native.Encoding:
    """The encode of `x`, whose tokens and values are adjacent."""
    stages = [
        _native.Stage(w.data_ptr(), w.stride(0), w.shape[1], w.shape[2], b.data_ptr(), b.stride(0))
        for w, b in zip(weights, biases, strict=True)
    ]
    batch, heads, tokens, _ = x.shape
    given, kinds = (x.data_ptr(), DTYPES[x.dtype], x.stride(0), x.stride(1)), (weights[0].dtype, biases[0].dtype)
    return _native.Encoding(*given, batch, heads, tokens, stages, DTYPES[kinds[0]], DTYPES[kinds[1]], levels)


def _rows(x: Tensor) -> Tensor:
    """`x` with tokens and values adjacent."""
    adjacent = x.stride(3) == 1 and (x.shape[2] == 1 or x.stride(2) == x.shape[3])
    return x if adjacent else x.contiguous()


def _encode(x: Tensor, weights: list[Tensor], biases: list[Tensor], levels: int, out: Tensor, scales: Tensor) -> None:
    _native.encode(_encoding(_rows(x), weights, biases, levels), out.data_ptr(), scales.data_ptr())


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
    code: Tensor | None, heads: int, signatures: Tensor, selection_heads: int, table: Tensor | None
) -> _native.Codes:
    """The codes as the kernels take them: `code` contiguous (None: made on the way), `signatures` as `_adjacent` gives
    them.
    """
    held = signatures.shape[0] if table is None else table.shape[0]
    shape = _native.Shape(
        held, heads, signatures.shape[1], selection_heads, signatures.shape[3], _tokens(signatures, table)
    )
    given = (0, False) if code is None else (code.data_ptr(), code.dtype == torch.int32)
    strides = signatures.stride(0), signatures.stride(1)
    return _native.Codes(*given, shape, signatures.data_ptr(), *strides, _pages(signatures, table))


def _adjacent(signatures: Tensor) -> Tensor:
    return signatures if token_rows_adjacent(signatures) else signatures.contiguous()


def _bounds(start: Tensor, end: Tensor, budgets: Tensor, capacity: int, mask: Tensor | None) -> _native.Bounds:
    masked = (0, 0) if mask is None else (mask.data_ptr(), mask.stride(0))
    return _native.Bounds(start.data_ptr(), end.data_ptr(), budgets.data_ptr(), *masked, capacity)


def _flat(tensor: Tensor | None) -> Tensor | None:
    """The tensor contiguous; the caller keeps it alive while its address is used."""
    return None if tensor is None else tensor.contiguous()


def _mask_rows(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.stride(-1) == 1 else mask.contiguous()


def score(code: Tensor, signatures: Tensor, selection_heads: int, block_table: Tensor | None = None) -> Tensor:
    """As `reference.score`; the codes of a mixture are scored one by one."""
    code, signatures, table = code.contiguous(), _adjacent(signatures), _flat(block_table)
    if (mixture := mixture_of(code, signatures.shape[3])) > 1:
        alone = code.view(len(code), code.shape[1] * mixture, 1, -1)
        scores = score(alone, signatures, alone.shape[1], table).unflatten(1, (selection_heads, -1, mixture))
        return scores.amax(3).sum(2, dtype=torch.int32)
    out = torch.empty(code.shape[0], selection_heads, _tokens(signatures, table), dtype=torch.int32)
    _native.score(_codes(code, code.shape[1], signatures, selection_heads, table), out.data_ptr())
    return out


def select(
    scores: Tensor, start: Tensor, end: Tensor, budgets: Tensor, capacity: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.select`."""
    scores, mask = scores.contiguous(), _mask_rows(mask)
    start, end, budgets = start.contiguous(), end.contiguous(), budgets.contiguous()
    bounds = _bounds(start, end, budgets, capacity, mask)
    indices, counts = budgets.new_empty((*scores.shape[:2], capacity)), budgets.new_empty(scores.shape[:2])
    batch, heads, tokens = scores.shape
    real = scores.dtype == torch.float32
    _native.select(scores.data_ptr(), real, batch, heads, tokens, bounds, indices.data_ptr(), counts.data_ptr())
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
    if mixture_of(code, signatures.shape[3]) > 1:
        return select(score(code, signatures, budgets.shape[1], block_table), start, end, budgets, capacity, mask)
    code, signatures, table, mask = code.contiguous(), _adjacent(signatures), _flat(block_table), _mask_rows(mask)
    start, end, budgets = start.contiguous(), end.contiguous(), budgets.contiguous()
    codes = _codes(code, code.shape[1], signatures, budgets.shape[1], table)
    bounds = _bounds(start, end, budgets, capacity, mask)
    indices, counts = budgets.new_empty((*budgets.shape[:2], capacity)), budgets.new_empty(budgets.shape[:2])
    _native.score_select(codes, bounds, indices.data_ptr(), counts.data_ptr())
    return indices, counts


def _cache(cache: Tensor) -> _native.Cache:
    return _native.Cache(cache.data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2), cache.shape[3])


def _attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, softcap: float, table: Tensor | None
) -> tuple[_native.Attention, Tensor, Tensor]:
    """Attention of `heads` selection heads as the kernels take it, its output and its logsumexp."""
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    logsumexp = q.new_empty(q.shape[:3], dtype=torch.float32)
    query = q.data_ptr(), DTYPES[q.dtype], q.stride(0), q.stride(1), DTYPES[k.dtype]
    sizes = q.shape[0], q.shape[1], k.shape[1], heads, _tokens(k, table)
    caches = _cache(k), _cache(v), _pages(k, table)
    return (
        _native.Attention(*query, *sizes, *caches, scale, softcap, out.data_ptr(), logsumexp.data_ptr()),
        out,
        logsumexp,
    )


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
    q = q if q.stride(-1) == 1 else q.contiguous()
    indices, counts, table = indices.contiguous(), counts.contiguous(), _flat(block_table)
    attention, out, logsumexp = _attention(q, k, v, indices.shape[1], scale, softcap, table)
    _native.attend(attention, indices.data_ptr(), counts.data_ptr(), indices.shape[2])
    return out, logsumexp


def add_remainder(
    out: Tensor,
    logsumexp: Tensor,
    q: Tensor,
    sums: Tensor,
    taken: Tensor,
    lengths: Tensor,
    coefficients: Tensor,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """As `reference.add_remainder`."""
    out, logsumexp, taken = out.contiguous(), logsumexp.contiguous(), taken.contiguous()
    lengths, coefficients = lengths.contiguous(), coefficients.contiguous()
    q = q if q.stride(-1) == 1 else q.contiguous()
    sums = sums if sums.stride(-1) == 1 else sums.contiguous()
    batch, heads, _, dim = q.shape
    mixed = torch.empty_like(out)
    _native.add_remainder(
        out.data_ptr(), DTYPES[out.dtype], logsumexp.data_ptr(), (q.data_ptr(), q.stride(0), q.stride(1)),
        (sums.data_ptr(), sums.stride(0), sums.stride(1)), taken.data_ptr(), lengths.data_ptr(),
        coefficients.data_ptr(), (batch, heads, sums.shape[1], taken.shape[1], dim, out.shape[3]), scale, softcap,
        mixed.data_ptr(),
    )  # fmt: skip
    return mixed


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
    new_key: NewKey | None = None,
    remainder: Remainder | None = None,
) -> tuple[Tensor, Tensor]:
    """The whole sparse step: encode, score and select, attend; one call where the encode kernel serves the maps.

    Given the newest token's key and its map, its signature is written into the cache first. A remainder is a call more.
    """
    if new_key is not None and not (token_rows_adjacent(signatures) and fits_encode(*new_key)):
        write_signature(*new_key, signatures, end - 1, block_table)
        new_key = None
    batch, query_heads, _, dim = q.shape
    heads = weights[0].shape[0]
    q = q.contiguous()
    x = q.view(batch, heads, 1, query_heads // heads * dim)
    if not fits_encode(x, weights, biases) or weights[-1].shape[2] != 32 * signatures.shape[3]:
        if new_key is not None:
            write_signature(*new_key, signatures, end - 1, block_table)
        code = encode_query(x, weights, biases, levels)[0] if levels else encode_signature(x, weights, biases)
        indices, counts = score_select(code, signatures, start, end, budgets, capacity, mask, block_table)
        out, logsumexp = attend(q, k, v, indices, counts, scale, softcap, block_table)
        return _fill(out, logsumexp, q, counts, remainder, scale, softcap), logsumexp
    signatures, table, mask = _adjacent(signatures), _flat(block_table), _mask_rows(mask)
    start, end, budgets = start.contiguous(), end.contiguous(), budgets.contiguous()
    attention, out, logsumexp = _attention(q, k, v, budgets.shape[1], scale, softcap, table)
    codes = _codes(None, heads, signatures, budgets.shape[1], table)
    bounds = _bounds(start, end, budgets, capacity, mask)
    key = None if new_key is None else (_rows(new_key[0]), *new_key[1:])
    signing = None if key is None else _encoding(*key, 0)
    _native.decode(_encoding(x, weights, biases, levels), codes, bounds, attention, signing)
    if remainder is None:
        return out, logsumexp
    taken = torch.minimum(budgets.sum(-1, dtype=torch.int32).clamp(max=capacity), remainder[1][:, None])
    return _fill(out, logsumexp, q, taken, remainder, scale, softcap), logsumexp


def _fill(
    out: Tensor,
    logsumexp: Tensor,
    q: Tensor,
    taken: Tensor,
    remainder: Remainder | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """The output with the remainder, if there is one, for what is not among the `taken` tokens."""
    if remainder is None:
        return out
    sums, lengths, coefficients = remainder
    return add_remainder(out, logsumexp, q, sums, taken, lengths, coefficients, scale, softcap)


def decode_step(
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
    softcap: float,
    block_table: Tensor | None,
    new_key: NewKey,
    remainder: Remainder | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode` after writing the newest token's signature, in one call."""
    rest = capacity, levels, scale, softcap, None, block_table, new_key, remainder
    return decode(q, k, v, signatures, weights, biases, start, end, budgets, *rest)
