"""Decoding steps of one shape: over every slot of the cache, filled or not, so that one CUDA graph makes them all."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hashattention.attention import SparseAttention
from hashattention.evaluation.decoder import Decoder, attend_by
from hashattention.integrations.transformers import SelectedLayer
from hashattention.rows import Extent


class FixedSteps:
    """Steps that append one token to every request of a cache with room; what is not filled yet lies behind the rows'
    ends, and is neither scored nor attended.

    What a method keeps of the slots behind those it held at the first step is made again in every step, in place; what
    it accumulates (`Selector.accumulates`) goes on.

    Parameters
    ----------
    decoder : Decoder
    layers : sequence of SelectedLayer
        Each with a buffer of K and V that is longer than what is held.
    front : Tensor, int64 ``[B]``
        Slots of padding before each request.
    sparse : SparseAttention, optional
        How the steps are served; None: densely.
    graph : bool
        Capture the step as a CUDA graph. Without, every step runs as the graph would.
    """

    def __init__(
        self,
        decoder: Decoder,
        layers: Sequence[SelectedLayer],
        front: Tensor,
        sparse: SparseAttention | None,
        graph: bool,
    ) -> None:
        self.decoder, self.layers, self.sparse = decoder, layers, sparse
        self.buffers = [(layer._buffers["keys"], layer._buffers["values"]) for layer in layers]
        self.room = self.buffers[0][0].shape[2]
        self._front, self._graph = front, torch.cuda.CUDAGraph() if graph else None
        self._tokens, self._slot = torch.zeros_like(front), torch.zeros_like(front[:1])
        self._held = [layer.side.remember(contents=False) for layer in layers]
        self._complete = False
        self._logits: Tensor | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Float32 logits ``[B, V]`` behind the next `tokens` int64 ``[B]``; in inference mode."""
        held = self.layers[0].keys.shape[2]
        self._tokens.copy_(tokens)
        self._slot.fill_(held)
        if self._graph is None:
            self._rewind()
            self._logits = self._compute()
        elif self._logits is None:
            self._capture(self._graph)
        if self._graph is not None:
            self._graph.replay()
        for layer, (keys, values) in zip(self.layers, self.buffers, strict=True):
            layer.keys, layer.values = keys[:, :, : held + 1], values[:, :, : held + 1]
            layer.side.advance(held + 1)
        assert self._logits is not None
        # The next step writes its logits where these are.
        return self._logits.clone()

    def _capture(self, graph: torch.cuda.CUDAGraph) -> None:
        accumulates = self.sparse is not None and self.sparse.selector.accumulates
        before = [layer.side.remember(contents=accumulates) for layer in self.layers]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Side tensors take their room, and libraries their work space, which a graph must not do.
            self._rewind()
            self._compute()
            for layer, memory in zip(self.layers, before, strict=True):
                layer.side.recall(memory)
            self._rewind()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                self._logits = self._compute()
        torch.cuda.current_stream().wait_stream(stream)

    def _rewind(self) -> None:
        """So that all that is made of the keys behind the first step's is made again; what accumulates has its room
        from the first step on.
        """
        accumulates = self.sparse is not None and self.sparse.selector.accumulates
        for layer, memory in zip(self.layers, self._held, strict=True):
            if not accumulates:
                layer.side.recall(memory)
            elif self._complete:
                layer.side.advance(self.room)
        self._complete = True

    def _compute(self) -> Tensor:
        start = self._front.to(torch.int32)
        extent = Extent(start, (self._slot + 1).to(torch.int32).expand_as(start).contiguous(), self.room)
        mask = functools.cache(self._mask)

        def attend(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self.buffers[index]
            keys.index_copy_(2, self._slot, key)
            values.index_copy_(2, self._slot, value)
            scale, side = self.decoder.layers[index].self_attn.scaling, self.layers[index].side
            return attend_by(self.sparse, index, query, keys, values, scale=scale, extent=extent, side=side, mask=mask)

        return self.decoder(self._tokens, self._slot - self._front, attend)

    def _mask(self) -> Tensor:
        """What hides padding and empty slots when added to logits ``[B, 1, 1, room]``."""
        slots = torch.arange(self.room, device=self._front.device)
        hidden = ((slots < self._front[:, None]) | (slots > self._slot))[:, None, None]
        return torch.zeros_like(hidden, dtype=self.buffers[0][0].dtype).masked_fill_(hidden, -torch.inf)
