"""attend and decode of the CPU kernels: against float64, on every dtype, sharing, stride and number of threads."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hashattention.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def native() -> ModuleType:
    return importlib.import_module("hashattention.ops.cpu.native")


def draw(
    seed: int,
    batch: int,
    heads: tuple[int, int, int],
    tokens: int,
    slots: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """q, k, v as views of larger buffers (their strides are not their shapes), indices and counts."""
    generator = torch.Generator().manual_seed(seed)

    def cache(dim: int) -> Tensor:
        whole = torch.randn(batch, heads[1] + 1, tokens + 5, dim + 3, generator=generator).to(dtype)
        return whole[:, 1:, 2 : tokens + 2, :dim]

    q = (torch.randn(batch, 1, heads[0], dims[0], generator=generator) * 2).to(dtype).transpose(1, 2)
    indices = torch.rand(batch, heads[2], tokens, generator=generator).argsort(-1)[..., :slots].sort(-1).values
    counts = torch.randint(0, indices.shape[-1] + 1, (batch, heads[2]), generator=generator)
    return q, cache(dims[0]), cache(dims[1]), indices.to(torch.int32), counts.to(torch.int32)


def by_torch(arguments: tuple[Tensor, ...], scale: float, softcap: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and logsumexp with every step in `dtype`; in float64 the truth that errors are measured against."""
    q, k, v, indices, counts = arguments
    used = torch.arange(indices.shape[-1]) < counts[..., None]
    keys, values = (reference.gather_tokens(c, indices.masked_fill(~used, 0)).to(dtype) for c in (k, v))
    logits = q.to(dtype).squeeze(2).unflatten(1, (indices.shape[1], -1)) @ keys.transpose(-1, -2) * scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    logits = logits.masked_fill(~used[:, :, None], -torch.inf)
    weights = logits.softmax(-1).masked_fill(~used[:, :, None], 0)
    return (weights @ values).flatten(1, 2).unsqueeze(2), logits.logsumexp(-1).flatten(1, 2).unsqueeze(2)


def errors(arguments: tuple[Tensor, ...], scale: float, softcap: float) -> Tensor:
    """The largest errors of the kernels' output and logsumexp, then of plain torch's in the dtype of q (float32 for
    the logsumexp, which the kernels give in float32): at least half a unit in the last place, which rounding the output
    alone costs, and a whole one of the logsumexp, whose tanh and log are the C library's.
    """
    q = arguments[0]
    exact = by_torch(arguments, scale, softcap, torch.float64)
    plain = by_torch(arguments, scale, softcap, q.dtype)[0], by_torch(arguments, scale, softcap, torch.float32)[1]
    ours = native().attend(*arguments, scale, softcap)
    assert [given.dtype for given in ours] == [q.dtype, torch.float32]
    finite = exact[1].isfinite()
    assert torch.equal(ours[1].isfinite(), finite)
    # An empty row's logsumexp is -inf in both.
    differences = [
        (given.double().nan_to_num(neginf=0) - true.nan_to_num(neginf=0)).abs().max()
        for pair in (ours, plain)
        for given, true in zip(pair, exact, strict=True)
    ]
    sizes = torch.stack([true.nan_to_num(neginf=0).abs().max() for true in exact])
    units = sizes * torch.tensor([torch.finfo(q.dtype).eps / 2, torch.finfo(torch.float32).eps], dtype=torch.float64)
    return torch.cat([torch.stack(differences[:2]), torch.stack(differences[2:]).maximum(units)])


#: Draws of one kind of case whose largest error stands for plain torch: a single one may be exact by luck.
DRAWS = 16


def check(case: dict[str, Any], scale: float = 0.2, softcap: float = 0.0) -> None:
    """The kernels err at most twice what plain torch errs on cases of this kind."""
    first, *others = (errors(draw(**case | {"seed": case["seed"] + n}), scale, softcap) for n in range(DRAWS))
    plain = torch.stack([first, *others])[:, 2:].amax(0)
    assert (first[:2] <= 2 * plain).all(), (first, plain)


cases = {
    "seed": st.integers(0, 2**16),
    "batch": st.integers(1, 2),
    "heads": st.sampled_from([(3, 3, 3), (8, 2, 2), (8, 2, 8), (7, 1, 1), (9, 1, 1), (12, 2, 4), (6, 1, 6)]),
    "tokens": st.integers(1, 200),
    "slots": st.integers(1, 150),
    "dims": st.sampled_from([(64, 64), (80, 96), (128, 128), (256, 256), (33, 7), (1, 1), (16, 40)]),
    "dtype": st.sampled_from(DTYPES),
}


