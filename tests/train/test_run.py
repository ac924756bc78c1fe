from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.train.bytes_model import tiny_model, tiny_recipe, write_texts

from hashattention.config import MapsConfig
from hashattention.errors import CheckpointError, TextError
from hashattention.maps import HashMaps
from hashattention.models.describe import describe
from hashattention.models.rotary import rotary_frequencies
from hashattention.train.recipe import Recipe
from hashattention.train.run import train
from hashattention.train.shards import capture_settings

ROOT = Path(__file__).parents[2]
#: Child k of one process is killed at its k-th moment and the next goes on where it left off; the last one finishes.
KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from tests.train.bytes_model import tiny_model, tiny_recipe
from hashattention.train.run import train
texts, out, moments = sys.argv[1], sys.argv[2], [m.split(":") for m in sys.argv[3].split(",")]
loaded = tiny_model()
for text, count in [*moments, ["", "-1"]]:
    child = os.fork()
    if child == 0:
        left = [int(count)]
        def progress(told, done, total):
            left[0] -= told == text
            if told == text and left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        train(loaded, texts, out, tiny_recipe(), memory_bytes=1, progress=progress)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(-signal.SIGKILL if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
"""
MOMENTS = "capturing queries and keys:1,capturing queries and keys:4,training:1,training:6,training:20,measuring:3"


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path / "texts")


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_in_the_same_bits(tmp_path, texts):
    train(tiny_model(), texts, tmp_path / "whole", tiny_recipe(), memory_bytes=1)
    command = [sys.executable, "-c", KILLED, str(texts), str(tmp_path / "killed"), MOMENTS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(MOMENTS.split(",")) + ["0"], done.stderr
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    configs = [HashMaps.from_pretrained(tmp_path / name).training_info["metrics"] for name in ("whole", "killed")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_folder_is_complete_and_work_is_gone(tmp_path, texts, in_memory):
    loaded, out = tiny_model(), tmp_path / "maps"
    report = train(loaded, texts, out, tiny_recipe(), in_memory=in_memory, command="hashattention train tiny")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    maps = HashMaps.from_pretrained(out, describe(loaded.model))
    assert maps.training_info == {key: value for key, value in report.items() if key != "out"}
    assert Recipe.from_mapping(report["recipe"], "stored") == tiny_recipe()
    assert report["origin"]["command"] == "hashattention train tiny"
    rows = report["metrics"]["budgets"]
    assert [row["heavy"] for row in rows] == [1 / 8, 1 / 16, 1 / 32]
    for name in ("error", "kept_mass", "recall"):
        assert len(rows[0]["hash"][f"{name}_by_layer"]) == 3 and rows[0]["hash"][name] > 0


@pytest.mark.parametrize("rope", ["before", "before_keys"])
def test_maps_before_rope_hold_the_frequencies_they_need(tmp_path, texts, rope):
    loaded, maps = tiny_model(), MapsConfig(32, (16,), rope=rope)
    train(loaded, texts, tmp_path, tiny_recipe(maps=maps, step_tokens=64, patience=1, check_every=4))
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["maps"]["rope"] == rope and stored["training"]["recipe"]["maps"]["rope"] == rope
    found = HashMaps.from_pretrained(tmp_path, describe(loaded.model))
    assert found.model.frequencies == rotary_frequencies(loaded.model) and found.config == maps


def test_captures_of_either_kind_are_the_same():
    recipe = tiny_recipe()
    before = dataclasses.replace(recipe, maps=dataclasses.replace(recipe.maps, rope="before"))
    base = describe(tiny_model().model)
    turned = dataclasses.replace(base, frequencies=(1.0,))
    assert capture_settings(recipe, base, "", "") == capture_settings(before, turned, "", "")


def test_memory_and_disk_give_the_same_maps(tmp_path, texts):
    for name, in_memory in (("a", True), ("b", False)):
        train(tiny_model(), texts, tmp_path / name, tiny_recipe(), in_memory=in_memory)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_kept_tokens_train_the_same_maps_in_memory_and_on_disk(tmp_path, texts):
    for name, in_memory in (("a", True), ("b", False)):
        report = train(tiny_model(), texts, tmp_path / name, tiny_recipe(keep_tokens=64), in_memory=in_memory)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert report["recipe"]["keep_tokens"] == 64


def test_the_papers_recipe_runs(tmp_path, texts):
    maps = MapsConfig(32, (16, 16), "symmetric", "head", "query_head", "query_head")
    small = {
        "context": 1024,
        "queries": 64,
        "step_queries": 32,
        "sequences": 2,
        "held_out": 1,
        "steps": 6,
        "prediction_steps": 2,
    }
    recipe = dataclasses.replace(Recipe.paper(), maps=maps, sink=8, local=8, held_out_queries=4, **small)
    report = train(tiny_model(), texts, tmp_path / "maps", recipe)
    assert report["metrics"]["budgets"][0]["hash"]["error"] > 0
    assert HashMaps.from_pretrained(tmp_path / "maps").config == maps


def test_without_held_out_sequences_there_are_no_metrics(tmp_path, texts):
    for keep in (0, 64):
        recipe = tiny_recipe(held_out=0, keep_tokens=keep)
        assert train(tiny_model(), texts, tmp_path / f"{keep}", recipe)["metrics"] == {}


def unfinished(texts, out):
    def stop(text, done, total):
        if text == "training" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), texts, out, tiny_recipe(), progress=stop)


@pytest.mark.parametrize(
    ("recipe", "seed", "message"),
    [
        (tiny_recipe(context=512), 0, "context is 256, this call asks for 512"),
        (tiny_recipe(learning_rate=1.0), 0, "recipe: learning_rate is 0.005"),
        (tiny_recipe(maps=MapsConfig(64, (16,))), 0, "recipe: maps: bits is 32"),
        (tiny_recipe(), 1, "weights is "),
    ],
)
def test_an_unfinished_run_of_other_settings_is_refused(tmp_path, texts, recipe, seed, message):
    unfinished(texts, tmp_path / "maps")
    with pytest.raises(CheckpointError, match=message):
        train(tiny_model(seed), texts, tmp_path / "maps", recipe)
    train(tiny_model(seed), texts, tmp_path / "maps", recipe, resume=False)
    assert HashMaps.from_pretrained(tmp_path / "maps").config == recipe.maps


def test_other_texts_are_refused(tmp_path, texts):
    unfinished(texts, tmp_path / "maps")
    (texts / "0.txt").write_text("something else\n" * 400)
    (texts / "2.txt").write_text("something else\n" * 400)
    with pytest.raises(CheckpointError, match="texts is "):
        train(tiny_model(), texts, tmp_path / "maps", tiny_recipe())


def test_failing_leaves_no_maps_behind(tmp_path, texts):
    with pytest.raises(TextError):
        train(tiny_model(), texts / "missing.txt", tmp_path / "maps", tiny_recipe())
    with pytest.raises(CheckpointError, match="disk_bytes allows"):
        train(tiny_model(), texts, tmp_path / "maps", tiny_recipe(), disk_bytes=1000)
    assert not (tmp_path / "maps" / "config.json").exists()


def test_a_model_may_be_named(tmp_path, texts, monkeypatch):
    asked = []

    def load_model(name, **options):
        asked.append((name, options["dtype"]))
        return tiny_model()

    monkeypatch.setattr("hashattention.models.source.load_model", load_model)
    report = train("some-model", texts, tmp_path / "maps", tiny_recipe(steps=2), device="cpu")
    assert asked == [("some-model", torch.float32)] and report["out"] == str(tmp_path / "maps")


@pytest.mark.gpu
@pytest.mark.parametrize("keep", [0, 64])
def test_training_on_a_gpu_runs_whole(texts, tmp_path, keep):
    loaded = tiny_model()
    loaded = dataclasses.replace(loaded, model=loaded.model.cuda())
    report = train(loaded, texts, tmp_path / "maps", tiny_recipe(keep_tokens=keep))
    maps = HashMaps.from_pretrained(tmp_path / "maps")
    assert maps.remainder is not None and maps.temperatures is not None
    assert all(0 < row["hash"]["error"] < 1 for row in report["metrics"]["budgets"])
