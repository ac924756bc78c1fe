"""What selected tokens cost and lose, measured at every sparse step against exact dense attention of that very step."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import torch
from torch import Tensor

from hashattention.selectors.base import Selection, Step
from hashattention.selectors.oracle import exact_logits


@dataclasses.dataclass(frozen=True)
class Observation:
    """One sparse step of one layer; means are over requests, and over query heads or KV heads.

    Parameters
    ----------
    tokens : int
        Slots of the cache at this step.
    error : float
        ``|out - dense| / |dense|`` of the attention output (Euclidean norm per query head), mean over query heads.
    mass : float
        Share of the dense attention weights that lies on the selected tokens, mean over query heads.
    attended : float
        Tokens per index set, mean over index sets.
    rows : float
        K (and V) rows read per KV head, each once however many heads of the group want it, mean over KV heads.
    """

    tokens: int
    error: float
    mass: float
    attended: float
    rows: float


class Recorder:
    """An observer for `SparseAttention`: call it as ``recorder(step, selection, out)``, then read what it gathered.

    Parameters
    ----------
    since : int
        Steps at fewer cached tokens than this are not recorded (those of a question, say, before its answer begins).

    Attributes
    ----------
    layers : dict of int to list of Observation
        By layer, in the order of the steps.
    """

    def __init__(self, since: int = 0) -> None:
        self.since = since
        self.layers: dict[int, list[Observation]] = defaultdict(list)
        self._peaks: dict[int, Tensor] = {}

    def __call__(self, step: Step, selection: Selection, out: Tensor) -> None:
        """Record one sparse step."""
        if step.extent.tokens < self.since:
            return
        kept = selection.held(step.extent.tokens)
        weights = dense_weights(step)
        per_head = kept.repeat_interleave(weights.shape[1] // kept.shape[1], dim=1)
        mass = (weights * per_head).sum(-1)
        value = step.value[:, :, : step.extent.tokens].float()
        dense = (weights.unflatten(1, (value.shape[1], -1)) @ value).flatten(1, 2)
        error = (out[:, :, 0].float() - dense).norm(dim=-1) / dense.norm(dim=-1)
        read = kept.unflatten(1, (value.shape[1], -1)).any(2)
        observation = Observation(
            tokens=step.extent.tokens,
            error=error.mean().item(),
            mass=mass.mean().item(),
            attended=selection.counts.float().mean().item(),
            rows=read.sum(-1).float().mean().item(),
        )
        self.layers[step.layer].append(observation)
        attended = (weights * per_head / mass[..., None]).amax((0, 1)).cpu()
        held = self._peaks.get(step.extent.tokens)
        self._peaks[step.extent.tokens] = attended if held is None else torch.maximum(held, attended)

    def attention(self) -> Tensor:
        """The weight each token got in the sparse attention: of the head (of any layer) that gave it most, mean over
        the recorded steps; float32 ``[T]``, in 0..1.
        """
        total = torch.zeros(max(self._peaks, default=0))
        for tokens, peak in self._peaks.items():
            total[:tokens] += peak
        return total / max(1, len(self._peaks))

    def mean(self, field: str) -> dict[int, float]:
        """The mean of one field of `Observation` by layer."""
        return {
            layer: sum(getattr(observation, field) for observation in found) / len(found)
            for layer, found in sorted(self.layers.items())
        }


class Tally:
    """An observer that only counts: what was attended, and its share of the causal tokens; it never waits for a device.

    Attributes
    ----------
    steps : int
        Sparse steps of any layer so far.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._sums: Tensor | None = None

    def __call__(self, step: Step, selection: Selection, out: Tensor) -> None:
        """Count one sparse step."""
        counts = selection.counts.double()
        shares = counts / step.extent.lengths().clamp(min=1)[:, None]
        sums = torch.stack([counts.mean(), shares.mean()])
        self._sums = sums if self._sums is None else self._sums + sums
        self.steps += 1

    def means(self) -> tuple[float, float]:
        """Tokens attended per index set, and the density: means over steps; (0, 0) without any."""
        if self._sums is None:
            return 0.0, 0.0
        attended, density = (self._sums / self.steps).tolist()
        return attended, density


def dense_weights(step: Step) -> Tensor:
    """Exact attention weights of this step over all valid tokens, float32 ``[B, Hq, T]`` (without a softcap)."""
    extent = step.extent
    logits = exact_logits(step).flatten(1, 2)
    position = torch.arange(extent.tokens, device=logits.device)
    outside = (position < extent.start[:, None]) | (position >= extent.end[:, None])
    if extent.mask is not None:
        outside = outside | ~extent.mask
    return logits.masked_fill(outside[:, None], -torch.inf).softmax(-1)
