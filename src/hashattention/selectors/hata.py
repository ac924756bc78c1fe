"""HATA: a linear hash per KV head, matching bits summed over the group (Gong et al., ACL 2025, arXiv 2506.02572)."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattention.config import BaseModel
from hashattention.errors import InputError
from hashattention.selectors.hash import HashSelector
from hashattention.selectors.lsh import draw_hyperplanes, linear_maps


class HataSelector(HashSelector):
    """Select by Hamming distance between ``sign(q W)`` and ``sign(k W)``, summed over the group's queries.

    The paper learns W and leaves the first two layers dense (`dense_layers=(0, 1)` of `attach`).

    Parameters
    ----------
    model : BaseModel
        The transformer, for its shape.
    bits : int
        Bits per KV head: a multiple of 32, at most 256.
    weights : Tensor, float ``[L, Hkv, D, bits]``, optional
        Learned hash weights of the layers of `model`; without them random orthonormal ones, which the paper does not
        claim to be good.
    seed : int
        Chooses the random weights.
    device : str or torch.device
        Where the model runs.
    """

    def __init__(
        self,
        model: BaseModel,
        bits: int = 128,
        weights: Tensor | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        shape = (len(model.layers), model.num_key_value_heads, model.head_dim, bits)
        if weights is None:
            weights = draw_hyperplanes(model, bits, seed, orthogonal=True)
        if tuple(weights.shape) != shape:
            raise InputError(
                f"weights is {list(weights.shape)}; expected {list(shape)}: layers, KV heads, head_dim, bits."
            )
        super().__init__(linear_maps(model, weights.float()).to(device))
