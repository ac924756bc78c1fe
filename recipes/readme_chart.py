"""Draw docs/speed.svg from the committed rows: one attention step against the fastest dense one of the same run; and
write the GPU rows as tables, one a card and shape of the maps, docs/speed-gpu.md.

pip install altair vl-convert-python
python recipes/readme_chart.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import altair

ROOT = Path(__file__).resolve().parent.parent
#: The rows behind the chart's GPU lines: one card and one shape of the maps' hidden layers.
CARD = {"device": "NVIDIA H100 80GB HBM3", "shape": "llama-3.1-8b"}
GPU = {**CARD, "hidden": [256], "bits": 64, "mixture": 1, "density": 1 / 32}
#: What tells a case from others of one table; of rows measured again the last counts.
AXES = ("shape", "batch", "context", "density", "bits")
#: Title of a column -> how its methods' names begin; the fastest of them counts.
BASELINES = {
    "fastest dense": "dense",
    "cuDNN": "dense cuDNN",
    "flash": "dense flash",
    "FlashInfer": "dense FlashInfer",
    "the paper's way": "paper",
}
#: File, what a row must have, name of its line.
LINES = (
    ("cpu-attention", {"density": 1 / 64}, "one CPU core, density 1/64"),
    ("cpu-attention", {"density": 1 / 16}, "one CPU core, density 1/16"),
    ("gpu-attention", {**GPU, "batch": 1}, "H100, batch 1, density 1/32"),
    ("gpu-attention", {**GPU, "batch": 8}, "H100, batch 8, density 1/32"),
    ("gpu-attention", {**GPU, "batch": 32}, "H100, batch 32, density 1/32"),
)


def rows(file: str) -> Iterator[dict[str, Any]]:
    """The rows of a file of `results/`, with their device beside the other fields; older ones are of one code."""
    for line in (ROOT / "results" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield {"mixture": 1} | row | {"device": row["origin"]["device"]}


def points() -> list[dict[str, object]]:
    """One point a line and context; of rows measured again the last counts."""
    found: dict[tuple[str, int], dict[str, object]] = {}
    for file, wanted, name in LINES:
        for row in rows(file):
            if row["method"] == "step" and all(row[key] == value for key, value in wanted.items()):
                point = {"context": row["context"] / 1024, "speed-up": row["speedup"], "line": name}
                found[name, row["context"]] = point
    return list(found.values())


def tables() -> str:
    """A Markdown table for each card, shape of the maps' hidden layers and number of codes, the newest first.

    Shares are of the best copy bandwidth that any run showed on the card: a run measures it once, at its start.
    """
    copies: dict[str, float] = {}
    cases: dict[tuple[str, tuple[int, ...], int], dict[tuple[Any, ...], dict[str, dict[str, Any]]]] = {}
    for row in rows("gpu-attention"):
        copies[row["device"]] = max(copies.get(row["device"], 0.0), row.get("copy_bytes_per_second", 0.0))
        card = cases.setdefault((row["device"], tuple(row["hidden"]), row["mixture"]), {})
        card.setdefault(tuple(row[axis] for axis in AXES), {})[row["method"]] = row
    parts = []
    for (device, hidden, mixture), card in reversed(cases.items()):
        layers = "one hidden layer" if len(hidden) == 1 else f"{len(hidden)} hidden layers"
        widths = " and ".join(map(str, hidden))
        codes = f", {mixture} codes a query" if mixture > 1 else ""
        parts.append(f"## {device}, maps of {layers} ({widths}){codes}\n\n{table(card, copies[device])}")
    return "\n".join(parts)


def table(cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]], copy: float) -> str:
    """One card's rows of our step, one line a case: times, the share of `copy` bytes a second, and times faster than
    each baseline.
    """
    head = ["shape", "batch x context", "density", "bits", "step, us (p20 to p80)", "of copy bandwidth"]
    head += [f"x {title}" for title in BASELINES]
    lines = [" | ".join(head), " | ".join(["---", *["--:"] * (len(head) - 1)])]
    for (shape, batch, context, density, bits), methods in sorted(cases.items()):
        step = methods.get("step")
        if step is None:
            continue
        low, middle, high = (1e3 * step[f"{name}_ms"] for name in ("p20", "p50", "p80"))
        cells = [shape, f"{batch} x {context:,}", f"1/{1 / density:.0f}", str(bits)]
        cells += [f"{middle:.0f} ({low:.0f} to {high:.0f})", f"{step['bytes_per_second'] / copy:.0%}"]
        for start in BASELINES.values():
            times = [row["p50_ms"] for name, row in methods.items() if name.startswith(start) and "refusal" not in row]
            cells.append(f"{min(times) / step['p50_ms']:.1f}" if times else "-")
        lines.append(" | ".join(cells))
    return "".join(f"| {line} |\n" for line in lines)


def main() -> None:
    names = [name for _, _, name in LINES]
    base = altair.Chart(altair.Data(values=points())).encode(
        x=altair.X("context:Q", title="context, thousands of tokens").scale(type="log", base=2),
        y=altair.Y("speed-up:Q", title="times faster than dense").scale(type="log", domain=[0.8, 48], nice=False),
        color=altair.Color("line:N", title=None, sort=names).legend(orient="right", labelLimit=260),
    )
    even = altair.Chart(altair.Data(values=[{"y": 1}])).mark_rule(strokeDash=[4, 4], color="#888").encode(y="y:Q")
    # Room for readers whose font is wider than the one that measured the legend.
    margins = {"left": 5, "top": 5, "bottom": 5, "right": 45}
    chart = (even + base.mark_line(point=True)).properties(width=460, height=260, padding=margins)
    chart.configure_view(stroke=None).save(ROOT / "docs" / "speed.svg")
    (ROOT / "docs" / "speed-gpu.md").write_text(tables(), encoding="utf-8")


if __name__ == "__main__":
    main()
