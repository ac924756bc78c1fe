"""Run: text to a maps folder, the whole of training: capture, fit, metrics, save."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hashattention import provenance
from hashattention.config import BaseModel, Budget
from hashattention.maps import HashMaps
from hashattention.models.packaged import Progress
from hashattention.train import budgets, metrics, remainder, shards, temperatures
from hashattention.train.fit import fit
from hashattention.train.ranks import Ranks
from hashattention.train.recipe import Recipe
from hashattention.train.shards import FolderShards, MemoryShards, Part, Samples
from hashattention.train.targets import thin
from hashattention.train.text import Sequences, Texts, sequences

if TYPE_CHECKING:
    from hashattention.models.capture import Sample
    from hashattention.models.source import LoadedModel

#: Inside the output folder until training is done: checkpoints, and shards one folder down.
WORK = "work"
SHARDS = "shards"
#: Tokens a GPU reads at once while capturing.
GPU_CHUNK = 131072


@dataclasses.dataclass(frozen=True)
class Captured:
    """The samples of a run."""

    train: MemoryShards | FolderShards
    held_out: MemoryShards | FolderShards


def train(
    model: str | os.PathLike[str] | LoadedModel,
    texts: Texts | None,
    out: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    held_out_texts: Texts | None = None,
    resume: bool = True,
    in_memory: bool | None = None,
    keep_work: bool = False,
    disk_bytes: int | None = None,
    memory_bytes: int | None = None,
    device: str | torch.device | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train hash maps for a model and save them as a maps folder.

    Under `torchrun` (see `ranks.start`) every process trains layers of its own and the first one writes the folder.

    Parameters
    ----------
    model : str, path or LoadedModel
        What `load_model` takes, or gives.
    texts : path, `datasets` name or a list; None streams OpenWebText
        What the model reads; see `text.sequences`.
    out : path
        The maps folder to write. While training, `out`/work holds shards and checkpoints: the same call continues an
        interrupted one, to the same weights.
    recipe : Recipe, optional
        `Recipe.group()` by default.
    held_out_texts : likewise, optional
        Text for the metrics; by default other documents of `texts`.
    resume : bool
        False starts over.
    in_memory : bool, optional
        Keep what is captured in (GPU) memory and off the disk. By default on a GPU with room for it.
    keep_work : bool
        Keep `out`/work at the end.
    disk_bytes, memory_bytes : int, optional
        What the shards, and one training step, may use.
    device : optional
        Where to load and train; by default a GPU if there is one. A LoadedModel stays where it is.
    command : str, optional
        The command that repeats this run, for the record.
    progress : callable, optional
        Called as ``progress(text, done, total)``.

    Returns
    -------
    dict
        `out`, `recipe`, `metrics` (per budget and layer, see `metrics.summarise`), `text`, `origin`.

    Raises
    ------
    TextError
        For missing or too little text.
    ConfigError, UnsupportedModelError, ModelNotFoundError
        For the recipe or the model.
    CheckpointError
        If `out` holds an unfinished run with other settings, or the shards need more disk than there is.
    """
    from hashattention.models.describe import describe
    from hashattention.models.rotary import rotary_frequencies

    recipe, ranks = recipe or Recipe.group(), Ranks.here()
    progress = progress if ranks.first else None
    loaded = _load(model, device, progress)
    where = next(loaded.model.parameters()).device
    whole = dataclasses.replace(describe(loaded.model), name=loaded.source.hub_id or Path(loaded.source.name).name)
    if recipe.maps.rope != "after":
        whole = dataclasses.replace(whole, frequencies=rotary_frequencies(loaded.model))
    base = ranks.share(whole)
    text = sequences(
        loaded.tokenizer, texts, context=recipe.context, count=recipe.sequences, held_out=recipe.held_out,
        seed=recipe.seed, held_out_texts=held_out_texts, lengths=recipe.lengths, asks=recipe.asks,
        progress=progress,
    )  # fmt: skip
    folder = Path(out) / WORK
    own = folder if ranks.world == 1 else folder / f"rank-{ranks.rank}-of-{ranks.world}"
    weights = shards.weights_fingerprint(loaded.model)
    _prepare(own, recipe, base, weights, text.fingerprint, resume)
    settings = shards.capture_settings(recipe, base, weights, text.fingerprint)
    memory = _fits(recipe, base, where) if in_memory is None else in_memory
    if not memory:
        shards.check_disk(own / SHARDS, shards.capture_bytes(recipe, base), disk_bytes)
    captured = capture_all(loaded.model, base, text, recipe, None if memory else own / SHARDS, settings, progress)
    maps = fit(
        captured.train, base, recipe, own, device=where, memory_bytes=memory_bytes, held_out=captured.held_out,
        progress=progress,
    )  # fmt: skip
    shares = share_budgets(captured, base, maps, recipe, where, ranks) if recipe.fit_budgets else None
    fitted = fit_temperatures(captured.train, base, maps, recipe, where, ranks)
    maps = ranks.join_maps(maps, recipe, whole)
    maps.shares, maps.temperatures = shares, fitted
    maps.remainder = ranks.by_first(lambda: fit_remainder(loaded.model, whole, text, maps, recipe, progress))
    measured = measure(captured, base, maps, recipe, where, progress)
    report: dict[str, Any] = {
        "recipe": recipe.as_dict(),
        "metrics": metrics.summarise(ranks.join_tables(measured), _budgets(recipe), whole) if measured else {},
        "text": text.fingerprint,
        "origin": provenance.origin(where, command),
    }
    maps.training_info = report
    if ranks.first:
        maps.cpu().save_pretrained(out, recipe.stored)
    ranks.wait()
    if not keep_work and ranks.first:
        shutil.rmtree(folder, ignore_errors=True)
    return {"out": str(out), **report}


