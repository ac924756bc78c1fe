from __future__ import annotations

import pytest
import torch

from hashattention.ops import reference, triton


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("heads", "group", "tokens", "dim"), [(2, 6, 300, 64), (1, 1, 1, 128), (3, 17, 129, 80), (2, 7, 128, 8)]
)
def test_like_the_reference(heads: int, group: int, tokens: int, dim: int, dtype: torch.dtype, device: str) -> None:
    q = torch.randn(2, heads * group, 1, dim, dtype=dtype, device=device)
    # A cache with room: rows of a request do not follow each other.
    k = torch.randn(2, heads, tokens + 40, dim, dtype=dtype, device=device)
    k[:, :, tokens:] = torch.nan
    k = k[:, :, :tokens]
    expected = reference.logits(q.double(), k.double(), 0.25)
    found, plain = triton.logits(q, k, 0.25), reference.logits(q, k, 0.25)
    # Sums in another order, and on tensor cores: a few units in the last place of the largest.
    allowed = 2 * (plain - expected).abs().max() + 1e-6 * expected.abs().max()
    assert (found - expected).abs().max() <= allowed


@pytest.mark.gpu
def test_bfloat16_on_the_tensor_cores() -> None:
    q, k = (torch.randn(4, h, t, 128, dtype=torch.bfloat16, device="cuda") for h, t in ((12, 1), (2, 5000)))
    assert (triton.logits(q, k, 0.1) - reference.logits(q, k, 0.1)).abs().max() <= 1e-4