# The same examples every time: what plain torch errs is a sample, and a sample may be small.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, derandomize=True, deadline=None)
@given(softcap=st.sampled_from([0.0, 0.5, 30.0]), **cases)
def test_within_twice_the_error_of_plain_torch(instruction_set: str, softcap: float, **case: object) -> None:
    check(case, softcap=softcap)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_any_number_of_threads(instruction_set: str, count: int) -> None:
    arguments = draw(1, 1, (8, 2, 2), 9000, 4000, (128, 128), torch.bfloat16)
    one = native().attend(*arguments, 0.1)
    torch.set_num_threads(count)
    try:
        many = native().attend(*arguments, 0.1)
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(many[1], one[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(many[0], one[0], rtol=2**-7, atol=1e-5)


def test_caches_of_another_dtype_than_the_query(instruction_set: str) -> None:
    q, k, v, *rows = draw(2, 2, (8, 2, 2), 50, 20, (64, 64), torch.float32)
    k, v = k.half(), v.half()
    got, expected = native().attend(q, k, v, *rows, 0.1), reference.attend(q, k, v, *rows, 0.1)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values(instruction_set: str, dtype: torch.dtype) -> None:
    """Subnormals, the largest finite values and infinities are read and written as torch does."""
    tiny, large = torch.finfo(dtype).smallest_normal / 4, torch.finfo(dtype).max
    values = torch.tensor([0.0, -0.0, tiny, -tiny, large, -large, torch.inf, -torch.inf, 1.5], dtype=dtype)
    v = values.view(1, 1, 1, 9)
    q, k = torch.ones(1, 1, 1, 4, dtype=dtype), torch.ones(1, 1, 1, 4, dtype=dtype)
    rows = torch.zeros(1, 1, 1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.int32)
    assert torch.equal(native().attend(q, k, v, *rows, 1.0)[0], v)


@pytest.mark.parametrize("size", [1, 16, 61])
def test_paged_equals_dense(instruction_set: str, size: int, to_pages: Callable[..., tuple[Tensor, ...]]) -> None:
    q, k, v, *rows = draw(3, 3, (8, 2, 2), 90, 40, (32, 48), torch.bfloat16)
    table, key_pages, value_pages = to_pages(size, k, v)
    dense = native().attend(q, k, v, *rows, 0.2)
    paged = native().attend(q, key_pages, value_pages, *rows, 0.2, 0.0, table)
    assert torch.equal(paged[0], dense[0])
    assert torch.equal(paged[1], dense[1])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_unselected_memory_is_never_read(instruction_set: str, poison: float) -> None:
    q, k, v, indices, counts = draw(4, 1, (4, 1, 1), 60, 17, (32, 32), torch.float32)
    counts.fill_(11)
    indices = indices.clamp(min=1)
    clean = native().attend(q, k, v, indices, counts, 0.2)
    chosen = torch.zeros(60, dtype=torch.bool)
    chosen[indices[0, 0, :11].long()] = True
    k, v = (cache.masked_fill(~chosen[:, None], poison) for cache in (k, v))
    garbage = torch.where(torch.arange(indices.shape[-1]) < 11, indices, -(2**31))
    poisoned = native().attend(q, k, v, garbage, counts, 0.2)
    assert torch.equal(poisoned[0], clean[0])
    assert torch.equal(poisoned[1], clean[1])


@pytest.mark.parametrize("levels", [0, 7])
@pytest.mark.parametrize("masked", [True, False])
def test_decode_is_the_composition(instruction_set: str, levels: int, masked: bool) -> None:
    q, k, v, *_ = draw(5, 2, (8, 2, 2), 300, 1, (16, 24), torch.float32)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(2, i, o, generator=generator) for i, o in ((64, 32), (32, 64))]
    biases = [torch.randn(2, o, generator=generator) for o in (32, 64)]
    signatures = torch.randint(-(2**31), 2**31, (2, 2, 300, 2), generator=generator).to(torch.int32)
    start, end = torch.tensor([0, 30], dtype=torch.int32), torch.tensor([300, 201], dtype=torch.int32)
    budgets = torch.tensor([4, 9, 30], dtype=torch.int32).repeat(2, 2, 1)
    mask = torch.rand(2, 300, generator=generator) < 0.8 if masked else None
    got = native().decode(q, k, v, signatures, weights, biases, start, end, budgets, 43, levels, 0.2, 0.0, mask)
    x = q.reshape(2, 2, 1, 64)
    code = (
        reference.encode_query(x, weights, biases, levels)[0]
        if levels
        else reference.encode_signature(x, weights, biases)
    )
    rows = reference.score_select(code, signatures, start, end, budgets, 43, mask)
    expected = reference.attend(q, k, v, *rows, 0.2)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-6)
