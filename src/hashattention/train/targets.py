"""Targets of every step: made from the sample at hand, or once for all steps and kept on the device in a byte each."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from hashattention.config import BaseModel
from hashattention.models.capture import Sample
from hashattention.train import labels
from hashattention.train.recipe import Recipe
from hashattention.train.shards import Samples

#: A stored target t is the byte round(-16 ln t): 3 % steps from 1 down to 1.2e-7; the last byte is 0.
STEPS_PER_NAT = 16
ZERO = 255
#: Bytes of the float32 logits of one sequence that are in work at once.
CHUNK_BYTES = 2 << 30


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What a step learns from one sequence.

    `sample` holds the step's queries and the keys ``[L, Hkv, m, D]`` of its tokens, `target` is float32
    ``[L, Hsel, n, m]``, and `heavy` bool ``[n, m]`` says which are candidates.
    """

    sample: Sample
    target: Tensor
    heavy: Tensor


class Targets(Protocol):
    """What `losses.total` is given for some queries and tokens of one sequence."""

    def of(self, index: int, queries: Tensor, sample: Sample, tokens: Tensor | None = None) -> Tensor:
        """Target float32 ``[L, Hsel, n, m]`` of the `queries` int64 ``[n]`` of sequence `index` and its `tokens` int64
        ``[m]`` (None: all), a distribution over these; `sample` holds these queries alone, and all keys.
        """


def lesson(
    targets: Targets, recipe: Recipe, index: int, queries: Tensor, sample: Sample, tokens: Tensor | None = None
) -> Lesson:
    """The lesson of some queries and tokens; arguments as in `Targets.of`."""
    places = sample.key_positions()
    heavy = labels.heavy_candidates(sample.positions, places, recipe.sink, recipe.local)
    target = targets.of(index, queries, sample, tokens)
    if tokens is None:
        return Lesson(sample, target, heavy)
    some = dataclasses.replace(sample, key=sample.key.index_select(2, tokens), tokens=places[tokens])
    return Lesson(some, target, heavy.index_select(1, tokens))


def draw_tokens(tokens: int, wanted: int, generator: torch.Generator) -> Tensor | None:
    """`wanted` of the tokens of a sequence, int64 ascending: one from each of as many equal stretches; None for all.

    Attention to some of the tokens, normalised, is what the codes' softmax over the same ones should be: a student of
    such samples has the same best answer as one that sees all, and a step costs less.
    """
    if not wanted or tokens <= wanted:
        return None
    edges = torch.arange(wanted + 1) * tokens // wanted
    return edges[:-1] + (torch.rand(wanted, generator=generator) * (edges[1:] - edges[:-1])).long()


class LiveTargets:
    """Targets made anew in every step."""

    def __init__(self, recipe: Recipe, base: BaseModel) -> None:
        self.recipe, self.shared = recipe, recipe.maps.selection_heads(base) != base.num_attention_heads

    def of(self, index: int, queries: Tensor, sample: Sample, tokens: Tensor | None = None) -> Tensor:
        """As `Targets.of`."""
        target = labels.targets(labels.teach(sample, self.recipe, shared=self.shared), self.recipe)
        return target if tokens is None else _among(target.index_select(-1, tokens), self.recipe)


class StoredTargets:
    """Targets of layers ``first <= l < last`` of all `samples`, uint8 ``[L, Hsel, N, T]`` a sequence on `device`.

    A step then reads a byte where it would compute the attention of every query head and sort it.
    """

    def __init__(
        self, samples: Samples, recipe: Recipe, base: BaseModel, first: int, last: int, device: torch.device
    ) -> None:
        self.recipe = recipe
        self.bytes: list[Tensor] = []
        live = LiveTargets(recipe, base)
        for index in range(len(samples)):
            held = samples.read(index, first, first + 1).query.shape[2]
            every = torch.arange(held, device=device)
            at_once = max(1, CHUNK_BYTES // (4 * base.num_attention_heads * held * recipe.context))
            parts = [
                encode(live.of(index, every, samples.read(index, row, min(row + at_once, last)).to(device)))
                for row in range(first, last, at_once)
            ]
            self.bytes.append(torch.cat(parts))

    def of(self, index: int, queries: Tensor, sample: Sample, tokens: Tensor | None = None) -> Tensor:
        """As `Targets.of`."""
        if tokens is None:
            return decode(self.bytes[index].index_select(2, queries))
        return _among(decode(self.bytes[index][:, :, queries[:, None], tokens]), self.recipe)


class KeptTargets:
    """Targets that samples bring along (`thin`)."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def of(self, index: int, queries: Tensor, sample: Sample, tokens: Tensor | None = None) -> Tensor:
        """As `Targets.of`, among the tokens that were kept."""
        assert sample.target is not None, "samples of a recipe with keep_tokens bring their targets"
        target = sample.target if tokens is None else sample.target.index_select(-1, tokens)
        return _among(decode(target), self.recipe)


def thin(
    sample: Sample, recipe: Recipe, base: BaseModel, generator: torch.Generator, always: Tensor | None = None
) -> Sample:
    """`Recipe.keep_tokens` of a captured sequence's tokens and the targets of all its queries among them, a byte each.

    More text fits in memory so. Targets are made from all tokens first: what a head gives to the others counts. The
    places `always` int64 ``[F]``, if there are any, are among the tokens that stay.
    """
    tokens = draw_tokens(sample.key.shape[2], recipe.keep_tokens, generator)
    if tokens is not None and always is not None and len(always) < recipe.keep_tokens:
        others = torch.ones(sample.key.shape[2], dtype=torch.bool).index_fill(0, always, False).nonzero().squeeze(1)
        drawn = draw_tokens(len(others), recipe.keep_tokens - len(always), generator)
        tokens = torch.cat([always, others[drawn]]).sort().values
    places = sample.key_positions() if tokens is None else tokens.to(sample.key.device)
    live, (layers, heads, queries, _) = LiveTargets(recipe, base), sample.query.shape
    every, parts = torch.arange(queries, device=sample.key.device), []
    at_once = max(1, CHUNK_BYTES // (4 * heads * queries * sample.key.shape[2]))
    for row in range(0, layers, at_once):
        whole = live.of(0, every, sample.layers(row, min(row + at_once, layers)))
        parts.append(encode(whole.index_select(-1, places)))
    return dataclasses.replace(
        sample, key=sample.key.index_select(2, places), value=None, tokens=places, target=torch.cat(parts)
    )


def _among(target: Tensor, recipe: Recipe) -> Tensor:
    """Targets of some tokens as distributions over them; the label weights of "bce" stay."""
    if recipe.loss == "bce":
        return target
    return target.div_(target.sum(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny))


def encode(target: Tensor) -> Tensor:
    """Targets in 0..1 as bytes; see `STEPS_PER_NAT`."""
    steps = target.log().mul_(-STEPS_PER_NAT).round_()
    return steps.clamp_(0, ZERO).to(torch.uint8)


def decode(steps: Tensor) -> Tensor:
    """The targets that `encode` was given, to 3 % of each."""
    target = steps.float().mul_(-1 / STEPS_PER_NAT).exp_()
    return target.masked_fill_(steps == ZERO, 0)


def stored_bytes(recipe: Recipe, base: BaseModel, sequences: int, layers: int) -> int:
    """Bytes of `StoredTargets`; `KeptTargets` need none beside the samples."""
    if recipe.keep_tokens:
        return 0
    tokens = sum(recipe.length(index) for index in range(sequences))
    return tokens * layers * recipe.maps.selection_heads(base) * recipe.queries


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, what torch holds without using it included."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused
