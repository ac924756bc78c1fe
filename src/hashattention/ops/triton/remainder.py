"""add_remainder: one program a query head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_remainder(
    out, logsumexp, q, sums, taken, lengths, coefficients, mixed, scale, softcap,
    q_batch, q_head, sums_batch, sums_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SELECTION_HEADS: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE: tl.constexpr, VALUE_TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    request, head = row // HEADS, row % HEADS
    key = sums + request * sums_batch + head // (HEADS // KV_HEADS) * sums_head
    number = tl.load(key + DIM + VALUE_DIM)
    one_over = 1.0 / tl.maximum(number, 1.0)
    at = tl.arange(0, TILE)
    query = tl.load(q + request * q_batch + head * q_head + at, mask=at < DIM, other=0.0).to(tl.float32)
    mu = tl.sum(query * tl.load(key + at, mask=at < DIM, other=0.0), 0) * one_over * scale
    if softcap != 0.0:
        # tanh by exponentials that cannot overflow.
        less = tl.exp(-2.0 * tl.abs(mu / softcap))
        mu = softcap * tl.where(mu < 0, -1.0, 1.0) * (1.0 - less) / (1.0 + less)
    selection_head = head // (HEADS // SELECTION_HEADS)
    count = tl.load(taken + request * SELECTION_HEADS + selection_head).to(tl.float32)
    some = tl.maximum(count, 1.0)
    left = tl.maximum(tl.load(lengths + request).to(tl.float32) - count, 0.0)
    mean_weight = tl.load(logsumexp + row) - tl.log(some)
    own = coefficients + head * 3
    less = tl.load(own) + tl.load(own + 1) * (mu - mean_weight) + tl.load(own + 2) * tl.log(some / (some + left))
    less = tl.minimum(less, 0.0)
    weight = left / some * tl.exp(less)
    share = tl.where((count > 0) & (number > 0), weight / (1.0 + weight), 0.0)
    at = tl.arange(0, VALUE_TILE)
    inside = at < VALUE_DIM
    value = tl.load(key + DIM + at, mask=inside, other=0.0) * one_over
    own = tl.load(out + row * VALUE_DIM + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(mixed + row * VALUE_DIM + at, own + share * (value - own), mask=inside)


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
    batch, heads, _, dim = q.shape
    out, mixed = out.contiguous(), torch.empty(out.shape, dtype=out.dtype, device=out.device)
    q = q if q.stride(3) == 1 else q.contiguous()
    sums = sums if sums.stride(2) == 1 else sums.contiguous()
    counts = taken.contiguous(), lengths.contiguous()
    _add_remainder[(batch * heads,)](
        out, logsumexp.contiguous(), q, sums, *counts, coefficients.contiguous(), mixed, scale, softcap,
        q.stride(0), q.stride(1), sums.stride(0), sums.stride(1),
        HEADS=heads, KV_HEADS=sums.shape[1], SELECTION_HEADS=taken.shape[1],
        DIM=dim, VALUE_DIM=out.shape[3],
        TILE=triton.next_power_of_2(dim), VALUE_TILE=triton.next_power_of_2(out.shape[3]), num_warps=1,
    )  # fmt: skip
    return mixed
