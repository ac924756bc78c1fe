"""Fit: the training loop; all heads of a group of layers are one batched computation, resumable at any step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hashattention.config import BaseModel
from hashattention.maps import HashMaps
from hashattention.models.packaged import Progress
from hashattention.train import checkpoint
from hashattention.train.labels import tensor_float32
from hashattention.train.losses import total
from hashattention.train.optimise import Optimiser, RunningMean
from hashattention.train.recipe import Recipe
from hashattention.train.shards import MemoryShards, Samples, hash_seed, resident, sample_bytes
from hashattention.train.student import Student, measure_moments
from hashattention.train.targets import (
    KeptTargets,
    LiveTargets,
    StoredTargets,
    Targets,
    draw_tokens,
    free_bytes,
    lesson,
    stored_bytes,
)
from hashattention.train.watch import Watch

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
    held_out: Samples | None = None,
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
    held_out : Samples, optional
        What a recipe with `patience` watches.
    progress : callable, optional
        Called as ``progress(text, steps done, steps in all)``.

    Returns
    -------
    HashMaps
        On the CPU, its weights rounded to what is saved (`Recipe.weights`) and kept in float32.
    """
    bound = memory_bytes if memory_bytes is not None else _default_bytes(device)
    live = not _has_room(samples, recipe, base, device)
    at_once = len(base.layers) if targets is not None else max(1, bound // layer_bytes(recipe, base, live=live))
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
        watch = Watch(student, held_out, device) if recipe.patience and held_out is not None else None
        course = Course(student, near, taught, device, watch)
        parts.append(student.folded(recipe.stored, course.run(path, report)))
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
    if recipe.keep_tokens:
        return KeptTargets(recipe)
    if device.type == "cuda":
        needed = stored_bytes(recipe, base, len(samples), last - first)
        if needed < free_bytes(device) * STORED_SHARE:
            return StoredTargets(samples, recipe, base, first, last, device)
    return LiveTargets(recipe, base)


def _has_room(samples: Samples, recipe: Recipe, base: BaseModel, device: torch.device) -> bool:
    """Whether the targets of all layers are, or can be, stored beside these samples."""
    if recipe.keep_tokens:
        return True
    if device.type != "cuda" or not isinstance(samples, MemoryShards):
        return False
    return stored_bytes(recipe, base, len(samples), len(base.layers)) < free_bytes(device) * STORED_SHARE


def layer_bytes(recipe: Recipe, base: BaseModel, *, live: bool = True) -> int:
    """Roughly what one step needs per layer, in bytes: score matrices of the student and, where its targets are made
    in the step (`live`), of the teacher, and activations.
    """
    seen = min(recipe.context, recipe.step_tokens or recipe.context)
    activations = 4 * seen * (sum(recipe.maps.widths) + recipe.maps.bits + 2 * base.head_dim)
    teacher = 3 * base.num_attention_heads * recipe.context if live else 0
    codes = recipe.maps.code_heads(base) * recipe.maps.mixture
    student = (6 * recipe.maps.selection_heads(base) + codes) * seen
    return 4 * recipe.step_queries * (teacher + student) + 3 * recipe.maps.signature_heads(base) * activations


class Turn(NamedTuple):
    """What a step sees of one sequence: its number, indices into its queries, and its tokens (None: all)."""

    sequence: int
    queries: Tensor
    tokens: Tensor | None


def draw(recipe: Recipe, step: int, lengths: Sequence[int], held: int) -> list[Turn]:
    """What a step sees of sequences of these lengths with `held` queries each; it depends on recipe and step alone."""
    drawn = []
    for turn in range(step * recipe.step_sequences, (step + 1) * recipe.step_sequences):
        epoch, place = divmod(turn, len(lengths))
        sequence = int(torch.randperm(len(lengths), generator=_generator(recipe, "epoch", epoch))[place])
        generator, count = _generator(recipe, "queries", turn), min(recipe.step_queries, held)
        if recipe.sampling == "chunk_tail":
            block = int(torch.randint(max(1, held // count), (1,), generator=generator))
            index = torch.arange(block * count, (block + 1) * count)
        else:
            index = torch.randperm(held, generator=generator)[:count].sort().values
        drawn.append(Turn(sequence, index, draw_tokens(lengths[sequence], recipe.step_tokens, generator)))
    return drawn


def _generator(recipe: Recipe, purpose: str, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash_seed(recipe.seed, purpose, number))


def _default_bytes(device: torch.device) -> int:
    return int(free_bytes(device) * GPU_SHARE) if device.type == "cuda" else CPU_BYTES


class Course:
    """The training of one group of layers.

    Parameters
    ----------
    student, samples, targets
        Who learns what.
    device : torch.device
    watch : Watch, optional
        Ends it early.
    """

    def __init__(
        self, student: Student, samples: Samples, targets: Targets, device: torch.device, watch: Watch | None = None
    ) -> None:
        self.student, self.samples, self.targets, self.device, self.watch = student, samples, targets, device, watch
        self.recipe = student.recipe
        self.optimiser = Optimiser(student, self.recipe)
        self.mean = RunningMean(student, self.recipe.average) if self.recipe.average else None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What would be kept now: the running mean, or the student's own."""
        return self.student.tensors if self.mean is None else self.mean.tensors

    def run(self, path: Path | None, report: Callable[[int], None]) -> dict[str, Tensor]:
        """Train from the checkpoint at `path`, if there is one, to the last step; the tensors to keep."""
        recipe, student = self.recipe, self.student
        done = checkpoint.load(path, student, self.optimiser, self.mean, self.watch) if path is not None else 0
        report(done)
        first = student.first
        lengths = [self.samples.read(index, first, first + 1).key.shape[2] for index in range(len(self.samples))]
        held = self.samples.read(0, first, first + 1).query.shape[2]
        begun = done
        for step in range(begun, recipe.steps):
            if (step - begun) % PLANNED == 0:
                plan = _plan(recipe, range(step, min(step + PLANNED, recipe.steps)), lengths, held, self.device)
            for turn in plan[step]:
                self._learn(step, turn)
            self.optimiser.step(step)
            if self.mean is not None:
                self.mean.add(student, step)
            done = step + 1
            if self.watch is not None and self.watch.due(recipe, done) and not self.watch.look(self.tensors):
                done = recipe.steps
            if path is not None and (done % recipe.checkpoint_every == 0 or done == recipe.steps):
                checkpoint.save(path, student, self.optimiser, self.mean, self.watch, done)
            report(done)
            if done == recipe.steps:
                break
        return self.watch.best if self.watch is not None else self.tensors

    def _learn(self, step: int, turn: Turn) -> None:
        """Add the gradient of one sequence."""
        recipe, student = self.recipe, self.student
        sample = self.samples.read(turn.sequence, student.first, student.last).to(self.device).pick(turn.queries)
        with torch.no_grad():
            taught = lesson(self.targets, recipe, turn.sequence, turn.queries, sample, turn.tokens)
        hard = step >= recipe.straight_through * recipe.steps
        fast = student.dtype == torch.bfloat16
        with tensor_float32(self.device) if fast else contextlib.nullcontext():
            query, key = student.codes(taught.sample, hard, slope(recipe, step))
            scores = student.compare(query, key)
            loss = total(scores, key, taught.target, taught.heavy, recipe)
            (loss / recipe.step_sequences).backward()


def _plan(recipe: Recipe, steps: range, lengths: list[int], held: int, device: torch.device) -> dict[int, list[Turn]]:
    """`draw` of many steps, moved to the device at once: a step of its own never waits for a copy."""
    drawn = {step: draw(recipe, step, lengths, held) for step in steps}
    every = [part for turns in drawn.values() for turn in turns for part in turn[1:] if part is not None]
    moved = iter(torch.cat(every).to(device).split([len(part) for part in every]))
    return {
        step: [Turn(turn.sequence, next(moved), None if turn.tokens is None else next(moved)) for turn in turns]
        for step, turns in drawn.items()
    }


def slope(recipe: Recipe, step: int) -> float:
    """Slope of the bits' tanh at a step: from 1 to `anneal`, geometrically, over the soft steps."""
    soft = max(1.0, recipe.straight_through * recipe.steps)
    return float(recipe.anneal ** min(1.0, step / soft))
