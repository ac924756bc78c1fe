"""The leaderboard's page: one self-contained HTML file, for phone and desktop, light and dark, with PNGs beside it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import string
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

from hashattention.evaluation.result import Marked, Reading
from hashattention.evaluation.summary import DENSE
from hashattention.report import leaderboard_plots as plots
from hashattention.report import leaderboard_table as table
from hashattention.report.leaderboard import Board, depths
from hashattention.report.page import check_packages, flow
from hashattention.report.table import density_text

#: Marked documents on a page, at most: each weighs as much as the rest of it.
DOCUMENTS = 4
#: Levels of attention, from the least that is not nothing.
LEVELS = string.ascii_letters
#: What a needle, a code or a number must have at least to be looked for in its document.
LETTERS = 3


@dataclasses.dataclass(frozen=True)
class Figure:
    """One section's plots: `parts` are (title, chart); `density` where the section has one for each density."""

    name: str
    parts: tuple[tuple[str, Any], ...]
    density: float | None = None


def render(boards: Sequence[Board], documents: Sequence[Marked] = ()) -> str:
    """The whole page; it loads nothing from elsewhere.

    Raises
    ------
    MissingDependencyError
        Without jinja2, altair or vl-convert-python.
    """
    check_packages("jinja2", "altair", "vl_convert")
    import jinja2

    source = files("hashattention").joinpath("report/leaderboard.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shown = [document(marked) for marked in documents[:DOCUMENTS] if marked.readings]
    return environment.from_string(source).render(
        light=plots.LIGHT,
        dark=plots.DARK,
        boards=[_view(board) for board in boards],
        documents=shown,
        kept_back=len(documents) - len(shown),
        static=_static(shown[0]) if shown else (),
        letters=LEVELS,
        zip=zip,
        origins=list(dict.fromkeys(origin for board in boards for origin in table.origins(board))),
        libraries=_libraries(boards),
    )


def pictures(boards: Sequence[Board]) -> Iterator[tuple[str, bytes]]:
    """Name and PNG of every section of plots."""
    check_packages("altair", "vl_convert")
    for board in boards:
        prefix = f"{re.sub(r'[^a-z0-9.]+', '-', board.title.lower())}-" if len(boards) > 1 else ""
        for figure in figures(board):
            density = f"-{density_text(figure.density).replace('/', '-')}" if figure.density else ""
            yield f"{prefix}{figure.name}{density}.png", plots.to_png(figure.parts)


def figures(board: Board) -> list[Figure]:
    """Every section of plots that the rows have something for."""
    scored = board.groups
    sparsest = board.densities[-1] if board.densities else 0.0
    found = [
        Figure("quality", tuple((table.heading(group), plots.by_density(board, group)) for group in scored)),
        Figure("rows", tuple((table.heading(group), plots.by_rows(board, group)) for group in scored)),
        Figure(
            "bits", tuple((table.heading(group), plots.by_bits(board, group, sparsest)) for group in scored), sparsest
        ),
        Figure("layers", tuple((f"density {density_text(at)}", plots.by_layer(board, at)) for at in board.densities)),
    ]
    cells = depths(board)
    for density in reversed(board.densities):
        places = [place for place in cells if place[1] in (density, 1.0) and (place[0] == DENSE or place[1] == density)]
        maps = tuple((board[place].name, plots.needles(board, place, cells[place])) for place in places)
        found.append(Figure("needles", maps if any(place[0] != DENSE for place in places) else (), density))
    drawn = (
        dataclasses.replace(figure, parts=tuple(part for part in figure.parts if part[1] is not None))
        for figure in found
    )
    return [figure for figure in drawn if figure.parts]


def document(marked: Marked) -> dict[str, Any]:
    """What the page's script draws of one marked document.

    Returns
    -------
    dict
        `title`, `question`, `expected`, `pieces` (text of every token), `facts` (``[first, end)`` in tokens: where an
        expected answer stands), `densities` (their names) and `readings` (`name`, `density`, `answer`, `right`,
        `weights` as `levels` has them).
    """
    pieces = flow(marked.pieces)
    readings = sorted(marked.readings, key=lambda reading: (-reading.density, not reading.method.startswith("hash")))
    return {
        "title": f"{marked.task}, {len(pieces):,} tokens, sample {marked.sample}",
        "model": marked.model,
        "question": marked.question,
        "expected": ", ".join(map(str, marked.expected)),
        "pieces": pieces,
        "facts": spans(pieces, marked.expected),
        "densities": list(dict.fromkeys(_density(reading) for reading in readings)),
        "readings": [
            {
                "name": reading.name or reading.method,
                "density": _density(reading),
                "answer": reading.answer,
                "score": reading.score,
                "weights": levels(reading.attention),
            }
            for reading in readings
        ],
    }


def levels(weights: Sequence[float]) -> str:
    """Weights 0..1 as letters, by their square root so that small ones show; a run of zeros is its length.

    Examples
    --------
    >>> levels([0.0, 0.0, 1.0, 0.0001, 0.0])
    '2Za1'
    """
    runs = itertools.groupby(weights, lambda weight: weight > 0)
    return "".join(
        "".join(LEVELS[min(math.ceil(math.sqrt(weight) * len(LEVELS)), len(LEVELS)) - 1] for weight in run)
        if some
        else str(sum(1 for _ in run))
        for some, run in runs
    )


def spans(pieces: Sequence[str], expected: Sequence[str]) -> list[list[int]]:
    """Where the expected answers stand in the document, as ``[first, end)`` in pieces, ascending and apart."""
    text = "".join(pieces)
    borders = [0, *itertools.accumulate(len(piece) for piece in pieces)]
    wanted = [re.escape(answer.strip()) for answer in expected if len(answer.strip()) >= LETTERS]
    found: list[list[int]] = []
    for match in re.finditer("|".join(wanted), text) if wanted else ():
        inside = [i for i in range(len(pieces)) if borders[i] < match.end() and borders[i + 1] > match.start()]
        if not found or inside[0] >= found[-1][1]:
            found.append([inside[0], inside[-1] + 1])
    return found


def _view(board: Board) -> dict[str, Any]:
    """What the template shows of one board."""
    drawn: dict[str, list[dict[str, Any]]] = {"quality": [], "rows": [], "bits": [], "layers": [], "needles": []}
    for figure in figures(board):
        density = density_text(figure.density) if figure.density else ""
        parts = [(title, plots.to_svg(chart)) for title, chart in figure.parts]
        drawn[figure.name].append({"density": density, "parts": parts})
    details = [(word, *table.matrix(board, word)) for word in ("task", "length")]
    return {
        "title": board.title,
        "conditions": table.conditions(board),
        "reading": table.reading(board),
        "columns": table.columns(board),
        "meanings": table.MEANINGS,
        "rows": list(zip(board.entries, table.rows(board), strict=True)),
        "details": details,
        "entries": board.entries,
        "drawn": drawn,
        "sparse": len(board.methods),
    }


def _density(reading: Reading) -> str:
    return DENSE if reading.method == DENSE else density_text(reading.density)


def _static(shown: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Level and text of the first reading at the last density, tokens of one level together: the page without script."""
    reading = next(reading for reading in shown["readings"] if reading["density"] == shown["densities"][-1])
    marks: list[int] = []
    for found in re.finditer(r"\d+|[A-Za-z]", reading["weights"]):
        marks += [0] * int(found[0]) if found[0].isdigit() else [LEVELS.index(found[0]) + 1]
    marks += [0] * (len(shown["pieces"]) - len(marks))
    for level, run in itertools.groupby(zip(marks, shown["pieces"], strict=False), lambda pair: pair[0]):
        yield round(100 * level / len(LEVELS)), "".join(piece for _, piece in run)


def _libraries(boards: Sequence[Board]) -> str:
    held = (row.origin for board in boards for row in board.rows if row.origin)
    versions = dict.fromkeys(
        f"{name} {version}" for origin in held for name, version in origin.get("libraries", {}).items()
    )
    return ", ".join(versions)
