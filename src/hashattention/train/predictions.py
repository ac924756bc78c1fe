"""The remainder's coefficients by what the model predicts: the next tokens that it predicts with dense attention.

Those that bring every layer's output closest to dense attention (`train.remainder`) do not bring the predictions
closest: what layers err by adds up, and not all directions of an output matter alike. From there they are moved by
gradient, through the whole model, all layers sparse on the last tokens of training sequences.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hashattention import ops
from hashattention.config import Budget
from hashattention.maps import HashMaps
from hashattention.models.capture import CHUNK
from hashattention.models.describe import text_config, token_bytes
from hashattention.models.packaged import Progress
from hashattention.models.replaced import Attend, Attended, refuse_attached, replaced_attention
from hashattention.ops import reference
from hashattention.rows import Extent, Shares
from hashattention.selectors.remainder import BLOCK, sum_blocks
from hashattention.train.labels import tensor_float32
from hashattention.train.targets import free_bytes

IMPLEMENTATION = "hash_predictions"
#: Tokens at a sequence's end whose predictions count.
TAIL = 128
#: The largest change of a coefficient in a step; it falls to a twentieth.
RATE = 0.03
#: Weight of the coefficients' squared distance from where they begin, which holds what predictions leave open.
HOLD = 1e-3
#: The least log-probability that counts: models may rule tokens out.
LEAST = -1e4
#: Share of the free memory that the sequences' caches may take.
SHARE = 0.4


@dataclasses.dataclass(frozen=True)
class Excerpt:
    """A sequence as `model` reads it with its own attention: the cache of all but its last N tokens, these as `tail`
    int64 ``[1, N]``, and the log-probabilities of what follows each of them, float32 ``[N, vocabulary]``.
    """

    prefix: Any
    tail: Tensor
    expected: Tensor

    @classmethod
    def of(cls, model: Any, tokens: Tensor, chunk: int = CHUNK) -> Excerpt:
        """Of `tokens` int64 ``[T]``, read `chunk` at a time; N is `TAIL`, or half of a shorter sequence."""
        from transformers import DynamicCache

        whole, count = tokens[None].to(model.device), min(TAIL, len(tokens) // 2)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            for part in whole[:, :-count].split(chunk, 1):
                model.base_model(input_ids=part, past_key_values=cache, use_cache=True)
            return cls(cache, whole[:, -count:], _predict(model, cache, whole[:, -count:]))

    def divergence(self, model: Any) -> Tensor:
        """KL of the model's predictions, as it attends now, from those by dense attention: a mean over the tail."""
        found = _predict(model, self.prefix, self.tail)
        return functional.kl_div(found, self.expected, log_target=True, reduction="batchmean")


def _predict(model: Any, cache: Any, tail: Tensor) -> Tensor:
    """Log-probabilities after each token of `tail`, float32 ``[N, vocabulary]``; the cache stays as it is."""
    logits = model(input_ids=tail, past_key_values=copy.deepcopy(cache), use_cache=True).logits[0]
    predicted: Tensor = logits.float().log_softmax(-1).clamp(min=LEAST)
    return predicted


