"""RULER's needles in a haystack: keys with magic values, hidden in essays, in one repeated line or among needles."""

from __future__ import annotations

import dataclasses
import functools
import random
import re
import uuid
from pathlib import Path
from typing import Literal

from hashattention.evaluation.tasks import data
from hashattention.evaluation.tasks.ruler_draft import NOISE, Draft

Kind = Literal["words", "numbers", "uuids"]
DEPTHS = tuple(round(100 * step / 39) for step in range(40))


@dataclasses.dataclass(frozen=True)
class Needles:
    """The parameters of the eight tasks, by RULER's names: what the haystack, keys and values are, and how many keys,
    values a key and keys asked for.
    """

    haystack: Literal["essay", "repeat", "needle"]
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    folder: Path | None = None

    max_new_tokens = 128
    largest = 1 << 22

    @property
    def smallest(self) -> int:
        """Words, lines or needles that the insertions need."""
        return 1 if self.haystack == "essay" else max(self.keys, self.queries) * self.values

    def draft(self, source: random.Random, size: int, index: int) -> Draft:
        """A sample whose haystack has `size` words (essays) or lines."""
        named = [self._invent(self.key, source) for _ in range(max(self.keys, self.queries))]
        magic = [[self._invent(self.value, source) for _ in range(self.values)] for _ in named]
        needles = [self._needle(key, value) for key, values in zip(named, magic, strict=True) for value in values]
        source.shuffle(needles)
        context = self._essay(source, size, needles) if self.haystack == "essay" else self._lines(source, size, needles)
        asked = source.sample(range(len(named)), self.queries)
        names = [named[place] for place in asked]
        query = f"{', '.join(names[:-1])}, and {names[-1]}" if len(names) > 1 else names[0]
        answers = tuple(value for place in asked for value in magic[place])
        return self._phrase(context, query, answers)

    def _phrase(self, context: str, query: str, answers: tuple[str, ...]) -> Draft:
        one = self.queries * self.values == 1
        what = self.value[:-1] if one else self.value
        begin = f"A special magic {what} is" if one else f"Some special magic {what} are"
        ask = "What is the" if one else "What are all the"
        magic = f"special magic {what} for {query} mentioned in the provided text"
        return Draft(
            context=f"{begin} hidden within the following text. Make sure to memorize it. I will quiz you about the "
            f"{what} afterwards.\n{context}\n",
            question=f"{ask} {magic}?",
            answer_prefix=f" The {magic} {'is' if one else 'are'}",
            expected=answers,
            target=" " + ", ".join(answers),
        )

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value} for {key} is: {value}."

    def _invent(self, kind: Kind, source: random.Random) -> str:
        if kind == "numbers":
            return str(source.randint(10**6, 10**7 - 1))
        if kind == "uuids":
            return str(uuid.UUID(int=source.getrandbits(128), version=4))
        return f"{source.choice(data.words('adjective', self.folder))}-{source.choice(data.words('noun', self.folder))}"

    def _lines(self, source: random.Random, size: int, needles: list[str]) -> str:
        if self.haystack == "repeat":
            lines = [NOISE] * size
        else:
            lines = [
                self._needle(self._invent(self.key, source), self._invent(self.value, source)) for _ in range(size)
            ]
        places = sorted(source.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def _essay(self, source: random.Random, size: int, needles: list[str]) -> str:
        words = _essay_words(self.folder)
        text = " ".join((words * (size // len(words) + 1))[:size])
        sentences = _sentences(text)
        places = sorted(int(len(sentences) * depth / 100) for depth in source.sample(DEPTHS, len(needles)))
        for place, needle in reversed(list(zip(places, needles, strict=True))):
            sentences.insert(place, needle)
        return " ".join(sentences)


@functools.lru_cache(maxsize=4)
def _essay_words(folder: Path | None) -> list[str]:
    return re.sub(r"\s+", " ", data.essays(folder)).split(" ")


def _sentences(text: str) -> list[str]:
    """Sentences by their final mark (RULER asks a trained splitter, whose data is no part of it)."""
    return re.split(r"(?<=[.!?])\s+", text.strip())
