"""Optimise: learning rate, optimisers and the running mean of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hashattention.train.recipe import Recipe
from hashattention.train.student import Student

#: Newton-Schulz coefficients of Muon (Jordan et al., 2024) and its steps.
COEFFICIENTS, ROUNDS = (3.4445, -4.7750, 2.0315), 5
#: Root mean square of an entry of Adam's updates, about: with it both optimisers take one learning rate.
UPDATE_SIZE = 0.2


def learning_rate(recipe: Recipe, step: int) -> float:
    """Of step 0, 1, ...: linear warm-up, then constant or a cosine down to a hundredth."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


class Optimiser:
    """The recipe's optimisers over a student's tensors: one for all, or Muon for weights beside Adam for the rest."""

    def __init__(self, student: Student, recipe: Recipe) -> None:
        self.recipe = recipe
        # The sharpness has no part in this loss; without a gradient it would have no state to save.
        self.tensors = {n: t for n, t in student.tensors.items() if recipe.loss != "bce" or n != "sharpness"}
        muon = {name for name in self.tensors if recipe.optimiser == "muon" and ".weights." in name}
        parts = [{n: t for n, t in self.tensors.items() if (n in muon) == chosen} for chosen in (False, True)]
        self.parts = [_adam(parts[0], recipe)] + ([Muon(_groups(parts[1], recipe))] if muon else [])

    def step(self, number: int) -> None:
        """Take step `number` with the gradients there are, and clear them."""
        rate = learning_rate(self.recipe, number)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate * group["factor"]
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """What the optimisers remember, by ``<kind>.<tensor>``."""
        found = {}
        for name, tensor in self.tensors.items():
            for part in self.parts:
                for kind, value in part.state.get(tensor, {}).items():
                    if kind != "step":
                        found[f"{kind}.{name}"] = value
        return found

    def restore(self, held: dict[str, Tensor], step: int) -> None:
        """Put back what `state` gave after `step` steps."""
        for part in self.parts:
            for name, tensor in self.tensors.items():
                mine = any(tensor is one for group in part.param_groups for one in group["params"])
                state: dict[str, Any] = {
                    kind: held[f"{kind}.{name}"].to(tensor.device)
                    for kind in ("exp_avg", "exp_avg_sq", "momentum")
                    if f"{kind}.{name}" in held
                }
                if mine and state:
                    counted = tensor.device if tensor.is_cuda else "cpu"
                    state |= {} if "momentum" in state else {"step": torch.tensor(float(step), device=counted)}
                    part.state[tensor] = state


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is made orthogonal; ``[..., in, out]`` are matrices of their own."""

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": 1e-3, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix."""
        for group in self.param_groups:
            for tensor in group["params"]:
                state = self.state[tensor]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(tensor)
                held = state["momentum"]
                held.lerp_(tensor.grad, 1 - group["momentum"])
                update = orthogonal(tensor.grad.lerp(held, group["momentum"]))
                size = UPDATE_SIZE * max(tensor.shape[-2:]) ** 0.5
                tensor.add_(update, alpha=-group["lr"] * size)


def orthogonal(matrices: Tensor) -> Tensor:
    """About the nearest (semi-)orthogonal matrix of each of ``[..., m, n]``, by Newton-Schulz; float32."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.transpose(-1, -2) if tall else matrices).to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ROUNDS):
        square = x @ x.transpose(-1, -2)
        x = a * x + (b * square + c * square @ square) @ x
    return (x.transpose(-1, -2) if tall else x).float()


class RunningMean:
    """The exponential mean of a student's tensors, with a shorter memory in the first steps."""

    def __init__(self, student: Student, decay: float) -> None:
        self.decay, self.tensors = decay, {n: t.detach().clone() for n, t in student.tensors.items()}

    @torch.no_grad()
    def add(self, student: Student, step: int) -> None:
        """Move towards the tensors after step `step`."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.tensors.values()), [student.tensors[n] for n in self.tensors], weight)


def _adam(tensors: dict[str, Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if recipe.weight_decay else torch.optim.Adam
    # One kernel for all tensors where there is one.
    fused = any(tensor.is_cuda for tensor in tensors.values()) or None
    groups = _groups(tensors, recipe)
    return kind(groups, lr=recipe.learning_rate, fused=fused)


def _groups(tensors: dict[str, Tensor], recipe: Recipe) -> list[dict[str, Any]]:
    """Tensors that share a rate and a decay: weight matrices alone decay."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, tensor in tensors.items():
        factor = recipe.query_rate if name.startswith("query.") else 1.0
        decay = recipe.weight_decay if ".weights." in name else 0.0
        groups.setdefault((factor, decay), []).append(tensor)
    return [{"params": chosen, "factor": f, "weight_decay": d} for (f, d), chosen in groups.items()]
