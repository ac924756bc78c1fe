from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hashattention import ops
from hashattention.errors import InputError

#: (Hq, Hkv, Hsel): one head each, GQA shared by the group and per query head, MQA both ways, partly shared.
SHARING = [(3, 3, 3), (8, 2, 2), (8, 2, 8), (6, 1, 1), (6, 1, 6), (8, 2, 4)]
NAMES = ("out", "logsumexp", "q", "sums", "taken", "lengths", "coefficients")
#: Not so large that a few of them overflow in float32.
HUGE = (-1e36, -1e4, 0.0, 1e4, 1e36)


def draw(
    batch: int, heads: tuple[int, int, int], dims: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """Arguments of the op, ragged: rows with none and with all tokens taken, and a request with no block summed."""
    random = torch.Generator().manual_seed(seed)
    query_heads, kv_heads, selection_heads = heads
    lengths = torch.randint(1, 3000, (batch,), generator=random, dtype=torch.int32)
    taken = (torch.rand(batch, selection_heads, generator=random) * lengths[:, None]).int()
    taken[0, 0], taken[-1, -1] = 0, lengths[-1]
    number = (lengths // 256 * 256).float()
    number[batch // 2] = 0
    mean = torch.randn(batch, kv_heads, sum(dims), generator=random)
    number = number[:, None, None].expand(-1, kv_heads, 1)
    out = torch.randn(batch, query_heads, 1, dims[1], generator=random).to(dtype)
    q = (2 * torch.randn(batch, query_heads, 1, dims[0], generator=random)).to(dtype)
    each = taken.repeat_interleave(query_heads // selection_heads, 1)[..., None]
    logsumexp = each.log() + torch.randn(batch, query_heads, 1, generator=random)
    coefficients = torch.randn(query_heads, 3, generator=random)
    return [out, logsumexp, q, torch.cat([mean * number, number], -1), taken, lengths, coefficients]


def naive(
    out: Tensor,
    logsumexp: Tensor,
    q: Tensor,
    sums: Tensor,
    taken: Tensor,
    lengths: Tensor,
    coefficients: Tensor,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """The formula in float64, a head at a time."""
    mixed, dim = out.double().clone(), q.shape[3]
    for b, h in itertools.product(*map(range, q.shape[:2])):
        row = sums[b, h * sums.shape[1] // q.shape[1]].double()
        count, length = int(taken[b, h * taken.shape[1] // q.shape[1]]), int(lengths[b])
        if not row[-1] or not count or count >= length:
            continue
        mu = (q[b, h, 0].double() @ row[:dim] / row[-1]).item() * scale
        mu = softcap * math.tanh(mu / softcap) if softcap else mu
        mean_weight = logsumexp[b, h, 0].item() - math.log(count)
        first, second, third = coefficients[h].tolist()
        less = min(0.0, first + second * (mu - mean_weight) + third * math.log(count / length))
        share = 1 / (1 + math.exp(-math.log((length - count) / count) - less))
        mixed[b, h, 0] = (1 - share) * mixed[b, h, 0] + share * row[dim:-1] / row[-1]
    return mixed


def assert_near(found: Tensor, exact: Tensor) -> None:
    """What one rounding to the output's type may change, and the sums in float32."""
    unit = 0.0 if found.dtype == torch.float32 else torch.finfo(found.dtype).eps / 2
    torch.testing.assert_close(found.double(), exact.double(), rtol=unit + 1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", SHARING)
def test_the_formula(heads: tuple[int, int, int], dtype: torch.dtype, softcap: float) -> None:
    given = draw(5, heads, (16, 24), dtype)
    mixed = ops.add_remainder(*given, scale=0.25, softcap=softcap)
    assert mixed.dtype == dtype
    assert_near(mixed, naive(*given, scale=0.25, softcap=softcap))
    assert (mixed != given[0]).any(-1).float().mean() > 0.3


@given(st.sampled_from(SHARING), st.integers(0, 2**31), st.sampled_from(["all", "none", "empty", "beyond"]))
def test_where_nothing_is_left_nothing_changes(heads: tuple[int, int, int], seed: int, what: str) -> None:
    out, logsumexp, q, sums, taken, lengths, coefficients = draw(3, heads, (4, 5), seed=seed)
    if what == "none":
        taken, logsumexp = torch.zeros_like(taken), torch.full_like(logsumexp, -torch.inf)
    elif what == "empty":
        sums = torch.zeros_like(sums)
    else:
        taken = lengths[:, None].expand_as(taken) + (what == "beyond")
    mixed = ops.add_remainder(out, logsumexp, q, sums, taken, lengths, coefficients, scale=0.5)
    assert torch.equal(mixed, out)


def shares(given: list[Tensor]) -> Tensor:
    """The op's share of the mean value, ``[B, Hq]``: what it makes of an output of 0 and values of 1."""
    out, logsumexp, q, sums, *rest = given
    number = sums[..., -1:]
    ones = torch.cat([sums[..., : q.shape[3]], number, number], -1)
    return ops.add_remainder(torch.zeros_like(out[..., :1]), logsumexp, q, ones, *rest, scale=0.5)[..., 0, 0]


@given(st.sampled_from(SHARING), st.integers(0, 2**31), st.sampled_from([1.0, 10.0, 1e4]))
def test_a_token_left_out_never_counts_more_than_the_mean_one_taken(
    heads: tuple[int, int, int], seed: int, size: float
) -> None:
    given = draw(3, heads, (4, 5), seed=seed)
    given[-1] = size * given[-1]
    taken, lengths = given[4].repeat_interleave(heads[0] // heads[2], 1), given[5][:, None]
    share = shares(given)
    assert (share >= 0).all()
    assert (share <= (lengths - taken) / lengths * (1 + 1e-6)).all()


def test_without_a_discount_the_share_is_that_of_the_tokens() -> None:
    given = draw(4, (4, 2, 2), (4, 5))
    given[-1] = torch.tensor([7.0, 0.0, 0.0]).repeat(4, 1)
    taken, lengths = given[4].repeat_interleave(2, 1), given[5][:, None]
    summed = given[3][..., -1].repeat_interleave(2, 1) > 0
    expected = (lengths - taken) / lengths * (summed & (taken > 0))
    torch.testing.assert_close(shares(given), expected, rtol=1e-6, atol=1e-6)


@given(st.integers(0, 2**31), st.floats(-20, 20))
def test_what_all_logits_of_a_query_have_in_common_changes_nothing(seed: int, common: float) -> None:
    out, logsumexp, q, sums, *rest = given = draw(3, (4, 4, 4), (4, 5), seed=seed)
    # The key that adds `common` to the logit of its head's query, in each of the summed keys.
    towards = q[:, :, 0] * common / q.square().sum(-1) / 0.5
    moved = torch.cat([sums[..., :4] + sums[..., -1:] * towards, sums[..., 4:]], -1)
    mixed = ops.add_remainder(out, logsumexp + common, q, moved, *rest, scale=0.5)
    torch.testing.assert_close(mixed, ops.add_remainder(*given, scale=0.5), rtol=1e-4, atol=1e-4)


@given(st.integers(0, 2**31), st.lists(st.sampled_from(HUGE), min_size=12, max_size=12))
def test_huge_coefficients_leave_the_output_between_its_two_parts(seed: int, coefficients: list[float]) -> None:
    given = draw(3, (4, 2, 4), (4, 5), seed=seed)
    given[-1] = torch.tensor(coefficients).view(4, 3)
    mean = (given[3][..., 4:-1] / given[3][..., -1:].clamp(min=1)).repeat_interleave(2, 1)[:, :, None]
    mixed = ops.add_remainder(*given, scale=0.5)
    low, high = torch.minimum(mean, given[0]), torch.maximum(mean, given[0])
    assert ((mixed >= low - 1e-6) & (mixed <= high + 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    given = draw(3, (8, 2, 4), (16, 24), dtype)
    torch.library.opcheck(torch.ops.hashattention.add_remainder.default, (*given, 0.25, 2.0, "auto"))


def test_opcheck_of_what_has_strides() -> None:
    out, logsumexp, q, sums, *rest = draw(3, (8, 2, 4), (16, 24))
    out, q = (tensor.transpose(1, 3).contiguous().transpose(1, 3) for tensor in (out, q))
    sums = torch.stack([sums, sums], 2)[:, :, -1]
    given = out, logsumexp, q, sums, *rest
    torch.library.opcheck(torch.ops.hashattention.add_remainder.default, (*given, 0.25, 0.0, "auto"))


def test_compiled_it_is_the_same() -> None:
    given = draw(3, (8, 2, 2), (16, 24))

    def step(*tensors: Tensor) -> Tensor:
        return ops.add_remainder(*tensors, scale=0.25) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), step(*given))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda t: t.double(), "q is float64"),
        ("q", lambda t: t.squeeze(2), r"q is float32 \[2, 4, 16\]; expected \[B, Hq, 1, D\]"),
        ("out", lambda t: t.half(), r"out is float16 .*expected dtype float32"),
        ("out", lambda t: t[:1], r"out is .*size B must be 2"),
        ("logsumexp", lambda t: t.half(), "logsumexp is float16"),
        ("logsumexp", lambda t: t[..., 0], "logsumexp is .*3 dimensions"),
        ("sums", lambda t: t.bfloat16(), "sums is bfloat16"),
        ("sums", lambda t: t[..., :-1], r"sums is .*size D\+Dv\+1 must be 41"),
        ("taken", lambda t: t.long(), "taken is int64"),
        ("taken", lambda t: t[:, 0], "taken is .*2 dimensions"),
        ("lengths", lambda t: t.long(), "lengths is int64"),
        ("lengths", lambda t: t.repeat(2), r"lengths is int32 \[4\].*size B must be 2"),
        ("coefficients", lambda t: t.double(), "coefficients is float64"),
        ("coefficients", lambda t: t[:2], "coefficients is .*size Hq must be 4"),
        ("coefficients", lambda t: t[:, :2], "coefficients is .*size 3 must be 3"),
        ("sums", lambda t: t.repeat(1, 2, 1)[:, :3], "query heads over KV heads: 4 is not"),
        ("taken", lambda t: t.repeat(1, 2)[:, :3], "query heads over selection heads: 4 is not"),
        ("coefficients", lambda t: t.to("meta"), "all tensors must be on one device.*coefficients on meta"),
    ],
)
def test_what_does_not_fit_is_named(name: str, change, message: str) -> None:  # type: ignore[no-untyped-def]
    given = dict(zip(NAMES, draw(2, (4, 2, 2), (16, 24)), strict=True))
    with pytest.raises(InputError, match=message):
        ops.add_remainder(**{**given, name: change(given[name])}, scale=1.0)
