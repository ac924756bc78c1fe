from __future__ import annotations

import torch

from hashattention.train import losses


def test_even_and_independent_bits_cost_nothing():
    code = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])[None, None]
    assert losses.balance(code).item() == 0 and losses.decorrelation(code).item() == 0


def test_stuck_and_equal_bits_cost():
    stuck = torch.ones(1, 1, 8, 4)
    assert losses.balance(stuck).item() == 1 and losses.decorrelation(stuck).item() == 0
    same = torch.tensor([1.0, -1, 1, -1]).view(1, 1, 4, 1).expand(-1, -1, -1, 3)
    torch.testing.assert_close(losses.decorrelation(same), torch.ones(1, 1))
    assert losses.balance(same).item() == 0


def test_gradients_push_towards_balance():
    code = torch.full((1, 1, 4, 2), 0.5, requires_grad=True)
    losses.balance(code).sum().backward()
    assert (code.grad > 0).all()
