"""Facts planted in a text at chosen depths, the questions that ask for them, and the grading of answers."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any

from hashattention.errors import InputError, TextError

PARAGRAPH = "\n\n"


@dataclasses.dataclass(frozen=True)
class Fact:
    """One sentence to plant, the question that asks for it, and the words a right answer contains."""

    subject: str
    sentence: str
    question: str
    answer: str


#: The demo's facts: chosen because the dense model answers them right, before any hash map was tried.
FACTS = (
    Fact("blue door", "The secret code of the blue door is 7412.", "What is the secret code of the blue door?", "7412"),
    Fact("old piano", "The price of the old piano is 385 pounds.", "What is the price of the old piano?", "385"),
    Fact("lighthouse", "The lighthouse has 926 steps.", "How many steps does the lighthouse have?", "926"),
)


@dataclasses.dataclass(frozen=True)
class Haystack:
    """A text with planted facts; `spans` holds the characters ``(start, end)`` of each fact, in the order given."""

    text: str
    facts: tuple[Fact, ...]
    spans: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A haystack in a model's chat format, cut where the question goes.

    Parameters
    ----------
    tokens : tuple of int
        Everything before the question; the same for all questions, so that it is read once.
    pieces : tuple of str
        The text of each of `tokens`.
    document : (int, int)
        Tokens ``first <= t < end`` that belong to the document.
    facts : tuple of (int, int)
        The tokens of each fact, likewise.
    tail : str
        What follows the question, up to the beginning of the answer.
    """

    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    document: tuple[int, int]
    facts: tuple[tuple[int, int], ...]
    tail: str


def count_tokens(tokenizer: Any, text: str) -> int:
    """Tokens of `text` alone, without special tokens."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def plant(text: str, facts: Sequence[Fact], depths: Sequence[float], tokens: int, tokenizer: Any) -> Haystack:
    """Put each fact, as a paragraph of its own, at the paragraph border nearest to its depth in an excerpt of `text`.

    Parameters
    ----------
    text : str
        Paragraphs separated by empty lines.
    facts : sequence of Fact
    depths : sequence of float
        Where each goes, in 0..1 of the excerpt's tokens.
    tokens : int
        The longest the excerpt may be, the facts included.
    tokenizer
        A transformers tokenizer.

    Returns
    -------
    Haystack
        At most `tokens` tokens, ending at a line's end.

    Raises
    ------
    InputError
        If a depth is outside 0..1, or there is not one for every fact.
    TextError
        If the facts alone are too long, or the text has fewer than `tokens` tokens.
    """
    if len(facts) != len(depths) or not all(0 <= depth <= 1 for depth in depths):
        raise InputError(f"plant takes one depth in 0..1 for each of {len(facts)} facts; given {list(depths)}.")
    room = tokens - sum(count_tokens(tokenizer, fact.sentence + PARAGRAPH) for fact in facts)
    if room <= 0:
        raise TextError(f"{len(facts)} facts do not fit into {tokens} tokens; allow more tokens.")
    paragraphs, ends = _cut(text, room, tokenizer)
    # A stable sort keeps facts of one depth in the order given.
    order = sorted(range(len(facts)), key=lambda index: depths[index])
    places = {
        index: min(range(len(ends)), key=lambda end: abs(ends[end] - depths[index] * ends[-1])) for index in order
    }
    parts: list[str] = []
    spans: dict[int, tuple[int, int]] = {}
    for border, paragraph in enumerate([*paragraphs, ""]):
        for index in (index for index in order if places[index] == border):
            start = sum(len(part) + len(PARAGRAPH) for part in parts)
            spans[index] = start, start + len(facts[index].sentence)
            parts.append(facts[index].sentence)
        parts.append(paragraph)
    text = PARAGRAPH.join(parts).rstrip("\n")
    return Haystack(text, tuple(facts), tuple(spans[index] for index in range(len(facts))))


def _cut(text: str, room: int, tokenizer: Any) -> tuple[list[str], list[int]]:
    """The first paragraphs that fit into `room` tokens, the last cut at a line's end; tokens at every border."""
    paragraphs: list[str] = []
    ends = [0]
    for paragraph in (part.strip("\n") for part in text.split(PARAGRAPH)):
        lines = paragraph.splitlines()
        kept = len(lines)
        while kept and ends[-1] + count_tokens(tokenizer, "\n".join(lines[:kept]) + PARAGRAPH) > room:
            kept -= 1
        if kept:
            paragraphs.append("\n".join(lines[:kept]))
            ends.append(ends[-1] + count_tokens(tokenizer, paragraphs[-1] + PARAGRAPH))
        if kept < len(lines):
            return paragraphs, ends
    raise TextError(
        f"the text holds {ends[-1]} tokens, an excerpt of {room} was asked for; give more text or ask for less."
    )


def prompt(haystack: Haystack, tokenizer: Any) -> Prompt:
    """Put a haystack into the tokenizer's chat format (plain text where it has none), cut before the question.

    Raises
    ------
    TextError
        If the chat template changes the text, so that it cannot be cut.
    """
    mark = "@@question@@"
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": haystack.text + PARAGRAPH + mark}]
        whole = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    else:
        whole = haystack.text + PARAGRAPH + mark + "\n"
    before, found, tail = whole.partition(mark)
    first = before.find(haystack.text)
    if not found or first < 0:
        raise TextError("this tokenizer's chat template rewrites the user's text; the document cannot be found in it.")
    encoded = tokenizer(before, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = [tuple(pair) for pair in encoded["offset_mapping"]]
    span = _tokens(offsets, first, first + len(haystack.text))
    facts = tuple(_tokens(offsets, first + start, first + end) for start, end in haystack.spans)
    # A token's text runs to the next token's start, so that the pieces join to the whole text.
    borders = [start for start, _ in offsets] + [len(before)]
    pieces = tuple(before[start:end] for start, end in itertools.pairwise(borders))
    return Prompt(tuple(encoded["input_ids"]), pieces, span, facts, tail)


def _tokens(offsets: Sequence[tuple[int, ...]], start: int, end: int) -> tuple[int, int]:
    """The tokens that overlap the characters ``start <= c < end``."""
    inside = [index for index, (first, last) in enumerate(offsets) if first < end and last > start]
    return inside[0], inside[-1] + 1


def grade(answer: str, fact: Fact) -> bool:
    """Whether `answer` contains the fact's answer as a word of its own, whatever its case.

    Examples
    --------
    >>> grade("It has 926 steps.", FACTS[2]), grade("It has 9265 steps.", FACTS[2])
    (True, False)
    """
    return re.search(rf"(?<!\w){re.escape(fact.answer)}(?!\w)", answer, re.IGNORECASE) is not None
