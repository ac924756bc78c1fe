"""The paper's own way, as its authors' code does it: int64 signatures per query head, torch.topk, gathered rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from hashattention.bench.cases import Inputs

#: Bits of a signature, and widths of the maps, of the released models.
BITS, WIDTHS = 32, (128, 128)


def popcount(x: Tensor) -> Tensor:
    """Set bits of non-negative int64 under 2 ** 32, by halves, quarters and bytes."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) & 0xFFFFFFFF) >> 24


def encode(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """Signatures int64 ``[B, H]`` of ``[B, H, 1, D]``."""
    for stage, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = (functional.silu(x) if stage else x) @ weight + bias.unsqueeze(1)
    place = torch.arange(BITS, device=x.device)
    return ((x.squeeze(2) > 0).long() << place).sum(-1)


def prepare(inputs: Inputs, chosen: object) -> Callable[[], Tensor]:
    """One step, the new key's signature included: as many tokens as ours, chosen and gathered per query head."""
    batch, heads, _, dim = inputs.q.shape
    tokens, device, generator = inputs.k.shape[2], inputs.q.device, torch.Generator(inputs.q.device).manual_seed(1)
    sink, local, heavy = inputs.case.budget.counts(inputs.case.context)
    pairs = list(itertools.pairwise([dim, *WIDTHS, BITS]))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(inputs.q.dtype)

    maps = [([draw(heads, i, o) * i**-0.5 for i, o in pairs], [draw(heads, o) for _, o in pairs]) for _ in range(2)]
    signatures = torch.randint(0, 2**BITS, (batch, heads, tokens), generator=generator, device=device)
    always = torch.cat([torch.arange(sink, device=device), torch.arange(tokens - local, tokens, device=device)])
    always = always.expand(batch, heads, -1)
    request = torch.arange(batch, device=device)[:, None, None]
    group = heads // inputs.k.shape[1]
    kv_head = (torch.arange(heads, device=device) // group)[None, :, None]

    def step() -> Tensor:
        signatures[:, :, -1] = encode(inputs.k[:, :, -1:].repeat_interleave(group, 1), *maps[1])
        distance = popcount(signatures[:, :, sink : tokens - local] ^ encode(inputs.q, *maps[0])[..., None])
        best = distance.topk(heavy, largest=False, sorted=False).indices + sink
        index = torch.cat([always, best], -1)
        keys, values = inputs.k[request, kv_head, index], inputs.v[request, kv_head, index]
        return functional.scaled_dot_product_attention(inputs.q, keys, values)

    return step


def bytes_moved(inputs: Inputs) -> int:
    """Bytes the paper's way reads at least once: signatures and selected rows of every query head, and its maps."""
    batch, heads, _, dim = inputs.q.shape
    pairs = itertools.pairwise([dim, *WIDTHS, BITS])
    maps = 2 * heads * sum(i * o + o for i, o in pairs) * inputs.q.element_size()
    row = 2 * dim * inputs.k.element_size()
    return batch * heads * (inputs.k.shape[2] * 8 + inputs.capacity * row) + maps
