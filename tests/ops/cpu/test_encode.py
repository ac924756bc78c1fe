"""encode of the CPU kernels: the reference's codes and signs, but where a logit lies within rounding of a boundary."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hashattention.ops import reference


def native() -> ModuleType:
    return importlib.import_module("hashattention.ops.cpu.native")


def draw(rows: tuple[int, int, int], widths: list[int], dtype: torch.dtype, seed: int) -> tuple[Tensor, list, list]:
    generator = torch.Generator().manual_seed(seed)
    batch, heads, tokens = rows
    x = torch.randn(batch, tokens, heads, widths[0], generator=generator).to(dtype).transpose(1, 2)
    pairs = list(itertools.pairwise(widths))
    weights = [(torch.randn(heads, i, o, generator=generator) * i**-0.5).to(dtype) for i, o in pairs]
    biases = [(torch.randn(heads, o, generator=generator) * 0.2).to(dtype) for _, o in pairs]
    return x, weights, biases


every_set = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)


@every_set
@given(
    rows=st.sampled_from([(1, 2, 1), (3, 1, 2), (8, 2, 1), (2, 3, 5), (0, 2, 1)]),
    widths=st.sampled_from([[64, 32], [37, 19, 96], [128, 256, 256, 64], [8, 5, 7, 3, 32], [4, 4, 4, 4, 4, 32]]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    levels=st.sampled_from([1, 7, 127]),
    seed=st.integers(0, 999),
)
def test_differs_from_the_reference_only_within_rounding(
    instruction_set: str, rows: tuple[int, int, int], widths: list[int], dtype: torch.dtype, levels: int, seed: int
) -> None:
    x, weights, biases = draw(rows, widths, dtype, seed)
    logits = reference.mlp(x, weights, biases)
    code, scale = native().encode_query(x, weights, biases, levels)
    expected, expected_scale = reference.encode_query(x, weights, biases, levels)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=1e-6)
    ratio = logits / expected_scale.unsqueeze(-1)
    sure = (ratio - ratio.floor() - 0.5).abs() > 1e-3
    assert torch.equal(code[sure], expected[sure])
    assert (code.int() - expected).abs().max() <= 1 if code.numel() else code.shape == expected.shape
    words = native().encode_signature(x, weights, biases)
    sure = logits.abs() > 1e-5
    assert torch.equal(reference.unpack_bits(words)[sure], (logits > 0)[sure])


def test_zero_logits_give_zero_codes_and_signs(instruction_set: str) -> None:
    x, weights, biases = torch.zeros(1, 1, 1, 4), [torch.zeros(1, 4, 32)], [torch.zeros(1, 32)]
    code, scale = native().encode_query(x, weights, biases, 7)
    assert code.count_nonzero() == 0
    assert scale.item() == 0
    assert native().encode_signature(x, weights, biases).item() == 0


@pytest.mark.parametrize("value", [1e4, -1e4, 88.0, -88.0, -87.5])
def test_large_hidden_values_do_not_overflow(instruction_set: str, value: float) -> None:
    x, ones = torch.full((1, 1, 1, 1), value), [torch.ones(1, 1, 16), torch.ones(1, 16, 32)]
    biases = [torch.zeros(1, 16), torch.zeros(1, 32)]
    scale = native().encode_query(x, ones, biases, 1)[1]
    torch.testing.assert_close(scale, reference.encode_query(x, ones, biases, 1)[1], rtol=1e-6, atol=1e-30)


def test_many_rows_are_torch_s_and_bit_identical(instruction_set: str) -> None:
    x, weights, biases = draw((2, 2, 50), [32, 64, 64], torch.float32, 1)
    assert torch.equal(native().encode_signature(x, weights, biases), reference.encode_signature(x, weights, biases))
    many, few = native().encode_query(x, weights, biases, 7), reference.encode_query(x, weights, biases, 7)
    assert torch.equal(many[0], few[0])


def test_views_of_all_layers(instruction_set: str) -> None:
    x, weights, biases = draw((1, 2, 1), [32, 64, 64], torch.float32, 2)
    stacked = [torch.stack([torch.full_like(w, torch.nan), w])[1] for w in weights]
    assert torch.equal(native().encode_query(x, stacked, biases, 7)[0], native().encode_query(x, weights, biases, 7)[0])


@pytest.mark.parametrize("size", [0, 3, 16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_written_where_the_reference_writes(
    instruction_set: str, size: int, tokens: int, to_pages: Callable[..., tuple[Tensor, ...]]
) -> None:
    """Requests that begin before the cache, inside it, across its end and past it; what lies outside is dropped."""
    x, weights, biases = draw((4, 2, tokens), [32, 64], torch.float32, 3)
    cache = torch.full((4, 2, 10, 2), 7, dtype=torch.int32)
    table, pages = to_pages(size, cache, seed=1) if size else (None, cache)
    expected = pages.clone()
    first = torch.tensor([-2, 4, 8, 60], dtype=torch.int32)
    native().write_signature(x, weights, biases, pages, first, table)
    reference.write_signature(x, weights, biases, expected, first, table)
    assert torch.equal(pages, expected)
    assert (pages != 7).any()
