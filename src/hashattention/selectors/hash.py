"""HashAttention: query codes against the signatures of all keys (arXiv 2412.14468, and the group code)."""

from __future__ import annotations

import torch

from hashattention import ops
from hashattention.maps import HashMaps, LayerMaps
from hashattention.selectors.base import Selection, Selector, Step


class HashSelector(Selector):
    """Select by the score of learned signatures; keys are signed once, when they first appear in the cache.

    Parameters
    ----------
    maps : HashMaps
        Trained maps; their configuration says how codes are scored and shared.
    backend : str
        Kernel backend, ``"auto"`` or a name.
    """

    def __init__(self, maps: HashMaps, backend: str = "auto") -> None:
        self.maps, self.backend = maps, backend
        self.share = maps.config.selection_share
        self.layers = maps.model.layers
        self._ready: dict[int, LayerMaps] = {}

    def select(self, step: Step) -> Selection:
        """Sign the new keys, encode the query, score all signatures, select."""
        layer = self._layer(step)
        tokens = step.extent.tokens
        signatures = step.side.extend(
            (self.maps, "signatures"),
            tokens,
            lambda first: layer.sign_keys(step.key[:, :, first:tokens], backend=self.backend),
        )
        rows = step.rows(self.share)
        code = layer.code_queries(step.query, backend=self.backend)
        bounds = rows.start, rows.end, rows.budgets, rows.capacity
        levels = self.maps.config.levels
        chosen = ops.score_select(code, signatures, *bounds, mask=rows.mask, levels=levels, backend=self.backend)
        return Selection(*chosen)

    def _layer(self, step: Step) -> LayerMaps:
        """The layer's map as it is used: on a GPU in the keys' own dtype, so that the products run on 16 bits."""
        if step.layer not in self._ready:
            short = step.key.is_cuda and step.key.dtype in (torch.bfloat16, torch.float16)
            kind = step.key.dtype if short else torch.float32
            self._ready[step.layer] = self.maps.layer(step.layer).to(step.key.device, kind)
        return self._ready[step.layer]

    def auxiliary_bits(self, head_dim: int) -> float:
        """Bits of the signatures of one token and KV head."""
        config, model = self.maps.config, self.maps.model
        return config.bits * config.signature_heads(model) / model.num_key_value_heads
