from __future__ import annotations

import dataclasses

import pytest
from tests.report.evaluation_rows import DENSITIES, METHODS, make_marked

from hashattention.evaluation.result import Marked, Reading
from hashattention.report.leaderboard_documents import LEVELS, document, levels, spans, static


def unpack(letters: str) -> list[int]:
    """Level of every token: 0 for none."""
    found, run = [], ""
    for letter in f"{letters} ":
        if letter.isdigit():
            run += letter
            continue
        found += [0] * int(run or 0)
        run = ""
        if letter != " ":
            found.append(LEVELS.index(letter) + 1)
    return found


@pytest.mark.parametrize(
    ("weights", "text"),
    [([], ""), ([0.0] * 120, "120"), ([1.0, 0.25], "Zz"), ([1e-9, 0.0, 0.0], "a2"), ([0.0, 2.0, 0.0], "1Z1")],
)
def test_levels(weights: list[float], text: str) -> None:
    assert levels(weights) == text
    assert len(unpack(text)) == len(weights)


def test_levels_follow_the_square_root() -> None:
    weights = [index / 500 for index in range(501)]
    for weight, level in zip(weights, unpack(levels(weights)), strict=True):
        assert 0 <= level / len(LEVELS) - weight**0.5 < 1 / len(LEVELS) + 1e-9


def test_answers_are_found_where_they_stand() -> None:
    pieces = ["The ", "code is 74", "12", ". Or 7412", "? ab"]
    assert spans(pieces, ("7412",)) == [[1, 3], [3, 4]]
    assert spans(pieces, ("ab", " ", "")) == []
    assert spans(pieces, ("(code", "Or")) == []


def test_a_document_for_the_page() -> None:
    marked = make_marked(tokens=300)
    dense = Reading("dense", "dense", 1.0, "7412", 1.0, ())
    found = document(dataclasses.replace(marked, readings=(dense, *marked.readings)))
    assert found["densities"] == ["1/8", "1/16", "1/32"]
    assert len(found["readings"]) == len(METHODS) * len(DENSITIES)
    assert found["readings"][0]["name"] == "hash"
    assert [["".join(found["pieces"][first:end])] for first, end in found["facts"]] == [["7412"]]
    assert {len(unpack(reading["weights"])) for reading in found["readings"]} == {300}


def test_without_script_the_first_method_is_marked() -> None:
    pieces = ("A ", "b ", "c ", "d")
    reading = Reading("quest", "Quest", 0.5, "x", 1.0, (0.0, 0.25, 0.25))
    found = document(Marked("m", "needle", 4, "0", pieces, "?", ("x",), (reading,)))
    assert list(static(found)) == [(0, "A "), (50, "b c "), (0, "d")]


def test_a_document_that_nobody_read() -> None:
    reading = Reading("dense", "dense", 1.0, "x", 1.0, ())
    assert document(Marked("m", "needle", 4, "0", ("A",), "?", ("x",), (reading,)))["readings"] == []
