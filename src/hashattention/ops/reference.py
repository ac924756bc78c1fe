"""The specification: every op in plain float32 torch. Imports only torch; the one judge of every kernel.

Shapes: B requests, Hq query heads, Hkv KV heads, Hs signature heads, Hc code heads, Hsel selection heads, T cached
tokens, D head dimension, W int32 words a signature, K index slots a row, P pages of N tokens. A paged tensor holds
``[P, H, N, ...]``
in place of ``[B, H, T, ...]`` and comes with a block table int32 ``[B, M]``: token t of request b is row ``t % N`` of
page ``block_table[b, t // N]``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

#: Tokens unpacked at once while scoring: bounds the memory, changes nothing.
SCORE_CHUNK = 16384


def pack_bits(bits: Tensor) -> Tensor:
    """Booleans ``[..., 32 W]`` -> int32 ``[..., W]``: bit j of word w is entry 32 w + j."""
    words = bits.unflatten(-1, (-1, 32)).to(torch.int64)
    weights = torch.ones(32, dtype=torch.int64, device=bits.device) << torch.arange(32, device=bits.device)
    packed = (words * weights).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack_bits(words: Tensor) -> Tensor:
    """int32 ``[..., W]`` -> bool ``[..., 32 W]``, the inverse of `pack_bits`."""
    shifts = torch.arange(32, device=words.device, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)


def mlp(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """``[B, H, T, in]`` through one MLP a head (weights ``[H, in, out]``, biases ``[H, out]``, SiLU between) ->
    float32 logits.
    """
    hidden = x.float()
    for stage, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if stage:
            hidden = functional.silu(hidden)
        hidden = hidden @ weight.float() + bias.float().unsqueeze(-2)
    return hidden


def encode_signature(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """Signatures int32 ``[B, H, T, W]``: bit = logit > 0."""
    return pack_bits(mlp(x, weights, biases) > 0)


def encode_query(x: Tensor, weights: list[Tensor], biases: list[Tensor], levels: int) -> tuple[Tensor, Tensor]:
    """Integer query codes int8 ``[B, H, T, bits]`` in -levels..levels, and their scale float32 ``[B, H, T]``: logit ~
    code * scale.
    """
    logits = mlp(x, weights, biases)
    scale = logits.abs().amax(-1) / levels
    code = torch.round(logits / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1))
    return code.clamp(-levels, levels).to(torch.int8), scale


def write_tokens(cache: Tensor, new: Tensor, first: Tensor, block_table: Tensor | None = None) -> None:
    """Put `new` ``[B, H, T, W]`` into a dense or paged `cache`, in place: token t of request b at position
    ``first[b] + t``; positions outside the cache are dropped.
    """
    batch, heads, tokens = new.shape[:3]
    size = cache.shape[2]
    held = size if block_table is None else block_table.shape[1] * size
    position = (first.long()[:, None] + torch.arange(tokens, device=new.device)).flatten()
    request = torch.arange(batch, device=new.device).repeat_interleave(tokens)
    inside = (position >= 0) & (position < held)
    # No host may wait for `inside`: an entry that is dropped repeats the first one that is not, if there is any.
    entry = torch.where(inside, torch.arange(len(position), device=new.device), inside.int().argmax())
    request, position = request[entry], position[entry].clamp(0, held - 1)
    outer = request if block_table is None else block_table.long()[request, position // size]
    place = outer[:, None], torch.arange(heads, device=new.device), (position % size)[:, None]
    value = new.transpose(1, 2).flatten(0, 1)[entry]
    cache.index_put_(place, torch.where(inside[entry][:, None, None], value, cache[place]))


def write_signature(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    cache: Tensor,
    first: Tensor,
    block_table: Tensor | None = None,
) -> None:
    """`encode_signature` of keys ``[B, H, T, in]``, written into a signature cache by `write_tokens`."""
    write_tokens(cache, encode_signature(x, weights, biases), first, block_table)


def score(code: Tensor, signatures: Tensor, selection_heads: int, block_table: Tensor | None = None) -> Tensor:
    """int32 scores ``[B, Hsel, T]``: code . (+-1 key bits), summed over the code heads of one selection head.

    An int32 code is a packed bit code (symmetric: the same dot product equals bits - 2 popcount(xor)); an int8 code
    holds the integer weights themselves (asymmetric), those of several codes one after the other where the largest
    of their scores counts.
    """
    if block_table is not None:
        signatures = signatures[block_table.long()].transpose(1, 2).flatten(2, 3)
    weights = unpack_bits(code).float() * 2 - 1 if code.dtype == torch.int32 else code.float()
    signature_heads = signatures.shape[1]
    weights = weights.squeeze(2).unflatten(-1, (-1, signatures.shape[-1] * 32))
    mixture = weights.shape[2]
    weights = weights.flatten(1, 2).unflatten(1, (signature_heads, -1))
    chunks = [
        weights @ (unpack_bits(chunk).float() * 2 - 1).transpose(-1, -2)
        for chunk in signatures.split(SCORE_CHUNK, dim=2)
    ]
    scores = torch.cat(chunks, -1).flatten(1, 2).unflatten(1, (-1, mixture)).amax(2)
    return scores.unflatten(1, (selection_heads, -1)).sum(2).to(torch.int32)


def select(
    scores: Tensor, start: Tensor, end: Tensor, budgets: Tensor, capacity: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Indices int32 ``[B, Hsel, capacity]``, ascending, packed left, -1 where none, and counts int32 ``[B, Hsel]``.

    Row b may attend to tokens start[b] <= t < end[b] where mask[b, t]. budgets int32 ``[B, Hsel, 3]`` holds sink,
    local and heavy:
    the first `sink` and last `local` of these tokens are taken, then the `heavy` best of the rest by (score, position),
    both descending. Where the three exceed `capacity`, local comes first, then sink, then heavy.
    """
    tokens = scores.shape[-1]
    position = torch.arange(tokens, device=scores.device)
    valid = (position >= start[:, None]) & (position < end[:, None])
    if mask is not None:
        valid = valid & mask
    valid = valid[:, None]
    before = valid.cumsum(-1) - 1
    after = valid.sum(-1, keepdim=True) - 1 - before
    sink, local, heavy = budgets.long().unbind(-1)
    local = local.clamp(max=capacity)
    sink = torch.minimum(sink, capacity - local)
    heavy = torch.minimum(heavy, capacity - local - sink)
    covered = valid & ((before < sink[..., None]) | (after < local[..., None]))
    candidate = valid & ~covered
    order = tokens - 1 - scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    ranked = candidate.gather(-1, order)
    taken = ranked & (ranked.cumsum(-1) <= heavy[..., None])
    chosen = covered | torch.zeros_like(taken).scatter(-1, order, taken)
    slot = torch.where(chosen, chosen.cumsum(-1) - 1, capacity)
    indices = scores.new_full((*scores.shape[:2], capacity + 1), -1, dtype=torch.int32)
    indices = indices.scatter(-1, slot, position.to(torch.int32).expand_as(slot))
    return indices[..., :capacity].contiguous(), chosen.sum(-1).to(torch.int32)


