"""Hash attention inside a transformers model, through its public interfaces: nothing is patched."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hashattention.attention import Observer, SparseAttention
from hashattention.cache import TokenCache, can_write
from hashattention.config import Budget
from hashattention.errors import ConfigError, InputError, UnsupportedModelError
from hashattention.maps import HashMaps
from hashattention.models.describe import attention_modules, dense_function, describe, text_config
from hashattention.models.replaced import ATTACHED
from hashattention.ops.buffer import allocate
from hashattention.rows import Extent
from hashattention.selectors.base import Selector
from hashattention.selectors.hash import HashSelector

#: Under this attribute an attention module finds the attachment it is served by.
SLOT = "_hash_attention"


class SelectedLayer(DynamicLayer):
    """A `DynamicLayer` whose side tensors follow every crop, beam reorder and batch selection of its K and V.

    It grows in place: a new token is written behind the others, where a `DynamicLayer` copies all of them.
    """

    keys: Any
    values: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.side = TokenCache()
        self._buffers: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values ``[B, Hkv, T, D]``; all of them, as views."""
        held = self.get_seq_length()
        if not held or key_states.requires_grad or value_states.requires_grad:
            grown: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return grown
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    @property
    def is_in_place(self) -> bool:
        """Whether keys and values lie in buffers of this layer."""
        return all(self._buffer(name, getattr(self, name)) is not None for name in ("keys", "values"))

    def _buffer(self, name: str, held: Tensor) -> Tensor | None:
        buffer = self._buffers.get(name)
        # A reorder or a selection leaves other tensors here; a crop leaves a view of the same memory.
        same = buffer is not None and buffer.data_ptr() == held.data_ptr() and buffer.stride() == held.stride()
        return buffer if same else None

    def _append(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        tokens, total = held.shape[2], held.shape[2] + new.shape[2]
        buffer = self._buffer(name, held)
        if buffer is None or total > buffer.shape[2] or not can_write(buffer):
            buffer = allocate(held, (*held.shape[:2], total + max(64, total // 8), held.shape[3]))
            buffer[:, :, :tokens] = held
            self._buffers[name] = buffer
        buffer[:, :, tokens:total] = new
        return buffer[:, :, :total]

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> SelectedLayer:
        """The same keys and values as `layer`, shared and not copied, as a `SelectedLayer`."""
        adopted = cls()
        adopted.__dict__.update(layer.__dict__)
        return adopted

    def narrow(self, requests: Tensor) -> SelectedLayer:
        """A layer of its own for the batch rows `requests` int64 ``[B']``, with as much room; this one stays."""
        other = type(self).adopt(self)
        other.side = self.side.narrow(requests)
        other._buffers = {name: buffer[requests] for name, buffer in self._buffers.items()}
        for name in ("keys", "values"):
            held = getattr(self, name)
            inside = self._buffer(name, held) is not None
            setattr(other, name, other._buffers[name][:, :, : held.shape[2]] if inside else held[requests])
        return other

    def nbytes(self) -> int:
        """Bytes of keys, values and side tensors, spare room included."""
        held = [self._buffers.get(name, getattr(self, name)) for name in ("keys", "values")]
        return sum(tensor.nbytes for tensor in held) + self.side.nbytes()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (as `DynamicLayer.crop`)."""
        super().crop(tokens_to_remove)
        self.side.crop(self.get_seq_length())

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.side.reset()
        self._buffers.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search step."""
        super().reorder_cache(beam_idx)
        self.side.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        super().batch_repeat_interleave(repeats)
        self.side.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch rows."""
        super().batch_select_indices(indices)
        self.side.select(indices)

    def offload(self) -> None:
        """Move to the CPU."""
        super().offload()
        self.side.to("cpu")
        self._buffers.clear()

    def prefetch(self) -> None:
        """Move back to the layer's device."""
        super().prefetch()
        if self.is_initialized:
            self.side.to(self.device)


class Attachment:
    """A model served by selected tokens, from `attach` until `detach`; also a context manager."""

    def __init__(self, model: Any, attention: SparseAttention) -> None:
        self.model, self.attention = model, attention
        self.dense_implementation: str = text_config(model)._attn_implementation
        self._mask: Tensor | None = None
        self._holes = False
        self._by_slot = False
        self._extent: Extent | None = None
        self._caches: dict[int, Any] = {}
        self._modules = attention_modules(model)
        self._hooks = [model.get_decoder().register_forward_pre_hook(self._before_model, with_kwargs=True)]
        for index, module in self._modules.items():
            setattr(module, SLOT, self)
            self._hooks.append(module.register_forward_pre_hook(self._keeper(index), with_kwargs=True))
        model.set_attn_implementation(register(self.dense_implementation))

    def detach(self) -> None:
        """Give the model its own attention back; safe to call twice."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for module in self._modules.values():
            delattr(module, SLOT)
        self.model.set_attn_implementation(self.dense_implementation)
        self._mask = self._extent = None
        self._caches.clear()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _before_model(self, decoder: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        mask = keywords.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) else None
        self._extent = None
        tokens = keywords.get("input_ids", keywords.get("inputs_embeds"))
        # A model that is not told the positions counts slots; `generate` and our own callers count real tokens.
        self._by_slot = keywords.get("position_ids") is None
        if self._mask is not None and self._mask.dim() == 2 and (tokens is None or tokens.shape[1] > 1):
            # Holes can only arrive with a prompt, so that decoding steps never wait for the device.
            ordered = self._mask.bool()
            self._holes = bool(((ordered[:, 1:] != ordered[:, :-1]).sum(1) > 1).any())
        if self.attention.selector.reads_positions and not self._by_slot:
            self._check_positions(keywords["position_ids"], keywords.get("past_key_values"))

    def _check_positions(self, given: Tensor, cache: Any) -> None:
        """Refuse positions of a prompt that are not the places of its real tokens; a step never waits to be checked."""
        tokens = given.shape[-1]
        if tokens == 1:
            return
        if self._mask is not None and self._mask.dim() == 2:
            real = self._mask.to(given.device).bool()
        else:
            held = cache.get_seq_length() if cache is not None else 0
            real = torch.ones(1, held + tokens, dtype=torch.bool, device=given.device)
        expected = (real.cumsum(1) - 1)[:, -tokens:]
        if given.dim() != 2 or bool(((given != expected) & real[:, -tokens:]).any()):
            raise InputError(
                "position_ids are not the places of the real tokens (0, 1, 2 ... in every row, padding left out), as "
                "maps that take keys before RoPE need them; leave them to `generate`, or use maps with rope='after'."
            )

    def _keeper(self, index: int) -> Any:
        def keep(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self._caches[index] = keywords.get("past_key_values")

        return keep

    def side(self, index: int) -> TokenCache | None:
        """The side tensors of layer `index` in the cache of this call; None without a cache (training, scoring)."""
        cache = self._caches.get(index)
        if cache is None:
            return None
        if not isinstance(cache, Cache):
            raise UnsupportedModelError(
                f"cache {type(cache).__name__} is not supported; use transformers' DynamicCache."
            )
        layer = cache.layers[index]
        if type(layer) is DynamicLayer:
            layer = cache.layers[index] = SelectedLayer.adopt(layer)
        if not isinstance(layer, SelectedLayer):
            raise UnsupportedModelError(
                f"layer {index} of {type(cache).__name__} is a {type(layer).__name__}; hash attention keeps its "
                "signatures beside a DynamicCache: leave cache_implementation unset or pass "
                "past_key_values=DynamicCache(config=model.config)."
            )
        return layer.side

    def extent(self, batch: int, tokens: int, device: torch.device) -> Extent:
        """The valid tokens of this call, built once for all layers."""
        if self._extent is None or self._extent.tokens != tokens:
            self._extent = self._read_mask(batch, tokens, device)
        return self._extent

    def _read_mask(self, batch: int, tokens: int, device: torch.device) -> Extent:
        if self._mask is None:
            return Extent.full(batch, tokens, device)
        if self._mask.dim() != 2 or self._mask.shape[1] != tokens:
            raise InputError(
                f"attention_mask is {list(self._mask.shape)} for a cache of {tokens} tokens; hash attention takes a "
                f"padding mask [{batch}, {tokens}] (1 = a real token), as the tokenizer gives it."
            )
        return Extent.from_mask(self._mask.to(device), holes=self._holes, by_slot=self._by_slot)


def hash_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function transformers calls: query ``[B, Hq, Tq, D]``, key and value ``[B, Hkv, T, D]``, out
    ``[B, Tq, Hq, D]``.
    """
    attachment: Attachment = getattr(module, SLOT)
    for name, given in (
        ("scaling", scaling),
        ("softcap", softcap),
        ("sliding_window", sliding_window),
        ("s_aux", s_aux),
    ):
        if given is not None:
            rest[name] = given
    function = dense_function(module, attachment.dense_implementation)
    index, queries, tokens = int(module.layer_idx), query.shape[2], key.shape[2]  # type: ignore[arg-type]
    windowed = sliding_window is not None or s_aux is not None
    side = None
    if not windowed and attachment.attention.sparse_positions(index, queries, tokens):
        side = attachment.side(index)
    if side is None:
        out: tuple[Tensor, Tensor | None] = function(module, query, key, value, attention_mask, **rest)
        return out
    mixed = attachment.attention.attend(
        index,
        query,
        key,
        value,
        extent=attachment.extent(query.shape[0], tokens, key.device),
        side=side,
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        softcap=softcap or 0.0,
        dense=lambda: function(module, query, key, value, attention_mask, **rest)[0].transpose(1, 2),
    )
    return mixed.transpose(1, 2).contiguous(), None


def register(dense_implementation: str) -> str:
    """Register hash attention over a model's own implementation (its masks, its dense function) and return the name."""
    # transformers treats names that contain "flash" or "sdpa" specially.
    suffix = dense_implementation.replace("flash", "fa").replace("sdpa", "").replace("/", "_").replace("|", "_")
    name = f"{ATTACHED}_{suffix}".rstrip("_")
    AttentionInterface.register(name, hash_attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[dense_implementation])
    return name


def attach(
    model: Any,
    maps: HashMaps | str | os.PathLike[str] | Selector,
    budget: Budget | float | None = None,
    *,
    min_context: int = 1024,
    dense_layers: tuple[int, ...] = (),
    sparse_tail: int = 0,
    observer: Observer | None = None,
) -> Attachment:
    """Serve a transformers model by hash attention until the returned handle is closed.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder-only model; it is hooked through public interfaces, its weights are untouched.
    maps : HashMaps, path or str, or Selector
        Trained maps, their folder, shipped name or hub id; or any other selector.
    budget : Budget or float, optional
        How many tokens to attend to; a float is the density of all attended tokens. Default: density 1/16.
    min_context : int
        Shorter contexts stay dense, bit-identical to the model's own attention.
    dense_layers : tuple of int
        Layers that stay dense.
    sparse_tail : int
        Last positions of a prefill that are sparse too (0: prefill is dense).
    observer : callable, optional
        Called after every sparse step, for measurements.

    Returns
    -------
    Attachment
        A context manager; or call its `detach`.

    Raises
    ------
    UnsupportedModelError
        For a model whose attention cannot be served (encoder, MLA, linear attention, ...).
    ArtifactError
        If the maps are another model's; the field that differs is named.
    ConfigError
        For a bad budget, layer or length, or a model that is attached already.
    """
    described = describe(model)
    if any(hasattr(module, SLOT) for module in attention_modules(model).values()):
        raise ConfigError(
            "this model is attached already; call detach() on its handle, or leave its with-block, first."
        )
    unknown = [layer for layer in dense_layers if not 0 <= layer < described.num_hidden_layers]
    if unknown:
        raise ConfigError(
            f"dense_layers {unknown} are not layers of this model; it has 0 to {described.num_hidden_layers - 1}."
        )
    if not isinstance(maps, Selector):
        loaded = maps if isinstance(maps, HashMaps) else HashMaps.from_pretrained(maps)
        loaded.check_model(described)
        maps = HashSelector(loaded.to(model.device).requires_grad_(False))
    if not isinstance(budget, Budget):
        budget = Budget(density=1 / 16 if budget is None else budget)
    sparse = SparseAttention(maps, budget, min_context, tuple(dense_layers), sparse_tail, observer)
    return Attachment(model, sparse)
