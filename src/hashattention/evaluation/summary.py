"""What the rows say together: means, and paired differences to dense with a bootstrap confidence interval."""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np

from hashattention.evaluation.result import Row, pairs

DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class Summary:
    """One method at one density on the tasks of one group.

    `score` and `difference` (to dense, on the samples that both have; None without any) are means over tasks and
    lengths of means over samples; `low` and `high` bound the difference with 95 % confidence. The other means are over
    all rows that have the value, None where no row has it; `error` is also over layers.
    """

    model: str
    group: str
    method: str
    name: str
    density: float
    score: float
    count: int
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    auxiliary_bits: float = 0.0
    attended: float | None = None
    rows: float | None = None
    tokens: float = 0.0
    error: float | None = None
    logprob: float | None = None
    nll: float | None = None
    kl: float | None = None


def summarise(rows: Iterable[Row], by: Literal["group", "task", "length"] = "group") -> tuple[Summary, ...]:
    """Means for every model, group of tasks, method and density, in the order the rows have them.

    Parameters
    ----------
    rows : iterable of Row
    by : {"group", "task", "length"}
        What `Summary.group` is: ``"ruler"``, ``"ruler:vt"``, or ``"ruler@8192"``.

    Examples
    --------
    >>> dense = Row("needle", 1024, "0", "dense", 1.0, score=1.0)
    >>> quest = Row("needle", 1024, "0", "quest", 0.125, score=0.5)
    >>> [(found.method, found.score, found.difference) for found in summarise([dense, quest])]
    [('dense', 1.0, 0.0), ('quest', 0.5, -0.5)]
    """
    names: dict[str, Callable[[Row], str]] = {
        "group": lambda row: row.group,
        "task": lambda row: row.task,
        "length": lambda row: f"{row.group}@{row.length}",
    }
    cells: dict[tuple[str, str, str, float], list[Row]] = defaultdict(list)
    dense: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        group = names[by](row)
        cells[row.model, group, row.method, row.density].append(row)
        if row.method == DENSE:
            dense[row.model, group].append(row)
    return tuple(_summary(group, found, dense[model, group]) for (model, group, _, _), found in cells.items())


def _summary(group: str, rows: Sequence[Row], dense: Sequence[Row]) -> Summary:
    first = rows[0]
    strata = _strata(pairs(rows, dense))
    low = high = difference = None
    if strata:
        difference = statistics.fmean(statistics.fmean(found) for found in strata)
        low, high = interval(strata)
    return Summary(
        model=first.model,
        group=group,
        method=first.method,
        name=first.name or first.method,
        density=first.density,
        score=_mean_of_means(rows),
        count=len(rows),
        difference=difference,
        low=low,
        high=high,
        auxiliary_bits=first.auxiliary_bits,
        attended=_mean(row.attended for row in rows),
        rows=_mean(row.rows for row in rows),
        tokens=statistics.fmean(row.tokens for row in rows),
        error=_mean(statistics.fmean(row.error) for row in rows if row.error),
        logprob=_mean(row.logprob for row in rows),
        nll=_mean(row.nll for row in rows),
        kl=_mean(row.kl for row in rows),
    )


def interval(
    strata: Sequence[Sequence[float]], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """A bootstrap confidence interval for the mean of the strata's means.

    Parameters
    ----------
    strata : sequence of sequences of float
        Paired differences, a sequence for every task and length; samples are drawn again inside each.
    level : float
        Of confidence, in (0, 1).
    draws, seed : int
        How many bootstrap samples, and the seed they come from: the same input gives the same interval.

    Returns
    -------
    (float, float)
        The percentile interval.

    Examples
    --------
    >>> interval([[0.0, 0.0, 0.0], [0.5, 0.5]])
    (0.25, 0.25)
    """
    random = np.random.default_rng(seed)
    means = np.zeros(draws)
    for stratum in strata:
        values = np.asarray(stratum, dtype=np.float64)
        means += values[random.integers(0, len(values), (draws, len(values)))].mean(1) / len(strata)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _strata(paired: Iterable[tuple[Row, Row]]) -> list[list[float]]:
    strata: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row, base in paired:
        strata[row.task, row.length].append(row.score - base.score)
    return list(strata.values())


def _mean_of_means(rows: Sequence[Row]) -> float:
    strata: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        strata[row.task, row.length].append(row.score)
    return statistics.fmean(statistics.fmean(found) for found in strata.values())


def _mean(values: Iterable[float | None]) -> float | None:
    held = [value for value in values if value is not None]
    return statistics.fmean(held) if held else None
