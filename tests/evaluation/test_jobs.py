from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest

from hashattention.evaluation import tasks
from hashattention.evaluation.jobs import ANSWER, batches, make
from hashattention.evaluation.plan import Plan


@pytest.fixture(scope="module")
def plan(data_folder: Path) -> Plan:
    return Plan(("ruler:vt",), lengths=(1500,), samples=5, data=data_folder, question_tokens=40)


def made(plan: Plan, tokenizer, *names: str):
    return [job for task in tasks.parse(names, plan.data) for job in make(plan, tokenizer, task, 1500)]


def test_every_prompt_has_the_same_sparse_part(plan, byte_tokenizer) -> None:
    jobs = made(plan, byte_tokenizer, "ruler:vt", "ruler:niah_single_1", "ruler:qa_1", "needle")
    assert {len(job.tail) for job in jobs} == {40}
    assert {job.shape for job in jobs} == {("question", 1500, 40)}
    for job in jobs:
        assert job.context + job.tail == job.prompt.context + job.prompt.question
        assert job.room == 40 + ANSWER
    plain = made(dataclasses.replace(plan, protocol="generation"), byte_tokenizer, "ruler:vt")
    assert [job.context for job in plain] == [job.context + job.tail for job in jobs[:5]]
    assert {job.tail for job in plain} == {()}


def test_batches_have_some_of_every_task(plan, byte_tokenizer) -> None:
    jobs = made(plan, byte_tokenizer, "ruler:vt", "ruler:fwe", "perplexity:tail=8")
    found = list(batches(jobs, 4 * 1700))
    assert [len(batch) for batch in found] == [3, 3, 4, 2, 3]
    assert sorted(map(id, jobs)) == sorted(id(job) for batch in found for job in batch)
    for batch in found:
        assert len({job.shape for job in batch}) == 1
        if batch[0].kind == "question":
            assert {job.task for job in batch} == {"ruler:vt", "ruler:fwe"}
    assert [len(batch) for batch in batches(jobs, 0)] == [1] * 15


def test_jobs_travel_between_processes(plan, byte_tokenizer) -> None:
    (job, *_) = made(plan, byte_tokenizer, "ruler:vt", "ruler:qa_1", "needle")
    again = pickle.loads(pickle.dumps(job))
    assert again.tail == job.tail
    assert again.sample.grade(" ".join(job.sample.expected)) == 1.0


def test_only_the_first_sample_is_marked(plan, byte_tokenizer) -> None:
    (task,) = tasks.parse(("ruler:vt",), plan.data)
    assert [job.marked for job in make(plan, byte_tokenizer, task, 1500, marked=True)] == [True, *[False] * 4]
    second = dataclasses.replace(plan, shard=(1, 2))
    assert [(job.number, job.marked) for job in make(second, byte_tokenizer, task, 1500, marked=True)] == [
        (1, False),
        (3, False),
    ]
