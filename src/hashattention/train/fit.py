"""Fit: the training loop; all heads of a group of layers are one batched computation, resumable at any step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hashattention.config import BaseModel
from hashattention.maps import HashMaps
from hashattention.models.packaged import Progress
from hashattention.train.labels import heavy_candidates, tensor_float32
from hashattention.train.losses import total
from hashattention.train.optimise import Optimiser, RunningMean
from hashattention.train.recipe import Recipe
from hashattention.train.shards import MemoryShards, Samples, hash_seed, resident, sample_bytes
from hashattention.train.student import Student, measure_moments
from hashattention.train.targets import LiveTargets, StoredTargets, Targets, free_bytes, stored_bytes

#: Bytes one step may use on a CPU, and the share of a GPU's free memory it may use.
CPU_BYTES = 2 << 30
GPU_SHARE = 0.4
#: Share of a GPU's free memory that stored targets may take.
STORED_SHARE = 0.6
#: Steps whose draws are moved to the device together.
PLANNED = 256


def fit(
    samples: Samples,
    base: BaseModel,
    recipe: Recipe,
    folder: Path | None,
    *,
    device: torch.device,
    memory_bytes: int | None = None,
    targets: Targets | None = None,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
) -> HashMaps:
    """Train the maps of every layer of `base` on `samples`.

    Parameters
    ----------
    samples : Samples
        Training sequences.
    base, recipe
        The model and how to train.
    folder : Path or None
        Where checkpoints are; finished and half-finished layers found there are continued, to the same bits. None
        keeps none.
    device : torch.device
    memory_bytes : int, optional
        What one step may use; decides how many layers are trained at once.
    targets : Targets, optional
        Of all layers, which are then trained at once. By default those of each group of layers are stored where a GPU
        has room for them, and made in every step elsewhere.
    dtype : torch.dtype
        The weights of the result are rounded to it (and kept in float32), so that metrics see what is saved.
    progress : callable, optional
        Called as ``progress(text, steps done, steps in all)``.

    Returns
    -------
    HashMaps
        On the CPU.
    """
    bound = memory_bytes if memory_bytes is not None else _default_bytes(device)
    at_once = len(base.layers) if targets is not None else max(1, bound // layer_bytes(recipe, base))
    groups = [(first, min(first + at_once, len(base.layers))) for first in range(0, len(base.layers), at_once)]
    parts = []
    for number, (first, last) in enumerate(groups):

        def report(step: int, done: int = number * recipe.steps) -> None:
            if progress is not None:
                progress("training", done + step, len(groups) * recipe.steps)

        near = _nearby(samples, recipe, base, first, last, device)
        moments = measure_moments(near, first, last, recipe.maps, base, device)
        student = Student(recipe, base, first, last, moments)
        path = None if folder is None else folder / f"layers-{first:03d}-{last:03d}.safetensors"
        taught = targets or _targets(near, recipe, base, first, last, device)
        parts.append(student.folded(dtype, _run(student, near, taught, path, device, report)))
    maps = HashMaps(recipe.maps, base)
    maps.load_state_dict({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return maps.requires_grad_(False)


def _nearby(samples: Samples, recipe: Recipe, base: BaseModel, first: int, last: int, device: torch.device) -> Samples:
    """Samples on disk are taken into a GPU's memory where half of what is free holds these layers."""
    if device.type != "cuda" or isinstance(samples, MemoryShards):
        return samples
    needed = len(samples) * sample_bytes(recipe, base, held_out=False) * (last - first) // len(base.layers)
    fits = needed < free_bytes(device) * 0.5
    return resident(samples, first, last, device) if fits else samples


def _targets(samples: Samples, recipe: Recipe, base: BaseModel, first: int, last: int, device: torch.device) -> Targets:
    if device.type == "cuda":
        needed = stored_bytes(recipe, base, len(samples), last - first)
        if needed < free_bytes(device) * STORED_SHARE:
            return StoredTargets(samples, recipe, base, first, last, device)
    return LiveTargets(recipe, base)


def layer_bytes(recipe: Recipe, base: BaseModel) -> int:
    """Roughly what one step needs per layer, in bytes: score matrices of teacher and student, and activations."""
    pairs = 4 * recipe.step_queries * recipe.context
    activations = 4 * recipe.context * (sum(recipe.maps.widths) + recipe.maps.bits + 2 * base.head_dim)
    teacher, student = (
        3 * base.num_attention_heads,
        6 * recipe.maps.selection_heads(base) + recipe.maps.code_heads(base),
    )
    return (teacher + student) * pairs + 3 * recipe.maps.signature_heads(base) * activations


