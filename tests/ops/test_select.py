from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hashattention.errors import InputError
from hashattention.ops import score, score_select, select


def brute_force(
    scores: list[float], start: int, end: int, budget: list[int], capacity: int, mask: list[bool] | None
) -> list[int]:
    """One row, written from the docstring of `select`."""
    valid = [t for t in range(start, end) if mask is None or mask[t]]
    sink, local, heavy = budget
    local = min(local, capacity)
    sink = min(sink, capacity - local)
    heavy = min(heavy, capacity - local - sink)
    taken = set(valid[:sink]) | set(valid[max(0, len(valid) - local) :])
    rest = sorted(((scores[t], t) for t in valid if t not in taken), reverse=True)
    return sorted(taken | {t for _, t in rest[:heavy]})


def check(scores: Tensor, start: Tensor, end: Tensor, budgets: Tensor, capacity: int, mask: Tensor | None) -> None:
    indices, counts = select(scores, start, end, budgets, capacity, mask=mask)
    assert indices.dtype == counts.dtype == torch.int32
    assert indices.shape == (*scores.shape[:2], capacity)
    for b, heads in enumerate(scores.tolist()):
        allowed = None if mask is None else mask[b].tolist()
        for h, row in enumerate(heads):
            bounds = int(start[b]), int(end[b])
            expected = brute_force(row, *bounds, budgets[b, h].tolist(), capacity, allowed)
            assert counts[b, h] == len(expected)
            assert indices[b, h].tolist() == expected + [-1] * (capacity - len(expected))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, int, Tensor | None]:
    batch, heads, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 40))
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    draw_score = st.integers(-levels, levels)
    if draw(st.booleans()):
        draw_score = draw_score.map(lambda n: n / 7)

    def table(element: st.SearchStrategy, *shape: int) -> list:
        for size in reversed(shape):
            element = st.lists(element, min_size=size, max_size=size)
        return draw(element)

    bounds = torch.tensor(table(st.integers(0, tokens), batch, 2), dtype=torch.int32).sort(-1).values
    scores = torch.tensor(table(draw_score, batch, heads, tokens))
    scores = scores if scores.is_floating_point() else scores.to(torch.int32)
    most = draw(st.sampled_from([3, tokens, tokens + 9]))
    budgets = torch.tensor(table(st.integers(0, most), batch, heads, 3), dtype=torch.int32)
    mask = torch.tensor(table(st.booleans(), batch, tokens)) if draw(st.booleans()) else None
    return scores, bounds[:, 0], bounds[:, 1], budgets, draw(st.integers(1, tokens + 12)), mask


@settings(max_examples=300)
@given(cases())
def test_select_is_the_docstring(case: tuple[Tensor, Tensor, Tensor, Tensor, int, Tensor | None]) -> None:
    check(*case)


