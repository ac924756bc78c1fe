from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hashattention.ops import reference, triton


def draw(words: int, *shape: int, mask: int = -1) -> Tensor:
    return (torch.randint(-(2**31), 2**31, (*shape, words)) & mask).int()


def paged(signatures: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """The same signatures in shuffled pages; everything else is poison."""
    batch, heads, tokens, words = signatures.shape
    width = -(-tokens // page)
    pages = draw(words, batch * width + 3, heads, page)
    table = torch.randperm(len(pages))[: batch * width].view(batch, width).int()
    for b in range(batch):
        for t in range(tokens):
            pages[table[b, t // page], :, t % page] = signatures[b, :, t]
    return pages, table


def compare(
    code: Tensor,
    signatures: Tensor,
    bounds: list,
    budget: list,
    heads: int,
    capacity: int,
    levels: int,
    page: int,
    device: str,
) -> None:
    start, end = torch.tensor(bounds).int().unbind(1)
    budgets = torch.tensor(budget).int().expand(len(start), heads, 3)
    table = None
    if page:
        signatures, table = paged(signatures, page)
    arguments = [code, signatures, start, end, budgets, capacity, None, table, levels]
    arguments = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
    actual = triton.score_select(*arguments)
    expected = reference.score_select(*arguments)
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[0], expected[0])
    again = triton.score_select(*arguments)
    assert torch.equal(actual[0], again[0])


@pytest.mark.parametrize(
    ("bounds", "budget", "capacity"),
    [
        ([[0, 2101], [7, 1500]], [4, 16, 90], 128),
        ([[0, 2101], [7, 1500]], [4, 16, 108], 128),
        ([[3, 3], [0, 1]], [4, 16, 90], 110),
        ([[0, 2101], [1024, 2048]], [0, 0, 77], 77),
        ([[0, 2101], [0, 50]], [300, 64, 90], 100),
        ([[0, 2101], [2000, 2101]], [0, 5, 5000], 2300),
        ([[0, 2101], [0, 9]], [4, 8, 0], 33),
    ],
)
def test_group_code_selects_the_reference_rows(bounds: list, budget: list, capacity: int, device: str) -> None:
    code = torch.randint(-7, 8, (2, 2, 1, 64)).to(torch.int8)
    compare(code, draw(2, 2, 2, 2101), bounds, budget, 2, capacity, 7, 0, device)


@pytest.mark.parametrize("mask", [0, 1, -(2**31)])
def test_ties_go_to_the_recent_token(mask: int, device: str) -> None:
    code = torch.randint(-7, 8, (1, 1, 1, 64)).to(torch.int8)
    compare(code, draw(2, 1, 1, 2500, mask=mask), [[2, 2490]], [1, 2, 1111], 1, 1200, 7, 0, device)


@pytest.mark.parametrize(
    ("code_heads", "signature_heads", "heads", "words"),
    [(4, 2, 2, 1), (4, 4, 4, 3), (4, 4, 2, 2), (6, 2, 1, 4), (2, 1, 2, 8)],
)
def test_bit_codes_of_every_share(code_heads: int, signature_heads: int, heads: int, words: int, device: str) -> None:
    code, signatures = draw(words, 1, code_heads, 1), draw(words, 1, signature_heads, 1100)
    compare(code, signatures, [[5, 1090]], [4, 16, 40], heads, 64, 127, 0, device)
    table = None
    assert torch.equal(
        triton.score(code.to(device), signatures.to(device), heads, table).cpu(),
        reference.score(code, signatures, heads),
    )


@pytest.mark.parametrize(("words", "levels"), [(1, 127), (2, 3), (4, 7)])
def test_integer_ranges(words: int, levels: int, device: str) -> None:
    code = torch.randint(-levels, levels + 1, (1, 2, 1, 32 * words)).to(torch.int8)
    code[0, 0, 0, 0], code[0, 0, 0, 1] = levels, -levels
    signatures = draw(words, 1, 2, 1100)
    compare(code, signatures, [[0, 1100]], [0, 0, 100], 2, 100, levels, 0, device)
    compare(code, signatures, [[0, 1100]], [0, 0, 100], 1, 100, levels, 0, device)
    assert torch.equal(
        triton.score(code.to(device), signatures.to(device), 2).cpu(), reference.score(code, signatures, 2)
    )


@pytest.mark.parametrize("page", [1, 16, 61, 256])
def test_paged_signatures(page: int, device: str) -> None:
    code = torch.randint(-7, 8, (2, 2, 1, 64)).to(torch.int8)
    compare(code, draw(2, 2, 2, 700), [[5, 700], [0, 123]], [4, 8, 40], 2, 60, 7, page, device)


@pytest.mark.gpu
def test_a_million_tokens_use_long_offsets() -> None:
    code = torch.randint(-7, 8, (40, 8, 1, 64)).to(torch.int8)
    signatures = torch.randint(-(2**31), 2**31, (40, 8, 2**20, 2), device="cuda", dtype=torch.int32)
    start, end = (
        torch.zeros(40, dtype=torch.int32, device="cuda"),
        torch.full((40,), 2**20 - 3, dtype=torch.int32, device="cuda"),
    )
    budgets = torch.tensor([16, 64, 2**15], dtype=torch.int32, device="cuda").expand(40, 8, 3).contiguous()
    actual, counts = triton.score_select(code.cuda(), signatures, start, end, budgets, 2**15 + 80, None, None, 7)
    last = slice(39, 40)
    rows = (start[last], end[last], budgets[last], 2**15 + 80)
    expected, expected_counts = reference.score_select(code.cuda()[last], signatures[last], *rows)
    assert torch.equal(counts[last], expected_counts)
    assert torch.equal(actual[last], expected)
