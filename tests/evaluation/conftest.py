"""Small data of the tasks' own forms, and a small model whose tokens are bytes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

NOUNS = [f"noun{letter}{other}" for letter in "abcdefghijkl" for other in "klmnopqrstuvw"]
ADJECTIVES = [f"adj{letter}" for letter in "abcdefgh"]
VERBS = ["run", "walk", "nouna", "adja"]


def write_ruler(folder: Path) -> None:
    """RULER's six files, with invented words."""
    source = random.Random(7)
    words = [f"{first}{second}" for first in ("lo", "mi", "re", "so") for second in ("ra", "na", "ti", "do")]
    sentences = [" ".join(source.choices(words, k=8)).capitalize() + "." for _ in range(900)]
    (folder / "PaulGrahamEssays.json").write_text(json.dumps({"text": " ".join(sentences)}))
    paragraphs = []
    for number in range(60):
        asked = {"question": f"Who owns house {number}?", "is_impossible": number % 7 == 3}
        answers = [{"text": f"Owner {number}"}, {"text": f"Lady {number}"}]
        text = f"House {number} is owned by Owner {number}. {sentences[number]}"
        paragraphs.append({"context": text, "qas": [asked | {"answers": [] if asked["is_impossible"] else answers}]})
    articles = [{"title": str(first), "paragraphs": paragraphs[first::6]} for first in range(6)]
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    pages = [[f"Page {number}", [f"Fact {number}. ", "More."]] for number in range(80)]
    items = [
        {"question": f"Which is {number}?", "answer": f"Fact {number}", "context": pages[number : number + 10]}
        for number in range(70)
    ]
    (folder / "hotpotqa.json").write_text(json.dumps(items))
    for name, listed in (("noun", NOUNS), ("adjective", ADJECTIVES), ("verb", VERBS)):
        (folder / f"{name}list.txt").write_text("\n".join(listed) + "\n")


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with RULER's files."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "ruler").mkdir()
    write_ruler(folder / "ruler")
    return folder


@pytest.fixture(scope="session")
def byte_tokenizer(tiny_model_folder: Path):
    """One token a byte, no chat format."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture(scope="session")
def small_model(byte_tokenizer):
    """A random Llama of two layers and 4096 tokens of context."""
    from tests.tiny import build

    return build("llama", vocab_size=len(byte_tokenizer), max_position_embeddings=4096)


@pytest.fixture(scope="session")
def small_maps(small_model):
    """Random maps for it."""
    import torch

    from hashattention import HashMaps, MapsConfig
    from hashattention.models.describe import describe

    torch.manual_seed(1)
    return HashMaps(MapsConfig(bits=32, widths=(8,)), describe(small_model)).requires_grad_(False)
