#!/usr/bin/env python3
"""Compare training choices on one capture of a model, keep the best at each turn, then train it for longer.

    python recipes/compare.py smollm2-135m-instruct --texts texts/train --held-out texts/heldout --out runs/compare

Writes one JSON row a variant to `OUT/rows.jsonl` (held-out output error per heavy budget, beside exact selections) and
the best maps to `OUT/best`. The turns: pooling, shape, learning rate, share of the uniform target, hard steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hashattention import provenance
from hashattention.config import Budget, MapsConfig
from hashattention.maps import HashMaps
from hashattention.models.describe import describe
from hashattention.models.source import LoadedModel, load_model
from hashattention.train import metrics, run, text
from hashattention.train.fit import fit
from hashattention.train.recipe import Recipe


class Comparison:
    """One capture, many recipes."""

    def __init__(self, loaded: LoadedModel, options: argparse.Namespace, recipe: Recipe) -> None:
        self.options, self.out = options, Path(options.out)
        self.model, self.device = loaded.model, next(loaded.model.parameters()).device
        self.base = dataclasses.replace(describe(loaded.model), name=loaded.source.hub_id or options.name)
        self.text = text.sequences(
            loaded.tokenizer, options.texts, context=recipe.context, count=recipe.sequences, held_out=recipe.held_out,
            seed=recipe.seed, held_out_texts=options.held_out,
        )  # fmt: skip
        self.budgets = [Budget(heavy=share, sink=recipe.sink, local=recipe.local) for share in recipe.budgets]
        self.captured = self.capture(recipe)
        self.exact = metrics.measure(
            self.captured.held_out, self.base, dict.fromkeys(metrics.EXACT), self.budgets, device=self.device
        )
        self.rows: list[dict[str, Any]] = []

    def capture(self, recipe: Recipe) -> run.Captured:
        return run.capture_all(self.model, self.base, self.text, recipe, None, {}, None)

    def try_recipe(self, name: str, recipe: Recipe, captured: run.Captured | None = None) -> tuple[float, HashMaps]:
        """Train and measure; the score is the mean error over the two smallest budgets."""
        begun = time.monotonic()
        samples = (captured or self.captured).train
        maps = fit(samples, self.base, recipe, self.out / name, device=self.device)
        seconds = time.monotonic() - begun
        measured = metrics.measure(self.captured.held_out, self.base, {"hash": maps}, self.budgets, device=self.device)
        summary = metrics.summarise({**measured, **self.exact}, self.budgets, self.base)
        bits = recipe.maps.bits * recipe.maps.signature_heads(self.base) // self.base.num_key_value_heads
        row = {"variant": name, "steps": recipe.steps, "bits_per_kv_head": bits, "train_seconds": round(seconds, 1)}
        maps.training_info = {
            "recipe": recipe.as_dict(), "metrics": summary, "text": self.text.fingerprint,
            "origin": provenance.origin(self.device, self.options.command),
        }  # fmt: skip
        row |= {"parameters_mb": round(sum(t.numel() for t in maps.parameters()) * 2 / 1e6, 2), **maps.training_info}
        self.rows.append(row)
        with (self.out / "rows.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        shown = [f"{b['hash']['error']:.4f} ({b['hash']['ratio']:.2f})" for b in summary["budgets"]]
        print(
            f"{time.monotonic() - self.options.begun:6.1f} s  {name:28s} {seconds:5.1f} s  {'  '.join(shown)}",
            file=sys.stderr,
        )
        return float(measured["hash"][-2:, :, 0].mean()), maps

    def turn(self, best: Recipe, score: float, variants: dict[str, Recipe]) -> tuple[Recipe, float]:
        """The best of `best` and `variants`; variants are skipped once the time for comparing is over."""
        for name, recipe in variants.items():
            if time.monotonic() - self.options.begun > self.options.compare_seconds:
                break
            found, _ = self.try_recipe(name, recipe)
            if found < score:
                best, score = recipe, found
        return best, score


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    loaded = load_model(options.model, device=options.device)
    small = {"context": options.context, "sequences": options.sequences, "held_out": options.held_out_sequences}
    start = Recipe(maps=MapsConfig(widths=(64, 64)), pool="peak_sum", steps=options.steps, **small)
    side = Comparison(loaded, options, start)
    print(
        f"{time.monotonic() - options.begun:6.1f} s  captured; exact shared, its peak form, per head:", file=sys.stderr
    )
    for name in metrics.EXACT:
        print(
            " " * 10, name, [round(value, 4) for value in side.exact[name][:, :, 0].mean(1).tolist()], file=sys.stderr
        )
    change = dataclasses.replace
    score, _ = side.try_recipe("peak_sum 64x64", start)
    best, score = side.turn(start, score, {"peak_max 64x64": change(start, pool="peak_max")})
    side.turn(best, 0.0, {"mean 64x64": change(start, pool="mean")})
    shapes = {f"shape {'x'.join(map(str, w))}": change(best, maps=MapsConfig(widths=w)) for w in ((80, 80), (112,))}
    best, score = side.turn(best, score, shapes)
    rates = {f"rate {rate}": change(best, learning_rate=rate) for rate in (5e-3, 1e-3)}
    best, score = side.turn(best, score, rates)
    mixes = {f"top mix {mix}": change(best, top_mix=mix) for mix in (0.25, 0.75)}
    best, score = side.turn(best, score, mixes)
    best, score = side.turn(best, score, {"hard from 0.25": change(best, straight_through=0.25)})
    paper = {"queries": options.context // 4 if options.context >= 4096 else 256, "sink": 16, "local": 64}
    recipe = change(Recipe.paper(), **small, **paper, steps=options.steps)
    side.try_recipe("paper", recipe, side.capture(recipe))
    recipe = change(best, steps=options.final_steps)
    _, maps = side.try_recipe("final", recipe)
    maps.cpu().save_pretrained(options.out / "best")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--name", default="", help="what the maps call their model, where the hub id is not known")
    parser.add_argument("--texts", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=96)
    parser.add_argument("--held-out-sequences", type=int, default=8)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--final-steps", type=int, default=4000)
    parser.add_argument("--compare-seconds", type=float, default=1e9, help="start no further variant after this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--command", default=None, help="the command to record with the results")
    options = parser.parse_args()
    options.begun = time.monotonic()
    return options


if __name__ == "__main__":
    main()
