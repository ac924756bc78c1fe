from __future__ import annotations

import pytest

from hashattention.errors import ConfigError
from hashattention.train.recipe import Recipe
from hashattention.train.sweep import Sweep


def read(tmp_path, text):
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    return Sweep.from_toml(path)


def test_a_sweep_is_read(tmp_path):
    sweep = read(
        tmp_path,
        """
        layers = [0, 3]
        [recipe]
        steps = 7
        maps.bits = 32
        [[variants]]
        name = "fast"
        learning_rate = 1e-2
        [[variants]]
        name = "wide"
        base = "fast"
        tests = true
        layers = [1]
        [variants.maps]
        widths = [512]
        [grid]
        loss = ["rank", "topk"]
        "maps.bits" = [64, 128]
        """,
    )
    names = ["fast", "wide", *(f"loss {loss}, maps.bits {bits}" for loss in ("rank", "topk") for bits in (64, 128))]
    assert [variant.name for variant in sweep.variants] == names
    fast, wide = (variant.recipe(sweep.recipe) for variant in sweep.variants[:2])
    assert (fast.steps, fast.learning_rate, fast.maps.bits) == (7, 1e-2, 32)
    assert wide.maps.widths == (512,) and wide.maps.bits == 32 and wide.learning_rate == Recipe().learning_rate
    assert sweep.layers == (0, 3) and sweep.variants[1].layers == (1,) and sweep.variants[1].tests
    last = sweep.variants[-1].recipe(sweep.recipe)
    assert (last.loss, last.maps.bits, last.maps.widths) == ("topk", 128, (256,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no variants"),
        ("[[variants]]\nname = 'a'\n[[variants]]\nname = 'a'", "two variants"),
        ("[[variants]]\nname = 'a'\nbase = 'b'", "no variant before it"),
        ("[[variants]]\nname = 'a'\nlerning_rate = 1.0", "did you mean 'learning_rate'"),
        ("[[variants]]\nname = 'a'\nmaps.bit = 32", "did you mean 'bits'"),
        ("[[variants]]\nsteps = 3", "missing name"),
        ("[grid]\nsteps = 3", "list of values"),
        ("judge = 0.5\n[grid]\nsteps = [3]", "one of the budgets"),
        ("layer = [1]\n[grid]\nsteps = [3]", "did you mean 'layers'"),
        ("grid = [", "not a TOML file"),
    ],
)
def test_bad_sweeps_are_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no sweep at"):
        Sweep.from_toml(tmp_path / "none.toml")
