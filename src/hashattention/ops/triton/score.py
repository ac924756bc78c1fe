"""score: integer scores of all signatures by population counts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hashattention.ops.shapes import mixture_of


@triton.jit
def count_bits(x):
    """Population count of int32; the pattern compiles to one popc instruction."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def load_signatures(
    signatures, table, request, head, token, inside, s0, s1, s2, table_width, page,
    W: tl.constexpr, WP: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """int32 [tokens, WP] of one signature head."""
    word = tl.arange(0, WP)
    if PAGED:
        number = tl.load(table + request.to(tl.int64) * table_width + token // page, mask=inside, other=0).to(tl.int64)
        row = number * s0 + (token % page).to(tl.int64) * s2
    else:
        row = request.to(tl.int64) * s0 + token.to(tl.int64) * s2
    place = signatures + head.to(tl.int64) * s1 + row[:, None] + word[None, :]
    return tl.load(place, mask=inside[:, None] & (word < W)[None, :], other=0)


@triton.jit
def match_weights(code, keys, W: tl.constexpr, WP: tl.constexpr, PLANES: tl.constexpr):
    """Sum of the integer weights at `code` whose bits of `keys` int32 [tokens, WP] are set, and the weights
    [WP, 32].
    """
    word, lane = tl.arange(0, WP), tl.arange(0, 32)
    place = code + word[:, None] * 32 + lane[None, :]
    weight = tl.load(place, mask=(word < W)[:, None], other=0).to(tl.int32)
    counts = tl.zeros(keys.shape, tl.int32)
    for p in tl.static_range(PLANES):
        plane = tl.sum(((weight >> p) & 1) << lane[None, :], 1)
        counted = count_bits(keys & plane[None, :]) << p
        counts += -counted if p == PLANES - 1 else counted
    return tl.sum(counts, 1), weight


@triton.jit
def count_matches(
    code, signatures, table, request, head, token, inside, code_heads, signature_heads, s0, s1, s2, table_width, page,
    W: tl.constexpr, WP: tl.constexpr, CODES: tl.constexpr, PLANES: tl.constexpr, MIXED: tl.constexpr,
    PAGED: tl.constexpr, RAISED: tl.constexpr,
):  # fmt: skip
    """int32 [tokens]: half the score, shifted. RAISED: the shift makes it 0 or more, else it is (score + sum of
    weights) / 2.

    All scores of a row have the same parity, so half of them orders the same and needs half the levels. Those of a
    mixture (MIXED codes a head) have not: for these it is the score itself, RAISED by the largest there can be.
    """
    total = tl.zeros(token.shape, tl.int32)
    for i in tl.static_range(CODES):
        c = head * CODES + i
        keys = load_signatures(
            signatures,
            table,
            request,
            c * signature_heads // code_heads,
            token,
            inside,
            s0,
            s1,
            s2,
            table_width,
            page,
            W,
            WP,
            PAGED,
        )
        word = tl.arange(0, WP)
        row = request.to(tl.int64) * code_heads + c
        if PLANES == 0:
            query = tl.load(code + row * W + word, mask=word < W, other=0)
            total += W * 32 - tl.sum(count_bits(keys ^ query[None, :]), 1)
        elif MIXED == 1:
            matched, weight = match_weights(code + row * W * 32, keys, W, WP, PLANES)
            total += matched
            if RAISED:
                total -= tl.sum(tl.sum(tl.minimum(weight, 0), 1), 0)
        else:
            best = tl.full(token.shape, -(1 << 30), tl.int32)
            for m in tl.static_range(MIXED):
                matched, weight = match_weights(code + (row * MIXED + m) * W * 32, keys, W, WP, PLANES)
                best = tl.maximum(best, 2 * matched - tl.sum(tl.sum(weight, 1), 0))
            total += best
            if RAISED:
                total += W * 32 * ((1 << (PLANES - 1)) - 1)
    return total


@triton.jit
def _score(
    code, signatures, table, out, tokens, code_heads, signature_heads, s0, s1, s2, table_width, page,
    W: tl.constexpr, WP: tl.constexpr, CODES: tl.constexpr, PLANES: tl.constexpr, MIXED: tl.constexpr,
    PAGED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head, request = tl.program_id(1), tl.program_id(2)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = token < tokens
    total = count_matches(
        code, signatures, table, request, head, token, inside, code_heads, signature_heads, s0, s1, s2, table_width,
        page,
        W, WP, CODES, PLANES, MIXED, PAGED, False,
    )  # fmt: skip
    # Of codes that are not mixed: score = 2 (matches) - (sum of the weights); a bit code's weights are ones.
    if PLANES == 0:
        total = 2 * total - CODES * W * 32
    elif MIXED == 1:
        first = (request.to(tl.int64) * code_heads + head * CODES) * W * 32
        entry = tl.arange(0, WP * 32)
        total = 2 * total
        for i in tl.static_range(CODES):
            weight = tl.load(code + first + i * W * 32 + entry, mask=entry < W * 32, other=0)
            total -= tl.sum(weight.to(tl.int32), 0)
    row = (request.to(tl.int64) * tl.num_programs(1) + head) * tokens
    tl.store(out + row + token, total, mask=inside)


def planes_of(code: Tensor, levels: int) -> int:
    """Bit planes of the integer weights -levels..levels in two's complement; 0 for a bit code."""
    return 0 if code.dtype == torch.int32 else levels.bit_length() + 1


def tokens_of(signatures: Tensor, block_table: Tensor | None) -> int:
    """T: tokens a row of a dense or paged cache spans."""
    return signatures.shape[2] if block_table is None else block_table.shape[1] * signatures.shape[2]


def score(code: Tensor, signatures: Tensor, selection_heads: int, block_table: Tensor | None = None) -> Tensor:
    """As `reference.score`."""
    batch, code_heads = code.shape[:2]
    signatures = signatures if signatures.stride(-1) == 1 else signatures.contiguous()
    tokens, words = tokens_of(signatures, block_table), signatures.shape[-1]
    out = torch.empty((batch, selection_heads, tokens), dtype=torch.int32, device=code.device)
    grid = (triton.cdiv(tokens, 1024), selection_heads, batch)
    _score[grid](
        code.contiguous(), signatures, block_table, out, tokens, code_heads, signatures.shape[1],
        *signatures.stride()[:3],
        0 if block_table is None else block_table.stride(0), signatures.shape[2],
        W=words, WP=triton.next_power_of_2(words), CODES=code_heads // selection_heads, PLANES=planes_of(code, 127),
        MIXED=mixture_of(code, words), PAGED=block_table is not None, TILE=1024, num_warps=4,
    )  # fmt: skip
    return out
