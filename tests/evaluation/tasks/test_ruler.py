from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from hashattention.errors import InputError
from hashattention.evaluation.prompt import prompt_tokens
from hashattention.evaluation.tasks.ruler import TASKS, RulerTask

SIZES = {"cwe": 3000, "vt": 3000}


def make(task: str, folder: Path, tokenizer, count: int = 3, length: int = 2500, seed: int = 0):
    return RulerTask(task, folder).samples(tokenizer, SIZES.get(task, length), count, seed)


@pytest.mark.parametrize("task", list(TASKS))
def test_samples_fill_the_length_and_can_be_answered(task: str, data_folder: Path, byte_tokenizer) -> None:
    samples = make(task, data_folder, byte_tokenizer)
    length = SIZES.get(task, 2500)
    assert [sample.id for sample in samples] == ["0", "1", "2"]
    for sample in samples:
        assert 0.8 * length < prompt_tokens(sample, byte_tokenizer) <= length
        text = sample.context + sample.question
        assert sample.grade(sample.target) == 1.0
        assert sample.grade("nothing of it") == 0.0
        assert all(answer in text for answer in sample.expected) or task == "qa_1"
        assert sample.question.strip()
        assert sample.answer_prefix.startswith(" ")
    assert len({sample.context for sample in samples}) == 3


@pytest.mark.parametrize("task", list(TASKS))
def test_the_same_arguments_give_the_same_samples(task: str, data_folder: Path, byte_tokenizer) -> None:
    def texts(count: int, seed: int) -> list[str]:
        return [
            sample.context + sample.question for sample in make(task, data_folder, byte_tokenizer, count, seed=seed)
        ]

    first = texts(2, 0)
    assert texts(3, 0)[:2] == first
    assert texts(2, 1) != first


def test_the_prompt_of_one_needle(data_folder: Path, byte_tokenizer) -> None:
    (sample,) = make("niah_single_1", data_folder, byte_tokenizer, 1)
    begin = (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n"
    )
    assert sample.context.startswith(begin)
    lines = sample.context.removeprefix(begin).split("\n")
    needles = [line for line in lines if "special magic" in line]
    key = re.fullmatch(r"What is the special magic number for (\S+) mentioned in the provided text\?", sample.question)
    assert key is not None
    assert needles == [f"One of the special magic numbers for {key[1]} is: {sample.expected[0]}."]
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    assert set(lines) == {noise, needles[0], ""}
    assert re.fullmatch(r"\d{7}", sample.expected[0])
    assert sample.answer_prefix == f" The special magic number for {key[1]} mentioned in the provided text is"


def test_the_prompt_of_many_needles(data_folder: Path, byte_tokenizer) -> None:
    (sample,) = make("niah_multiquery", data_folder, byte_tokenizer, 1)
    assert sample.context.startswith("Some special magic numbers are hidden within the following text.")
    found = re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", sample.context)
    keys = re.fullmatch(
        r"What are all the special magic numbers for (\S+), (\S+), (\S+), and (\S+) mentioned in the provided text\?",
        sample.question,
    )
    assert keys is not None
    assert [dict(found)[key] for key in keys.groups()] == list(sample.expected)
    assert sample.answer_prefix.endswith("mentioned in the provided text are")


