"""Samples as tokens, and which of them are run together."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from hashattention.evaluation.plan import Plan
from hashattention.evaluation.prompt import CutPrompt, cut
from hashattention.evaluation.tasks.base import Passage, Sample, Task


@dataclasses.dataclass(frozen=True)
class Job:
    """One sample: `context` is read densely, `tail` is what comes next, up to the answer; `number` within its task."""

    task: str
    length: int
    sample: Sample
    context: tuple[int, ...]
    tail: tuple[int, ...]
    prompt: CutPrompt | None = None
    marked: bool = False
    number: int = 0

    @property
    def kind(self) -> str:
        """``"question"``, or the kind of a passage."""
        return self.sample.kind if isinstance(self.sample, Passage) else "question"

    @property
    def shape(self) -> tuple[str, int, int]:
        """Jobs of one shape can be run together, whatever their tasks."""
        return self.kind, self.length, len(self.tail)

    @property
    def room(self) -> int:
        """Slots that the sample needs behind its context: the tail, and the longest answer or the right one."""
        return len(self.tail) + (ANSWER if self.kind == "question" else 0)


#: Room for an answer, or for the right one, in tokens; a longer answer makes the cache grow.
ANSWER = 160


def make(plan: Plan, tokenizer: Any, task: Task, length: int, marked: bool = False) -> list[Job]:
    """The plan's samples of one task at one length, this process's share of them; the first may be `marked`.

    Raises
    ------
    TextError, InputError
        As `Task.samples`.
    """
    jobs = []
    for number, sample in enumerate(task.samples(tokenizer, length, plan.samples, plan.seed)):
        if number % plan.shard[1] != plan.shard[0]:
            continue
        if isinstance(sample, Passage):
            jobs.append(Job(task.name, length, sample, sample.tokens, sample.tail, number=number))
            continue
        prompt = cut(sample, tokenizer, chat=plan.chat, longest=plan.question_tokens)
        context, tail = _split(prompt, plan)
        jobs.append(Job(task.name, length, sample, context, tail, prompt, marked and not number, number))
    return jobs


def _split(prompt: CutPrompt, plan: Plan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is read densely, and the sparse rest: the plan's number of tokens, so that all samples have one shape."""
    if plan.protocol == "generation":
        return prompt.context + prompt.question, ()
    more = min(plan.question_tokens - len(prompt.question), len(prompt.context) - 1)
    at = len(prompt.context) - more
    return prompt.context[:at], prompt.context[at:] + prompt.question


def batches(jobs: Sequence[Job], tokens: int) -> Iterator[list[Job]]:
    """Jobs of one shape together, up to `tokens` slots (at least one), the batches of a shape of one size.

    Each batch has some samples of every task, so that what an interrupted run leaves is a fair part of all.
    """
    shapes: dict[tuple[str, int, int], list[Job]] = defaultdict(list)
    for job in sorted(jobs, key=lambda job: job.number):
        shapes[job.shape].append(job)
    for together in shapes.values():
        slots = max(len(job.context) for job in together) + max(job.room for job in together)
        number = -(-len(together) // max(1, tokens // slots))
        for place in range(number):
            first, last = (len(together) * at // number for at in (place, place + 1))
            yield together[first:last]
