from __future__ import annotations

import dataclasses
import random
import re

import pytest
import torch
from tests.train.bytes_model import ByteTokenizer, tiny_recipe

from hashattention.errors import ConfigError
from hashattention.train.facts import KINDS, plant, room
from hashattention.train.recipe import Recipe
from hashattention.train.shards import draw_positions


class Tokenizer(ByteTokenizer):
    def decode(self, tokens):
        return bytes(tokens).decode()


TEXT = torch.tensor(list(b"a line of plain text\n" * 400)[:8000])


class ChatTokenizer(Tokenizer):
    chat_template = "there is one"

    def apply_chat_template(self, turns, tokenize):
        return "<s>" + "".join(f"[{turn['role']}] {turn['content']}\n" for turn in turns)


def pairs(asked, question, answer):
    """The questions and answers in a text, by what stands before them."""
    found = re.findall(rf"^{question}(.+)\n{answer}(.+)$", asked, re.MULTILINE)
    return dict(found)


def said_by_kind(text, asked):
    """What a text says of the name that a question asks for, by the forms of facts."""
    for kind in KINDS:
        pattern = re.escape(kind.asked).replace(re.escape("{name}"), "(.+)")
        if named := re.fullmatch(pattern, asked):
            said = re.escape(kind.said).replace(re.escape("{value}"), "(.+)")
            return re.findall(said.replace(re.escape("{name}"), re.escape(named[1])), text)
    raise AssertionError(asked)


@pytest.mark.parametrize(
    ("tokenizer", "marks"),
    [(Tokenizer(), ("Question: ", "Answer: ")), (ChatTokenizer(), (r"\[user\] ", r"\[assistant\] "))],
    ids=["plain", "chat"],
)
def test_planted_facts_are_asked_for_at_the_end(tokenizer, marks):
    tokens, facts = plant(tokenizer, TEXT, random.Random(0))
    said = bytes(tokens[facts].tolist()).decode()
    asked = pairs(bytes(tokens[-room(8000) :].tolist()).decode(), *marks)
    assert len(tokens) == 8000 and len(asked) > 4
    assert all(said_by_kind(said, question) == [answer] for question, answer in asked.items())
    others = torch.ones(8000, dtype=torch.bool).index_fill(0, facts, False)
    assert not any(said_by_kind(bytes(tokens[others].tolist()).decode(), question) for question in asked)


def test_a_long_frame_leaves_short_text_as_it_is():
    class Wordy(ChatTokenizer):
        def apply_chat_template(self, turns, tokenize):
            return "rules " * 400 + super().apply_chat_template(turns, tokenize)

    tokens, facts = plant(Wordy(), TEXT[:2000], random.Random(0))
    assert torch.equal(tokens, TEXT[:2000]) and not len(facts)


def test_the_same_seed_plants_the_same_and_short_text_stays():
    one, two, other = (plant(Tokenizer(), TEXT, random.Random(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    tokens, facts = plant(Tokenizer(), TEXT[:100], random.Random(0))
    assert torch.equal(tokens, TEXT[:100]) and not len(facts)


def test_whole_turns_of_lengths_ask_and_half_of_the_queries_lie_there():
    recipe = Recipe(context=8192, lengths=(4096, 8192), facts=0.5, queries=64, step_queries=32)
    assert [recipe.asks(number) for number in range(8)] == [False, False, True, True] * 2
    positions = draw_positions(recipe, 3, held_out=False)
    assert len(positions) == 64 and (positions >= 8192 - room(8192)).sum() == 32


def test_a_share_above_one_is_refused():
    with pytest.raises(ConfigError, match=r"facts must be in 0\.\.1; given 1\.5"):
        dataclasses.replace(tiny_recipe(), facts=1.5)
