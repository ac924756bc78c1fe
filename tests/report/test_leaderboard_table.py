from __future__ import annotations

import dataclasses
import math

import pytest
from tests.report.evaluation_rows import make_rows

from hashattention.evaluation.summary import Summary
from hashattention.report import leaderboard_table as table
from hashattention.report.leaderboard import Board, boards

MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def board() -> Board:
    return boards(make_rows(methods=4))[0]


def summary(group: str, score: float, *difference: float) -> Summary:
    return Summary("m", group, "quest", "Quest", 0.125, score, 25, *difference)


def test_a_score_in_per_cent_with_its_interval() -> None:
    cell = table.score("ruler", summary("ruler", 0.9, -0.05, -0.08, -0.02))
    assert (cell.text, cell.note, cell.verdict) == ("90.0", f"{MINUS}5.0 [{MINUS}8.0, {MINUS}2.0]", "worse")
    assert cell.order == 90
    assert cell.short == f"90.0 {MINUS}5.0*"
    assert table.score("ruler", summary("ruler", 0.9, 0.01, 0.0, 0.02)).verdict == ""
    assert table.score("ruler", summary("ruler", 0.9, 0.02, 0.01, 0.03)).verdict == "better"
    assert table.score("ruler", summary("ruler", 0.9, -0.0001, -0.0002, 0.0)).note == "0.0 [0.0, 0.0]"


def test_perplexity_grows_when_the_likelihood_falls() -> None:
    worse = -math.log(1.1)
    cell = table.score("perplexity", summary("perplexity", -math.log(8.0), worse, 2 * worse, worse / 2))
    assert cell.text == "8.00"
    assert cell.note == "+10.0 % [+4.9, +21.0]"
    assert cell.verdict == "worse"
    assert cell.order == pytest.approx(8.0)


def test_without_dense_there_is_no_difference() -> None:
    assert table.score("ruler", summary("ruler", 0.9)) == table.Cell("90.0", order=90.0)
    assert table.score("ruler", None) == table.Cell("-")
    rows = [row for row in make_rows(methods=1) if row.method != "dense"]
    (found,) = boards(rows)
    assert "no dense run" in table.reading(found)
    assert all(not cell.note for row in table.rows(found) for cell in row)


def test_agreement_says_its_divergence() -> None:
    cell = table.score("agreement", dataclasses.replace(summary("agreement", 0.97, -0.03, -0.04, -0.02), kl=0.0123))
    assert cell.note == f"{MINUS}3.0 [{MINUS}4.0, {MINUS}2.0], KL 0.012"


def test_every_row_has_every_column(board: Board) -> None:
    columns = table.columns(board)
    groups = ["needle, %", "ruler, %", "longbench, %", "perplexity", "agreement, %"]
    assert columns == ["method", "density", *groups, *table.LAST]
    cells = table.rows(board)
    assert {len(row) for row in cells} == {len(columns)}
    assert [cell.text for cell in cells[0]][-6:] == ["100.0%", "all", "100.0%", "100.0%", "0", "0"]
    quest = [cell.text for cell in cells[-1]]
    assert quest[:2] == ["Quest", "1/32"]
    assert quest[-6:-1] == ["3.1%", "228", "3.1%", "9.4%", "256"]


def test_by_task_and_by_length(board: Board) -> None:
    columns, cells = table.matrix(board, "task")
    assert columns[2:] == ["needle", "ruler:vt", "ruler:cwe", "longbench:qasper", "perplexity", "agreement"]
    assert {len(row) for row in cells} == {len(columns)}
    assert len(cells) == len(board.entries)
    columns, cells = table.matrix(board, "length")
    assert columns[2:5] == ["needle@4096", "needle@8192", "needle@16384"]
    assert all(cell.order is not None for row in cells for cell in row[2:])


def test_the_conditions_and_what_is_lacking(board: Board) -> None:
    said = table.conditions(board)
    for part in ("owner/Model-1.5B; bfloat16; plain prompts", "6 tasks, 45 samples", "lengths 4,096, 8,192, 16,384"):
        assert part in said
    assert "maps model-1.5b" in said
    assert "Not every sample" not in table.reading(board)
    half = [row for row in board.rows if row.method != "hash" or row.task == "needle"]
    assert table.reading(boards(half)[0]).endswith(
        "Not every sample has been run yet by hash at 1/8, hash at 1/16, hash at 1/32."
    )
    last = [row for row in board.rows if (row.method, row.density) != ("hash", 0.125) or row.sample != "0"]
    assert table.reading(boards(last)[0]).endswith("Not every sample has been run yet by hash at 1/8.")
    dense = [row for row in board.rows if row.method == "dense"]
    assert table.reading(boards(dense)[0]).endswith("Only dense was run; add other methods to --methods.")


def test_markdown_has_every_column_in_every_row(board: Board) -> None:
    found = dataclasses.replace(board, rows=tuple(dataclasses.replace(row, name=f"a|{row.name}") for row in board.rows))
    lines = table.markdown(boards(found.rows)).splitlines()
    assert lines[0] == f"| {' | '.join(table.columns(board))} |"
    end = lines.index("")
    first, second = lines[:end], [line for line in lines[end:] if line.startswith("|")]
    assert second[0].startswith(
        "| method | density | needle@4096 | needle@8192 | needle@16384 | ruler@4096 | ruler@8192 |"
    )
    for part in (first, second):
        rows = [line.replace("\\|", "") for line in part]
        assert len(rows) == 2 + len(board.entries)
        assert {row.count("|") for row in rows} == {part[0].count("|")}
    assert "in brackets the difference to dense" in "\n".join(lines)
    assert any(line.startswith("Made by `hashattention eval") for line in lines)
    assert "###" not in "\n".join(lines)


def test_a_group_of_one_length_has_no_column_by_length(board: Board) -> None:
    rows = [row for row in board.rows if row.group != "ruler" or row.length == 8192]
    text = table.markdown(boards(rows))
    assert "needle@8192" in text
    assert "ruler@8192" not in text


def test_one_length_needs_no_table_by_length(board: Board) -> None:
    rows = [row for row in board.rows if row.length == 8192]
    lines = table.markdown(boards(rows)).splitlines()
    assert sum(line.startswith("| method") for line in lines) == 1


def test_two_boards_have_headings() -> None:
    rows = [row for row in make_rows(methods=1) if row.task == "ruler:vt"]
    both = boards(rows + [dataclasses.replace(row, model="other") for row in rows])
    text = table.markdown(both)
    assert [line for line in text.splitlines() if line.startswith("#")] == ["### Model-1.5B", "### other"]
