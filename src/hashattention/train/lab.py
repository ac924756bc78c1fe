"""Lab: one capture of a model, many recipes trained on it, a row of held-out quality each; resumable."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hashattention import provenance
from hashattention.config import BaseModel, Budget
from hashattention.errors import ConfigError
from hashattention.maps import HashMaps
from hashattention.models.packaged import Progress
from hashattention.selectors.lsh import draw_hyperplanes, linear_maps
from hashattention.train import budgets, metrics, run, shards
from hashattention.train.fit import CPU_BYTES, fit
from hashattention.train.recipe import Recipe
from hashattention.train.shards import MemoryShards
from hashattention.train.sweep import BEST, Sweep, Variant
from hashattention.train.targets import KeptTargets, StoredTargets, Targets, free_bytes, stored_bytes
from hashattention.train.text import Texts, sequences

if TYPE_CHECKING:
    from hashattention.models.source import LoadedModel

ROWS = "rows.jsonl"
#: The row of the methods that no variant changes.
REFERENCES = "references"
#: Random hyperplanes that stand beside the learned bits.
HYPERPLANES = (64, 128)
#: Recipe fields that stored targets depend on.
_TARGET_FIELDS = ("pool", "weigh", "top", "top_mix", "temper", "sink", "local", "sequences")

Row = dict[str, Any]


class Lab:
    """A study in progress.

    Parameters
    ----------
    loaded : LoadedModel
    sweep : Sweep
    out : path
        Rows go to `out`/rows.jsonl, maps to `out`/<variant>; a variant whose row is there is not trained again.
    texts, held_out_texts : optional
        In place of the sweep's.
    tell : callable, optional
        Called with each new row.
    progress : callable, optional
        Called as ``progress(text, done, total)``.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sweep: Sweep,
        out: str | os.PathLike[str],
        *,
        texts: Texts | None = None,
        held_out_texts: Texts | None = None,
        command: str | None = None,
        tell: Callable[[Row], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        from hashattention.models.describe import describe
        from hashattention.models.rotary import rotary_frequencies

        self.sweep, self.out, self.command, self.tell, self.progress = sweep, Path(out), command, tell, progress
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.device = next(loaded.model.parameters()).device
        name = loaded.source.hub_id or Path(loaded.source.name).name
        self.base = dataclasses.replace(describe(loaded.model), name=name)
        if _unrotates(sweep):
            self.base = dataclasses.replace(self.base, frequencies=rotary_frequencies(loaded.model))
        self.texts = texts if texts is not None else sweep.texts
        self.held_out_texts = held_out_texts if held_out_texts is not None else sweep.held_out_texts
        self.budgets = [Budget(heavy=b, sink=sweep.recipe.sink, local=sweep.recipe.local) for b in sweep.recipe.budgets]
        self.rows = read_rows(self.out)
        self.tests: dict[str, MemoryShards] = {}
        self._narrow: tuple[tuple[int, ...], MemoryShards, MemoryShards] | None = None
        self._stored: tuple[Any, StoredTargets] | None = None

    def run(self) -> list[Row]:
        """Capture, then train and measure every variant that has no row yet; all rows in the sweep's order."""
        self._capture()
        for variant in self.sweep.variants:
            recipe, layers = self._resolve(variant), self._layers(variant)
            self._reference(layers)
            if self.find(variant.name, layers, recipe) is None:
                self._train(variant, recipe, layers)
        return self.rows

    def find(self, name: str, layers: tuple[int, ...], recipe: Recipe | None = None) -> Row | None:
        """The row of a variant on these layers of this text, if there is one with this recipe."""
        for row in reversed(self.rows):
            same = row["variant"] == name and tuple(row["layers"]) == layers and row["text"] == self.fingerprint
            # Fields that came after the row was made have their defaults.
            if same and (recipe is None or Recipe.from_mapping(row["recipe"], f"{self.out}/{ROWS}") == recipe):
                return row
        return None

    def _capture(self) -> None:
        weighed = any(variant.changes.get("weigh", "none") != "none" for variant in self.sweep.variants)
        recipe = self.sweep.recipe
        if weighed and recipe.weigh == "none":
            recipe = dataclasses.replace(recipe, weigh="value")
        text = sequences(
            self.tokenizer, self.texts, context=recipe.context, count=recipe.sequences, held_out=recipe.held_out,
            seed=recipe.seed, held_out_texts=self.held_out_texts, lengths=recipe.lengths,
            asks=recipe.asks, progress=self.progress,
        )  # fmt: skip
        self.text, self.fingerprint = text, text.fingerprint
        self.captured = run.capture_all(self.model, self.base, text, recipe, None, {}, self.progress)
        for name, where in self.sweep.tests.items():
            other = sequences(
                self.tokenizer, [], context=recipe.context, count=0, held_out=self.sweep.test_sequences,
                seed=recipe.seed, held_out_texts=where,
            )  # fmt: skip
            found = run.capture_all(self.model, self.base, other, recipe, None, {}, self.progress)
            self.tests[name] = found.held_out  # type: ignore[assignment]

    def _resolve(self, variant: Variant) -> Recipe:
        if variant.base != BEST:
            named = {each.name: each for each in self.sweep.variants}
            start = self._resolve(named[variant.base]) if variant.base else self.sweep.recipe
            return self._allowed(variant.recipe(start), variant)
        before = self.sweep.variants[: self.sweep.variants.index(variant)]
        rows = [self.find(each.name, self._layers(each)) for each in before]
        scored = [row for row in rows if row is not None]
        # Variants on other layers have another yardstick; the ratio is what can be compared at all.
        best = min(scored, key=lambda row: float(row["score"])) if scored else None
        start = Recipe.from_mapping(best["recipe"], "rows") if best else self.sweep.recipe
        return self._allowed(variant.recipe(start), variant)

    def _allowed(self, recipe: Recipe, variant: Variant) -> Recipe:
        """The recipe, if it can be trained on what was captured. A seed of its own is that of weights and draws, not of
        the text.
        """
        mine, theirs = (shards.capture_settings(each, self.base, "", "") for each in (self.sweep.recipe, recipe))
        for name in dict.fromkeys((*mine, *theirs)):
            held, value = mine.get(name), theirs.get(name)
            fewer = name == "sequences" and recipe.sequences <= self.sweep.recipe.sequences
            if name not in ("values", "seed") and value != held and not fewer:
                raise ConfigError(
                    f"variant {variant.name!r}: {name} is {value!r}, but the sweep captures {held!r}; "
                    "give it a sweep of its own (fewer sequences are allowed)."
                )
        return recipe

    def _layers(self, variant: Variant) -> tuple[int, ...]:
        layers = variant.layers or self.sweep.layers or self.base.layers
        unknown = sorted(set(layers) - set(self.base.layers))
        if unknown:
            raise ConfigError(f"sweep: layers {unknown} have no full attention; there are {list(self.base.layers)}.")
        return layers

    def _samples(self, layers: tuple[int, ...]) -> tuple[MemoryShards, MemoryShards]:
        if self._narrow is None or self._narrow[0] != layers:
            both = (_only(each, self._rows_of(layers)) for each in (self.captured.train, self.captured.held_out))
            self._narrow = layers, *both  # type: ignore[assignment]
        assert self._narrow is not None
        return self._narrow[1:]

    def _rows_of(self, layers: tuple[int, ...]) -> list[int]:
        return [self.base.layers.index(layer) for layer in layers]

    def _reference(self, layers: tuple[int, ...]) -> Row:
        found = self.find(REFERENCES, layers, self.sweep.recipe)
        if found is not None:
            return found
        base = dataclasses.replace(self.base, layers=layers)
        methods: dict[str, HashMaps | None] = dict.fromkeys((*metrics.EXACT, *metrics.MORE))
        for bits in HYPERPLANES:
            methods[f"hyperplanes_{bits}"] = linear_maps(base, draw_hyperplanes(base, bits, 0))
        row = self._row(REFERENCES, layers, self._measure(methods, self._samples(layers)[1], layers))
        for name, samples in self.tests.items():
            table = self._measure(methods, _only(samples, self._rows_of(layers)), layers)
            row.setdefault("tests", {})[name] = self._summary(table)
        return self._add(row)

    def _train(self, variant: Variant, recipe: Recipe, layers: tuple[int, ...]) -> None:
        base, (samples, held_out) = dataclasses.replace(self.base, layers=layers), self._samples(layers)
        begun = time.monotonic()
        fewer = _first(samples, recipe.sequences)
        targets = self._targets(fewer, recipe, layers)
        taught = time.monotonic()
        options: dict[str, Any] = {"targets": targets, "held_out": held_out, "progress": self.progress}
        maps = fit(fewer, base, recipe, None, device=self.device, **options)
        trained = time.monotonic()
        if recipe.fit_budgets:
            maps.shares = self._shares(maps, held_out, recipe, base)
        methods: dict[str, HashMaps | None] = {"hash": maps}
        if variant.save:
            # As `train` leaves it; the model reads some sequences again, which would be slow for every variant.
            maps.remainder = run.fit_remainder(self.model, base, self.text, maps, recipe, progress=self.progress)
            methods[metrics.FILLED] = maps
        row = self._row(variant.name, layers, self._measure(methods, held_out, layers))
        bits = recipe.maps.bits * recipe.maps.signature_heads(base) // base.num_key_value_heads
        row |= {
            "recipe": recipe.as_dict(),
            "bits_per_kv_head": bits,
            "score": next(each["hash"]["ratio"] for each in row["budgets"] if each["heavy"] == self.sweep.judge),
            "parameters": sum(tensor.numel() for tensor in maps.parameters()),
            "seconds": {
                "targets": round(taught - begun, 2),
                "training": round(trained - taught, 2),
                "measuring": round(time.monotonic() - trained, 2),
            },
        }
        if maps.shares is not None:
            row["shares"] = maps.shares
        if variant.tests:
            row["tests"] = self._test(maps, layers)
        if variant.save:
            maps.temperatures = run.fit_temperatures(fewer, base, maps, recipe, self.device)
            maps.training_info = {key: row[key] for key in ("recipe", "text", "origin")}
            maps.training_info["metrics"] = by_layer(row, self._reference(layers))
            maps.cpu().save_pretrained(self.out / variant.name.replace("/", "-"), recipe.stored)
        self._add(row)

    def _shares(self, maps: HashMaps, held_out: MemoryShards, recipe: Recipe, base: BaseModel) -> budgets.Shares:
        """Budgets fitted on half of the held-out sequences; the test texts alone judge them."""
        half = shards.Part(held_out, 0, len(held_out) // 2)
        budget = Budget(heavy=float(recipe.fit_budgets), sink=recipe.sink, local=recipe.local)
        errors = budgets.curves(half, base, maps, budget, self.device)["hash"][..., 0]
        return budgets.as_shares(budgets.allocate(errors), recipe.maps.selection_heads(base))

    def _test(self, maps: HashMaps, layers: tuple[int, ...]) -> dict[str, Any]:
        reference = self._reference(layers)["tests"]
        found = {}
        for name, samples in self.tests.items():
            table = self._measure({"hash": maps}, _only(samples, self._rows_of(layers)), layers)
            found[name] = self._summary(table, reference[name])
        return found

    def _targets(self, samples: MemoryShards, recipe: Recipe, layers: tuple[int, ...]) -> Targets | None:
        """Stored once for all variants that share them; None where the device has no room, or the loss wants labels."""
        if recipe.keep_tokens:
            return KeptTargets(recipe)
        if recipe.loss == "bce":
            return None
        selection_heads = recipe.maps.selection_heads(self.base)
        key = (
            layers,
            selection_heads,
            recipe.loss == "topk",
            *(getattr(recipe, name) for name in _TARGET_FIELDS),
        )
        if self._stored is None or self._stored[0] != key:
            self._stored = None
            base = dataclasses.replace(self.base, layers=layers)
            room = 0.8 * free_bytes(self.device) if self.device.type == "cuda" else CPU_BYTES
            if stored_bytes(recipe, base, len(samples), len(layers)) > room:
                return None
            self._stored = key, StoredTargets(samples, recipe, base, 0, len(layers), self.device)
        return self._stored[1]

    def _measure(
        self, methods: dict[str, HashMaps | None], samples: MemoryShards, layers: tuple[int, ...]
    ) -> dict[str, Tensor]:
        base = dataclasses.replace(self.base, layers=layers)
        return metrics.measure_heads(samples, base, methods, self.budgets, device=self.device, progress=self.progress)

    def _row(self, name: str, layers: tuple[int, ...], measured: dict[str, Tensor]) -> Row:
        reference = None if name == REFERENCES else self._reference(layers)["budgets"]
        return {
            "variant": name,
            "model": self.base.name,
            "layers": list(layers),
            "budgets": self._summary(measured, reference),
            "text": self.fingerprint,
            "recipe": self.sweep.recipe.as_dict(),
            "origin": provenance.origin(self.device, self.command),
        }

    def _summary(self, measured: dict[str, Tensor], reference: list[Row] | None = None) -> list[Row]:
        """Rows of all budgets: per method means, ratio to exact shared selection, and error by layer and KV head."""
        rows = []
        for place, budget in enumerate(self.budgets):
            exact = (
                reference[place]["exact_shared"]["error"]
                if reference is not None
                else float(measured["exact_shared"][place, ..., 0].mean())
            )
            row: Row = {"heavy": budget.heavy, "sink": budget.sink, "local": budget.local}
            for name, table in measured.items():
                means = table[place].mean((0, 1)).tolist()
                row[name] = {field: round(value, 5) for field, value in zip(metrics.FIELDS, means, strict=True)}
                row[name]["ratio"] = round(means[0] / max(exact, 1e-12), 4)
                heads = {field: table[place, ..., at] for at, field in enumerate(metrics.FIELDS)}
                row[name] |= {f"{field}_by_head": _rounded(values) for field, values in heads.items()}
            rows.append(row)
        return rows

    def _add(self, row: Row) -> Row:
        self.rows.append(row)
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / ROWS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        if self.tell is not None:
            self.tell(row)
        return row


def by_layer(row: Row, reference: Row) -> dict[str, Any]:
    """The row of a variant and that of the references as `metrics.summarise` has them: means over a layer's heads."""
    budgets = []
    for ours, theirs in zip(row["budgets"], reference["budgets"], strict=True):
        found: Row = {name: ours[name] for name in ("heavy", "sink", "local")}
        for name in ("hash", metrics.FILLED, *metrics.EXACT):
            table = ours[name] if name in ours else theirs[name]
            found[name] = {field: table[field] for field in (*metrics.FIELDS, "ratio")}
            for field in metrics.FIELDS if name == "hash" else metrics.FIELDS[:1]:
                means = [sum(heads) / len(heads) for heads in table[f"{field}_by_head"]]
                found[name][f"{field}_by_layer"] = [round(mean, 4) for mean in means]
        budgets.append(found)
    return {"layers": row["layers"], "budgets": budgets}


def _unrotates(sweep: Sweep) -> bool:
    """Whether some variant's maps take keys before RoPE."""
    changes = (variant.changes.get("maps", {}).get("rope", "after") for variant in sweep.variants)
    return any(rope != "after" for rope in (sweep.recipe.maps.rope, *changes))


def read_rows(out: str | os.PathLike[str]) -> list[Row]:
    """The rows of a study's folder; none if it is new."""
    path = Path(out) / ROWS
    if not path.is_file():
        return []
    whole, _, cut = path.read_text(encoding="utf-8").rpartition("\n")
    if cut:  # a killed run left half a line: the next row must not be joined to it
        path.write_text(whole + "\n" if whole else "", encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def _only(samples: Any, rows: list[int]) -> MemoryShards:
    """The same samples with these rows of layers; views where the rows follow each other."""
    narrow = MemoryShards()
    for index in range(len(samples)):
        whole = samples.read(index, 0, samples.samples[index].key.shape[0])
        if rows == list(range(rows[0], rows[-1] + 1)):
            narrow.samples.append(whole.layers(rows[0], rows[-1] + 1))
            continue
        at = torch.tensor(rows, device=whole.key.device)
        narrow.samples.append(whole.by_layer(lambda tensor, at=at: tensor.index_select(0, at)))
    return narrow


def _first(samples: MemoryShards, count: int) -> MemoryShards:
    fewer = MemoryShards()
    fewer.samples = samples.samples[:count]
    return fewer


def _rounded(table: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in table.tolist()]
