"""What every test shares: reproducible hypothesis runs, one thread, and no GPU test without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Before anything imports triton: without a GPU its kernels are tested in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def to_pages() -> Callable[..., tuple[Tensor, ...]]:
    """A function (size, *caches) -> (block_table, *pages): shuffled; spare pages and row ends hold poison."""

    def paginate(size: int, *caches: Tensor, seed: int = 0) -> tuple[Tensor, ...]:
        batch, _, tokens = caches[0].shape[:3]
        per_row = -(-tokens // size)
        order = torch.randperm(batch * per_row + 3, generator=torch.Generator().manual_seed(seed))
        table = order[: batch * per_row].view(batch, per_row)
        pages = []
        for cache in caches:
            poison = float("nan") if cache.is_floating_point() else -1
            padded = cache.new_full((batch, cache.shape[1], per_row * size, cache.shape[3]), poison)
            padded[:, :, :tokens] = cache
            page = cache.new_full((len(order), cache.shape[1], size, cache.shape[3]), poison)
            page[table] = padded.unflatten(2, (per_row, size)).transpose(1, 2)
            pages.append(page)
        return (table.to(torch.int32), *pages)

    return paginate


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers and a tokenizer of one token a byte."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    from tests.tiny import build

    special = {"<pad>": 0, "<s>": 1, "</s>": 2}
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = special | {letter: place for place, letter in enumerate(alphabet, len(special))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    folder = tmp_path_factory.mktemp("tiny-model")
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **marks).save_pretrained(folder)
    build("llama", vocab_size=len(vocabulary), max_position_embeddings=2048).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_maps_folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random maps for the model in `tiny_model_folder`."""
    from hashattention import HashMaps, MapsConfig, load_model
    from hashattention.models.describe import describe

    base = describe(load_model(tiny_model_folder).model)
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny-maps")
    HashMaps(MapsConfig(bits=32, widths=(8,)), base).save_pretrained(folder)
    return folder
