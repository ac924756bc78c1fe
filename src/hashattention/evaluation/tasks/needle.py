"""One fact hidden in essays at a depth of a grid, perhaps among similar ones that are not asked for."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hashattention.errors import InputError
from hashattention.evaluation.needle import PARAGRAPH, Fact, Haystack, grade, plant
from hashattention.evaluation.prompt import prompt_tokens
from hashattention.evaluation.tasks import data
from hashattention.evaluation.tasks.base import Question, Task, random_for

COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey", "purple", "orange")
THINGS = ("door", "gate", "safe", "chest", "cabinet", "locker", "vault", "case", "garage", "cellar")


@dataclasses.dataclass(frozen=True)
class NeedleTask(Task):
    """Samples go through `depths` in turn; `distractors` facts of the same form lie elsewhere.

    Parameters
    ----------
    distractors : int
        From 0 to 99.
    folder : Path, optional
        Where the essays lie.
    depths : tuple of float
        In 0..1 of the document.
    """

    distractors: int = 0
    folder: Path | None = None
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    max_new_tokens: int = 24

    def __post_init__(self) -> None:
        if not 0 <= self.distractors <= 99:
            raise InputError(f"needle: distractors must be from 0 to 99; given {self.distractors}.")

    @property
    def name(self) -> str:  # type: ignore[override]
        """As in the rows."""
        return f"needle:distractors={self.distractors}" if self.distractors else "needle"

    def samples(self, tokenizer: Any, length: int, count: int, seed: int) -> Sequence[Question]:
        """`count` samples; sample i lies at depth ``i % len(depths)`` of the grid."""
        return [
            self._sample(tokenizer, length, index, random_for(seed, "needle", length, index)) for index in range(count)
        ]

    def _sample(self, tokenizer: Any, length: int, index: int, source: random.Random) -> Question:
        depth = self.depths[index % len(self.depths)]
        names = source.sample([f"{colour} {thing}" for colour in COLOURS for thing in THINGS], self.distractors + 1)
        codes = source.sample(range(1000, 10000), len(names))
        facts = [_fact(name, code) for name, code in zip(names, codes, strict=True)]
        depths = [depth, *(source.random() for _ in facts[1:])]
        paragraphs = _paragraphs(self.folder)
        first = source.randrange(len(paragraphs))
        # A paragraph has 100 words, so at least as many tokens.
        text = PARAGRAPH.join((paragraphs[first:] + paragraphs[:first])[: length // 100 + 2])
        room = length
        # The chat format, the question and tokens that joining paragraphs makes take room too.
        while True:
            question = self._question(index, depth, plant(text, facts, depths, room, tokenizer))
            over = prompt_tokens(question, tokenizer) - length
            if over <= 0:
                return question
            room -= over

    def _question(self, index: int, depth: float, haystack: Haystack) -> Question:
        fact = haystack.facts[0]
        return Question(
            id=str(index),
            context=haystack.text + PARAGRAPH,
            question=f"{fact.question} Answer with the number alone.",
            expected=(fact.answer,),
            grade=functools.partial(_grade, fact=fact),
            max_new_tokens=self.max_new_tokens,
            target=fact.answer,
            first_line=True,
            depth=depth,
        )


def _grade(answer: str, fact: Fact) -> float:
    return float(grade(answer, fact))


def _fact(name: str, code: int) -> Fact:
    return Fact(name, f"The secret code of the {name} is {code}.", f"What is the secret code of the {name}?", str(code))


@functools.lru_cache(maxsize=4)
def _paragraphs(folder: Path | None) -> list[str]:
    """The long text as paragraphs of a hundred words, whatever its own line ends."""
    words = data.long_text(folder).split()
    return [" ".join(words[first : first + 100]) for first in range(0, len(words), 100)]
