from __future__ import annotations

import json
import re

import pytest

from hashattention.errors import MissingDependencyError
from hashattention.evaluation.needle import FACTS
from hashattention.report import page

pytest.importorskip("plotly")
pytest.importorskip("jinja2")


def own_parts(html: str) -> str:
    """The page without plotly.js."""
    return re.sub(r"<script>/\*\*.*?</script>", "", html, flags=re.DOTALL)


def test_the_page_loads_nothing_from_elsewhere(result) -> None:
    html = page.render(result)
    assert len(html) > 1_000_000
    own = own_parts(html)
    assert len(own) < 100_000
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)""", own)
    assert "http" not in re.sub(r'"plotlyServerURL":"[^"]*"', "", own)
    assert "@import" not in own


def test_the_page_serves_phones_and_dark_screens(result) -> None:
    html = page.render(result)
    assert '<meta name="viewport"' in html
    assert "prefers-color-scheme: dark" in html
    assert "max-width: 46rem" in html


def test_what_a_model_says_cannot_become_markup(result) -> None:
    own = own_parts(page.render(result))
    assert "<b>I</b>" not in own
    assert "&lt;b&gt;I&lt;/b&gt;" in own
    assert "owner/model<1>" not in own
    data = own.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(data) == page.picture(result)


def test_the_page_shows_every_row_and_its_origin(result) -> None:
    html = own_parts(page.render(result))
    for text in ("hash 1/4", "hash 1/16", "47.3 MB", "✓ 7412", "hashattention demo", "torch 2.11.0"):
        assert text in html
    assert html.count("plotly-graph-div") == 2


def test_the_picture(result) -> None:
    drawn = page.picture(result)
    assert drawn["pieces"] == ["A ", "fact", ".", "\n\n", "</script> ", "More", " text"]
    assert drawn["facts"] == [[1, 3], [4, 5], [5, 6]]
    assert drawn["subjects"] == [fact.subject for fact in FACTS]
    assert drawn["densities"] == ["1/4", "1/16"]
    assert [len(row) for rows in drawn["weights"] for row in rows] == [7] * 6
    assert drawn["weights"][0][0][:3] == [62, 125, 188]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r'jinja2 and plotly: pip install "hashattention\[report\]"'):
        page.check_dependencies()
