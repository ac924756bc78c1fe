from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashattention.errors import InputError
from hashattention.evaluation.tasks.base import clean, largest_fit, match_all, match_part, random_for


@pytest.mark.parametrize(
    ("answer", "expected", "share"),
    [
        ("12 and 34", ["12", "34"], 1.0),
        ("12", ["12", "34", "56", "78"], 0.25),
        # RULER looks for the text anywhere, also inside a longer word.
        ("It is CATALOGUE.", ["cat"], 1.0),
        ("", ["cat"], 0.0),
        ("a\tb", ["a\nb"], 1.0),
    ],
)
def test_match_all_is_the_share_found(answer: str, expected: list[str], share: float) -> None:
    assert match_all(answer, expected) == share


@pytest.mark.parametrize(("answer", "found"), [("Normandy", 1.0), ("in north FRANCE", 1.0), ("Spain", 0.0)])
def test_match_part_is_any(answer: str, found: float) -> None:
    assert match_part(answer, ["France", "Normandy"]) == found


def test_answers_are_cleaned_as_ruler_does() -> None:
    assert clean(" a\x00b\tc \n") == "a\nb\nc"


@given(st.integers(1, 50), st.integers(1, 40), st.integers(51, 10**5), st.integers(1, 10**6))
def test_the_largest_fit_fits_and_no_much_larger_does(base: int, slope: int, limit: int, largest: int) -> None:
    tried = []

    def tokens(size: int) -> int:
        tried.append(size)
        return base + slope * size // 3

    if tokens(1) > limit:
        with pytest.raises(InputError, match="needs at least"):
            largest_fit(tokens, limit, 1, largest, "task")
        return
    found = largest_fit(tokens, limit, 1, largest, "task")
    assert tokens(found) <= limit
    larger = found + max(1, found // 100) + 1
    assert larger > largest or tokens(larger) > limit
    assert max(tried) <= largest + larger
    assert len(tried) < 60


def test_random_depends_on_the_words_alone() -> None:
    assert random_for(0, "vt", 4096, 1).random() == random_for(0, "vt", 4096, 1).random()
    assert random_for(0, "vt", 4096, 1).random() != random_for(0, "vt", 4096, 2).random()
