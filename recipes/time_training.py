"""Train maps and say where the time went: one row of seconds by phase.

    python recipes/time_training.py --model MODEL --recipe FILE.toml --text texts/train --out maps --rows rows.jsonl
    python recipes/time_training.py --shape llama-3.1-8b --recipe recipes/llama-3.1-8b.toml --text texts/train ...

The maps are what `hashattention train` makes. A `--shape` has random weights, made on the device, and reads bytes: no
step's cost depends on them.
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
from hashattention.cli.train import adjust
from hashattention.models.source import LoadedModel, ModelSource, load_model
from hashattention.train.recipe import Recipe
from hashattention.train.run import train

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}  # fmt: skip
TINY: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "head_dim": 16,
}
PHASES = {"capturing queries and keys": "capture", "training": "training", "measuring": "measuring"}


class Stopwatch:
    """Seconds of every phase of `train`, as its `progress`; what comes before the first step of a group of layers is
    their moments and targets.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.begun = self.last = time.monotonic()
        self.text, self.done = "", -1

    def __call__(self, text: str, done: int, total: int) -> None:
        prepared = text == "training" and (text != self.text or done == self.done)
        if text != self.text or done == total:
            sys.stderr.write(f"{time.monotonic() - self.begun:7.1f} s  {text} {done}/{total}\n")
        self.take("targets" if prepared else PHASES.get(text, "text"), wait=text != "training" or prepared)
        self.text, self.done = text, done

    def take(self, phase: str, wait: bool = True) -> None:
        """Give the time since the last call to `phase`."""
        if wait and torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


class ByteTokenizer:
    """Bytes as tokens, for a model that was taught no words."""

    bos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def random_model(shape: str, device: str, tiny: bool) -> LoadedModel:
    """A Llama of this shape with random bfloat16 weights and a vocabulary of 256."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**SHAPES[shape], **(TINY if tiny else {})}, vocab_size=256, tie_word_embeddings=False)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return LoadedModel(model.eval().requires_grad_(False), ByteTokenizer(), ModelSource("folder", shape))


def named_model(given: argparse.Namespace) -> LoadedModel:
    """The model, with the tokenizer of another folder if one is given."""
    loaded = load_model(given.model, device=given.device, dtype=torch.float32 if given.device == "cpu" else None)
    if not given.tokenizer:
        return loaded
    from transformers import AutoTokenizer

    return dataclasses.replace(loaded, tokenizer=AutoTokenizer.from_pretrained(given.tokenizer))


def choose(given: argparse.Namespace) -> Recipe:
    """The recipe with what the command line changes; `--tiny` is the same in small, for a dry run."""
    recipe = adjust(Recipe.named(given.recipe), steps=given.steps, sequences=given.sequences)
    recipe = dataclasses.replace(recipe, weigh=given.weigh or recipe.weigh)
    if not given.tiny:
        return recipe
    lengths = tuple(max(128, length // 64) for length in recipe.lengths)
    small: dict[str, Any] = {
        "queries": 32,
        "step_queries": 16,
        "held_out_queries": 8,
        "sequences": 4,
        "held_out": 1,
        "steps": 20,
    }
    return dataclasses.replace(recipe, context=max(128, recipe.context // 64), lengths=lengths, step_tokens=64, **small)


def main() -> None:
    given = parse()
    watch, recipe = Stopwatch(), choose(given)
    loaded = random_model(given.shape, given.device, given.tiny) if given.shape else named_model(given)
    watch.take("model")
    options: dict[str, Any] = {"held_out_texts": given.held_out, "in_memory": True, "resume": False, "progress": watch}
    report = train(loaded, given.text, given.out, recipe, command=command(), **options)
    watch.take("temperatures and saving")
    seconds = {phase: round(value, 2) for phase, value in watch.seconds.items()}
    row: dict[str, Any] = {"study": "training_time", "model": loaded.source.hub_id or Path(loaded.source.name).name}
    row |= {"random_weights": bool(given.shape), "tiny": given.tiny, "seconds": seconds}
    row["seconds_in_all"] = round(sum(watch.seconds.values()), 1)
    row["step_ms"] = round(1e3 * seconds["training"] / recipe.steps, 2)
    if given.device.startswith("cuda"):
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    row["maps_mb"] = round(sum(path.stat().st_size for path in given.out.glob("*.*")) / 1e6, 2)
    budgets = report["metrics"].get("budgets", [])
    row["ratio"] = {} if given.shape else {str(each["heavy"]): each["hash"]["ratio"] for each in budgets}
    row |= {"recipe": report["recipe"], "origin": report["origin"]}
    with given.rows.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
    shown = {key: value for key, value in row.items() if key not in ("recipe", "origin")}
    sys.stderr.write(json.dumps(shown) + "\n")


def command() -> str:
    """This command, without anybody's folders."""
    return provenance.command_line(["python", *sys.argv])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="a model folder, hub id, .gguf file or packaged name")
    which.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    parser.add_argument("--tokenizer", help="a folder whose tokenizer is taken in place of the model's own")
    parser.add_argument("--recipe", required=True, help="group, paper, or a TOML file")
    parser.add_argument("--text", required=True)
    parser.add_argument("--held-out")
    parser.add_argument("--out", type=Path, required=True, help="the maps folder")
    parser.add_argument("--rows", type=Path, required=True, help="the row is added to this file")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--weigh", choices=("none", "value", "output"), help="in place of the recipe's")
    parser.add_argument("--tiny", action="store_true", help="a dry run of a minute on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
