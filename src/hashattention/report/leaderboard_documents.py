"""Marked documents as the page shows them: every token's attention as a letter, and where the answers stand."""

from __future__ import annotations

import bisect
import itertools
import math
import re
import string
from collections.abc import Iterator, Sequence
from typing import Any

from hashattention.evaluation.result import Marked, Reading
from hashattention.evaluation.summary import DENSE
from hashattention.report.page import flow
from hashattention.report.table import density_text

#: Levels of attention, from the least that is not nothing.
LEVELS = string.ascii_letters
#: What an answer must have at least to be looked for in its document.
LETTERS = 3


def document(marked: Marked) -> dict[str, Any]:
    """What the page's script draws of one marked document.

    Returns
    -------
    dict
        `title`, `question`, `expected`, `pieces` (text of every token), `facts` (``[first, end)`` in tokens: where an
        expected answer stands), `densities` (their names) and `readings` (`name`, `density`, `answer`, `right`,
        `weights` as `levels` has them).
    """
    pieces = flow(marked.pieces)
    recorded = (reading for reading in marked.readings if any(reading.attention))
    readings = sorted(recorded, key=lambda reading: (-reading.density, not reading.method.startswith("hash")))
    return {
        "title": f"{marked.task}, {len(pieces):,} tokens, sample {marked.sample}",
        "model": marked.model,
        "question": marked.question,
        "expected": ", ".join(map(str, marked.expected)),
        "pieces": pieces,
        "facts": spans(pieces, marked.expected),
        "densities": list(dict.fromkeys(_density(reading) for reading in readings)),
        "readings": [
            {
                "name": reading.name or reading.method,
                "density": _density(reading),
                "answer": reading.answer,
                "score": reading.score,
                "weights": levels(reading.attention),
            }
            for reading in readings
        ],
    }


def levels(weights: Sequence[float]) -> str:
    """Weights 0..1 as letters, by their square root so that small ones show; a run of zeros is its length.

    Examples
    --------
    >>> levels([0.0, 0.0, 1.0, 0.0001, 0.0])
    '2Za1'
    """
    runs = itertools.groupby(weights, lambda weight: weight > 0)
    return "".join(
        "".join(LEVELS[min(math.ceil(math.sqrt(weight) * len(LEVELS)), len(LEVELS)) - 1] for weight in run)
        if some
        else str(sum(1 for _ in run))
        for some, run in runs
    )


def spans(pieces: Sequence[str], expected: Sequence[str]) -> list[list[int]]:
    """Where the expected answers stand in the document, as ``[first, end)`` in pieces, ascending and apart."""
    text = "".join(pieces)
    borders = [0, *itertools.accumulate(len(piece) for piece in pieces)]
    wanted = [re.escape(answer.strip()) for answer in expected if len(answer.strip()) >= LETTERS]
    found: list[list[int]] = []
    for match in re.finditer("|".join(wanted), text) if wanted else ():
        first, end = bisect.bisect_right(borders, match.start()) - 1, bisect.bisect_left(borders, match.end())
        if not found or first >= found[-1][1]:
            found.append([first, end])
    return found


def _density(reading: Reading) -> str:
    return DENSE if reading.method == DENSE else density_text(reading.density)


def static(shown: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Level and text of the first reading at the last density, joined where equal: the page without script."""
    reading = next(reading for reading in shown["readings"] if reading["density"] == shown["densities"][-1])
    marks: list[int] = []
    for found in re.finditer(r"\d+|[A-Za-z]", reading["weights"]):
        marks += [0] * int(found[0]) if found[0].isdigit() else [LEVELS.index(found[0]) + 1]
    marks += [0] * (len(shown["pieces"]) - len(marks))
    for level, run in itertools.groupby(zip(marks, shown["pieces"], strict=False), lambda pair: pair[0]):
        yield round(100 * level / len(LEVELS)), "".join(piece for _, piece in run)
