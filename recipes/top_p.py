"""Top-p under a cap against a fixed budget of the same mean density, on held-out text.

    python recipes/top_p.py MODEL --maps smollm2-135m-instruct --text train/ --held-out heldout/ --rows top-p.jsonl

Temperatures are fitted on `--text`, unless the maps have theirs; every selection is what `HashSelector` serves, and a
density is what it selected. `--write FOLDER` saves the maps with their temperatures.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

from hashattention import provenance
from hashattention.cache import TokenCache
from hashattention.config import Budget
from hashattention.maps import HashMaps
from hashattention.models.capture import Sample, capture
from hashattention.models.source import load_model
from hashattention.rows import Extent
from hashattention.selectors.base import Step
from hashattention.selectors.hash import HashSelector
from hashattention.train.metrics import Exact
from hashattention.train.temperatures import calibrate
from hashattention.train.text import sequences

#: Queries of each held-out sequence, from its second half: there a density of 1/8 holds sink, local and heavy tokens.
QUERIES = 24
TOP_P = (0.8, 0.9, 0.95, 0.98)


class Gauge:
    """Mean density, output error and kept mass of every budget over the samples it is shown."""

    def __init__(self, maps: HashMaps) -> None:
        self.maps, self.selector = maps, HashSelector(maps)
        self.found: dict[Budget, list[torch.Tensor]] = {}

    def read(self, sample: Sample, layer: int, budgets: list[Budget]) -> None:
        """One layer of one sequence: its queries are a ragged batch over the same keys."""
        exact, count, tokens = Exact.of(sample, 16, 64), len(sample.positions), sample.key.shape[2]
        lengths = sample.positions + 1
        extent, side = Extent(torch.zeros_like(lengths), lengths, tokens), TokenCache()
        key = sample.key.expand(count, -1, -1, -1)
        query = sample.query[0].transpose(0, 1)[:, :, None]
        for budget in budgets:
            step = Step(layer, query, key, key, float(sample.scale[0]), extent, budget, side)
            chosen = self.selector.select(step)
            quality = exact.quality(chosen.held(tokens).transpose(0, 1))[:, :2].mean(0)
            density = (chosen.counts / lengths[:, None]).double().mean()
            self.found.setdefault(budget, []).append(torch.cat([density[None], quality]))

    def means(self, budget: Budget) -> dict[str, float]:
        """Means over all that was read."""
        values = torch.stack(self.found[budget]).mean(0).tolist()
        return {name: round(value, 5) for name, value in zip(("density", "error", "kept_mass"), values, strict=True)}


def run(options: argparse.Namespace) -> None:
    """Fit, measure every top-p, then fixed budgets of the densities that came out."""
    loaded = load_model(options.model, dtype=torch.float32)
    maps = HashMaps.from_pretrained(options.maps)
    if maps.temperatures is None or options.write:
        calibrate(loaded, maps, options.text, context=options.context, count=4)
    if options.write:
        maps.save_pretrained(options.write)
    text = sequences(
        loaded.tokenizer, options.text, context=options.context, count=1, held_out=options.count,
        held_out_texts=options.held_out,
    )  # fmt: skip
    positions = torch.linspace(options.context // 2, options.context - 1, QUERIES).int()
    held = [capture(loaded.model, maps.model, tokens, positions, value=True) for tokens in text.held_out]
    gauge = Gauge(maps)

    def measure(budgets: list[Budget]) -> None:
        for sample in held:
            for row, layer in enumerate(maps.model.layers):
                gauge.read(sample.layers(row, row + 1), layer, budgets)

    capped = [Budget(density=cap, top_p=p) for cap in (1 / 8, 1 / 4) for p in TOP_P]
    measure([*capped, Budget(density=1 / 8), Budget(density=1 / 4)])
    fixed = {budget: Budget(density=gauge.means(budget)["density"]) for budget in capped}
    measure(list(fixed.values()))
    shared = {"study": "top_p", "model": options.name, "maps": str(options.maps), "context": options.context}
    origin = provenance.origin("cpu", f"python {shlex.join(sys.argv)}")
    with Path(options.rows).open("w", encoding="utf-8") as stream:
        for budget in (*capped, Budget(density=1 / 8), Budget(density=1 / 4)):
            row = {**shared, "cap": budget.density, "top_p": budget.top_p, **gauge.means(budget)}
            if budget in fixed:
                row["fixed"] = gauge.means(fixed[budget])
                row["error_ratio"] = round(row["error"] / row["fixed"]["error"], 4)
            stream.write(json.dumps({**row, "sequences": len(held), "queries": QUERIES, "origin": origin}) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--name", default="SmolLM2-135M-Instruct", help="what the rows call it")
    parser.add_argument("--maps", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--count", type=int, default=6, help="held-out sequences")
    parser.add_argument("--rows", required=True)
    parser.add_argument("--write", help="a folder for the maps with temperatures")
    run(parser.parse_args())
