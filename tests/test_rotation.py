from __future__ import annotations

import math

import pytest
import torch

from hashattention.rotation import unrotate

FREQUENCIES = torch.tensor([1.0, 0.1, 0.003])


def rotate(x, position):
    """By complex numbers: pair (i, i + 3) times exp(i * angle)."""
    pairs = torch.complex(x[..., :3].double(), x[..., 3:6].double())
    turned = pairs * torch.exp(1j * position * FREQUENCIES.double())
    return torch.cat([turned.real, turned.imag, x[..., 6:].double()], -1)


@pytest.mark.parametrize("width", [6, 9])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-3), (torch.bfloat16, 0.03)])
def test_what_is_rotated_comes_back(width, dtype, atol):
    x, places = torch.randn(2, 3, 4, width), torch.tensor([[0, 1, 17, 900], [5, 2, 131_071, 3]])
    turned = torch.stack([torch.stack([rotate(x[b, :, t], int(places[b, t])) for t in range(4)], 1) for b in range(2)])
    back = unrotate(turned.to(dtype), places[:, None], FREQUENCIES)
    assert back.dtype == dtype and back.shape == x.shape
    # A float32 angle of 131071 radians has an error of 1/256.
    near = torch.where(places == 131_071, 6e-3, 0.0)[:, None, :, None] + atol
    assert ((back.float() - x).abs() <= near * (1 + x.abs())).all()
    assert torch.equal(back[..., 6:], turned[..., 6:].to(dtype))


def test_position_zero_and_half_a_turn():
    x = torch.randn(5, 8)
    frequency = torch.tensor([math.pi] * 4)
    assert torch.equal(unrotate(x, torch.zeros(5, dtype=torch.int32), frequency), x)
    torch.testing.assert_close(unrotate(x, torch.ones(5, dtype=torch.int32), frequency), -x)


def test_a_token_alone_is_a_token_among_others_bit_for_bit():
    x, places = torch.randn(1, 2, 37, 22), torch.arange(1000, 1037)
    whole = unrotate(x, places, FREQUENCIES)
    for token in range(37):
        one = slice(token, token + 1)
        assert torch.equal(unrotate(x[:, :, one], places[one], FREQUENCIES), whole[:, :, one])
