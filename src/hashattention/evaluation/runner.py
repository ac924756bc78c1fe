"""Run a plan: every sample is read densely once, and every method continues from there; one row each."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hashattention import provenance
from hashattention.config import BaseModel
from hashattention.evaluation import meter as meters
from hashattention.evaluation import outcome, tasks
from hashattention.evaluation.jobs import Job, batches, make
from hashattention.evaluation.meter import Meter
from hashattention.evaluation.outcome import Continuation, Outcome
from hashattention.evaluation.plan import Plan, Served, serve
from hashattention.evaluation.prompt import pieces
from hashattention.evaluation.reader import Reader, batch_tokens, can_batch
from hashattention.evaluation.result import Marked, Reading, Results, Row
from hashattention.evaluation.tasks import data
from hashattention.evaluation.tasks.base import Passage, Question
from hashattention.maps import HashMaps
from hashattention.models.describe import describe, text_config

Progress = Callable[[str, int, int], None]

#: Answer steps that are measured, every how manyth of them for its error too, and of a predicted tail each how manyth.
STEPS, ERRORS, EVERY = 2, 1, 16
#: More tokens than any cache.
ALL = 1 << 30
#: Digits of the attention weights that are kept.
DIGITS = 3


def run(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    out: Path,
    *,
    maps: HashMaps | None = None,
    others: Mapping[str, HashMaps] | None = None,
    progress: Progress | None = None,
    jobs: Sequence[Job] | None = None,
    until: float | None = None,
    graphs: bool = True,
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
    others : mapping of str to HashMaps, optional
        More maps for the method ``"hash"``, by the name their rows have.
    progress : callable, optional
        Called as ``progress(text, done, total)``, counting rows.
    jobs : sequence of Job, optional
        The plan's samples, where they have been made already (`jobs.make`).
    until : float, optional
        Of ``time.monotonic()``: no batch and no method begins after it; run again to continue.
    graphs : bool
        On a GPU, decode by CUDA graphs where the model allows it.

    Returns
    -------
    tuple of Row
        The rows of this plan that are there, in the order of its samples and methods.

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
    served = serve(plan, base, maps, model.device, others)
    tell = progress or (lambda text, done, total: None)
    jobs = list(jobs) if jobs is not None else _make(plan, tokenizer, tell)
    evaluation = _Evaluation(model, tokenizer, plan, base, served, Results(out), tell, graphs)
    evaluation.run(jobs, until)
    held = {row.key: row for row in evaluation.results.rows}
    wanted = (evaluation.row(job, method).key for job in jobs for method in served)
    return tuple(held[key] for key in wanted if key in held)


def _make(plan: Plan, tokenizer: Any, tell: Progress) -> list[Job]:
    jobs = []
    for number, task in enumerate(tasks.parse(plan.tasks, plan.data)):
        for length in plan.lengths:
            tell(f"making {task.name} of {length} tokens", 0, 0)
            marked = number < plan.marked and length == min(plan.lengths)
            jobs += make(plan, tokenizer, task, length, marked)
    return jobs


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
        graphs: bool,
    ) -> None:
        self.model, self.tokenizer, self.plan, self.base = model, tokenizer, plan, base
        self.served, self.results, self.tell, self.graphs = served, results, tell, graphs
        self.name = plan.model or base.name or base.architecture
        self.origin = provenance.origin(model.device) | {"data": data.digests(plan.data)}

    def run(self, jobs: Sequence[Job], until: float | None) -> None:
        """Run what is missing, batch by batch; nothing begins after `until`."""
        tokens = self.plan.batch_tokens
        if tokens is None:
            tokens = batch_tokens(self.model)
        total = len(jobs) * len(self.served)
        done = sum(self.row(job, method).key in self.results for job in jobs for method in self.served)
        for batch in batches(jobs, tokens if can_batch(self.model) else 0):
            for name, new in self._run_batch(batch):
                if until is not None and time.monotonic() > until:
                    self.tell(f"out of time before {name}", done, total)
                    return
                self.tell(name, done, total)
                done += new
        self.tell("done", done, total)

    def _run_batch(self, batch: Sequence[Job]) -> Iterator[tuple[str, int]]:
        """Run the methods that lack rows of these jobs; what is about to run, and how many rows it adds."""
        missing = {
            place: [job for job in batch if self.row(job, method).key not in self.results]
            for place, method in enumerate(self.served)
        }
        if not any(missing.values()):
            return
        first, names = batch[0], dict.fromkeys(job.task for job in batch)
        where = f"{first.task if len(names) == 1 else f'{len(names)} tasks'} of {first.length} tokens"
        yield f"{where}: reading {len(batch)}", 0
        reader = Reader(self.model, [job.context for job in batch], max(job.room for job in batch), self.graphs)
        dense = outcome.go_on(reader, len(first.tail)) if first.kind == "agreement" else None
        for place, method in enumerate(self.served):
            if missing[place]:
                at = "" if method.selector is None else f" at density {method.density:g}"
                yield f"{where}: {method.name}{at}", len(missing[place])
                self._run_method(reader, batch, method, dense, missing[place])

    def _run_method(
        self, reader: Reader, batch: Sequence[Job], method: Served, dense: Continuation | None, missing: Sequence[Job]
    ) -> None:
        started = time.perf_counter()
        meter = self._meter(batch, reader.width, method.selector is not None)
        with reader.serve(method.selector, method.budget, meter):
            outcomes = self._outcomes(reader, batch, meter, dense)
        seconds = (time.perf_counter() - started) / len(batch)
        readings: Sequence[meters.Reading | None] = meter.readings() or [None] * len(batch)
        rows = []
        for place, (job, found, reading) in enumerate(zip(batch, outcomes, readings, strict=True)):
            if job not in missing:
                continue
            rows.append(self.row(job, method, found, reading, seconds))
            if job.marked:
                self._mark(job, method, found, reading, reader.padding[place])
        self.results.extend(rows)

    def _meter(self, batch: Sequence[Job], width: int, sparse: bool) -> Meter:
        first = batch[0]
        if not sparse:
            return Meter(0, -1)
        if isinstance(first.sample, Passage):
            return Meter(width + 1, ALL, EVERY, self.plan.errors)
        since = width + len(first.tail) + 1
        marked = tuple(place for place, job in enumerate(batch) if job.marked)
        return Meter(since, since + STEPS - 1, 1, self.plan.errors, marked, ERRORS)

    def _outcomes(
        self, reader: Reader, batch: Sequence[Job], meter: Meter, dense: Continuation | None
    ) -> list[Outcome]:
        tails = [job.tail for job in batch]
        questions = [job.sample for job in batch if isinstance(job.sample, Question)]
        if questions:
            return outcome.answer(reader, self.tokenizer, questions, tails, meter, self.plan.logprobs)
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
            head_dim=self.base.head_dim,
            sparse_prompt=0 if self.plan.protocol == "generation" or sample is None else len(job.tail),
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
