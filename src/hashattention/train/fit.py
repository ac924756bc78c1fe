"""Fit: the training loop; all heads of a group of layers are one batched computation, resumable at any step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hashattention.config import BaseModel
from hashattention.maps import HashMaps
from hashattention.models.packaged import Progress
from hashattention.train import labels
from hashattention.train.losses import loss_per_head
from hashattention.train.recipe import Recipe
from hashattention.train.shards import Samples, hash_seed
from hashattention.train.student import Student, measure_moments

#: Bytes one step may use on a CPU, and the share of a GPU's free memory it may use.
CPU_BYTES = 2 << 30
GPU_SHARE = 0.4


def fit(
    samples: Samples,
    base: BaseModel,
    recipe: Recipe,
    folder: Path,
    *,
    device: torch.device,
    memory_bytes: int | None = None,
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
    folder : Path
        Where checkpoints are; finished and half-finished layers found there are continued, to the same bits.
    device : torch.device
    memory_bytes : int, optional
        What one step may use; decides how many layers are trained at once.
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
    at_once = max(1, min(len(base.layers), bound // layer_bytes(recipe, base)))
    groups = [(first, min(first + at_once, len(base.layers))) for first in range(0, len(base.layers), at_once)]
    parts = []
    for number, (first, last) in enumerate(groups):

        def report(step: int, done: int = number * recipe.steps) -> None:
            if progress is not None:
                progress("training", done + step, len(groups) * recipe.steps)

        moments = measure_moments(samples, first, last, recipe.maps, base, device)
        student = Student(recipe, base, first, last, moments)
        _run(student, samples, recipe, folder / f"layers-{first:03d}-{last:03d}.safetensors", device, report)
        parts.append(student.folded(dtype))
    maps = HashMaps(recipe.maps, base)
    maps.load_state_dict({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return maps.requires_grad_(False)


def layer_bytes(recipe: Recipe, base: BaseModel) -> int:
    """Roughly what one step needs per layer, in bytes: score matrices of teacher and student, and activations."""
    pairs = 4 * recipe.step_queries * recipe.context
    activations = 4 * recipe.context * (sum(recipe.maps.widths) + recipe.maps.bits + 2 * base.head_dim)
    teacher, student = (
        3 * base.num_attention_heads,
        6 * recipe.maps.selection_heads(base) + recipe.maps.code_heads(base),
    )
    return (teacher + student) * pairs + 3 * recipe.maps.signature_heads(base) * activations


def learning_rate(recipe: Recipe, step: int) -> float:
    """Of step 0, 1, ...: linear warm-up, then constant or a cosine down to a hundredth."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


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
    return int(torch.cuda.mem_get_info(device)[0] * GPU_SHARE) if device.type == "cuda" else CPU_BYTES


def _run(
    student: Student, samples: Samples, recipe: Recipe, path: Path, device: torch.device, report: Callable[[int], None]
) -> None:
    optimiser = _optimiser(student, recipe)
    done = _load(path, student, optimiser)
    report(done)
    held = samples.read(0, student.first, student.last).query.shape[2]
    for step in range(done, recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(recipe, step)
        optimiser.zero_grad(set_to_none=True)
        hard = step >= recipe.straight_through * recipe.steps
        for index, queries in draw(recipe, step, len(samples), held):
            _backward(student, samples, index, queries, hard, device)
        optimiser.step()
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
            _save(path, student, optimiser, step + 1)
        report(step + 1)


def _backward(
    student: Student, samples: Samples, index: int, queries: Tensor, hard: bool, device: torch.device
) -> None:
    recipe = student.recipe
    sample = samples.read(index, student.first, student.last).to(device).pick(queries.to(device))
    shared = student.selection_heads != student.base.num_attention_heads
    with torch.no_grad():
        options = {"shared": shared, "pool": recipe.pool, "sink": recipe.sink, "local": recipe.local}
        teacher = labels.teach(sample.query, sample.key, sample.positions, sample.scale, **options)  # type: ignore[arg-type]
    loss = loss_per_head(student.scores(sample, hard), teacher, recipe)
    # Heads are independent: summed, each has the gradient it would have alone.
    (loss.sum() / recipe.step_sequences).backward()


def _optimiser(student: Student, recipe: Recipe) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if recipe.weight_decay else torch.optim.Adam
    parameters = list(student.tensors.values())
    if recipe.loss == "bce":
        # The sharpness has no part in this loss; without a gradient it would have no state to save.
        parameters = [tensor for name, tensor in student.tensors.items() if name != "sharpness"]
    return kind(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


def _save(path: Path, student: Student, optimiser: torch.optim.Optimizer, step: int) -> None:
    from safetensors.torch import save_file

    tensors = {f"weight.{name}": tensor.detach() for name, tensor in student.tensors.items()}
    for name, tensor in student.tensors.items():
        for key in ("exp_avg", "exp_avg_sq"):
            if tensor in optimiser.state:
                tensors[f"{key}.{name}"] = optimiser.state[tensor][key]
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata={"step": str(step)}
    )
    partial.replace(path)


def _load(path: Path, student: Student, optimiser: torch.optim.Optimizer) -> int:
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
        if f"exp_avg.{name}" in held:
            moments = {key: held[f"{key}.{name}"].to(tensor.device) for key in ("exp_avg", "exp_avg_sq")}
            optimiser.state[tensor] = {"step": torch.tensor(float(step)), **moments}
    return step
