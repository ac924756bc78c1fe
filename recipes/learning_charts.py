"""Draw docs/learning-qwen2.5-coder-1.5b.svg (error against the heavy share) and its -lengths.svg (ratio against the
context) from the committed rows, with the plots of `hashattention lab`.

    python recipes/learning_charts.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hashattention.report.lab import by_density
from hashattention.report.lab_plots import Line, chart
from hashattention.report.leaderboard_plots import DARK, LIGHT

ROOT = Path(__file__).resolve().parent.parent
NAME, LAYERS = "learning-qwen2.5-coder-1.5b", 28
#: Method, maps and the line's name; what no maps are in is a reference.
LINES = (
    ("hash", "final-64", "64 bits, trained at 8K"),
    ("hash", "final-32", "32 bits, trained at 8K"),
    ("hash", "mixed", "64 bits, trained at 8K to 32K"),
    ("quest", None, "Quest, pages of 16"),
    ("exact_shared", None, "exact, shared"),
    ("exact_per_head", None, "exact, per query head"),
)
#: Variants that are drawn against the heavy share, and their lines' names; `long-wide-64` would lie on `final-64`.
NAMES = {
    "final-64": "64 bits",
    "final-32": "32 bits",
    "paper": "paper's recipe, 192 bits",
}
#: Room for names in fonts wider than those they were measured in.
ROOM = 40


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of a file of `results/`."""
    lines = (ROOT / "results" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def by_length(measured: list[dict[str, Any]], heavy: float) -> str:
    """Ratio to exact shared selection against the context, on held-out text."""
    found: dict[tuple[str, str | None], list[tuple[float, float]]] = {}
    for row in measured:
        ratio = next(budget["ratio"] for budget in row["budgets"] if budget["heavy"] == heavy)
        if row["text"] == "held-out" and "1.5B" in row["model"]:
            found.setdefault((row["method"], row.get("maps")), []).append((row["context"] / 1024, ratio))
    lines = [Line(name, tuple(found[method, maps]), maps is None) for method, maps, name in LINES]
    drawn = chart(lines, "context, thousands of tokens", [8, 16, 32])
    return drawn.replace("Output error against", "Ratio to exact shared selection against")


def alone(svg: str) -> str:
    """The element as a file of its own: with its colours, for light and dark pages."""
    light, dark = (";".join(f"--{name}:{value}" for name, value in theme.items()) for theme in (LIGHT, DARK))
    style = f"svg{{{light};font:12px system-ui,sans-serif}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}"
    x, y, width, height = map(float, re.findall(r'viewBox="([^"]*)"', svg)[0].split())
    wide = f'viewBox="{x:g} {y:g} {width + ROOM:g} {height:g}" width="{width + ROOM:g}" height="{height:g}"'
    svg = re.sub(r' style="max-width:[^"]*"', "", svg, count=1)
    svg = re.sub(r'viewBox="[^"]*"', wide, svg, count=1).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    ground = f'<rect x="{x:g}" y="{y:g}" width="100%" height="100%" fill="var(--ground)"/>'
    return re.sub(r"(<svg[^>]*>)", rf"\1<style>{style}</style>{ground}", svg, count=1) + "\n"


def main() -> None:
    every = [row for row in rows(NAME) if len(row["layers"]) == LAYERS]
    # The references of later studies are those of the first one: the held-out text is the same.
    references = [row for row in every if row["variant"] == "references"][:1]
    drawn = [row for row in every if row["variant"] in NAMES]
    study = references + [{**row, "variant": NAMES[row["variant"]]} for row in drawn]
    lengths = by_length(rows("learning-qwen2.5-coder-lengths"), 1 / 32)
    for end, svg in (("", by_density(study)), ("-lengths", lengths)):
        (ROOT / "docs" / f"{NAME}{end}.svg").write_text(alone(svg), encoding="utf-8")


if __name__ == "__main__":
    main()
