"""pool: a launch for the heads' peaks, and one that reads the logits again and writes the group's scores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Tokens a program, and tokens it holds at once while it looks for the peak.
PART, TILE = 8192, 1024
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _inside(start, end, request, token, tokens):
    begin, stop = tl.load(start + request), tl.load(end + request)
    return (token >= begin) & (token < stop) & (token < tokens)


@triton.jit
def _find_peaks(logits, start, end, peaks, tokens, heads, parts, PART: tl.constexpr, TILE: tl.constexpr):
    """The largest logit of a head in one part of its row."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    best = tl.full((TILE,), LOWEST, tl.float32)
    for offset in range(0, PART, TILE):
        token = part * PART + offset + tl.arange(0, TILE)
        inside = _inside(start, end, row // heads, token, tokens)
        best = tl.maximum(best, tl.load(logits + row * tokens + token, mask=inside, other=LOWEST))
    tl.store(peaks + row * parts + part, tl.max(best, 0))


@triton.jit
def _relative(logits, peaks, row, token, inside, tokens, parts, PEAK: tl.constexpr, PARTS: tl.constexpr):
    """A head's logits, less its peak; -inf outside."""
    value = tl.load(logits + row * tokens + token, mask=inside, other=float("-inf"))
    if PEAK:
        part = tl.arange(0, PARTS)
        found = tl.load(peaks + row * parts + part, mask=part < parts, other=LOWEST)
        value -= tl.max(found, 0)
    return value


@triton.jit
def _pool(
    logits, start, end, peaks, out, tokens, heads, parts,
    GROUP: tl.constexpr, HOW: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = _inside(start, end, pair // heads, token, tokens)
    first = pair * GROUP
    found = _relative(logits, peaks, first, token, inside, tokens, parts, HOW != "logits", PARTS)
    for member in range(1, GROUP):
        value = _relative(logits, peaks, first + member, token, inside, tokens, parts, HOW != "logits", PARTS)
        found = found + value if HOW == "logits" else tl.maximum(found, value)
    if HOW == "logits":
        found = found / GROUP
    if HOW == "peak_sum":
        # Relative to the largest, so that weights far below a peak keep their order.
        largest = tl.maximum(found, LOWEST)
        total = tl.zeros((TILE,), tl.float32)
        for member in range(GROUP):
            value = _relative(logits, peaks, first + member, token, inside, tokens, parts, True, PARTS)
            total += tl.exp(value - largest)
        found = found + tl.log(tl.maximum(total, 1.0))
    tl.store(out + pair * tokens + token, found, mask=token < tokens)


def pool(logits: Tensor, start: Tensor, end: Tensor, how: str) -> Tensor:
    """As `reference.pool`."""
    batch, heads, group, tokens = logits.shape
    logits, start, end = logits.contiguous(), start.contiguous(), end.contiguous()
    parts = triton.cdiv(tokens, PART)
    peaks = torch.empty((batch * heads * group, parts), dtype=torch.float32, device=logits.device)
    if how != "logits":
        _find_peaks[(parts, batch * heads * group)](
            logits, start, end, peaks, tokens, heads * group, parts, PART=PART, TILE=TILE, num_warps=4
        )
    out = torch.empty((batch, heads, tokens), dtype=torch.float32, device=logits.device)
    _pool[(triton.cdiv(tokens, TILE), batch * heads)](
        logits, start, end, peaks, out, tokens, heads, parts,
        GROUP=group, HOW=how, PARTS=triton.next_power_of_2(parts), TILE=TILE, num_warps=4,
    )  # fmt: skip
    return out
