from __future__ import annotations

import pytest

from hashattention.config import BaseModel, MapsConfig
from hashattention.maps import HashMaps
from hashattention.report import maps as rows

BASE = BaseModel("LlamaForCausalLM", 4, 8, 2, 64, (0, 1, 3), "{}")
METRICS = {
    "layers": [0, 3],
    "budgets": [
        {
            "heavy": 0.0625,
            "sink": 16,
            "local": 64,
            "hash": {"error": 0.1, "kept_mass": 0.9, "ratio": 1.25, "error_by_layer": [0.05, 0.15]},
            "exact_shared": {"error": 0.08, "kept_mass": 0.95},
        }
    ],
}


def test_the_cost_of_a_group_code() -> None:
    price = rows.cost(HashMaps(MapsConfig(bits=64, widths=(8,)), BASE))
    assert price["bits_per_token_per_kv_head"] == 64
    assert price["share_of_kv_bytes"] == 64 / (2 * 64 * 16)
    assert price["bytes_per_token"] == 3 * 2 * 8
    assert price["parameters"] == 3 * 2 * ((256 * 8 + 8 + 8 * 64 + 64) + (64 * 8 + 8 + 8 * 64 + 64))


def test_the_paper_keeps_a_signature_for_every_query_head() -> None:
    price = rows.cost(HashMaps(MapsConfig.paper(), BASE))
    assert price["bits_per_token_per_kv_head"] == 4 * 32


def test_metrics_become_rows_even_where_some_are_missing() -> None:
    assert rows.methods(METRICS) == [
        ["1/16", "hash", "0.100", "1.250", "0.900", "-"],
        ["1/16", "exact shared", "0.080", "-", "0.950", "-"],
    ]
    columns, cells = rows.layers(METRICS)
    assert columns == ["layer", "error, 1/16", "kept mass, 1/16"]
    assert cells == [["0", "0.050", "-"], ["3", "0.150", "-"]]


def test_no_metrics_no_rows() -> None:
    assert rows.methods({}) == []
    assert rows.layers({})[1] == []


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([4], "4"), ([0, 2, 3, 4, 9, 10], "0, 2-4, 9-10")])
def test_ranges(numbers: list[int], text: str) -> None:
    assert rows.ranges(numbers) == text
