from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hashattention.ops import reference, triton
from hashattention.ops.triton.select import SAMPLES, chunk_of


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


@pytest.mark.parametrize(("words", "mixture", "levels"), [(2, 2, 7), (1, 3, 7), (4, 2, 7), (2, 2, 3), (3, 2, 5)])
@pytest.mark.parametrize("page", [0, 16])
def test_a_mixture_selects_the_reference_rows(words: int, mixture: int, levels: int, page: int, device: str) -> None:
    code = torch.randint(-levels, levels + 1, (2, 2, 1, 32 * words * mixture)).to(torch.int8)
    bounds = [[0, 701], [7, 500]] if page else [[0, 2101], [7, 1500]]
    signatures = draw(words, 2, 2, bounds[0][1])
    compare(code, signatures, bounds, [4, 16, 90], 2, 128, levels, page, device)


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


def signed(code: Tensor, best: Tensor) -> Tensor:
    """Signatures of the highest score where `best` ``[T]``, of the lowest elsewhere."""
    signs = reference.pack_bits(code > 0)
    return torch.where(best[:, None], signs, ~signs)


@pytest.mark.parametrize(("words", "levels"), [(1, 7), (2, 7), (4, 7), (1, 127)])
@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_a_border_that_the_sample_missed(words: int, levels: int, low: bool, spread: float, device: str) -> None:
    """Every sampled token has the lowest score and the others the highest, or the other way round; some are random."""
    tokens, sink, local = 3000, 3, 5
    code = torch.randint(1, levels + 1, (1, 1, 1, 32 * words)).to(torch.int8)
    step = -(-(tokens - sink - local) // SAMPLES.value) | 1
    sampled = (torch.arange(tokens) - sink) % step == 0
    signatures = signed(code, sampled ^ low).expand(1, 1, -1, -1).clone()
    noise = torch.rand(tokens) < spread
    signatures[0, 0, noise & ~sampled] = draw(words, int((noise & ~sampled).sum()))
    for heavy in (1, 100, int(sampled.sum()), int((~sampled).sum()) - local, 2991, 2992):
        compare(code, signatures, [[0, tokens]], [sink, local, heavy], 1, 2800, levels, 0, device)


@pytest.mark.parametrize(("words", "levels"), [(1, 7), (2, 7), (4, 7), (1, 127)])
@pytest.mark.parametrize("best", [True, False])
def test_a_border_at_the_highest_and_the_lowest_level(words: int, levels: int, best: bool, device: str) -> None:
    code = torch.full((1, 1, 1, 32 * words), levels).to(torch.int8)
    signatures = signed(code, torch.full((2500,), best)).expand(1, 1, -1, -1).clone()
    for heavy in (1, 70, 2492):
        compare(code, signatures, [[0, 2500]], [3, 5, heavy], 1, 2500, levels, 0, device)
    signatures[0, 0, ::7] = draw(words, 358)
    compare(code, signatures, [[0, 2500]], [3, 5, 70], 1, 2500, levels, 0, device)


@pytest.mark.parametrize("heavy", [0, 1, 2090, 2091, 2092, 9999])
def test_a_budget_that_needs_no_score_reads_none(heavy: int, device: str) -> None:
    """All candidates or none: the rows' other tokens would have been written over stale scores."""
    code = torch.randint(-7, 8, (1, 2, 1, 64)).to(torch.int8)
    compare(code, draw(2, 1, 2, 2101), [[0, 2101]], [4, 6, heavy], 2, 2101, 7, 0, device)


@pytest.mark.parametrize("sampled_high", [None, False, True])
def test_a_row_of_many_chunks(sampled_high: bool | None, device: str) -> None:
    """More chunks than one load of counts holds, with the border in the window, above it and below it."""
    tokens = 35000
    code = torch.randint(1, 8, (1, 1, 1, 64)).to(torch.int8)
    signatures = draw(2, 1, 1, tokens)
    if sampled_high is not None:
        step = -(-(tokens - 8) // SAMPLES.value) | 1
        sampled = (torch.arange(tokens) - 3) % step == 0
        signatures[0, 0] = signed(code, sampled ^ (not sampled_high))
        signatures[0, 0, 1::9] = draw(2, len(range(1, tokens, 9)))
    compare(code, signatures, [[0, tokens]], [3, 5, 4000], 1, 4008, 7, 0, device)


def test_chunks_are_few_enough_to_be_read_by_every_program() -> None:
    for tokens in (1, 1000, 2**17, 2**20 + 1, 2**22):
        for rows in (1, 8, 2048):
            assert -(-tokens // chunk_of(tokens, rows)) <= 128


@pytest.mark.gpu
def test_a_large_batch_of_wide_codes() -> None:
    code = torch.randint(-7, 8, (256, 4, 1, 128)).to(torch.int8)
    bounds = [[b % 7, 4001 + 15 * b % 4001] for b in range(256)]
    compare(code, draw(4, 256, 4, 8002), bounds, [4, 16, 300], 4, 320, 7, 0, "cuda")


@pytest.mark.gpu
def test_a_captured_selection_follows_its_inputs() -> None:
    """Replays with the border in the window, above it and below it, all and none taken, in any order."""
    tokens, sink, local = 20000, 3, 5
    code = torch.randint(1, 8, (1, 1, 1, 64)).to(torch.int8).cuda()
    bounds = torch.tensor([0]).int().cuda(), torch.tensor([tokens]).int().cuda()
    budgets = torch.tensor([[[sink, local, 100]]]).int().cuda()
    sampled = (torch.arange(tokens, device="cuda") - sink) % (-(-(tokens - sink - local) // SAMPLES.value) | 1) == 0
    kinds = [draw(2, tokens).cuda(), signed(code, sampled), signed(code, ~sampled)]
    signatures = kinds[0].expand(1, 1, -1, -1).clone()
    arguments = (code, signatures, *bounds, budgets, tokens, None, None, 7)
    triton.score_select(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = triton.score_select(*arguments)
    for heavy in (100, 0, 1, 9999, 600, tokens):
        for kind in kinds:
            signatures[0, 0] = kind
            budgets[0, 0, 2] = heavy
            graph.replay()
            expected = reference.score_select(*arguments)
            assert torch.equal(actual[0], expected[0])
            assert torch.equal(actual[1], expected[1])


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
