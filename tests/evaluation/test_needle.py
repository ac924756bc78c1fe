from __future__ import annotations

from pathlib import Path

import pytest

from hashattention.errors import InputError, TextError
from hashattention.evaluation.needle import FACTS, count_tokens, grade, plant, prompt

TEXT = "\n\n".join(f"Paragraph {number} says little,\nand says it twice." for number in range(60))


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.mark.parametrize("depths", [(0.2, 0.5, 0.8), (0.0, 1.0, 0.5), (0.5, 0.5, 0.5)])
def test_facts_lie_where_they_are_said_to_lie(tokenizer, depths: tuple[float, ...]) -> None:
    haystack = plant(TEXT, FACTS, depths, 1000, tokenizer)
    assert [haystack.text[start:end] for start, end in haystack.spans] == [fact.sentence for fact in FACTS]
    size = count_tokens(tokenizer, haystack.text)
    assert 950 < size <= 1000
    for (start, _), depth in zip(haystack.spans, depths, strict=True):
        # Half a paragraph, and the other facts on the way.
        assert abs(count_tokens(tokenizer, haystack.text[:start]) - depth * size) < 150


def test_the_excerpt_is_the_text_itself_but_for_the_facts(tokenizer) -> None:
    haystack = plant(TEXT, FACTS, (0.9, 0.1, 0.5), 1000, tokenizer)
    left = haystack.text
    for fact in FACTS:
        assert left.count(fact.sentence + "\n\n") == 1
        left = left.replace(fact.sentence + "\n\n", "")
    assert TEXT.startswith(left)


def test_the_tokens_of_facts_and_document(tokenizer) -> None:
    tokenizer.chat_template = None
    haystack = plant(TEXT, FACTS, (0.1, 0.5, 0.9), 800, tokenizer)
    plain = prompt(haystack, tokenizer)
    tokenizer.chat_template = "<s>{% for message in messages %}user: {{ message['content'] }}</s>reply: {% endfor %}"
    chat = prompt(haystack, tokenizer)
    tokenizer.chat_template = None
    assert chat.tokens[0] == tokenizer.bos_token_id
    assert chat.tail == "</s>reply: "
    assert chat.document[0] == plain.document[0] + len("user: ") + 1
    for made in (plain, chat):
        assert tokenizer.decode(made.tokens) == "".join(made.pieces)
        assert "".join(made.pieces[slice(*made.document)]) == haystack.text
        for fact, (first, end) in zip(FACTS, made.facts, strict=True):
            assert "".join(made.pieces[first:end]) == fact.sentence


def test_a_template_that_rewrites_the_text_is_refused(tokenizer) -> None:
    haystack = plant(TEXT, FACTS, (0.1, 0.5, 0.9), 800, tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(TextError, match="rewrites"):
        prompt(haystack, tokenizer)
    tokenizer.chat_template = None


@pytest.mark.parametrize("depths", [(0.1, 0.5), (0.1, 0.5, 1.2), (-0.1, 0.5, 0.6)])
def test_bad_depths(tokenizer, depths: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=r"one depth in 0\.\.1 for each of 3 facts"):
        plant(TEXT, FACTS, depths, 1000, tokenizer)


def test_too_little_room_or_text(tokenizer) -> None:
    with pytest.raises(TextError, match="do not fit into 60 tokens"):
        plant(TEXT, FACTS, (0.1, 0.5, 0.9), 60, tokenizer)
    with pytest.raises(TextError, match="give more text"):
        plant(TEXT, FACTS, (0.1, 0.5, 0.9), 100_000, tokenizer)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("It is 7412.", True), ("7412", True), ("17412", False), ("74125", False), ("7 412", False), ("", False)],
)
def test_grading_wants_the_answer_as_a_word(answer: str, right: bool) -> None:
    assert grade(answer, FACTS[0]) is right


def test_the_demo_facts_hold_their_answers_and_no_other() -> None:
    for fact in FACTS:
        assert [grade(other.sentence, fact) for other in FACTS] == [other is fact for other in FACTS]
        assert not grade(fact.question, fact)
