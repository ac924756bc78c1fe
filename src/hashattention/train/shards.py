"""Shards: captured samples as safetensors files with a manifest (resumable, checked), or kept in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hashattention.config import BaseModel
from hashattention.errors import CheckpointError
from hashattention.models.capture import LAYERED, Sample
from hashattention.train.facts import room
from hashattention.train.recipe import Recipe

MANIFEST = "manifest.json"


class Samples(Protocol):
    """Captured sequences that `fit` and `metrics` read, one at a time and only the layers they need."""

    def __len__(self) -> int:
        """Sequences."""

    def read(self, index: int, first: int, last: int) -> Sample:
        """Layers ``first <= l < last`` of sequence `index`."""


class MemoryShards:
    """Samples kept in memory; nothing touches the disk. They hold the layers from row `first` on."""

    def __init__(self, first: int = 0) -> None:
        self.samples: list[Sample] = []
        self.first = first

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int, first: int, last: int) -> Sample:
        """Layers ``first <= l < last`` of sequence `index`."""
        return self.samples[index].layers(first - self.first, last - self.first)

    def obtain(self, name: str, make: Callable[[], Sample]) -> None:
        """Add the sample that `make` gives."""
        self.samples.append(make())


class Part:
    """Sequences ``first <= index < last`` of others."""

    def __init__(self, samples: Samples, first: int, last: int) -> None:
        self.samples, self.first, self.last = samples, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def read(self, index: int, first: int, last: int) -> Sample:
        """Layers ``first <= l < last`` of sequence `index`."""
        return self.samples.read(self.first + index, first, last)


class FolderShards:
    """One safetensors file a sequence, written whole or not at all; `manifest.json` holds checksums and settings.

    Parameters
    ----------
    folder : path
    settings : mapping
        What the samples depend on, plain JSON values; a folder made with others is refused.

    Raises
    ------
    CheckpointError
        If the folder holds shards made with other settings; the message names the field.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.folder, self.names = Path(folder), list[str]()
        self.settings = json.loads(json.dumps(settings))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sums: dict[str, str] = {}
        path = self.folder / MANIFEST
        if path.is_file():
            self.sums = self._read_manifest(path)
        self._write_manifest()

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, first: int, last: int) -> Sample:
        """Layers ``first <= l < last`` of sequence `index`, read from its file alone."""
        from safetensors import safe_open

        with safe_open(self._path(self.names[index]), framework="pt") as file:
            names = set(file.keys())
            sliced = {name: file.get_slice(name)[first:last] for name in names & set(LAYERED)}
            return Sample(**sliced, **{name: file.get_tensor(name) for name in names - set(LAYERED)})

    def obtain(self, name: str, make: Callable[[], Sample]) -> None:
        """Add shard `name`: the file if it is whole, else the sample that `make` gives, written."""
        if not self.holds(name):
            self._write(name, make())
        self.names.append(name)

    def holds(self, name: str) -> bool:
        """Whether shard `name` is there with the bytes that were written."""
        path = self._path(name)
        return name in self.sums and path.is_file() and _checksum(path) == self.sums[name]

    def _write(self, name: str, sample: Sample) -> None:
        from safetensors.torch import save_file

        partial = self.folder / f".{name}.partial"
        tensors = {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}
        save_file({key: t.cpu().contiguous() for key, t in tensors.items() if t is not None}, partial)
        self.sums[name] = _checksum(partial)
        partial.replace(self._path(name))
        self._write_manifest()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _write_manifest(self) -> None:
        partial = self.folder / f".{MANIFEST}.partial"
        partial.write_text(
            json.dumps({"settings": self.settings, "sha256": self.sums}, indent=1) + "\n", encoding="utf-8"
        )
        partial.replace(self.folder / MANIFEST)

    def _read_manifest(self, path: Path) -> dict[str, str]:
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            held, sums = manifest["settings"], dict(manifest["sha256"])
        except (ValueError, KeyError, TypeError):
            return {}  # not trusted: everything is captured again
        refuse_other(held, self.settings, f"the shards in {self.folder}")
        return sums


def resident(samples: Samples, first: int, last: int, device: torch.device) -> Samples:
    """Layers ``first <= l < last`` of all `samples` in the memory of `device`: read once, not in every step."""
    held = MemoryShards(first)
    for index in range(len(samples)):
        held.samples.append(samples.read(index, first, last).to(device))
    return held


def claim(path: Path, settings: Mapping[str, Any], what: str) -> None:
    """Write `settings` to the JSON file `path`; raise `CheckpointError` if it holds others (damaged: replaced)."""
    asked = json.loads(json.dumps(settings))
    if path.is_file():
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            held = asked
        refuse_other(held, asked, what)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def refuse_other(held: Mapping[str, Any], asked: Mapping[str, Any], what: str) -> None:
    """Raise `CheckpointError` naming the first field in which `held` settings differ from those `asked` for."""
    for key in (*asked, *held):
        mine, other = asked.get(key), held.get(key)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            refuse_other(other, mine, f"{what}: {key}")
        elif mine != other:
            raise CheckpointError(
                f"{what}: {key} is {other!r}, this call asks for {mine!r}; give another output folder, "
                "the same settings, or start over with resume off."
            )


