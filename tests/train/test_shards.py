from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tests.tiny import build
from tests.train.bytes_model import tiny_recipe

from hashattention.config import BaseModel
from hashattention.errors import CheckpointError
from hashattention.models.capture import Sample
from hashattention.train import shards
from hashattention.train.recipe import Recipe
from hashattention.train.shards import FolderShards, MemoryShards

BASE = BaseModel("LlamaForCausalLM", 3, 4, 2, 16, (0, 1, 2), "theta")


def sample(seed=0, value=True):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator).bfloat16()  # noqa: E731
    small = torch.arange(5, dtype=torch.int32), torch.rand(3, generator=generator)
    return Sample(draw(3, 2, 20, 16), draw(3, 4, 5, 16), *small, draw(3, 2, 20, 16) if value else None)


def same(one, two):
    names = [field.name for field in dataclasses.fields(Sample)]
    pairs = [(getattr(one, name), getattr(two, name)) for name in names]
    return all(a is b or torch.equal(a, b) for a, b in pairs)


def refuse():
    raise AssertionError("captured again")


@pytest.mark.parametrize("value", [True, False])
def test_what_is_read_is_what_was_written(tmp_path, value):
    folder, memory = FolderShards(tmp_path, {}), MemoryShards()
    for store in (folder, memory):
        store.obtain("a", lambda: sample(value=value))
        store.obtain("b", lambda: sample(1, value))
        assert len(store) == 2
        assert same(store.read(1, 0, 3), sample(1, value))
        assert same(store.read(0, 1, 2), sample(value=value).layers(1, 2))


def test_thinned_samples_are_read_as_they_were_written(tmp_path):
    extra = {"tokens": torch.arange(0, 20, 2), "target": torch.arange(3 * 2 * 4 * 10).view(3, 2, 4, 10).byte()}
    whole = dataclasses.replace(sample(), **extra)
    folder = FolderShards(tmp_path, {})
    folder.obtain("a", lambda: whole)
    assert same(folder.read(0, 0, 3), whole) and same(folder.read(0, 1, 3), whole.layers(1, 3))
    assert whole.layers(1, 3).target.shape[0] == 2 and whole.layers(1, 3).tokens is whole.tokens


def test_what_kept_tokens_teach_is_part_of_a_capture():
    base = dataclasses.replace(BASE, name="here")
    plain, kept = (shards.capture_settings(tiny_recipe(keep_tokens=keep), base, "w", "t") for keep in (0, 64))
    assert "pool" not in plain and kept["pool"] == "mean" and kept["selection_heads"] == base.num_key_value_heads
    few, all_tokens = (shards.sample_bytes(tiny_recipe(keep_tokens=keep), base, held_out=False) for keep in (64, 256))
    assert few < all_tokens
    assert shards.sample_bytes(tiny_recipe(keep_tokens=64), base, held_out=True) == shards.sample_bytes(
        tiny_recipe(), base, held_out=True
    )


def test_whole_shards_are_not_captured_again(tmp_path):
    FolderShards(tmp_path, {"context": 20}).obtain("a", sample)
    again = FolderShards(tmp_path, {"context": 20})
    again.obtain("a", refuse)
    assert same(again.read(0, 0, 3), sample())


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "unlisted"])
def test_a_damaged_shard_is_captured_again(tmp_path, damage):
    FolderShards(tmp_path, {}).obtain("a", sample)
    path = tmp_path / "a.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-10])
    elif damage == "gone":
        path.unlink()
    else:
        (tmp_path / shards.MANIFEST).write_text("{")
    again = FolderShards(tmp_path, {})
    assert not again.holds("a")
    again.obtain("a", lambda: sample(7))
    assert same(again.read(0, 0, 3), sample(7))
    assert FolderShards(tmp_path, {}).holds("a")


def test_shards_of_other_settings_are_refused(tmp_path):
    base = dataclasses.replace(BASE, name="here")
    made = shards.capture_settings(tiny_recipe(), base, "w", "t")
    FolderShards(tmp_path, made).obtain("a", sample)
    FolderShards(
        tmp_path, shards.capture_settings(tiny_recipe(steps=99), dataclasses.replace(BASE, name="there"), "w", "t")
    )
    for changed, message in (
        (shards.capture_settings(tiny_recipe(context=512), base, "w", "t"), "context is 256, this call asks for 512"),
        (shards.capture_settings(tiny_recipe(), base, "other", "t"), "weights is 'w', this call asks for 'other'"),
        (shards.capture_settings(tiny_recipe(), base, "w", "u"), "texts is 't'"),
        (
            shards.capture_settings(tiny_recipe(), dataclasses.replace(BASE, head_dim=32), "w", "t"),
            "model: head_dim is 16",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            FolderShards(tmp_path, changed)
    assert json.loads((tmp_path / shards.MANIFEST).read_text())["settings"]["context"] == 256


def test_two_models_of_one_shape_have_two_fingerprints():
    one, two = shards.weights_fingerprint(build("llama")), shards.weights_fingerprint(build("llama", seed=1))
    assert one == shards.weights_fingerprint(build("llama")) != two


def test_bytes_are_those_of_the_tensors():
    recipe = Recipe(
        context=128, queries=5, step_queries=5, held_out_queries=3, sequences=2, held_out=1, sink=4, local=8
    )
    assert shards.sample_bytes(recipe, BASE, held_out=False) == 2 * 3 * 16 * (2 * 128 + 4 * 5)
    assert shards.sample_bytes(recipe, BASE, held_out=True) == 2 * 3 * 16 * (2 * 2 * 128 + 4 * 3)
    each = [shards.sample_bytes(recipe, BASE, held_out=side) for side in (False, True)]
    assert shards.capture_bytes(recipe, BASE) == 2 * each[0] + each[1]
    short = dataclasses.replace(recipe, lengths=(128, 64))
    half = shards.sample_bytes(recipe, BASE, held_out=False, tokens=64)
    assert half < each[0] and shards.capture_bytes(short, BASE) == each[0] + half + each[1]


def test_too_little_disk_is_refused_before_the_start(tmp_path):
    with pytest.raises(CheckpointError, match=r"need 2\.00 GiB, disk_bytes allows 1\.00 GiB"):
        shards.check_disk(tmp_path, 2 << 30, 1 << 30)
    with pytest.raises(CheckpointError, match="the disk has"):
        shards.check_disk(tmp_path, 1 << 60, None)
    shards.check_disk(tmp_path, 1000, 1000)


def test_positions_are_drawn_for_good():
    recipe = tiny_recipe(queries=64, step_queries=16)
    one, two = (shards.draw_positions(recipe, 3, held_out=False) for _ in range(2))
    assert torch.equal(one, two) and len(one) == 64 and (one.diff() > 0).all()
    assert one.min() >= recipe.sink + recipe.local + 1 and one.max() < 256
    assert not torch.equal(one, shards.draw_positions(recipe, 4, held_out=False))
    assert len(shards.draw_positions(recipe, 3, held_out=True)) == recipe.held_out_queries


def test_the_papers_positions_are_the_ends_of_chunks():
    recipe = dataclasses.replace(Recipe.paper(), context=4096, queries=512)
    found = shards.draw_positions(recipe, 0, held_out=False)
    assert found.tolist() == [*range(2816, 3072), *range(3840, 4096)]
