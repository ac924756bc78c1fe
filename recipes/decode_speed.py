"""What `hashattention generate --compare` needs to measure decoding speed: prompts of exact lengths, and random maps.

    python recipes/decode_speed.py MODEL --text FILE --tokens 16384 32640 --out DIR
    hashattention generate MODEL --maps DIR/random --prompt-file DIR/16384.txt --compare --max-new-tokens 33 --json

The speed of a step does not depend on how good its maps are: random ones serve where none are trained.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from hashattention import HashMaps, MapsConfig, load_model
from hashattention.models.describe import describe


def cut(tokenizer: Any, text: str, tokens: int) -> str:
    """The start of `text` that the tokenizer makes exactly `tokens` tokens of."""
    offsets = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    for last in range(tokens, len(offsets)):
        # A cut inside a word may make more tokens than it had; some later cut makes as many as are wanted.
        start = text[: offsets[last - 1][1]]
        if len(tokenizer(start, verbose=False)["input_ids"]) == tokens:
            return start
    raise SystemExit(f"--text holds {len(offsets)} tokens, fewer than --tokens {tokens}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32640])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()

    given.out.mkdir(parents=True, exist_ok=True)
    loaded = load_model(given.model, dtype=torch.float32, device="cpu")
    text = given.text.read_text(encoding="utf-8")
    for tokens in given.tokens:
        (given.out / f"{tokens}.txt").write_text(cut(loaded.tokenizer, text, tokens), encoding="utf-8")
    torch.manual_seed(0)
    HashMaps(MapsConfig(), describe(loaded.model), {"random": True}).save_pretrained(given.out / "random")
    sys.stdout.write(f"{given.out}: prompts of {given.tokens} tokens, random maps\n")


if __name__ == "__main__":
    main()
