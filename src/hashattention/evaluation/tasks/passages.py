"""Predicting long text: perplexity of a passage's end, and agreement with dense on what it would say next."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hashattention.errors import InputError, TextError
from hashattention.evaluation.prompt import encode
from hashattention.evaluation.tasks import data
from hashattention.evaluation.tasks.base import Passage, Task, random_for


@dataclasses.dataclass(frozen=True)
class PassageTask(Task):
    """Windows of a long text.

    Parameters
    ----------
    kind : {"perplexity", "agreement"}
        Predict the window's own last tokens, or dense's greedy continuation of the window.
    tail : int
        Tokens that are predicted with sparse attention; 128 or, for agreement, 64 by default.
    folder : Path, optional
        Where the text lies.
    """

    kind: Literal["perplexity", "agreement"]
    tail: int = 0
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.tail < 0 or self.tail == 1:
            raise InputError(f"{self.kind}: tail must be at least 2 tokens; given {self.tail}.")

    @property
    def name(self) -> str:  # type: ignore[override]
        """As in the rows."""
        return f"{self.kind}:tail={self.tail}" if self.tail else self.kind

    def samples(self, tokenizer: Any, length: int, count: int, seed: int) -> Sequence[Passage]:
        """`count` windows of `length` tokens, one out of each of as many equal parts of the text."""
        predicted = self.tail or (128 if self.kind == "perplexity" else 64)
        if predicted >= length // 2:
            raise InputError(f"{self.name}: {predicted} tokens are predicted; a length of {length} is too short.")
        text = _encoded(tokenizer, self.folder)
        special = encode(tokenizer, "", special=True)
        window = length - len(special) - (predicted if self.kind == "agreement" else 0)
        if window > len(text):
            raise TextError(f"the text holds {len(text)} tokens, {window} were asked for; add text or ask for less.")
        passages = []
        for index in range(count):
            low, high = (place * (len(text) - window) // count for place in (index, index + 1))
            first = random_for(seed, self.kind, length, index).randint(low, high)
            tokens = (*special, *text[first : first + window])
            tail: tuple[int, ...] = (0,) * predicted
            if self.kind == "perplexity":
                tokens, tail = tokens[:-predicted], tokens[-predicted:]
            passages.append(Passage(str(index), self.kind, tokens, tail))
        return passages


_ENCODED: dict[tuple[int, Path | None], tuple[Any, list[int]]] = {}


def _encoded(tokenizer: Any, folder: Path | None) -> list[int]:
    """The tokens of the long text, made once for the last tokenizer."""
    key = id(tokenizer), folder
    if key not in _ENCODED:
        _ENCODED.clear()
        # The tokenizer is held, so that no other gets its id.
        _ENCODED[key] = tokenizer, encode(tokenizer, data.long_text(folder))
    return _ENCODED[key][1]
