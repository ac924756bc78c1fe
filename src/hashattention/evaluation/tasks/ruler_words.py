"""RULER's aggregation tasks: the most common words of a list (cwe), the most frequent of a coded text (fwe)."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import string
from pathlib import Path

from hashattention.evaluation.tasks import data
from hashattention.evaluation.tasks.ruler_draft import Draft

#: Below this length RULER repeats words less often.
SHORT = 4096


@dataclasses.dataclass(frozen=True)
class CommonWords:
    """A numbered list in which ten words stand more often than the others, after one solved example."""

    length: int
    folder: Path | None = None
    common: int = 10

    max_new_tokens = 120

    @property
    def smallest(self) -> int:
        """The common words and one other."""
        return self.common + 1

    @property
    def largest(self) -> int:
        """All words there are."""
        return len(_all_words(self.folder))

    def draft(self, source: random.Random, size: int, index: int) -> Draft:
        """A sample with `size` different words."""
        short = self.length < SHORT
        example, answer = self._list(source, *((20, 3, 1) if short else (40, 10, 3)))
        listed, expected = self._list(source, size, *((6, 1) if short else (30, 3)))
        return Draft(
            context=f"{self._begin(example)}{ASK}{PREFIX}{_numbered(answer)}\n{self._begin(listed)}",
            question=ASK,
            answer_prefix=PREFIX,
            expected=tuple(expected),
            target=_numbered(expected),
        )

    def _begin(self, context: str) -> str:
        return (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            f"that appear most often.\n{context}\n"
        )

    def _list(self, source: random.Random, size: int, often: int, seldom: int) -> tuple[str, list[str]]:
        drawn = source.sample(_all_words(self.folder), size)
        common, others = drawn[: self.common], drawn[self.common :]
        listed = common * often + others * seldom
        source.shuffle(listed)
        return _numbered(listed), common


ASK = "Question: What are the 10 most common words in the above list?"
PREFIX = " Answer: The top 10 words that appear most often in the list are:"


def _numbered(listed: list[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(listed, 1))


@functools.lru_cache(maxsize=4)
def _all_words(folder: Path | None) -> list[str]:
    return sorted({word for kind in ("noun", "adjective", "verb") for word in data.words(kind, folder)})


@dataclasses.dataclass(frozen=True)
class CodedWords:
    """Invented words whose frequency falls with the square of their rank (a zeta distribution with alpha 2); the first
    rank is noise, and the next three are asked for.
    """

    length: int

    max_new_tokens = 50
    largest = 1 << 22
    smallest = 60

    def draft(self, source: random.Random, size: int, index: int) -> Draft:
        """A sample of about `size` words."""
        coded = self._invent(source)
        scale = size / (math.pi**2 / 6)
        written = [word for rank, word in enumerate(coded, 1) for _ in range(int(scale * rank**-2.0))]
        source.shuffle(written)
        return Draft(
            context="Read the following coded text and track the frequency of each coded word. Find the three most "
            f"frequently appeared coded words. {' '.join(written)}\n",
            question="Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
            "frequently appeared words in the above coded text?",
            answer_prefix=" Answer: According to the coded text above, the three most frequently appeared words are:",
            expected=tuple(coded[1:4]),
            target=" " + ", ".join(coded[1:4]),
        )

    def _invent(self, source: random.Random) -> list[str]:
        wanted = max(4, self.length // 50)
        coded: dict[str, None] = {}
        while len(coded) < wanted:
            coded["".join(source.choices(string.ascii_lowercase, k=6))] = None
        return ["...", *list(coded)[1:]]
