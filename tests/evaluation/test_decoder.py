from __future__ import annotations

import pytest
import torch
from tests.tiny import ARCHITECTURES, build
from torch.nn.functional import scaled_dot_product_attention

from hashattention.evaluation.decoder import KINDS, attend_densely, can_decode
from hashattention.evaluation.reader import Reader

CONTEXTS = [list(range(3, 90)), list(range(40, 103)), list(range(5, 97))]


@pytest.mark.parametrize("kind", KINDS)
def test_its_steps_are_the_models(kind: str) -> None:
    model = build(kind)
    reader, plain = Reader(model, CONTEXTS), Reader(model, CONTEXTS)
    assert reader._decoder is not None
    plain._decoder = None
    for step in range(5):
        tokens = torch.tensor([[7 + step], [11 + step], [90 - step]])
        torch.testing.assert_close(reader.forward(tokens), plain.forward(tokens), rtol=1e-5, atol=1e-5)
    assert reader.slots == plain.slots == 97
    for layer, other in zip(reader.cache.layers, plain.cache.layers, strict=True):
        for row, front in enumerate(reader.padding):
            torch.testing.assert_close(layer.keys[row, :, front:], other.keys[row, :, front:], rtol=1e-5, atol=1e-5)


def test_it_is_not_used_for_what_it_does_not_compute() -> None:
    assert {name for name in ARCHITECTURES if can_decode(build(name))} == set(KINDS)
    assert not can_decode(build("mistral", sliding_window=8))


@pytest.mark.parametrize("padded", [False, True])
def test_dense_attention_of_a_group(padded: bool) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 6, 1, 8), torch.randn(3, 2, 21, 8), torch.randn(3, 2, 21, 8)
    mask = None
    if padded:
        mask = torch.zeros(3, 1, 1, 21)
        mask[1, ..., :5] = -torch.inf
        # What lies in padding has no influence.
        key[1, :, :5], value[1, :, :5] = 1e4, 1e4
    repeated = [tensor.repeat_interleave(3, dim=1) for tensor in (key, value)]
    expected = scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(attend_densely(query, key, value, 0.3, mask), expected)
