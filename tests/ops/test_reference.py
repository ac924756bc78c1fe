from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hashattention.ops import reference

WIDTHS = range(32, 257, 32)


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


@given(st.sampled_from(WIDTHS).flatmap(lambda n: st.lists(st.booleans(), min_size=n, max_size=n)))
def test_pack_is_the_sum_of_powers_and_unpack_undoes_it(bits: list[bool]) -> None:
    tensor = torch.tensor(bits)
    packed = reference.pack_bits(tensor)
    words = [signed(sum(bit << j for j, bit in enumerate(bits[w : w + 32]))) for w in range(0, len(bits), 32)]
    assert packed.dtype == torch.int32
    assert packed.tolist() == words
    assert torch.equal(reference.unpack_bits(packed), tensor)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=8))
def test_unpack_then_pack_keeps_every_word(words: list[int]) -> None:
    tensor = torch.tensor(words, dtype=torch.int32)
    assert reference.pack_bits(reference.unpack_bits(tensor)).tolist() == words


@pytest.mark.parametrize(("bit", "word"), [(0, 1), (30, 2**30), (31, -(2**31))])
def test_single_bits(bit: int, word: int) -> None:
    bits = torch.zeros(2, 3, 32, dtype=torch.bool)
    bits[1, 2, bit] = True
    packed = reference.pack_bits(bits)
    assert packed[1, 2].item() == word
    assert packed.count_nonzero() == 1


def test_scoring_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    code = torch.randint(-7, 8, (2, 4, 1, 64), generator=generator, dtype=torch.int8)
    signatures = torch.randint(-(2**31), 2**31 - 1, (2, 2, 37, 2), generator=generator, dtype=torch.int32)
    whole = reference.score(code, signatures, 2)
    monkeypatch.setattr(reference, "SCORE_CHUNK", 5)
    assert torch.equal(reference.score(code, signatures, 2), whole)


def test_mlp_is_one_network_a_head() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 6, generator=generator)
    weights = [torch.randn(3, 6, 7, generator=generator), torch.randn(3, 7, 32, generator=generator)]
    biases = [torch.randn(3, 7, generator=generator), torch.randn(3, 32, generator=generator)]
    logits = reference.mlp(x, weights, biases)
    for head in range(3):
        hidden = x[:, head].double() @ weights[0][head].double() + biases[0][head]
        expected = torch.nn.functional.silu(hidden) @ weights[1][head].double() + biases[1][head]
        torch.testing.assert_close(logits[:, head].double(), expected, rtol=1e-5, atol=1e-5)
