"""logits: K is read once for all queries of a group, on the tensor cores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Tokens a program.
TILE = 128


@triton.jit
def _logits(
    q, k, out, tokens, heads, scale, q0, q1, k0, k1, k2,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    request, head = row // heads, row % heads
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    member, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside, real = token < tokens, member < GROUP
    key = tl.load(
        k + request * k0 + head * k1 + token.to(tl.int64)[:, None] * k2 + d[None, :],
        mask=inside[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    query = tl.load(
        q + request * q0 + (head * GROUP + member)[None, :] * q1 + d[:, None],
        mask=real[None, :] & (d < DIM)[:, None],
        other=0.0,
    )
    sums = tl.dot(key, query, input_precision="ieee") * scale
    place = out + (row * GROUP + member)[None, :] * tokens + token[:, None]
    tl.store(place, sums, mask=inside[:, None] & real[None, :])


def logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """As `reference.logits`."""
    batch, heads, tokens, dim = k.shape
    group = q.shape[1] // heads
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    out = torch.empty((batch, q.shape[1], tokens), dtype=torch.float32, device=q.device)
    _logits[(triton.cdiv(tokens, TILE), batch * heads)](
        q, k, out, tokens, heads, scale, q.stride(0), q.stride(1), *k.stride()[:3],
        GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), DIM=dim, WIDTH=max(16, triton.next_power_of_2(dim)),
        TILE=TILE, num_warps=4,
    )  # fmt: skip
    return out