@dataclasses.dataclass
class TailAttention:
    """Attention of a tail's queries, all at once, by what `maps` select for each, with the remainder by `coefficients`
    float32 ``[L, Hq, 3]``: `HashSelector`, but differentiable.
    """

    maps: HashMaps
    coefficients: Tensor
    budget: Budget

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float) -> Tensor:
        """Output ``[1, Hq, N, Dv]`` of the N last queries ``[1, Hq, N, D]`` over the cache ``[1, Hkv, T, D]``."""
        row, tokens = self.maps.model.layers.index(layer), key.shape[2]
        lengths = torch.arange(tokens - query.shape[2] + 1, tokens + 1, dtype=torch.int32, device=query.device)
        with torch.no_grad():
            indices, taken = self._select(row, query, key, lengths)
            known = _chosen(indices, taken, tokens), taken, _running_sums(key[0], value[0], lengths), lengths
        # Logits of all tokens are made again on the way back rather than kept for every layer.
        options = self.coefficients[row], scale, softcap
        out: Tensor = checkpoint(_attend, query, key, value, *known, *options, use_reentrant=False)
        return out

    def _select(self, row: int, query: Tensor, key: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Indices int32 ``[N, Hsel, K]`` and their counts int32 ``[N, Hsel]``: every query is a request of its own."""
        config, model, tokens = self.maps.config, self.maps.model, key.shape[2]
        layer, heads = self.maps.layer(model.layers[row]), config.selection_heads(model)
        code = layer.code_queries(query.float(), (lengths - 1)[None])[0].transpose(0, 1)[:, :, None].contiguous()
        signatures = layer.sign_keys(key.float(), torch.arange(tokens, device=key.device)[None])
        extent = Extent(torch.zeros_like(lengths), lengths, tokens)
        if self.maps.shares is None:
            rows = extent.rows(self.budget, heads)
        else:
            rows = extent.rows_of_layer(self.budget, Shares.of(self.maps.shares, key.device), row)
        bounds = rows.start, rows.end, rows.budgets, rows.capacity
        return ops.score_select(code, signatures.expand(len(lengths), -1, -1, -1), *bounds, levels=config.levels)


def _chosen(indices: Tensor, taken: Tensor, tokens: int) -> Tensor:
    """Which tokens the first ``taken[n, h]`` indices of each row int32 ``[N, Hsel, K]`` name, bool ``[Hsel, N, T]``."""
    used = torch.arange(indices.shape[2], device=indices.device) < taken[..., None]
    place = torch.where(used, indices, tokens).long()
    return used.new_zeros(*taken.shape, tokens + 1).scatter(2, place, True)[..., :tokens].transpose(0, 1)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, taken: Tensor, sums: Tensor, lengths: Tensor,
    coefficients: Tensor, scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    """`ops.attend` and `ops.add_remainder` for N queries over one cache: all logits, and a mask, cost less than as many
    gathered rows and their gradient.
    """
    heads, count = key.shape[1], query.shape[2]
    grouped = query[0].float().unflatten(0, (heads, -1)).flatten(1, 2)
    with tensor_float32(query.device):
        logits = (grouped @ key[0].float().transpose(-1, -2)).unflatten(1, (-1, count)).flatten(0, 1) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~chosen.repeat_interleave(len(logits) // len(chosen), 0), -torch.inf)
    weights = logits.softmax(-1).unflatten(0, (heads, -1)).flatten(1, 2)
    out = (weights @ value[0].float()).unflatten(1, (-1, count)).flatten(0, 1)
    out, logsumexp, q = (part.transpose(0, 1)[:, :, None] for part in (out, logits.logsumexp(-1), query[0]))
    out = reference.add_remainder(out, logsumexp, q, sums, taken, lengths, coefficients, scale, softcap)
    return out[:, :, 0].transpose(0, 1)[None].to(query.dtype)


def _running_sums(key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
    """`selectors.remainder.running_sums` of a cache ``[Hkv, T, D]`` for each of `lengths`: ``[N, Hkv, D + Dv + 1]``."""
    whole = key.shape[1] // BLOCK * BLOCK
    blocks = sum_blocks(key[None, :, :whole], value[None, :, :whole], key.new_ones(1, whole, dtype=torch.bool))[0]
    return functional.pad(blocks.cumsum(1), (0, 0, 1, 0))[:, (lengths // BLOCK).long()].transpose(0, 1)


@contextlib.contextmanager
def attending(model: Any, maps: HashMaps, coefficients: Tensor, budget: Budget) -> Iterator[TailAttention]:
    """Within this context `model` attends by a `TailAttention`, whose budget may be changed."""
    tail = TailAttention(maps.to(model.device), coefficients, budget)

    def attend(
        dense: Attend, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
    ) -> Attended:
        layer: Any = module.layer_idx
        if layer not in maps.model.layers:
            return dense(module, query, key, value, *rest, **options)
        scale, softcap = options.get("scaling") or query.shape[-1] ** -0.5, options.get("softcap") or 0.0
        return tail.attend(layer, query, key, value, scale, softcap).transpose(1, 2).contiguous(), None

    with replaced_attention(model, IMPLEMENTATION, attend):
        yield tail


def tune(
    model: Any,
    maps: HashMaps,
    tokens: Sequence[Tensor],
    start: Tensor,
    budgets: Sequence[Budget],
    *,
    steps: int,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> Tensor:
    """Coefficients that bring predictions closer to those by dense attention.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its weights and its attention implementation stay.
    maps : HashMaps
        What selects; layers without a map stay dense.
    tokens : sequence of Tensor, int64 ``[T]``
        What is read; some of them, drawn, where their caches would not all fit in a GPU's memory.
    start : Tensor, ``[L, Hq, 3]``
        The coefficients to begin with.
    budgets : sequence of Budget
        Taken in turn, a step each.
    steps, chunk : int
        Steps of Adam, and tokens the model reads at once.

    Returns
    -------
    Tensor, float64 ``[L, Hq, 3]``

    Raises
    ------
    ConfigError
        If the model is attached.
    """
    refuse_attached(model)
    first = start.to(model.device, torch.float32)
    coefficients = first.clone().requires_grad_()
    optimiser = torch.optim.Adam([coefficients], lr=RATE)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, steps)
    free = SHARE * free_bytes(model.device) if model.device.type == "cuda" else math.inf
    kept = _fitting([_bytes(model, len(each)) for each in tokens], free)
    excerpts = [Excerpt.of(model, tokens[number], chunk) for number in kept]
    chance, order = torch.Generator().manual_seed(0), list[int]()
    with attending(model, maps, coefficients, budgets[0]) as attention:
        for step in range(steps):
            order = order or torch.randperm(len(excerpts), generator=chance).tolist()
            attention.budget = budgets[step % len(budgets)]
            away = (coefficients - first).square().sum(-1).mean()
            loss = excerpts[order.pop()].divergence(model) + HOLD * away
            (coefficients.grad,) = torch.autograd.grad(loss, [coefficients])
            optimiser.step()
            decay.step()
            if progress is not None:
                progress("fitting the remainder to predictions", step + 1, steps)
    return coefficients.detach().double().cpu()


def _fitting(sizes: Sequence[int], free: float) -> list[int]:
    """Numbers of the sequences, of so many bytes each, that are kept: drawn one after the other while they fit, and at
    least one.
    """
    kept = list[int]()
    for number in torch.randperm(len(sizes), generator=torch.Generator().manual_seed(0)).tolist():
        if sizes[number] <= free or not kept:
            kept.append(number)
            free -= sizes[number]
    return sorted(kept)


def _bytes(model: Any, tokens: int) -> int:
    """What an `Excerpt` of a sequence of so many tokens holds."""
    return int(tokens * token_bytes(model) + min(TAIL, tokens // 2) * text_config(model).vocab_size * 4)
