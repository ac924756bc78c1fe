"""Plots of a study: output error against one cost on a logarithmic scale, coloured by the page's style sheet."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from hashattention.report.leaderboard_plots import HUES, spread, to_svg

#: Size of a plot without its axes and labels, in pixels; least distance of two labels.
WIDTH, HEIGHT, GAP = 380, 300, 13.0
#: Shares as people write them, anything else as it is.
LABEL = "datum.value < 1 ? '1/' + round(1 / datum.value) : datum.value"


@dataclasses.dataclass(frozen=True)
class Line:
    """One line: its name, its points (x, y), and whether it is a reference."""

    name: str
    points: tuple[tuple[float, float], ...]
    quiet: bool = False


def chart(lines: Sequence[Line], title: str, ticks: Sequence[float]) -> str:
    """An ``<svg>`` element: x on a logarithmic scale with these ticks, y from 0; empty without a point.

    Raises
    ------
    ImportError
        Without the extra ``report``.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    import altair

    top = 1.05 * max(y for line in lines for _, y in line.points) or 1.0
    x = altair.X("x:Q", title=title).scale(type="log", base=2, nice=False).axis(values=list(ticks), labelExpr=LABEL)
    y = altair.Y("y:Q", title=None).scale(domain=[0, top], nice=False).axis(tickCount=5)
    names, colours = [line.name for line in lines], _colours(lines)
    colour = altair.Color("name:N", legend=None).scale(domain=names, range=colours)
    points = [{"x": x, "y": y, "name": line.name, "quiet": line.quiet} for line in lines for x, y in line.points]
    base = altair.Chart(altair.Data(values=points)).encode(x=x, y=y, color=colour)
    dash = altair.condition("datum.quiet", altair.value([4, 3]), altair.value([1, 0]))
    layers = [
        base.mark_line(strokeWidth=1.8).encode(strokeDash=dash),
        base.transform_filter("!datum.quiet").mark_point(filled=True, size=30, opacity=1),
        _names(lines, y, colour, top),
    ]
    described = f"Output error against {title}: {', '.join(names)}"
    return to_svg(altair.layer(*layers).properties(width=WIDTH, height=HEIGHT, description=described))


def _colours(lines: Sequence[Line]) -> list[str]:
    """Strong for what was trained, quiet for references; each line is named at its end, so colour is no key."""
    trained = [line.name for line in lines if not line.quiet]
    return ["var(--quiet)" if line.quiet else f"var(--line-{trained.index(line.name) % HUES})" for line in lines]


def _names(lines: Sequence[Line], y: Any, colour: Any, top: float) -> Any:
    """Each line's name right of the plot, near its end and apart from the others."""
    import altair

    ends = [max(line.points)[1] for line in lines]
    places = spread(ends, GAP / HEIGHT * top, 0.0, top)
    data = [{"place": place, "name": line.name} for place, line in zip(places, lines, strict=True)]
    base = altair.Chart(altair.Data(values=data)).encode(color=colour)
    return base.mark_text(align="left", fontSize=11).encode(
        x=altair.value(WIDTH + 10), y=altair.Y("place:Q"), text="name:N"
    )
