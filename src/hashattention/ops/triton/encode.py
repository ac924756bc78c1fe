"""encode: every head's MLP of a layer in one launch, ending in packed signs or integer codes; signatures may go
straight to a cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Bytes of the last stage's weights one program keeps whole; a wider last stage is refused.
LAST_STAGE_BYTES = 65536


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
    x_row,
    rows,
    w0,
    b0,
    w1,
    b1,
    IN: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    P1: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Both stages, the hidden layer made and used BN columns at a time: float32 [BT, P1]."""
    column = tl.arange(0, P1)
    total = tl.zeros((x_row.shape[0], P1), tl.float32)
    for start in range(0, N0, BN):
        hidden = _silu(_first_stage(x_row, rows, w0, b0, start, IN, N0, BN, BK, DOT))
        k = start + tl.arange(0, BN)
        w = tl.load(w1 + k[:, None] * N1 + column[None, :], mask=(k < N0)[:, None] & (column < N1)[None, :], other=0.0)
        total = tl.dot(hidden.to(DOT), w.to(DOT), total, input_precision="ieee")
    return total + tl.load(b1 + column, mask=column < N1, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _encode(
    x, w0, b0, w1, b1, w2, b2, out, scale_out, first, table, zeroed,
    tokens, cached, sx0, sx1, sx2, so0, so1, so2, table_width, page, zero_count,
    IN: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    STAGES: tl.constexpr, LEVELS: tl.constexpr, WRITES: tl.constexpr, PAGED: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    block, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    if zeroed is not None:  # noqa: SIM102 (decided at compile time)
        if (block == 0) & (head == 0) & (request == 0):
            for begin in range(0, zero_count, 256):
                counter = begin + tl.arange(0, 256)
                tl.store(zeroed + counter, tl.zeros((256,), tl.int32), mask=counter < zero_count)
    token = block * BT + tl.arange(0, BT)
    rows = token < tokens
    x_row = x + request.to(tl.int64) * sx0 + head.to(tl.int64) * sx1 + token.to(tl.int64) * sx2
    w0 += head.to(tl.int64) * IN * N0
    b0 += head * N0
    bits: tl.constexpr = N0 if STAGES == 1 else (N1 if STAGES == 2 else N2)
    padded: tl.constexpr = P2 if STAGES == 3 else P1
    words: tl.constexpr = padded // 32
    if STAGES == 1:
        logits = _first_stage(x_row, rows, w0, b0, 0, IN, N0, P1, BK, DOT)
    else:
        w1 += head.to(tl.int64) * N0 * N1
        b1 += head * N1
        logits = _second_stage(x_row, rows, w0, b0, w1, b1, IN, N0, N1, P1, BN, BK, DOT)
    if STAGES == 3:
        k, column = tl.arange(0, P1), tl.arange(0, P2)
        w2 += head.to(tl.int64) * N1 * N2
        w = tl.load(w2 + k[:, None] * N2 + column[None, :], mask=(k < N1)[:, None] & (column < N2)[None, :], other=0.0)
        logits = tl.dot(_silu(logits).to(DOT), w.to(DOT), input_precision="ieee")
        logits += tl.load(b2 + head * N2 + column, mask=column < N2, other=0.0).to(tl.float32)[None, :]

    if LEVELS > 0:
        lane = tl.arange(0, padded)
        # The levels' division and rounding must be IEEE: the reference rounds to even.
        scale = tl.div_rn(tl.max(tl.where((lane < bits)[None, :], tl.abs(logits), 0.0), 1), LEVELS * 1.0)
        code = tl.div_rn(logits, tl.broadcast_to(tl.maximum(scale, 1.1754943508222875e-38)[:, None], logits.shape))
        code = (code + 12582912.0) - 12582912.0
        code = tl.minimum(tl.maximum(code, -LEVELS * 1.0), LEVELS * 1.0).to(tl.int8)
        row = (request.to(tl.int64) * heads + head) * tokens + token
        tl.store(scale_out + row, scale, mask=rows)
        tl.store(out + row[:, None] * bits + lane[None, :], code, mask=rows[:, None] & (lane < bits)[None, :])
    else:
        lane = tl.arange(0, 32)[None, None, :]
        packed = tl.sum((tl.reshape(logits, (BT, words, 32)) > 0).to(tl.int32) << lane, 2)
        position = token.to(tl.int64)
        if WRITES:
            position += tl.load(first + request)
            rows = rows & (position >= 0) & (position < cached)
        if PAGED:
            number = tl.load(table + request.to(tl.int64) * table_width + position // page, mask=rows, other=0).to(
                tl.int64
            )
            row = number * so0 + (position % page) * so2
        else:
            row = request.to(tl.int64) * so0 + position * so2
        word = tl.arange(0, words)
        place = out + row[:, None] + head.to(tl.int64) * so1 + word[None, :]
        tl.store(place, packed, mask=rows[:, None] & (word < bits // 32)[None, :])


def dot_type(x: Tensor, weight: Tensor, interpreted: bool) -> tl.dtype:
    """What the products multiply: the common 16-bit type, else float32 (bf16 products are wrong in Triton's
    interpreter).
    """
    same = x.dtype == weight.dtype and x.dtype in (torch.float16, torch.bfloat16)
    if not same or (interpreted and x.dtype == torch.bfloat16):
        return tl.float32
    return tl.float16 if x.dtype == torch.float16 else tl.bfloat16


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
    zeroed: Tensor | None = None,
) -> None:
    """Encode x ``[B, H, T, in]`` into `out`: packed signs, int8 codes if `levels`, at cache positions
    ``first[b] + t`` if `first` is given.

    `zeroed` is an int32 scratch that this launch clears for the launches after it.
    """
    batch, heads, tokens, width = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    weights, biases = [w.contiguous() for w in weights], [b.contiguous() for b in biases]
    widths = [w.shape[-1] for w in weights]
    filled = [*widths, 0, 0][:3]
    stages = len(weights)
    interpreted = _encode.__class__.__name__ == "InterpretedFunction"
    block = 16 if tokens <= 16 else 64
    page = out.shape[2]
    cached = page if block_table is None else block_table.shape[1] * page
    padded = [triton.next_power_of_2(n) for n in filled]
    grid = (triton.cdiv(tokens, block), heads, batch)
    _encode[grid](
        x, weights[0], biases[0], weights[min(1, stages - 1)], biases[min(1, stages - 1)], weights[-1], biases[-1],
        out, scale, first, block_table, zeroed,
        tokens, cached, *x.stride()[:3], *out.stride()[:3],
        0 if block_table is None else block_table.stride(0), page, 0 if zeroed is None else zeroed.numel(),
        IN=width, N0=filled[0], N1=filled[1], N2=filled[2], P1=padded[0] if stages == 1 else padded[1],
        P2=max(padded[2], 1),
        STAGES=stages, LEVELS=levels, WRITES=first is not None, PAGED=block_table is not None,
        BT=block, BN=min(64, max(16, padded[0])), BK=64 if width > 32 else max(16, triton.next_power_of_2(width)),
        DOT=dot_type(x, weights[0], interpreted), num_warps=8 if block > 16 else 4,
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
    """Encode keys ``[B, H, T, in]`` straight into a signature cache: token t of request b goes to position
    ``first[b] + t``.

    Positions outside the cache (dense ``[B, H, T, W]`` or paged ``[P, H, N, W]`` with its block table) are not written.
    """
    launch(x, weights, biases, cache, first=first, block_table=block_table)


def encode_query(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], levels: int, zeroed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.encode_query`."""
    code = torch.empty((*x.shape[:3], weights[-1].shape[-1]), dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:3], dtype=torch.float32, device=x.device)
    launch(x, weights, biases, code, scale, levels=levels, zeroed=zeroed)
    return code, scale
