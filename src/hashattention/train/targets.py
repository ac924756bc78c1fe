"""Targets of every step: made from the sample at hand, or once for all steps and kept on the device in a byte each."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import torch
from torch import Tensor

from hashattention.config import BaseModel
from hashattention.models.capture import Sample
from hashattention.train import labels
from hashattention.train.recipe import Recipe
from hashattention.train.shards import Samples

#: A stored target t is the byte round(-16 ln t): 3 % steps from 1 down to 1.4e-7.
STEPS_PER_NAT = 16
#: The bytes of a candidate with a target of 0, and of a token that is no candidate.
ZERO, NONE = 254, 255
#: Bytes of the float32 logits of one sequence that are in work at once.
CHUNK_BYTES = 2 << 30


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What a step learns from one sequence.

    `sample` holds the step's queries and the keys ``[L, Hkv, m, D]`` of its tokens, `target` is float32
    ``[L, Hsel, n, m]``, `heavy` (the candidates) bool that broadcasts to it, and `offset` float32 ``[m]`` the log of
    how many tokens each stands for (None: one each).
    """

    sample: Sample
    target: Tensor
    heavy: Tensor
    offset: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Thin:
    """Which tokens of a sequence a step sees, as places in the order of their target mass: the first `top`, and every
    `stride`-th of the others from `first` on, each of which stands for `stride` tokens.
    """

    top: int
    first: int
    stride: int

    def take(self, ordered: Tensor) -> Tensor:
        """These places of the last dimension."""
        return torch.cat([ordered[..., : self.top], ordered[..., self.first :: self.stride]], -1)

    def offset(self, count: int, device: torch.device) -> Tensor:
        """`Lesson.offset` of the `count` places."""
        own = torch.zeros(count, device=device)
        own[self.top :] = math.log(self.stride)
        return own


def thin(tokens: int, wanted: int, start: float) -> Thin | None:
    """About `wanted` of `tokens` (at most half as many again): half of them those of most target mass, half a
    systematic sample of the others; None where all are seen.

    Examples
    --------
    >>> thin(8192, 2048, 0.5)
    Thin(top=1024, first=1027, stride=7)
    >>> thin(1000, 1024, 0.5) is None
    True
    """
    rest = wanted // 2
    if not wanted or tokens <= wanted or not rest:
        return None
    stride = (tokens - (wanted - rest)) // rest
    top = tokens - rest * stride
    return Thin(top, top + int(start * stride), stride)


class Targets(Protocol):
    """What `losses.total` is given for some queries of one sequence."""

    def lesson(self, index: int, queries: Tensor, sample: Sample, chosen: Thin | None = None) -> Lesson:
        """Of the `queries` int64 ``[n]`` of sequence `index` and the `chosen` tokens (None: all); `sample` holds these
        queries alone, and all keys.
        """


def mass_order(target: Tensor, kv_heads: int) -> Tensor:
    """Tokens int64 ``[L, Hkv, T]`` by descending sum of the targets ``[L, Hsel, N, T]`` of a KV head's queries."""
    mass = target.sum(2).unflatten(1, (kv_heads, -1)).sum(2)
    return mass.argsort(dim=-1, descending=True, stable=True)


