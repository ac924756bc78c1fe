"""What the rows of an evaluation say, for people: a board for each model, an entry for each method and density."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from hashattention.errors import ConfigError, InputError
from hashattention.evaluation.result import ROWS, Marked, Row, read, read_marked
from hashattention.evaluation.summary import DENSE, Summary, summarise

#: The order of the groups; others follow.
GROUPS = ("needle", "ruler", "longbench", "perplexity", "agreement")
#: What a row cannot be shown without, and what it may leave out.
NUMBERS = ("score", "density", "length", "tokens", "auxiliary_bits")
OPTIONAL = ("attended", "rows", "depth", "nll", "kl", "logprob")

Place = tuple[str, float]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One method at one density.

    Parameters
    ----------
    method, name, density
        As in the rows.
    scores : dict of str to Summary
        By group of tasks. A perplexity summary's score is minus the mean negative log-likelihood, in nats.
    attended : float
        Attended tokens over causal tokens, mean over the rows that recorded it; else the density asked for.
    read, read_share : float or None
        K (and V) rows read per KV head, each counted once: how many, and over all causal tokens; means.
    bytes_share : float or None
        Bytes of these rows and of the auxiliary bits, over what dense attention reads; None if not recorded.
    auxiliary_bits : float
        Read beside K and V, per token and KV head.
    layers : tuple of float
        Relative output error of every layer, mean over rows; empty if nothing was recorded.
    """

    method: str
    name: str
    density: float
    scores: dict[str, Summary]
    attended: float
    read: float | None
    read_share: float | None
    bytes_share: float | None
    auxiliary_bits: float
    layers: tuple[float, ...]

    @property
    def place(self) -> Place:
        """Method and density: what names the entry on its board."""
        return self.method, self.density

    @property
    def dense(self) -> bool:
        """Whether it is what the others are compared with."""
        return self.method == DENSE

    @property
    def error(self) -> float | None:
        """Mean over layers."""
        return statistics.fmean(self.layers) if self.layers else None


@dataclasses.dataclass(frozen=True)
class Board:
    """Everything of one model served in one way, the best first at each density."""

    model: str
    dtype: str
    protocol: str
    chat: bool
    rows: tuple[Row, ...]
    entries: tuple[Entry, ...]
    groups: tuple[str, ...]

    @property
    def title(self) -> str:
        """The model without its owner."""
        return self.model.rstrip("/").rpartition("/")[2] or "unnamed model"

    @property
    def methods(self) -> dict[str, str]:
        """Names of the sparse methods, in the order of the rows."""
        return {row.method: row.name for row in self.rows if row.method != DENSE}

    @property
    def densities(self) -> tuple[float, ...]:
        """Of the sparse entries, the densest first."""
        return tuple(sorted({entry.density for entry in self.entries if not entry.dense}, reverse=True))

    def __getitem__(self, place: Place) -> Entry:
        """The entry of a method and density."""
        return next(entry for entry in self.entries if entry.place == place)


def load(folder: Path, densities: Sequence[float] | None = None) -> tuple[tuple[Board, ...], tuple[Marked, ...]]:
    """The boards and the marked documents of a result folder; with `densities`, of dense and these alone.

    Raises
    ------
    InputError
        If it has no rows, or a line or file in it is not what it should be; the line is named.
    """
    rows = read(folder)
    if densities is not None:
        rows = tuple(row for row in rows if row.method == DENSE or row.density in densities)
    if not rows:
        which = "" if densities is None else f" at density {', '.join(f'{each:g}' for each in densities)}"
        raise InputError(f"{folder / ROWS} has no rows{which}; run hashattention eval with --out {folder} first.")
    for row in rows:
        _check(row, folder)
    try:
        marked = read_marked(folder)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(f"a marked-*.json in {folder} is damaged ({error}); remove it and evaluate again.") from error
    return boards(rows), marked


def boards(rows: Iterable[Row]) -> tuple[Board, ...]:
    """A board for every model, dtype and protocol: their rows are never averaged together."""
    held: dict[tuple[str, str, str, bool], list[Row]] = defaultdict(list)
    for row in rows:
        held[row.model, row.dtype, row.protocol, row.chat].append(_with_likelihood(row))
    return tuple(_board(served, _with_names(found)) for served, found in held.items())


def titles(found: Sequence[Board]) -> list[str]:
    """What to call each board: its model, and how it was served where another board has the same model."""
    models = [board.title for board in found]
    return [
        model
        if models.count(model) == 1
        else f"{model}, {board.dtype}, {board.protocol} sparse, {'chat' if board.chat else 'plain'}"
        for model, board in zip(models, found, strict=True)
    ]


