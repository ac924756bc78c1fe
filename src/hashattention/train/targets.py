"""Targets of every step: made from the sample at hand, or once for all steps and kept on the device in a byte each."""

from __future__ import annotations

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


class Targets(Protocol):
    """What `losses.total` is given for some queries of one sequence."""

    def of(self, index: int, queries: Tensor, sample: Sample) -> Tensor:
        """Target float32 ``[L, Hsel, n, T]`` of the `queries` int64 ``[n]`` of sequence `index`; `sample` holds these
        queries alone.
        """


class LiveTargets:
    """Targets made anew in every step."""

    def __init__(self, recipe: Recipe, base: BaseModel) -> None:
        self.recipe, self.shared = recipe, recipe.maps.selection_heads(base) != base.num_attention_heads

    def of(self, index: int, queries: Tensor, sample: Sample) -> Tensor:
        """As `Targets.of`."""
        return labels.targets(labels.teach(sample, self.recipe, shared=self.shared), self.recipe)


class StoredTargets:
    """Targets of layers ``first <= l < last`` of all `samples`, uint8 ``[L, Hsel, N, T]`` a sequence on `device`.

    A step then reads a byte where it would compute the attention of every query head and sort it.
    """

    def __init__(
        self, samples: Samples, recipe: Recipe, base: BaseModel, first: int, last: int, device: torch.device
    ) -> None:
        live = LiveTargets(recipe, base)
        self.bytes: list[Tensor] = []
        for index in range(len(samples)):
            held = samples.read(index, first, first + 1).query.shape[2]
            every = torch.arange(held, device=device)
            at_once = max(1, CHUNK_BYTES // (4 * base.num_attention_heads * held * recipe.context))
            parts = [
                encode(live.of(index, every, samples.read(index, row, min(row + at_once, last)).to(device)))
                for row in range(first, last, at_once)
            ]
            self.bytes.append(torch.cat(parts))

    def of(self, index: int, queries: Tensor, sample: Sample) -> Tensor:
        """As `Targets.of`."""
        return decode(self.bytes[index].index_select(2, queries))


def encode(target: Tensor) -> Tensor:
    """Targets in 0..1 as bytes; see `STEPS_PER_NAT`."""
    steps = target.log().mul_(-STEPS_PER_NAT).round_()
    return steps.clamp_(0, ZERO).to(torch.uint8)


def decode(steps: Tensor) -> Tensor:
    """The targets that `encode` was given, to 3 % of each."""
    target = steps.float().mul_(-1 / STEPS_PER_NAT).exp_()
    return target.masked_fill_(steps == ZERO, 0)


def stored_bytes(recipe: Recipe, base: BaseModel, sequences: int, layers: int) -> int:
    """Bytes of `StoredTargets`."""
    return sequences * layers * recipe.maps.selection_heads(base) * recipe.queries * recipe.context


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, what torch holds without using it included."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused
