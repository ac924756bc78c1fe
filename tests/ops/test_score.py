from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hashattention.errors import InputError
from hashattention.ops import score

#: Every way heads are shared at Hq = 8, Hkv = 2: (Hc, Hs, Hsel).
SHARING = [(2, 2, 2), (8, 2, 2), (8, 2, 8), (8, 8, 2), (8, 8, 8), (2, 1, 1), (8, 1, 2), (4, 2, 1)]
EXTREMES = st.sampled_from([-(2**31), -1, 0, 1, 2**31 - 1])
WORDS = st.one_of(EXTREMES, st.integers(-(2**31), 2**31 - 1))


def random_signatures(batch: int, heads: int, tokens: int, words: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (batch, heads, tokens, words), generator=generator).to(torch.int32)


def random_code(batch: int, heads: int, words: int, symmetric: bool, seed: int = 1, levels: int = 7) -> Tensor:
    if symmetric:
        return random_signatures(batch, heads, 1, words, seed)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-levels, levels + 1, (batch, heads, 1, 32 * words), generator=generator, dtype=torch.int8)


def pair_score(code: list[int], signature: list[int], symmetric: bool) -> int:
    """One code against one signature in Python integers, written from the docstring of `score`."""
    words = [word % 2**32 for word in signature]
    if symmetric:
        return 32 * len(words) - 2 * sum((a % 2**32 ^ b).bit_count() for a, b in zip(code, words, strict=True))
    return sum(weight * (1 if words[j // 32] >> (j % 32) & 1 else -1) for j, weight in enumerate(code))


def expected_scores(code: Tensor, signatures: Tensor, selection_heads: int) -> Tensor:
    (batch, code_heads), (signature_heads, tokens) = code.shape[:2], signatures.shape[1:3]
    out = torch.zeros(batch, selection_heads, tokens, dtype=torch.int32)
    for b in range(batch):
        for c in range(code_heads):
            rows = signatures[b, c * signature_heads // code_heads].tolist()
            row = [pair_score(code[b, c, 0].tolist(), signature, code.dtype == torch.int32) for signature in rows]
            out[b, c * selection_heads // code_heads] += torch.tensor(row, dtype=torch.int32)
    return out


@given(st.integers(1, 8).flatmap(lambda w: st.lists(st.lists(WORDS, min_size=w, max_size=w), min_size=2, max_size=6)))
def test_symmetric_is_bits_minus_twice_the_popcount(rows: list[list[int]]) -> None:
    code, *signatures = rows
    out = score(torch.tensor([[[code]]], dtype=torch.int32), torch.tensor([[signatures]], dtype=torch.int32), 1)
    assert out.dtype == torch.int32
    assert out[0, 0].tolist() == [pair_score(code, signature, True) for signature in signatures]


@given(
    signature=st.integers(1, 8).flatmap(lambda w: st.lists(WORDS, min_size=w, max_size=w)),
    weights=st.lists(st.integers(-127, 127), min_size=256, max_size=256),
)
def test_asymmetric_is_the_signed_sum(signature: list[int], weights: list[int]) -> None:
    code = weights[: 32 * len(signature)]
    out = score(torch.tensor([[[code]]], dtype=torch.int8), torch.tensor([[[signature]]], dtype=torch.int32), 1)
    assert out.item() == pair_score(code, signature, False)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("code_heads", "signature_heads", "selection_heads"), SHARING)
@settings(max_examples=8)
@given(batch=st.integers(1, 3), tokens=st.integers(1, 9), words=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_sharing_of_heads(
    code_heads: int,
    signature_heads: int,
    selection_heads: int,
    symmetric: bool,
    batch: int,
    tokens: int,
    words: int,
    seed: int,
) -> None:
    code = random_code(batch, code_heads, words, symmetric, seed)
    signatures = random_signatures(batch, signature_heads, tokens, words, seed + 1000)
    expected = expected_scores(code, signatures, selection_heads)
    assert torch.equal(score(code, signatures, selection_heads), expected)


def test_the_largest_sum_is_exact() -> None:
    code = torch.full((1, 64, 1, 256), 127, dtype=torch.int8)
    signatures = torch.tensor([-1, 0, 1], dtype=torch.int32).view(1, 1, 3, 1).repeat(1, 1, 1, 8)
    largest = 64 * 127 * 256
    assert score(code, signatures, 1)[0, 0].tolist() == [largest, -largest, -largest + 64 * 127 * 16]


@pytest.mark.parametrize("size", [1, 2, 16, 61])
@pytest.mark.parametrize("symmetric", [True, False])
def test_paged_equals_dense(size: int, symmetric: bool, to_pages: Callable[..., tuple[Tensor, ...]]) -> None:
    code, signatures = random_code(3, 4, 2, symmetric), random_signatures(3, 2, 67, 2)
    table, pages = to_pages(size, signatures, seed=size)
    paged = score(code, pages, 2, block_table=table)
    assert paged.shape == (3, 2, table.shape[1] * size)
    assert torch.equal(paged[..., :67], score(code, signatures, 2))


@pytest.mark.parametrize("mixture", [2, 3])
@pytest.mark.parametrize("words", [1, 2])
def test_of_a_mixture_the_largest_counts(mixture: int, words: int) -> None:
    codes = [random_code(2, 4, words, False, seed) for seed in range(mixture)]
    signatures = random_signatures(2, 2, 40, words)
    # Each by itself and per code head; then the largest, and the heads of a selection head summed.
    alone = torch.stack([score(code, signatures, 4) for code in codes])
    expected = alone.amax(0).unflatten(1, (2, 2)).sum(2, dtype=torch.int32)
    assert torch.equal(score(torch.cat(codes, -1), signatures, 2), expected)
    same = torch.cat([codes[0]] * mixture, -1)
    assert torch.equal(score(same, signatures, 4), alone[0])


@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0)])
def test_nothing_to_score(batch: int, tokens: int) -> None:
    out = score(random_code(batch, 4, 2, False), random_signatures(batch, 2, tokens, 2), 2)
    assert out.shape == (batch, 2, tokens)


@pytest.mark.parametrize(
    ("code", "dtype", "signatures", "heads", "message"),
    [
        ((1, 2, 1, 64), torch.float32, (1, 2, 5, 2), 2, r"code is float32 .* expected dtype int8 or int32"),
        (
            (1, 2, 1, 32),
            torch.int8,
            (1, 2, 5, 2),
            2,
            r"entries of a code over bits of a signature: 32 is not .* multiple of 64",
        ),
        ((1, 2, 1, 64), torch.int32, (1, 2, 5, 2), 2, r"size W must be 2"),
        ((2, 2, 1, 2), torch.int32, (1, 2, 5, 2), 2, r"size B must be 1"),
        ((1, 2, 3, 2), torch.int32, (1, 2, 5, 2), 2, r"size 1 must be 1"),
        ((1, 3, 1, 2), torch.int32, (1, 2, 5, 2), 1, r"code heads over signature heads: 3 is not .* multiple of 2"),
        ((1, 2, 1, 2), torch.int32, (1, 2, 5, 2), 4, r"code heads over selection heads: 2 is not .* multiple of 4"),
        ((1, 2, 1, 2), torch.int32, (1, 2, 5, 2), 0, r"multiple of 0"),
        ((1, 2, 1, 9), torch.int32, (1, 2, 5, 9), 2, r"signatures have 9 words; expected 1 to 8"),
    ],
)
def test_codes_that_do_not_fit(
    code: tuple[int, ...], dtype: torch.dtype, signatures: tuple[int, ...], heads: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        score(torch.zeros(code, dtype=dtype), torch.zeros(signatures, dtype=torch.int32), heads)


def test_block_table_of_another_batch() -> None:
    table = torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(InputError, match=r"block_table is int32 \[3, 2\].*size B must be 2|size B must be 3"):
        score(random_code(2, 2, 1, True), random_signatures(4, 2, 5, 1), 2, block_table=table)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("paged", [True, False])
def test_opcheck(symmetric: bool, paged: bool, to_pages: Callable[..., tuple[Tensor, ...]]) -> None:
    code, signatures, table = random_code(2, 4, 2, symmetric), random_signatures(2, 2, 9, 2), None
    if paged:
        table, signatures = to_pages(4, signatures)
    torch.library.opcheck(torch.ops.hashattention.score.default, (code, signatures, 2, table, "auto"))
