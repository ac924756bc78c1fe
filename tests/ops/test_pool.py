from __future__ import annotations

import pytest
import torch

from hashattention import ops
from hashattention.errors import InputError


def bounds(*rows: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    start, end = torch.tensor(rows, dtype=torch.int32).unbind(1)
    return start, end


def test_each_way_by_its_definition() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 9)
    start, end = bounds((0, 9), (2, 7))
    found = {how: ops.pool(logits, start, end, how) for how in ("peak_max", "peak_sum", "logits")}
    for request, head in ((0, 0), (1, 2)):
        inside = slice(int(start[request]), int(end[request]))
        rows = logits[request, head, :, inside].double()
        weights = (rows - rows.amax(-1, keepdim=True)).exp()
        expected = {"peak_max": weights.amax(0).log(), "peak_sum": weights.sum(0).log(), "logits": rows.mean(0)}
        for how, values in expected.items():
            torch.testing.assert_close(found[how][request, head, inside].double(), values, atol=1e-6, rtol=1e-6)


def test_outside_the_bounds_a_logit_counts_for_nothing() -> None:
    logits = torch.zeros(2, 1, 2, 5)
    logits[:, :, :, 0], logits[:, :, :, 4] = 90.0, torch.nan
    for how in ("peak_max", "peak_sum", "logits"):
        found = ops.pool(logits, *bounds((1, 4), (3, 3)), how)
        assert found[0, 0].isinf().tolist() == [True, False, False, False, True]
        assert found[0, 0, 1:4].abs().max() <= 1
        assert (found[1] == -torch.inf).all()


def test_opcheck() -> None:
    arguments = torch.randn(2, 2, 3, 5), *bounds((0, 5), (1, 4)), "peak_max", "auto"
    torch.library.opcheck(torch.ops.hashattention.pool.default, arguments)


def test_what_does_not_fit_is_named() -> None:
    logits, rows = torch.randn(1, 2, 3, 5), bounds((0, 5))
    with pytest.raises(InputError, match="logits is float16"):
        ops.pool(logits.half(), *rows, "peak_max")
    with pytest.raises(InputError, match="B must be 1"):
        ops.pool(logits, *bounds((0, 5), (0, 5)), "peak_max")
    with pytest.raises(InputError, match="how must be one of peak_max, peak_sum, logits; given 'mean'"):
        ops.pool(logits, *rows, "mean")  # type: ignore[arg-type]
