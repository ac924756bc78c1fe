from __future__ import annotations

import pytest
import torch
from tests.tiny import build

from hashattention.models.replaced import replaced_attention

TOKENS = torch.randint(1, 120, (1, 24), generator=torch.Generator().manual_seed(0))


def own(dense, *arguments, **options):
    return dense(*arguments, **options)


def halved(dense, *arguments, **options):
    out, weights = dense(*arguments, **options)
    return out / 2, weights


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_layer_attends_by_another_function_within(family):
    model = build(family)
    dense = model(TOKENS).logits
    with replaced_attention(model, "hash_own", own):
        assert torch.equal(model(TOKENS).logits, dense)
    with replaced_attention(model, "hash_halved", halved):
        assert not torch.allclose(model(TOKENS).logits, dense)
    assert torch.equal(model(TOKENS).logits, dense)


def test_one_within_another_and_an_error_in_it():
    """The outer one is back when the inner ends, however it ends."""
    model = build("llama")
    with replaced_attention(model, "hash_outer", halved):
        outer = model(TOKENS).logits
        with pytest.raises(ZeroDivisionError), replaced_attention(model, "hash_inner", lambda *a, **k: 1 / 0):
            model(TOKENS)
        assert model.config._attn_implementation == "hash_outer"
        assert torch.equal(model(TOKENS).logits, outer)
    assert model.config._attn_implementation == "sdpa"
