"""Without the native kernels: numpy's popcount to score, torch's top-k to select. Exact, several times slower."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hashattention.ops import reference


def _weights(code: Tensor, signature_heads: int) -> Tensor:
    """Integer weights int32 ``[B, Hs, Hc / Hs, 32 W]`` of any code."""
    packed = code.dtype == torch.int32
    weights = reference.unpack_bits(code).to(torch.int32) * 2 - 1 if packed else code.to(torch.int32)
    return weights.squeeze(2).unflatten(1, (signature_heads, -1))


def _score_head(weights: Tensor, words: np.ndarray) -> np.ndarray:
    """Scores int32 ``[T]`` of weights ``[32 W]`` against words uint32 ``[T, W]``: one popcount per bit of a weight."""
    size, sign = weights.abs(), reference.pack_bits(weights > 0).numpy().view(np.uint32)
    agreeing = ~(words ^ sign)
    out = np.full(len(words), -int(size.sum()), dtype=np.int32)
    for bit in range(int(size.max()).bit_length()):
        plane = reference.pack_bits((size >> bit & 1).bool()).numpy().view(np.uint32)
        out += np.bitwise_count(agreeing & plane).sum(-1, dtype=np.int32) << (bit + 1)
    return out


def score(code: Tensor, signatures: Tensor, selection_heads: int, block_table: Tensor | None = None) -> Tensor:
    """As `reference.score`."""
    if block_table is not None:
        signatures = signatures[block_table.long()].transpose(1, 2).flatten(2, 3)
    weights = _weights(code, signatures.shape[1])
    batch, signature_heads, share, _ = weights.shape
    words = signatures.contiguous().numpy().view(np.uint32)
    out = np.empty((batch, signature_heads * share, signatures.shape[2]), dtype=np.int32)
    for b in range(batch):
        for head in range(signature_heads * share):
            out[b, head] = _score_head(weights[b, head // share, head % share], words[b, head // share])
    return torch.from_numpy(out).unflatten(1, (selection_heads, -1)).sum(2, dtype=torch.int32)


def select(
    scores: Tensor, start: Tensor, end: Tensor, budgets: Tensor, capacity: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.select`: scores, then positions, in one int64, so that the largest are the ones to take."""
    tokens = scores.shape[-1]
    position = torch.arange(tokens)
    valid = (position >= start[:, None]) & (position < end[:, None])
    valid = (valid if mask is None else valid & mask)[:, None]
    before = valid.cumsum(-1) - 1
    after = valid.sum(-1, keepdim=True) - 1 - before
    sink, local, heavy = budgets.long().unbind(-1)
    local = local.clamp(max=capacity)
    sink = torch.minimum(sink, capacity - local)
    heavy = torch.minimum(heavy, capacity - local - sink)
    covered = valid & ((before < sink[..., None]) | (after < local[..., None]))
    rank = scores.long() * tokens + position + tokens * 2**32
    rank = rank.masked_fill(~valid | covered, -1)
    most = min(int(heavy.max()) if heavy.numel() else 0, tokens)
    best, order = rank.topk(most, dim=-1)
    taken = (torch.arange(most) < heavy[..., None]) & (best >= 0)
    chosen = covered.expand_as(rank).clone()
    chosen.scatter_(-1, order, taken | covered.expand_as(rank).gather(-1, order))
    slot = torch.where(chosen, chosen.cumsum(-1) - 1, capacity)
    indices = torch.full((*scores.shape[:2], capacity + 1), -1, dtype=torch.int32)
    indices.scatter_(-1, slot, position.to(torch.int32).expand_as(slot))
    return indices[..., :capacity].contiguous(), chosen.sum(-1).to(torch.int32)


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
    """As `reference.score_select`."""
    scores = score(code, signatures, budgets.shape[1], block_table)
    return select(scores, start, end, budgets, capacity, mask)
