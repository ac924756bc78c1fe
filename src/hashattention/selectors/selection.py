"""What a selector returns: the tokens that are attended, and how to attend to them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hashattention import ops
from hashattention.selectors.remainder import Remainder


@dataclasses.dataclass(frozen=True)
class Selection:
    """indices int32 ``[B, Hsel, K]`` (ascending, packed left, -1 = none) and counts int32 ``[B, Hsel]``.

    They hold every token that is attended; with a `tail`, some of these stand for tokens that are not, and with a
    `remainder` the mean value of all tokens does.
    """

    indices: Tensor
    counts: Tensor
    tail: Tail | None = None
    remainder: Remainder | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, softcap: float) -> Tensor:
        """Attention output ``[B, Hq, 1, D]`` of `query` ``[B, Hq, 1, D]`` over these tokens of `key` and `value`."""
        if self.tail is not None:
            return self.tail.attend(query, key, value, scale=scale, softcap=softcap)
        out, lse = ops.attend(query, key, value, self.indices, self.counts, scale=scale, softcap=softcap)
        if self.remainder is None:
            return out
        return self.remainder.add(out, lse, query, self.counts, scale=scale, softcap=softcap)

    def held(self, tokens: int) -> Tensor:
        """Which of the first `tokens` tokens each index set holds, bool ``[B, Hsel, tokens]``."""
        used = torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts[..., None]
        # Slots that are not used all point at one spare place.
        place = torch.where(used, self.indices, tokens).long()
        held = torch.zeros((*place.shape[:2], tokens + 1), dtype=torch.bool, device=place.device)
        return held.scatter_(2, place, True)[..., :tokens]


@dataclasses.dataclass(frozen=True)
class Tail:
    """A selection in two disjoint parts: `kept`, attended as it is, and `sampled`, whose every token stands for
    ``exp(log_weight)`` tokens that were left out; log_weight float32 ``[B, Hsel]``.
    """

    kept: Selection
    sampled: Selection
    log_weight: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, softcap: float) -> Tensor:
        """Both parts, merged by their logsumexp, the sample's shifted by its weight."""
        (out, lse), (sampled, sampled_lse) = (
            ops.attend(query, key, value, part.indices, part.counts, scale=scale, softcap=softcap)
            for part in (self.kept, self.sampled)
        )
        log_weight = self.log_weight.repeat_interleave(query.shape[1] // self.log_weight.shape[1], dim=1)
        # Two empty parts give NaN here, and the output of both is 0.
        share = (sampled_lse + log_weight[..., None] - lse).sigmoid().nan_to_num(0.0)[..., None]
        return (out.float() * (1 - share) + sampled.float() * share).to(out.dtype)

    def unite(self, tokens: int) -> Selection:
        """All tokens of both parts (each under `tokens`), attended as the two parts ask."""
        both = torch.cat([self.kept.indices, self.sampled.indices], -1)
        ordered = torch.where(both < 0, tokens, both).sort(-1).values
        indices = ordered.masked_fill(ordered == tokens, -1)
        return Selection(indices, self.kept.counts + self.sampled.counts, self)
