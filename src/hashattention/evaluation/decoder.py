"""One token of every request through a Llama-like decoder, without the overhead of the model's own modules."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hashattention.attention import SparseAttention
from hashattention.cache import TokenCache
from hashattention.models.describe import full_attention_layers, text_config
from hashattention.rows import Extent

#: Architectures whose layers are what `Decoder` computes: norms before attention and MLP, rotary embedding, no more.
KINDS = ("llama", "qwen2", "mistral")

#: ``attend(layer, query, key, value)``: ``[B, Hq, 1, D]`` and the new token's ``[B, Hkv, 1, D]`` -> ``[B, Hq, 1, D]``.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Decoder:
    """Decoding steps of a model; what attends is given.

    Parameters
    ----------
    model : PreTrainedModel
        One that `can_decode`.
    """

    def __init__(self, model: Any) -> None:
        self.inner, self.head = model.model, model.lm_head
        self.layers: Sequence[Any] = self.inner.layers
        attention = self.layers[0].self_attn
        self._rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        self._dim = attention.head_dim

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Float32 logits ``[B, V]`` behind `tokens` at `positions`, both int64 ``[B]``; in inference mode."""
        hidden, cos, sin, *heads = self._begin(tokens[:, None], positions[:, None])
        for index in range(len(self.layers)):
            hidden, *heads = self._end(index, hidden, attend(index, *heads), cos, sin)
        return hidden

    def _begin(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        hidden = self.inner.embed_tokens(tokens)
        cos, sin = self.inner.rotary_emb(hidden, positions)
        return hidden, cos, sin, *self._project(0, hidden, cos, sin)

    def _end(self, index: int, hidden: Tensor, mixed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """From the attention of layer `index` to that of the next, or to the logits."""
        layer = self.layers[index]
        hidden = hidden + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        if index + 1 == len(self.layers):
            return (self.head(self.inner.norm(hidden))[:, 0].float(),)
        return hidden, *self._project(index + 1, hidden, cos, sin)

    def _project(self, index: int, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layer = self.layers[index]
        entered, own = layer.input_layernorm(hidden), layer.self_attn
        query, key, value = (
            project(entered).unflatten(-1, (-1, self._dim)).transpose(1, 2)
            for project in (own.q_proj, own.k_proj, own.v_proj)
        )
        query, key = self._rotate(query, key, cos, sin)
        return query, key, value


def can_decode(model: Any) -> bool:
    """Whether `Decoder` computes what this model does."""
    config = text_config(model)
    plain = getattr(config, "model_type", "") in KINDS and hasattr(model, "lm_head")
    return plain and len(full_attention_layers(config)) == config.num_hidden_layers


def attend_by(
    sparse: SparseAttention | None,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    extent: Extent,
    side: TokenCache,
    mask: Callable[[], Tensor | None],
) -> Tensor:
    """One token's attention ``[B, Hq, 1, D]`` as it is served, or densely (None); `mask` is asked for only then."""

    def dense() -> Tensor:
        return attend_densely(query, key, value, scale, mask())

    if sparse is None:
        return dense()
    return sparse.attend(layer, query, key, value, extent=extent, side=side, scale=scale, softcap=0.0, dense=dense)


def attend_densely(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Dense attention of one token ``[B, Hq, 1, D]`` over `key` and `value` ``[B, Hkv, T, D]``; `mask` ``[B, 1, 1, T]``
    is added to the logits. The heads of a group stand as queries of their KV head, so that K is read once.
    """
    grouped = query[:, :, 0].unflatten(1, (key.shape[1], -1))
    mask = None if mask is None else mask.expand(-1, key.shape[1], grouped.shape[2], -1)
    return scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale).flatten(1, 2)[:, :, None]
