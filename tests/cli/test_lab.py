from __future__ import annotations

from pathlib import Path

import pytest

SWEEP = """
judge = 0.25
[recipe]
context = 128
sequences = 2
held_out = 1
queries = 8
held_out_queries = 4
steps = 3
step_queries = 4
top = 4
sink = 2
local = 4
budgets = [0.5, 0.25]
maps.widths = [8]
[grid]
"maps.bits" = [32, 64]
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"Line {number} of a book about {number % 7} things.\n" for number in range(200)))
    return path


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP)
    return path


def test_a_study_gives_rows_and_a_page_and_goes_on(invoke, last_json, tiny_model_folder, text, sweep, tmp_path) -> None:
    out = tmp_path / "out"
    words = "lab", sweep, "--model", tiny_model_folder, "--text", text, "--out", out, "--device", "cpu"
    done = invoke(*words, "--json")
    assert done.exit_code == 0, (done.stderr, done.exception)
    rows = last_json(done)["rows"]
    assert [row["variant"] for row in rows] == ["references", "maps.bits 32", "maps.bits 64"]
    assert "maps.bits 64" in done.stderr and "Quest" in done.stderr
    page = (out / "lab.html").read_text()
    assert page.count("<svg") == 2 and "hyperplanes, 128 bits" in page and "http" not in page
    written = (out / "rows.jsonl").read_text()
    assert invoke(*words).exit_code == 0
    assert (out / "rows.jsonl").read_text() == written
    (out / "lab.html").unlink()
    assert last_json(invoke("lab", sweep, "--out", out, "--draw", "--json"))["rows"] == rows
    assert (out / "lab.html").read_text() == page


def test_rows_alone_need_nothing_that_draws(invoke, tiny_model_folder, text, sweep, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("hashattention.report.lab.check_dependencies", lambda: pytest.fail("nothing is drawn"))
    out = tmp_path / "out"
    words = "lab", sweep, "--model", tiny_model_folder, "--text", text, "--out", out, "--device", "cpu", "--no-page"
    assert invoke(*words).exit_code == 0
    assert (out / "rows.jsonl").is_file() and not (out / "lab.html").exists()


def test_what_cannot_be_studied(refused, tiny_model_folder, text, sweep, tmp_path) -> None:
    out = tmp_path / "out"
    assert "no sweep at" in refused("lab", tmp_path / "none.toml", "--out", out)
    assert "no model: give --model" in refused("lab", sweep, "--out", out)
    assert "no rows yet" in refused("lab", sweep, "--out", out, "--draw")
    sweep.write_text("[grid]\nstep = [3]\n")
    assert "did you mean 'steps'" in refused("lab", sweep, "--model", tiny_model_folder, "--out", out)
    assert not out.exists()
