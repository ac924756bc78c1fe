"""Tiny random models of every listed architecture."""

from __future__ import annotations

import torch
import transformers

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 16}

ARCHITECTURES = {
    "llama": ("Llama", {**HEADS}),
    "mistral": ("Mistral", {**HEADS, "sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {**HEADS}),
    "gemma3": ("Gemma3", {**HEADS, "num_hidden_layers": 6, "sliding_window": 8}),
    "phi3": ("Phi3", {}),
}


def build(architecture: str, seed: int = 0, **changes):
    """A random model in eval mode; weights are drawn wide, so that attention is peaked and choices matter."""
    prefix, own = ARCHITECTURES[architecture]
    config_class = getattr(transformers, f"{prefix}{'TextConfig' if prefix == 'Gemma3' else 'Config'}")
    model_class = getattr(transformers, f"{prefix}ForCausalLM")
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SHAPE, **own, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.normal_(0, 0.2)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=1, eos_token_id=None, pad_token_id=0, do_sample=False
    )
    return model
