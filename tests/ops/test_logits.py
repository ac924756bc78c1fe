from __future__ import annotations

import pytest
import torch

from hashattention import ops
from hashattention.errors import BackendError, InputError


def test_every_head_against_the_keys_of_its_group() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(3, 6, 1, 8), torch.randn(3, 2, 11, 8)
    found = ops.logits(q, k, scale=0.3)
    assert found.shape == (3, 6, 11)
    for request, head, token in ((0, 0, 0), (2, 5, 10), (1, 2, 4), (1, 3, 4)):
        expected = 0.3 * sum(a * b for a, b in zip(q[request, head, 0], k[request, head // 3, token], strict=True))
        assert found[request, head, token] == pytest.approx(float(expected), abs=1e-5)


def test_short_types_are_summed_in_float32() -> None:
    # In bfloat16 the ones would be lost beside the first product.
    q, k = torch.ones(1, 1, 1, 256).bfloat16(), torch.ones(1, 1, 2, 256).bfloat16()
    k[..., 0] = 4096.0
    assert ops.logits(q, k, scale=1.0).tolist() == [[[4351.0, 4351.0]]]


def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.hashattention.logits.default, (torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8), 0.5, "auto")
    )


def test_what_does_not_fit_is_named() -> None:
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(InputError, match="k is float32"):
        ops.logits(q.half(), k, scale=1.0)
    with pytest.raises(InputError, match="D must be 8"):
        ops.logits(q, k[..., :4], scale=1.0)
    with pytest.raises(InputError, match="4 is not a positive multiple of 3"):
        ops.logits(q, torch.randn(1, 3, 5, 8), scale=1.0)
    with pytest.raises(BackendError, match="unknown backend"):
        ops.logits(q, k, scale=1.0, backend="none")
