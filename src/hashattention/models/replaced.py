"""Another attention in all layers of a transformers model, for a while."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from hashattention.errors import ConfigError
from hashattention.models.describe import dense_function, text_config

#: Output ``[B, N, Hq, Dv]``, and weights or None.
Attended = tuple[Tensor, Tensor | None]
#: Called as ``attend(dense, module, query, key, value, mask, **options)``; `dense` is the model's own function, which
#: takes all but itself.
Attend = Callable[..., Attended]

#: How the attention of a model is called while `attach` serves it, before what tells its own apart.
ATTACHED = "hash_attention"

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


def refuse_attached(model: Any) -> None:
    """Refuse a model that `attach` serves: what it computes need not be its own attention.

    Raises
    ------
    ConfigError
    """
    own = text_config(model)._attn_implementation
    if own.startswith(ATTACHED):
        raise ConfigError(
            f"the model is attached (its attention is {own!r}), so it would be learnt from what was selected. "
            "Call detach() on what attach() gave, or load the model anew."
        )


def _dispatch(module: nn.Module, *tensors: Tensor | None, **options: Any) -> Attended:
    attend, own = _REPLACED.get()
    return attend(dense_function(module, own), module, *tensors, **options)
