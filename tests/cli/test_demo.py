from __future__ import annotations

from pathlib import Path

import pytest

from hashattention.cli.demo import BEGIN, END
from hashattention.report.table import COLUMNS

pytest.importorskip("plotly")
SMALL = ("--tokens", 600, "--density", 0.25)


@pytest.fixture
def folders(tiny_model_folder: Path, tiny_maps_folder: Path) -> tuple[object, ...]:
    return "--model", tiny_model_folder, "--maps", tiny_maps_folder


def test_page_table_and_json(invoke, last_json, folders, tmp_path: Path) -> None:
    page, readme = tmp_path / "report.html", tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    done = invoke("demo", *folders, *SMALL, "--report", page, "--markdown", readme, "--json")
    assert done.exit_code == 0, (done.stderr, done.exception)
    found = last_json(done)
    assert [row["density"] for row in found["settings"]] == [None, 0.25]
    assert found["report"] == str(page)
    assert page.read_text().startswith("<!doctype html>")
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| {' | '.join(COLUMNS)} |\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert str(page) in "".join(done.stderr.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "report.html"]


def test_a_new_markdown_file_can_be_made_again(invoke, folders, tmp_path: Path) -> None:
    target = tmp_path / "table.md"
    for _ in range(2):
        done = invoke("demo", *folders, *SMALL, "--report", tmp_path / "report.html", "--markdown", target)
        assert done.exit_code == 0, done.stderr
        assert target.read_text().count(BEGIN) == 1
    assert done.stdout == ""


def test_missing_maps_are_named_before_any_work(refused, tmp_path: Path) -> None:
    said = refused("demo", "--maps", tmp_path / "nowhere", "--report", tmp_path / "report.html")
    assert "no maps folder at" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("density", ["0", "2"])
def test_bad_densities(refused, folders, tmp_path: Path, density: str) -> None:
    said = refused("demo", *folders, "--density", density, "--report", tmp_path / "report.html")
    assert "density must be in (0, 1]" in said


def test_files_that_cannot_be_written_are_refused_first(refused, folders, tmp_path: Path) -> None:
    precious = tmp_path / "precious.md"
    precious.write_text("mine")
    assert "cannot write" in refused("demo", *folders, *SMALL, "--report", tmp_path / "none" / "report.html")
    assert "cannot write" in refused("demo", *folders, *SMALL, "--report", tmp_path)
    words = "--report", tmp_path / "report.html", "--markdown", precious
    assert "without the lines" in refused("demo", *folders, *SMALL, *words)
    assert precious.read_text() == "mine"


def test_more_text_than_the_novel_has(refused, folders, tmp_path: Path) -> None:
    said = refused("demo", *folders, "--tokens", 4000, "--report", tmp_path / "report.html")
    assert "this model takes 2048" in said
    assert list(tmp_path.iterdir()) == []
