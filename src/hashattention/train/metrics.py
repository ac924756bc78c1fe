"""Metrics on held-out sequences: recall, kept attention mass and output error of a selection, beside exact selections.

What `HashSelector` and `ops.attend` give one query at a time, computed for all queries of a sequence at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hashattention.config import BaseModel, Budget
from hashattention.maps import HashMaps, LayerMaps
from hashattention.models.capture import Sample
from hashattention.models.packaged import Progress
from hashattention.ops.reference import unpack_bits
from hashattention.rows import count_budget, scale_heavy
from hashattention.train.labels import (
    attention_logits,
    heavy_candidates,
    pool_logits,
    tensor_float32,
    token_weights,
)
from hashattention.train.recipe import Pool
from hashattention.train.shards import Samples

#: recall is taken over this many heaviest candidates of every query head.
RECALL_TOP = 64
EXACT = ("exact_shared", "exact_shared_peak", "exact_per_head")
#: Other exact selections, and Quest: pages by an upper bound of their logits, pooled like "exact_shared_peak".
MORE = ("exact_shared_rank", "exact_shared_output", "exact_per_head_output", "quest")
#: Tokens of one of Quest's pages.
PAGE = 16
#: The name under which maps are measured with their remainder.
FILLED = "hash_remainder"
FIELDS = ("error", "kept_mass", "recall")


@dataclasses.dataclass(frozen=True)
class Exact:
    """Dense attention of one layer and sequence: logits by group, weights ``[Hq, N, T]``, output, labels."""

    grouped: Tensor
    weights: Tensor
    value: Tensor
    out: Tensor
    heavy: Tensor
    top: Tensor
    positions: Tensor

    @classmethod
    def of(cls, sample: Sample, sink: int, local: int) -> Exact:
        """From a sample of one layer with values."""
        assert sample.value is not None, "held-out samples hold values"
        grouped = attention_logits(sample)[0]
        weights = torch.softmax(grouped.flatten(0, 1), dim=-1)
        heads = weights.shape[0] // sample.value.shape[1]
        value = sample.value[0].float().repeat_interleave(heads, dim=0)
        heavy = heavy_candidates(sample.positions, sample.key_positions(), sink, local)
        ranked = weights.masked_fill(~heavy, -1)
        top = ranked.topk(min(RECALL_TOP, weights.shape[-1]), dim=-1).indices
        return cls(grouped, weights, value, weights @ value, heavy, top, sample.positions)

    @functools.cached_property
    def mean(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of all causal tokens: logit of the mean key ``[Hq, N]``, mean value ``[Hq, N, Dv]``, number ``[N]``."""
        causal = self.grouped[0, 0] > -torch.inf
        number = causal.sum(-1)
        mu = self.grouped.flatten(0, 1).masked_fill(~causal, 0).sum(-1) / number
        return mu, (causal / number[:, None]) @ self.value, number

    def attend(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens `chosen` (bool ``[Hsel, N, T]``) for every query head, the attention they have ``[Hq, N]``, and
        the output over them alone.
        """
        chosen = chosen.repeat_interleave(self.weights.shape[0] // chosen.shape[0], dim=0)
        kept = self.weights * chosen
        mass = kept.sum(-1)
        out = (kept @ self.value) / mass.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        return chosen, mass, out

    def leave_out(self, chosen: Tensor) -> LeftOut:
        """Attention over the tokens `chosen` (bool ``[Hsel, N, T]``), and what is known of the others."""
        chosen, _, out = self.attend(chosen)
        mu, mean_value, number = self.mean
        logits = self.grouped.flatten(0, 1).masked_fill(~chosen, -torch.inf)
        taken = chosen.sum(-1)
        return LeftOut(out, self.out, mean_value, mu - (logits.logsumexp(-1) - taken.log()), taken, number)

    def quality(self, chosen: Tensor, remainder: Tensor | None = None) -> Tensor:
        """Error, kept mass and recall of the tokens `chosen` (bool ``[Hsel, N, T]``), float64 ``[Hkv, 3]``: means.

        With the coefficients of a `remainder` ``[Hq, 3]`` the mean value stands for the tokens left out.
        """
        taken, mass, out = self.attend(chosen)
        if remainder is not None:
            out = self.leave_out(chosen).fill(remainder)
        error = (out - self.out).norm(dim=-1) / self.out.norm(dim=-1)
        is_candidate = self.heavy.expand_as(self.weights).gather(-1, self.top)
        found = (taken.gather(-1, self.top) & is_candidate).sum(-1) / is_candidate.sum(-1).clamp(min=1)
        means = torch.stack([error, mass, found]).double().mean(-1)
        return means.unflatten(1, (self.grouped.shape[0], -1)).mean(-1).T


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Attention over some tokens, `kept` ``[Hq, N, Dv]``, beside `dense`; and what `ops.add_remainder` knows of the
    others: `mean_value`, `less` (the logit of the mean key less the logarithm of the mean weight taken) ``[Hq, N]``,
    how many are `taken` ``[Hq, N]`` of a `length` ``[N]``.
    """

    kept: Tensor
    dense: Tensor
    mean_value: Tensor
    less: Tensor
    taken: Tensor
    length: Tensor

    def features(self) -> tuple[Tensor, Tensor]:
        """What the coefficients b and c multiply, ``[Hq, N, 2]``, and the offset ``log(left / taken)`` ``[Hq, N]``."""
        some, taken = self.taken > 0, self.taken.clamp(min=1)
        features = torch.stack([self.less, (taken / self.length).log()], -1)
        offset = ((self.length - taken) / taken).log()
        # Where nothing was taken, nothing is filled in.
        return features.masked_fill(~some[..., None], 0), offset.masked_fill(~some, -torch.inf)

    def fill(self, coefficients: Tensor) -> Tensor:
        """The output with the mean value for the tokens left out: `ops.add_remainder` for all queries at once."""
        share = share_left(*self.features(), coefficients.to(self.kept.device, self.kept.dtype))[..., None]
        return self.kept + share * (self.mean_value - self.kept)

    def statistics(self) -> Tensor:
        """All that the relative error of `fill` depends on, ``[Hq, N, 6]``: `features`, and three products."""
        features, offset = self.features()
        missed, step = self.kept - self.dense, self.mean_value - self.kept
        size = self.dense.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        products = [(a * b).sum(-1) / size for a, b in ((missed, missed), (missed, step), (step, step))]
        return torch.cat([features, torch.stack([offset, *products], -1)], -1)


def share_left(features: Tensor, offset: Tensor, coefficients: Tensor) -> Tensor:
    """The share of the attention that was left out, by the formula of `ops.add_remainder`: ``[Hq, N]`` from what
    `LeftOut.features` gives and coefficients ``[Hq, 3]``.
    """
    less = coefficients[:, None, 0] + (features * coefficients[:, None, 1:]).sum(-1)
    return (offset + less.clamp(max=0)).sigmoid()


def hash_scores(layer: LayerMaps, sample: Sample, selection_heads: int) -> Tensor:
    """Integer scores (as float32, exact) ``[Hsel, N, T]`` of one layer: `ops.score` for all queries at once."""
    code = layer.code_queries(sample.query, sample.positions[None], backend="reference")[0]
    signatures = layer.sign_keys(sample.key, sample.key_positions()[None], backend="reference")[0]
    weights = unpack_bits(code).float() * 2 - 1 if code.dtype == torch.int32 else code.float()
    heads, count = signatures.shape[0], code.shape[1]
    weights = weights.unflatten(-1, (-1, signatures.shape[-1] * 32)).transpose(1, 2)
    mixture = weights.shape[1]
    with tensor_float32(weights.device):
        bits = (unpack_bits(signatures).float() * 2 - 1).transpose(-1, -2)
        scores = weights.flatten(0, 1).unflatten(0, (heads, -1)).flatten(1, 2) @ bits
    scores = scores.unflatten(1, (-1, count)).flatten(0, 1).unflatten(0, (-1, mixture)).amax(1)
    return scores.unflatten(0, (selection_heads, -1)).sum(1)


def choose(
    scores: Tensor, positions: Tensor, budgets: Sequence[Budget], shares: tuple[float, ...] | None = None
) -> list[Tensor]:
    """What `ops.select` takes for queries at `positions`, bool ``[Hsel, N, T]`` a budget: one sort serves all budgets.

    The budgets must agree in sink and local; `shares` multiply the heavy ones of each selection head.
    """
    tokens = scores.shape[-1]
    token = torch.arange(tokens, device=scores.device)
    order = tokens - 1 - scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    chosen = []
    for budget in budgets:
        counts = count_budget(budget, positions + 1)[None]
        if shares is not None:
            wanted = torch.tensor(shares, dtype=torch.float64, device=scores.device)[:, None]
            counts = scale_heavy(counts, positions + 1, wanted)
        sink, local = counts[0, :, 0], counts[0, :, 1]
        heavy = counts[..., 2:]
        causal = token <= positions[:, None]
        covered = causal & ((token < sink[:, None]) | (token > (positions - local)[:, None]))
        ranked = (causal & ~covered).expand_as(scores).gather(-1, order)
        taken = ranked & (ranked.cumsum(-1) <= heavy)
        chosen.append(covered | torch.zeros_like(taken).scatter(-1, order, taken))
    return chosen


def measure(
    held_out: Samples,
    base: BaseModel,
    methods: dict[str, HashMaps | None],
    budgets: Sequence[Budget],
    *,
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Quality of selections on held-out sequences.

    Parameters
    ----------
    held_out : Samples
        With values.
    base : BaseModel
    methods : dict
        Name to maps; None under a name of `EXACT`: "exact_shared" (top-k by the group's mean softmax, the yardstick),
        "exact_shared_peak" (by the largest peak-normalised softmax), "exact_per_head"; or of `MORE`. Maps under
        the name `FILLED` are measured with their remainder.
    budgets : sequence of Budget
        All with the same sink and local.
    device : torch.device

    Returns
    -------
    dict of Tensor, float64 ``[budgets, layers, 3]``
        error = |output - dense| / |dense|, kept attention mass, and recall of the 64 heaviest candidates, per method.
    """
    found = measure_heads(held_out, base, methods, budgets, device=device, progress=progress)
    return {name: table.mean(2) for name, table in found.items()}


def measure_heads(
    held_out: Samples,
    base: BaseModel,
    methods: dict[str, HashMaps | None],
    budgets: Sequence[Budget],
    *,
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """`measure` for each KV head (mean over its group): float64 ``[budgets, layers, Hkv, 3]``."""
    layers = len(base.layers)
    shape = len(budgets), layers, base.num_key_value_heads, len(FIELDS)
    total = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name in methods}
    moved = {name: maps.to(device) if maps is not None else None for name, maps in methods.items()}
    for index in range(len(held_out)):
        for row in range(layers):
            sample = held_out.read(index, row, row + 1).to(device)
            exact = Exact.of(sample, budgets[0].sink, budgets[0].local)
            for name, maps in moved.items():
                held = 0 if maps is None else maps.model.layers.index(base.layers[row])
                shares = None if maps is None or maps.shares is None else maps.shares[held]
                scores = method_scores(name, maps, exact, sample, base, row)
                chosen = choose(scores, sample.positions, budgets, shares)
                filled = _remainder(name, maps, held, device)
                total[name][:, row] += torch.stack([exact.quality(each, filled) for each in chosen]) / len(held_out)
            if progress is not None:
                progress("measuring", index * layers + row + 1, len(held_out) * layers)
    return {name: table.cpu() for name, table in total.items()}


def _remainder(name: str, maps: HashMaps | None, row: int, device: torch.device) -> Tensor | None:
    if name != FILLED:
        return None
    assert maps is not None and maps.remainder is not None, name
    return torch.tensor(maps.remainder[row], device=device)


def method_scores(name: str, maps: HashMaps | None, exact: Exact, sample: Sample, base: BaseModel, row: int) -> Tensor:
    """Scores ``[Hsel, N, T]`` (higher is taken first) of a method of `measure`, for one layer: row `row` of `base`."""
    if maps is not None:
        return hash_scores(maps.layer(base.layers[row]), sample, maps.config.selection_heads(base))
    assert name in EXACT + MORE, name
    if name == "quest":
        return pool_logits(quest_bounds(sample), "peak_max")
    weight = token_weights(sample, exact.grouped[None], "output") if name.endswith("_output") else None
    own = None if weight is None else weight[0]
    if name.startswith("exact_per_head"):
        return (exact.grouped if own is None else exact.grouped + own).flatten(0, 1)
    pools: dict[str, Pool] = {"exact_shared_peak": "peak_max", "exact_shared_rank": "rank"}
    return pool_logits(exact.grouped, pools.get(name, "mean"), own)


def quest_bounds(sample: Sample) -> Tensor:
    """Upper bounds of the logits of each token's page, -inf in the future, float32 ``[Hkv, G, N, T]`` (one layer).

    Quest, arXiv 2406.10774. Keys after a query's own position are in the summary of its last page, which lies in the
    local window.
    """
    key = sample.key[0].float()
    tokens = key.shape[1]
    short = -tokens % PAGE
    ends = []
    for fill, sign in ((torch.inf, -1), (-torch.inf, 1)):
        padded = torch.nn.functional.pad(key, (0, 0, 0, short), value=fill).unflatten(1, (-1, PAGE))
        ends.append(padded.amin(2) if sign < 0 else padded.amax(2))
    query = sample.query[0].float().unflatten(0, (key.shape[0], -1)) * sample.scale[0]
    lowest, highest = (end[:, None].transpose(-1, -2) for end in ends)
    bound = (query.clamp(min=0) @ highest + query.clamp(max=0) @ lowest).repeat_interleave(PAGE, -1)[..., :tokens]
    future = torch.arange(tokens, device=key.device) > sample.positions[:, None]
    return bound.masked_fill(future, -torch.inf)


def summarise(measured: dict[str, Tensor], budgets: Sequence[Budget], base: BaseModel) -> dict[str, Any]:
    """Plain JSON values of `measure`: means over layers, the ratio to exact shared selection, and every layer."""
    rows = []
    for place, budget in enumerate(budgets):
        row: dict[str, Any] = {"heavy": budget.heavy, "sink": budget.sink, "local": budget.local}
        for name, table in measured.items():
            means = table[place].mean(0).tolist()
            row[name] = {field: round(value, 5) for field, value in zip(FIELDS, means, strict=True)}
            row[name]["error_by_layer"] = [round(value, 4) for value in table[place, :, 0].tolist()]
            if "exact_shared" in measured:
                row[name]["ratio"] = round(
                    means[0] / max(measured["exact_shared"][place, :, 0].mean().item(), 1e-12), 4
                )
        for field, name in enumerate(FIELDS[1:], 1):
            if "hash" in measured:
                row["hash"][f"{name}_by_layer"] = [
                    round(value, 4) for value in measured["hash"][place, :, field].tolist()
                ]
        rows.append(row)
    return {"layers": list(base.layers), "budgets": rows}
