"""Give maps their remainder (again), from training text: minutes on a CPU at 8K, seconds on a GPU.

    python recipes/fit_remainder.py qwen2.5-coder-0.5b-instruct artifacts/qwen2.5-coder-0.5b-instruct \\
        --text texts/train --lengths 8192 16384 32768

The folder's config.json is written anew and says what made it (``training.remainder``); its weights stay. ``--exact
FILE`` fits exact shared selection on the same sequences, to its outputs alone, and writes its coefficients to a file of
their own, for `recipes/measure_maps.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from hashattention import artifact, provenance
from hashattention.maps import HashMaps
from hashattention.models.source import load_model
from hashattention.train.metrics import FILLED
from hashattention.train.recipe import Recipe
from hashattention.train.remainder import Remainder, as_remainder, fit
from hashattention.train.run import reading_chunk
from hashattention.train.text import sequences


def main() -> None:
    given = parse()
    loaded = load_model(given.model, device=given.device, dtype=given.dtype and getattr(torch, given.dtype))
    if given.tokenizer:
        from transformers import AutoTokenizer

        loaded = dataclasses.replace(loaded, tokenizer=AutoTokenizer.from_pretrained(given.tokenizer))
    maps = HashMaps.from_pretrained(given.maps).to(given.device)
    # The later half asks for facts, if any does.
    asking = range(given.count, 2 * given.count) if given.facts else range(0)
    text = sequences(
        loaded.tokenizer, given.text, context=max(given.lengths), count=given.count + len(asking), held_out=0,
        lengths=given.lengths, asks=asking.__contains__,
    ).train  # fmt: skip

    def tell(what: str, done: int, total: int) -> None:
        sys.stderr.write(f"{what}: {done} of {total}\n")

    for chosen, where in ((maps, None), (None, given.exact)):
        if chosen is None and where is None:
            continue
        options = {"sink": 16, "local": 64, "steps": given.steps, "asking": asking}
        options["chunk"] = reading_chunk(loaded.model)
        table = fit(loaded.model, maps.model, chosen, text, **options, progress=tell)
        if where is None:
            write(given.maps, as_remainder(table), provenance.origin(loaded.model.device))
        else:
            where.write_text(json.dumps(as_remainder(table)) + "\n", encoding="utf-8")


def write(folder: Path, remainder: Remainder, origin: dict[str, Any]) -> None:
    """Into the folder's config.json, with what made it and without the metrics of the one before."""
    config = artifact.read_config(folder)
    training = {**config.get("training", {}), "remainder": origin}
    for row in training.get("metrics", {}).get("budgets", []):
        row.pop(FILLED, None)
    artifact.write_config(folder, {**config, "training": training, "remainder": remainder})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokenizer", help="a folder whose tokenizer is taken in place of the model's own")
    parser.add_argument("maps", type=Path, help="a maps folder")
    parser.add_argument("--text", action="append", required=True, help="training text; may be repeated")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    parser.add_argument("--count", type=int, default=16, help="sequences, of these lengths in turn")
    parser.add_argument("--facts", action="store_true", help="as many sequences again that ask for facts")
    parser.add_argument("--steps", type=int, default=Recipe.prediction_steps, help="of `predictions.tune`")
    parser.add_argument("--exact", type=Path, help="where to write the coefficients of exact shared selection")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="of the model; by default as stored")
    return parser.parse_args()


if __name__ == "__main__":
    main()
