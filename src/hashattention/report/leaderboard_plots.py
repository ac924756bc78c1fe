"""Plots of the leaderboard: drawn once, coloured by the page's style sheet in it, and by `LIGHT` in a PNG."""

from __future__ import annotations

import html
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hashattention.report.leaderboard import Board, Place, is_perplexity
from hashattention.report.leaderboard_table import value
from hashattention.report.table import density_text

FONT = "system-ui, -apple-system, Segoe UI, Roboto, Helvetica Neue, Arial, sans-serif"
#: The page's colours by name. A line's six are told apart with every kind of colour blindness and carry text (4.5:1).
LIGHT = {
    "ground": "#fcfcfa", "panel": "#ffffff", "ink": "#1f2426", "quiet": "#667074", "line": "#e3e5e2",
    "accent": "#0f7d71", "wrong": "#a8443a", "line-0": "#0f7d71", "line-1": "#bb2a16", "line-2": "#3040dc",
    "line-3": "#4f2a0c", "line-4": "#9a45ab", "line-5": "#141a55",
}  # fmt: skip
DARK = {
    "ground": "#14181a", "panel": "#1a1f21", "ink": "#dfe4e4", "quiet": "#939da0", "line": "#2d3437",
    "accent": "#35c4b2", "wrong": "#e08a80", "line-0": "#35c4b2", "line-1": "#dd6a52", "line-2": "#abaeed",
    "line-3": "#da9d15", "line-4": "#c757f3", "line-5": "#f6e7ab",
}  # fmt: skip
HUES = 6
#: When the colours are used up they come again with another dash.
DASHES: tuple[list[float], ...] = ([1, 0], [5, 3], [1.5, 2.5])
#: Size of a plot without its axes and labels, in pixels: with them it fits the narrowest phone.
WIDTH, HEIGHT = 172, 214
#: Least distance of two labels, in pixels, and the longest label.
GAP, LETTERS = 12.5, 16

Series = Mapping[str, Sequence[tuple[float, float]]]


def styles(board: Board) -> dict[str, tuple[str, list[float]]]:
    """Colour and dash of every sparse method; nothing else has the colour of the first hash map."""
    methods = sorted(board.methods, key=lambda method: not method.startswith("hash"))
    first = [(DASHES[0], 0)] if methods and methods[0].startswith("hash") else []
    looks = itertools.chain(first, itertools.cycle(itertools.product(DASHES, range(1, HUES))))
    return {method: (f"var(--line-{hue})", list(dash)) for method, (dash, hue) in zip(methods, looks, strict=False)}


def by_density(board: Board, group: str) -> Any:
    """Score of a group against attended tokens, a line a method, the sparsest to the right; None without any."""
    return _quality(board, group, {entry.place: entry.attended for entry in board.entries}, "attended tokens")


def by_rows(board: Board, group: str) -> Any:
    """Score of a group against the unique K and V rows read, a line a method; None if none were recorded."""
    shares = {entry.place: entry.read_share for entry in board.entries if entry.read_share}
    return _quality(board, group, shares, "K, V rows read per KV head")


def by_bytes(board: Board, group: str) -> Any:
    """Score of a group against all bytes read, K, V and auxiliary bits, a line a method; None if none were recorded."""
    shares = {entry.place: entry.bytes_share for entry in board.entries if entry.bytes_share}
    return _quality(board, group, shares, "bytes read per KV head")


def by_bits(board: Board, group: str, density: float) -> Any:
    """Score of a group against the auxiliary bits, a point a method, at one density; None without any."""
    found = {
        entry.method: [(entry.auxiliary_bits, value(group, entry.scores[group].score))]
        for entry in board.entries
        if entry.density == density and not entry.dense and group in entry.scores
    }
    if not found:
        return None
    import altair

    largest = max(points[0][0] for points in found.values())
    ticks = [bits for bits in (0, 8, 32, 64, 128, 256, 512, 1024, 2048) if bits <= largest * 1.05] or [0]
    x = altair.X("x:Q", title="auxiliary bits per token and KV head").scale(type="sqrt", domain=[0, max(1.0, largest)])
    return _lines(board, found, x.axis(values=ticks, labelFlush=True), _dense(board, group), group, "auxiliary bits")


def by_layer(board: Board, density: float) -> Any:
    """Output error of every layer at one density, a line a method; None if none was recorded."""
    found = {
        entry.method: list(enumerate(entry.layers))
        for entry in board.entries
        if entry.density == density and entry.layers and not entry.dense
    }
    if not found:
        return None
    import altair

    last = max(len(points) for points in found.values()) - 1
    x = altair.X("x:Q", title="layer").scale(domain=[0, max(1, last)], nice=False).axis(tickCount=5, format="d")
    return _lines(board, found, x, None, None, "layer")