def draw(recipe: Recipe, step: int, sequences: int, held: int) -> list[tuple[int, Tensor]]:
    """What a step sees: (sequence, indices into its `held` queries); it depends on recipe and step alone."""
    drawn = []
    for turn in range(step * recipe.step_sequences, (step + 1) * recipe.step_sequences):
        epoch, place = divmod(turn, sequences)
        order = torch.randperm(sequences, generator=_generator(recipe, "epoch", epoch))
        generator, count = _generator(recipe, "queries", turn), min(recipe.step_queries, held)
        if recipe.sampling == "chunk_tail":
            block = int(torch.randint(max(1, held // count), (1,), generator=generator))
            index = torch.arange(block * count, (block + 1) * count)
        else:
            index = torch.randperm(held, generator=generator)[:count].sort().values
        drawn.append((int(order[place]), index))
    return drawn


def _generator(recipe: Recipe, purpose: str, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash_seed(recipe.seed, purpose, number))


def _default_bytes(device: torch.device) -> int:
    return int(free_bytes(device) * GPU_SHARE) if device.type == "cuda" else CPU_BYTES


def _run(
    student: Student,
    samples: Samples,
    targets: Targets,
    path: Path | None,
    device: torch.device,
    report: Callable[[int], None],
) -> dict[str, Tensor]:
    """Train from the checkpoint at `path`, if there is one, to the last step; the tensors to keep."""
    recipe = student.recipe
    optimiser = Optimiser(student, recipe)
    mean = RunningMean(student, recipe.average) if recipe.average else None
    done = _load(path, student, optimiser, mean) if path is not None else 0
    report(done)
    held = samples.read(0, student.first, student.first + 1).query.shape[2]
    for step in range(done, recipe.steps):
        if (step - done) % PLANNED == 0:
            plan = _plan(recipe, range(step, min(step + PLANNED, recipe.steps)), len(samples), held, device)
        for index, queries in plan[step]:
            _backward(student, samples, targets, step, index, queries, device)
        optimiser.step(step)
        if mean is not None:
            mean.add(student, step)
        if path is not None and ((step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps):
            _save(path, student, optimiser, mean, step + 1)
        report(step + 1)
    return student.tensors if mean is None else mean.tensors


def _plan(
    recipe: Recipe, steps: range, sequences: int, held: int, device: torch.device
) -> dict[int, list[tuple[int, Tensor]]]:
    """`draw` of many steps, moved to the device at once: a step of its own never waits for a copy."""
    drawn = {step: draw(recipe, step, sequences, held) for step in steps}
    moved = torch.stack([queries for each in drawn.values() for _, queries in each]).to(device)
    rows = iter(moved.unbind(0))
    return {step: [(index, next(rows)) for index, _ in each] for step, each in drawn.items()}


def slope(recipe: Recipe, step: int) -> float:
    """Slope of the bits' tanh at a step: from 1 to `anneal`, geometrically, over the soft steps."""
    soft = max(1.0, recipe.straight_through * recipe.steps)
    return float(recipe.anneal ** min(1.0, step / soft))


def _backward(
    student: Student,
    samples: Samples,
    targets: Targets,
    step: int,
    index: int,
    queries: Tensor,
    device: torch.device,
) -> None:
    recipe = student.recipe
    sample = samples.read(index, student.first, student.last).to(device).pick(queries)
    with torch.no_grad():
        target = targets.of(index, queries, sample)
    heavy = heavy_candidates(sample.positions, sample.key.shape[2], recipe.sink, recipe.local)
    hard = step >= recipe.straight_through * recipe.steps
    fast = student.dtype == torch.bfloat16
    with tensor_float32(device) if fast else contextlib.nullcontext():
        query, key = student.codes(sample, hard, slope(recipe, step))
        loss = total(student.compare(query, key), key, target, heavy, recipe)
        (loss / recipe.step_sequences).backward()


def _save(path: Path, student: Student, optimiser: Optimiser, mean: RunningMean | None, step: int) -> None:
    from safetensors.torch import save_file

    tensors = {f"weight.{name}": tensor.detach() for name, tensor in student.tensors.items()} | optimiser.state()
    if mean is not None:
        tensors |= {f"mean.{name}": tensor for name, tensor in mean.tensors.items()}
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata={"step": str(step)}
    )
    partial.replace(path)


def _load(path: Path, student: Student, optimiser: Optimiser, mean: RunningMean | None) -> int:
    """Continue from a checkpoint: the steps it has seen; 0 if there is none, or one that cannot be read."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            step = int(file.metadata()["step"])
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return 0
    for name, tensor in student.tensors.items():
        tensor.data.copy_(held[f"weight.{name}"])
        if mean is not None:
            mean.tensors[name].copy_(held[f"mean.{name}"])
    optimiser.restore(held, step)
    return step
