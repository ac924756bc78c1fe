"""Line charts as inline SVG: no library, no script, readable in light and dark."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 52, 190, 12, 40
#: Strong for what was trained, quiet for references; each line is named at its end, so colour is no key.
COLOURS = ("#148c7e", "#b0672b", "#5b6fb5", "#a8443a", "#7a8b2a", "#8a5aa3")
QUIET = "#80868b"


@dataclasses.dataclass(frozen=True)
class Line:
    """One line: its name, its points (x, y), and whether it is a reference."""

    name: str
    points: tuple[tuple[float, float], ...]
    quiet: bool = False


@dataclasses.dataclass(frozen=True)
class Axis:
    """What x means, and its marks: (x, text)."""

    title: str
    marks: tuple[tuple[float, str], ...]


def chart(lines: Sequence[Line], axis: Axis, title: str) -> str:
    """An SVG element: x on a logarithmic scale, y from 0; nothing without points."""
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    low, high = (pick(math.log2(x) for x, _ in [*points, *axis.marks]) for pick in (min, max))
    top = 1.05 * max(y for _, y in points) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = 0.5 if high == low else (math.log2(x) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    parts = [_grid(top, place(2**low, 0)[0], place(2**high, 0)[0])]
    for x, text in axis.marks:
        parts.append(_text(place(x, 0)[0], HEIGHT - BOTTOM + 16, text, "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, axis.title, "middle"))
    names = _spread([(place(*line.points[-1])[1], number) for number, line in enumerate(lines) if line.points])
    colours = iter(COLOURS * (1 + len(lines) // len(COLOURS)))
    for number, line in enumerate(lines):
        colour = QUIET if line.quiet else next(colours)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line.points))
        dash = ' stroke-dasharray="4 3"' if line.quiet else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
        if not line.quiet:
            dots = (place(*point) for point in line.points)
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>' for x, y in dots]
        if number in names:
            parts.append(_text(WIDTH - RIGHT + 8, names[number] + 4, line.name, "start", colour))
    inside = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{inside}</svg>'


def _grid(top: float, left: float, right: float) -> str:
    step = 10 ** math.floor(math.log10(top))
    step *= 0.2 if top / step < 2 else 0.5 if top / step < 4 else 1
    parts = []
    for number in range(int(top / step) + 1):
        y = HEIGHT - BOTTOM - number * step / top * (HEIGHT - TOP - BOTTOM)
        parts.append(
            f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{QUIET}" opacity=".25"/>'
        )
        parts.append(_text(LEFT - 6, y + 4, f"{number * step:.3g}", "end"))
    return "".join(parts)


def _spread(wanted: list[tuple[float, int]], gap: float = 13.0) -> dict[int, float]:
    """Heights of the names, near where they are wanted and `gap` apart."""
    placed: dict[int, float] = {}
    last = -math.inf
    for height, number in sorted(wanted):
        last = max(height, last + gap)
        placed[number] = last
    return placed


def _text(x: float, y: float, text: str, anchor: str, colour: str = QUIET) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
