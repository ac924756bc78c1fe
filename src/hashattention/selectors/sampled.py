"""A sampled tail: part of the heavy budget is a random sample that stands for every token left out (vAttention, arXiv
2510.05688).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from hashattention import ops
from hashattention.config import BaseModel
from hashattention.errors import ConfigError
from hashattention.selectors.base import Selection, Selector, Step
from hashattention.selectors.selection import Tail


class SampledTail(Selector):
    """Wrap a method: it keeps sink, local and a part of heavy; the rest of heavy is drawn uniformly, without
    replacement, from the tokens that it left out.

    A sampled token counts ``left out / sampled`` times, in the numerator and the denominator of the softmax, so that
    both are unbiased. The paper sets the size of the sample from an (epsilon, delta) bound; here the budget does.

    Parameters
    ----------
    method : Selector
        What chooses the other tokens.
    fraction : float
        Part of the heavy budget that is sampled, in (0, 1).
    seed : int
        The same seed, layer, context length and device give the same sample.
    """

    def __init__(self, method: Selector, fraction: float = 0.5, seed: int = 0) -> None:
        if not 0 < fraction < 1:
            raise ConfigError(f"fraction must be in (0, 1), the part of heavy that is sampled; given {fraction!r}.")
        if hasattr(method, "fraction"):
            raise ConfigError("the method has a sampled tail already; wrap it once.")
        self.method, self.fraction, self.seed = method, fraction, seed
        self.share, self.layers = method.share, method.layers

    def select(self, step: Step) -> Selection:
        """The method's selection, and a sample of the rest."""
        kept = self.method.select(dataclasses.replace(step, heavy_share=1 - self.fraction))
        rows, tokens = step.rows(self.share), step.extent.tokens
        left = rows.valid(tokens)[:, None] & ~kept.held(tokens)
        number = left.sum(-1)
        spared = rows.budgets[..., 2] - (rows.budgets[..., 2].double() * (1 - self.fraction)).floor()
        drawn = torch.minimum(spared.to(torch.int64), number)
        budgets = torch.zeros_like(rows.budgets)
        budgets[..., 2] = drawn
        random = self._draw(step, left.shape).masked_fill(~left, -1.0)
        room = math.ceil(rows.capacity * self.fraction) + 1
        sampled = Selection(*ops.select(random, rows.start, rows.end, budgets, room, mask=rows.mask))
        weight = (number.clamp(min=1) / drawn.clamp(min=1)).log().float()
        return Tail(kept, sampled, weight).unite(tokens)

    def _draw(self, step: Step, shape: torch.Size) -> Tensor:
        seed = hash((self.seed, step.layer, step.extent.tokens)) % 2**63
        random = torch.Generator(step.key.device).manual_seed(seed)
        return torch.rand(shape, generator=random, device=step.key.device)

    def auxiliary_bits(self, head_dim: int) -> float:
        """Those of the method; a sample needs none."""
        return self.method.auxiliary_bits(head_dim)

    def refuse(self, model: BaseModel) -> str | None:
        """What the method says."""
        return self.method.refuse(model)
