"""decode: the whole sparse step in four launches: encode, score and count, write indices, attend."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattention.ops.shapes import Remainder
from hashattention.ops.triton.attend import attend
from hashattention.ops.triton.encode import dot_type, launch, launch_pair, write_signature
from hashattention.ops.triton.remainder import add_remainder
from hashattention.ops.triton.select import score_select

#: The newest key ``[B, Hs, 1, D]`` and its map's weights and biases.
NewKey = tuple[Tensor, list[Tensor], list[Tensor]]


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
    softcap: float = 0.0,
    block_table: Tensor | None = None,
    new_key: NewKey | None = None,
    v_scale: float = 1.0,
    remainder: Remainder | None = None,
) -> tuple[Tensor, Tensor]:
    """As the op `decode`; `new_key` is encoded in the same launch as q, its signature goes to ``end[b] - 1``. A
    remainder is one launch more.
    """
    batch, maps, bits = q.shape[0], weights[0].shape[0], weights[-1].shape[-1]
    # One query a head, so a group's queries already lie side by side.
    x = q.reshape(batch, maps, 1, -1)
    if levels:
        code = torch.empty((batch, maps, 1, bits), dtype=torch.int8, device=q.device)
    else:
        code = torch.empty((batch, maps, 1, bits // 32), dtype=torch.int32, device=q.device)
    rate = torch.empty((batch, maps, 1), dtype=torch.float32, device=q.device)
    if new_key and dot_type(new_key[0], new_key[1][0]) == dot_type(x, weights[0]):
        key, maps_of_key = new_key[0], new_key[1:]
        launch_pair(x, (weights, biases), code, rate, levels, key, maps_of_key, signatures, end, block_table)
    else:
        if new_key:
            write_signature(*new_key, signatures, end - 1, block_table)
        launch(x, weights, biases, code, rate, levels=levels)
    bounds = (start, end, budgets, capacity)
    indices, counts = score_select(code, signatures, *bounds, block_table=block_table, levels=levels or 127)
    out, logsumexp = attend(q, k, v, indices, counts, scale, softcap, block_table, v_scale=v_scale)
    if remainder is not None:
        sums, lengths, coefficients = remainder
        out = add_remainder(out, logsumexp, q, sums, counts, lengths, coefficients, scale, softcap)
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
    v_scale: float = 1.0,
    remainder: Remainder | None = None,
) -> tuple[Tensor, Tensor]:
    """As the op `decode`: out ``[B, Hq, 1, Dv]`` and logsumexp ``[B, Hq, 1]``."""
    rows = start, end, budgets, capacity
    return decode_step(
        q, k, v, signatures, weights, biases, *rows, levels, scale, softcap, block_table, None, v_scale, remainder
    )
