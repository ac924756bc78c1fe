from __future__ import annotations

import dataclasses

import pytest

from hashattention.evaluation.result import Row
from hashattention.evaluation.summary import interval, summarise


def make(task: str, sample: int, method: str, score: float, **more: object) -> Row:
    density = 1.0 if method == "dense" else 0.125
    return Row(task, 4096, str(sample), method, density, score, **more)


ROWS = [
    make("ruler:vt", 0, "dense", 1.0),
    make("ruler:vt", 1, "dense", 1.0),
    make("ruler:vt", 0, "quest", 1.0, error=(0.1, 0.3), rows=100.0, auxiliary_bits=68.0),
    make("ruler:vt", 1, "quest", 0.0, rows=200.0, auxiliary_bits=68.0),
    make("ruler:cwe", 0, "dense", 0.5),
    make("ruler:cwe", 0, "quest", 0.0),
    make("ruler:cwe", 9, "quest", 0.2),
]


def test_groups_weigh_tasks_alike() -> None:
    dense, quest = summarise(ROWS)
    assert (dense.group, dense.count, dense.difference, dense.low, dense.high) == ("ruler", 3, 0, 0, 0)
    assert dense.score == 0.75
    assert quest.score == pytest.approx((0.5 + 0.1) / 2)
    # Sample 9 has no dense row: it counts in the score, not in the difference.
    assert quest.difference == pytest.approx((-0.5 - 0.5) / 2)
    assert quest.low == pytest.approx(-0.75)
    assert quest.high == pytest.approx(-0.25)
    assert (quest.rows, quest.auxiliary_bits, quest.error) == (150, 68, pytest.approx(0.2))
    assert quest.attended is None


def test_by_task_and_by_length() -> None:
    assert [found.group for found in summarise(ROWS, "task")] == ["ruler:vt", "ruler:vt", "ruler:cwe", "ruler:cwe"]
    longer = [dataclasses.replace(row, length=8192) for row in ROWS]
    found = summarise(ROWS + longer, "length")
    assert [row.group for row in found] == ["ruler@4096", "ruler@4096", "ruler@8192", "ruler@8192"]
    assert found[2].score == found[0].score


def test_models_are_kept_apart_and_dense_may_lack() -> None:
    other = [dataclasses.replace(row, model="other") for row in ROWS if row.method == "quest"]
    found = {(row.model, row.method): row for row in summarise(ROWS + other)}
    assert found["other", "quest"].difference is None
    assert found["", "quest"].difference is not None


def test_the_interval_is_a_bootstrap_of_the_mean() -> None:
    values = [float(index % 7) for index in range(200)]
    low, high = interval([values])
    mean = sum(values) / 200
    deviation = (sum((value - mean) ** 2 for value in values) / 200) ** 0.5
    # The normal approximation: 1.96 standard errors to either side.
    assert (high - low) / 2 == pytest.approx(1.96 * deviation / 200**0.5, rel=0.1)
    assert low < mean < high
    assert interval([values]) == (low, high)
