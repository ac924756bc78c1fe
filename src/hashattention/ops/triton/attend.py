"""attend: attention over gathered rows, split over many programs; the last one of a row to finish merges the parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hashattention.ops.triton.tickets import take


@triton.jit
def _rows_of(indices, slot, inside, request, table, s0, s2, table_width, page, PAGED: tl.constexpr):
    """Offset of each slot's cache row."""
    token = tl.load(indices + slot, mask=inside, other=0)
    if PAGED:
        number = tl.load(table + request.to(tl.int64) * table_width + token // page, mask=inside, other=0).to(tl.int64)
        return number, (token % page).to(tl.int64)
    return tl.zeros(token.shape, tl.int64) + request, token.to(tl.int64)


@triton.jit
def _merge(parts, maxima, sums, splits, row, DV: tl.constexpr, DVP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr):
    """Sum of the splits' parts, rescaled to their common maximum: out [RP, DVP], maximum and sum [RP]."""
    r, d = tl.arange(0, RP), tl.arange(0, DVP)
    top = tl.full((RP,), float("-inf"), tl.float32)
    total = tl.zeros((RP,), tl.float32)
    out = tl.zeros((RP, DVP), tl.float32)
    for split in range(0, splits):
        place = (row * splits + split) * R + r
        inside = r < R
        m = tl.load(maxima + place, mask=inside, other=float("-inf"), cache_modifier=".cg")
        s = tl.load(sums + place, mask=inside, other=0.0, cache_modifier=".cg")
        part = tl.load(
            parts + place[:, None] * DV + d[None, :],
            mask=inside[:, None] & (d < DV)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        higher = tl.maximum(top, m)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        old, new = tl.exp2(top - safe), tl.exp2(m - safe)
        out = out * old[:, None] + part * new[:, None]
        total = total * old + s * new
        top = higher
    return out, top, total


@triton.jit
def _attend(
    q, k, v, indices, counts, table, out, logsumexp, parts, maxima, sums, tickets,
    scale, softcap, v_scale, capacity, ratio, sq0, sq1, sk0, sk1, sk2, sv0, sv1, sv2, table_width, page,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, PAGED: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    split, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    row = request.to(tl.int64) * heads + head
    count = tl.minimum(tl.load(counts + row), capacity)
    share = (count + SPLITS - 1) // SPLITS
    first = split * share
    last = tl.minimum(first + share, count)
    kv_head = (head // ratio).to(tl.int64)
    r, d, dv = tl.arange(0, RP), tl.arange(0, DP), tl.arange(0, DVP)
    place = q + request.to(tl.int64) * sq0 + (head * R + r).to(tl.int64)[:, None] * sq1 + d[None, :]
    query = tl.load(place, mask=(r < R)[:, None] & (d < D)[None, :], other=0.0).to(DOT)
    top = tl.full((RP,), float("-inf"), tl.float32)
    total = tl.zeros((RP,), tl.float32)
    sum_v = tl.zeros((RP, DVP), tl.float32)
    for begin in range(first, last, BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        inside = slot < last
        outer, inner = _rows_of(
            indices + row * capacity, slot, inside, request, table, sk0, sk2, table_width, page, PAGED
        )
        key_row = outer * sk0 + kv_head * sk1 + inner * sk2
        value_row = outer * sv0 + kv_head * sv1 + inner * sv2
        keys = tl.load(k + key_row[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        values = tl.load(v + value_row[:, None] + dv[None, :], mask=inside[:, None] & (dv < DV)[None, :], other=0.0)
        logits = tl.dot(query, tl.trans(keys.to(DOT)), input_precision="ieee") * scale
        if CAPPED:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), in base 2 as all exponentials here.
            logits = softcap * (1 - 2 / (tl.exp2(logits * (2 * 1.4426950408889634 / softcap)) + 1))
        logits = tl.where(inside[None, :], logits * 1.4426950408889634, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        weight = tl.exp2(logits - higher[:, None])
        old = tl.exp2(top - higher)
        total = total * old + tl.sum(weight, 1)
        sum_v = tl.dot(weight.to(DOT), values.to(DOT), sum_v * old[:, None], input_precision="ieee")
        top = higher

    here = r < R
    done = split == 0
    if SPLITS > 1:
        part = (row * SPLITS + split) * R + r
        tl.store(parts + part[:, None] * DV + dv[None, :], sum_v, mask=here[:, None] & (dv < DV)[None, :])
        tl.store(maxima + part, top, mask=here)
        tl.store(sums + part, total, mask=here)
        tl.debug_barrier()
        done = tl.atomic_add(tickets + row, 1, sem="acq_rel") == SPLITS - 1
    if done:
        if SPLITS > 1:
            tl.store(tickets + row, 0)
            sum_v, top, total = _merge(parts, maxima, sums, SPLITS, row, DV, DVP, R, RP)
        result = sum_v * (v_scale / tl.where(total > 0, total, 1.0))[:, None]
        head_row = row * R + r
        tl.store(
            out + head_row[:, None] * DV + dv[None, :],
            result.to(out.dtype.element_ty),
            mask=here[:, None] & (dv < DV)[None, :],
        )
        natural = (top + tl.log2(total)) * 0.6931471805599453
        tl.store(logsumexp + head_row, tl.where(total > 0, natural, float("-inf")), mask=here)


def splits_of(capacity: int, rows: int) -> int:
    """Programs a row: enough for four a multiprocessor, none with fewer than 32 slots."""
    return max(1, min(triton.cdiv(528, rows), triton.cdiv(capacity, 32), 64))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    scale: float,
    softcap: float = 0.0,
    block_table: Tensor | None = None,
    v_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """As `reference.attend`."""
    batch, query_heads, _, dim = q.shape
    heads, capacity = indices.shape[1:]
    rows, per_row, dim_v, device = batch * heads, query_heads // heads, v.shape[-1], q.device
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    splits = splits_of(capacity, rows)
    out = torch.empty((batch, query_heads, 1, dim_v), dtype=q.dtype, device=device)
    logsumexp = torch.empty((batch, query_heads, 1), dtype=torch.float32, device=device)
    parts = sums = tickets = None
    if splits > 1:
        scratch = torch.empty(rows * splits * per_row * (dim_v + 2), dtype=torch.float32, device=device)
        each = rows * splits * per_row
        parts, sums = scratch[: each * dim_v], scratch[each * dim_v :].view(2, each)
        tickets = take(rows, device)
    interpreted = _attend.__class__.__name__ == "InterpretedFunction"
    short = q.dtype == torch.float16 or (q.dtype == torch.bfloat16 and not interpreted)
    _attend[(splits, heads, batch)](
        q, k, v, indices.contiguous(), counts.contiguous(), block_table, out, logsumexp,
        parts, None if sums is None else sums[0], None if sums is None else sums[1], tickets,
        scale, softcap, v_scale, capacity, heads // k.shape[1],
        q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3],
        0 if block_table is None else block_table.stride(0), k.shape[2],
        D=dim, DP=max(16, triton.next_power_of_2(dim)), DV=dim_v, DVP=max(16, triton.next_power_of_2(dim_v)),
        R=per_row, RP=max(16, triton.next_power_of_2(per_row)), SPLITS=splits, BLOCK=32, PAGED=block_table is not None,
        CAPPED=softcap != 0, DOT=(tl.float16 if q.dtype == torch.float16 else tl.bfloat16) if short else tl.float32,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out, logsumexp
