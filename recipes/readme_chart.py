"""Draw docs/speed.svg from the committed rows: one attention step against the fastest dense one of the same run.

pip install altair vl-convert-python
python recipes/readme_chart.py
"""

from __future__ import annotations

import json
from pathlib import Path

import altair

ROOT = Path(__file__).resolve().parent.parent
#: File, what a row must have, name of its line.
LINES = (
    ("cpu-attention", {"density": 1 / 64, "huge_pages": False}, "one CPU core, density 1/64"),
    ("cpu-attention", {"density": 1 / 16, "huge_pages": False}, "one CPU core, density 1/16"),
    ("gpu-attention", {"bits": 64, "batch": 1}, "H200, batch 1, density 1/32"),
    ("gpu-attention", {"bits": 64, "batch": 8}, "H200, batch 8, density 1/32"),
    ("gpu-attention", {"bits": 64, "batch": 32}, "H200, batch 32, density 1/32"),
)


def points() -> list[dict[str, object]]:
    found = []
    for file, wanted, name in LINES:
        for line in (ROOT / "results" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["method"] == "step" and all(row[key] == value for key, value in wanted.items()):
                found.append({"context": row["context"] / 1024, "speed-up": row["speedup"], "line": name})
    return found


def main() -> None:
    names = [name for _, _, name in LINES]
    base = altair.Chart(altair.Data(values=points())).encode(
        x=altair.X("context:Q", title="context, thousands of tokens").scale(type="log", base=2),
        y=altair.Y("speed-up:Q", title="times faster than dense").scale(type="log", domain=[0.4, 32]),
        color=altair.Color("line:N", title=None, sort=names).legend(orient="right", labelLimit=260),
    )
    even = altair.Chart(altair.Data(values=[{"y": 1}])).mark_rule(strokeDash=[4, 4], color="#888").encode(y="y:Q")
    chart = (even + base.mark_line(point=True)).properties(width=460, height=260)
    chart.configure_view(stroke=None).save(ROOT / "docs" / "speed.svg")


if __name__ == "__main__":
    main()
