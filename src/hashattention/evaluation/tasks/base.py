"""What a task is: questions about long documents with a grade, or passages to be predicted."""

from __future__ import annotations

import dataclasses
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

from hashattention.errors import InputError


@dataclasses.dataclass(frozen=True)
class Question:
    """A document, a question about it, and how an answer is graded.

    Parameters
    ----------
    id : str
        Which sample of its task.
    context, question : str
        Joined, the user's turn; the context is read densely.
    expected : tuple of str
        Right answers, or the parts of one.
    grade : callable
        ``grade(answer)`` in 0..1.
    max_new_tokens : int
        The longest answer.
    answer_prefix : str
        How the answer begins; given to the model.
    target : str
        The right answer as the model would write it behind the prefix, for its log-probability.
    chat : bool
        False: never in a chat format.
    first_line : bool
        Only the first line of an answer counts.
    growing : bool
        A longer answer is never graded lower, so that a full grade ends it.
    depth : float or None
        Where the needle lies, 0..1.
    """

    id: str
    context: str
    question: str
    expected: tuple[str, ...]
    grade: Callable[[str], float]
    max_new_tokens: int
    answer_prefix: str = ""
    target: str = ""
    chat: bool = True
    first_line: bool = False
    growing: bool = False
    depth: float | None = None


@dataclasses.dataclass(frozen=True)
class Passage:
    """A text whose end is predicted: `tokens` are read densely, then `tail` (``"perplexity"``), or as many tokens of
    dense's own continuation (``"agreement"``), token by token.
    """

    id: str
    kind: Literal["perplexity", "agreement"]
    tokens: tuple[int, ...]
    tail: tuple[int, ...]


Sample = Question | Passage


class Task(ABC):
    """A named source of samples; the same arguments give the same samples."""

    name: str

    @abstractmethod
    def samples(self, tokenizer: Any, length: int, count: int, seed: int) -> Sequence[Sample]:
        """Up to `count` samples of at most `length` tokens, the answer and the chat format included.

        Raises
        ------
        TextError
            If the task's data is missing (where to put it, how to fetch it), or too short for `length`.
        InputError
            If no sample fits into `length` tokens.
        """


def random_for(*words: object) -> random.Random:
    """A generator that depends on `words` alone, the same in every process."""
    return random.Random(":".join(map(str, words)))


def largest_fit(
    tokens: Callable[[int], int], limit: int, smallest: int, largest: int, name: str, spare: int = 0
) -> int:
    """The largest size (to about 1 %) whose ``tokens(size)`` is at most `limit`, `spare` tokens less if it can be.

    Raises
    ------
    InputError
        If not even `smallest` fits.

    Examples
    --------
    >>> largest_fit(lambda size: 30 + 7 * size, 100, 1, 1000, "sevens")
    10
    """
    if (least := tokens(smallest)) > limit:
        raise InputError(f"{name} needs at least {least} tokens; a length of {limit} was asked for: give a longer one.")
    aim = limit - spare
    low, high, at_low, per_size, bisect = smallest, largest + 1, least, max(1.0, least / smallest), False
    while high - low > max(1, low // 100):
        # Where the line through the last two sizes meets the limit; after one that was too large, the middle.
        guess = (low + high) // 2 if bisect else low + int((aim - at_low) / per_size)
        guess = min(max(guess, low + 1), high - 1)
        found = tokens(guess)
        per_size = max((found - at_low) / (guess - low), 1e-3)
        bisect = found > aim and not bisect
        if found <= aim:
            low, at_low = guess, found
        else:
            high = guess
    return low


def match_all(answer: str, expected: Sequence[str]) -> float:
    """The share of `expected` that occurs in `answer`, whatever the case (RULER's string_match_all).

    Examples
    --------
    >>> match_all("It is 12, or B.", ["12", "b", "7", "x"])
    0.5
    """
    found = sum(text.lower() in clean(answer).lower() for text in expected)
    return found / len(expected)


def match_part(answer: str, expected: Sequence[str]) -> float:
    """1 if any of `expected` occurs in `answer`, whatever the case (RULER's string_match_part)."""
    return float(any(text.lower() in clean(answer).lower() for text in expected))


def clean(answer: str) -> str:
    """An answer without outer white space, control characters as line ends: how RULER reads a prediction."""
    return "".join("\n" if ord(letter) < 32 else letter for letter in answer.strip()).strip()
