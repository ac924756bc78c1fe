from __future__ import annotations

import dataclasses
import json
import lzma
from pathlib import Path

import pytest

from hashattention.errors import ConfigError, InputError
from hashattention.evaluation.result import PACKED, ROWS, Marked, Reading, Results, Row, pairs, read, read_marked

ROW = Row("ruler:vt", 4096, "3", "quest:page=16", 0.125, 0.5, budget=(16, 64, 432), expected=("A", "é\n"), error=(0.1,))


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    results = Results(tmp_path / "new" / "folder")
    other = dataclasses.replace(ROW, sample="4", nll=2.5)
    results.append(ROW)
    results.append(other)
    assert read(tmp_path / "new" / "folder") == (ROW, other)
    again = Results(tmp_path / "new" / "folder")
    assert ROW.key in again
    assert dataclasses.replace(ROW, seed=1).key not in again


def test_packed_rows_come_before_the_others(tmp_path: Path) -> None:
    Results(tmp_path).append(ROW)
    plain = tmp_path / ROWS
    (tmp_path / PACKED).write_bytes(lzma.compress(plain.read_bytes()))
    plain.unlink()
    assert read(tmp_path) == (ROW,)
    results = Results(tmp_path)
    assert ROW.key in results
    other = dataclasses.replace(ROW, sample="4")
    results.append(other)
    assert read(tmp_path) == (ROW, other)
    (tmp_path / PACKED).write_bytes(b"no archive")
    with pytest.raises(InputError, match="is damaged"):
        read(tmp_path)


def test_a_torn_line_is_cut_and_written_again(tmp_path: Path) -> None:
    Results(tmp_path).append(ROW)
    path = tmp_path / ROWS
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    assert read(tmp_path) == (ROW,)
    results = Results(tmp_path)
    other = dataclasses.replace(ROW, sample="4")
    assert other.key not in results
    results.append(other)
    assert read(tmp_path) == (ROW, other)


def test_of_two_rows_with_one_key_the_later_counts(tmp_path: Path) -> None:
    results = Results(tmp_path)
    later = dataclasses.replace(ROW, score=1.0, seconds=3.0)
    for row in (ROW, later):
        results.append(row)
    assert read(tmp_path) == (later,)


def test_two_processes_may_share_a_folder(tmp_path: Path) -> None:
    one, other = Results(tmp_path), Results(tmp_path)
    first, second = ([dataclasses.replace(ROW, sample=f"{who}{n}") for n in range(40)] for who in "ab")
    for place in range(0, 40, 8):
        one.extend(first[place : place + 8])
        other.extend(second[place : place + 8])
    assert sorted(read(tmp_path), key=lambda row: row.key) == sorted(first + second, key=lambda row: row.key)
    assert one.rows == first


def test_bytes_that_are_read() -> None:
    row = dataclasses.replace(ROW, rows=512.0, tokens=4096, head_dim=128, dtype="bfloat16", auxiliary_bits=64.0)
    assert row.bytes_read == 512 * 2 * 128 * 2 + 4096 * 8
    assert row.bytes_share == pytest.approx(1 / 8 + 8 / 512)
    for name in ("rows", "head_dim", "dtype"):
        bare = dataclasses.replace(row, **{name: getattr(Row("", 0, "", "", 1.0, 0.0), name)})
        assert bare.bytes_read is bare.bytes_share is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("density", 0.25), ("sample", "4"), ("budget", (4, 64, 432)), ("maps", "m"), ("protocol", "generation")],
)
def test_what_makes_another_row(field: str, value: object) -> None:
    assert dataclasses.replace(ROW, **{field: value}).key != ROW.key


def test_heavy_seconds_and_origin_make_no_other_row() -> None:
    other = dataclasses.replace(ROW, budget=(16, 64, 1), seconds=9.0, origin={"commit": "x"})
    assert other.key == ROW.key
    assert dataclasses.replace(other, budget=ROW.budget).outcome() == ROW.outcome()


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    (tmp_path / ROWS).write_text(json.dumps(dataclasses.asdict(ROW)) + "\nnonsense\n")
    with pytest.raises(InputError, match="line 2 is not a row"):
        read(tmp_path)
    (tmp_path / ROWS).write_text(json.dumps(dataclasses.asdict(ROW) | {"scores": 1}) + "\n")
    with pytest.raises(ConfigError, match="line 1: unknown key 'scores'; did you mean 'score'"):
        read(tmp_path)


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no rows.jsonl in .*hashattention eval"):
        read(tmp_path)


def test_pairs_share_the_sample() -> None:
    dense = dataclasses.replace(ROW, method="dense", density=1.0, budget=(0, 0, 0))
    other = dataclasses.replace(dense, sample="4")
    assert pairs([ROW], [other, dense]) == [(ROW, dense)]


def test_marked_documents_gather_readings(tmp_path: Path) -> None:
    results = Results(tmp_path)
    first = Marked("m", "needle", 64, "0", ("A", " b"), "What?", ("A",))
    quest, hashed = (Reading(method, method, 0.5, "A", 1.0, (0.5, 0.0)) for method in ("quest", "hash"))
    results.mark(dataclasses.replace(first, readings=(quest,)))
    results.mark(dataclasses.replace(first, sample="1"))
    better = dataclasses.replace(quest, score=0.0)
    assert results.mark(dataclasses.replace(first, readings=(hashed, better))).name == "marked-0.json"
    held = read_marked(tmp_path)
    assert [marked.sample for marked in held] == ["0", "1"]
    assert held[0].readings == (hashed, better)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["marked-0.json", "marked-1.json"]
