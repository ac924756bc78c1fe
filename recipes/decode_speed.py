"""Decoding speed of a model, dense against hash attention, after one prefill: alternating rounds in one process.

Maps are random unless a folder is given: the speed of a step does not depend on how good they are.

    python recipes/decode_speed.py MODEL --text FILE --tokens 16384 32640 [--maps DIR] [--out ROWS.jsonl]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import DynamicCache

from hashattention import Budget, HashMaps, MapsConfig, attach, load_model, provenance
from hashattention.models.describe import describe


def decode(model, ids: torch.Tensor, cache: DynamicCache, steps: int) -> list[float]:
    """Seconds of each of `steps` greedy steps; the cache is cropped back to where it was."""
    held, seconds = cache.get_seq_length(), []
    for _ in range(steps):
        before = time.perf_counter()
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
        seconds.append(time.perf_counter() - before)
    cache.crop(held - cache.get_seq_length())
    return seconds


def prefill(model, cache: DynamicCache, ids: torch.Tensor, chunk: int) -> float:
    """Extend the cache to all but the last token of `ids`, `chunk` tokens at a time; the seconds it took."""
    before = time.perf_counter()
    for first in range(cache.get_seq_length(), ids.shape[1] - 1, chunk):
        part = ids[:, first : min(first + chunk, ids.shape[1] - 1)]
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        sys.stderr.write(f"prefill {cache.get_seq_length()} tokens, {time.perf_counter() - before:.0f} s\n")
    return time.perf_counter() - before


def measure(model, maps: HashMaps, cache: DynamicCache, last: torch.Tensor, given: argparse.Namespace) -> dict:
    """Tokens a second of both, in alternating rounds; the first round (signing the prompt's keys) is not counted."""
    seconds: dict[str, list[float]] = {"dense": [], "hash": []}
    for turn in range(given.rounds + 1):
        for name in seconds:
            on = attach(model, maps, Budget(density=given.density)) if name == "hash" else contextlib.nullcontext()
            with on:
                taken = decode(model, last, cache, given.steps if turn else 2)
            seconds[name] += taken[1:] if turn else []
    rate = {name: 1 / statistics.median(taken) for name, taken in seconds.items()}
    return {
        "dense_tokens_per_second": rate["dense"],
        "hash_tokens_per_second": rate["hash"],
        "speedup": rate["hash"] / rate["dense"],
        "steps": len(seconds["hash"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384])
    parser.add_argument("--maps")
    parser.add_argument("--density", type=float, default=1 / 16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()

    loaded = load_model(given.model, dtype=getattr(torch, given.dtype), device="cpu")
    base = describe(loaded.model)
    torch.manual_seed(0)
    maps = HashMaps.from_pretrained(given.maps) if given.maps else HashMaps(MapsConfig(), base)
    text = given.text.read_text(encoding="utf-8")
    ids = loaded.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    if ids.shape[1] < max(given.tokens):
        parser.error(f"--text holds {ids.shape[1]} tokens, fewer than --tokens {max(given.tokens)}")
    cache, taken = DynamicCache(config=loaded.model.config), 0.0
    for tokens in sorted(given.tokens):
        with torch.inference_mode():
            taken += prefill(loaded.model, cache, ids[:, :tokens], given.chunk)
            rates = measure(loaded.model, maps, cache, ids[:, tokens - 1 : tokens], given)
        row = {
            "bench": "generate",
            "model": Path(given.model).name,
            "tokens": tokens,
            "density": given.density,
            "dtype": given.dtype,
            "maps": Path(given.maps).name if given.maps else "random (speed does not depend on their quality)",
            "prefill_seconds": taken,
            **rates,
            "threads": torch.get_num_threads(),
            "origin": provenance.origin("cpu"),
        }
        sys.stdout.write(json.dumps(row) + "\n")
        if given.out:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