def capture_settings(recipe: Recipe, base: BaseModel, weights: str, texts: str) -> dict[str, Any]:
    """What captured samples depend on."""
    names = (
        "context",
        "sequences",
        "held_out",
        "queries",
        "held_out_queries",
        "sampling",
        "first_position",
        "sink",
        "local",
        "seed",
    )
    ours = {name: getattr(recipe, name) for name in names}
    # The name is where a model was found; its architecture and weights say which it is. Captures are after RoPE.
    model = {key: value for key, value in dataclasses.asdict(base).items() if key not in ("name", "frequencies")}
    # The texts last: their tokens depend on the context, and the cause is to be named, not its effect.
    some: dict[str, Any] = {"values": True} if recipe.weigh != "none" else {}
    some |= {name: value for name in ("lengths", "facts") if (value := getattr(recipe, name))}
    if recipe.keep_tokens:
        # What is kept beside the tokens is what they teach.
        taught = ("keep_tokens", "loss", "pool", "weigh", "top", "top_mix", "temper")
        some |= {name: getattr(recipe, name) for name in taught}
        some["selection_heads"] = recipe.maps.selection_heads(base)
    return {"model": model, "weights": weights, **ours, **some, "texts": texts}


def weights_fingerprint(model: torch.nn.Module) -> str:
    """A checksum over a sample of every parameter: two models of one shape are told apart, in milliseconds."""
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        flat = tensor.detach().flatten()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(flat[:: max(1, flat.numel() // 64)][:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def sample_bytes(recipe: Recipe, base: BaseModel, *, held_out: bool, tokens: int | None = None) -> int:
    """Bytes of one captured sequence (2-byte values) of `tokens`, by default of the recipe's context."""
    count, length = recipe.held_out_queries if held_out else recipe.queries, tokens or recipe.context
    taught = 0
    if recipe.keep_tokens and not held_out:
        length = min(length, recipe.keep_tokens)
        taught = recipe.maps.selection_heads(base) * count * length
    valued = held_out or (recipe.weigh != "none" and not recipe.keep_tokens)
    rows = base.num_key_value_heads * length * (1 + valued) + base.num_attention_heads * count
    return len(base.layers) * (2 * base.head_dim * rows + taught)


def capture_bytes(recipe: Recipe, base: BaseModel) -> int:
    """Bytes of all samples of a recipe."""
    lengths = map(recipe.length, range(recipe.sequences))
    train = sum(sample_bytes(recipe, base, held_out=False, tokens=tokens) for tokens in lengths)
    return train + recipe.held_out * sample_bytes(recipe, base, held_out=True)


def check_disk(folder: Path, needed: int, allowed: int | None) -> None:
    """Raise `CheckpointError` unless `needed` bytes are allowed and free (shards already there count)."""
    folder.mkdir(parents=True, exist_ok=True)
    held = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    free = shutil.disk_usage(folder).free + held
    bound = free if allowed is None else min(allowed, free)
    if needed > bound:
        limit = "the disk has" if bound == free else "disk_bytes allows"
        raise CheckpointError(
            f"the captured queries and keys need {needed / 2**30:.2f} GiB, {limit} {bound / 2**30:.2f} GiB; "
            "lower `sequences`, `context` or `queries` in the recipe, or allow more."
        )


def draw_positions(recipe: Recipe, sequence: int, *, held_out: bool) -> Tensor:
    """Positions int64 ``[N]``, ascending, at which queries of one sequence are recorded; fixed by the recipe's seed."""
    length = None if held_out else recipe.length(sequence)
    allowed = torch.tensor(list(recipe.positions_from(length)))
    count = min(recipe.held_out_queries if held_out else recipe.queries, len(allowed))
    if recipe.sampling == "chunk_tail" and not held_out:
        return allowed[-count:]
    generator = torch.Generator().manual_seed(hash_seed(recipe.seed, "positions", held_out, sequence))
    if length is None or not recipe.asks(sequence):
        return _stratify(allowed, count, generator)
    asking = min(room(length), len(allowed) - 1)
    there = min(count // 2, asking)
    return torch.cat(
        [_stratify(allowed[:-asking], count - there, generator), _stratify(allowed[-asking:], there, generator)]
    )


def _stratify(allowed: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """One of each of `count` equal stretches."""
    edges = torch.arange(count + 1) * len(allowed) // count
    return allowed[edges[:-1] + (torch.rand(count, generator=generator) * (edges[1:] - edges[:-1])).long()]


def hash_seed(*parts: Any) -> int:
    """A seed for one purpose, from the recipe's seed and a name: independent streams, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def _checksum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
