from __future__ import annotations

import pytest
import torch
from tests.ops.test_remainder import SHARING, assert_near, draw

from hashattention import ops


@pytest.mark.parametrize("heads", SHARING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_the_kernel_does_what_the_reference_does(heads, dtype, softcap) -> None:
    arguments = draw(5, heads, (48, 80), dtype)
    ours, theirs = (ops.add_remainder(*arguments, scale=0.2, softcap=softcap, backend=b) for b in ("cpu", "reference"))
    assert_near(ours, theirs.double())


def test_strides_beside_poison() -> None:
    out, logsumexp, q, sums, *rest = draw(4, (8, 2, 2), (64, 64))
    apart = torch.full((4, 2, 3, 129), torch.nan)
    apart[:, :, 1] = sums
    wide = torch.full((4, 3, 8, 64), torch.nan)
    wide[:, 1] = q[:, :, 0]
    views = wide[:, 1:2].transpose(1, 2), apart[:, :, 1]
    found = ops.add_remainder(out, logsumexp, *views, *rest, scale=0.2, backend="cpu")
    assert torch.equal(found, ops.add_remainder(out, logsumexp, q, sums, *rest, scale=0.2, backend="cpu"))
