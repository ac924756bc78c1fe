from __future__ import annotations

import pytest
import torch

from hashattention.ops import reference, triton
from hashattention.ops.triton.pool import PART


@pytest.mark.parametrize("how", ["peak_max", "peak_sum", "logits"])
@pytest.mark.parametrize(("heads", "group", "tokens"), [(2, 6, 300), (1, 1, 1), (3, 7, 1025), (1, 4, 17000)])
def test_like_the_reference(heads: int, group: int, tokens: int, how: str, device: str) -> None:
    logits = 30 * torch.randn(3, heads, group, tokens, device=device)
    # A row with padding in front and behind, and an empty one.
    start = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32, device=device)
    end = torch.tensor([tokens, tokens - tokens // 5, tokens], dtype=torch.int32, device=device)
    # What is outside may be anything.
    logits[1, :, :, : tokens // 3] = 1e30
    logits[1, :, :, tokens - tokens // 5 :] = torch.nan
    expected, found = reference.pool(logits, start, end, how), triton.pool(logits, start, end, how)
    if how == "peak_max":
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-6)


def test_a_peak_may_lie_in_any_part(device: str) -> None:
    tokens = 3 * PART + 5
    start = torch.zeros(1, dtype=torch.int32, device=device)
    for peak in (0, PART - 1, 2 * PART, tokens - 1):
        logits = torch.zeros(1, 1, 2, tokens, device=device)
        logits[..., peak] = 7.0
        found = triton.pool(logits, start, start + tokens, "peak_max")
        assert found[0, 0, peak] == 0
        assert (found == -7.0).sum() == tokens - 1
