from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hashattention import ops
from hashattention.config import Budget
from hashattention.rows import Extent, Shares, count_budget

BUDGETS = st.one_of(
    st.builds(Budget, density=st.floats(1e-4, 1.0), sink=st.integers(0, 80), local=st.integers(0, 80)),
    st.builds(Budget, heavy=st.integers(0, 300), sink=st.integers(0, 80), local=st.integers(0, 80)),
    st.builds(Budget, heavy=st.floats(1e-4, 1.0), sink=st.integers(0, 80), local=st.integers(0, 80)),
)


@given(BUDGETS, st.lists(st.integers(0, 5000), min_size=1, max_size=8))
def test_device_counts_equal_host_counts(budget, lengths):
    counted = count_budget(budget, torch.tensor(lengths, dtype=torch.int32))
    assert counted.dtype == torch.int32
    assert [tuple(row) for row in counted.tolist()] == [budget.counts(length) for length in lengths]


@given(BUDGETS, st.integers(0, 3000), st.integers(0, 3000))
def test_capacity_holds_every_shorter_context(budget, shorter, longer):
    shorter, longer = sorted((shorter, longer))
    assert sum(budget.counts(shorter)) <= budget.capacity(longer)


@given(BUDGETS, st.integers(0, 3000))
def test_totals_never_exceed_what_was_asked_or_what_there_is(budget, length):
    sink, local, heavy = budget.counts(length)
    assert min(sink, local, heavy) >= 0
    assert sink + local + heavy <= length
    if budget.density is not None:
        assert sink + local + heavy <= max(1, budget.density * length)


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_extent_of_any_mask_covers_exactly_its_tokens(rows):
    mask = torch.tensor(rows)
    extent = Extent.from_mask(mask.long())
    position = torch.arange(6)
    inside = (position >= extent.start[:, None]) & (position < extent.end[:, None]) & extent.mask
    assert torch.equal(inside, mask)
    assert extent.lengths().tolist() == mask.sum(1).tolist()


@given(st.integers(0, 6), st.integers(0, 6), st.integers(1, 5))
def test_before_is_the_extent_some_tokens_ago(left, right, ago):
    mask = torch.zeros(1, 6, dtype=torch.long)
    mask[:, min(left, right) : max(left, right)] = 1
    earlier, fresh = Extent.from_mask(mask).before(ago), Extent.from_mask(mask[:, : 6 - ago])
    assert earlier.tokens == fresh.tokens
    assert earlier.lengths().tolist() == fresh.lengths().tolist()


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4), st.integers(0, 6))
def test_positions_are_places_among_the_real_tokens_or_slots(rows, ago):
    mask = torch.tensor(rows)
    held = 7 - ago
    for by_slot in (False, True):
        extent = Extent.from_mask(mask, by_slot=by_slot).before(ago)
        whole = extent.positions(0, held)
        assert whole.dtype == torch.int32 and torch.equal(extent.positions(1, held), whole[:, 1:])
        for row, valid in enumerate(mask[:, :held].tolist()):
            slots = [slot for slot, real in enumerate(valid) if real]
            expected = slots if by_slot else list(range(len(slots)))
            assert [int(whole[row, slot]) for slot in slots] == expected
            if slots and slots[-1] == held - 1:
                assert int(extent.last_positions()[row, 0]) == expected[-1]


def test_padding_on_the_left_needs_no_mask_of_holes():
    mask = torch.tensor([[False, False, True, True], [True, True, True, True]])
    whole, quick = (Extent.from_mask(mask, holes=holes).positions(0, 4) for holes in (True, False))
    assert torch.equal(whole[mask], quick[mask])


def test_rows_are_built_once_for_each_budget():
    extent = Extent.full(2, 100, torch.device("cpu"))
    budget = Budget(density=0.5)
    rows = extent.rows(budget, 3)
    assert extent.rows(Budget(density=0.5), 3) is rows
    assert rows.budgets.shape == (2, 3, 3)
    assert rows.budgets[1, 2].tolist() == list(budget.counts(100))
    assert rows.capacity == 50


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4), BUDGETS)
def test_candidates_are_what_sink_and_local_leave(mask, budget):
    extent = Extent.from_mask(torch.tensor(mask).long())
    rows = extent.rows(budget, 2)
    none = rows.limit_heavy(torch.zeros(len(mask), 2))
    assert none.budgets[..., 2].eq(0).all()
    bounds = none.start, none.end, none.budgets, none.capacity
    indices, counts = ops.select(torch.zeros(len(mask), 2, 9), *bounds, mask=none.mask)
    for request, valid in enumerate(mask):
        assert rows.valid(9)[request].tolist() == valid
        for head in range(2):
            covered = indices[request, head, : counts[request, head]].tolist()
            left = [token for token in range(9) if valid[token] and token not in covered]
            assert rows.candidates(9)[request, head].nonzero().flatten().tolist() == left


def test_heavy_is_limited_and_never_raised():
    rows = Extent.full(1, 100, torch.device("cpu")).rows(Budget(heavy=10, sink=1, local=2), 2)
    assert rows.limit_heavy(torch.tensor([[4, 40]])).budgets.tolist() == [[[1, 2, 4], [1, 2, 10]]]
    assert rows.budgets.tolist() == [[[1, 2, 10], [1, 2, 10]]]


SHARES = st.lists(st.lists(st.floats(0, 5), min_size=2, max_size=2), min_size=1, max_size=3)


@given(BUDGETS, st.lists(st.integers(0, 3000), min_size=1, max_size=4), SHARES)
def test_shares_multiply_the_heavy_budget_alone(budget, lengths, numbers):
    end = torch.tensor(lengths, dtype=torch.int32)
    extent = Extent(torch.zeros_like(end), end, max(1, *lengths, 1))
    plain, shares = extent.rows(budget, 2), Shares.of(tuple(map(tuple, numbers)), end.device)
    for row, factors in enumerate(numbers):
        found = extent.rows_of_layer(budget, shares, row)
        assert found.budgets.dtype == torch.int32 and found.budgets.shape == (len(lengths), 2, 3)
        assert torch.equal(found.budgets[..., :2], plain.budgets[..., :2])
        for request, length in enumerate(lengths):
            sink, local, heavy = plain.budgets[request, 0].tolist()
            expected = [min(int(heavy * factor + 1e-6), length - sink - local) for factor in factors]
            assert found.budgets[request, :, 2].tolist() == expected
        assert found.budgets.sum(-1).max() <= found.capacity <= extent.tokens


def test_a_share_of_one_changes_nothing():
    extent = Extent.full(3, 999, torch.device("cpu"))
    plain = extent.rows(Budget(heavy=1 / 7), 2)
    found = extent.rows_of_layer(Budget(heavy=1 / 7), Shares.of(((1.0, 1.0),), torch.device("cpu")), 0)
    assert torch.equal(found.budgets, plain.budgets) and found.capacity == plain.capacity
