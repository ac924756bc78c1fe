from __future__ import annotations

import pytest
import torch
import transformers
from tests.tiny import ARCHITECTURES, build

from hashattention.errors import UnsupportedModelError
from hashattention.models.describe import (
    attention_modules,
    canonical_rope,
    describe,
    full_attention_layers,
    public_name,
)

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_describes_each_listed_architecture(architecture):
    described = describe(build(architecture))
    assert described.architecture.startswith(ARCHITECTURES[architecture][0])
    assert (described.num_attention_heads, described.num_key_value_heads, described.head_dim) == (4, 2, 16)
    assert described.layers == ((5,) if architecture == "gemma3" else (0, 1))
    assert described.group_size == 2
    assert "rope_theta" in described.rope


def test_rope_tells_two_models_apart():
    parameters = {"rope_type": "default", "rope_theta": 5e5}
    assert describe(build("llama")) != describe(build("llama", rope_parameters=parameters))


def test_rope_is_compared_by_meaning_not_by_spelling():
    written = canonical_rope({"rope_theta": 100000, "rope_type": "default", "factor": None})
    assert written == canonical_rope({"rope_type": "default", "rope_theta": 100000.0})
    assert written != canonical_rope({"rope_type": "linear", "rope_theta": 100000.0})


@pytest.mark.parametrize(
    ("given", "public"),
    [
        ("owner/model", "owner/model"),
        ("/home/somebody/models/tiny", "tiny"),
        ("a/b/c", "c"),
        ("", ""),
        ("tiny", "tiny"),
    ],
)
def test_a_name_carries_no_path(given, public):
    assert public_name(given) == public


def test_layers_without_layer_types():
    config = transformers.MistralConfig(num_hidden_layers=3, sliding_window=64)
    assert full_attention_layers(config) == ()
    config = transformers.MistralConfig(num_hidden_layers=3, sliding_window=None)
    assert full_attention_layers(config) == (0, 1, 2)


def refused(config_name: str, model_name: str, **changes) -> str:
    config = getattr(transformers, config_name)(**{**SMALL, **changes})
    with torch.device("meta"), pytest.raises(UnsupportedModelError) as error:
        describe(getattr(transformers, model_name)(config))
    return str(error.value)


def test_refuses_an_encoder():
    assert "encoder-only" in refused("BertConfig", "BertModel")


def test_refuses_an_encoder_decoder():
    shape = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = transformers.BartConfig(vocab_size=64, **shape, encoder_attention_heads=2, decoder_attention_heads=2)
    with torch.device("meta"), pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        describe(transformers.BartForConditionalGeneration(config))


def test_refuses_latent_attention_by_name():
    ranks = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    assert "MLA" in refused("DeepseekV3Config", "DeepseekV3ForCausalLM", **ranks, num_key_value_heads=2)


def test_refuses_linear_attention_by_name():
    message = refused("MambaConfig", "MambaForCausalLM")
    assert "mamba" in message
    assert "linear/recurrent" in message


def test_refuses_a_model_with_sliding_layers_only():
    assert "sliding" in refused("MistralConfig", "MistralForCausalLM", num_key_value_heads=2, sliding_window=16)


def test_refuses_attention_outside_the_interface():
    """A user's own model class whose module never asks the AttentionInterface."""
    model = build("llama")

    class OwnAttention(torch.nn.Module):
        is_causal = True

        def __init__(self, index: int) -> None:
            super().__init__()
            self.layer_idx = index

    for index, layer in enumerate(model.model.layers):
        layer.self_attn = OwnAttention(index)
    with pytest.raises(UnsupportedModelError, match=r"OwnAttention .* AttentionInterface"):
        describe(model)


def test_attention_modules_are_those_of_the_decoder():
    assert sorted(attention_modules(build("gemma3"))) == [0, 1, 2, 3, 4, 5]
