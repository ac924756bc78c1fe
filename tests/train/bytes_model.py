"""A tiny random Llama that reads bytes, texts for it, and a recipe that trains in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import build

from hashattention.config import MapsConfig
from hashattention.models.source import LoadedModel, ModelSource
from hashattention.train.recipe import Recipe


class ByteTokenizer:
    """Bytes as tokens; what `text.sequences` needs of a transformers tokenizer."""

    def __init__(self, bos: int | None = None) -> None:
        self.bos_token_id = bos

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        prefix = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": prefix + [byte % 128 for byte in text.encode()]}


def tiny_model(seed: int = 0) -> LoadedModel:
    return LoadedModel(build("llama", seed=seed, num_hidden_layers=3), ByteTokenizer(), ModelSource("folder", "tiny"))


def write_texts(folder: Path, files: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        lines = [f"file {number}, line {line}: {line * line % 97} and {line * 7 % 31}" for line in range(120)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


def tiny_recipe(**changes: Any) -> Recipe:
    plain: dict[str, Any] = {
        "maps": MapsConfig(bits=32, widths=(16,)), "context": 256, "sequences": 4, "held_out": 2, "queries": 32,
        "held_out_queries": 8, "step_queries": 16, "steps": 12, "warmup": 2, "sink": 4, "local": 16,
        "checkpoint_every": 4, "prediction_steps": 4,
    }  # fmt: skip
    return Recipe(**{**plain, **changes})
