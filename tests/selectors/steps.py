"""Ragged steps with poison where nobody may look, and the budgeted choice in plain Python."""

from __future__ import annotations

import dataclasses

import torch

from hashattention.cache import TokenCache
from hashattention.config import Budget
from hashattention.rows import Extent
from hashattention.selectors.base import Step

NAN = float("nan")

#: query heads, KV heads, tokens, left padding of each request
SHAPES = [(4, 2, 45, (7, 0)), (4, 1, 37, (0, 36)), (3, 3, 64, (5, 16)), (6, 2, 101, (33, 2))]
BUDGETS = [
    Budget(heavy=1, sink=0, local=1),
    Budget(heavy=7, sink=2, local=3),
    Budget(density=0.3, sink=2, local=4),
    Budget(heavy=1000, sink=4, local=8),
]
CASES = [(shape, budget) for shape in SHAPES for budget in BUDGETS]


def context(query_heads, kv_heads, tokens, padding, dim=16, seed=0):
    """Keys and values with NaN in the padding, and one query for every length, all from one seed."""
    random = torch.Generator().manual_seed(seed)
    batch = len(padding)
    key, value = (torch.randn(batch, kv_heads, tokens, dim, generator=random) for _ in range(2))
    queries = torch.randn(batch, query_heads, tokens, dim, generator=random)
    for request, first in enumerate(padding):
        key[request, :, :first] = value[request, :, :first] = NAN
    return queries, key, value


def step_at(tokens, queries, key, value, padding, budget, side=None, layer=0, **changes):
    """The step whose cache holds `tokens` tokens; what lies behind them is poisoned."""
    key, value = key.clone(), value.clone()
    key[:, :, tokens:] = value[:, :, tokens:] = NAN
    start = torch.tensor(padding, dtype=torch.int32).clamp(max=tokens)
    extent = Extent(start, torch.full_like(start, tokens), tokens)
    query = queries[:, :, tokens - 1 : tokens]
    scale = query.shape[-1] ** -0.5
    return Step(layer, query, key, value, scale, extent, budget, side or TokenCache(), **changes)


def ragged_step(shape, budget, side=None, seed=0):
    query_heads, kv_heads, tokens, padding = shape
    return step_at(tokens, *context(query_heads, kv_heads, tokens, padding, seed=seed), padding, budget, side)


def valid_tokens(step, request):
    """Positions that the request may attend to."""
    mask = torch.ones(step.extent.tokens, dtype=torch.bool) if step.extent.mask is None else step.extent.mask[request]
    first, last = int(step.extent.start[request]), int(step.extent.end[request])
    return [token for token in range(first, last) if mask[token]]


def split(step, request):
    """Sink and local tokens, the candidates for heavy, and how many of them may be taken."""
    tokens = valid_tokens(step, request)
    sink, local, heavy = step.budget.counts(len(tokens))
    covered = tokens[:sink] + tokens[len(tokens) - local :]
    return covered, tokens[sink : len(tokens) - local], heavy


def best(scores, step, request, number=None):
    """The tokens a row must hold, given its float64 scores over all slots."""
    covered, candidates, heavy = split(step, request)
    ranked = sorted(candidates, key=lambda token: (scores[token].item(), token), reverse=True)
    return sorted(covered + ranked[: heavy if number is None else min(heavy, number)])


def chosen(selection, request, head):
    row = selection.indices[request, head].tolist()
    count = int(selection.counts[request, head])
    assert row[count:] == [-1] * (len(row) - count)
    return row[:count]


def rows_of(step, share):
    """(request, selection head, KV head, its queries float64 [G', D], all keys float64 [T, D]) of every row."""
    group = step.query.shape[1] // step.key.shape[1]
    for request in range(step.key.shape[0]):
        for head in range(step.key.shape[1]):
            queries = step.query[request, head * group : (head + 1) * group, 0].double()
            keys = step.key[request, head, : step.extent.tokens].double()
            if share == "group":
                yield request, head, head, queries, keys
            else:
                for member in range(group):
                    yield request, head * group + member, head, queries[member : member + 1], keys


def pool(logits, step, request, pooling):
    """The poolings, from their definitions, on float64 logits [G, T]."""
    tokens = valid_tokens(step, request)
    logits = logits[:, tokens]
    out = torch.full((step.extent.tokens,), -torch.inf, dtype=torch.float64)
    if pooling == "rank":
        candidates = split(step, request)[1]
        for token in candidates:
            mine = logits[:, tokens.index(token)]
            later = torch.tensor(candidates) > token
            among = logits[:, [tokens.index(other) for other in candidates]]
            better = (among > mine[:, None]) | ((among == mine[:, None]) & later)
            out[token] = -better.sum(1).amin().double()
        return out
    weights = logits.softmax(-1)
    relative = weights / weights.amax(-1, keepdim=True)
    out[tokens] = {
        "peak_max": relative.amax(0),
        "peak_sum": relative.sum(0),
        "mean": weights.mean(0),
        "logits": logits.mean(0),
    }[pooling]
    return out


def replaced(step, **changes):
    return dataclasses.replace(step, **changes)
