"""Prompts read once, densely; every method continues from there, and what it left is forgotten."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hashattention.attention import SparseAttention
from hashattention.config import Budget
from hashattention.evaluation.decoder import Decoder, attend_by, can_decode
from hashattention.evaluation.fixed import FixedSteps
from hashattention.evaluation.meter import Meter
from hashattention.integrations.transformers import SLOT, Attachment, SelectedLayer, attach
from hashattention.models.describe import attention_modules, text_config, token_bytes
from hashattention.models.replaced import Attend, Attended, replaced_attention
from hashattention.rows import Extent
from hashattention.selectors.base import Selector
from hashattention.train.targets import free_bytes

#: More than any question or tail: every position behind the context is sparse.
ALL = 1 << 30
#: The share of a GPU's free memory that the cache may take: methods, measurements and the copy of those who go on alone
#: need the rest.
SHARE = 0.55
#: The share of what is free then that such a copy may take.
FREE = 0.8
#: Bytes of K and V that a model's own attention may repeat for its heads at once.
REPEATED = 1 << 31
#: Rows of a mask start where wide loads may.
ALIGN = 16


class Reader:
    """A batch of contexts in a model's cache, the shorter ones padded on the left.

    Parameters
    ----------
    model : PreTrainedModel
    contexts : sequence of sequences of int
        Tokens; more than one needs `can_batch`.
    room : int
        Slots that will be needed behind the contexts; with more, the cache is copied as it grows.
    graphs : bool
        On a GPU, decode by CUDA graphs where the model allows it.

    Attributes
    ----------
    padding : tuple of int
        Slots before each context.
    width : int
        Slots of the cache that the contexts fill.
    logits : Tensor, float32 ``[B, V]``
        Of the token behind each context.
    """

    def __init__(self, model: Any, contexts: Sequence[Sequence[int]], room: int = 0, graphs: bool = True) -> None:
        self.model, self.width = model, max(map(len, contexts))
        self.padding = tuple(self.width - len(tokens) for tokens in contexts)
        self._front = torch.tensor(self.padding, device=model.device)
        self.cache, self.logits = _read_all(model, contexts, self.width, room)
        self._meter: Meter | None = None
        self._first = next(iter(attention_modules(model).values()))
        self._decoder = Decoder(model) if can_decode(model) else None
        #: Whether steps have one shape, and what makes them; the first of a method is not of that kind.
        self.fixed = graphs and model.device.type == "cuda"
        self._fixed: FixedSteps | None = None
        self._begun = False
        self._held = self.mark()

    @property
    def slots(self) -> int:
        """Slots that are filled now, padding included."""
        return int(self.cache.get_seq_length())

    @contextlib.contextmanager
    def serve(self, selector: Selector | None, budget: Budget | None, meter: Meter | None = None) -> Iterator[None]:
        """What follows is served by `selector` (None: densely) and measured by `meter`; then all of it is forgotten."""
        self._meter = meter
        with contextlib.ExitStack() as stack:
            stack.enter_context(_by_rows(self.model, self.cache))
            if selector is not None:
                stack.enter_context(
                    attach(self.model, selector, budget, min_context=0, sparse_tail=ALL, observer=meter)
                )
            try:
                yield
            finally:
                self._meter = None
                self.forget()

    def forward(self, tokens: Tensor, keep: int = 1) -> Tensor:
        """Append `tokens` int64 ``[B, T]``; float32 logits of the last `keep` positions ``[B, keep, V]``."""
        sparse = hasattr(self._first, SLOT)
        if self._decoder is not None and (tokens.shape[1] == 1 or (self.fixed and sparse)):
            said = [self._step(self._decoder, token) for token in tokens.unbind(1)]
            return torch.stack(said[-keep:], 1)
        held = self.slots
        total = held + tokens.shape[1]
        place = torch.arange(held, total, device=tokens.device) - self._front[:, None]
        mask = None
        if any(self.padding):
            mask = (torch.arange(total, device=tokens.device) >= self._front[:, None]).long()
        self._observe(held + 1, total)
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

    def _step(self, decoder: Decoder, tokens: Tensor) -> Tensor:
        """One token of every request, by the decoder."""
        held = self.slots
        sparse = self._observe(held + 1, held + 1)
        with torch.inference_mode():
            fixed = self._fix(decoder, sparse, held)
            if fixed is not None:
                return fixed(tokens)
            self._begun = True
            start = self._front.to(torch.int32)
            extent = Extent(start, torch.full_like(start, held + 1), held + 1, ends_full=True)
            mask = functools.cache(lambda: self._mask(held + 1))

            def attend(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                layer = self.cache.layers[index]
                keys, values = layer.update(key, value)
                scale = decoder.layers[index].self_attn.scaling
                return attend_by(
                    sparse, index, query, keys, values, scale=scale, extent=extent, side=layer.side, mask=mask
                )

            return decoder(tokens, held - self._front, attend)

    def _fix(self, decoder: Decoder, sparse: SparseAttention | None, held: int) -> FixedSteps | None:
        """What makes the next step, if it has the shape of all others: nobody measures it, and there is room."""
        measured = sparse is not None and (sparse.observer is not None or not self._begun)
        if not self.fixed or measured:
            return None
        if self._fixed is None:
            layers = [layer for layer in self.cache.layers if isinstance(layer, SelectedLayer) and layer.is_in_place]
            if len(layers) < len(self.cache.layers):
                return None
            graph = self._front.is_cuda
            self._fixed = FixedSteps(decoder, layers, self._front, sparse, graph)
        return self._fixed if held < self._fixed.room else None

    def _mask(self, tokens: int) -> Tensor | None:
        """What hides the padding when added to logits ``[B, 1, 1, tokens]``."""
        if not any(self.padding):
            return None
        slots = torch.arange(-(-tokens // ALIGN) * ALIGN, device=self._front.device)
        hidden = (slots < self._front[:, None])[:, None, None]
        return torch.zeros_like(hidden, dtype=self.model.dtype).masked_fill_(hidden, -torch.inf)[..., :tokens]

    def _observe(self, first: int, last: int) -> SparseAttention | None:
        """How attention is served now; an observer is in place only where it measures: it costs a fused step."""
        handle: Attachment | None = getattr(self._first, SLOT, None)
        if handle is None:
            return None
        if self._meter is not None:
            observer = self._meter if self._meter.wants(first, last) else None
            handle.attention = dataclasses.replace(handle.attention, observer=observer)
        return handle.attention

    def can_narrow(self, requests: int) -> bool:
        """Whether so many requests may go on without the others: there must be memory for a copy of theirs."""
        layers = self.cache.layers
        if not all(isinstance(layer, SelectedLayer) for layer in layers):
            return False
        held = sum(layer.nbytes() for layer in layers)
        needed = held * requests // len(self.padding)
        return not self._front.is_cuda or needed < FREE * free_bytes(self._front.device)

    @contextlib.contextmanager
    def narrowed(self, places: Sequence[int]) -> Iterator[None]:
        """Only the requests at `places` go on, in a cache of their own; then all are there again, where they were."""
        held = self.cache.layers, self.padding, self._front, self._fixed
        rows = torch.tensor(list(places), device=self._front.device)
        with torch.inference_mode():
            self.cache.layers = [layer.narrow(rows) for layer in self.cache.layers]
            self.padding, self._front = tuple(self.padding[place] for place in places), self._front[rows]
        self._fixed = None
        try:
            yield
        finally:
            self.cache.layers, self.padding, self._front, self._fixed = held

    def mark(self) -> list[dict[str, Any]]:
        """A moment, for `rewind`: how many slots are filled, and what a method keeps beside them."""
        handle: Attachment | None = getattr(self._first, SLOT, None)
        accumulates = handle is not None and handle.attention.selector.accumulates
        return [_remember(layer, accumulates) for layer in self.cache.layers]

    def rewind(self, mark: list[dict[str, Any]]) -> None:
        """Back to the moment of `mark`; its side tensors are in use again from here on."""
        for layer, memory in zip(self.cache.layers, mark, strict=True):
            if "slots" not in memory:
                layer.__dict__.update(memory)
                continue
            # Older releases of transformers take a crop by 0 for one to 0.
            if over := layer.get_seq_length() - memory["slots"]:
                layer.crop(-over)
            with torch.inference_mode():
                same = layer.side.recall(memory["side"])
            # Its steps would write where nothing is kept any more.
            self._fixed = self._fixed if same else None

    def forget(self) -> None:
        """Back to where the contexts end, without any side tensors."""
        self._fixed, self._begun = None, False
        self.rewind(self._held)
        for layer in self.cache.layers:
            if isinstance(layer, SelectedLayer):
                layer.side.reset()


def can_batch(model: Any) -> bool:
    """Whether every layer's cache can be padded and cropped (sliding-window layers cannot)."""
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def batch_tokens(model: Any) -> int:
    """Slots of a cache that a GPU's free memory takes; 0 (one sample after the other) elsewhere."""
    if model.device.type != "cuda" or not can_batch(model):
        return 0
    torch.cuda.empty_cache()
    return int(SHARE * torch.cuda.mem_get_info(model.device)[0]) // token_bytes(model)


