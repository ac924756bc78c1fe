"""What every RULER generator gives, and the noise that two of them share."""

from __future__ import annotations

import dataclasses
import random
from typing import Protocol

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclasses.dataclass(frozen=True)
class Draft:
    """One sample before it is known to fit: the fields of `Question`."""

    context: str
    question: str
    answer_prefix: str
    expected: tuple[str, ...]
    target: str


class Generator(Protocol):
    """Makes samples of any size."""

    @property
    def max_new_tokens(self) -> int:
        """The longest answer."""

    @property
    def smallest(self) -> int:
        """The least size."""

    @property
    def largest(self) -> int:
        """The greatest size there is data for."""

    def draft(self, source: random.Random, size: int, index: int) -> Draft:
        """Sample number `index` with a haystack of `size`; `source` decides everything that is random."""
