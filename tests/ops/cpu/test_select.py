"""score, select and score_select of the CPU kernels and of the fallback against the reference, bit for bit."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hashattention.ops import reference
from hashattention.ops.cpu import MISSING, fallback

needs_native = pytest.mark.skipif(MISSING is not None, reason="needs the native kernels")
every_set = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


def native() -> ModuleType:
    return importlib.import_module("hashattention.ops.cpu.native")


@dataclasses.dataclass(frozen=True)
class Case:
    """What a call of `score_select` is made of; `alphabet` distinct signatures make ties."""

    batch: int
    heads: tuple[int, int, int]
    words: int
    tokens: int
    levels: int
    alphabet: int
    masked: bool
    seed: int

    def codes(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        code_heads, signature_heads, _ = self.heads
        if self.levels == 0:
            shape = (self.batch, code_heads, 1, self.words)
            code = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
        else:
            shape = (self.batch, code_heads, 1, 32 * self.words)
            code = torch.randint(-self.levels, self.levels + 1, shape, generator=generator).to(torch.int8)
        words = torch.randint(-(2**31), 2**31, (self.alphabet, self.words), generator=generator).to(torch.int32)
        # A view into a larger cache, as a cache that grows gives it.
        shape = (self.batch, signature_heads, self.tokens + 3)
        return code, words[torch.randint(0, self.alphabet, shape, generator=generator)][:, :, : self.tokens]

    def rows(self) -> tuple[Tensor, Tensor, Tensor, int, Tensor | None]:
        generator = torch.Generator().manual_seed(self.seed + 1)

        def draw(high: int, *shape: int) -> Tensor:
            return torch.randint(0, high + 1, shape, generator=generator, dtype=torch.int32)

        start, end = draw(self.tokens // 2, self.batch), draw(self.tokens, self.batch)
        budgets = draw(self.tokens // 2, self.batch, self.heads[2], 3)
        capacity = int(draw(self.tokens, 1)) + 1
        mask = torch.rand(self.batch, self.tokens, generator=generator) < 0.7 if self.masked else None
        return start, end, budgets, capacity, mask


@needs_native
@pytest.mark.parametrize(("mixture", "words", "masked"), [(2, 2, False), (2, 2, True), (3, 1, False), (4, 2, True)])
@pytest.mark.parametrize("heads", [(2, 2, 2), (6, 2, 2)])
def test_a_mixture(heads: tuple[int, int, int], mixture: int, words: int, masked: bool) -> None:
    case = Case(2, heads, words, 300, 7, 40, masked, mixture)
    signatures = case.codes()[1]
    code = torch.cat([dataclasses.replace(case, seed=seed).codes()[0] for seed in range(mixture)], -1)
    assert torch.equal(native().score(code, signatures, heads[2]), reference.score(code, signatures, heads[2]))
    got, expected = (each.score_select(code, signatures, *case.rows()) for each in (native(), reference))
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


#: (Hc, Hs, Hsel): a group code, one head each, codes that share a signature, that share a selection, and both.
HEADS = [(2, 2, 2), (6, 6, 6), (6, 2, 2), (6, 2, 6), (6, 6, 2), (12, 6, 3)]
cases = st.builds(
    Case,
    batch=st.integers(1, 3),
    heads=st.sampled_from(HEADS),
    words=st.integers(1, 8),
    tokens=st.integers(1, 400),
    levels=st.sampled_from([0, 1, 7, 15, 40, 127]),
    alphabet=st.sampled_from([1, 3, 50, 1000]),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)


def check(kernels: ModuleType, case: Case) -> None:
    code, signatures = case.codes()
    start, end, budgets, capacity, mask = case.rows()
    scores = reference.score(code, signatures, case.heads[2])
    assert torch.equal(kernels.score(code, signatures, case.heads[2]), scores)
    expected = reference.select(scores, start, end, budgets, capacity, mask)
    for got in (
        kernels.select(scores, start, end, budgets, capacity, mask),
        kernels.score_select(code, signatures, start, end, budgets, capacity, mask),
    ):
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


@every_set
@given(case=cases)
def test_bit_identical_to_the_reference(instruction_set: str, case: Case) -> None:
    check(native(), case)


@settings(max_examples=60)
@given(case=cases)
def test_the_fallback_is_bit_identical_too(case: Case) -> None:
    check(fallback, case)


def test_weights_whose_sum_exceeds_sixteen_bits(instruction_set: str) -> None:
    code = torch.full((1, 4, 1, 256), 127, dtype=torch.int8)
    signatures = torch.randint(-(2**31), 2**31, (1, 2, 700, 8), generator=torch.Generator().manual_seed(0)).int()
    rows = torch.tensor([3], dtype=torch.int32), torch.tensor([690], dtype=torch.int32)
    budgets = torch.tensor([[[2, 5, 40]]], dtype=torch.int32)
    got = native().score_select(code, signatures, *rows, budgets, 60)
    expected = reference.score_select(code, signatures, *rows, budgets, 60)
    assert reference.score(code, signatures, 1).abs().max() > 2**14
    assert torch.equal(got[0], expected[0])
    assert torch.equal(native().score(code, signatures, 1), reference.score(code, signatures, 1))


@every_set
@given(case=cases, size=st.sampled_from([1, 2, 16, 61]))
def test_paged(instruction_set: str, case: Case, size: int, to_pages: Callable[..., tuple[Tensor, ...]]) -> None:
    code, signatures = case.codes()
    start, end, budgets, capacity, _ = case.rows()
    table, pages = to_pages(size, signatures.contiguous(), seed=size)
    expected = reference.score_select(code, signatures, start, end, budgets, capacity)
    got = native().score_select(code, pages, start, end, budgets, capacity, None, table)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_a_block_table_may_hold_anything_past_the_request(instruction_set: str) -> None:
    code = torch.ones(1, 1, 1, 32, dtype=torch.int8)
    pages = torch.arange(8, dtype=torch.int32).view(2, 1, 4, 1)
    table = torch.tensor([[1, 2**31 - 1, -(2**31)]], dtype=torch.int32)
    rows = torch.tensor([0], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    indices, counts = native().score_select(code, pages, *rows, torch.tensor([[[0, 0, 2]]]).int(), 5, None, table)
    assert counts.tolist() == [[2]]
    # Token values 4, 5, 6, 7: most bits in 7, then the more recent of 5 and 6.
    assert indices.tolist() == [[[2, 3, -1, -1, -1]]]
    assert native().score(code, pages, 1, table).shape == (1, 1, 12)


@pytest.fixture(params=[2, 3, 8])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("alphabet", [1, 100000])
@pytest.mark.parametrize("masked", [True, False])
def test_any_number_of_threads(instruction_set: str, threads: int, alphabet: int, masked: bool) -> None:
    """Fewer rows than threads: a row is shared, also where all its scores tie."""
    case = Case(1, (2, 2, 2), 2, 70_003, 7, alphabet, masked, 5)
    code, signatures = case.codes()
    _, _, _, _, mask = case.rows()
    rows = torch.tensor([77], dtype=torch.int32), torch.tensor([69_001], dtype=torch.int32)
    budgets = torch.tensor([[[16, 64, 1000], [16, 64, 1]]], dtype=torch.int32)
    expected = reference.score_select(code, signatures, *rows, budgets, 1080, mask)
    for _ in range(2):
        got = native().score_select(code, signatures, *rows, budgets, 1080, mask)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
    assert torch.equal(native().score(code, signatures, 2), reference.score(code, signatures, 2))


@pytest.mark.parametrize("kind", ["even", "ties", "clustered", "misleading high", "misleading low"])
@pytest.mark.parametrize("heavy", [1, 500, 2500])
def test_long_rows_whatever_their_order(instruction_set: str, kind: str, heavy: int) -> None:
    """Best tokens spread, tied, in one place, or at regular places: exact all the same."""
    tokens = 64 * 700
    generator = torch.Generator().manual_seed(11)
    code = torch.randint(-7, 8, (1, 1, 1, 64), generator=generator).to(torch.int8)
    signatures = torch.randint(-(2**31), 2**31, (1, 1, tokens, 2), generator=generator).to(torch.int32)
    best = reference.pack_bits(code[0, 0, 0] > 0)
    sampled = torch.arange(tokens) % 700 < 128
    chosen = {
        "even": torch.zeros(tokens, dtype=torch.bool),
        "ties": torch.arange(tokens) % 3 == 0,
        "clustered": (torch.arange(tokens) > 20_000) & (torch.arange(tokens) < 21_000),
        "misleading high": sampled & (torch.arange(tokens) % 40 == 0),
        "misleading low": ~sampled & (torch.arange(tokens) % 2 == 0),
    }[kind]
    signatures[0, 0, chosen] = best
    rows = torch.tensor([0], dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)
    budgets = torch.tensor([[[0, 0, heavy]]], dtype=torch.int32)
    expected = reference.score_select(code, signatures, *rows, budgets, heavy)
    got = native().score_select(code, signatures, *rows, budgets, heavy)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@needs_native
def test_float_scores_order_as_torch_does() -> None:
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-42, -1e-42, 3.0, 3.0])
    scores = special[torch.randint(0, 9, (1, 3, 200), generator=torch.Generator().manual_seed(0))]
    rows = torch.tensor([0], dtype=torch.int32), torch.tensor([200], dtype=torch.int32)
    for heavy in (1, 30, 77, 111, 160, 199):
        budgets = torch.tensor([0, 0, heavy], dtype=torch.int32).expand(1, 3, 3)
        expected = reference.select(scores, *rows, budgets, 200)
        assert torch.equal(native().select(scores, *rows, budgets, 200)[0], expected[0])


def test_memory_outside_the_row_is_not_read(instruction_set: str) -> None:
    case = Case(1, (2, 2, 2), 2, 300, 7, 1000, False, 9)
    code, signatures = case.codes()
    rows = torch.tensor([40], dtype=torch.int32), torch.tensor([211], dtype=torch.int32)
    budgets = torch.tensor([4, 8, 20], dtype=torch.int32).expand(1, 2, 3)
    clean = native().score_select(code, signatures, *rows, budgets, 32)[0]
    poisoned = signatures.clone()
    poisoned[:, :, :44] = -1
    poisoned[:, :, 203:] = -1
    assert torch.equal(native().score_select(code, poisoned, *rows, budgets, 32)[0], clean)


def test_signatures_that_are_not_adjacent(instruction_set: str) -> None:
    case = Case(2, (2, 2, 2), 2, 90, 7, 1000, False, 3)
    code, signatures = case.codes()
    spread = signatures.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    assert spread.stride(2) != 2
    assert torch.equal(native().score(code, spread, 2), reference.score(code, signatures, 2))
