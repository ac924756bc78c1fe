from __future__ import annotations

import pytest
import torch
from tests.selectors.steps import CASES, SHAPES, best, chosen, pool, ragged_step, replaced, rows_of, valid_tokens

from hashattention.config import Budget
from hashattention.errors import ConfigError
from hashattention.rows import Extent
from hashattention.selectors.quest import QuestSelector


def rounded(vector, bits):
    """Each vector on its own grid of 2 ** bits levels, in float64."""
    if bits == 16:
        return vector
    low, high = vector.min(), vector.max()
    if low == high:
        return vector
    step = (high - low) / (2**bits - 1)
    return low + ((vector - low) / step).round() * step


def bounds(queries, keys, step, request, page, bits):
    """The paper's bound of every token's page, page by page from the row's first token: float64 [G, T]."""
    valid, first = valid_tokens(step, request), int(step.extent.start[request])
    out = torch.full((len(queries), step.extent.tokens), -torch.inf, dtype=torch.float64)
    for border in range(first, step.extent.tokens, page):
        members = [token for token in range(border, border + page) if token in valid]
        if not members:
            continue
        low, high = rounded(keys[members].amin(0), bits), rounded(keys[members].amax(0), bits)
        for head, query in enumerate(queries):
            bound = sum(max(q * a, q * b) for q, a, b in zip(query.tolist(), low.tolist(), high.tolist(), strict=True))
            out[head, members] = bound
    return out


@pytest.mark.parametrize(("page", "bits", "share"), [(4, 16, "group"), (7, 16, "query_head"), (16, 4, "group")])
@pytest.mark.parametrize(("shape", "budget"), CASES)
def test_pages_by_the_papers_bound(shape, budget, page, bits, share):
    step = ragged_step(shape, budget)
    selector = QuestSelector(page, bits, share)
    selection = selector.select(step)
    for request, row, head, queries, keys in rows_of(step, share):
        naive = bounds(queries, keys, step, request, page, bits) * step.scale
        valid = valid_tokens(step, request)
        group = len(step.query[0]) // len(step.key[0])
        members = slice(None) if share == "group" else [row - head * group]
        estimated = selector.estimate(step)[request, head, members].double()
        torch.testing.assert_close(estimated[:, valid], naive[:, valid], rtol=1e-5, atol=1e-5)
        # Ranked by the estimate itself, so that a rounding difference cannot reorder two pages.
        scores = pool(estimated, step, request, "peak_max") if share == "group" else estimated[0]
        assert chosen(selection, request, row) == best(scores, step, request)


def test_a_hole_is_no_part_of_its_page():
    step = ragged_step(SHAPES[0], Budget(heavy=7, sink=2, local=3))
    mask = torch.ones(2, 45, dtype=torch.bool)
    mask[0, :7] = False
    mask[0, 20:26] = mask[1, 8:16] = False
    key = step.key.masked_fill(~mask[:, None, :, None], float("nan"))
    step = replaced(step, key=key, extent=Extent.from_mask(mask))
    selection = QuestSelector(4).select(step)
    for request, row, _, queries, keys in rows_of(step, "group"):
        scores = pool(bounds(queries, keys, step, request, 4, 16) * step.scale, step, request, "peak_max")
        assert chosen(selection, request, row) == best(scores, step, request)


def test_the_best_pages_come_whole_and_the_last_is_cut():
    step = ragged_step((1, 1, 64, (0,)), Budget(heavy=10, sink=0, local=0))
    held = chosen(QuestSelector(4).select(step), 0, 0)
    pages = {page: [token for token in held if token // 4 == page] for page in {token // 4 for token in held}}
    assert sorted(map(len, pages.values())) == [2, 4, 4]
    (cut,) = (tokens for tokens in pages.values() if len(tokens) == 2)
    assert [token % 4 for token in cut] == [2, 3]


def test_no_bound_is_below_a_logit():
    step = ragged_step(SHAPES[1], Budget(heavy=5))
    estimate = QuestSelector(5).estimate(step)
    for request, _, head, queries, keys in rows_of(step, "group"):
        valid = valid_tokens(step, request)
        exact = queries @ keys[valid].T * step.scale
        assert (estimate[request, head][:, valid] >= exact - 1e-5).all()


@pytest.mark.parametrize(("page", "bits", "expected"), [(16, 16, 256.0), (16, 4, 68.0), (8, 2, 72.0), (1, 8, 2112.0)])
def test_auxiliary_bits_by_hand(page, bits, expected):
    # Two vectors of 128 channels a page; a rounded one carries its minimum and step (16 bits each).
    assert QuestSelector(page, bits).auxiliary_bits(128) == expected


@pytest.mark.parametrize(("options", "message"), [({"page": 0}, "page must be"), ({"bits": 12}, "bits must be 1 to 8")])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        QuestSelector(**options)
