from __future__ import annotations

import dataclasses

import pytest
from tests.tiny import build

from hashattention.errors import ConfigError, InputError, UnsupportedModelError
from hashattention.evaluation.plan import Plan, Served, serve
from hashattention.models.describe import describe

PLAN = Plan(tasks=("needle",), methods=("dense", "quest:page=16,bits=4"), densities=(1 / 8, 1 / 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "all"}, "protocol must be question or generation"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"densities": (0.0,)}, "density must be in"),
        ({"densities": (2.0,)}, "density must be in"),
        ({"tasks": ()}, "names no tasks"),
        ({"batch_tokens": -1}, "batch_tokens must be at least 0"),
        ({"shard": (2, 2)}, "shard must be"),
    ],
)
def test_bad_plans(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(**{"tasks": ("needle",), **change})


def test_lengths_over_the_context() -> None:
    plan = Plan(tasks=("needle",), lengths=(512, 1024, 4096))
    plan.check_lengths(4096)
    plan.check_lengths(None)
    with pytest.raises(
        InputError, match="a length of 1024, 4096 tokens was asked for, and this model's context is 1000"
    ):
        plan.check_lengths(1000)


def test_dense_runs_once_and_others_at_every_density() -> None:
    base = describe(build("llama"))
    found = serve(PLAN, base, None, "cpu")
    assert [(one.method, one.density) for one in found] == [
        ("dense", 1.0),
        ("quest:page=16,bits=4", 1 / 8),
        ("quest:page=16,bits=4", 1 / 16),
    ]
    # Minimum and maximum of 16 channels at 4 bits with their scale, for 16 tokens.
    assert found[1].auxiliary_bits == found[1].selector.auxiliary_bits(16)
    assert found[1].budget.counts(4096) == (16, 64, 432)


def test_all_methods_run_at_one_density_before_the_next() -> None:
    plan = dataclasses.replace(PLAN, methods=("oracle", "streaming", "dense"), densities=(1 / 16, 1 / 8))
    found = serve(plan, describe(build("llama")), None, "cpu")
    assert [(one.method, one.density) for one in found] == [
        ("dense", 1.0),
        ("oracle", 1 / 16),
        ("streaming", 1 / 16),
        ("oracle", 1 / 8),
        ("streaming", 1 / 8),
    ]


def test_names() -> None:
    assert Served("quest:page=16,bits=4", 0.1).name == "Quest (page=16, bits=4)"
    assert Served("oracle+sampled:fraction=0.5", 0.1).name == "oracle top-k + sampled tail"
    assert Served("dense", 1.0).name == "dense"


def test_methods_that_cannot_run_say_why() -> None:
    base = describe(build("llama"))
    with pytest.raises(ConfigError, match="unknown method 'qest'; did you mean 'quest'"):
        serve(Plan(tasks=("needle",), methods=("qest",)), base, None, "cpu")
    with pytest.raises(ConfigError, match="method 'hash' needs maps"):
        serve(Plan(tasks=("needle",), methods=("hash",)), base, None, "cpu")
    with pytest.raises(UnsupportedModelError, match=r"cannot run on .*channels is 64, but its heads have 16"):
        serve(Plan(tasks=("needle",), methods=("double_sparsity:channels=64",)), base, None, "cpu")
