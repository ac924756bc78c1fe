"""Selection and attention of the CUDA step, each in a launch of its own, against the reference."""

from __future__ import annotations

import pytest
import torch
from tests.ops.cuda.test_step import case, page

from hashattention import ops
from hashattention.ops import reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("pages", [0, 16])
@pytest.mark.parametrize(("bits", "levels", "batch"), [(64, 7, 3), (32, 7, 40), (128, 7, 9), (64, 0, 5), (32, 15, 2)])
def test_parts_by_name_are_the_reference(bits, levels, batch, pages):
    """Selection bit for bit, attention within twice what plain rounding costs."""
    made = case(batch, 3072, bits=bits, levels=levels)
    made = page(made, pages) if pages else made
    code = torch.randint(-levels, levels + 1, (batch, 8, 1, bits), device="cuda").to(torch.int8)
    code = code if levels else torch.randint(-(2**31), 2**31, (batch, 8, 1, bits // 32), device="cuda").int()
    rows = made["start"], made["end"], made["budgets"], made["capacity"]
    table = made.get("block_table")
    options = {"block_table": table, "levels": levels or 127, "backend": "cuda"}
    indices, counts = ops.score_select(code, made["signatures"], *rows, **options)
    wanted, wanted_counts = reference.score_select(code, made["signatures"], *rows, None, table)
    assert torch.equal(counts, wanted_counts)
    assert torch.equal(indices, wanted)
    tensors = made["q"], made["k"], made["v"]
    out, logsumexp = ops.attend(*tensors, indices, counts, scale=0.1, block_table=table, backend="cuda")
    exact, lse = reference.attend(*(t.float() for t in tensors), indices, counts, 0.1, 0.0, table)
    torch.testing.assert_close(logsumexp, lse, atol=1e-4, rtol=1e-5)
    plain = (exact.to(out.dtype).float() - exact).norm()
    assert (out.float() - exact).norm() <= 2 * plain
