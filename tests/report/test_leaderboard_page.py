from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.report import browser
from tests.report.browser import Browser, Screen
from tests.report.evaluation_rows import make_marked, make_rows

from hashattention.errors import MissingDependencyError
from hashattention.report import leaderboard_page as page
from hashattention.report.leaderboard import boards
from hashattention.report.leaderboard_documents import document

for package in ("jinja2", "altair", "vl_convert"):
    pytest.importorskip(package)

SECTIONS = ("table", "quality", "bytes", "needles", "layers", "documents")
SCREENS = [Screen(width, scheme) for width in (360, 1280) for scheme in ("light", "dark")]


def make_page(methods: int = 4, tasks: tuple[str, ...] = ("needle", "ruler:vt", "perplexity")) -> str:
    rows = [row for row in make_rows(methods) if row.task in tasks]
    return page.render(boards(rows), documents=[make_marked(600), make_marked(400, sample="1", seed=1)])


@pytest.fixture(scope="module")
def html() -> str:
    return make_page()


@pytest.fixture(scope="module")
def file(html: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if browser.find() is None:
        pytest.skip("no Chromium here")
    with browser.chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


def test_the_page_loads_nothing_from_elsewhere(html: str) -> None:
    assert "http" not in html
    assert "@import" not in html
    assert not re.findall(r"""(?:src|href)\s*=""", html)
    assert len(html) < 400_000


def test_every_section_is_there(html: str) -> None:
    for name in SECTIONS:
        assert len(re.findall(rf'<section class="{name}"', html)) == 1
    assert html.count("<svg ") == 4 * 3 + 3 + 3 * 5
    assert html.count("<caption>") == html.count("<table") == 3


def test_what_a_model_says_cannot_become_markup(html: str) -> None:
    assert "<i>no</i>" not in html
    assert "<b>" not in html.partition("<script>")[0]
    data = html.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(data) == [document(make_marked(600)), document(make_marked(400, sample="1", seed=1))]


def test_rows_of_dense_alone_make_an_honest_page() -> None:
    html = page.render(boards(row for row in make_rows(methods=1, samples=1) if row.method == "dense"))
    for said in (
        "Only dense was run",
        "No sparse method",
        "recorded no errors",
        "No marked documents",
        "No needle rows",
    ):
        assert said in html
    assert "<svg" not in html


def test_two_models_have_a_section_each() -> None:
    rows = [row for row in make_rows(methods=1, samples=1) if row.task == "ruler:vt"]
    found = boards(rows + [dataclasses.replace(row, model="other/Tiny") for row in rows])
    html = page.render(found)
    assert re.findall(r"<h2 id[^>]*>([^<]*)", html) == ["Model-1.5B", "Tiny"]
    assert len(set(re.findall(r'id="([^"]*)"', html))) == html.count(' id="')
    names = [name for name, _ in page.pictures(found, [page.figures(board)[:1] for board in found])]
    assert names == ["model-1.5b-quality.png", "tiny-quality.png"]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"jinja2 and altair and vl_convert: pip install"):
        page.render([])


@pytest.mark.parametrize("screen", SCREENS, ids=lambda screen: f"{screen.width}-{screen.scheme}")
def test_in_a_browser(tab: Browser, file: Path, screen: Screen) -> None:
    tab.open(file, screen)
    assert tab.problems == []
    assert tab.requests == [file.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= screen.width
    assert tab.evaluate("innerWidth") == screen.width
    heights = tab.evaluate(f"{list(SECTIONS)}.map(name => document.querySelector('section.' + name).clientHeight)")
    assert min(heights) > 100
    ground = {"light": "rgb(252, 252, 250)", "dark": "rgb(20, 24, 26)"}[screen.scheme]
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    # The words beside a line have its colour in this scheme.
    fills = tab.evaluate("[...document.querySelectorAll('svg text')].map(text => getComputedStyle(text).fill)")
    line = {"light": "rgb(15, 125, 113)", "dark": "rgb(53, 196, 178)"}[screen.scheme]
    assert line in fills
    assert "none" not in fills


def test_wide_tables_scroll_in_their_own_box(tab: Browser, file: Path) -> None:
    tab.open(file, Screen(360))
    box, table = tab.evaluate("(box => [box.clientWidth, box.scrollWidth])(document.querySelector('.scroll'))")
    assert box <= 328 < table
    # The method stays in sight while the rest scrolls under it.
    moved = tab.evaluate(
        "(box => { box.scrollLeft = 200; return box.querySelector('tbody th').getBoundingClientRect().left"
        " - box.getBoundingClientRect().left; })(document.querySelector('.scroll'))"
    )
    assert abs(moved) < 1


def test_no_word_of_a_plot_is_cut_off(tab: Browser, file: Path) -> None:
    tab.open(file, Screen(360))
    outside = tab.evaluate(
        "[...document.querySelectorAll('svg text')].filter(text => text.getClientRects().length"
        " && text.getBoundingClientRect().right > innerWidth).map(text => text.textContent)"
    )
    assert outside == []


def test_the_table_sorts(tab: Browser, file: Path) -> None:
    tab.open(file, Screen(1280))
    column = "[...document.querySelectorAll('.table tbody')[0].rows].map(row => Number(row.cells[3].dataset.order))"
    click = "document.querySelectorAll('.table thead')[0].rows[0].cells[3].querySelector('button').click()"
    sort = "document.querySelectorAll('.table thead')[0].rows[0].cells[3].getAttribute('aria-sort')"
    before = tab.evaluate(column)
    assert tab.evaluate(sort) is None
    tab.evaluate(click)
    assert tab.evaluate(column) == sorted(before, reverse=True) != before
    assert tab.evaluate(sort) == "descending"
    tab.evaluate(click)
    assert tab.evaluate(column) == sorted(before)
    assert tab.evaluate(sort) == "ascending"


def test_without_scripts_the_page_still_shows_everything(tab: Browser, file: Path) -> None:
    tab.open(file, Screen(360, scripts=False))
    shown = tab.evaluate("document.querySelector('.text').textContent")
    assert "The code is 7412" in shown
    assert tab.evaluate("document.querySelectorAll('.text i').length") > 5
    assert tab.evaluate("document.querySelectorAll('thead button').length") == 0
    assert tab.evaluate("document.querySelector('.script').clientHeight") == 0
    assert tab.evaluate("document.querySelector('noscript').textContent").strip().startswith("needle, 600 tokens")


def test_a_document_shows_what_each_method_read(tab: Browser, file: Path) -> None:
    tab.open(file, Screen(1280))
    assert tab.evaluate("document.querySelector('.text').textContent") == "".join(document(make_marked(600))["pieces"])
    assert tab.evaluate("document.querySelector('.text b').textContent") == "7412"
    press = "[...document.querySelectorAll('.strips button')].find(b => b.textContent === {}).click()"
    strength = "Number(document.querySelector('.text b i').style.getPropertyValue('--a'))"
    found = {}
    for name in ("hash", "StreamingLLM"):
        tab.evaluate(press.format(json.dumps(name)))
        found[name] = tab.evaluate(strength), tab.evaluate("document.querySelector('[data-show=answer]').textContent")
    assert found["StreamingLLM"] == (0, "<i>no</i>")
    assert found["hash"][0] > 80
    assert found["hash"][1] == "7412"
    tab.evaluate("document.querySelectorAll('[data-choice=document] button')[1].click()")
    assert tab.evaluate("document.querySelectorAll('.text i').length") == 400
    assert tab.problems == []