def bounds(*rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    start, end = torch.tensor(rows, dtype=torch.int32).unbind(-1)
    return start.contiguous(), end.contiguous()


def budget(*counts: int) -> Tensor:
    return torch.tensor([[counts]], dtype=torch.int32)


def test_all_ties_take_the_most_recent() -> None:
    scores = torch.zeros(1, 1, 100, dtype=torch.int32)
    indices, _ = select(scores, *bounds((0, 100)), budget(2, 3, 4), 9)
    assert indices[0, 0].tolist() == [0, 1, 93, 94, 95, 96, 97, 98, 99]


def test_no_token_past_the_padding_is_taken() -> None:
    scores = torch.full((1, 1, 9), 10**6, dtype=torch.int32)
    scores[..., 3:6] = -(10**6)
    indices, counts = select(scores, *bounds((3, 6)), budget(0, 0, 8), 8)
    assert counts.item() == 3
    assert indices[0, 0].tolist() == [3, 4, 5, -1, -1, -1, -1, -1]


@pytest.mark.parametrize("wanted", [(0, 0, 0), (4, 4, 4)])
def test_an_empty_row_takes_nothing(wanted: tuple[int, int, int]) -> None:
    indices, counts = select(torch.ones(1, 1, 5, dtype=torch.int32), *bounds((2, 2)), budget(*wanted), 6)
    assert counts.item() == 0
    assert (indices == -1).all()


@pytest.mark.parametrize(
    ("capacity", "expected"), [(1, [9]), (2, [8, 9]), (3, [0, 8, 9]), (4, [0, 1, 8, 9]), (5, [0, 1, 4, 8, 9])]
)
def test_capacity_goes_to_local_then_sink_then_heavy(capacity: int, expected: list[int]) -> None:
    scores = torch.tensor([[[0, 0, 1, 2, 9, 3, 8, 0, 0, 0]]], dtype=torch.int32)
    indices, _ = select(scores, *bounds((0, 10)), budget(2, 2, 2), capacity)
    assert indices[0, 0].tolist() == expected


def test_infinite_scores_still_count_as_candidates() -> None:
    scores = torch.tensor([[[float("-inf"), 0.0, float("inf"), float("-inf")]]])
    indices, _ = select(scores, *bounds((0, 4)), budget(0, 0, 3), 3)
    assert indices[0, 0].tolist() == [1, 2, 3]


def test_the_same_answer_every_run() -> None:
    scores = torch.randint(0, 3, (2, 3, 5000), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    rows = *bounds((0, 5000), (7, 4321)), torch.tensor([16, 64, 300], dtype=torch.int32).expand(2, 3, 3), 380
    check(scores, *rows, None)
    assert torch.equal(select(scores, *rows)[0], select(scores, *rows)[0])


def codes(batch: int = 2, tokens: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    code = torch.randint(-7, 8, (batch, 4, 1, 64), generator=generator, dtype=torch.int8)
    signatures = torch.randint(-(2**31), 2**31, (batch, 2, tokens, 2), generator=generator).to(torch.int32)
    return code, signatures


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [True, False])
def test_score_select_is_select_of_score(heads: int, masked: bool) -> None:
    code, signatures = codes()
    rows = bounds((0, 50), (9, 31))
    mask = torch.rand(2, 50, generator=torch.Generator().manual_seed(4)) < 0.6 if masked else None
    budgets = torch.tensor([2, 3, 7], dtype=torch.int32).expand(2, heads, 3)
    expected = select(score(code, signatures, heads), *rows, budgets, 12, mask=mask)
    got = score_select(code, signatures, *rows, budgets, 12, mask=mask)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert got[1].min() > 0


@pytest.mark.parametrize("size", [1, 2, 16, 61])
def test_paged_score_select_equals_dense(size: int, to_pages: Callable[..., tuple[Tensor, ...]]) -> None:
    code, signatures = codes()
    rows = bounds((0, 50), (9, 31))
    budgets = torch.tensor([2, 3, 7], dtype=torch.int32).expand(2, 2, 3)
    table, pages = to_pages(size, signatures, seed=size)
    dense = score_select(code, signatures, *rows, budgets, 12)
    paged = score_select(code, pages, *rows, budgets, 12, block_table=table)
    assert torch.equal(paged[0], dense[0])
    assert torch.equal(paged[1], dense[1])


def test_an_empty_batch() -> None:
    code, signatures = codes(batch=0)
    none = torch.zeros(0, dtype=torch.int32)
    indices, counts = score_select(code, signatures, none, none, torch.zeros(0, 2, 3, dtype=torch.int32), 5)
    assert indices.shape == (0, 2, 5)
    assert counts.shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(1, 1, 5, dtype=torch.int64)}, r"scores is int64 .*expected dtype int32 or float32"),
        ({"scores": torch.zeros(1, 5, dtype=torch.int32)}, r"scores is int32 \[1, 5\]; expected \[B, Hsel, T\]"),
        ({"start": torch.zeros(1, dtype=torch.int64)}, r"start is int64 \[1\]; expected dtype int32"),
        ({"end": torch.zeros(2, dtype=torch.int32)}, r"end is int32 \[2\].*size B must be 1"),
        ({"budgets": torch.zeros(1, 1, 2, dtype=torch.int32)}, r"budgets is int32 \[1, 1, 2\].*size 3 must be 3"),
        ({"budgets": torch.zeros(1, 2, 3, dtype=torch.int32)}, r"size Hsel must be 1"),
        ({"mask": torch.ones(1, 4, dtype=torch.bool)}, r"mask is bool \[1, 4\].*size T must be 5"),
        ({"mask": torch.ones(1, 5)}, r"mask is float32 \[1, 5\]; expected dtype bool"),
        ({"capacity": 0}, r"capacity is 0; expected at least 1"),
    ],
)
def test_rows_that_do_not_fit(change: dict, message: str) -> None:
    start, end = bounds((0, 5))
    good = {"scores": torch.zeros(1, 1, 5, dtype=torch.int32), "start": start, "end": end, "budgets": budget(1, 1, 1)}
    with pytest.raises(InputError, match=message):
        select(**{**good, "capacity": 3, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(2, 49, dtype=torch.bool)}, r"mask is bool \[2, 49\].*size T must be 50"),
        ({"budgets": torch.zeros(3, dtype=torch.int32)}, r"budgets is int32 \[3\]; expected \[B, Hsel, 3\]"),
        ({"budgets": torch.zeros(1, 2, 3, dtype=torch.int32)}, r"budgets is .*size B must be 2"),
        ({"budgets": torch.zeros(2, 3, 3, dtype=torch.int32)}, r"code heads over selection heads: 4 is not"),
    ],
)
def test_score_select_rows_that_do_not_fit(change: dict, message: str) -> None:
    code, signatures = codes()
    start, end = bounds((0, 50), (0, 50))
    budgets = torch.ones(2, 2, 3, dtype=torch.int32)
    good = {"start": start, "end": end, "budgets": budgets, "capacity": 3}
    with pytest.raises(InputError, match=message):
        score_select(code, signatures, **{**good, **change})


@pytest.mark.parametrize("masked", [True, False])
def test_opcheck(masked: bool, to_pages: Callable[..., tuple[Tensor, ...]]) -> None:
    code, signatures = codes(tokens=12)
    rows = *bounds((0, 12), (3, 3)), torch.ones(2, 2, 3, dtype=torch.int32), 5
    mask = torch.ones(2, 12, dtype=torch.bool) if masked else None
    scores = score(code, signatures, 2)
    torch.library.opcheck(torch.ops.hashattention.select.default, (scores, *rows, mask, "auto"))
    torch.library.opcheck(torch.ops.hashattention.select.default, (scores.float(), *rows, mask, "reference"))
    fused = torch.ops.hashattention.score_select.default
    torch.library.opcheck(fused, (code, signatures, *rows, mask, None, 127, "auto"))
    table, pages = to_pages(4, signatures)
    torch.library.opcheck(fused, (code, pages, *rows, mask, table, 7, "auto"))
