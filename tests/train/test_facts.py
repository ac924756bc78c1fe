from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from tests.train.bytes_model import ByteTokenizer, tiny_recipe

from hashattention.errors import ConfigError
from hashattention.train.facts import plant, room
from hashattention.train.recipe import Recipe
from hashattention.train.shards import draw_positions


class Tokenizer(ByteTokenizer):
    def decode(self, tokens):
        return bytes(tokens).decode()


TEXT = torch.tensor(list(b"a line of plain text\n" * 400)[:8000])


def test_planted_facts_are_asked_for_at_the_end():
    tokens, facts = plant(Tokenizer(), TEXT, random.Random(0))
    said, asked = bytes(tokens[facts].tolist()).decode(), bytes(tokens[-room(8000) :].tolist()).decode()
    answers = [line.removeprefix("Answer: ") for line in asked.split("\n") if line.startswith("Answer: ")]
    assert len(tokens) == 8000 and len(answers) > 4 and all(answer in said for answer in answers)


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
