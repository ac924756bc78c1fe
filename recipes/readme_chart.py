"""Draw docs/speed.svg from the committed rows: one attention step against the fastest dense one of the same run; and
write the GPU rows as a table, docs/speed-gpu.md.

pip install altair vl-convert-python
python recipes/readme_chart.py
"""

from __future__ import annotations

import json
from pathlib import Path

import altair

ROOT = Path(__file__).resolve().parent.parent
GPU = {"shape": "llama-3.1-8b", "bits": 64, "density": 1 / 32}
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
    ("gpu-attention", {**GPU, "batch": 1}, "H200, batch 1, density 1/32"),
    ("gpu-attention", {**GPU, "batch": 8}, "H200, batch 8, density 1/32"),
    ("gpu-attention", {**GPU, "batch": 32}, "H200, batch 32, density 1/32"),
)


def points() -> list[dict[str, object]]:
    """One point a line and context; of rows measured again the last counts."""
    found: dict[tuple[str, int], dict[str, object]] = {}
    for file, wanted, name in LINES:
        for line in (ROOT / "results" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["method"] == "step" and all(row[key] == value for key, value in wanted.items()):
                point = {"context": row["context"] / 1024, "speed-up": row["speedup"], "line": name}
                found[name, row["context"]] = point
    return list(found.values())


def table() -> str:
    """The GPU rows of our step as Markdown, one line a case: times, and times faster than each baseline."""
    cases: dict[tuple[object, ...], dict[str, dict[str, object]]] = {}
    for line in (ROOT / "results" / "gpu-attention.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        axes = ("shape", "batch", "context", "density", "bits")
        cases.setdefault(tuple(row[axis] for axis in axes), {})[row["method"]] = row
    head = ["shape", "batch x context", "density", "bits", "step, us (p20 to p80)", "of copy bandwidth"]
    head += [f"x {title}" for title in BASELINES]
    lines = [" | ".join(head), " | ".join(["---", *["--:"] * (len(head) - 1)])]
    for (shape, batch, context, density, bits), rows in sorted(cases.items()):
        step = rows.get("step")
        if step is None:
            continue
        low, middle, high = (1e3 * step[f"{name}_ms"] for name in ("p20", "p50", "p80"))
        cells = [shape, f"{batch} x {context:,}", f"1/{1 / density:.0f}", str(bits)]
        cells += [f"{middle:.0f} ({low:.0f} to {high:.0f})", f"{step['roofline']:.0%}"]
        for start in BASELINES.values():
            times = [row["p50_ms"] for name, row in rows.items() if name.startswith(start) and "refusal" not in row]
            cells.append(f"{min(times) / step['p50_ms']:.1f}" if times else "-")
        lines.append(" | ".join(cells))
    return "".join(f"| {line} |\n" for line in lines)


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
    (ROOT / "docs" / "speed-gpu.md").write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    main()
