from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashattention.config import BaseModel, Budget, MapsConfig, from_mapping
from hashattention.errors import ConfigError

LENGTHS = st.one_of(st.integers(0, 300), st.integers(0, 2_000_000))
PARTS = st.integers(0, 300)
FRACTIONS = st.floats(1e-6, 1.0)
MODEL = BaseModel("LlamaForCausalLM", 4, 32, 8, 128, (0, 1, 2, 3), "default")


@given(FRACTIONS, PARTS, PARTS, LENGTHS)
def test_density_is_never_exceeded(density: float, sink: int, local: int, length: int) -> None:
    counts = Budget(density=density, sink=sink, local=local).counts(length)
    assert min(counts) >= 0
    assert counts[0] <= sink
    assert counts[1] <= local
    assert sum(counts) == (min(length, max(1, math.floor(density * length))) if length else 0)


@given(FRACTIONS, PARTS, st.integers(1, 300), st.integers(1, 10_000))
def test_local_shrinks_first_but_keeps_one_token(density: float, sink: int, local: int, length: int) -> None:
    got_sink, got_local, heavy = Budget(density=density, sink=sink, local=local).counts(length)
    assert got_local >= 1
    if got_local < local:
        assert heavy == 0
    if got_sink < sink:
        assert got_local == 1
        assert heavy == 0


@given(st.one_of(st.integers(0, 5000), FRACTIONS), PARTS, PARTS, LENGTHS)
def test_heavy_comes_on_top_of_sink_and_local(heavy: int | float, sink: int, local: int, length: int) -> None:
    got_sink, got_local, got_heavy = Budget(heavy=heavy, sink=sink, local=local).counts(length)
    assert got_sink == min(sink, length)
    assert got_local == min(local, length - got_sink)
    asked = heavy if isinstance(heavy, int) else math.floor(heavy * length)
    assert got_heavy == min(asked, length - got_sink - got_local)


@given(
    st.one_of(
        FRACTIONS.map(lambda d: {"density": d}), st.one_of(st.integers(0, 500), FRACTIONS).map(lambda h: {"heavy": h})
    ),
    PARTS,
    PARTS,
    st.integers(0, 3000),
    st.integers(0, 3000),
)
def test_capacity_holds_every_shorter_context(
    kind: dict[str, Any], sink: int, local: int, one: int, other: int
) -> None:
    budget = Budget(**kind, sink=sink, local=local)
    assert 1 <= budget.capacity(min(one, other)) <= budget.capacity(max(one, other))
    assert sum(budget.counts(min(one, other))) <= budget.capacity(max(one, other))


def test_heavy_one_is_a_token_and_heavy_one_point_zero_is_all() -> None:
    assert Budget(heavy=1, sink=0, local=0).counts(500) == (0, 0, 1)
    assert Budget(heavy=1.0, sink=0, local=0).counts(500) == (0, 0, 500)
    assert Budget(heavy=0).counts(500) == (16, 64, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"exactly one of density and heavy; given density=None, heavy=None"),
        ({"density": 0.1, "heavy": 5}, r"exactly one of density and heavy; given density=0\.1, heavy=5"),
        ({"density": 0}, r"density must be in \(0, 1\].*given 0"),
        ({"density": 1.5}, r"given 1\.5"),
        ({"density": -0.1}, r"given -0\.1"),
        ({"density": math.nan}, r"given nan"),
        ({"density": "0.1"}, r"density must be a number.*given '0\.1'"),
        ({"heavy": 0.0}, r"heavy as a fraction must be in \(0\.0, 1\.0\]; given 0\.0"),
        ({"heavy": 1.1}, r"given 1\.1"),
        ({"heavy": math.inf}, r"given inf"),
        ({"heavy": -1}, r"heavy as a count must be >= 0 tokens; given -1"),
        ({"heavy": "64"}, r"heavy must be a number.*given '64'"),
        ({"heavy": 5, "sink": -1}, r"sink must be a whole number >= 0 \(tokens\); given -1"),
        ({"heavy": 5, "local": 2.0}, r"local must be a whole number >= 0 \(tokens\); given 2\.0"),
    ],
)
def test_budgets_that_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Budget(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *[
            ({"bits": bits}, rf"bits must be a multiple of 32 from 32 to 256; given {bits}")
            for bits in (0, 48, 288, -32)
        ],
        ({"bits": "64"}, r"bits must be .*given '64'"),
        ({"bits": 64.0}, r"bits must be .*given 64\.0"),
        ({"widths": (8, 8, 8)}, r"widths must hold zero to two positive hidden widths; given \(8, 8, 8\)"),
        ({"widths": (0,)}, r"given \(0,\)"),
        ({"widths": 128}, r"widths must .*given 128"),
        ({"widths": ("8",)}, r"widths must .*given \('8',\)"),
        ({"levels": 0}, r"levels must be from 1 to 127 .*given 0"),
        ({"levels": 128}, r"given 128"),
        ({"score": "cosine"}, r"score must be one of asymmetric, symmetric; given 'cosine'"),
        ({"query_input": "layer"}, r"query_input must be one of group, head"),
        ({"signature_share": "group"}, r"signature_share must be one of kv_head, query_head"),
        ({"selection_share": "kv_head"}, r"selection_share must be one of group, query_head"),
        ({"signature_share": "query_head"}, r"a group code .*signature_share='query_head', selection_share='group'"),
        ({"selection_share": "query_head"}, r"a group code .*selection_share='query_head'"),
    ],
)
def test_maps_that_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MapsConfig(**values)


