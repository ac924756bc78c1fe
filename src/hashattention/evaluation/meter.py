"""What sparse steps cost and lose, for every sample of a batch, gathered on the device without waiting for it."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import torch
from torch import Tensor

from hashattention.evaluation.observe import dense_weights
from hashattention.selectors.base import Selection, Step

#: Decimals of an error that are kept.
DIGITS = 5


@dataclasses.dataclass(frozen=True)
class Reading:
    """Means of one sample: tokens an index set, K and V rows a KV head, output error by layer, and the attention each
    slot of the cache got (empty unless asked for).
    """

    attended: float
    rows: float
    error: dict[int, float]
    attention: tuple[float, ...]


class Meter:
    """An observer for a batch: `Recorder`'s quantities, kept apart by request.

    Parameters
    ----------
    since, until : int
        Steps at ``since <= tokens <= until`` cached tokens are measured,
    every : int
        of these each `every`-th.
    errors : bool
        Also compute exact dense attention of measured steps, for the error: this costs more than the step.
    errors_every : int
        Of the measured steps each `errors_every`-th.
    attention : tuple of int
        Requests whose attention weights are kept too.
    """

    def __init__(
        self,
        since: int,
        until: int,
        every: int = 1,
        errors: bool = True,
        attention: tuple[int, ...] = (),
        errors_every: int = 1,
    ) -> None:
        self.since, self.until, self.every = since, until, every
        self.errors, self.attention = errors, attention
        self.errors_every = errors_every * every
        self.active: Tensor | None = None
        self._error: dict[int, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[int, Tensor] = {}
        self._compared: dict[int, Tensor] = {}
        self._peaks: dict[int, Tensor] = {}
        self._weight: dict[int, Tensor] = {}

    def wants(self, first: int, last: int) -> bool:
        """Whether a step at ``first <= tokens <= last`` is measured."""
        from_here = max(first, self.since)
        next_one = from_here + (self.since - from_here) % self.every
        return next_one <= min(last, self.until)

    def __call__(self, step: Step, selection: Selection, out: Tensor) -> None:
        """Measure one sparse step."""
        tokens = step.extent.tokens
        if not self.since <= tokens <= self.until or (tokens - self.since) % self.every:
            return
        kept = selection.held(tokens)
        active = self.active if self.active is not None else torch.ones(len(kept), device=kept.device)
        read = kept.unflatten(1, (step.key.shape[1], -1)).any(2).sum(-1)
        self._add(self._sums, "attended", selection.counts.float().mean(1) * active)
        self._add(self._sums, "rows", read.float().mean(1) * active)
        self._add(self._steps, step.layer, active)
        if (self.errors or self.attention) and (tokens - self.since) % self.errors_every == 0:
            self._add(self._compared, step.layer, active)
            self._compare(step, kept, out, active)

    def _compare(self, step: Step, kept: Tensor, out: Tensor, active: Tensor) -> None:
        """Against exact dense attention of this very step."""
        tokens, weights = step.extent.tokens, dense_weights(step)
        value = step.value[:, :, :tokens].float()
        dense = (weights.unflatten(1, (value.shape[1], -1)) @ value).flatten(1, 2)
        error = (out[:, :, 0].float() - dense).norm(dim=-1) / dense.norm(dim=-1)
        self._add(self._error, step.layer, error.mean(1) * active)
        if self.attention:
            places = list(self.attention)
            weights, kept, active = weights[places], kept[places], active[places]
            per_head = weights * kept.repeat_interleave(weights.shape[1] // kept.shape[1], dim=1)
            peak = (per_head / per_head.sum(-1, keepdim=True)).amax(1) * active[:, None]
            held = self._peaks.get(tokens)
            self._peaks[tokens] = peak if held is None else torch.maximum(held, peak)
            self._weight[tokens] = active

    @staticmethod
    def _add(sums: dict[int, Tensor] | dict[str, Tensor], key: object, values: Tensor) -> None:
        held = sums.get(key)  # type: ignore[call-overload]
        sums[key] = values.clone() if held is None else held + values  # type: ignore[index]

    def readings(self) -> list[Reading] | None:
        """One reading a request; None if no sparse step was measured."""
        if not self._steps:
            return None
        steps = {layer: counts.tolist() for layer, counts in sorted(self._steps.items())}
        compared = {layer: counts.tolist() for layer, counts in self._compared.items()}
        errors = {layer: sums.tolist() for layer, sums in sorted(self._error.items())}
        sums = {name: values.tolist() for name, values in self._sums.items()}
        attention = self._attention()
        readings = []
        for place in range(len(sums["rows"])):
            total = sum(counts[place] for counts in steps.values())
            readings.append(
                Reading(
                    attended=sums["attended"][place] / total,
                    rows=sums["rows"][place] / total,
                    error={layer: found[place] / compared[layer][place] for layer, found in errors.items()},
                    attention=attention.get(place, ()),
                )
            )
        return readings

    def _attention(self) -> dict[int, tuple[float, ...]]:
        """By request: mean over steps of the weight of the head that gave a token most."""
        if not self._peaks:
            return {}
        total, steps = torch.zeros(len(self.attention), max(self._peaks)), torch.zeros(len(self.attention))
        for tokens, peak in self._peaks.items():
            total[:, :tokens] += peak.cpu()
            steps += self._weight[tokens].cpu()
        mean = (total / steps.clamp(min=1)[:, None]).tolist()
        return {place: tuple(found) for place, found in zip(self.attention, mean, strict=True)}


def spread(error: dict[int, float], layers: int) -> tuple[float, ...]:
    """The error of every layer of the model: 0 where it stays dense; empty if nothing was measured."""
    found: dict[int, float] = defaultdict(float, error)
    return tuple(round(found[layer], DIGITS) for layer in range(layers)) if error else ()
