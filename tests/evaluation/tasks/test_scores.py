from __future__ import annotations

import pytest

from hashattention.evaluation.tasks import scores


@pytest.mark.parametrize(
    ("answer", "right", "score"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0),
        # One of two words is right, one of one is found: 2 * 0.5 * 1 / 1.5.
        ("in Paris", "Paris", 2 / 3),
        ("Rome", "Paris", 0.0),
        ("", "Paris", 0.0),
    ],
)
def test_qa_f1(answer: str, right: str, score: float) -> None:
    assert scores.qa_f1(answer, right) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "right", "score"),
    [("7", "7", 1.0), ("7 of 12", "7", 0.5), ("seven", "7", 0.0), ("17", "7", 0.0)],
)
def test_count(answer: str, right: str, score: float) -> None:
    assert scores.count(answer, right) == score


def test_retrieval() -> None:
    assert scores.retrieval("Paragraph 15", "Paragraph 15") == 1.0
    assert scores.retrieval("15 or 16", "Paragraph 15") == 0.5
    assert scores.retrieval_zh("段落3", "段落3") == 1.0


def test_classification_ignores_names_inside_the_right_one() -> None:
    classes = ("Date", "Date of birth", "Food")
    assert scores.classification("Date of birth", "Date of birth", classes) == 1.0
    assert scores.classification("Food or Date of birth", "Date of birth", classes) == 0.5
    assert scores.classification("Date", "Date of birth", classes) == 0.0


def test_rouge() -> None:
    pytest.importorskip("rouge")
    assert scores.rouge("the cat sat", "the cat sat") == pytest.approx(1.0, abs=1e-6)
    # Longest common subsequence "the sat": 2 of 3 words, 2 of 4.
    assert scores.rouge("the dog sat", "the old cat sat") == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5), abs=1e-6)
    assert scores.rouge("", "the cat") == scores.rouge("...", "the cat") == 0.0


def test_chinese() -> None:
    pytest.importorskip("jieba")
    assert scores.qa_f1_zh("北京。", "北京") == 1.0
    assert 0 < scores.qa_f1_zh("我在北京", "北京") < 1
    pytest.importorskip("rouge")
    assert scores.rouge_zh("今天天气好", "今天天气好") == pytest.approx(1.0, abs=1e-6)


def test_code_similarity() -> None:
    pytest.importorskip("fuzzywuzzy")
    assert scores.code_similarity("# a comment\nreturn x\nmore", "return x") == 1.0
    # Eight letters against eight, seven in common: 2 * 7 / 16, rounded to a percent.
    assert scores.code_similarity("return y", "return x") == pytest.approx(0.88)
    assert scores.code_similarity("// only\n`this`", "return x") == 0.0
