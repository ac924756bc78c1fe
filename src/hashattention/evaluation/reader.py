"""Prompts read once, densely; every method continues from there, and what it left is forgotten."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hashattention.integrations.transformers import SelectedLayer
from hashattention.models.describe import describe

#: The most tokens that are run at once unless a plan says more.
MOST_TOKENS = 1 << 19


class Reader:
    """A batch of contexts in a model's cache, the shorter ones padded on the left.

    Parameters
    ----------
    model : PreTrainedModel
    contexts : sequence of sequences of int
        Tokens; more than one needs `can_batch`.

    Attributes
    ----------
    padding : tuple of int
        Slots before each context.
    width : int
        Slots of the cache that the contexts fill.
    logits : Tensor, float32 ``[B, V]``
        Of the token behind each context.
    """

    def __init__(self, model: Any, contexts: Sequence[Sequence[int]]) -> None:
        self.model, self.width = model, max(map(len, contexts))
        self.padding = tuple(self.width - len(tokens) for tokens in contexts)
        self._front = torch.tensor(self.padding, device=model.device)
        read = [_read(model, tokens) for tokens in contexts]
        self.logits = torch.stack([logits for _, logits in read])
        self.cache = _stack(model, [cache for cache, _ in read], self.padding)
        self.cache.layers = [_selected(layer) for layer in self.cache.layers]
        self._held = self.mark()

    @property
    def slots(self) -> int:
        """Slots that are filled now, padding included."""
        return int(self.cache.get_seq_length())

    def forward(self, tokens: Tensor, keep: int = 1) -> Tensor:
        """Append `tokens` int64 ``[B, T]``; float32 logits of the last `keep` positions ``[B, keep, V]``."""
        held = self.slots
        total = held + tokens.shape[1]
        place = torch.arange(held, total, device=tokens.device) - self._front[:, None]
        mask = None
        if any(self.padding):
            mask = (torch.arange(total, device=tokens.device) >= self._front[:, None]).long()
        with torch.inference_mode():
            found = self.model(
                tokens,
                attention_mask=mask,
                position_ids=place,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=keep,
            )
            return found.logits.float()

    def mark(self) -> list[dict[str, Any]]:
        """A moment, for `rewind`: how many slots are filled, and what a method keeps beside them."""
        return [_remember(layer) for layer in self.cache.layers]

    def rewind(self, mark: list[dict[str, Any]]) -> None:
        """Back to the moment of `mark`; its side tensors are in use again from here on."""
        for layer, memory in zip(self.cache.layers, mark, strict=True):
            if "slots" not in memory:
                layer.__dict__.update(memory)
                continue
            layer.crop(memory["slots"] - layer.get_seq_length())
            layer.side = memory["side"]

    def forget(self) -> None:
        """Back to where the contexts end, without any side tensors."""
        self.rewind(self._held)
        for layer in self.cache.layers:
            if isinstance(layer, SelectedLayer):
                layer.side.reset()


def can_batch(model: Any) -> bool:
    """Whether every layer's cache can be padded and cropped (sliding-window layers cannot)."""
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def batch_tokens(model: Any) -> int:
    """Tokens that a GPU's free memory takes at once; 0 (one sample after the other) elsewhere, or if none may batch."""
    if model.device.type != "cuda" or not can_batch(model):
        return 0
    base = describe(model)
    each = 2 * base.num_hidden_layers * base.num_key_value_heads * base.head_dim * model.dtype.itemsize
    # Stacking and growing hold the cache twice; methods, measurements and logits need the rest.
    return min(MOST_TOKENS, int(torch.cuda.mem_get_info(model.device)[0]) // (4 * each))


def _read(model: Any, tokens: Sequence[int]) -> tuple[Any, Tensor]:
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([list(tokens)], device=model.device)
    with torch.inference_mode():
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return cache, logits[0, -1].float()


def _stack(model: Any, caches: list[Any], padding: Sequence[int]) -> Any:
    """One cache of all requests; each request's own is given up layer by layer."""
    if len(caches) == 1:
        return caches[0]
    whole = DynamicCache(config=model.config)
    for index in range(len(caches[0].layers)):
        layers = [cache.layers[index] for cache in caches]
        keys, values = (
            torch.cat(
                [
                    torch.nn.functional.pad(getattr(layer, name), (0, 0, front, 0))
                    for layer, front in zip(layers, padding, strict=True)
                ]
            )
            for name in ("keys", "values")
        )
        whole.update(keys, values, index)
        for layer in layers:
            layer.keys = layer.values = None
    return whole


def _selected(layer: Any) -> Any:
    """A layer that grows in place, where it can be cropped."""
    return SelectedLayer.adopt(layer) if type(layer) is DynamicLayer else layer


def _remember(layer: Any) -> dict[str, Any]:
    if not isinstance(layer, SelectedLayer):
        # Such a layer makes new tensors at every step: the old ones stay as they are.
        return dict(layer.__dict__)
    held = layer.side
    layer.side = copy.copy(held)
    # Both calls leave `held` as it is and give the other one tensors and lengths of its own.
    layer.side.select(torch.arange(layer.keys.shape[0], device=layer.keys.device))
    layer.side.crop(layer.get_seq_length())
    return {"slots": layer.get_seq_length(), "side": held}
