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


def make_key(signatures: torch.Tensor, widths: list[int], device: str) -> tuple:
    """A new key for every row, and its map."""
    heads = signatures.shape[1]
    weights = [torch.randn(heads, a, b, device=device) / a**0.5 for a, b in itertools.pairwise(widths)]
    biases = [torch.randn(heads, b, device=device) / 10 for b in widths[1:]]
    return torch.randn(len(signatures), heads, 1, widths[0], device=device), weights, biases


@pytest.mark.parametrize("hidden", [(), (32,), (32, 32), (96, 80), (64, 48)])
@pytest.mark.parametrize(("levels", "page"), [(7, 0), (0, 0), (7, 1), (7, 61)])
def test_the_new_key_is_signed_in_the_launch_of_the_query(
    hidden: tuple[int, ...], levels: int, page: int, device: str, to_pages
) -> None:
    """Bit for bit what is written apart, with and without split columns; the rest of the cache stays as it was."""
    q, k, v, signatures, _, _, start, end = make(2, 4, 183, device)
    weights = [torch.randn(2, a, b, device=device) / a**0.5 for a, b in itertools.pairwise([64, *hidden, 64])]
    biases = [torch.randn(2, b, device=device) / 10 for b in (*hidden, 64)]
    new_key = make_key(signatures, [16, *hidden, 64], device)
    table = None
    if page:
        table, k, v, signatures = (t.to(device) for t in to_pages(page, k.cpu(), v.cpu(), signatures.cpu()))
    budgets = torch.tensor([2, 4, 20], dtype=torch.int32, device=device).expand(2, 2, 3)
    maps, bounds = (weights, biases), (start, end, budgets, 26)
    options = {"levels": levels, "scale": 0.25, "block_table": table, "backend": "triton"}
    apart = signatures.clone()
    ops.write_signature(*new_key, apart, end - 1, block_table=table, backend="triton")
    assert (apart != signatures).any(-1).sum() == 4
    expected = ops.decode(q, k, v, apart, *maps, *bounds, **options)
    actual = ops.decode(q, k, v, signatures, *maps, *bounds, **options, new_key=new_key)
    assert torch.equal(signatures, apart)
    assert torch.equal(actual[0], expected[0])
    exact = ops.decode(q, k, v, apart, *maps, *bounds, **{**options, "backend": "reference"})
    assert torch.allclose(actual[0], exact[0], atol=1e-5)


def test_many_requests_share_their_weights_loads(device: str) -> None:
    """More requests than a block has rows, an empty one among them: position -1 is not written."""
    batch, widths = 19, [16, 64, 64, 32]
    signatures = torch.randint(-(2**31), 2**31, (batch, 1, 40, 1), device=device).int()
    key, weights, biases = make_key(signatures, widths, device)
    end = torch.arange(batch, dtype=torch.int32, device=device) * 2
    q, k = torch.randn(batch, 1, 1, 16, device=device), torch.randn(batch, 1, 40, 16, device=device)
    rest = (
        weights,
        biases,
        torch.zeros_like(end),
        end,
        torch.tensor([[[1, 1, 3]]]).int().to(device).expand(batch, 1, 3),
    )
    outs, caches = [], []
    for backend in ("triton", "reference"):
        caches.append(signatures.clone())
        call = ops.decode(q, k, k, caches[-1], *rest, 5, scale=1.0, new_key=(key, weights, biases), backend=backend)
        outs.append(call[0])
    assert torch.equal(*caches)
    assert torch.equal(caches[0][0], signatures[0])
    assert torch.allclose(*outs, atol=1e-5)


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