@pytest.mark.parametrize(
    ("config", "words", "code", "signature", "selection"),
    [
        (MapsConfig(), 2, 8, 8, 8),
        (MapsConfig(query_input="head"), 2, 32, 8, 8),
        (MapsConfig(bits=256, query_input="head", selection_share="query_head"), 8, 32, 8, 32),
        (MapsConfig.paper(), 1, 32, 32, 32),
    ],
)
def test_heads_and_words(config: MapsConfig, words: int, code: int, signature: int, selection: int) -> None:
    assert config.words == words
    assert config.code_heads(MODEL) == code
    assert config.signature_heads(MODEL) == signature
    assert config.selection_heads(MODEL) == selection
    assert MODEL.group_size == 4


def test_the_paper() -> None:
    paper = MapsConfig.paper()
    assert (paper.bits, paper.widths, paper.score, paper.query_input) == (32, (128, 128), "symmetric", "head")


@pytest.mark.parametrize("value", [Budget(density=0.1), MapsConfig.paper(), MODEL])
def test_from_mapping_undoes_asdict_even_through_lists(value: Budget | MapsConfig | BaseModel) -> None:
    values = dataclasses.asdict(value)
    as_json = {key: list(item) if isinstance(item, tuple) else item for key, item in values.items()}
    assert from_mapping(type(value), as_json, "test") == value


def test_from_mapping_names_the_nearest_key() -> None:
    with pytest.raises(ConfigError, match=r"^config\.json: unknown key 'bit'; did you mean 'bits'\?"):
        from_mapping(MapsConfig, {"bit": 64}, "config.json")


def test_from_mapping_lists_the_keys_when_none_is_near() -> None:
    known = r"unknown key 'zzz'; known keys: density, heavy, local, sink, threshold, top_p\."
    with pytest.raises(ConfigError, match=known):
        from_mapping(Budget, {"zzz": 1}, "budget")


def test_from_mapping_names_every_missing_key() -> None:
    with pytest.raises(ConfigError, match=r"^base: missing num_hidden_layers, .*, rope; "):
        from_mapping(BaseModel, {"architecture": "x"}, "base")


def test_configurations_are_frozen() -> None:
    for value in (Budget(heavy=1), MapsConfig(), MODEL):
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.bits = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", ["top_p", "threshold"])
@pytest.mark.parametrize("value", [0, -0.1, 1.01, float("nan"), "0.9"])
def test_shares_of_the_attention_are_above_0_and_at_most_1(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{name} must be in \(0, 1\]"):
        Budget(density=0.5, **{name: value})


def test_a_budget_is_estimated_where_it_may_take_less() -> None:
    assert not Budget(density=0.5).estimated and not Budget(density=0.5, top_p=1.0).estimated
    assert Budget(density=0.5, top_p=0.9).estimated and Budget(density=0.5, threshold=0.1).estimated
