from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from tests.train.bytes_model import tiny_recipe

from hashattention.train.optimise import Optimiser, learning_rate, orthogonal


def test_the_rate_warms_up_and_falls():
    recipe = tiny_recipe(steps=100, warmup=10, learning_rate=1.0)
    assert [learning_rate(recipe, step) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert learning_rate(recipe, 10) == pytest.approx(1.0) and learning_rate(recipe, 99) == pytest.approx(
        0.01, abs=1e-3
    )
    assert learning_rate(dataclasses.replace(recipe, schedule="constant"), 99) == 1.0


@pytest.mark.parametrize("shape", [(3, 2, 8, 24), (2, 1, 24, 8), (1, 1, 16, 16)])
def test_every_matrix_of_a_stack_is_made_orthogonal(shape):
    found = orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7)
    singular = torch.linalg.svdvals(found)
    assert found.shape == shape and singular.min() > 0.6 and singular.max() < 1.3
    assert orthogonal(torch.zeros(2, 3, 4)).abs().max() == 0


def test_weights_decay_and_nothing_else_does():
    names = ("query.weights.0", "query.biases.0", "key.weights.0", "sharpness")
    student = SimpleNamespace(tensors={name: torch.full((2, 2), 3.0, requires_grad=True) for name in names})
    recipe = tiny_recipe(learning_rate=0.5, weight_decay=0.1, warmup=0, schedule="constant", query_rate=0.5)
    optimiser = Optimiser(student, recipe)
    for tensor in student.tensors.values():
        tensor.grad = torch.zeros_like(tensor)
    optimiser.step(0)
    found = {name: tensor.mean().item() for name, tensor in student.tensors.items()}
    wanted = {
        "query.weights.0": 3 * (1 - 0.025),
        "query.biases.0": 3.0,
        "key.weights.0": 3 * (1 - 0.05),
        "sharpness": 3.0,
    }
    assert found == pytest.approx(wanted)
