from __future__ import annotations

import dataclasses

import pytest

from hashattention.errors import TextError
from hashattention.evaluation.prompt import cut, encode, pieces, prompt_tokens
from hashattention.evaluation.tasks.base import Question

QUESTION = Question("0", "Long text.\n", "What?", ("x",), lambda answer: 0.0, 7, answer_prefix=" It is", target=" x")
TEMPLATE = "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


@pytest.fixture
def chat_tokenizer(byte_tokenizer):
    byte_tokenizer.chat_template = TEMPLATE
    yield byte_tokenizer
    byte_tokenizer.chat_template = None


def test_plain_text_without_a_chat_format(byte_tokenizer) -> None:
    prompt = cut(QUESTION, byte_tokenizer)
    assert byte_tokenizer.decode(prompt.context) == "Long text.\n"
    assert byte_tokenizer.decode(prompt.question) == "What? It is"
    assert prompt_tokens(QUESTION, byte_tokenizer) == len("Long text.\nWhat? It is") + 7


def test_the_answer_begins_behind_the_chat_format(chat_tokenizer) -> None:
    prompt = cut(QUESTION, chat_tokenizer)
    assert chat_tokenizer.decode(prompt.context) == "<u>Long text.\n"
    assert chat_tokenizer.decode(prompt.question) == "What?</u><a> It is"
    for plain in (
        cut(QUESTION, chat_tokenizer, chat=False),
        cut(dataclasses.replace(QUESTION, chat=False), chat_tokenizer),
    ):
        assert chat_tokenizer.decode(plain.context + plain.question) == "Long text.\nWhat? It is"


def test_a_long_question_begins_with_the_context(byte_tokenizer) -> None:
    prompt = cut(QUESTION, byte_tokenizer, longest=4)
    assert byte_tokenizer.decode(prompt.question) == "t is"
    assert byte_tokenizer.decode(prompt.context) == "Long text.\nWhat? I"
    shown = pieces(prompt, byte_tokenizer)
    assert "".join(shown) == "Long text.\n"
    assert len(shown) == len(prompt.context)


def test_pieces_join_to_the_text(byte_tokenizer) -> None:
    question = dataclasses.replace(QUESTION, context="Fünf Äpfel — 五\n")
    prompt = cut(question, byte_tokenizer)
    shown = pieces(prompt, byte_tokenizer)
    assert len(shown) == len(prompt.context)
    assert prompt.text == question.context


def test_a_template_that_rewrites_the_text_is_refused(chat_tokenizer) -> None:
    chat_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(TextError, match="rewrites the user's text"):
        cut(QUESTION, chat_tokenizer)


def test_encoding_adds_no_special_tokens_unless_asked(byte_tokenizer) -> None:
    assert len(encode(byte_tokenizer, "abc")) == 3
