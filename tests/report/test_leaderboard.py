from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from tests.report.evaluation_rows import DENSITIES, LAYERS, MODEL, make_rows, write_results

from hashattention.errors import ConfigError, InputError
from hashattention.evaluation.result import ROWS, Results
from hashattention.report import leaderboard
from hashattention.report.leaderboard import boards, depths, load, titles


def test_a_board_has_every_method_at_every_density_the_best_first() -> None:
    (board,) = boards(make_rows(methods=4))
    assert board.model == MODEL
    assert board.title == "Model-1.5B"
    assert board.groups == ("needle", "ruler", "longbench", "perplexity", "agreement")
    assert board.densities == DENSITIES
    assert [entry.density for entry in board.entries] == [1.0] + [d for d in DENSITIES for _ in range(4)]
    assert board.entries[0].dense
    # The made-up Quest loses the most of the first four.
    assert [board.entries[place].method for place in (4, 8, 12)] == ["quest:page=16"] * 3


def test_an_entry_is_a_mean_over_its_rows() -> None:
    rows = [row for row in make_rows(methods=2) if row.task.startswith("ruler")]
    (board,) = boards(rows)
    own = [row for row in rows if (row.method, row.density) == ("oracle:share=query_head", 1 / 8)]
    entry = board["oracle:share=query_head", 1 / 8]
    assert entry.attended == pytest.approx(1 / 8)
    assert entry.read == pytest.approx(sum(row.rows for row in own) / len(own))
    assert entry.read_share == pytest.approx(3.4 / 8)
    assert entry.bytes_share == pytest.approx(3.4 / 8)
    # Its 64 bits stand beside 2 x 128 numbers of 16 bits.
    assert boards(make_rows(methods=3))[0]["hash", 1 / 8].bytes_share == pytest.approx(1 / 8 + 64 / (2 * 128 * 16))
    assert len(entry.layers) == LAYERS
    assert entry.layers[5] == pytest.approx(sum(row.error[5] for row in own) / len(own))
    assert entry.error == pytest.approx(sum(map(sum, (row.error for row in own))) / len(own) / LAYERS)
    assert board.entries[0].read_share == board.entries[0].bytes_share == 1.0
    assert board.entries[0].error is None


def test_perplexity_is_compared_by_its_likelihood() -> None:
    rows = [row for row in make_rows(methods=1) if row.task == "perplexity"]
    (board,) = boards(rows)
    dense = [row.nll for row in rows if row.method == "dense"]
    assert board.entries[0].scores["perplexity"].score == pytest.approx(-sum(dense) / len(dense))


def test_what_is_served_otherwise_is_another_board() -> None:
    rows = [row for row in make_rows(methods=1) if row.task == "ruler:vt"]
    other = [dataclasses.replace(row, model="other/Model-7B") for row in rows]
    again = [dataclasses.replace(row, protocol="generation") for row in rows]
    found = boards(rows + other + again)
    assert [board.title for board in found] == ["Model-1.5B", "Model-7B", "Model-1.5B"]
    assert titles(found) == [
        "Model-1.5B, bfloat16, question sparse, plain",
        "Model-7B",
        "Model-1.5B, bfloat16, generation sparse, plain",
    ]
    assert [len(board.rows) for board in found] == [len(rows)] * 3


def test_other_maps_and_other_ends_are_other_methods() -> None:
    rows = [row for row in make_rows(methods=3) if row.task == "ruler:vt"]
    hashed = [row for row in rows if row.method == "hash"]
    others = [dataclasses.replace(row, maps="better") for row in hashed]
    wider = [dataclasses.replace(row, budget=(4, 32, 9)) for row in rows if row.method == "oracle"]
    (board,) = boards(rows + others + wider)
    assert set(board.methods.values()) == {
        "oracle (sink 16 local 64)",
        "oracle (sink 4 local 32)",
        "oracle per head",
        "hash (model-1.5b)",
        "hash (better)",
    }
    assert board["hash (better)", 1 / 8].scores["ruler"].count == len(others) / 3


def test_two_methods_never_share_a_name() -> None:
    rows = [row for row in make_rows(methods=4) if row.task == "ruler:vt"]
    other = [dataclasses.replace(row, method="quest:page=32") for row in rows if row.method == "quest:page=16"]
    (board,) = boards(rows + other)
    assert {"quest:page=16", "quest:page=32"} <= set(board.methods.values())
    assert "Quest" not in board.methods.values()


def test_an_entry_that_lacks_a_group_comes_last() -> None:
    rows = [row for row in make_rows(methods=3) if row.task in ("needle", "ruler:vt")]
    rows = [row for row in rows if (row.method, row.task) != ("oracle", "ruler:vt")]
    (board,) = boards(rows)
    assert [board.entries[place].method for place in (3, 6, 9)] == ["oracle"] * 3


def test_needles_by_length_and_depth() -> None:
    (board,) = boards(make_rows(methods=2))
    found = depths(board)
    assert list(found) == [entry.place for entry in board.entries]
    cells = found["dense", 1.0]
    assert len(cells) == 15
    assert list(cells)[:2] == [(4096, 0), (4096, 0.25)]
    assert set(cells.values()) <= {0.0, 1.0}


def test_rows_without_records_are_shown_without() -> None:
    bare = [
        dataclasses.replace(row, attended=None, rows=None, error=(), depth=None, origin={})
        for row in make_rows(methods=1)
    ]
    (board,) = boards(bare)
    entry = board["oracle", 1 / 8]
    assert (entry.attended, entry.read, entry.read_share, entry.error, entry.layers) == (1 / 8, None, None, None, ())
    assert entry.bytes_share is None
    assert depths(board) == {}


def test_a_folder_without_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hashattention eval"):
        load(tmp_path)
    (tmp_path / ROWS).write_text("")
    with pytest.raises(InputError, match="has no rows; run hashattention eval with --out"):
        load(tmp_path)


def test_a_corrupt_line_is_named(tmp_path: Path) -> None:
    write_results(tmp_path, make_rows(methods=1)[:3], documents=0)
    path = tmp_path / ROWS
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:40], lines[2]]) + "\n")
    with pytest.raises(InputError, match="line 2 is not a row"):
        load(tmp_path)
    path.write_text("\n".join([lines[0], json.dumps(json.loads(lines[1]) | {"color": 1})]) + "\n")
    with pytest.raises(ConfigError, match="line 2: unknown key 'color'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("score", "high"), ("density", None), ("nll", math.nan), ("error", [None])]
)
def test_a_value_that_is_no_number_is_named(tmp_path: Path, field: str, value: object) -> None:
    row = make_rows(methods=1)[0]
    Results(tmp_path).append(dataclasses.replace(row, **{field: value}))
    with pytest.raises(
        InputError, match=rf"the row of needle, sample 4096-0, dense .* has {field}.* not a finite number"
    ):
        load(tmp_path)


def test_a_damaged_document_is_an_error_of_its_own(tmp_path: Path) -> None:
    write_results(tmp_path, make_rows(methods=1)[:3], documents=1)
    found, documents = load(tmp_path)
    assert len(found) == len(documents) == 1
    (tmp_path / "marked-0.json").write_text("{")
    with pytest.raises(InputError, match=r"marked-\*.json .* damaged"):
        load(tmp_path)


def test_what_is_perplexity() -> None:
    assert [leaderboard.is_perplexity(name) for name in ("perplexity", "perplexity@4096", "perplexity:x", "ruler")] == [
        True,
        True,
        True,
        False,
    ]
