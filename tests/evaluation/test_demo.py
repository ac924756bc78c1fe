from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from hashattention import HashMaps, load_model
from hashattention.errors import ArtifactError, ConfigError, InputError
from hashattention.evaluation.demo import DemoConfig, Reader, run
from hashattention.evaluation.needle import FACTS, Haystack, prompt

CONFIG = DemoConfig(densities=(1.0, 0.25), tokens=700, question_tokens=64, answer_tokens=3, timed_steps=2)


@pytest.fixture(scope="module")
def loaded(tiny_model_folder: Path):
    return load_model(tiny_model_folder)


@pytest.fixture(scope="module")
def result(loaded, tiny_maps_folder: Path):
    return run(loaded, HashMaps.from_pretrained(tiny_maps_folder), CONFIG)


def test_the_rows(result) -> None:
    dense, whole, quarter = result.settings
    assert [setting.density for setting in result.settings] == [None, 1.0, 0.25]
    assert 650 < len(result.prompt.tokens) <= 700
    assert dense.mean_error == 0
    assert quarter.mean_error > 0
    assert 0 < quarter.mean_mass < dense.mean_mass == 1
    assert list(quarter.error) == [0, 1]
    assert all(setting.milliseconds > 0 for setting in result.settings)
    # Everything attended is dense attention: the same answers and the same bytes.
    assert [answer.text for answer in whole.answers] == [answer.text for answer in dense.answers]
    assert (whole.attended, whole.kv_bytes) == (dense.attended, dense.kv_bytes)


def test_bytes_are_those_of_the_rows_attended(result) -> None:
    dense, _, quarter = result.settings
    # 2 layers, 2 KV heads, K and V of 16 float32 numbers.
    assert dense.kv_bytes == pytest.approx(dense.attended * 2 * 2 * 2 * 16 * 4)
    assert quarter.kv_bytes == pytest.approx(quarter.attended * 2 * 2 * 2 * 16 * 4)
    assert quarter.attended <= 0.25 * (dense.attended + CONFIG.answer_tokens)
    # 2 layers, 2 heads, 32 bits a token; new tokens come on top of the prompt.
    assert dense.attended * 16 <= quarter.signature_bytes <= (dense.attended + CONFIG.answer_tokens) * 16


def test_the_picture_covers_the_prompt(result) -> None:
    for answer in result.settings[2].answers:
        assert len(answer.attention) == len(result.prompt.tokens)
        assert 0 < max(answer.attention) <= 1.0001
    assert all(answer.attention == () for answer in result.settings[0].answers)


def test_the_json_is_plain(result) -> None:
    document = json.loads(json.dumps(result.as_dict()))
    assert len(document["settings"]) == 3
    assert document["settings"][2]["answers"][0].keys() == {"text", "right"}
    assert document["origin"]["version"]
    assert set(document["backends"]) == {"encode_query", "score_select", "attend"}


def test_questions_leave_no_trace(loaded) -> None:
    reader = Reader(loaded.model, loaded.tokenizer, prompt(Haystack("A short text.", (), ()), loaded.tokenizer))
    keys = [layer.keys.clone() for layer in reader.cache.layers]
    question = reader.question(FACTS[0].question)
    first = reader.answer(question, 4)
    reader.step_seconds()
    assert reader.answer(question, 4) == first
    assert all(torch.equal(layer.keys, before) for layer, before in zip(reader.cache.layers, keys, strict=True))


def test_other_maps_are_refused(loaded, tiny_maps_folder: Path) -> None:
    maps = HashMaps.from_pretrained(tiny_maps_folder)
    maps.model = dataclasses.replace(maps.model, num_hidden_layers=7)
    with pytest.raises(ArtifactError, match="num_hidden_layers is 7"):
        run(loaded, maps, CONFIG)


def test_longer_than_the_model_is_refused(loaded, tiny_maps_folder: Path) -> None:
    maps = HashMaps.from_pretrained(tiny_maps_folder)
    with pytest.raises(InputError, match="this model takes 2048"):
        run(loaded, maps, dataclasses.replace(CONFIG, tokens=2000))


@pytest.mark.parametrize("densities", [(0.0,), (0.25, 1.5)])
def test_bad_densities(densities: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="density must be in"):
        DemoConfig(densities=densities)


def test_bad_counts() -> None:
    with pytest.raises(InputError, match="timed_steps must be at least 1"):
        DemoConfig(timed_steps=0)
