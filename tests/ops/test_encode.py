from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hashattention.errors import InputError
from hashattention.ops import encode_query, encode_signature, reference, write_signature


def random_map(heads: int, widths: list[int], seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    pairs = list(itertools.pairwise(widths))
    weights = [torch.randn(heads, i, o, generator=generator) / i**0.5 for i, o in pairs]
    return weights, [torch.randn(heads, o, generator=generator) for _, o in pairs]


@given(
    bits=st.sampled_from(range(32, 257, 32)),
    hidden=st.lists(st.integers(1, 9), max_size=2),
    tokens=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_signature_bits_are_logit_signs(
    bits: int, hidden: list[int], tokens: int, dtype: torch.dtype, seed: int
) -> None:
    weights, biases = random_map(3, [6, *hidden, bits], seed)
    x = torch.randn(2, 3, tokens, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
    signatures = encode_signature(x, weights, biases)
    assert signatures.dtype == torch.int32
    assert signatures.shape == (2, 3, tokens, bits // 32)
    words = signatures.long()[..., None] >> torch.arange(32)
    assert torch.equal((words & 1).bool().flatten(-2), reference.mlp(x, weights, biases) > 0)


def test_a_zero_logit_is_a_zero_bit() -> None:
    weights, biases = [torch.zeros(1, 4, 32)], [torch.zeros(1, 32)]
    assert encode_signature(torch.ones(1, 1, 1, 4), weights, biases).item() == 0


@given(
    levels=st.sampled_from([1, 3, 7, 127]),
    magnitude=st.sampled_from([1e-20, 1e-3, 1.0, 1e4]),
    bits=st.sampled_from([32, 96, 256]),
    seed=st.integers(0, 99),
)
def test_query_codes_round_the_logits(levels: int, magnitude: float, bits: int, seed: int) -> None:
    weights, biases = random_map(2, [5, 8, bits], seed)
    weights[-1], biases[-1] = weights[-1] * magnitude, biases[-1] * magnitude
    x = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(seed))
    code, scale = encode_query(x, weights, biases, levels)
    logits = reference.mlp(x, weights, biases)
    assert code.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == code.shape[:3]
    assert (code.abs().amax(-1) == levels).all()
    error = (logits.double() - code.double() * scale.double()[..., None]).abs()
    rounding = logits.abs().double() * 2 * torch.finfo(torch.float32).eps
    assert (error <= scale.double()[..., None] / 2 + rounding).all()


def test_rounding_goes_to_even() -> None:
    bias = torch.zeros(1, 32)
    bias[0, :5] = torch.tensor([7.0, 0.5, 1.5, -2.5, -3.5])
    code, scale = encode_query(torch.zeros(1, 1, 1, 2), [torch.zeros(1, 2, 32)], [bias], 7)
    assert code[0, 0, 0, :6].tolist() == [7, 0, 2, -2, -4, 0]
    assert scale.item() == 1.0


def test_a_row_of_zero_logits_gives_code_and_scale_zero() -> None:
    code, scale = encode_query(torch.zeros(1, 2, 1, 4), [torch.zeros(2, 4, 64)], [torch.zeros(2, 64)])
    assert code.count_nonzero() == 0
    assert scale.count_nonzero() == 0


@pytest.mark.parametrize("levels", [-1, 0, 128])
def test_levels_out_of_range(levels: int) -> None:
    with pytest.raises(InputError, match=rf"levels is {levels}; expected 1 to 127"):
        encode_query(torch.zeros(1, 1, 1, 4), [torch.zeros(1, 4, 32)], [torch.zeros(1, 32)], levels)


@pytest.mark.parametrize(
    ("x", "weights", "biases", "message"),
    [
        ((1, 1, 4), [(1, 4, 32)], [(1, 32)], r"x is float32 \[1, 1, 4\]; expected \[B, H, T, in\]"),
        ((1, 2, 1, 4), [(1, 4, 32)], [(1, 32)], r"weights\[0\] is float32 \[1, 4, 32\].*size H must be 2"),
        ((1, 1, 1, 5), [(1, 4, 32)], [(1, 32)], r"size in must be 5"),
        ((1, 1, 1, 4), [(1, 4, 8), (1, 9, 32)], [(1, 8), (1, 32)], r"weights\[1\].*size w1 must be 8"),
        ((1, 1, 1, 4), [(1, 4, 32)], [(1, 31)], r"biases\[0\].*size w1 must be 32"),
        ((1, 1, 1, 4), [(1, 4, 48)], [(1, 48)], r"gives 48 bits; expected a multiple of 32 from 32 to 256"),
        ((1, 1, 1, 4), [(1, 4, 288)], [(1, 288)], r"gives 288 bits"),
        ((1, 1, 1, 4), [(1, 4, 32)], [], r"as many weights as biases, at least one; given 1 and 0"),
        ((1, 1, 1, 4), [], [], r"given 0 and 0"),
    ],
)
def test_maps_that_do_not_fit(x: tuple[int, ...], weights: list, biases: list, message: str) -> None:
    arguments = torch.zeros(x), [torch.zeros(shape) for shape in weights], [torch.zeros(shape) for shape in biases]
    for encode in (encode_signature, encode_query):
        with pytest.raises(InputError, match=message):
            encode(*arguments)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("hidden", [[], [8, 8]])
def test_opcheck(tokens: int, hidden: list[int]) -> None:
    weights, biases = random_map(2, [6, *hidden, 64])
    x = torch.randn(2, 2, tokens, 6)
    torch.library.opcheck(torch.ops.hashattention.encode_signature.default, (x, weights, biases, "auto"))
    torch.library.opcheck(torch.ops.hashattention.encode_query.default, (x.bfloat16(), weights, biases, 7, "auto"))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("size", [0, 1, 7, 16])
def test_written_signatures_land_at_their_positions_alone(
    size: int, tokens: int, backend: str, to_pages: Callable[..., tuple[Tensor, ...]]
) -> None:
    """Starts before, inside and behind the cache; a row that writes nothing may share its pages with one that does."""
    weights, biases = random_map(2, [8, 64], seed=size)
    x = torch.randn(4, 2, tokens, 8)
    cache, table = torch.randint(-(2**31), 2**31, (4, 2, 32, 2)).to(torch.int32), None
    held = 32
    if size:
        table, cache = to_pages(size, cache)
        table[3], held = table[1], table.shape[1] * size
    first = torch.tensor([-3, 3, held - 1, held], dtype=torch.int32)
    expected, made = cache.clone(), reference.encode_signature(x, weights, biases)
    for b, begin in enumerate(first.tolist()):
        for position in range(max(begin, 0), min(begin + tokens, held)):
            page, row = (b, position) if table is None else (table[b, position // size], position % size)
            expected[page, :, row] = made[b, :, position - begin]
    write_signature(x, weights, biases, cache, first, block_table=table, backend=backend)
    assert torch.equal(cache, expected)


def test_writing_opcheck_and_compile() -> None:
    weights, biases = [torch.randn(2, 8, 64)], [torch.randn(2, 64)]
    x, cache = torch.randn(2, 2, 3, 8), torch.zeros(2, 2, 9, 2, dtype=torch.int32)
    first = torch.tensor([0, 4], dtype=torch.int32)
    op = torch.ops.hashattention.write_signature.default
    torch.library.opcheck(op, (x, weights, biases, cache, first, None, "auto"))
    compiled = torch.compile(write_signature, fullgraph=True, backend="aot_eager")
    written = cache.clone()
    compiled(x, weights, biases, written, first)
    write_signature(x, weights, biases, cache, first)
    assert torch.equal(written, cache)
    assert cache.any()
