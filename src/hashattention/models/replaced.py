"""Another attention in all layers of a transformers model, for a while."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from hashattention.models.describe import dense_function

#: Output ``[B, N, Hq, Dv]``, and weights or None.
Attended = tuple[Tensor, Tensor | None]
#: Called as ``attend(dense, module, query, key, value, mask, **options)``; `dense` is the model's own function, which
#: takes all but itself.
Attend = Callable[..., Attended]

_REPLACED: contextvars.ContextVar[tuple[Attend, str]] = contextvars.ContextVar("hashattention_replaced")


@contextlib.contextmanager
def replaced_attention(model: Any, name: str, attend: Attend) -> Iterator[None]:
    """Within this context every attention of `model` is `attend`, under a `name` that transformers is told; its masks
    are those of the model's own implementation, which comes back at the end.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    own = model.config._attn_implementation
    AttentionInterface.register(name, _dispatch)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    token = _REPLACED.set((attend, own))
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(own)
        _REPLACED.reset(token)


def _dispatch(module: nn.Module, *tensors: Tensor | None, **options: Any) -> Attended:
    attend, own = _REPLACED.get()
    return attend(dense_function(module, own), module, *tensors, **options)
