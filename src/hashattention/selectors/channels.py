"""Which channels matter most to the logits: the calibration of Double Sparsity (arXiv 2408.07092)."""

from __future__ import annotations

from torch import Tensor


def rank_channels(query: Tensor, key: Tensor) -> Tensor:
    """Channels by falling mean ``|q_d * k_d|``, int64 ``[Hkv, D]``, from queries ``[B, Hq, T, D]`` and the keys
    ``[B, Hkv, T, D]`` of the same tokens (every token with itself, as the authors calibrate).
    """
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    return (grouped * key.float()[:, :, None]).abs().mean((0, 2, 3)).argsort(dim=-1, descending=True, stable=True)
