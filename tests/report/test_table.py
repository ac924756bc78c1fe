from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hashattention.cli.demo import BEGIN, END
from hashattention.report import table

README = Path(__file__).parents[2] / "README.md"


def test_cells(result) -> None:
    dense, quarter, sixteenth = table.rows(result)
    assert dense[0] == "dense"
    assert quarter[0] == "hash 1/4"
    assert sixteenth[2:] == ["1,234", "47.3 MB", "3.0 MB", "0.375", "25"]
    assert (dense[4], dense[5]) == ("-", "0")
    lines = quarter[1].split("\n")
    assert lines[0] == "✓ 7412"
    assert lines[1].startswith("✗ <b>I</b> | do not know")
    assert lines[1].endswith("…")
    assert len(lines[1]) <= table.SHOWN + 2
    assert lines[2] == "✗ nothing"


def test_markdown_has_every_column_in_every_row(result) -> None:
    lines = table.markdown(result).splitlines()
    assert lines[0] == f"| {' | '.join(table.COLUMNS)} |"
    rows = [line.replace("\\|", "") for line in lines if line.startswith("|")]
    assert len(rows) == 2 + len(result.settings)
    assert {row.count("|") for row in rows} == {len(table.COLUMNS) + 1}
    assert "Made by `hashattention demo` at abc." in lines


def test_the_reference_backend_is_owned_up_to(result) -> None:
    assert "reference" not in table.speed_note(result)
    slow = dataclasses.replace(result, backends={"attend": "reference"})
    assert "not to be fast" in table.speed_note(slow)


@pytest.mark.parametrize(("density", "text"), [(0.25, "1/4"), (1.0, "1/1"), (0.3, "0.3"), (3 / 16, "0.1875")])
def test_densities(density: float, text: str) -> None:
    assert table.density_text(density) == text


def test_the_readme_shows_the_demo_as_it_is() -> None:
    text = README.read_text(encoding="utf-8") if README.is_file() else ""
    if BEGIN not in text:
        pytest.skip("the README has no demo table yet")
    block = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    assert block[0] == f"| {' | '.join(table.COLUMNS)} |"
    assert [row.split("|")[1].strip() for row in block[2:6]] == ["dense", "hash 1/4", "hash 1/8", "hash 1/16"]
