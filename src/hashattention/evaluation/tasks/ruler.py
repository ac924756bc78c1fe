"""RULER's 13 tasks (Hsieh et al., arXiv 2404.06654) at any length, by the official rules, prompts and scoring."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hashattention.errors import InputError
from hashattention.evaluation.prompt import prompt_tokens
from hashattention.evaluation.tasks.base import (
    Question,
    Task,
    largest_fit,
    match_all,
    match_part,
    random_for,
)
from hashattention.evaluation.tasks.ruler_chain import Chain
from hashattention.evaluation.tasks.ruler_documents import Documents
from hashattention.evaluation.tasks.ruler_draft import Generator
from hashattention.evaluation.tasks.ruler_needles import Needles
from hashattention.evaluation.tasks.ruler_words import CodedWords, CommonWords

#: A task's generator for a data folder and a length.
TASKS: dict[str, Callable[[Path | None, int], Generator]] = {
    "niah_single_1": lambda folder, length: Needles("repeat", folder=folder),
    "niah_single_2": lambda folder, length: Needles("essay", folder=folder),
    "niah_single_3": lambda folder, length: Needles("essay", value="uuids", folder=folder),
    "niah_multikey_1": lambda folder, length: Needles("essay", keys=4, folder=folder),
    "niah_multikey_2": lambda folder, length: Needles("needle", folder=folder),
    "niah_multikey_3": lambda folder, length: Needles("needle", key="uuids", value="uuids", folder=folder),
    "niah_multivalue": lambda folder, length: Needles("essay", values=4, folder=folder),
    "niah_multiquery": lambda folder, length: Needles("essay", queries=4, folder=folder),
    "vt": lambda folder, length: Chain(),
    "cwe": lambda folder, length: CommonWords(length, folder),
    "fwe": lambda folder, length: CodedWords(length),
    "qa_1": lambda folder, length: Documents("squad", folder),
    "qa_2": lambda folder, length: Documents("hotpotqa", folder),
}


@dataclasses.dataclass(frozen=True)
class RulerTask(Task):
    """One of the 13 (`TASKS`); its data lies in `folder` or in the usual places.

    The rules, parameters, prompts and scoring are RULER's; the random draws are our own (a sample depends on the seed,
    the task, the length and its number alone), the haystack is as long as fits rather than a multiple of a step, and
    sentences end at their final mark.
    """

    task: str
    folder: Path | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        """As in the rows."""
        return f"ruler:{self.task}"

    def samples(self, tokenizer: Any, length: int, count: int, seed: int) -> Sequence[Question]:
        """`count` samples that fill `length` tokens as well as they can."""
        generator = TASKS[self.task](self.folder, length)

        def make(index: int, size: int) -> Question:
            source = random_for(seed, self.task, length, index)
            return self._question(generator, size, index, source)

        def tokens(size: int) -> int:
            return prompt_tokens(make(0, size), tokenizer)

        # Samples differ a little in length: most fit at their first try.
        spare = length // 256
        size = largest_fit(tokens, length, generator.smallest, generator.largest, self.name, spare)
        return [self._shrink(make, index, size, tokenizer, length) for index in range(count)]

    def _shrink(
        self, make: Callable[[int, int], Question], index: int, size: int, tokenizer: Any, length: int
    ) -> Question:
        """Sample `index`, smaller than the first where it came out longer."""
        while (needed := prompt_tokens(question := make(index, size), tokenizer)) > length:
            smaller = min(size - 1, int(size * (length / needed - 0.002)))
            if smaller < TASKS[self.task](self.folder, length).smallest:
                raise InputError(f"{self.name}: sample {index} needs {needed} tokens; give a length over {length}.")
            size = smaller
        return question

    def _question(self, generator: Generator, size: int, index: int, source: Any) -> Question:
        draft = generator.draft(source, size, index)
        match = match_part if self.task.startswith("qa") else match_all
        return Question(
            id=str(index),
            context=draft.context,
            question=draft.question,
            expected=draft.expected,
            grade=functools.partial(match, expected=draft.expected),
            max_new_tokens=generator.max_new_tokens,
            answer_prefix=draft.answer_prefix,
            target=draft.target,
            growing=True,
        )
