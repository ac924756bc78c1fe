"""The remainder's coefficients: how much of the attention the tokens left out are estimated to have.

Three numbers a query head (`ops.add_remainder`), fitted so that the output is as close to dense attention as it can be,
then so that what the model predicts is (`train.predictions`).
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hashattention.config import BaseModel, Budget
from hashattention.maps import HashMaps, check_remainder
from hashattention.models.capture import CHUNK, Sample, capture
from hashattention.models.packaged import Progress
from hashattention.train.facts import room
from hashattention.train.metrics import Exact, choose, method_scores, share_left
from hashattention.train.predictions import tune
from hashattention.train.recipe import Recipe
from hashattention.train.text import Texts, sequences

if TYPE_CHECKING:
    from hashattention.models.source import LoadedModel

Remainder = tuple[tuple[tuple[float, ...], ...], ...]

#: Heavy budgets that one set of coefficients is to serve.
HEAVY = (1 / 8, 1 / 16, 1 / 32, 1 / 64)
#: Training sequences that are read again (half of them ask for facts where any does), and queries of each.
SEQUENCES, QUERIES = 16, 64
#: Steps of the quasi-Newton method, and the weight of the coefficients' squares, which holds what the data leave open.
STEPS, HOLD = 100, 1e-4
START = (-1.0, 0.3, 0.0)


class Fit:
    """Collects what the error of the output depends on, sequence by sequence, and fits the coefficients.

    Parameters
    ----------
    maps : HashMaps or None
        What selects; None: exact shared selection.
    base : BaseModel
        The layers that the samples hold.
    sink, local : int
        Tokens that are always attended.
    """

    def __init__(self, maps: HashMaps | None, base: BaseModel, *, sink: int, local: int) -> None:
        self.maps, self.base = maps, base
        self.budgets = [Budget(heavy=share, sink=sink, local=local) for share in HEAVY]
        self._parts: list[list[Tensor]] = [[] for _ in base.layers]

    def add(self, sample: Sample) -> None:
        """Take a sequence with values, of all layers of `base`, into account."""
        if self.maps is not None:
            self.maps.to(sample.key.device)
        for row in range(len(self.base.layers)):
            layer = sample.layers(row, row + 1)
            exact = Exact.of(layer, self.budgets[0].sink, self.budgets[0].local)
            name = "exact_shared" if self.maps is None else "hash"
            scores = method_scores(name, self.maps, exact, layer, self.base, row)
            shares = None if self.maps is None or self.maps.shares is None else self.maps.shares[row]
            chosen = choose(scores, layer.positions, self.budgets, shares)
            parts = [exact.leave_out(each).statistics() for each in chosen]
            self._parts[row].append(torch.cat(parts, 1).double().cpu())

    def solve(self) -> Tensor:
        """The coefficients, float64 ``[L, Hq, 3]``."""
        return torch.stack([_minimise(torch.cat(parts, 1)) for parts in self._parts])


def _minimise(statistics: Tensor) -> Tensor:
    """Coefficients ``[Hq, 3]`` with the least mean relative error over queries, from ``[Hq, N, 6]``."""
    features, (offset, error, cross, length) = statistics[..., :2], statistics[..., 2:].unbind(-1)
    coefficients = torch.tensor(START, dtype=torch.float64).repeat(len(statistics), 1).requires_grad_()
    solver = torch.optim.LBFGS([coefficients], max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        share = share_left(features, offset, coefficients)
        squared = error + 2 * share * cross + share * share * length
        total = squared.clamp(min=1e-12).sqrt().mean(1).sum() + HOLD * coefficients.square().sum()
        total.backward()
        return total

    solver.step(loss)
    return coefficients.detach()


def fit(
    model: object,
    base: BaseModel,
    maps: HashMaps | None,
    tokens: Sequence[Tensor],
    *,
    sink: int,
    local: int,
    steps: int = 0,
    asking: Container[int] = (),
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> Tensor:
    """Coefficients for `maps` (None: for exact shared selection) from token sequences that `model` reads, one after the
    other, so that no more than one is held; those for maps are then moved in `steps` of `predictions.tune`. float64
    ``[L, Hq, 3]``.

    Half of the queries of a sequence whose number is in `asking` lie where it asks for facts (`facts.plant`).
    """
    found = Fit(maps, base, sink=sink, local=local)
    for number, each in enumerate(tokens):
        positions = _positions(len(each), sink + local + 1, number in asking)
        found.add(capture(model, base, each, positions, value=True, chunk=chunk))
        if progress is not None:
            progress("fitting the remainder", number + 1, len(tokens))
    table = found.solve()
    if maps is None or not steps:
        return table
    return tune(model, maps, tokens, table, found.budgets, steps=steps, chunk=chunk, progress=progress)


def _positions(length: int, least: int, asks: bool) -> Tensor:
    """Where the queries of a sequence are, int64 ``[N]`` ascending."""
    first, last = min(max(length // 8, least), length - 1), length - 1
    parts = (
        [(first, QUERIES)] if not asks else [(first, QUERIES // 2), (max(first, length - room(length)), QUERIES // 2)]
    )
    return torch.cat([torch.linspace(start, last, count).long() for start, count in parts]).unique()


def as_remainder(table: Tensor) -> Remainder:
    """Coefficients ``[L, Hq, 3]`` as plain numbers."""
    plain = [[[float(f"{one:.5g}") for one in head] for head in layer] for layer in table.tolist()]
    return check_remainder(plain, *table.shape[:2])


def calibrate(
    model: LoadedModel,
    maps: HashMaps,
    texts: Texts,
    *,
    lengths: Sequence[int] = (8192,),
    count: int = SEQUENCES,
    sink: int = 16,
    local: int = 64,
    steps: int = Recipe.prediction_steps,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> HashMaps:
    """Give maps that have none (of an older release, say) their remainder; `save_pretrained` keeps it.

    Parameters
    ----------
    model : LoadedModel
        The model the maps are for, from `load_model`.
    maps : HashMaps
        Changed in place, and returned.
    texts : path, `datasets` name or a list
        As for `train.run.train`: `count` sequences are read, of `lengths` tokens in turn.
    sink, local : int
        Tokens that are always attended.
    steps, chunk : int
        Steps of `predictions.tune`, and tokens the model reads at once.
    """
    text = sequences(
        model.tokenizer, texts, context=max(lengths), count=count, held_out=0, seed=0, lengths=lengths,
        progress=progress,
    )  # fmt: skip
    options: dict[str, Any] = {"sink": sink, "local": local, "steps": steps, "chunk": chunk}
    table = fit(model.model, maps.model, maps, text.train, **options, progress=progress)
    maps.remainder = as_remainder(table)
    return maps
