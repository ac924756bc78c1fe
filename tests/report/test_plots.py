from __future__ import annotations

import pytest

from hashattention.report import plots

pytest.importorskip("plotly")


def test_a_line_for_each_density(result) -> None:
    figure = plots.by_layer(result.settings, "mass", percent=True)
    assert [line.name for line in figure.data] == ["1/4", "1/16"]
    assert [list(line.y) for line in figure.data] == [[0.5, 0.25]] * 2
    assert list(figure.data[0].x) == [0, 1]
    assert len({line.line.dash for line in figure.data}) == 2
    assert figure.layout.yaxis.tickformat == ".0%"


def test_the_fragment_leaves_plotly_to_the_page(result) -> None:
    html = plots.to_html(plots.by_layer(result.settings, "error"))
    assert "Plotly.newPlot" in html
    assert len(html) < 30_000
    assert "<html" not in html
