"""LSH: sign bits of random hyperplanes, the same for queries and keys (Charikar, 2002)."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattention.config import BaseModel, MapsConfig, SelectionShare
from hashattention.maps import HashMaps
from hashattention.selectors.hash import HashSelector


def draw_hyperplanes(model: BaseModel, bits: int, seed: int, orthogonal: bool = False) -> Tensor:
    """Normal vectors float32 ``[L, Hkv, D, bits]``; every layer and head has its own, whatever the others are.

    With `orthogonal`, each run of up to D vectors of a head is an orthonormal set.
    """
    dim = model.head_dim

    def draw(layer: int, head: int) -> Tensor:
        random = torch.Generator().manual_seed(hash((seed, layer, head)) % 2**63)
        if not orthogonal:
            return torch.randn(dim, bits, generator=random)
        blocks = [torch.linalg.qr(torch.randn(dim, dim, generator=random))[0] for _ in range(-(-bits // dim))]
        return torch.cat(blocks, -1)[:, :bits]

    heads = range(model.num_key_value_heads)
    return torch.stack([torch.stack([draw(layer, head) for head in heads]) for layer in model.layers])


def linear_maps(model: BaseModel, weights: Tensor, share: SelectionShare = "group") -> HashMaps:
    """Symmetric linear maps whose queries and keys use the same `weights` ``[L, Hkv, D, bits]`` of their KV head."""
    shares = {"query_input": "head", "signature_share": "kv_head", "selection_share": share}
    maps = HashMaps(MapsConfig(weights.shape[-1], (), "symmetric", **shares), model)  # type: ignore[arg-type]
    queries = weights.repeat_interleave(model.group_size, dim=1)
    maps.load_state_dict({"key.weights.0": weights, "query.weights.0": queries}, strict=False)
    return maps.requires_grad_(False)


class LshSelector(HashSelector):
    """Select by the number of hyperplanes that have query and key on the same side, summed over the group.

    Parameters
    ----------
    model : BaseModel
        The transformer, for its shape.
    bits : int
        Hyperplanes per KV head: a multiple of 32, at most 256.
    seed : int
        Chooses the hyperplanes.
    share : {"group", "query_head"}
        One index set per KV head, or one per query head.
    device : str or torch.device
        Where the model runs.
    """

    def __init__(
        self,
        model: BaseModel,
        bits: int = 128,
        seed: int = 0,
        share: SelectionShare = "group",
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(linear_maps(model, draw_hyperplanes(model, bits, seed), share).to(device))