def _by_selection(order: Tensor, heads: int) -> Tensor:
    """An order per KV head as indices of targets with `heads` selection heads: ``[L, Hsel, 1, m]``."""
    return order.repeat_interleave(heads // order.shape[1], dim=1)[:, :, None]


def _thinned(sample: Sample, order: Tensor, chosen: Thin, target: Tensor, heavy: Tensor) -> Lesson:
    """The lesson of the chosen tokens, given their targets."""
    places = chosen.take(order)[..., None].expand(-1, -1, -1, sample.key.shape[3])
    offset = chosen.offset(target.shape[-1], target.device)
    # Each row is a distribution over the sample again: only differences of scores have a gradient.
    target = target * offset.exp()
    target = target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return Lesson(dataclasses.replace(sample, key=sample.key.gather(2, places)), target, heavy, offset)


class LiveTargets:
    """Targets made anew in every step."""

    def __init__(self, recipe: Recipe, base: BaseModel) -> None:
        self.recipe, self.shared = recipe, recipe.maps.selection_heads(base) != base.num_attention_heads

    def of(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Target float32 ``[L, Hsel, n, T]`` of all queries of a sample, and its candidates bool ``[n, T]``."""
        teacher = labels.teach(sample, self.recipe, shared=self.shared)
        return labels.targets(teacher, self.recipe), teacher.heavy

    def lesson(self, index: int, queries: Tensor, sample: Sample, chosen: Thin | None = None) -> Lesson:
        """As `Targets.lesson`."""
        target, heavy = self.of(sample)
        if chosen is None:
            return Lesson(sample, target, heavy)
        order = mass_order(target, sample.key.shape[1])
        places = _by_selection(chosen.take(order), target.shape[1]).expand(-1, -1, target.shape[2], -1)
        own = heavy.expand_as(target).gather(-1, places)
        return _thinned(sample, order, chosen, target.gather(-1, places), own)


class StoredTargets:
    """Targets of layers ``first <= l < last`` of all `samples`, uint8 ``[L, Hsel, N, T]`` a sequence on `device`.

    A step then reads a byte where it would compute the attention of every query head and sort it. With a recipe's
    `step_tokens` they are kept in the order of their mass, so that the tokens of a step are slices.
    """

    def __init__(
        self, samples: Samples, recipe: Recipe, base: BaseModel, first: int, last: int, device: torch.device
    ) -> None:
        self.ordered, self.kv_heads = recipe.step_tokens > 0, base.num_key_value_heads
        self.bytes: list[Tensor] = []
        self.orders: list[Tensor] = []
        live = LiveTargets(recipe, base)
        for index in range(len(samples)):
            parts = []
            held = samples.read(index, first, first + 1).query.shape[2]
            at_once = max(1, CHUNK_BYTES // (4 * base.num_attention_heads * held * recipe.context))
            for row in range(first, last, at_once):
                target, heavy = live.of(samples.read(index, row, min(row + at_once, last)).to(device))
                parts.append(self._keep(target, heavy))
            self.bytes.append(torch.cat([steps for steps, _ in parts]))
            self.orders.append(torch.cat([order for _, order in parts]))

    def _keep(self, target: Tensor, heavy: Tensor) -> tuple[Tensor, Tensor]:
        steps = encode(target, heavy)
        if not self.ordered:
            return steps, torch.empty(len(target), 0, dtype=torch.int64, device=target.device)
        order = mass_order(target, self.kv_heads)
        places = _by_selection(order, target.shape[1]).expand_as(target)
        return steps.gather(-1, places), order

    def lesson(self, index: int, queries: Tensor, sample: Sample, chosen: Thin | None = None) -> Lesson:
        """As `Targets.lesson`."""
        steps, order = self.bytes[index], self.orders[index]
        if chosen is not None:
            parts = steps[..., : chosen.top], steps[..., chosen.first :: chosen.stride]
            picked = torch.cat([part.index_select(2, queries) for part in parts], -1)
            return _thinned(sample, order, chosen, decode(picked), picked != NONE)
        picked = steps.index_select(2, queries)
        if self.ordered:  # all tokens of a short sequence, in the order of the bytes
            places = order[..., None].expand(-1, -1, -1, sample.key.shape[3])
            sample = dataclasses.replace(sample, key=sample.key.gather(2, places))
        return Lesson(sample, decode(picked), picked != NONE)


def encode(target: Tensor, heavy: Tensor) -> Tensor:
    """Targets in 0..1 as bytes, see `STEPS_PER_NAT`; `heavy` bool broadcasts to them."""
    steps = target.log().mul_(-STEPS_PER_NAT).round_()
    return steps.clamp_(0, ZERO).to(torch.uint8).masked_fill_(~heavy, NONE)


def decode(steps: Tensor) -> Tensor:
    """The targets that `encode` was given, to 3 % of each."""
    target = steps.float().mul_(-1 / STEPS_PER_NAT).exp_()
    return target.masked_fill_(steps >= ZERO, 0)


def stored_bytes(recipe: Recipe, base: BaseModel, sequences: int, layers: int) -> int:
    """Bytes of `StoredTargets`."""
    tokens = sum(recipe.length(index) for index in range(sequences))
    return tokens * layers * recipe.maps.selection_heads(base) * recipe.queries


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, what torch holds without using it included."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused
