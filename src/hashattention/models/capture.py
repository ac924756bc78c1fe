"""Capture: the post-RoPE queries and keys (and values) that a frozen transformers model makes of a text."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hashattention.config import BaseModel
from hashattention.models.replaced import Attend, Attended, refuse_attached, replaced_attention

IMPLEMENTATION = "hash_capture"
#: Tokens read at once: bounds the activations of a long context.
CHUNK = 4096
#: Fields of a sample whose first dimension is the layers.
LAYERED = ("key", "query", "scale", "value", "target")


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one sequence leaves behind, for L layers (in the order of `BaseModel.layers`).

    `key` ``[L, Hkv, T, D]``, `query` ``[L, Hq, N, D]`` at `positions` int32 ``[N]``, `scale` float32 ``[L]``
    (multiplies the logits), and `value` ``[L, Hkv, T, Dv]`` where it was asked for. Where `key` holds some of the
    tokens alone, `tokens` int64 ``[T]`` says which, and `target` uint8 ``[L, Hsel, N, T]`` may hold what is taught of
    them, made while all tokens were there (`train.targets.thin`).
    """

    key: Tensor
    query: Tensor
    positions: Tensor
    scale: Tensor
    value: Tensor | None = None
    tokens: Tensor | None = None
    target: Tensor | None = None

    def layers(self, first: int, last: int) -> Sample:
        """Layers ``first <= l < last``, as views."""
        return self.by_layer(lambda tensor: tensor[first:last])

    def by_layer(self, change: Callable[[Tensor], Tensor]) -> Sample:
        """With `change` made to every tensor whose first dimension is the layers."""
        tensors = {name: getattr(self, name) for name in LAYERED}
        return dataclasses.replace(self, **{name: change(t) for name, t in tensors.items() if t is not None})

    def to(self, device: torch.device | str) -> Sample:
        """On another device."""
        tensors: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors |= {name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None}
        return Sample(**tensors)

    def key_positions(self) -> Tensor:
        """Position of every key, int64 ``[T]``."""
        return torch.arange(self.key.shape[2], device=self.key.device) if self.tokens is None else self.tokens

    def pick(self, index: Tensor) -> Sample:
        """Only the queries `index` int64 ``[n]``."""
        target = None if self.target is None else self.target.index_select(2, index)
        positions = self.positions[index]
        return dataclasses.replace(self, query=self.query[:, :, index], positions=positions, target=target)


class Recorder:
    """Fills the tensors of a `Sample` while the model runs over one sequence."""

    def __init__(self, base: BaseModel, positions: Tensor, tokens: int, value: bool) -> None:
        self.rows = {layer: row for row, layer in enumerate(base.layers)}
        self.base, self.positions, self.tokens, self.with_value = base, positions, tokens, value
        self.parts: dict[str, Tensor] = {}
        self.scale = torch.zeros(len(base.layers))
        self.start = 0

    def record(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """Keep what one layer computed for the tokens from `start` on (batch 1; key and value may hold more)."""
        row = self.rows.get(layer)
        if row is None:
            return
        count = query.shape[2]
        self.scale[row] = scale
        span = slice(self.start, self.start + count)
        self._tensor("key", key, self.tokens)[row, :, span] = key[0, :, -count:]
        if self.with_value:
            self._tensor("value", value, self.tokens)[row, :, span] = value[0, :, -count:]
        first, last = torch.searchsorted(self.positions, torch.tensor([self.start, self.start + count])).tolist()
        inside = (self.positions[first:last] - self.start).to(query.device)
        self._tensor("query", query, len(self.positions))[row, :, first:last] = query[0].index_select(1, inside)

    def _tensor(self, name: str, like: Tensor, tokens: int) -> Tensor:
        if name not in self.parts:
            dtype = torch.float16 if like.dtype == torch.float16 else torch.bfloat16
            shape = len(self.rows), like.shape[1], tokens, like.shape[3]
            self.parts[name] = torch.empty(shape, dtype=dtype, device=like.device)
        return self.parts[name]

    def sample(self) -> Sample:
        """The finished sample."""
        device = self.parts["key"].device
        small = self.positions.to(torch.int32).to(device), self.scale.to(device)
        return Sample(self.parts["key"], self.parts["query"], *small, self.parts.get("value"))


def capture(
    model: Any, base: BaseModel, tokens: Tensor, positions: Tensor, *, value: bool = False, chunk: int = CHUNK
) -> Sample:
    """Run `model` over one sequence and record its queries and keys, after RoPE, of the layers of `base`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model; its attention implementation is restored afterwards.
    base : BaseModel
        What `describe(model)` gives.
    tokens : Tensor, int64 ``[T]``
    positions : Tensor, int64 ``[N]``, ascending
        Where queries are kept.
    value : bool
        Keep the values too (the output error needs them).
    chunk : int
        Tokens read at once.

    Returns
    -------
    Sample
        bfloat16 (float16 for a float16 model), on the model's device.

    Raises
    ------
    ConfigError
        If the model is attached.
    """
    from transformers import DynamicCache

    refuse_attached(model)
    recorder = Recorder(base, positions.cpu(), len(tokens), value)
    cache = DynamicCache(config=model.config)
    device = next(model.parameters()).device
    with torch.no_grad(), recording(model, recorder):
        for start in range(0, len(tokens), chunk):
            recorder.start = start
            part = tokens[None, start : start + chunk].to(device)
            # The body alone: logits over the vocabulary would cost more memory than all that is kept.
            model.base_model(input_ids=part, past_key_values=cache, use_cache=True)
    return recorder.sample()


@contextlib.contextmanager
def recording(model: Any, recorder: Recorder) -> Iterator[None]:
    """Within this context every attention call of `model` is recorded, then done by the model's own implementation."""

    def attend(
        dense: Attend, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
    ) -> Attended:
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        recorder.record(module.layer_idx, query, key, value, scale)  # type: ignore[arg-type]
        return dense(module, query, key, value, *rest, **options)

    with replaced_attention(model, IMPLEMENTATION, attend):
        yield