def _read_all(model: Any, contexts: Sequence[Sequence[int]], width: int, room: int) -> tuple[Any, Tensor]:
    """One cache of all contexts, each read alone and put into its row, and the logits behind each."""
    if len(contexts) == 1:
        cache, logits = _read(model, contexts[0])
        cache.layers = [SelectedLayer.adopt(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache, logits[None]
    whole, said = DynamicCache(config=model.config), []
    with torch.inference_mode():
        for row, tokens in enumerate(contexts):
            cache, logits = _read(model, tokens)
            if not row:
                whole.layers = [_open(layer, len(contexts), width, room) for layer in cache.layers]
            for layer, held in zip(cache.layers, whole.layers, strict=True):
                held.keys[row, :, width - len(tokens) :] = layer.keys[0]
                held.values[row, :, width - len(tokens) :] = layer.values[0]
            said.append(logits)
    return whole, torch.stack(said)


def _read(model: Any, tokens: Sequence[int]) -> tuple[Any, Tensor]:
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([list(tokens)])
    if model.device.type == "cuda":
        # From pinned memory the host need not wait for the context before.
        ids = ids.pin_memory()
    ids = ids.to(model.device, non_blocking=True)
    with torch.inference_mode():
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return cache, logits[0, -1].float()


def _open(layer: DynamicLayer, batch: int, width: int, room: int) -> SelectedLayer:
    """A layer of `batch` requests like the one of `layer`, all padding so far, with room to grow."""
    opened = SelectedLayer.adopt(layer)
    for name in ("keys", "values"):
        like = getattr(layer, name)
        buffer = like.new_zeros((batch, like.shape[1], width + room, like.shape[3]))
        opened._buffers[name] = buffer
        setattr(opened, name, buffer[:, :, :width])
    return opened


@contextlib.contextmanager
def _by_rows(model: Any, cache: Any) -> Iterator[None]:
    """Dense attention of a batch of few rows at a time: the model's own may repeat K and V for every query head."""
    layer = cache.layers[0]
    heads = text_config(model).num_attention_heads
    each = 2 * heads * layer.keys[0, 0].nbytes if isinstance(layer, SelectedLayer) else 0
    rows = max(1, REPEATED // max(1, each))
    if not isinstance(layer, SelectedLayer) or layer.keys.shape[0] <= rows:
        yield
        return

    def attend(
        dense: Attend, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any
    ) -> Attended:
        parts = []
        for first in range(0, len(query), rows):
            part = slice(first, first + rows)
            shown = mask if mask is None or len(mask) == 1 else mask[part]
            parts.append(dense(module, query[part], key[part], value[part], shown, **rest)[0])
        return torch.cat(parts), None

    with replaced_attention(model, BY_ROWS, attend):
        yield


BY_ROWS = "hash_attention_by_rows"


def _remember(layer: Any, contents: bool) -> dict[str, Any]:
    if not isinstance(layer, SelectedLayer):
        # Such a layer makes new tensors at every step: the old ones stay as they are.
        return dict(layer.__dict__)
    return {"slots": layer.get_seq_length(), "side": layer.side.remember(contents)}
