from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from hashattention.report.svg import HEIGHT, WIDTH, Axis, Line, chart

AXIS = Axis("share", ((1 / 32, "1/32"), (1 / 8, "1/8")))


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", text)]


def test_points_lie_where_their_values_are():
    drawn = ET.fromstring(chart([Line("a", ((1 / 32, 0.2), (1 / 16, 0.1), (1 / 8, 0.0)))], AXIS, "t"))
    x1, y1, x2, y2, x3, y3 = numbers(drawn.find("polyline").get("points"))
    assert x1 < x2 < x3 and abs(2 * x2 - x1 - x3) < 0.2, "a logarithmic scale"
    assert y1 < y2 < y3 and abs(2 * y2 - y1 - y3) < 0.2
    assert all(0 <= x <= WIDTH for x in (x1, x3)) and all(0 <= y <= HEIGHT for y in (y1, y3))


def test_names_do_not_overlap_and_are_escaped():
    lines = [Line(f"<{number}>", ((1 / 32, 0.1), (1 / 8, 0.1))) for number in range(5)]
    drawn = ET.fromstring(chart(lines, AXIS, "t"))
    heights = [float(text.get("y")) for text in drawn.findall("text") if (text.text or "").startswith("<")]
    assert len(heights) == 5 and all(b - a > 12 for a, b in zip(sorted(heights), sorted(heights)[1:], strict=False))


def test_nothing_to_draw_and_a_single_point():
    assert chart([], AXIS, "t") == ""
    assert "nan" not in chart([Line("a", ((0.5, 0.0),)), Line("b", ((0.5, 1e-9),))], Axis("x", ()), "t")