def gather_tokens(cache: Tensor, indices: Tensor, block_table: Tensor | None = None) -> Tensor:
    """Rows ``[B, Hsel, K, D]`` of a K or V cache at token `indices` ``[B, Hsel, K]`` (negative ones read token 0)."""
    batch, selection_heads, _ = indices.shape
    token = indices.clamp(min=0).long()
    head = torch.arange(selection_heads, device=cache.device) * cache.shape[1] // selection_heads
    request = torch.arange(batch, device=cache.device)[:, None, None]
    if cache.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        # Not every device indexes float8: bytes do.
        return gather_tokens(cache.view(torch.uint8), indices, block_table).view(cache.dtype)
    if block_table is None:
        return cache[request, head[None, :, None], token]
    size = cache.shape[2]
    return cache[block_table.long()[request, token // size], head[None, :, None], token % size]


def logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """float32 ``[B, Hq, T]``: scale * q . k of every query head with the keys of its KV head."""
    grouped = q[:, :, 0].float().unflatten(1, (k.shape[1], -1))
    return (grouped @ k.float().transpose(-1, -2) * scale).flatten(1, 2)


def pool(logits: Tensor, start: Tensor, end: Tensor, how: str) -> Tensor:
    """float32 ``[B, Hkv, T]`` from logits ``[B, Hkv, G, T]``: their mean over the group, or the logarithm of the
    maximum or the sum of the weights relative to their head's peak; -inf outside ``start[b] <= t < end[b]``.
    """
    position = torch.arange(logits.shape[-1], device=logits.device)
    outside = (position < start[:, None]) | (position >= end[:, None])
    logits = logits.masked_fill(outside[:, None, None], -torch.inf)
    if how == "logits":
        return logits.mean(2)
    relative = logits - logits.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    return relative.amax(2) if how == "peak_max" else relative.logsumexp(2)


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
    """Attention of q ``[B, Hq, 1, D]`` over the selected rows: out ``[B, Hq, 1, Dv]`` and logsumexp float32
    ``[B, Hq, 1]``.

    A row with count 0 gives out 0 and logsumexp -inf. A float8 V stands for its values times `v_scale`.
    """
    selection_heads, slots = indices.shape[1:]
    used = torch.arange(slots, device=q.device) < counts[..., None]
    indices = indices.masked_fill(~used, 0)
    keys = gather_tokens(k, indices, block_table).float().masked_fill(~used[..., None], 0)
    values = gather_tokens(v, indices, block_table).float().masked_fill(~used[..., None], 0)
    queries = q.float().squeeze(2).unflatten(1, (selection_heads, -1))
    logits = queries @ keys.transpose(-1, -2) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~used[:, :, None], -torch.inf)
    lse = logits.logsumexp(-1)
    # Not exp(logits - lse): a large lse would cost its own rounding. An empty row is NaN here, all of it masked.
    weights = logits.softmax(-1).masked_fill(~used[:, :, None], 0)
    out = (weights @ values * v_scale).flatten(1, 2).unsqueeze(2)
    return out.to(q.dtype), lse.flatten(1, 2).unsqueeze(2)


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
    """`select` of `score`: indices int32 ``[B, Hsel, capacity]`` and counts int32 ``[B, Hsel]`` (`levels` only helps
    kernels).
    """
    scores = score(code, signatures, budgets.shape[1], block_table)
    return select(scores, start, end, budgets, capacity, mask)


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
    """Attention `out` ``[B, Hq, 1, Dv]`` over ``taken[b, h]`` of ``lengths[b]`` tokens, with the mean value of all
    tokens for the others, in the share of the weight that these are estimated to have.

    sums float32 ``[B, Hkv, D + Dv + 1]`` hold the summed keys, the summed values and how many were summed. With mu the
    logit of the mean key and m the logarithm of the mean weight of the tokens taken, a token that was left out is
    estimated to weigh ``exp(m + min(0, a + b (mu - m) + c log(taken / length)))``; coefficients float32 ``[Hq, 3]``
    hold a, b and c.
    """
    query_heads, dim = q.shape[1], q.shape[3]
    number = sums[..., -1].repeat_interleave(query_heads // sums.shape[1], 1)
    mean = (sums[..., :-1] / sums[..., -1:].clamp(min=1)).repeat_interleave(query_heads // sums.shape[1], 1)
    mu = (q[:, :, 0].float() * mean[..., :dim]).sum(-1) * scale
    if softcap:
        mu = softcap * torch.tanh(mu / softcap)
    number_taken = taken.repeat_interleave(query_heads // taken.shape[1], 1).float()
    left = torch.where(number > 0, (lengths[:, None] - number_taken).clamp(min=0), 0)
    mean_weight = logsumexp[..., 0] - number_taken.log()
    a, b, c = coefficients.unbind(-1)
    less = a + b * (mu - mean_weight) + c * (number_taken / (number_taken + left)).log()
    share = ((left / number_taken).log() + less.clamp(max=0)).sigmoid()
    # Nothing taken has no output to mix.
    share = torch.where(number_taken > 0, share, 0)[..., None, None]
    return (out + share * (mean[:, :, None, dim:] - out)).to(out.dtype).contiguous()
