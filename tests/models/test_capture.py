from __future__ import annotations

import pytest
import torch
from tests.tiny import ARCHITECTURES, build

import hashattention
from hashattention.errors import ConfigError
from hashattention.models.capture import capture, recording
from hashattention.models.describe import describe
from hashattention.selectors.oracle import OracleSelector

TOKENS = torch.randint(3, 120, (50,), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.tensor([0, 7, 8, 23, 48, 49])


@pytest.mark.parametrize("own", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recorded_tensors_give_the_models_attention(architecture, own):
    """Dense attention over the sample equals what the layer hands to its output projection."""
    model = build(architecture, attn_implementation=own)
    base = describe(model)
    sample = capture(model, base, TOKENS, POSITIONS, value=True)
    assert model.config._attn_implementation == own
    layers = (len(base.layers), base.num_key_value_heads, 50, base.head_dim)
    assert sample.key.shape == sample.value.shape == layers
    assert sample.query.shape == (len(base.layers), base.num_attention_heads, 6, base.head_dim)
    seen = outputs(model, base.layers)
    for row, layer in enumerate(base.layers):
        group = base.group_size
        key, value = (t[row].float().repeat_interleave(group, 0) for t in (sample.key, sample.value))
        logits = sample.query[row].float() @ key.transpose(-1, -2) * sample.scale[row]
        logits = logits.masked_fill(torch.arange(50) > POSITIONS[:, None], -torch.inf)
        out = (logits.softmax(-1) @ value).transpose(0, 1).flatten(1)
        # The sample is bfloat16: 8 bits of mantissa in logits of some ten.
        assert (out - seen[layer][POSITIONS]).norm() < 0.03 * seen[layer][POSITIONS].norm()


@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_an_attached_model_is_refused_until_it_is_detached(own):
    """Its attention is, or may be, over selected tokens alone."""
    model = build("llama", attn_implementation=own)
    base = describe(model)
    before = capture(model, base, TOKENS, POSITIONS)
    attached = hashattention.attach(model, OracleSelector(), 0.1, min_context=0, sparse_tail=50)
    with pytest.raises(ConfigError, match=r"is attached .*detach\(\)"):
        capture(model, base, TOKENS, POSITIONS)
    attached.detach()
    assert torch.equal(capture(model, base, TOKENS, POSITIONS).query, before.query)


def outputs(model, layers):
    from hashattention.models.describe import attention_modules

    seen, hooks = {}, []
    for layer, module in attention_modules(model).items():
        if layer in layers:
            keep = lambda _, args, layer=layer: seen.__setitem__(layer, args[0][0].detach().float())  # noqa: E731
            hooks.append(module.o_proj.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(TOKENS[None])
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("chunk", [1, 7, 49, 64])
def test_chunks_change_nothing(architecture, chunk):
    model = build(architecture)
    base = describe(model)
    whole = capture(model, base, TOKENS, POSITIONS, value=True)
    parts = capture(model, base, TOKENS, POSITIONS, value=True, chunk=chunk)
    assert torch.equal(whole.positions, parts.positions)
    for name in ("key", "query", "value"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=2e-2, rtol=2e-2)


def test_values_are_kept_only_if_asked():
    model = build("llama")
    assert capture(model, describe(model), TOKENS, POSITIONS).value is None


def test_the_models_implementation_comes_back_after_an_error():
    model = build("llama")
    with pytest.raises(RuntimeError, match="boom"), recording(model, None):
        assert model.config._attn_implementation == "hash_capture"
        raise RuntimeError("boom")
    assert model.config._attn_implementation == "sdpa"


def test_layers_queries_and_copies_are_cut_out():
    model = build("llama")
    sample = capture(model, describe(model), TOKENS, POSITIONS, value=True)
    part = sample.layers(1, 2).pick(torch.tensor([0, 3])).to("cpu")
    assert torch.equal(part.query, sample.query[1:2, :, [0, 3]])
    assert part.positions.tolist() == [0, 23] and torch.equal(part.value, sample.value[1:2])