@pytest.mark.parametrize(
    ("task", "needles", "answers", "pattern"),
    [
        ("niah_single_2", 1, 1, r"\d{7}"),
        ("niah_single_3", 1, 1, r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
        ("niah_multikey_1", 4, 1, r"\d{7}"),
        ("niah_multivalue", 4, 4, r"\d{7}"),
    ],
)
def test_needles_lie_between_sentences(
    task: str, needles: int, answers: int, pattern: str, data_folder: Path, byte_tokenizer
) -> None:
    (sample,) = make(task, data_folder, byte_tokenizer, 1)
    assert sample.context.count("One of the special magic") == needles
    assert len(set(sample.expected)) == answers
    assert all(re.fullmatch(pattern, value) for value in sample.expected)
    body = sample.context.split("afterwards.\n")[1]
    # The essay may end inside a sentence, before a needle behind it.
    before = [body[: match.start()].rstrip() for match in re.finditer("One of the special magic", body)]
    assert all(not text or text.endswith(".") for text in before[:-1])


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_a_haystack_of_needles(task: str, data_folder: Path, byte_tokenizer) -> None:
    (sample,) = make(task, data_folder, byte_tokenizer, 1)
    lines = sample.context.strip().split("\n")[1:]
    assert all(line.startswith("One of the special magic") for line in lines)
    asked = sample.question.split(" for ")[1].split(" mentioned")[0]
    assert [line for line in lines if sample.expected[0] in line] == [
        line for line in lines if f"{asked} is: {sample.expected[0]}." in line
    ]


def test_a_chain_leads_to_the_answer(data_folder: Path, byte_tokenizer) -> None:
    for sample in make("vt", data_folder, byte_tokenizer):
        example, text = sample.context.split("\n\n\n\n")
        assert re.search(r"they are:  [A-Z]{3}( [A-Z]{3}){4}$", example)
        value = re.search(r"the value (\d{5}) in", sample.question)
        assert value is not None
        chain = [re.search(rf"VAR (\w+) = {value[1]}", text)[1]]
        while following := re.search(rf"VAR (\w+) = VAR {chain[-1]} ", text):
            chain.append(following[1])
        assert chain == list(sample.expected)
        assert len(set(chain)) == 5
        assert all(len(name) == 5 for name in chain)
        assert sample.target == " ".join(chain)
        assert sample.answer_prefix.endswith(f"5 variables are assgined the value {value[1]}, they are: ")


def test_the_common_words_are_the_answer(data_folder: Path, byte_tokenizer) -> None:
    for sample in make("cwe", data_folder, byte_tokenizer):
        example, text = sample.context.split("Below is a numbered list of words.")[1:]
        listed = re.findall(r"(\d+)\. (\S+)", text)
        assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
        counted = Counter(word for _, word in listed)
        # Under 4096 tokens RULER repeats common words 6 times, others once.
        assert {word for word, times in counted.items() if times == 6} == set(sample.expected)
        assert set(counted.values()) <= {6, 1}
        assert sample.target.startswith(f"1. {sample.expected[0]} 2. {sample.expected[1]}")
        assert "are:1. " in example


def test_the_frequent_words_are_the_answer(data_folder: Path, byte_tokenizer) -> None:
    for sample in make("fwe", data_folder, byte_tokenizer):
        counted = Counter(sample.context.split("coded words. ")[1].split())
        ordered = [word for word, _ in counted.most_common(4)]
        assert ordered[0] == "..."
        assert sorted(ordered[1:]) == sorted(sample.expected)
        # A zeta distribution of exponent 2.
        assert counted["..."] / counted[sample.expected[0]] == pytest.approx(4, rel=0.15)


def test_documents_hold_the_answer(data_folder: Path, byte_tokenizer) -> None:
    for index, sample in enumerate(make("qa_1", data_folder, byte_tokenizer)):
        # Questions without an answer are left out: article 0 holds paragraphs 0, 6, 12, ...
        assert sample.question.endswith(f"Question: Who owns house {index * 6}?")
        assert f"House {index * 6} is owned by Owner {index * 6}." in sample.context
        assert sample.expected == (f"Owner {index * 6}", f"Lady {index * 6}")
        assert sample.grade(f"It is lady {index * 6}.") == 1.0
        numbers = re.findall(r"Document (\d+):\n", sample.context)
        assert numbers == [str(place) for place in range(1, len(numbers) + 1)]
    (sample,) = make("qa_2", data_folder, byte_tokenizer, 1)
    assert all(f"Page {number}\nFact {number}. More." in sample.context for number in range(10))


def test_a_length_that_is_too_short_is_refused(data_folder: Path, byte_tokenizer) -> None:
    with pytest.raises(InputError, match=r"ruler:cwe needs at least \d+ tokens; a length of 300"):
        RulerTask("cwe", data_folder).samples(byte_tokenizer, 300, 1, 0)
