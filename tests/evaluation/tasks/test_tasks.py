from __future__ import annotations

from pathlib import Path

import pytest

from hashattention.errors import ConfigError, InputError, TextError
from hashattention.evaluation.prompt import prompt_tokens
from hashattention.evaluation.tasks import parse


def names(*texts: str) -> list[str]:
    return [task.name for task in parse(texts)]


def test_names() -> None:
    assert len(names("ruler")) == len(names("ruler:*")) == 13
    assert len(names("longbench:*")) == 21
    assert names("ruler:niah_single_*") == [f"ruler:niah_single_{number}" for number in (1, 2, 3)]
    assert names("perplexity:tail=32", "agreement", "perplexity:tail=32") == ["perplexity:tail=32", "agreement"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rular:vt", "unknown task 'rular'; did you mean 'ruler'"),
        ("ruler:qa_3", "unknown ruler task 'qa_3'; did you mean 'qa_"),
        ("needle:distractor=2", "did you mean 'distractors'"),
        ("perplexity:tail=x", "tail must be a whole number; given 'x'"),
    ],
)
def test_unknown_names(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse([text])


def test_options_out_of_range() -> None:
    with pytest.raises(InputError, match="tail must be at least 2"):
        parse(["perplexity:tail=1"])
    with pytest.raises(InputError, match="distractors must be from 0 to 99"):
        parse(["needle:distractors=100"])


def test_needles_go_through_the_depths(data_folder: Path, byte_tokenizer) -> None:
    (task,) = parse(["needle:distractors=3"], data_folder)
    samples = task.samples(byte_tokenizer, 3000, 6, seed=0)
    assert [sample.depth for sample in samples] == [0.0, 0.25, 0.5, 0.75, 1.0, 0.0]
    for sample in samples:
        assert 2000 < prompt_tokens(sample, byte_tokenizer) <= 3000
        assert sample.context.count("The secret code of the") == 4
        name = sample.question.split("code of the ")[1].split("?")[0]
        fact = f"The secret code of the {name} is {sample.expected[0]}."
        assert sample.context.index(fact) / len(sample.context) == pytest.approx(sample.depth, abs=0.2)
        assert sample.grade(f"It is {sample.expected[0]}.") == 1.0
        assert sample.grade("1") == 0.0
    again = task.samples(byte_tokenizer, 3000, 2, seed=0)
    assert [one.context for one in again] == [one.context for one in samples[:2]]


@pytest.mark.parametrize("kind", ["perplexity", "agreement"])
def test_passages_are_windows_of_the_text(kind: str, data_folder: Path, byte_tokenizer) -> None:
    (task,) = parse([f"{kind}:tail=16"], data_folder)
    passages = task.samples(byte_tokenizer, 400, 3, seed=0)
    text = byte_tokenizer.decode(passages[0].tokens)
    from hashattention.evaluation.tasks import data

    assert text in data.essays(data_folder)
    assert all(len(one.tokens) + len(one.tail) == 400 for one in passages)
    assert all(len(one.tail) == 16 for one in passages)
    if kind == "perplexity":
        assert byte_tokenizer.decode(passages[0].tokens + passages[0].tail) in data.essays(data_folder)
    assert task.samples(byte_tokenizer, 400, 3, seed=0) == passages
    assert task.samples(byte_tokenizer, 400, 3, seed=1) != passages


def test_passages_that_cannot_be(data_folder: Path, byte_tokenizer) -> None:
    (task,) = parse(["perplexity"], data_folder)
    with pytest.raises(TextError, match=r"the text holds .* tokens"):
        task.samples(byte_tokenizer, 10**6, 1, 0)
    with pytest.raises(InputError, match="128 tokens are predicted; a length of 200 is too short"):
        task.samples(byte_tokenizer, 200, 1, 0)
