from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hashattention.ops import reference, triton

SHAPES = [(24, 64), (24, 40, 32), (48, 96, 80, 64), (128, 64, 64, 96)]


def make_map(heads: int, widths: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Tensor]]:
    pairs = list(itertools.pairwise(widths))
    weights = [torch.randn(heads, a, b, device=device).to(dtype) / a**0.5 for a, b in pairs]
    return weights, [torch.randn(heads, b, device=device).to(dtype) / 10 for _, b in pairs]


def unsure(x: Tensor, weights: list[Tensor], biases: list[Tensor], dtype: torch.dtype) -> float:
    """Twice what plain torch errs in this dtype: nearer to zero than that, a bit may differ."""
    exact = reference.mlp(x, weights, biases)
    if dtype == torch.float32:
        return 1e-5 * float(exact.abs().max())
    hidden = x
    for stage, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        hidden = torch.nn.functional.silu(hidden) if stage else hidden
        hidden = hidden @ weight + bias.unsqueeze(-2)
    return 2 * float((hidden.float() - exact).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("widths", SHAPES)
def test_signature_bits_match(widths: tuple[int, ...], tokens: int, dtype: torch.dtype, device: str) -> None:
    weights, biases = make_map(2, widths, dtype, device)
    x = torch.randn(2, 2, tokens, widths[0], device=device).to(dtype)
    near = reference.mlp(x, weights, biases).abs() <= unsure(x, weights, biases, dtype)
    actual, expected = triton.encode_signature(x, weights, biases), reference.encode_signature(x, weights, biases)
    differ = reference.unpack_bits(actual) != reference.unpack_bits(expected)
    assert not (differ & ~near).any()
    assert near.float().mean() < 0.05


def test_blocks_of_many_rows(device: str) -> None:
    """Enough rows for blocks of 64, the last one ragged, over request borders."""
    weights, biases = make_map(8, (24, 40, 32), torch.float32, device)
    x = torch.randn(3, 8, 381, 24, device=device)
    near = reference.mlp(x, weights, biases).abs() <= unsure(x, weights, biases, torch.float32)
    actual, expected = triton.encode_signature(x, weights, biases), reference.encode_signature(x, weights, biases)
    differ = reference.unpack_bits(actual) != reference.unpack_bits(expected)
    assert not (differ & ~near).any()
    assert near.float().mean() < 0.05


@pytest.mark.parametrize("levels", [1, 7, 127])
@pytest.mark.parametrize("widths", SHAPES)
def test_query_codes_match(widths: tuple[int, ...], levels: int, device: str) -> None:
    weights, biases = make_map(3, widths, torch.float32, device)
    x = torch.randn(2, 3, 2, widths[0], device=device).transpose(0, 0)
    code, scale = triton.encode_query(x, weights, biases, levels)
    exact = reference.mlp(x, weights, biases) / scale[..., None]
    assert code.dtype == torch.int8
    assert (code.float() - exact).abs().max() <= 0.5 + 1e-3
    assert torch.equal(code.abs().amax(-1), torch.full_like(code[..., 0], levels))
    assert torch.allclose(scale, reference.encode_query(x, weights, biases, levels)[1], rtol=1e-5)


def test_a_zero_row_gives_a_zero_code(device: str) -> None:
    weights, biases = make_map(1, (16, 32), torch.float32, device)
    biases[0].zero_()
    code, scale = triton.encode_query(torch.zeros(1, 1, 1, 16, device=device), weights, biases, 7)
    assert not code.any()
    assert not scale.any()


@pytest.mark.parametrize("page", [0, 1, 61])
def test_writing_leaves_the_rest_of_the_cache_alone(page: int, device: str) -> None:
    weights, biases = make_map(2, (24, 64), torch.float32, device)
    x = torch.randn(3, 2, 20, 24, device=device)
    first = torch.tensor([0, 33, 115], dtype=torch.int32, device=device)
    rows = torch.full((3, 2, 122, 2), 77, dtype=torch.int32, device=device)
    table = None
    cache = rows.clone()
    if page:
        width = -(-122 // page)
        cache = torch.full((3 * width + 2, 2, page, 2), 77, dtype=torch.int32, device=device)
        table = torch.randperm(len(cache))[: 3 * width].view(3, width).int().to(device)
    triton.write_signature(x, weights, biases, cache, first, table)
    expected = reference.encode_signature(x, weights, biases)
    for b, at in enumerate(first.tolist()):
        kept = min(20, (122 if not page else width * page) - at)
        for t in range(kept):
            place = cache[b, :, at + t] if table is None else cache[table[b, (at + t) // page], :, (at + t) % page]
            assert torch.equal(place, expected[b, :, t])
    written = sum(min(20, (122 if not page else width * page) - at) for at in first.tolist())
    assert int((cache[..., 0] != 77).sum()) <= written * 2
    assert int((cache[..., 0] == 77).sum()) >= cache[..., 0].numel() - written * 2