def is_perplexity(group: str) -> bool:
    """Whether a group, task or length of that name is measured in nats."""
    return re.split("[:@]", group)[0] == "perplexity"


def depths(board: Board) -> dict[Place, dict[tuple[int, float], float]]:
    """Mean score of the needle rows of every method and density, by length and depth."""
    found: dict[Place, dict[tuple[int, float], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in board.rows:
        if row.depth is not None:
            found[row.method, row.density][row.length, round(row.depth, 3)].append(row.score)
    means = {
        place: {at: statistics.fmean(scores) for at, scores in sorted(cells.items())} for place, cells in found.items()
    }
    return {entry.place: means[entry.place] for entry in board.entries if entry.place in means}


def _board(served: tuple[str, str, str, bool], rows: Sequence[Row]) -> Board:
    held: dict[Place, list[Row]] = defaultdict(list)
    for row in rows:
        held[row.method, row.density].append(row)
    scores: dict[Place, dict[str, Summary]] = defaultdict(dict)
    for summary in summarise(rows):
        scores[summary.method, summary.density][summary.group] = summary
    present = dict.fromkeys(row.group for row in rows)
    groups = tuple(name for name in GROUPS if name in present) + tuple(name for name in present if name not in GROUPS)
    entries = [_entry(place, found, scores[place]) for place, found in held.items()]
    return Board(*served, tuple(rows), tuple(sorted(entries, key=lambda entry: _rank(entry, groups))), groups)


def _entry(place: Place, rows: Sequence[Row], scores: dict[str, Summary]) -> Entry:
    method, density = place
    attended = _mean(row.attended / row.tokens for row in rows if row.attended is not None and row.tokens)
    read = [row for row in rows if row.rows is not None and row.tokens]
    errors = [row.error for row in rows if row.error]
    layers = zip(*(error for error in errors if len(error) == len(errors[0])), strict=True)
    return Entry(
        method=method,
        name=rows[0].name,
        density=density,
        scores=scores,
        attended=1.0 if method == DENSE else density if attended is None else attended,
        read=_mean(row.rows or 0.0 for row in read),
        read_share=1.0 if method == DENSE else _mean((row.rows or 0.0) / row.tokens for row in read),
        bytes_share=1.0 if method == DENSE else _mean(row.bytes_share for row in read if row.bytes_share is not None),
        auxiliary_bits=rows[0].auxiliary_bits,
        layers=tuple(statistics.fmean(layer) for layer in layers),
    )


def _rank(entry: Entry, groups: Sequence[str]) -> tuple[bool, float, int, float]:
    held = {group: entry.scores[group].score for group in groups if group in entry.scores}
    scores = [math.exp(score) if is_perplexity(group) else score for group, score in held.items()]
    # An entry that lacks a group has a mean of other tasks: it comes after the whole ones.
    return not entry.dense, -entry.density, len(groups) - len(scores), -statistics.fmean(scores)


def _with_likelihood(row: Row) -> Row:
    return dataclasses.replace(row, score=-row.nll) if row.nll is not None and is_perplexity(row.task) else row


def _with_names(rows: Sequence[Row]) -> list[Row]:
    """Rows of one method with other maps, sink or local become another method; no two methods share a name."""
    maps: dict[str, set[str]] = defaultdict(set)
    ends: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for row in rows:
        maps[row.method].add(row.maps)
        ends[row.method].add(row.budget[:2])
    apart = []
    for row in rows:
        marks = [row.maps or "no maps"] if len(maps[row.method]) > 1 else []
        marks += ["sink {} local {}".format(*row.budget[:2])] if len(ends[row.method]) > 1 else []
        mark = f" ({', '.join(marks)})" if marks and row.method != DENSE else ""
        apart.append(dataclasses.replace(row, method=row.method + mark, name=(row.name or row.method) + mark))
    methods: dict[str, set[str]] = defaultdict(set)
    for row in apart:
        methods[row.name].add(row.method)
    return [dataclasses.replace(row, name=row.method) if len(methods[row.name]) > 1 else row for row in apart]


def _mean(values: Iterable[float]) -> float | None:
    held = list(values)
    return statistics.fmean(held) if held else None


def _check(row: Row, folder: Path) -> None:
    values = {name: getattr(row, name) for name in NUMBERS}
    values |= {name: value for name in OPTIONAL if (value := getattr(row, name)) is not None}
    values |= {f"error[{layer}]": value for layer, value in enumerate(row.error)}
    for name, value in values.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(
                f"{folder / ROWS}: the row of {row.task}, sample {row.sample}, {row.method} at density {row.density} "
                f"has {name} {value!r}, not a finite number; remove the line and evaluate again."
            )
