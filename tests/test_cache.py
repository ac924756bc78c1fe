from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hashattention.cache import TokenCache

OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["extend", "crop", "select", "repeat"]), st.integers(0, 9)), min_size=1, max_size=12
)


@given(OPERATIONS)
def test_any_history_equals_a_plain_tensor(operations):
    """Random extends, crops, selections and repeats against torch.cat and indexing on an ordinary tensor."""
    side, plain = TokenCache(), torch.zeros(2, 3, 0, 2)
    for kind, amount in operations:
        if kind == "extend":
            new = torch.rand(plain.shape[0], 3, amount, 2)
            tokens = plain.shape[2] + amount
            held = plain.shape[2]
            plain = torch.cat([plain, new], 2)
            if tokens:
                got = side.extend("x", tokens, lambda first, new=new, held=held: new[:, :, first - held :])
                assert torch.equal(got, plain)
        elif kind == "crop":
            side.crop(amount)
            plain = plain[:, :, :amount]
        elif kind == "select":
            rows = torch.tensor([amount % plain.shape[0], 0])
            side.select(rows)
            plain = plain[rows]
        elif plain.shape[0] < 16:
            side.repeat(2)
            plain = plain.repeat_interleave(2, 0)
    assert side.length("x") == plain.shape[2]
    if plain.shape[2]:
        assert torch.equal(side.extend("x", plain.shape[2], lambda first: pytest.fail("nothing lacks")), plain)


def test_appending_copies_each_token_a_bounded_number_of_times():
    side, copies, buffer = TokenCache(), 0, None
    for token in range(1, 1025):
        side.extend("x", token, lambda first, token=token: torch.zeros(1, 1, token - first, 1))
        if side._buffers["x"] is not buffer:
            copies += token - 1
            buffer = side._buffers["x"]
    assert copies < 2 * 1024


def test_make_gets_the_first_missing_token_and_must_fill_the_rest():
    side = TokenCache()
    side.extend("x", 4, lambda first: torch.zeros(1, 1, 4, 1))
    asked = []
    side.extend("x", 6, lambda first: asked.append(first) or torch.zeros(1, 1, 2, 1))
    assert asked == [4]
    with pytest.raises(AssertionError, match="1 new tokens for 6 -> 9"):
        side.extend("x", 9, lambda first: torch.zeros(1, 1, 1, 1))


def test_names_are_apart_and_reset_frees_them():
    side = TokenCache()
    side.extend("a", 2, lambda first: torch.zeros(1, 1, 2, 1))
    side.extend("b", 3, lambda first: torch.ones(1, 1, 3, 1, dtype=torch.int32))
    assert (side.length("a"), side.length("b")) == (2, 3)
    assert side.nbytes() == 2 * 4 + 3 * 4
    side.reset()
    assert (side.length("a"), side.nbytes()) == (0, 0)


def test_a_crop_keeps_the_pages_that_are_whole():
    side, pages = TokenCache(), torch.rand(1, 1, 5, 2)
    side.extend("tokens", 18, lambda first: torch.rand(1, 1, 18, 2))
    side.extend("pages", 5, lambda first: pages, stride=4)
    side.crop(15)
    assert (side.length("tokens"), side.length("pages")) == (15, 3)
    assert torch.equal(side.extend("pages", 3, lambda first: pytest.fail("nothing lacks"), stride=4), pages[:, :, :3])
    side.reset()
    side.extend("pages", 5, lambda first: pages)
    side.crop(4)
    assert side.length("pages") == 4


def test_what_is_filled_in_place_is_held_once_written():
    side, total = TokenCache(), torch.rand(2, 3, 300, 1)
    side.extend("x", 5, lambda first: total[:, :, :5])
    for tokens in range(6, 300):
        before = side._buffers["x"]

        def write(tensor, tokens=tokens):
            assert side.length("x") == tokens - 1
            assert torch.equal(tensor[:, :, : tokens - 1], total[:, :, : tokens - 1])
            assert tensor.stride(1) % 64 == 0
            tensor[:, :, tokens - 1 :] = total[:, :, tokens - 1 : tokens]
            return tokens

        assert side.fill("x", tokens, write) == tokens
        assert side.length("x") == tokens
        room = before.shape[2]
        assert (side._buffers["x"] is before) == (tokens <= room)
    assert torch.equal(side.extend("x", 299, None), total[:, :, :299])


def test_a_failed_fill_holds_nothing_new():
    side = TokenCache()
    side.extend("x", 2, lambda first: torch.zeros(1, 1, 2, 1))

    def fail(tensor):
        tensor[:, :, 2:] = 7
        raise ValueError

    with pytest.raises(ValueError):
        side.fill("x", 3, fail)
    assert side.length("x") == 2
    assert side.fill("x", 2, lambda tensor: tensor.shape[2]) == 2
