from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tests.report.evaluation_rows import make_rows, write_results

from hashattention.cli.report import BLOCK
from hashattention.evaluation.result import ROWS

for package in ("jinja2", "altair", "vl_convert"):
    pytest.importorskip(package)

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [row for row in make_rows(methods=3, samples=1) if row.task in ("needle", "ruler:vt")]
    return write_results(tmp_path / "results", [row for row in rows if row.density in (1.0, 1 / 16)], documents=1)


def test_page_pictures_table_and_json(invoke, last_json, folder: Path) -> None:
    readme = folder.parent / "README.md"
    readme.write_text(f"before\n{BLOCK.begin}\nold\n{BLOCK.end}\nafter\n")
    done = invoke("report", folder, "--markdown", readme, "--json")
    assert done.exit_code == 0, (done.stderr, done.exception)
    found = last_json(done)
    page = folder / "report.html"
    assert found["report"] == str(page)
    assert page.read_text().startswith("<!doctype html>")
    names = [f"report-{name}.png" for name in ("quality", "rows", "bytes", "bits-1-16", "layers", "needles-1-16")]
    assert [Path(path).name for path in found["pictures"]] == names
    assert all((folder / name).read_bytes().startswith(PNG) for name in names)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "report.html", ROWS, "marked-0.json"])
    text = readme.read_text()
    assert text.startswith(f"before\n{BLOCK.begin}\n| method | density | needle, % |")
    assert text.endswith(f"{BLOCK.end}\nafter\n")
    (board,) = found["boards"]
    assert board["entries"][0]["method"] == "dense"
    assert len(board["entries"]) == 4
    said = " ".join(done.stderr.split())
    assert "Model-1.5B" in said
    assert "question and generation are sparse" in said
    assert str(page) in "".join(done.stderr.split())


def test_another_place_without_pictures(invoke, folder: Path, tmp_path: Path) -> None:
    done = invoke("report", folder, "--out", tmp_path / "page.html", "--no-png")
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "results"]
    assert sorted(path.name for path in folder.iterdir()) == ["marked-0.json", ROWS]
    assert done.stdout == ""


def test_some_densities_alone(invoke, refused, last_json, tmp_path: Path) -> None:
    rows = [row for row in make_rows(methods=2, samples=1) if row.task == "ruler:vt"]
    folder = write_results(tmp_path / "results", rows, documents=0)
    done = invoke("report", folder, "--no-png", "--density", "1/16", "--json")
    (board,) = last_json(done)["boards"]
    assert {entry["density"] for entry in board["entries"]} == {1.0, 1 / 16}
    done = invoke("report", folder, "--no-png", "--json")
    assert len(last_json(done)["boards"][0]["entries"]) > len(board["entries"])
    assert "must be a number or a fraction" in refused("report", folder, "--density", "half")


def test_folders_that_hold_no_rows(refused, tmp_path: Path) -> None:
    assert "hashattention eval" in refused("report", tmp_path / "nowhere")
    (tmp_path / ROWS).write_text("")
    assert "has no rows" in refused("report", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [ROWS]


def test_a_corrupt_line_is_named_and_nothing_is_written(refused, folder: Path) -> None:
    before = sorted(folder.iterdir())
    with (folder / ROWS).open("a") as file:
        file.write("{}\n")
    lines = len((folder / ROWS).read_text().splitlines())
    assert f"line {lines}: missing task" in refused("report", folder)
    assert sorted(folder.iterdir()) == before


def test_places_that_cannot_be_written_are_refused_first(refused, folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious.md"
    precious.write_text("mine")
    assert "cannot write" in refused("report", folder, "--out", tmp_path / "none" / "page.html")
    assert "cannot write" in refused("report", folder, "--out", tmp_path)
    assert "without the lines" in refused("report", folder, "--markdown", precious)
    assert precious.read_text() == "mine"
    assert not (folder / "report.html").exists()


def test_rows_of_one_method_and_of_two_models(invoke, tmp_path: Path) -> None:
    rows = [row for row in make_rows(methods=1, samples=1) if row.task == "ruler:vt" and row.method != "dense"]
    rows += [dataclasses.replace(row, model="other/Tiny") for row in rows]
    done = invoke("report", write_results(tmp_path, rows, documents=0), "--no-png")
    assert done.exit_code == 0, (done.stderr, done.exception)
    said = " ".join(done.stderr.split())
    assert said.count("no dense run") == 2
    assert "Model-1.5B" in said
    assert "Tiny" in said