def needles(board: Board, place: Place, cells: Mapping[tuple[int, float], float]) -> Any:
    """Mean score by length and depth: filled where every needle was found, empty and crossed where none was."""
    import altair

    found = [
        {"length": _thousands(length), "depth": f"{depth:.0%}", "score": score, "text": _mark(score)}
        for (length, depth), score in cells.items()
    ]
    lengths = [_thousands(length) for length in sorted({length for length, _ in cells})]
    depths = [f"{depth:.0%}" for depth in sorted({depth for _, depth in cells})]
    base = altair.Chart(_data(found)).encode(
        x=altair.X("length:O", title=None, sort=lengths).axis(labelAngle=0),
        y=altair.Y("depth:O", title=None, sort=depths),
    )
    opacity = altair.Opacity("score:Q", legend=None).scale(domain=[0, 1], range=[0.06, 0.8], clamp=True)
    squares = base.mark_rect(color="var(--accent)", stroke="var(--ground)", strokeWidth=2).encode(opacity=opacity)
    texts = base.mark_text(color="var(--ink)", fontSize=11).encode(text="text:N")
    width, height = min(46 * len(lengths), 250), max(22 * len(depths), 44)
    name, density = board[place].name, board[place].density
    description = f"Needles found by {name} at density {density_text(density)}, by length and depth"
    return (squares + texts).properties(width=width, height=height, description=description)


def to_svg(chart: Any) -> str:
    """The chart as one ``<svg>`` element for a page that sets its colours."""
    import vl_convert

    svg = vl_convert.vegalite_to_svg(_spec(chart))
    # One picture with one description, instead of a tree of marks to be read out; the tables hold the numbers.
    svg = re.sub(
        r"<[^>]*>",
        lambda tag: re.sub(
            r' (?:role|aria-[a-z]+|xmlns(?::xlink)?|class|font-family|pointer-events)="[^"]*"', "", tag[0]
        ),
        svg,
    )
    svg = re.sub(r"<path[^>]*(?: d=\"\"|h0v0h0Z\")[^>]*/>", "", svg)
    svg = re.sub(r"(\.\d\d)\d+", r"\1", svg)
    label = html.escape(chart.description)
    return re.sub(
        r'<svg[^>]* width="(\d+)" height="\d+"', rf'<svg role="img" aria-label="{label}" style="max-width:\1px"', svg
    )


