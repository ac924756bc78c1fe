from __future__ import annotations

import itertools

import pytest
import torch

from hashattention import ops
from hashattention.errors import BackendError


def make(heads: int, group: int, tokens: int, device: str, maps: int | None = None) -> tuple:
    dim, batch, maps = 16, 2, maps or heads
    widths = [dim * heads * group // maps, 32, 32, 64]
    weights = [torch.randn(maps, a, b, device=device) / a**0.5 for a, b in itertools.pairwise(widths)]
    biases = [torch.randn(maps, b, device=device) / 10 for b in widths[1:]]
    q = torch.randn(batch, heads * group, 1, dim, device=device)
    k, v = (torch.randn(batch, heads, tokens, dim, device=device) for _ in range(2))
    signatures = torch.randint(-(2**31), 2**31, (batch, heads, tokens, 2), device=device).int()
    start = torch.tensor([0, 3], dtype=torch.int32, device=device)
    end = torch.tensor([tokens, tokens // 2], dtype=torch.int32, device=device)
    return q, k, v, signatures, weights, biases, start, end


@pytest.mark.parametrize(("levels", "maps", "selection_heads"), [(7, 2, 2), (0, 2, 2), (0, 8, 2), (3, 8, 8)])
def test_decode_matches_the_reference(levels: int, maps: int, selection_heads: int, device: str) -> None:
    arguments = make(2, 4, 501, device, maps)
    budgets = torch.tensor([4, 8, 30], dtype=torch.int32, device=device).expand(2, selection_heads, 3)
    options = {"levels": levels, "scale": 0.25, "softcap": 0.0}
    actual = ops.decode(*arguments, budgets, 48, **options, backend="triton")
    expected = ops.decode(*arguments, budgets, 48, **options, backend="reference")
    assert torch.allclose(actual[0], expected[0], atol=1e-5)
    assert torch.allclose(actual[1], expected[1], atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the automatic choice takes the kernels")
def test_the_interpreter_runs_by_name_alone(device: str, caplog: pytest.LogCaptureFixture) -> None:
    x, weight, bias = torch.randn(1, 1, 1, 16), torch.randn(1, 16, 32), torch.randn(1, 32)
    assert torch.equal(
        ops.encode_signature(x, [weight], [bias]), ops.encode_signature(x, [weight], [bias], backend="triton")
    )
    mask = torch.ones(1, 9, dtype=torch.bool)
    code, signatures = torch.zeros(1, 1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 9, 1, dtype=torch.int32)
    bounds = torch.zeros(1, dtype=torch.int32), torch.full((1,), 9, dtype=torch.int32)
    with pytest.raises(BackendError, match="mask"):
        ops.score_select(
            code, signatures, *bounds, torch.ones(1, 1, 3, dtype=torch.int32), 3, mask=mask, backend="triton"
        )


@pytest.mark.gpu
def test_a_captured_step_follows_its_inputs() -> None:
    arguments = make(2, 4, 5000, "cuda")
    budgets = torch.tensor([4, 8, 30], dtype=torch.int32, device="cuda").repeat(2, 2, 1)
    step = torch.compile(lambda *a: ops.decode(*a, capacity=48, scale=0.25), fullgraph=True)
    step(*arguments, budgets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = ops.decode(*arguments, budgets, 48, scale=0.25)
    for _ in range(3):
        arguments[0].normal_()
        arguments[7][0] -= 17
        budgets[0, 0, 2] += 3
        out.fill_(torch.nan)
        graph.replay()
        expected = ops.decode(*arguments, budgets, 48, scale=0.25, backend="reference")
        assert torch.allclose(out, expected[0], atol=1e-3)
        assert torch.allclose(lse, expected[1], atol=1e-3)
