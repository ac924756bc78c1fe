"""A study's rows for people: a table, and a page that draws error against density and bits beside the references."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from hashattention.report.lab_plots import Line, chart
from hashattention.report.leaderboard_plots import DARK, LIGHT
from hashattention.report.page import check_packages

#: Rows of selections that no variant changes, and what they are called.
REFERENCES = {
    "exact_per_head": "exact, per query head",
    "exact_shared": "exact, shared",
    "quest": "Quest, pages of 16",
    "hyperplanes_128": "hyperplanes, 128 bits",
}
#: Variants drawn in one chart: the best ones.
DRAWN = 4

_COLOURS, _DARK = (";".join(f"--{name}:{value}" for name, value in theme.items()) for theme in (LIGHT, DARK))
_STYLE = (
    f":root {{{_COLOURS}}} @media (prefers-color-scheme: dark) {{ :root {{{_DARK}}} }}"
    + """
body { margin: 0 auto; padding: 2rem 1.4rem; max-width: 62rem; background: var(--ground); color: var(--ink);
  font: 16px/1.6 system-ui, sans-serif; }
p, caption { color: var(--quiet); } .scroll { overflow-x: auto; }
svg { max-width: 46rem; font-size: 12px; overflow: visible; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
td, th { padding: .3rem .8rem; text-align: right; border-top: 1px solid var(--line); }
td:first-child { text-align: left; }
"""
)


def check_dependencies() -> None:
    """Raise `MissingDependencyError` unless the packages that draw the page are installed."""
    check_packages("altair", "vl_convert")


def columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Headings of `cells`."""
    shares = [_share(budget["heavy"]) for budget in rows[0]["budgets"]] if rows else []
    return ["selection", "layers", "steps", "bits", *shares]


def cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A line for each reference and variant: output error and ratio to exact shared selection at every budget."""
    found = []
    for row in rows:
        names = [name for name in row["budgets"][0] if isinstance(row["budgets"][0][name], dict)]
        for name in names:
            trained = name == "hash"
            numbers = [f"{b[name]['error']:.3f} ({b[name]['ratio']:.2f})" for b in row["budgets"]]
            steps, bits = (str(row["recipe"]["steps"]), str(row["bits_per_kv_head"])) if trained else ("", "")
            said = row["variant"] if trained else REFERENCES.get(name, name.replace("_", " "))
            found.append([said, str(len(row["layers"])), steps, bits, *numbers])
    return found


def write(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Write the page: charts and table of each set of layers; it loads nothing from elsewhere."""
    parts = []
    for layers in dict.fromkeys(tuple(row["layers"]) for row in rows):
        mine = [row for row in rows if tuple(row["layers"]) == layers]
        parts.append(f"<h2>{len(layers)} layers: {', '.join(map(str, layers))}</h2>")
        parts += [f"<figure>{figure}</figure>" for figure in (by_density(mine), by_bits(mine)) if figure]
        parts.append(_table(mine))
    model = rows[0]["model"] if rows else ""
    origin = rows[-1]["origin"] if rows else {}
    said = f"{origin.get('device', '')}, version {origin.get('version', '')}, commit {origin.get('commit', '')}"
    title = f"Recipes tried on {escape(model)}"
    note = (
        "Output error of held-out queries, |output - dense| / |dense|, mean over layers and heads; sink and local are "
        f"attended besides the heavy share. {escape(said)}."
    )
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = f"<h1>{title}</h1><p>{note}</p>{''.join(parts)}"
    partial = path.with_name(f".{path.name}.partial")
    page = f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{body}</body></html>\n'
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def by_density(rows: Sequence[dict[str, Any]]) -> str:
    """Output error against the heavy share: the best variants and the references."""
    trained = sorted((row for row in rows if "score" in row), key=lambda row: float(row["score"]))[:DRAWN]
    lines = [Line(row["variant"], _errors(row, "hash")) for row in trained]
    for row in rows:
        if "score" not in row:
            lines += [Line(REFERENCES[name], _errors(row, name), True) for name in REFERENCES]
    budgets = rows[0]["budgets"]
    return chart(lines, "heavy share of the context", [budget["heavy"] for budget in budgets])


def by_bits(rows: Sequence[dict[str, Any]]) -> str:
    """Output error of the best variant of each size, against bits per KV head; a line for each budget."""
    sizes = sorted({row["bits_per_kv_head"] for row in rows if "score" in row})
    if len(sizes) < 2:
        return ""
    lines = []
    for place, budget in enumerate(rows[0]["budgets"]):
        points = tuple(
            (size, min(_error(row, place, "hash") for row in rows if row.get("bits_per_kv_head") == size))
            for size in sizes
        )
        lines.append(Line(f"hash, {_share(budget['heavy'])}", points))
        exact = [_error(row, place, "exact_shared") for row in rows if "score" not in row]
        lines += [Line(f"exact, {_share(budget['heavy'])}", ((sizes[0], y), (sizes[-1], y)), True) for y in exact]
    return chart(lines, "bits per KV head", sizes)


def _errors(row: dict[str, Any], name: str) -> tuple[tuple[float, float], ...]:
    return tuple((budget["heavy"], float(budget[name]["error"])) for budget in row["budgets"])


def _error(row: dict[str, Any], place: int, name: str) -> float:
    return float(row["budgets"][place][name]["error"])


def _table(rows: Sequence[dict[str, Any]]) -> str:
    heads = "".join(f"<th>{escape(text)}</th>" for text in columns(rows))
    lines = ("".join(f"<td>{escape(text)}</td>" for text in line) for line in cells(rows))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><tr>{heads}</tr>{body}</table></div>'


def _share(heavy: float | int) -> str:
    return f"1/{round(1 / heavy)}" if isinstance(heavy, float) else str(heavy)
