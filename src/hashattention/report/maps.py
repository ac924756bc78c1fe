"""What a maps folder holds, as rows for people: whose maps, what they cost, how they were trained and measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from hashattention.maps import HashMaps

#: Bits of one number of K or V in the cache that costs are compared with.
CACHE_BITS = 16


def cost(maps: HashMaps) -> dict[str, float]:
    """What the signatures of one token take, beside its K and V in 16 bits a number.

    Returns
    -------
    dict
        `bits_per_token_per_kv_head`, `share_of_kv_bytes` (0.03 is 3 %), `bytes_per_token` (all layers), `parameters`.
    """
    config, model = maps.config, maps.model
    bits = config.bits * config.signature_heads(model) / model.num_key_value_heads
    return {
        "bits_per_token_per_kv_head": bits,
        "share_of_kv_bytes": bits / (2 * CACHE_BITS * model.head_dim),
        "bytes_per_token": bits / 8 * model.num_key_value_heads * len(model.layers),
        "parameters": sum(parameter.numel() for parameter in maps.parameters()),
    }


def fields(found: dict[str, Any]) -> list[list[str]]:
    """Name and value of everything `hashattention inspect` found, but for the metrics."""
    price, training = found["cost"], found["training"]
    rows: dict[str, Any] = {f"base model: {key}": value for key, value in found["base_model"].items()}
    rows["base model: layers"] = ranges(found["base_model"]["layers"])
    rows |= {f"maps: {key}": value for key, value in found["maps"].items()}
    rows["signature per token and KV head"] = f"{price['bits_per_token_per_kv_head']:g} bits"
    rows[f"share of K and V bytes ({CACHE_BITS} bit)"] = f"{price['share_of_kv_bytes']:.2%}"
    rows["signatures per token, all layers"] = f"{price['bytes_per_token']:,.0f} bytes"
    rows["parameters"] = f"{price['parameters']:,}"
    rows["beside the maps"] = ", ".join(found["holds"]) or "nothing"
    rows |= {f"file: {name}": f"{size / 1e6:,.2f} MB" for name, size in found["files"].items()}
    rows |= {f"training: {key}": value for key, value in _flat(training.get("origin", {})).items()}
    rows |= {f"recipe: {key}": value for key, value in _flat(training.get("recipe", {})).items()}
    return [[key, _text(value)] for key, value in rows.items()]


def methods(metrics: dict[str, Any]) -> list[list[str]]:
    """Heavy budget, method, error, ratio to exact shared selection, kept mass and recall: means over layers."""
    return [
        [
            _share(row["heavy"]),
            name.replace("_", " "),
            *(_number(values.get(field)) for field in ("error", "ratio", "kept_mass", "recall")),
        ]
        for row in metrics.get("budgets", [])
        for name, values in row.items()
        if isinstance(values, dict)
    ]


METHOD_COLUMNS = ["heavy", "selection", "output error", "ratio to exact shared", "mass kept", "recall of top 64"]


def layers(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: the hash maps' error and kept mass of every layer at every heavy budget."""
    measured = [row for row in metrics.get("budgets", []) if "hash" in row]
    fields = ("error", "kept_mass")
    columns = ["layer", *(f"{field.replace('_', ' ')}, {_share(row['heavy'])}" for row in measured for field in fields)]
    rows = [
        [str(layer), *(_number(_at(row["hash"], f"{field}_by_layer", i)) for row in measured for field in fields)]
        for i, layer in enumerate(metrics.get("layers", []))
    ]
    return columns, rows if measured else []


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as ranges.

    Examples
    --------
    >>> ranges([0, 1, 2, 5])
    '0-2, 5'
    """
    # Along a run of consecutive numbers, number minus place is constant.
    groups = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": text for inner, text in _flat(value).items()}
        else:
            flat[key] = value
    return flat


def _at(values: dict[str, Any], key: str, index: int) -> float | None:
    found = values.get(key, [])
    return found[index] if index < len(found) else None


def _share(heavy: float | int) -> str:
    return f"1/{round(1 / heavy)}" if isinstance(heavy, float) and heavy > 0 else str(heavy)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