def to_png(charts: Sequence[tuple[str, Any]]) -> bytes:
    """Titled charts, three in a row, on a light ground."""
    import altair
    import vl_convert

    titled = [chart.properties(title=title) for title, chart in charts]
    spec = _spec(altair.concat(*titled, columns=3, spacing=36), "var(--ground)") | {"padding": 24}
    text = re.sub(r"var\(--([\w-]+)\)", lambda found: LIGHT[found[1]], json.dumps(spec))
    return vl_convert.vegalite_to_png(json.loads(text), scale=2)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places at least `gap` apart and inside low..high, each near the one wanted, in the same order.

    Examples
    --------
    >>> spread([5, 5, 9], 2, 0, 10)
    [4.0, 6.0, 9.0]
    """
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    blocks: list[list[float]] = []
    for index in sorted(range(len(wanted)), key=lambda index: wanted[index]):
        # A block: its first place, how many it holds, and the sum of where each would have the block begin.
        blocks.append([wanted[index], 1, wanted[index]])
        while True:
            block = blocks[-1]
            block[0] = min(max(block[2] / block[1], low), high - gap * (block[1] - 1))
            if len(blocks) < 2 or blocks[-2][0] + gap * blocks[-2][1] <= block[0]:
                break
            last = blocks.pop()
            blocks[-1] = [0, blocks[-1][1] + last[1], blocks[-1][2] + last[2] - last[1] * gap * blocks[-1][1]]
    places = [block[0] + gap * step for block in blocks for step in range(int(block[1]))]
    ranks = sorted(range(len(wanted)), key=lambda index: wanted[index])
    return [float(places[ranks.index(index)]) for index in range(len(wanted))]


def _quality(board: Board, group: str, costs: Mapping[Place, float | None], title: str) -> Any:
    found: dict[str, list[tuple[float, float]]] = {}
    for entry in board.entries:
        cost = costs.get(entry.place)
        if not entry.dense and cost and group in entry.scores:
            found.setdefault(entry.method, []).append((cost, value(group, entry.scores[group].score)))
    if not found:
        return None
    import altair

    shares = [x for points in found.values() for x, _ in points]
    # Doublings, whole or halved: the ticks that people know densities by.
    ticks = [2.0**-power for power in range(12) if min(shares) * 0.8 <= 2.0**-power <= max(shares) * 1.25]
    domain = [max(shares) * 1.06, min(shares) / 1.06]
    x = altair.X("x:Q", title=title).scale(type="log", base=2, domain=domain, nice=False)
    axis = x.axis(values=ticks, labelExpr="datum.value == 1 ? 'all' : '1/' + round(1 / datum.value)")
    return _lines(board, found, axis, _dense(board, group), group, title)


def _lines(board: Board, found: Series, x: Any, dense: float | None, group: str | None, title: str) -> Any:
    """Lines with their names at their right ends; `dense` is drawn as a level."""
    import altair

    values = [y for points in found.values() for _, y in points] + ([] if dense is None else [dense])
    room = (max(values) - min(values) or abs(max(values)) or 1.0) * 0.05
    low = 0.0 if group is None else min(values) - room * (2 if is_perplexity(group) else 1)
    high = max(values) + room * (1 if is_perplexity(group or "") else 1.5)
    y = altair.Y("y:Q", title=None).scale(domain=[low, high], nice=False, zero=False).axis(tickCount=5)
    points = [
        {"x": x, "y": y, "method": method} for method, line in found.items() for x, y in sorted(line, reverse=True)
    ]
    looks = styles(board)
    domain = list(found)
    color = altair.Color("method:N", legend=None).scale(domain=domain, range=[looks[name][0] for name in domain])
    dash = altair.StrokeDash("method:N", legend=None).scale(domain=domain, range=[looks[name][1] for name in domain])
    base = altair.Chart(_data(points)).encode(x=x, y=y, color=color)
    width = altair.condition("indexof(datum.method, 'hash') == 0", altair.value(3), altair.value(1.7))
    layers = [base.mark_line(strokeJoin="round").encode(strokeDash=dash, order="x:Q", strokeWidth=width)]
    if group is not None:
        layers.append(base.mark_point(filled=True, size=26, opacity=1))
    layers += _labels(board, found, x, y, color, (low, high))
    if dense is not None:
        level = altair.Chart(_data([{"y": dense}])).encode(y=y)
        layers.insert(0, level.mark_rule(color="var(--ink)", strokeDash=[2, 2]))
        layers.append(
            level.mark_text(align="left", dx=14, dy=8 if is_perplexity(group or "") else -6, color="var(--ink)").encode(
                x=altair.value(0), text=altair.value("dense")
            )
        )
    names = ", ".join(board.methods[method] for method in found)
    what = f"{group} score" if group else "Output error"
    described = f"{what} against {title}: {names}"
    return altair.layer(*layers).properties(width=WIDTH, height=HEIGHT, description=described)


def _labels(board: Board, found: Series, x: Any, y: Any, color: Any, domain: tuple[float, float]) -> list[Any]:
    """Each line's name right of the plot, apart from the others, and a thin line that leads to it."""
    import altair

    low, high = domain
    # Entries are ordered the densest first: the last point of a line is its right end.
    ends = {method: line[-1] for method, line in found.items()}
    places = spread([end[1] for end in ends.values()], GAP / HEIGHT * (high - low), low, high)
    data = [
        {"x": end[0], "y": end[1], "place": place, "method": method, "name": _short(board.methods[method])}
        for (method, end), place in zip(ends.items(), places, strict=True)
    ]
    base = altair.Chart(_data(data)).encode(color=color)
    leader = base.mark_rule(strokeWidth=0.7, opacity=0.45).encode(x=x, y=y, x2=altair.value(WIDTH + 7), y2="place:Q")
    name = base.mark_text(align="left", fontSize=11).encode(
        x=altair.value(WIDTH + 10), y=altair.Y("place:Q"), text="name:N"
    )
    return [leader, name]


def _dense(board: Board, group: str) -> float | None:
    found = [entry.scores[group].score for entry in board.entries if entry.dense and group in entry.scores]
    return value(group, found[0]) if found else None


def _spec(chart: Any, ground: str = "transparent") -> dict[str, Any]:
    """The chart as Vega-Lite, with the page's type and colours."""
    axis: dict[str, Any] = {"labelColor": "var(--quiet)", "titleColor": "var(--quiet)", "titleFontWeight": "normal"}
    axis |= {"gridColor": "var(--line)", "labelFontSize": 11, "titleFontSize": 11, "titlePadding": 6}
    axis |= {"domain": False, "ticks": False, "labelPadding": 5}
    title = {"color": "var(--ink)", "fontSize": 13, "anchor": "start", "fontWeight": 600, "offset": 10}
    look = {"font": FONT, "axis": axis, "axisX": {"grid": False}, "view": {"stroke": None}, "title": title}
    # Altair checks a chart by its schema again and again, which takes longer than to draw it.
    spec: dict[str, Any] = chart.to_dict(validate=False)
    return spec | {"config": look, "background": ground}


def _data(values: list[dict[str, Any]]) -> Any:
    import altair

    return altair.Data(values=values)


def _short(name: str) -> str:
    return name if len(name) <= LETTERS else f"{name[: LETTERS - 1].rstrip()}…"


def _thousands(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 and length else f"{length:,}"


def _mark(score: float) -> str:
    return "" if score == 1 else f"{100 * score:.0f}"
