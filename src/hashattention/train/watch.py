"""Watch: the loss of hard codes on held-out sequences while training, the best weights, and when to stop."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hashattention.train.losses import selection_loss
from hashattention.train.recipe import Recipe
from hashattention.train.shards import Samples
from hashattention.train.student import Student
from hashattention.train.targets import LiveTargets, decode, encode, lesson


class Watch:
    """Sees a student every `Recipe.check_every` steps.

    Parameters
    ----------
    student : Student
    held_out : Samples
        Sequences that are not trained on; the targets of all their queries are made once, a byte each.

    Attributes
    ----------
    best : dict of str to Tensor
        The tensors that had the least loss; empty before the first look.
    least : float
        Their loss: the mean over sequences, layers and selection heads.
    misses : int
        Looks since then.
    """

    def __init__(self, student: Student, held_out: Samples, device: torch.device) -> None:
        self.student, self.held_out, self.device = student, held_out, device
        self.best: dict[str, Tensor] = {}
        self.least, self.misses = math.inf, 0
        live = LiveTargets(student.recipe, student.base)
        self._steps = []
        for index in range(len(held_out)):
            sample = held_out.read(index, student.first, student.last).to(device)
            every = torch.arange(len(sample.positions), device=device)
            found = lesson(live, student.recipe, index, every, sample)
            self._steps.append((encode(found.target), found.heavy))

    @staticmethod
    def due(recipe: Recipe, step: int) -> bool:
        """Whether to look after `step` steps."""
        return step % recipe.check_every == 0 or step == recipe.steps

    def look(self, tensors: dict[str, Tensor]) -> bool:
        """Take the loss of `tensors`; whether training should go on."""
        loss = self.loss(tensors)
        if loss < self.least:
            self.least, self.misses = loss, 0
            self.best = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        else:
            self.misses += 1
        return self.misses < self.student.recipe.patience

    @torch.no_grad()
    def loss(self, tensors: dict[str, Tensor]) -> float:
        """Mean loss of a student with these tensors and hard codes."""
        student = self.student
        own, student.tensors = student.tensors, tensors
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        try:
            for index, (steps, heavy) in enumerate(self._steps):
                sample = self.held_out.read(index, student.first, student.last).to(self.device)
                scores = student.scores(sample, hard=True)
                total += selection_loss(scores, decode(steps), heavy, student.recipe).double().mean()
        finally:
            student.tensors = own
        return float(total) / len(self._steps)

    def state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What a checkpoint holds: tensors, and the numbers as text."""
        numbers = {"least": self.least.hex(), "misses": str(self.misses)}
        return {f"best.{name}": tensor for name, tensor in self.best.items()}, numbers

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, str]) -> None:
        """Put back what `state` gave."""
        self.least, self.misses = float.fromhex(numbers["least"]), int(numbers["misses"])
        named = {name: tensors.get(f"best.{name}") for name in self.student.tensors}
        self.best = {name: tensor.to(self.device) for name, tensor in named.items() if tensor is not None}
