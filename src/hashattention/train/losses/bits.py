"""Bits that say much: each set for half of the keys (balance), and no two alike (decorrelation)."""

from __future__ import annotations

import torch
from torch import Tensor


def balance(key: Tensor) -> Tensor:
    """Mean square of the bits' means, per layer and head: soft key codes ``[L, Hs, T, bits]`` in -1..1 ->
    ``[L, Hs]``.
    """
    return key.mean(2).square().mean(-1)


def decorrelation(key: Tensor) -> Tensor:
    """Mean square covariance of pairs of different bits, per layer and head ``[L, Hs]``."""
    centred = key - key.mean(2, keepdim=True)
    covariance = centred.transpose(-1, -2) @ centred / key.shape[2]
    square = covariance.square()
    bits = key.shape[-1]
    diagonal = torch.diagonal(square, dim1=-2, dim2=-1).sum(-1)
    return (square.sum((-2, -1)) - diagonal) / (bits * (bits - 1))
