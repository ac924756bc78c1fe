"""Run a plan: every sample is read densely once, and every method continues from there; one row each."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hashattention import provenance
from hashattention.config import BaseModel
from hashattention.evaluation import meter as meters
from hashattention.evaluation import outcome, tasks
from hashattention.evaluation.meter import Meter
from hashattention.evaluation.outcome import Continuation, Outcome
from hashattention.evaluation.plan import Plan, Served, serve
from hashattention.evaluation.prompt import CutPrompt, cut, pieces
from hashattention.evaluation.reader import Reader, batch_tokens, can_batch
from hashattention.evaluation.result import Marked, Reading, Results, Row
from hashattention.evaluation.tasks.base import Passage, Question, Sample, Task
from hashattention.integrations.transformers import attach
from hashattention.maps import HashMaps
from hashattention.models.describe import describe, text_config

Progress = Callable[[str, int, int], None]

#: More than any question or tail: every position behind the context is sparse.
ALL = 1 << 30
#: Answer steps that are measured, and of a predicted tail each how manyth.
STEPS, EVERY = 8, 16
#: The sparse part of a prompt begins with the question, or up to that many tokens less one before it: samples whose
#: parts are then of one length can be run together.
ROUND = 16
#: Digits of the attention weights that are kept.
DIGITS = 3


@dataclasses.dataclass(frozen=True)
class Job:
    """One sample as tokens: `context` is read densely, `tail` is what comes next."""

    task: str
    length: int
    sample: Sample
    context: tuple[int, ...]
    tail: tuple[int, ...]
    prompt: CutPrompt | None = None
    marked: bool = False

    @property
    def shape(self) -> tuple[str, int, int]:
        """Jobs of one shape can be run together."""
        kind = self.sample.kind if isinstance(self.sample, Passage) else "question"
        return kind, self.length, len(self.tail)


def run(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    out: Path,
    *,
    maps: HashMaps | None = None,
    progress: Progress | None = None,
) -> tuple[Row, ...]:
    """Evaluate a model, adding to the rows in a folder; those that are there already are not measured again.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder, as `load_model` gives it.
    tokenizer
        Its tokenizer.
    plan : Plan
    out : Path
        The result folder.
    maps : HashMaps, optional
        Trained for this model, for the methods that need them.
    progress : callable, optional
        Called as ``progress(text, done, total)``, counting rows.

    Returns
    -------
    tuple of Row
        The rows of this plan, in the order of its samples and methods.

    Raises
    ------
    InputError
        If a length is over the model's context.
    UnsupportedModelError
        If a method cannot run on this model, with the reason; before anything is run.
    TextError
        If a task's data is missing, with where to put it and how to fetch it.
    """
    base = describe(model)
    plan.check_lengths(getattr(text_config(model), "max_position_embeddings", None))
    served = serve(plan, base, maps, model.device)
    results = Results(out)
    evaluation = _Evaluation(
        model, tokenizer, plan, base, served, results, progress or (lambda text, done, total: None)
    )
    evaluation.run()
    held = {row.key: row for row in results.rows}
    wanted = (evaluation.row(job, method).key for job in evaluation.jobs for method in served)
    return tuple(held[key] for key in wanted)


class _Evaluation:
    """The state of one `run`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        plan: Plan,
        base: BaseModel,
        served: Sequence[Served],
        results: Results,
        tell: Progress,
    ) -> None:
        self.model, self.tokenizer, self.plan, self.base = model, tokenizer, plan, base
        self.served, self.results, self.tell = served, results, tell
        self.name = plan.model or base.name or base.architecture
        self.origin = provenance.origin(model.device)
        self.jobs: list[Job] = []

    def run(self) -> None:
        """Make all samples, then run what is missing, batch by batch."""
        chosen = tasks.parse(self.plan.tasks, self.plan.data)
        for number, task in enumerate(chosen):
            for length in self.plan.lengths:
                self.tell(f"making {task.name} of {length} tokens", 0, 0)
                marked = number < self.plan.marked and length == min(self.plan.lengths)
                self.jobs += self._jobs(task, length, marked)
        batches, total = self._batches(), len(self.jobs) * len(self.served)
        done = sum(self.row(job, method).key in self.results for job in self.jobs for method in self.served)
        for batch in batches:
            for name, new in self._run_batch(batch):
                self.tell(name, done, total)
                done += new
        self.tell("done", total, total)

    def _jobs(self, task: Task, length: int, marked: bool) -> Iterator[Job]:
        for number, sample in enumerate(task.samples(self.tokenizer, length, self.plan.samples, self.plan.seed)):
            if isinstance(sample, Passage):
                yield Job(task.name, length, sample, sample.tokens, sample.tail)
                continue
            prompt = cut(sample, self.tokenizer, chat=self.plan.chat, longest=self.plan.question_tokens)
            context, tail = _round(prompt)
            if self.plan.protocol == "generation":
                context, tail = context + tail, ()
            yield Job(task.name, length, sample, context, tail, prompt, marked and not number)

    def _batches(self) -> list[list[Job]]:
        """Jobs of one shape together, as many as the plan allows."""
        shapes: dict[Any, list[Job]] = defaultdict(list)
        for job in self.jobs:
            shapes[job.shape].append(job)
        tokens = self.plan.batch_tokens
        if tokens is None:
            tokens = batch_tokens(self.model)
        tokens = tokens if can_batch(self.model) else 0
        together: list[list[Job]] = []
        for jobs in shapes.values():
            most = max(1, tokens // jobs[0].length)
            together += [jobs[first : first + most] for first in range(0, len(jobs), most)]
        return together

    def _run_batch(self, batch: Sequence[Job]) -> Iterator[tuple[str, int]]:
        """Run the methods that lack rows of these jobs; what is run, and how many rows it adds."""
        missing = {
            place: [job for job in batch if self.row(job, method).key not in self.results]
            for place, method in enumerate(self.served)
        }
        if not any(missing.values()):
            return
        first = batch[0]
        yield f"{first.task} of {first.length} tokens: reading {len(batch)}", 0
        reader = Reader(self.model, [job.context for job in batch])
        dense = outcome.go_on(reader, len(first.tail)) if first.shape[0] == "agreement" else None
        for place, method in enumerate(self.served):
            if missing[place]:
                yield f"{first.task} of {first.length} tokens: {method.name}", len(missing[place])
                self._run_method(reader, batch, method, dense, missing[place])

    def _run_method(
        self, reader: Reader, batch: Sequence[Job], method: Served, dense: Continuation | None, missing: Sequence[Job]
    ) -> None:
        started = time.perf_counter()
        meter = self._meter(batch, reader.width)
        with self._attached(method, meter):
            outcomes = self._outcomes(reader, batch, meter, dense)
        reader.forget()
        seconds = (time.perf_counter() - started) / len(batch)
        readings: Sequence[meters.Reading | None] = meter.readings() or [None] * len(batch)
        for place, (job, found, reading) in enumerate(zip(batch, outcomes, readings, strict=True)):
            if job not in missing:
                continue
            self.results.append(self.row(job, method, found, reading, seconds))
            if job.marked:
                self._mark(job, method, found, reading, reader.padding[place])

    def _meter(self, batch: Sequence[Job], width: int) -> Meter:
        first = batch[0]
        if isinstance(first.sample, Passage):
            return Meter(width + 1, ALL, EVERY, self.plan.errors)
        since = width + max(1, len(first.tail))
        marked = tuple(place for place, job in enumerate(batch) if job.marked)
        return Meter(since, since + STEPS - 1, 1, self.plan.errors, attention=marked)

    def _attached(self, method: Served, meter: Meter) -> contextlib.AbstractContextManager[Any]:
        if method.selector is None:
            return contextlib.nullcontext()
        return attach(self.model, method.selector, method.budget, min_context=0, sparse_tail=ALL, observer=meter)

    def _outcomes(
        self, reader: Reader, batch: Sequence[Job], meter: Meter, dense: Continuation | None
    ) -> list[Outcome]:
        tails = [job.tail for job in batch]
        questions = [job.sample for job in batch if isinstance(job.sample, Question)]
        if questions:
            return outcome.answer(reader, self.tokenizer, questions, tails, meter)
        return outcome.predict(reader, tails) if dense is None else outcome.agree(reader, dense)

    def row(
        self,
        job: Job,
        method: Served,
        found: Outcome | None = None,
        reading: meters.Reading | None = None,
        seconds: float = 0.0,
    ) -> Row:
        """The row of a job and a method; without an outcome only its key means anything."""
        tokens = len(job.context) + (0 if isinstance(job.sample, Passage) else len(job.tail))
        sample = job.sample if isinstance(job.sample, Question) else None
        found = found or Outcome(0.0)
        budget = (
            (0, 0, tokens)
            if method.budget is None
            else (self.plan.sink, self.plan.local, method.budget.counts(tokens)[2])
        )
        return Row(
            task=job.task,
            length=job.length,
            sample=job.sample.id,
            method=method.method,
            name=method.name,
            density=method.density,
            budget=budget,
            expected=sample.expected if sample else (),
            attended=reading.attended if reading else float(tokens),
            rows=reading.rows if reading else float(tokens),
            error=meters.spread(reading.error, self.base.num_hidden_layers) if reading else (),
            tokens=tokens,
            auxiliary_bits=method.auxiliary_bits,
            depth=sample.depth if sample else None,
            protocol=self.plan.protocol,
            chat=self.plan.chat,
            seed=self.plan.seed,
            model=self.name,
            maps=method.maps,
            dtype=str(self.model.dtype).removeprefix("torch."),
            seconds=seconds,
            origin=self.origin,
            **dataclasses.asdict(found),
        )

    def _mark(self, job: Job, method: Served, found: Outcome, reading: meters.Reading | None, padding: int) -> None:
        assert job.prompt is not None and isinstance(job.sample, Question)
        shown = pieces(job.prompt, self.tokenizer)
        weights = reading.attention[padding : padding + len(shown)] if reading else ()
        self.results.mark(
            Marked(
                self.name,
                job.task,
                job.length,
                job.sample.id,
                shown,
                job.sample.question,
                job.sample.expected,
                (
                    Reading(
                        method.method,
                        method.name,
                        method.density,
                        found.answer,
                        found.score,
                        tuple(round(weight, DIGITS) for weight in weights),
                    ),
                ),
            )
        )


def _round(prompt: CutPrompt) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is read densely, and the rest: a multiple of `ROUND` tokens."""
    more = min(-len(prompt.question) % ROUND, len(prompt.context) - 1)
    cut_at = len(prompt.context) - more
    return prompt.context[:cut_at], prompt.context[cut_at:] + prompt.question
