"""Score + select and attend, each in a launch of its own: parts of the step for those who ask for them by name."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattention.ops.cuda.layout import choose, held_signature, require
from hashattention.ops.cuda.step import launch
from hashattention.ops.shapes import mixture_of


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
    """As the op `score_select`."""
    batch, heads = budgets.shape[:2]
    bits = signatures.shape[-1] * 32
    levels = levels if code.dtype == torch.int8 else 0
    indices = torch.empty((batch, heads, capacity), dtype=torch.int32, device=code.device)
    counts = torch.empty((batch, heads), dtype=torch.int32, device=code.device)
    tokens = signatures.shape[2] * (1 if block_table is None else block_table.shape[1])
    rows = {"start": start.contiguous(), "end": end.contiguous(), "budgets": budgets.contiguous()}
    caches = {"signatures": signatures, "table": None if block_table is None else block_table.contiguous()}
    mixture, signature = mixture_of(code, bits // 32), held_signature(tokens, bits, block_table is not None)
    # No list and no outputs: the least of each.
    shape = choose(1, batch * heads, tokens, 4, 64, mixture, signature=signature)
    launch(
        1, heads=heads, batch=batch, capacity=capacity, bits=bits, levels=levels, tokens=tokens,
        tensors={"planes": code.contiguous(), **rows, **caches, "indices": indices, "counts": counts},
        shape=require(shape, tokens), mixture=mixture,
    )  # fmt: skip
    return indices, counts


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
    """As the op `attend`."""
    batch, heads, capacity = indices.shape
    out = torch.empty((*q.shape[:3], v.shape[-1]), dtype=q.dtype, device=q.device)
    logsumexp = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    table = None if block_table is None else block_table.contiguous()
    rows = {"indices": indices.contiguous(), "counts": counts.contiguous(), "table": table}
    shape = choose(2, batch * heads, 0, capacity, q.shape[1] // heads * q.shape[-1])
    launch(
        2, heads=heads, batch=batch, capacity=capacity, bits=32, levels=0, tokens=k.shape[2], scale=scale,
        softcap=softcap, tensors={"q": q.contiguous(), "k": k, "v": v, **rows, "out": out, "logsumexp": logsumexp},
        shape=require(shape, capacity),
    )  # fmt: skip
    return out, logsumexp
