from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hashattention.config import MapsConfig
from hashattention.errors import ConfigError
from hashattention.train.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def test_paper_is_the_published_recipe():
    recipe = Recipe.paper()
    assert recipe.maps == MapsConfig(32, (128, 128), "symmetric", "head", "query_head", "query_head")
    assert (recipe.loss, recipe.top, recipe.alpha, recipe.beta) == ("bce", 64, 20.0, 0.0)
    assert (recipe.learning_rate, recipe.schedule, recipe.weight_decay) == (1e-3, "constant", 0.0)
    positions = recipe.positions_from()
    assert len(positions) == recipe.queries and set(p % 1024 for p in positions) == set(range(768, 1024))


def test_committed_recipes_load():
    assert Recipe.from_toml(RECIPES / "paper.toml") == Recipe.paper()
    assert Recipe.from_toml(RECIPES / "smollm2-135m-instruct.toml").maps == MapsConfig(widths=(112,))


@pytest.mark.parametrize("recipe", [Recipe.group(), Recipe.paper()])
def test_plain_values_give_the_recipe_back(recipe):
    assert Recipe.from_mapping(recipe.as_dict(), "test") == recipe


def test_names_and_files(tmp_path):
    assert Recipe.named("paper") == Recipe.paper()
    assert Recipe.named("group") == Recipe.group() == dataclasses.replace(Recipe(), step_tokens=2048, steps=3000)
    path = tmp_path / "own.toml"
    path.write_text("steps = 7\n[maps]\nbits = 32\n")
    assert Recipe.named(path) == Recipe(steps=7, maps=MapsConfig(bits=32))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stepps = 7", "did you mean 'steps'"),
        ("[maps]\nbit = 32", "did you mean 'bits'"),
        ("maps = 3", "a table"),
        ("steps = [", "not a TOML file"),
        ("loss = 'mse'", "one of distill, topk, mix, rank, bce"),
        ("steps = 0", "whole number >= 1"),
        ("steps = 1.5", "whole number >= 1"),
        ("context = 60", r"at least sink \+ local"),
        ("step_queries = 999", "at most queries = 512"),
        ("context = 512", "at most 431"),
        ("top_mix = 2.0", "in 0..1"),
        ("learning_rate = 0.0", "above 0"),
        ("budgets = [0.0]", "fractions"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, message):
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        Recipe.from_toml(path)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"no recipe at nowhere\.toml"):
        Recipe.named("nowhere.toml")


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().steps = 3
