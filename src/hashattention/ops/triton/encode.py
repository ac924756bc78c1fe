"""encode: every head's MLP of a layer in one launch, ending in packed signs or integer codes; signatures may go
straight to a cache, and a step's query and key are encoded side by side.

Rows are tokens of all requests. A few rows read far more weights than one program can load quickly: the hidden columns
are then split over several programs, whose parts of the second stage the last one to finish adds up, in order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hashattention.ops.triton.tickets import take

#: Bytes of the last stage's weights one program keeps whole; a wider last stage is refused.
LAST_STAGE_BYTES = 65536
#: Rows of a block where there are few, and of a prefill's.
FEW, MANY = 16, 64
#: Of the GPUs this was shaped for; a launch's shape may not depend on a query of the device.
MULTIPROCESSORS = 132
#: Hidden columns of one split at least, and splits at most.
SPLIT_COLUMNS, MOST_SPLITS = 32, 8


@triton.jit
def _silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def _first_stage(
    x_row,
    rows,
    weight,
    bias,
    start,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Columns start..start + BN of the first stage: float32 [BT, BN]."""
    column = start + tl.arange(0, BN)
    inside = column < OUT
    total = tl.zeros((x_row.shape[0], BN), tl.float32)
    for begin in range(0, IN, BK):
        k = begin + tl.arange(0, BK)
        x = tl.load(x_row[:, None] + k[None, :], mask=rows[:, None] & (k < IN)[None, :], other=0.0).to(DOT)
        w = tl.load(
            weight + k[:, None] * OUT + column[None, :], mask=(k < IN)[:, None] & inside[None, :], other=0.0
        ).to(DOT)
        total = tl.dot(x, w, total, input_precision="ieee")
    return total + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _second_stage(
    x_row, rows, w0, b0, w1, begin, end,
    IN: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, P1: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What hidden columns begin..end add to the second stage, without its bias: float32 [BT, P1]. The hidden layer is
    made and used BN columns at a time.
    """
    column = tl.arange(0, P1)
    total = tl.zeros((x_row.shape[0], P1), tl.float32)
    for start in range(begin, end, BN):
        hidden = _silu(_first_stage(x_row, rows, w0, b0, start, IN, N0, BN, BK, DOT))
        k = start + tl.arange(0, BN)
        w = tl.load(w1 + k[:, None] * N1 + column[None, :], mask=(k < N0)[:, None] & (column < N1)[None, :], other=0.0)
        total = tl.dot(hidden.to(DOT), w.to(DOT), total, input_precision="ieee")
    return total


@triton.jit
def _add_parts(
    parts, b1, rows, k,
    N1: tl.constexpr, P1: tl.constexpr, BT: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Columns k of the second stage from the splits' parts: float32 [BT, k]."""
    place = tl.arange(0, BT)[:, None] * P1 + k[None, :]
    inside = rows[:, None] & (k < N1)[None, :]
    total = tl.zeros((BT, k.shape[0]), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * BT * P1 + place, mask=inside, other=0.0, cache_modifier=".cg")
    return total + tl.load(b1 + k, mask=k < N1, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _third_stage(
    parts, b1, w2, rows,
    N1: tl.constexpr, N2: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The last stage from the splits' parts, without its bias: float32 [BT, P2]."""
    column = tl.arange(0, P2)
    total = tl.zeros((BT, P2), tl.float32)
    for start in range(0, N1, BK):
        k = start + tl.arange(0, BK)
        hidden = _silu(_add_parts(parts, b1, rows, k, N1, P1, BT, SPLITS))
        w = tl.load(w2 + k[:, None] * N2 + column[None, :], mask=(k < N1)[:, None] & (column < N2)[None, :], other=0.0)
        total = tl.dot(hidden.to(DOT), w.to(DOT), total, input_precision="ieee")
    return total


@triton.jit
def _store_code(
    logits, out, scale_out, first, table, head, heads, row, rows, tokens, cached, so0, so1, so2, table_width, page,
    BITS: tl.constexpr, PADDED: tl.constexpr, BT: tl.constexpr,
    LEVELS: tl.constexpr, WRITES: tl.constexpr, BACK: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Integer codes of logits [BT, PADDED], or their packed signs, at their places."""
    request, token = (row // tokens).to(tl.int64), row % tokens
    if LEVELS > 0:
        lane = tl.arange(0, PADDED)
        # The levels' division and rounding must be IEEE: the reference rounds to even.
        scale = tl.div_rn(tl.max(tl.where((lane < BITS)[None, :], tl.abs(logits), 0.0), 1), LEVELS * 1.0)
        code = tl.div_rn(logits, tl.broadcast_to(tl.maximum(scale, 1.1754943508222875e-38)[:, None], logits.shape))
        code = (code + 12582912.0) - 12582912.0
        code = tl.minimum(tl.maximum(code, -LEVELS * 1.0), LEVELS * 1.0).to(tl.int8)
        place = (request * heads + head) * tokens + token
        tl.store(scale_out + place, scale, mask=rows)
        tl.store(out + place[:, None] * BITS + lane[None, :], code, mask=rows[:, None] & (lane < BITS)[None, :])
    else:
        words: tl.constexpr = PADDED // 32
        lane = tl.arange(0, 32)[None, None, :]
        packed = tl.sum((tl.reshape(logits, (BT, words, 32)) > 0).to(tl.int32) << lane, 2)
        position = token.to(tl.int64)
        if WRITES:
            position += tl.load(first + request, mask=rows, other=0) - BACK
            rows = rows & (position >= 0) & (position < cached)
        if PAGED:
            number = tl.load(table + request * table_width + position // page, mask=rows, other=0).to(tl.int64)
            place = number * so0 + (position % page) * so2
        else:
            place = request * so0 + position * so2
        word = tl.arange(0, words)
        place = out + place[:, None] + head.to(tl.int64) * so1 + word[None, :]
        tl.store(place, packed, mask=rows[:, None] & (word < BITS // 32)[None, :])


@triton.jit
def _encode_head(
    x, w0, b0, w1, b1, w2, b2, out, scale_out, first, table, parts, tickets,
    split, block, head, heads, count, tokens, cached, sx0, sx1, sx2, so0, so1, so2, table_width, page,
    IN: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    STAGES: tl.constexpr, LEVELS: tl.constexpr, WRITES: tl.constexpr, BACK: tl.constexpr, PAGED: tl.constexpr,
    SPLITS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Rows of one block through one head's map; `parts` and `tickets` are this block's and head's own."""
    row = block * BT + tl.arange(0, BT)
    rows = row < count
    x_row = x + (row // tokens).to(tl.int64) * sx0 + head.to(tl.int64) * sx1 + (row % tokens).to(tl.int64) * sx2
    w0 += head.to(tl.int64) * IN * N0
    b0 += head * N0
    bits: tl.constexpr = N0 if STAGES == 1 else (N1 if STAGES == 2 else N2)
    padded: tl.constexpr = P2 if STAGES == 3 else P1
    if STAGES > 1:
        w1 += head.to(tl.int64) * N0 * N1
        b1 += head * N1
    if STAGES == 3:
        w2 += head.to(tl.int64) * N1 * N2
        b2 += head * N2
    done = split == 0
    if SPLITS > 1:
        share: tl.constexpr = (N0 + SPLITS * BN - 1) // (SPLITS * BN) * BN
        begin = split * share
        total = _second_stage(
            x_row, rows, w0, b0, w1, begin, tl.minimum(begin + share, N0), IN, N0, N1, P1, BN, BK, DOT
        )
        mine = tl.arange(0, P1)
        part = (split * BT + tl.arange(0, BT)[:, None]) * P1 + mine[None, :]
        tl.store(parts + part, total, mask=rows[:, None] & (mine < N1)[None, :])
        tl.debug_barrier()
        done = tl.atomic_add(tickets, 1, sem="acq_rel") == SPLITS - 1
    if done:
        if SPLITS > 1:
            tl.store(tickets, 0)
        if STAGES == 1:
            logits = _first_stage(x_row, rows, w0, b0, 0, IN, N0, P1, BK, DOT)
        elif SPLITS == 1:
            column = tl.arange(0, P1)
            logits = _second_stage(x_row, rows, w0, b0, w1, 0, N0, IN, N0, N1, P1, BN, BK, DOT)
            logits += tl.load(b1 + column, mask=column < N1, other=0.0).to(tl.float32)[None, :]
        elif STAGES == 2:
            logits = _add_parts(parts, b1, rows, tl.arange(0, P1), N1, P1, BT, SPLITS)
        if STAGES == 3:
            column = tl.arange(0, P2)
            if SPLITS == 1:
                k = tl.arange(0, P1)
                inside = (k < N1)[:, None] & (column < N2)[None, :]
                w = tl.load(w2 + k[:, None] * N2 + column[None, :], mask=inside, other=0.0)
                logits = tl.dot(_silu(logits).to(DOT), w.to(DOT), input_precision="ieee")
            else:
                logits = _third_stage(parts, b1, w2, rows, N1, N2, P1, P2, BT, BK, SPLITS, DOT)
            logits += tl.load(b2 + column, mask=column < N2, other=0.0).to(tl.float32)[None, :]
        _store_code(
            logits, out, scale_out, first, table, head, heads, row, rows, tokens, cached, so0, so1, so2, table_width,
            page, bits, padded, BT, LEVELS, WRITES, BACK, PAGED,
        )  # fmt: skip


@triton.jit
def _encode(
    x, w0, b0, w1, b1, w2, b2, out, scale_out, first, table, parts, tickets,
    count, tokens, cached, sx0, sx1, sx2, so0, so1, so2, table_width, page,
    IN: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    STAGES: tl.constexpr, LEVELS: tl.constexpr, WRITES: tl.constexpr, PAGED: tl.constexpr,
    SPLITS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    split, block, head = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS, tl.program_id(1)
    if SPLITS > 1:
        place = head * (tl.num_programs(0) // SPLITS) + block
        parts += place * (SPLITS * BT * P1)
        tickets += place
    _encode_head(
        x, w0, b0, w1, b1, w2, b2, out, scale_out, first, table, parts, tickets,
        split, block, head, tl.num_programs(1), count, tokens, cached, sx0, sx1, sx2, so0, so1, so2, table_width, page,
        IN, N0, N1, N2, P1, P2, STAGES, LEVELS, WRITES, 0, PAGED, SPLITS, BT, BN, BK, DOT,
    )  # fmt: skip


@triton.jit
def _encode_pair(
    x, w0, b0, w1, b1, w2, b2, out, scale_out,
    key, kw0, kb0, kw1, kb1, kw2, kb2, cache, end, table, parts, tickets,
    count, heads, key_heads, cached, sx0, sx1, so0, so1, so2, sk0, sk1, sc0, sc1, sc2, table_width, page,
    IN: tl.constexpr, KEY_IN: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    P1: tl.constexpr, P2: tl.constexpr, STAGES: tl.constexpr, LEVELS: tl.constexpr, PAGED: tl.constexpr,
    SPLITS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KEY_BK: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """One query and one key a request: heads 0..heads are the queries', the rest the keys', signed into
    position ``end[b] - 1``.
    """
    split, block, head = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS, tl.program_id(1)
    if SPLITS > 1:
        place = head * (tl.num_programs(0) // SPLITS) + block
        parts += place * (SPLITS * BT * P1)
        tickets += place
    if head < heads:
        _encode_head(
            x, w0, b0, w1, b1, w2, b2, out, scale_out, end, table, parts, tickets,
            split, block, head, heads, count, 1, 1, sx0, sx1, 0, so0, so1, so2, table_width, page,
            IN, N0, N1, N2, P1, P2, STAGES, LEVELS, False, 0, False, SPLITS, BT, BN, BK, DOT,
        )  # fmt: skip
    else:
        _encode_head(
            key, kw0, kb0, kw1, kb1, kw2, kb2, cache, scale_out, end, table, parts, tickets,
            split, block, head - heads, key_heads, count, 1, cached, sk0, sk1, 0, sc0, sc1, sc2, table_width, page,
            KEY_IN, N0, N1, N2, P1, P2, STAGES, 0, True, 1, PAGED, SPLITS, BT, BN, KEY_BK, DOT,
        )  # fmt: skip


def dot_type(x: Tensor, weight: Tensor) -> tl.dtype:
    """What the products multiply: the common 16-bit type, else float32 (bf16 products are wrong in Triton's
    interpreter).
    """
    interpreted = _encode.__class__.__name__ == "InterpretedFunction"
    same = x.dtype == weight.dtype and x.dtype in (torch.float16, torch.bfloat16)
    if not same or (interpreted and x.dtype == torch.bfloat16):
        return tl.float32
    return tl.float16 if x.dtype == torch.float16 else tl.bfloat16


def splits_of(hidden: int, programs: int) -> int:
    """Programs that share one block's hidden columns: enough for two a multiprocessor."""
    return max(1, min(MOST_SPLITS, hidden // SPLIT_COLUMNS, 2 * MULTIPROCESSORS // programs))


def _shape(widths: list[int], splits: int) -> dict[str, Any]:
    """The constants of a map's stages."""
    filled, stages = [*widths, 0, 0][:3], len(widths)
    padded = [triton.next_power_of_2(n) for n in filled]
    first = padded[0] if stages == 1 else padded[1]
    block = SPLIT_COLUMNS if splits > 1 else min(64, max(16, padded[0]))
    named = dict(zip(("N0", "N1", "N2"), filled, strict=True))
    return named | {"P1": first, "P2": max(padded[2], 1), "STAGES": stages, "SPLITS": splits, "BN": block}


def _k_block(width: int) -> int:
    return 64 if width > 32 else max(16, triton.next_power_of_2(width))


def _map(weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    """Weight and bias of the first, the second and the last stage; a missing second is any tensor."""
    weights, biases = [w.contiguous() for w in weights], [b.contiguous() for b in biases]
    second = min(1, len(weights) - 1)
    return [weights[0], biases[0], weights[second], biases[second], weights[-1], biases[-1]]


def _scratch(
    splits: int, programs: int, block: int, shape: dict[str, Any], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Room for the splits' parts, and their tickets."""
    if splits == 1:
        return None, None
    parts = torch.empty(programs * splits * block * shape["P1"], dtype=torch.float32, device=device)
    return parts, take(programs, device)


def launch(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    out: Tensor,
    scale: Tensor | None = None,
    *,
    levels: int = 0,
    first: Tensor | None = None,
    block_table: Tensor | None = None,
) -> None:
    """Encode x ``[B, H, T, in]`` into `out`: packed signs, int8 codes if `levels`, at cache positions
    ``first[b] + t`` if `first` is given.
    """
    batch, heads, tokens, width = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    block = MANY if triton.cdiv(batch * tokens, MANY) * heads >= MULTIPROCESSORS else FEW
    blocks = triton.cdiv(batch * tokens, block)
    few = block == FEW and len(weights) > 1
    splits = splits_of(weights[0].shape[2], blocks * heads) if few else 1
    shape = _shape([w.shape[2] for w in weights], splits)
    parts, tickets = _scratch(splits, blocks * heads, block, shape, x.device)
    page = out.shape[2]
    cached = page if block_table is None else block_table.shape[1] * page
    _encode[(blocks * splits, heads)](
        x, *_map(weights, biases), out, scale, first, block_table, parts, tickets,
        batch * tokens, tokens, cached, *x.stride()[:3], *out.stride()[:3],
        0 if block_table is None else block_table.stride(0), page,
        IN=width, **shape, LEVELS=levels, WRITES=first is not None, PAGED=block_table is not None,
        BT=block, BK=_k_block(width), DOT=dot_type(x, weights[0]), num_warps=8 if block > FEW else 4,
    )  # fmt: skip


def launch_pair(
    x: Tensor,
    maps: tuple[list[Tensor], list[Tensor]],
    code: Tensor,
    scale: Tensor,
    levels: int,
    key: Tensor,
    key_maps: tuple[list[Tensor], list[Tensor]],
    cache: Tensor,
    end: Tensor,
    block_table: Tensor | None,
) -> None:
    """Queries ``[B, Hc, 1, in]`` to codes and keys ``[B, Hs, 1, in]`` to position ``end[b] - 1`` of the cache, in one
    launch; both maps have the same widths behind their inputs.
    """
    batch, heads, key_heads = x.shape[0], x.shape[1], key.shape[1]
    x, key = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, key))
    widths, blocks = [w.shape[2] for w in maps[0]], triton.cdiv(batch, FEW)
    splits = splits_of(widths[0], blocks * (heads + key_heads)) if len(widths) > 1 else 1
    shape = _shape(widths, splits)
    parts, tickets = _scratch(splits, blocks * (heads + key_heads), FEW, shape, x.device)
    page = cache.shape[2]
    cached = page if block_table is None else block_table.shape[1] * page
    _encode_pair[(blocks * splits, heads + key_heads)](
        x, *_map(*maps), code, scale, key, *_map(*key_maps), cache, end, block_table, parts, tickets,
        batch, heads, key_heads, cached, *x.stride()[:2], *code.stride()[:3], *key.stride()[:2], *cache.stride()[:3],
        0 if block_table is None else block_table.stride(0), page,
        IN=x.shape[3], KEY_IN=key.shape[3], **shape, LEVELS=levels, PAGED=block_table is not None,
        BT=FEW, BK=_k_block(x.shape[3]), KEY_BK=_k_block(key.shape[3]), DOT=dot_type(x, maps[0][0]), num_warps=4,
    )  # fmt: skip


def encode_signature(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """As `reference.encode_signature`."""
    out = torch.empty((*x.shape[:3], weights[-1].shape[-1] // 32), dtype=torch.int32, device=x.device)
    launch(x, weights, biases, out)
    return out


def write_signature(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    cache: Tensor,
    first: Tensor,
    block_table: Tensor | None = None,
) -> None:
    """As `reference.write_signature`."""
    launch(x, weights, biases, cache, first=first, block_table=block_table)


def encode_query(x: Tensor, weights: list[Tensor], biases: list[Tensor], levels: int) -> tuple[Tensor, Tensor]:
    """As `reference.encode_query`."""
    code = torch.empty((*x.shape[:3], weights[-1].shape[-1]), dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:3], dtype=torch.float32, device=x.device)
    launch(x, weights, biases, code, scale, levels=levels)
    return code, scale
