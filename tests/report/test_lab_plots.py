from __future__ import annotations

import re

from hashattention.report.lab_plots import Line, chart


def test_lines_are_drawn_named_and_described():
    lines = [Line("a & b", ((1 / 32, 0.2), (1 / 8, 0.1))), Line("exact", ((1 / 32, 0.1), (1 / 8, 0.05)), True)]
    drawn = chart(lines, "share", [1 / 32, 1 / 8])
    assert "var(--line-0)" in drawn and "var(--quiet)" in drawn and drawn.count("stroke-dasharray") >= 1
    assert 'aria-label="Output error against share: a &amp; b, exact"' in drawn
    assert all(f">{text}<" in drawn for text in ("1/32", "1/8", "a &amp; b", "exact"))


def test_names_at_one_height_do_not_overlap():
    lines = [Line(f"name {number}", ((32, 0.1), (64, 0.1))) for number in range(5)]
    drawn = chart(lines, "bits", [32, 64])
    heights = [
        float(re.findall(r"translate\([\d.-]+,([\d.-]+)\)", before)[-1])
        for before in re.split(r">name \d<", drawn)[:-1]
    ]
    assert len(heights) == 5
    assert all(b - a > 12 for a, b in zip(sorted(heights), sorted(heights)[1:], strict=False))


def test_nothing_to_draw():
    assert chart([], "share", []) == ""
    assert chart([Line("a", ())], "share", []) == ""
