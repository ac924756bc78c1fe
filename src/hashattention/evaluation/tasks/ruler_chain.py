"""RULER's variable tracking: a chain of assignments in noise, after one solved example."""

from __future__ import annotations

import dataclasses
import random
import string

from hashattention.evaluation.tasks.ruler_draft import NOISE, Draft

BEGIN = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
#: Lines of noise in the example: about 500 tokens with the rest of it.
EXAMPLE_LINES = 15


@dataclasses.dataclass(frozen=True)
class Chain:
    """Variable tracking with one chain of `hops` assignments."""

    hops: int = 4

    max_new_tokens = 30
    largest = 1 << 20
    smallest = 1

    def draft(self, source: random.Random, size: int, index: int) -> Draft:
        """A sample with `size` lines of noise."""
        names, context, value = self._hide(source, min(EXAMPLE_LINES, size), letters=3)
        example = f"{BEGIN}{context}\n{self._question(value)}{self._prefix(value)} {' '.join(names)}\n\n"
        names, context, value = self._hide(source, size, letters=5)
        return Draft(
            context=f" {example}\n\n{BEGIN}{context}\n",
            question=self._question(value),
            answer_prefix=self._prefix(value),
            expected=tuple(names),
            target=" ".join(names),
        )

    def _question(self, value: str) -> str:
        return f"Question: Find all variables that are assigned the value {value} in the text above."

    def _prefix(self, value: str) -> str:
        # The spelling is RULER's.
        return (
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{self.hops + 1} variables are assgined the value {value}, they are: "
        )

    def _hide(self, source: random.Random, size: int, letters: int) -> tuple[list[str], str, str]:
        """The chain's names, the text it is hidden in, and its value."""
        names: list[str] = []
        while len(names) <= self.hops:
            name = "".join(source.choices(string.ascii_uppercase, k=letters))
            names += [name] if name not in names else []
        value = str(source.randint(10000, 99998))
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {names[hop + 1]} = VAR {names[hop]} " for hop in range(self.hops)]
        lines = [f"{NOISE}\n"] * size
        if len(lines) <= len(chain):
            lines = [f"{part}." for line in lines for part in line.split(".") if part.strip()]
            lines += [lines[0]] * (len(chain) + 1 - len(lines))
        places = sorted(source.sample(range(len(lines)), len(chain)))
        for before, (place, assignment) in enumerate(zip(places, chain, strict=True)):
            lines.insert(place + before, assignment)
        return names, " ".join(lines).replace(". \n", ".\n"), value
