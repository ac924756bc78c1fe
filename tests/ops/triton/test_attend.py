from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hashattention import ops
from hashattention.ops import reference, triton

CASES = [
    # B, Hq, Hkv, Hsel, D, Dv, dtype, page, softcap
    (2, 4, 2, 2, 16, 24, torch.float32, 0, 0.0),
    (2, 4, 2, 4, 40, 40, torch.float16, 7, 5.0),
    (1, 8, 2, 2, 64, 64, torch.bfloat16, 0, 0.0),
    (1, 6, 1, 1, 128, 128, torch.float16, 1, 0.0),
    (1, 2, 2, 2, 256, 256, torch.float16, 61, 30.0),
]


def plain(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, scale: float, softcap: float, table: Tensor | None
) -> Tensor:
    """The reference's steps in the tensors' own dtype: what the kernel's error is measured against."""
    heads, slots = indices.shape[1:]
    used = torch.arange(slots, device=q.device) < counts[..., None]
    rows = indices.masked_fill(~used, 0)
    keys, values = reference.gather_tokens(k, rows, table), reference.gather_tokens(v, rows, table)
    values = values.masked_fill(~used[..., None], 0)
    logits = (q.squeeze(2).unflatten(1, (heads, -1)) @ keys.transpose(-1, -2)).float() * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    weights = logits.masked_fill(~used[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights.to(q.dtype) @ values).flatten(1, 2).unsqueeze(2)


@pytest.mark.parametrize(
    ("batch", "query_heads", "kv_heads", "heads", "dim", "dim_v", "dtype", "page", "softcap"), CASES
)
def test_attend_errs_no_more_than_twice_plain_torch(
    batch: int,
    query_heads: int,
    kv_heads: int,
    heads: int,
    dim: int,
    dim_v: int,
    dtype: torch.dtype,
    page: int,
    softcap: float,
    device: str,
) -> None:
    tokens, slots = 300, 101
    shape = (batch, kv_heads, tokens)
    table = None
    if page:
        width = -(-tokens // page)
        shape = (batch * width + 2, kv_heads, page)
        table = torch.randperm(shape[0])[: batch * width].view(batch, width).int().to(device)
    q = torch.randn(batch, query_heads, 1, dim, device=device).to(dtype)
    k, v = (torch.randn(*shape, size, device=device).to(dtype) for size in (dim, dim_v))
    rows = [torch.randperm(tokens)[:slots].sort().values for _ in range(batch * heads)]
    counts = torch.tensor([101, 5, 0, 33, 1, 2, 3, 64])[: batch * heads].view(batch, heads).int()
    indices = torch.stack(rows).view(batch, heads, slots).int()
    unread = torch.arange(slots) >= counts[..., None]
    indices, counts = indices.masked_fill(unread, 2**30).to(device), counts.to(device)
    arguments = (q, k, v, indices, counts, dim**-0.5, softcap, table)
    out, logsumexp = triton.attend(*arguments)
    exact, exact_lse = reference.attend(q.float(), *arguments[1:])
    error, allowed = (out.float() - exact).abs().max(), (plain(*arguments).float() - exact).abs().max()
    assert error <= 2 * allowed + 1e-6
    assert torch.allclose(logsumexp, exact_lse, atol=2e-5 if dtype == torch.float32 else 2e-3)
    empty = (counts == 0).repeat_interleave(query_heads // heads, 1)
    assert not out.squeeze(2)[empty].any()
    assert (logsumexp.squeeze(2)[empty] == -torch.inf).all()


def test_unused_rows_of_the_cache_are_never_read_into_the_result(device: str) -> None:
    q = torch.randn(1, 2, 1, 32, device=device)
    k, v = torch.full((1, 1, 200, 32), torch.nan, device=device), torch.full((1, 1, 200, 32), torch.nan, device=device)
    k[:, :, 7:70], v[:, :, 7:70] = torch.randn(32, device=device), 3.0
    indices = torch.arange(7, 90, device=device, dtype=torch.int32).view(1, 1, -1)
    counts = torch.full((1, 1), 63, dtype=torch.int32, device=device)
    out, _ = triton.attend(q, k, v, indices, counts, 1.0)
    assert torch.allclose(out, torch.full_like(out, 3.0))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("page", [0, 7])
@pytest.mark.parametrize("query", [torch.float32, torch.float16], ids=str)
def test_a_float8_cache(kind: torch.dtype, page: int, query: torch.dtype, device: str, to_pages) -> None:
    q = torch.randn(1, 2, 1, 32, device=device).to(query)
    k, v = (torch.randn(1, 1, 64, 32).to(kind) for _ in range(2))
    table = None
    if page:
        table, *pages = to_pages(page, k.view(torch.uint8), v.view(torch.uint8))
        table, (k, v) = table.to(device), (each.view(kind) for each in pages)
    k, v = k.to(device), v.to(device)
    indices = torch.arange(0, 64, 2, device=device, dtype=torch.int32).view(1, 1, -1)
    counts = torch.full((1, 1), 29, dtype=torch.int32, device=device)
    rows = {"block_table": table, "k_scale": 0.5, "v_scale": 3.0, "scale": 0.2}
    out, lse = ops.attend(q, k, v, indices, counts, **rows, backend="triton")
    expected, expected_lse = ops.attend(q.float(), k, v, indices, counts, **rows, backend="reference")
    tolerance = 1e-5 if query == torch.float32 else 5e-3
    assert torch.allclose(out.float(), expected, atol=tolerance)
    assert torch.allclose(lse, expected_lse, atol=tolerance)
