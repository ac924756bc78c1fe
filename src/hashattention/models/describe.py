"""Describe a transformers model: the `BaseModel` fields its maps must agree with, or why it cannot be served."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

from hashattention.config import BaseModel
from hashattention.errors import UnsupportedModelError


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The causal self-attention modules of a decoder by layer index."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if (
            isinstance(index, int)
            and type(module).__name__.endswith("Attention")
            and getattr(module, "is_causal", False)
        ):
            found.setdefault(index, module)
    return found


def dense_function(module: nn.Module, implementation: str) -> Any:
    """The attention function that the implementation's name means for this attention module."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # "eager" is no entry of the registry: every modelling file has its own function.
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


def text_config(model: Any) -> Any:
    """The configuration of a model's text decoder."""
    return model.config.get_text_config(decoder=True)


def full_attention_layers(config: Any) -> tuple[int, ...]:
    """Layers whose attention sees the whole context (not a sliding window, a chunk or a recurrent state)."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windowed = getattr(config, "sliding_window", None) is not None
        kinds = ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers
    return tuple(index for index, kind in enumerate(kinds) if kind == "full_attention")


def canonical_rope(parameters: dict[str, Any]) -> str:
    """Rotary parameters as sorted JSON in which 10000 and 10000.0 are one number and absent and None are one value."""
    numbers = {name: float(value) if type(value) is int else value for name, value in parameters.items()}
    return json.dumps({name: value for name, value in numbers.items() if value is not None}, sort_keys=True)


def public_name(name_or_path: str) -> str:
    """A hub id as it is, a local folder by its last part: an artifact must not carry somebody's paths."""
    hub_id = name_or_path.count("/") == 1 and not name_or_path.startswith("/")
    return name_or_path if hub_id else Path(name_or_path).name


def describe(model: Any) -> BaseModel:
    """What maps must know of a transformers model.

    Raises
    ------
    UnsupportedModelError
        For an encoder, an encoder-decoder, multi-head latent attention, a model without full attention layers (linear
        or sliding only), or one whose attention does not go through transformers' AttentionInterface.
    """
    name, config = type(model).__name__, text_config(model)
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder; hash attention serves decoder-only language models."
        )
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{name} uses multi-head latent attention (MLA): it has no K and V per head to select from. "
            "Use a model with multi-head or grouped-query attention."
        )
    modules = attention_modules(model)
    if not modules:
        kind = getattr(config, "model_type", name)
        raise UnsupportedModelError(
            f"{name} ({kind}) has no causal self-attention over a KV cache (encoder-only, or linear/recurrent "
            "attention); hash attention serves decoder-only transformers."
        )
    layers = tuple(index for index in full_attention_layers(config) if index in modules)
    if not layers:
        raise UnsupportedModelError(
            f"{name} has no full-attention layer: all are sliding-window or linear, which are dense already at no cost."
        )
    first = type(modules[layers[0]])
    if not hasattr(sys.modules[first.__module__], "ALL_ATTENTION_FUNCTIONS"):
        raise UnsupportedModelError(
            f"{first.__name__} of {name} does not use transformers' AttentionInterface, so it cannot be hooked without "
            "patching; use a model from transformers itself, or open an issue naming this architecture."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    return BaseModel(
        architecture=name,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        layers=layers,
        rope=canonical_rope(rope.get("full_attention", rope)),
        name=public_name(getattr(model.config, "name_or_path", "") or ""),
    )


def token_bytes(model: Any) -> int:
    """Bytes of K and V of one token, all layers."""
    base = describe(model)
    return int(2 * base.num_hidden_layers * base.num_key_value_heads * base.head_dim * model.dtype.itemsize)
