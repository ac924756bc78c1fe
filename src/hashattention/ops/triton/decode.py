"""decode: the whole sparse step in four launches: encode, score and count, write indices, attend."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattention.ops.triton.attend import attend
from hashattention.ops.triton.encode import launch
from hashattention.ops.triton.select import score_select


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
    """As the op `decode`: out ``[B, Hq, 1, Dv]`` and logsumexp ``[B, Hq, 1]``."""
    batch, heads = budgets.shape[:2]
    maps, bits = weights[0].shape[0], weights[-1].shape[-1]
    # One query a head, so a group's queries already lie side by side.
    x = q.reshape(batch, maps, 1, -1)
    tickets = torch.empty(2, batch * heads, dtype=torch.int32, device=q.device)
    if levels:
        code = torch.empty((batch, maps, 1, bits), dtype=torch.int8, device=q.device)
    else:
        code = torch.empty((batch, maps, 1, bits // 32), dtype=torch.int32, device=q.device)
    rate = torch.empty((batch, maps, 1), dtype=torch.float32, device=q.device)
    launch(x, weights, biases, code, rate, levels=levels, zeroed=tickets)
    bounds = (start, end, budgets, capacity)
    indices, counts = score_select(
        code, signatures, *bounds, block_table=block_table, levels=levels or 127, tickets=tickets[0]
    )
    return attend(q, k, v, indices, counts, scale, softcap, block_table, tickets=tickets[1])
