from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hashattention import HashMaps
from hashattention.cli import train as module
from hashattention.cli.train import adjust, with_rate
from hashattention.errors import ConfigError
from hashattention.train.recipe import Recipe

RECIPE = """
context = 128
sequences = 2
held_out = 1
queries = 8
held_out_queries = 4
steps = 3
step_queries = 4
top = 4
sink = 2
local = 4
budgets = [0.25]
[maps]
bits = 32
widths = [8]
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"Line {number} of a book about {number % 7} things.\n" for number in range(200)))
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def test_text_becomes_maps_that_inspect_reads(invoke, last_json, tiny_model_folder, text, recipe, tmp_path) -> None:
    out = tmp_path / "maps"
    words = "--text", text, "--recipe", recipe, "--steps", 2, "--out", out, "--device", "cpu", "--json"
    done = invoke("train", tiny_model_folder, *words)
    assert done.exit_code == 0, (done.stderr, done.exception)
    told = last_json(done)
    assert told["recipe"]["steps"] == 2
    assert told["origin"]["version"]
    assert HashMaps.from_pretrained(out).config.bits == 32
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    seen = last_json(invoke("inspect", out, "--json"))
    assert seen["training"]["recipe"] == told["recipe"]
    assert seen["training"]["origin"] == told["origin"]
    assert "exact shared" in invoke("inspect", out).stderr


def test_an_unknown_recipe_key(refused, tiny_model_folder, text, recipe, tmp_path) -> None:
    recipe.write_text("stepps = 3\n")
    said = refused("train", tiny_model_folder, "--text", text, "--recipe", recipe, "--out", tmp_path / "maps")
    assert "unknown key 'stepps'; did you mean 'steps'?" in said
    assert not (tmp_path / "maps").exists()


def test_missing_recipe_text_and_model(refused, tiny_model_folder, text, recipe, tmp_path) -> None:
    out, gone = tmp_path / "maps", tmp_path / "gone.txt"
    assert "no recipe at" in refused("train", tiny_model_folder, "--text", text, "--recipe", gone, "--out", out)
    assert "no text file" in refused("train", tiny_model_folder, "--text", gone, "--recipe", recipe, "--out", out)
    assert "no folder or file" in refused("train", gone.with_suffix(""), "--text", text, "--out", out)
    assert not out.exists()


def test_too_little_text(refused, tiny_model_folder, text, recipe, tmp_path) -> None:
    words = "--text", text, "--recipe", recipe, "--sequences", 5000, "--out", tmp_path / "maps"
    assert "need" in refused("train", tiny_model_folder, *words)
    assert not (tmp_path / "maps").exists()


def test_out_is_a_file(refused, tiny_model_folder, text) -> None:
    assert "is a file; give a folder" in refused("train", tiny_model_folder, "--text", text, "--out", text)


def test_a_shorter_context_asks_for_no_more_queries_than_there_are() -> None:
    short = adjust(Recipe.group(), context=256, steps=None, sequences=3)
    assert (short.context, short.sequences, short.steps) == (256, 3, Recipe.group().steps)
    assert short.queries == len(short.positions_from()) == 175
    assert short.step_queries == 175
    assert adjust(Recipe.paper(), context=None, steps=None, sequences=None) == Recipe.paper()
    assert adjust(Recipe.group(), context=4096) == dataclasses.replace(Recipe.group(), context=4096)


@pytest.mark.parametrize("given", [{"steps": 0}, {"sequences": -1}, {"context": 10}])
def test_values_a_recipe_does_not_allow(given: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        adjust(Recipe.group(), **given)


def test_a_context_replaces_the_recipes_lengths() -> None:
    mixed = dataclasses.replace(Recipe.group(), lengths=(4096, 8192))
    assert adjust(mixed, context=2048).lengths == () and adjust(mixed, steps=3).lengths == (4096, 8192)


def test_training_tells_its_rate_without_the_resumed_steps(monkeypatch) -> None:
    clock, told = iter([0.0, 2.0, 10.0, 100.0]), []
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    report = with_rate(lambda text, done, total: told.append(text))
    for text, done in [("training", 40), ("training", 44), ("training", 45), ("training", 60), ("measuring", 1)]:
        report(text, done, 100)
    report("training", 0, 50)
    assert told == [
        "training", "training (2 steps/s, 44 of 100)", "training (2 steps/s, 44 of 100)",
        "training (2 steps/s, 60 of 100)", "measuring", "training",
    ]  # fmt: skip
