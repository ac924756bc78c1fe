from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hashattention.errors import InputError
from hashattention.ops import attend

#: (Hq, Hkv, Hsel): one head each, GQA shared by the group and per query head, MQA both ways, partly shared.
SHARING = [(3, 3, 3), (8, 2, 2), (8, 2, 8), (6, 1, 1), (6, 1, 6), (8, 2, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GARBAGE = torch.tensor([-1, 2**31 - 1, -(2**31), 10**6], dtype=torch.int32)


def random_rows(batch: int, heads: int, tokens: int, slots: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ascending distinct indices, as `select` gives them, counts from 0 to `slots`, and garbage in unused slots."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(batch, heads, tokens, generator=generator).argsort(-1)[..., :slots]
    counts = torch.randint(1, slots + 1, (batch, heads), generator=generator)
    used = torch.arange(slots) < counts[..., None]
    indices = indices.masked_fill(~used, tokens).sort(-1).values.to(torch.int32)
    garbage = GARBAGE.repeat(slots // 4 + 1)[:slots]
    return torch.where(used, indices, garbage), counts.to(torch.int32)


def random_qkv(
    batch: int, heads: tuple[int, int], tokens: int, dims: tuple[int, int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(dims))
    q = torch.randn(batch, heads[0], 1, dims[0], generator=generator) * 2
    k = torch.randn(batch, heads[1], tokens, dims[0], generator=generator)
    v = torch.randn(batch, heads[1], tokens, dims[1], generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def plain(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, scale: float, softcap: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Softmax attention restricted to the set, a head at a time, every step in `dtype`."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=dtype)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            row = h * indices.shape[1] // q.shape[1]
            chosen = indices[b, row, : counts[b, row]].long()
            if len(chosen):
                keys, values = (cache[b, h * cache.shape[1] // q.shape[1], chosen].to(dtype) for cache in (k, v))
                logits = keys @ q[b, h, 0].to(dtype) * scale
                logits = softcap * torch.tanh(logits / softcap) if softcap else logits
                out[b, h, 0] = torch.softmax(logits, -1) @ values
                lse[b, h, 0] = logits.logsumexp(-1)
    return out, lse


def float32_error(q: Tensor, k: Tensor, v: Tensor, slots: int, scale: float) -> tuple[float, float]:
    """The worst case of rounding in float32, of the output and of the logsumexp: D-term dot products, then a mean."""
    unit = torch.finfo(torch.float32).eps / 2
    heads = k.float().abs().repeat_interleave(q.shape[1] // k.shape[1], 1)
    logit = (q.shape[-1] + 4) * unit * (scale * q.float().abs() @ heads.transpose(-1, -2)).max().item()
    return (2 * logit + (slots + 8) * unit) * v.abs().max().item(), logit + (slots + 8) * unit


def check(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, softcap: float = 0.0) -> None:
    scale = q.shape[-1] ** -0.5
    out, lse = attend(q, k, v, indices, counts, scale=scale, softcap=softcap)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    exact, exact_lse = plain(q, k, v, indices, counts, scale, softcap, torch.float64)
    allowed, allowed_lse = float32_error(q, k, v, indices.shape[-1], scale)
    if q.dtype != torch.float32:
        allowed = 2 * (plain(q, k, v, indices, counts, scale, softcap, q.dtype)[0].double() - exact).abs().max().item()
    assert (out.double() - exact).abs().max() <= allowed
    assert (lse.double() - exact_lse).abs().max() <= allowed_lse + 4e-7 * exact_lse.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128), (64, 33)], ids=str)
@pytest.mark.parametrize("heads", SHARING, ids=str)
def test_equals_softmax_attention_over_the_set(
    heads: tuple[int, int, int], dims: tuple[int, int], dtype: torch.dtype
) -> None:
    check(*random_qkv(2, heads[:2], 101, dims, dtype), *random_rows(2, heads[2], 101, 37))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap: float, dtype: torch.dtype) -> None:
    check(*random_qkv(2, (8, 2), 50, (64, 64), dtype), *random_rows(2, 2, 50, 11), softcap)


@settings(max_examples=50)
@given(tokens=st.integers(1, 70), slots=st.integers(1, 70), heads=st.sampled_from(SHARING), seed=st.integers(0, 999))
def test_any_set(tokens: int, slots: int, heads: tuple[int, int, int], seed: int) -> None:
    rows = random_rows(2, heads[2], tokens, min(tokens, slots), seed)
    check(*random_qkv(2, heads[:2], tokens, (16, 8)), *rows)


@pytest.mark.parametrize("size", [1, 2, 16, 61])
@pytest.mark.parametrize("heads", SHARING, ids=str)
def test_paged_equals_dense(
    heads: tuple[int, int, int], size: int, to_pages: Callable[..., tuple[Tensor, ...]]
) -> None:
    q, k, v = random_qkv(3, heads[:2], 67, (32, 16))
    rows = random_rows(3, heads[2], 67, 20)
    table, key_pages, value_pages = to_pages(size, k, v, seed=size)
    dense = attend(q, k, v, *rows, scale=0.2)
    paged = attend(q, key_pages, value_pages, *rows, scale=0.2, block_table=table)
    assert torch.equal(paged[0], dense[0])
    assert torch.equal(paged[1], dense[1])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("heads", [(8, 2, 2), (8, 2, 8)], ids=str)
def test_unselected_memory_is_never_read(heads: tuple[int, int, int], poison: float) -> None:
    q, k, v = random_qkv(2, heads[:2], 60, (32, 32))
    indices, counts = random_rows(2, heads[2], 60, 17)
    counts[0, 0] = 0
    clean = attend(q, k, v, indices, counts, scale=0.2)
    chosen = torch.zeros(2, heads[1], 60, dtype=torch.bool)
    for b in range(2):
        for row in range(heads[2]):
            chosen[b, row * heads[1] // heads[2], indices[b, row, : counts[b, row]].long()] = True
    assert not chosen[:, :, 0].all(), "token 0 must be poisoned somewhere: unused slots are clamped to it"
    k, v = (cache.masked_fill(~chosen[..., None], poison) for cache in (k, v))
    poisoned = attend(q, k, v, indices, counts, scale=0.2)
    assert torch.equal(poisoned[0], clean[0])
    assert torch.equal(poisoned[1], clean[1])


def test_counts_decide_not_the_indices() -> None:
    q, k, v = random_qkv(1, (2, 1), 9, (8, 8))
    full = torch.tensor([[[1, 4, 6, 8]]], dtype=torch.int32)
    short = torch.tensor([[[1, 4, -1, 2**31 - 1]]], dtype=torch.int32)
    two = torch.tensor([[2]], dtype=torch.int32)
    assert torch.equal(attend(q, k, v, full, two, scale=1.0)[0], attend(q, k, v, short, two, scale=1.0)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_nothing_gives_zero_and_minus_infinity(dtype: torch.dtype) -> None:
    q, k, v = random_qkv(2, (4, 2), 9, (8, 8), dtype)
    indices, counts = random_rows(2, 2, 9, 4)
    counts[1] = 0
    out, lse = attend(q, k.fill_(float("nan")), v, indices, counts, scale=1.0)
    assert out[1].count_nonzero() == 0
    assert (lse[1] == -torch.inf).all()
    assert out[0].isnan().all()


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_disjoint_parts_merge_by_logsumexp(softcap: float) -> None:
    q, k, v = random_qkv(2, (8, 2), 40, (64, 48))
    order = torch.rand(2, 2, 40, generator=torch.Generator().manual_seed(0)).argsort(-1).to(torch.int32)

    def part(rows: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.full((2, 2), rows.shape[-1], dtype=torch.int32)
        return attend(q, k, v, rows.sort(-1).values, counts, scale=0.3, softcap=softcap)

    (left, left_lse), (right, right_lse), (whole, whole_lse) = part(order[..., :13]), part(order[..., 13:]), part(order)
    lse = torch.logaddexp(left_lse, right_lse)
    merged = left * (left_lse - lse).exp()[..., None] + right * (right_lse - lse).exp()[..., None]
    torch.testing.assert_close(lse, whole_lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-6)


def test_huge_logits_neither_overflow_nor_lose_weight() -> None:
    q, k = torch.full((1, 1, 1, 4), 200.0), torch.tensor([[[[1.0] * 4, [100.0] * 4, [-100.0] * 4]]])
    rows = torch.tensor([[[0, 1, 2]]], dtype=torch.int32), torch.tensor([[3]], dtype=torch.int32)
    out, lse = attend(q, k, k, *rows, scale=1.0)
    assert torch.equal(out[0, 0, 0], k[0, 0, 1])
    assert lse.item() == 80000.0
    thrice = torch.tensor([[[1, 1, 1]]], dtype=torch.int32)
    torch.testing.assert_close(attend(q, k, k, thrice, rows[1], scale=1.0)[0][0, 0, 0], k[0, 0, 1])


def test_an_empty_batch() -> None:
    q, k, v = random_qkv(0, (4, 2), 9, (8, 6))
    out, lse = attend(q, k, v, torch.zeros(0, 2, 3, dtype=torch.int32), torch.zeros(0, 2, dtype=torch.int32), scale=1.0)
    assert out.shape == (0, 4, 1, 6)
    assert lse.shape == (0, 4, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, 2, 8)}, r"q is float32 \[1, 4, 2, 8\].*size 1 must be 1"),
        ({"q": torch.zeros(1, 4, 1, 8).double()}, r"q is float64 .*dtype float32 or bfloat16 or float16"),
        ({"k": torch.zeros(1, 2, 5, 7)}, r"k is float32 \[1, 2, 5, 7\].*size D must be 8"),
        ({"v": torch.zeros(1, 2, 6, 8)}, r"v is .*size T must be 5"),
        ({"v": torch.zeros(1, 2, 5, 8).half()}, r"v is float16 .*expected dtype float32"),
        ({"indices": torch.zeros(1, 2, 3, dtype=torch.int64)}, r"indices is int64 .*expected dtype int32"),
        ({"counts": torch.zeros(1, 1, dtype=torch.int32)}, r"counts is int32 \[1, 1\].*size Hsel must be 2"),
        (
            {"indices": torch.zeros(1, 3, 3, dtype=torch.int32), "counts": torch.zeros(1, 3, dtype=torch.int32)},
            "4 is not",
        ),
        (
            {"indices": torch.zeros(1, 1, 3, dtype=torch.int32), "counts": torch.zeros(1, 1, dtype=torch.int32)},
            "1 is not",
        ),
        ({"block_table": torch.zeros(2, 1, dtype=torch.int32)}, r"block_table is .*size B must be 1"),
    ],
)
def test_tensors_that_do_not_fit(change: dict, message: str) -> None:
    good = {
        "q": torch.zeros(1, 4, 1, 8),
        "k": torch.zeros(1, 2, 5, 8),
        "v": torch.zeros(1, 2, 5, 8),
        "indices": torch.zeros(1, 2, 3, dtype=torch.int32),
        "counts": torch.zeros(1, 2, dtype=torch.int32),
    }
    with pytest.raises(InputError, match=message):
        attend(**{**good, **change}, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, to_pages: Callable[..., tuple[Tensor, ...]]) -> None:
    q, k, v = random_qkv(2, (4, 2), 9, (8, 6), dtype)
    rows = random_rows(2, 2, 9, 4)
    torch.library.opcheck(torch.ops.hashattention.attend.default, (q, k, v, *rows, 0.3, 0.0, None, 1.0, "auto"))
    table, key_pages, value_pages = to_pages(4, k, v)
    paged = (q, key_pages, value_pages, *rows, 0.3, 5.0, table, 1.0, "reference")
    torch.library.opcheck(torch.ops.hashattention.attend.default, paged)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("page", [0, 3])
def test_a_float8_cache_stands_for_its_values_times_the_scales(
    kind: torch.dtype, page: int, to_pages: Callable[..., tuple[Tensor, ...]]
) -> None:
    q, k, v = random_qkv(2, (4, 2), 9, (8, 6), torch.float32)
    rows = random_rows(2, 2, 9, 4)
    k_scale, v_scale = 0.25, 3.0
    short_k, short_v = (k / k_scale).to(kind), (v / v_scale).to(kind)
    expected = attend(q, short_k.float() * k_scale, short_v.float() * v_scale, *rows, scale=0.3, softcap=2.0)
    table = None
    if page:
        table, *bytes_ = to_pages(page, short_k.view(torch.uint8), short_v.view(torch.uint8))
        short_k, short_v = (each.view(kind) for each in bytes_)
    scales = {"k_scale": k_scale, "v_scale": v_scale, "scale": 0.3, "softcap": 2.0}
    got = attend(q, short_k, short_v, *rows, **scales, block_table=table)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_scales_are_for_float8_caches_alone() -> None:
    q, k, v = random_qkv(1, (2, 2), 9, (8, 8), torch.bfloat16)
    with pytest.raises(InputError, match=r"k_scale 1.0 and v_scale 2.0 are for float8 caches; k is torch.bfloat16"):
        attend(q, k, v, *random_rows(1, 2, 9, 4), scale=0.3, v_scale=2.0)
