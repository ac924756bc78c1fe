"""Rotation: queries and keys as they were before the rotary position embedding, from what came after it."""

from __future__ import annotations

import torch
from torch import Tensor


def unrotate(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Undo the rotary embedding of `x`.

    Channels i and i + F turn by the angle ``position * frequencies[i]`` (the halves of RoFormer's rotation as Llama has
    them, arXiv 2104.09864); channels from 2 F on were never rotated. A constant factor on the embedding stays.

    Parameters
    ----------
    x : Tensor, float ``[..., T, D]``
        Queries or keys as attention takes them.
    positions : Tensor, int, broadcastable to ``[..., T]``
        The rotary position of each.
    frequencies : Tensor, float32 ``[F]``, F at most D / 2
        Radians per position.

    Returns
    -------
    Tensor
        In the dtype and shape of `x`; computed in float32.

    Examples
    --------
    >>> turned = torch.tensor([[2.0, 1.0, 5.0]])
    >>> unrotate(turned, torch.tensor([1]), torch.tensor([torch.pi / 2])).round(decimals=5).tolist()
    [[1.0, -2.0, 5.0]]
    """
    angle = positions[..., None].float() * frequencies
    cos, sin, size = angle.cos(), angle.sin(), len(frequencies)
    first, second, rest = x.float().split([size, size, x.shape[-1] - 2 * size], dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin, rest], -1).to(x.dtype)