def capture_all(
    model: Any,
    base: BaseModel,
    text: Sequences,
    recipe: Recipe,
    folder: Path | None,
    settings: dict[str, Any],
    progress: Progress | None,
) -> Captured:
    """Samples of all sequences: in `folder` (what is whole there is not captured again), or in memory if it is None."""
    if folder is None:
        captured = Captured(MemoryShards(), MemoryShards())
    else:
        captured = Captured(*(FolderShards(folder / side, settings) for side in ("train", "held-out")))
    total = len(text.train) + len(text.held_out)
    for index, tokens in enumerate([*text.held_out, *text.train]):
        held_out = index < len(text.held_out)
        number = index if held_out else index - len(text.held_out)
        target = captured.held_out if held_out else captured.train
        positions = shards.draw_positions(recipe, number, held_out=held_out)
        value = held_out or recipe.weigh != "none"
        make = _capturing(model, base, tokens, positions, value)
        if recipe.keep_tokens and not held_out:
            make = _thinning(make, recipe, base, number, text.facts.get(number))
        target.obtain(f"{number:05d}", make)
        if progress is not None:
            progress("capturing queries and keys", index + 1, total)
    return captured


def share_budgets(
    captured: Captured, base: BaseModel, maps: HashMaps, recipe: Recipe, device: torch.device, ranks: Ranks
) -> budgets.Shares:
    """The recipe's mean heavy budget, shared by the error curves of the first half of the held-out sequences."""
    half = Part(captured.held_out, 0, len(captured.held_out) // 2)
    budget = Budget(heavy=float(recipe.fit_budgets), sink=recipe.sink, local=recipe.local)
    errors = ranks.join_tables(budgets.curves(half, base, maps, budget, device))["hash"][..., 0]
    return budgets.as_shares(budgets.allocate(errors), recipe.maps.selection_heads(base))


def fit_temperatures(
    samples: Samples, base: BaseModel, maps: HashMaps, recipe: Recipe, device: torch.device, ranks: Ranks | None = None
) -> tuple[tuple[float, ...], ...]:
    """Temperatures of the scores, of all ranks' layers, on the first training sequences."""
    first = Part(samples, 0, min(temperatures.SEQUENCES, len(samples)))
    table = temperatures.fit(first, base, maps, sink=recipe.sink, local=recipe.local, device=device)
    if ranks is not None:
        table = ranks.join_tables({"all": table[None]})["all"][0]
    return temperatures.as_temperatures(table)


def fit_remainder(
    model: Any,
    base: BaseModel,
    text: Sequences,
    maps: HashMaps,
    recipe: Recipe,
    progress: Progress | None = None,
) -> remainder.Remainder:
    """The remainder's coefficients from the first training sequences, and the first of those that ask for facts, which
    the model reads again.
    """
    count = remainder.SEQUENCES // (2 if text.facts else 1)
    plain = [number for number in range(len(text.train)) if number not in text.facts][:count]
    tokens = [text.train[number] for number in [*plain, *list(text.facts)[:count]]]
    table = remainder.fit(
        model, base, maps, tokens, sink=recipe.sink, local=recipe.local, steps=recipe.prediction_steps,
        asking=range(len(plain), len(tokens)), chunk=reading_chunk(model), progress=progress,
    )  # fmt: skip
    return remainder.as_remainder(table)


def measure(
    captured: Captured,
    base: BaseModel,
    maps: HashMaps,
    recipe: Recipe,
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Held-out quality of `maps` beside exact selections at the recipe's budgets; empty without held-out sequences."""
    if not len(captured.held_out):
        return {}
    methods: dict[str, HashMaps | None] = {"hash": maps, metrics.FILLED: maps, **dict.fromkeys(metrics.EXACT)}
    # Where the budgets were fitted on one half, only the other one judges.
    first = len(captured.held_out) // 2 if recipe.fit_budgets else 0
    rest = Part(captured.held_out, first, len(captured.held_out))
    return metrics.measure(rest, base, methods, _budgets(recipe), device=device, progress=progress)


def _budgets(recipe: Recipe) -> list[Budget]:
    return [Budget(heavy=share, sink=recipe.sink, local=recipe.local) for share in recipe.budgets]


def _capturing(model: Any, base: BaseModel, tokens: Tensor, positions: Tensor, value: bool) -> Callable[[], Sample]:
    from hashattention.models.capture import capture

    return lambda: capture(model, base, tokens, positions, value=value, chunk=reading_chunk(model))


def reading_chunk(model: Any) -> int:
    """A GPU reads much at once, and in one piece its attention is causal without a mask."""
    from hashattention.models.capture import CHUNK

    return GPU_CHUNK if next(model.parameters()).is_cuda else CHUNK


def _thinning(
    make: Callable[[], Sample], recipe: Recipe, base: BaseModel, number: int, facts: Tensor | None
) -> Callable[[], Sample]:
    generator = torch.Generator().manual_seed(shards.hash_seed(recipe.seed, "tokens", number))
    return lambda: thin(make(), recipe, base, generator, facts)


def _load(
    model: str | os.PathLike[str] | LoadedModel, device: str | torch.device | None, progress: Progress | None
) -> LoadedModel:
    from hashattention.models.source import LoadedModel, load_model

    if isinstance(model, LoadedModel):
        return model
    chosen = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    # Many processors multiply bfloat16 twenty times slower than float32.
    dtype = torch.float32 if torch.device(chosen).type == "cpu" else None
    return load_model(model, device=chosen, dtype=dtype, progress=progress)


def _prepare(folder: Path, recipe: Recipe, base: BaseModel, weights: str, texts: str, resume: bool) -> None:
    """Make the work folder, refusing one of another run; `run.json` says whose it is."""
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    settings = {**shards.capture_settings(recipe, base, weights, texts), "recipe": recipe.as_dict()}
    shards.claim(folder / "run.json", settings, f"the unfinished run in {folder}")


def _fits(recipe: Recipe, base: BaseModel, device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    # Samples that bring their targets are all there is beside a step.
    share = 0.7 if recipe.keep_tokens else 0.5
    return shards.capture_bytes(recipe, base) < torch.cuda.mem_get_info(device)[0] * share
