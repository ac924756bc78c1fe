"""Maps on texts and at contexts of their own choice: quality and rows read, beside exact selections and Quest.

    python recipes/measure_maps.py MODEL --maps final-64=runs/qwen/final-64 --maps mixed=maps \\
        --text held-out=texts/heldout --text novel=texts/test/novel --context 8192 16384 32768 --rows rows.jsonl

A row is one method on one text at one context: output error, its ratio to exact shared selection, kept attention mass,
recall of the 64 heaviest, and the unique K and V rows that are read per KV head and query, over heavy budgets from 1/8
to 1/128. Maps with a remainder have a second row with it, and so has exact shared selection where ``--exact-remainder``
names what `recipes/fit_remainder.py` fitted for it. A text that is too short gives fewer sequences; one that gives none
is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hashattention import provenance
from hashattention.config import Budget
from hashattention.errors import TextError
from hashattention.maps import HashMaps
from hashattention.models.capture import Sample, capture
from hashattention.models.describe import describe
from hashattention.models.source import LoadedModel, load_model
from hashattention.train.metrics import Exact, choose, method_scores
from hashattention.train.recipe import Recipe
from hashattention.train.run import GPU_CHUNK
from hashattention.train.shards import draw_positions
from hashattention.train.text import sequences

BUDGETS = [Budget(heavy=share) for share in (1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128)]
METHODS = ("exact_shared", "exact_per_head", "quest")
FIELDS = ("error", "kept_mass", "recall", "rows_read", "share_read")


class Cell:
    """One text at one context: what all methods select for the same queries."""

    def __init__(
        self,
        loaded: LoadedModel,
        maps: dict[str, HashMaps],
        exact: list[Any] | None,
        where: str,
        context: int,
        count: int,
    ) -> None:
        self.model, self.maps, base = loaded.model, maps, describe(loaded.model)
        self.remainders: dict[str, Any] = {
            name: each.remainder for name, each in maps.items() if each.remainder is not None
        }
        if exact is not None:
            self.remainders["exact_shared"] = exact
        layers = [layer for layer in base.layers if all(layer in each.model.layers for each in maps.values())]
        self.base = dataclasses.replace(base, layers=tuple(layers))
        self.tokens = cut(loaded, where, context, count)
        recipe = Recipe(context=context, held_out_queries=64, queries=1, step_queries=1)
        self.positions = [draw_positions(recipe, number, held_out=True) for number in range(len(self.tokens))]

    @torch.no_grad()
    def measure(self) -> dict[tuple[str, bool], Tensor]:
        """By method and whether with its remainder, means over sequences, queries and KV heads: float64
        ``[budgets, layers, fields]``.
        """
        methods = {**dict.fromkeys(METHODS), **self.maps}
        shape = len(BUDGETS), len(self.base.layers), len(FIELDS)
        keys = [(name, filled) for name in methods for filled in (False, True)[: 1 + (name in self.remainders)]]
        total = {key: torch.zeros(shape, dtype=torch.float64) for key in keys}
        for tokens, positions in zip(self.tokens, self.positions, strict=True):
            whole = capture(self.model, self.base, tokens, positions, value=True, chunk=GPU_CHUNK)
            for row in range(len(self.base.layers)):
                sample = whole.layers(row, row + 1)
                exact = Exact.of(sample, BUDGETS[0].sink, BUDGETS[0].local)
                for name, maps in methods.items():
                    for key, found in self.select(name, maps, exact, sample, row).items():
                        total[key][:, row] += found.cpu() / len(self.tokens)
        return total

    def select(
        self, name: str, maps: HashMaps | None, exact: Exact, sample: Sample, row: int
    ) -> dict[tuple[str, bool], Tensor]:
        """Fields of one method on one layer of one sequence, without and with a remainder, float64
        ``[budgets, fields]``.
        """
        scores = method_scores(name, maps, exact, sample, self.base, row)
        lengths = sample.positions.double() + 1
        coefficients: list[Tensor | None] = [None]
        if name in self.remainders:
            coefficients += [torch.tensor(self.remainders[name][row], device=scores.device)]
        found: dict[tuple[str, bool], list[Tensor]] = {}
        for chosen in choose(scores, sample.positions, BUDGETS):
            heads = self.base.num_key_value_heads
            read = chosen.unflatten(0, (heads, -1)).any(1).sum(-1).double()
            rows = torch.stack([read.mean(), (read / lengths).mean()])
            for each in coefficients:
                key = name, each is not None
                found.setdefault(key, []).append(torch.cat([exact.quality(chosen, each).mean(0), rows]))
        return {key: torch.stack(each) for key, each in found.items()}


def cut(loaded: LoadedModel, where: str, context: int, count: int) -> list[Tensor]:
    """At most `count` sequences of a text; none if it is too short for one."""
    for fewer in range(count, 0, -1):
        try:
            return sequences(
                loaded.tokenizer, [], context=context, count=0, held_out=fewer, held_out_texts=where
            ).held_out
        except TextError as error:
            sys.stderr.write(f"{error}\n")
    return []


def rows(
    measured: dict[tuple[str, bool], Tensor], shared: dict[str, Any], maps: dict[str, HashMaps]
) -> list[dict[str, Any]]:
    """A row a method."""
    exact = measured["exact_shared", False][..., 0]
    found = []
    for (name, filled), table in measured.items():
        row = {**shared, "method": "hash" if name in maps else name}
        if filled:
            row["remainder"] = True
        if name in maps:
            recipe = maps[name].training_info.get("recipe", {})
            row |= {"maps": name, "bits": maps[name].config.bits}
            row["trained_at"] = sorted({*(recipe.get("lengths") or [recipe.get("context", 0)])})
        row["budgets"] = []
        for place, budget in enumerate(BUDGETS):
            means = dict(zip(FIELDS, [round(value, 5) for value in table[place].mean(0).tolist()], strict=True))
            ratio = round(float(table[place, :, 0].mean() / exact[place].mean().clamp(min=1e-12)), 4)
            layers = [round(value, 4) for value in table[place, :, 0].tolist()]
            row["budgets"].append({"heavy": budget.heavy, **means, "ratio": ratio, "error_by_layer": layers})
        found.append(row)
    return found


def named(pair: str) -> tuple[str, str]:
    name, equals, where = pair.partition("=")
    return (name, where) if equals else (Path(pair).name, pair)


def main() -> None:
    given = parse()
    loaded = load_model(given.model, device=given.device, dtype=given.dtype and getattr(torch, given.dtype))
    if given.tokenizer:
        from transformers import AutoTokenizer

        loaded = dataclasses.replace(loaded, tokenizer=AutoTokenizer.from_pretrained(given.tokenizer))
    maps = {name: HashMaps.from_pretrained(where).to(given.device) for name, where in map(named, given.maps)}
    exact = json.loads(given.exact_remainder.read_text()) if given.exact_remainder else None
    for each in maps.values():
        each.check_model(describe(loaded.model))
    name = loaded.source.hub_id or Path(loaded.source.name).name
    for context in given.context:
        for text, where in map(named, given.text):
            cell = Cell(loaded, maps, exact, where, context, given.sequences)
            if not cell.tokens:
                continue
            shared: dict[str, Any] = {"study": "lengths", "model": name, "text": text, "context": context}
            shared["layers"] = len(cell.base.layers)
            shared |= {"sequences": len(cell.tokens), "queries": len(cell.positions[0]), "sink": 16, "local": 64}
            origin = provenance.origin(given.device, provenance.command_line(["python", *sys.argv]))
            found = rows(cell.measure(), shared, maps)
            with given.rows.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps({**row, "origin": origin}) + "\n" for row in found)
            said = ", ".join(
                f"{row.get('maps', row['method'])}{'+' * ('remainder' in row)} {row['budgets'][2]['ratio']}"
                for row in found
            )
            sys.stderr.write(f"{text} at {context}, ratio at 1/32: {said}\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokenizer", help="a folder whose tokenizer is taken in place of the model's own")
    parser.add_argument("--maps", action="append", default=[], help="NAME=FOLDER; may be repeated")
    parser.add_argument("--exact-remainder", type=Path, help="the file of recipes/fit_remainder.py --exact")
    parser.add_argument("--text", action="append", required=True, help="NAME=FOLDER; may be repeated")
    parser.add_argument("--context", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--sequences", type=int, default=3, help="the most of each text and context")
    parser.add_argument("--rows", type=Path, required=True, help="rows are added to this file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="of the model; by default as stored")
    return parser.parse_args()


if __name__ == "__main__":
    main()
