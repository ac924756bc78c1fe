from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hashattention.ops import reference, triton

CASES = [
    ([[0, 2101], [7, 1500]], [4, 16, 90], 128),
    ([[3, 3], [0, 1]], [4, 16, 90], 110),
    ([[0, 2101], [1024, 2048]], [0, 0, 77], 77),
    ([[0, 2101], [0, 50]], [300, 64, 90], 100),
    ([[0, 2101], [2000, 2101]], [0, 5, 5000], 2300),
    ([[0, 2101], [5, 4000]], [1, 0, 0], 3),
    ([[0, 4101], [2047, 4100]], [16, 64, 300], 380),
]


def compare(scores: Tensor, bounds: list, budget: list, capacity: int, device: str) -> None:
    start, end = torch.tensor(bounds).int().unbind(1)
    budgets = torch.tensor(budget).int().expand(*scores.shape[:2], 3)
    arguments = [part.to(device) for part in (scores, start, end, budgets)]
    actual, expected = triton.select(*arguments, capacity), reference.select(*arguments, capacity)
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[0], expected[0])


@pytest.mark.parametrize(("bounds", "budget", "capacity"), CASES)
@pytest.mark.parametrize("kind", ["normal", "ties", "integers", "all one", "extremes"])
def test_the_index_set_is_the_references(kind: str, bounds: list, budget: list, capacity: int, device: str) -> None:
    shape = 2, 3, max(4101, *(end for _, end in bounds))
    scores = {
        "normal": lambda: torch.randn(shape),
        "ties": lambda: torch.randint(-3, 3, shape).float() * 0.5,
        "integers": lambda: torch.randint(-(2**31), 2**31 - 1, shape).int(),
        "all one": lambda: torch.zeros(shape),
        "extremes": lambda: torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38])[
            torch.randint(7, shape)
        ],
    }[kind]()
    compare(scores, bounds, budget, capacity, device)


def test_neighbours_in_the_last_digit_are_told_apart(device: str) -> None:
    scores = torch.arange(3000).int().add(2**30).view(torch.float32)[torch.randperm(3000)].view(1, 1, -1)
    compare(scores, [[0, 3000]], [0, 0, 1000], 1000, device)
    compare(-scores, [[10, 2900]], [3, 3, 1], 7, device)


def test_poison_outside_a_row_has_no_influence(device: str) -> None:
    scores = torch.randn(1, 2, 700)
    poisoned = scores.clone()
    poisoned[..., :20], poisoned[..., 650:] = torch.inf, torch.nan
    bounds = torch.tensor([20], device=device).int(), torch.tensor([650], device=device).int()
    budgets = torch.tensor([2, 5, 60], device=device).int().expand(1, 2, 3)
    for one, other in zip(
        triton.select(poisoned.to(device), *bounds, budgets, 80),
        reference.select(scores.to(device), *bounds, budgets, 80),
        strict=True,
    ):
        assert torch.equal(one, other)
