"""The leaderboard's page: one self-contained HTML file, for phone and desktop, light and dark, with PNGs beside it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

from hashattention.evaluation.result import Marked
from hashattention.evaluation.summary import DENSE
from hashattention.report import leaderboard_documents as marks
from hashattention.report import leaderboard_plots as plots
from hashattention.report import leaderboard_table as table
from hashattention.report.leaderboard import Board, depths, titles
from hashattention.report.page import check_packages
from hashattention.report.table import density_text

#: Marked documents on a page, at most: each weighs as much as the rest of it.
DOCUMENTS = 4


@dataclasses.dataclass(frozen=True)
class Figure:
    """One section's plots: `parts` are (title, chart); `density` where the section has one for each density."""

    name: str
    parts: tuple[tuple[str, Any], ...]
    density: float | None = None


def render(
    boards: Sequence[Board], drawn: Sequence[Sequence[Figure]] | None = None, documents: Sequence[Marked] = ()
) -> str:
    """The whole page; it loads nothing from elsewhere.

    Parameters
    ----------
    boards : sequence of Board
    drawn : sequence of sequences of Figure, optional
        `figures` of every board.
    documents : sequence of Marked, optional

    Raises
    ------
    MissingDependencyError
        Without jinja2, altair or vl-convert-python.
    """
    check_dependencies()
    import jinja2

    source = files("hashattention").joinpath("report/leaderboard.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    drawn = [figures(board) for board in boards] if drawn is None else drawn
    shown = [found for marked in documents if (found := marks.document(marked))["readings"]][:DOCUMENTS]
    return environment.from_string(source).render(
        light=plots.LIGHT,
        dark=plots.DARK,
        boards=[_view(*each) for each in zip(boards, titles(boards), drawn, strict=True)],
        documents=shown,
        kept_back=len(documents) - len(shown),
        static=marks.static(shown[0]) if shown else (),
        letters=marks.LEVELS,
        origins=list(dict.fromkeys(origin for board in boards for origin in table.origins(board))),
        libraries=_libraries(boards),
        zip=zip,
    )


def pictures(boards: Sequence[Board], drawn: Sequence[Sequence[Figure]]) -> Iterator[tuple[str, bytes]]:
    """Name and PNG of every section of plots."""
    for title, found in zip(titles(boards), drawn, strict=True):
        prefix = f"{re.sub(r'[^a-z0-9.]+', '-', title.lower())}-" if len(boards) > 1 else ""
        for figure in found:
            density = f"-{density_text(figure.density).replace('/', '-')}" if figure.density else ""
            yield f"{prefix}{figure.name}{density}.png", plots.to_png(figure.parts)


def check_dependencies() -> None:
    """Raise `MissingDependencyError` unless the packages that make the page are installed."""
    check_packages("jinja2", "altair", "vl_convert")


def figures(board: Board) -> list[Figure]:
    """Every section of plots that the rows have something for."""
    scored = board.groups
    sparsest = board.densities[-1] if board.densities else 0.0
    found = [
        Figure("quality", tuple((table.heading(group), plots.by_density(board, group)) for group in scored)),
        Figure("rows", tuple((table.heading(group), plots.by_rows(board, group)) for group in scored)),
        Figure("bytes", tuple((table.heading(group), plots.by_bytes(board, group)) for group in scored)),
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


def _view(board: Board, title: str, found: Sequence[Figure]) -> dict[str, Any]:
    """What the template shows of one board."""
    names = ("quality", "rows", "bytes", "bits", "layers", "needles")
    drawn: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for figure in found:
        density = density_text(figure.density) if figure.density else ""
        parts = [(title, plots.to_svg(chart)) for title, chart in figure.parts]
        drawn[figure.name].append({"density": density, "parts": parts})
    details = [(word, *table.matrix(board, word)) for word in ("task", "length")]
    return {
        "title": title,
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


def _libraries(boards: Sequence[Board]) -> str:
    held = (row.origin for board in boards for row in board.rows if row.origin)
    versions = dict.fromkeys(
        f"{name} {version}" for origin in held for name, version in origin.get("libraries", {}).items()
    )
    return ", ".join(versions)
