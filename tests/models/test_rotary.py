from __future__ import annotations

import pytest
import torch
import transformers
from tests.tiny import ARCHITECTURES, SHAPE, build

from hashattention.errors import UnsupportedModelError
from hashattention.models.capture import recording
from hashattention.models.describe import attention_modules, describe
from hashattention.models.rotary import rotary_frequencies
from hashattention.rotation import unrotate

TOKENS = torch.randint(3, 120, (1, 50), generator=torch.Generator().manual_seed(0))
SCALED = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
}  # fmt: skip


class Kept:
    """A recorder of float32 queries and keys by layer."""

    def __init__(self):
        self.query, self.key = {}, {}

    def record(self, layer, query, key, value, scale):
        self.query[layer], self.key[layer] = query, key


def before_and_after(model):
    """(query, key) of each layer as its norms or projections give them, and as attention takes them: [1, H, T, D]."""
    kept, before, hooks = Kept(), {}, []
    for layer, module in attention_modules(model).items():
        for name in ("q", "k"):
            source = getattr(module, f"{name}_norm", None) or getattr(module, f"{name}_proj", None)

            def keep(_, inputs, out, at=(layer, name)):
                heads = out.unflatten(-1, (-1, 16)) if out.dim() == 3 else out
                before[at] = heads.transpose(1, 2) if heads.shape[1] == 50 else heads

            if source is not None:
                hooks.append(source.register_forward_hook(keep))
    with torch.no_grad(), recording(model, kept):
        model(TOKENS)
    for hook in hooks:
        hook.remove()
    return before, kept


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"phi3"}))
def test_unrotated_tensors_are_those_before_the_models_rotation(architecture):
    model = build(architecture)
    frequencies = torch.tensor(rotary_frequencies(model))
    before, after = before_and_after(model)
    for layer in describe(model).layers:
        for name, found in (("q", after.query[layer]), ("k", after.key[layer])):
            expected = before[layer, name]
            assert (found - expected).abs().max() > 0.1, "attention takes it rotated"
            torch.testing.assert_close(unrotate(found, torch.arange(50), frequencies), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", SCALED)
def test_fixed_scaling_is_undone_up_to_one_factor(kind):
    model = build("llama", rope_parameters=SCALED[kind])
    before, after = before_and_after(model)
    back = unrotate(after.key[1], torch.arange(50), torch.tensor(rotary_frequencies(model)))
    factor = (back * before[1, "k"]).sum() / before[1, "k"].square().sum()
    assert (abs(factor - 1) > 0.05) == (kind == "yarn")
    torch.testing.assert_close(back, before[1, "k"] * factor, atol=1e-4, rtol=1e-4)


def test_gemma3_gives_the_frequencies_of_its_full_layers():
    found = torch.tensor(rotary_frequencies(build("gemma3")))
    torch.testing.assert_close(found, 1e6 ** -(torch.arange(8) / 8))


def test_fused_projections_and_partial_rotation():
    assert len(rotary_frequencies(build("phi3"))) == 8
    config = transformers.PhiConfig(**{**SHAPE, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}})
    model = transformers.PhiForCausalLM(config).eval()
    frequencies = torch.tensor(rotary_frequencies(model))
    assert len(frequencies) == 4
    before, after = before_and_after(model)
    found = unrotate(after.key[1], torch.arange(50), frequencies)
    torch.testing.assert_close(found, before[1, "k"], atol=1e-4, rtol=1e-4)


def refused():
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    long = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 256,
    }  # fmt: skip
    yield "dynamic", lambda: build("llama", rope_parameters=dynamic), "'dynamic' rotary scaling"
    yield "longrope", lambda: build("phi3", rope_parameters=long), "'longrope' rotary scaling"
    cohere = transformers.CohereConfig(**SHAPE)
    yield "interleaved", lambda: transformers.CohereForCausalLM(cohere).eval(), "rotates other pairs of channels"
    bare = transformers.SmolLM3Config(**{**SHAPE, "no_rope_layers": [1, 0]})
    yield "bare layer", lambda: transformers.SmolLM3ForCausalLM(bare).eval(), r"no rotary embedding in layers \[1\]"
    opt = transformers.OPTConfig(vocab_size=128, hidden_size=64, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4)
    yield "none", lambda: transformers.OPTForCausalLM(opt).eval(), "no rotary embedding that can be undone"


CASES = {name: case for name, *case in refused()}


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_undone_is_refused_by_name(name):
    make, message = CASES[name]
    with pytest.raises(UnsupportedModelError, match=f"{message}.*rope='after'"):
        rotary_frequencies(make())
