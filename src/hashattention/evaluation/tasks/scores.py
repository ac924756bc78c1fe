"""LongBench's metrics (Bai et al., arXiv 2308.14508), each of one answer against one right answer, 0..1."""

# ruff: noqa: RUF001
from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hashattention.errors import MissingDependencyError

#: Punctuation that the Chinese metrics leave out, beside ASCII's.
_CHINESE = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿"
    "–—‘’‛“”„‟…‧﹏."
)


def qa_f1(answer: str, right: str) -> float:
    """F1 of the words, without case, punctuation and articles.

    Examples
    --------
    >>> qa_f1("The red fox.", "a fox")
    0.6666666666666666
    """
    return _f1(_english(answer), _english(right))


def qa_f1_zh(answer: str, right: str) -> float:
    """F1 of the words that jieba cuts, without case and punctuation."""
    return _f1(_chinese(answer), _chinese(right))


def rouge(answer: str, right: str) -> float:
    """ROUGE-L's F measure, as the package `rouge` has it; 0 for an answer without words."""
    # An answer of full stops alone has no sentence for the package to count.
    if not answer.replace(".", "").strip() or not right.replace(".", "").strip():
        return 0.0
    found = _need("rouge").Rouge().get_scores([answer], [right], avg=True)
    return float(found["rouge-l"]["f"])


def rouge_zh(answer: str, right: str) -> float:
    """The same on the words that jieba cuts."""
    return rouge(" ".join(_cut(answer)), " ".join(_cut(right)))


def classification(answer: str, right: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that the answer names, if the right one is among them; a class whose name is a part
    of the right one's does not count.

    Examples
    --------
    >>> classification("Type: Date or Food", "Date", ("Date", "Food"))
    0.5
    """
    named = [name for name in classes if name in answer]
    # LongBench changes the list while it goes through it, which skips every name behind a removed one.
    for name in named:
        if name in right and name != right:
            named.remove(name)
    return 1.0 / len(named) if right in named else 0.0


def count(answer: str, right: str) -> float:
    """The share of the answer's numbers that are the right one.

    Examples
    --------
    >>> count("8, or 12", "12")
    0.5
    """
    numbers = re.findall(r"\d+", answer)
    return sum(number == right for number in numbers) / len(numbers) if numbers else 0.0


def retrieval(answer: str, right: str) -> float:
    """The same for the number in "Paragraph 7"."""
    return count(answer, re.findall(r"Paragraph (\d+)", right)[0])


def retrieval_zh(answer: str, right: str) -> float:
    """The same for the number in "段落7"."""
    return count(answer, re.findall(r"段落(\d+)", right)[0])


def code_similarity(answer: str, right: str) -> float:
    """Fuzzywuzzy's ratio of the first line without comment or quote marks."""
    lines = (line for line in answer.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//")))
    return float(_need("fuzzywuzzy.fuzz").ratio(next(lines, ""), right)) / 100


def _english(text: str) -> list[str]:
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _chinese(text: str) -> list[str]:
    marks = set(string.punctuation + _CHINESE)
    plain = ("".join(letter for letter in word.lower() if letter not in marks) for word in _cut(text))
    return [word for word in ("".join(word.split()) for word in plain) if word]


def _cut(text: str) -> list[str]:
    jieba = _need("jieba")
    # It tells stderr about its dictionary otherwise.
    jieba.setLogLevel("WARNING")
    return list(jieba.cut(text))


def _f1(answer: list[str], right: list[str]) -> float:
    same = sum((Counter(answer) & Counter(right)).values())
    if not same:
        return 0.0
    precision, recall = same / len(answer), same / len(right)
    return 2 * precision * recall / (precision + recall)


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingDependencyError(
            f'this LongBench metric needs {package}: pip install "hashattention[eval]".'
        ) from error
