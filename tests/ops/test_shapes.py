from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hashattention.errors import InputError
from hashattention.ops import shapes


def test_letters_bind_and_are_kept() -> None:
    sizes = {"B": 2}
    shapes.expect(sizes, "q", torch.zeros(2, 4, 1, 8), "B Hq 1 D", torch.float32, torch.bfloat16)
    assert sizes == {"B": 2, "Hq": 4, "D": 8}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("B H D", r"q is float32 \[2, 4, 1, 8\]; expected \[B, H, D\], 3 dimensions\."),
        ("B H 2 D", r"q is float32 \[2, 4, 1, 8\]; expected \[B, H, 2, D\] with .*: size 2 must be 2\."),
        ("B B 1 D", r"with K=5, B=2: size B must be 2\."),
        ("B K 1 D", r"with K=5, B=2: size K must be 5\."),
    ],
)
def test_a_wrong_shape_names_what_is_given_and_what_must_be(shape: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        shapes.expect({"K": 5}, "q", torch.zeros(2, 4, 1, 8), shape)


def test_the_dtype_is_named_before_a_size_that_follows_from_it() -> None:
    with pytest.raises(InputError, match=r"^code is int64 \[3\]; expected dtype int8 or int32\.$"):
        shapes.expect({"W": 2}, "code", torch.zeros(3, dtype=torch.int64), "W", torch.int8, torch.int32)


@given(st.integers(-4, 40), st.integers(-4, 40))
def test_multiples(many: int, few: int) -> None:
    if few > 0 and many > 0 and many % few == 0:
        shapes.expect_multiple(many, few, "heads")
    else:
        with pytest.raises(InputError, match=rf"^heads: {many} is not a positive multiple of {few}\.$"):
            shapes.expect_multiple(many, few, "heads")


def test_devices_are_named() -> None:
    cpu, meta = torch.zeros(1), torch.zeros(1, device="meta")
    shapes.expect_same_device(q=cpu, k=cpu, mask=None)
    with pytest.raises(InputError, match=r"one device; given q on cpu, k on meta\."):
        shapes.expect_same_device(q=cpu, k=meta, mask=None)


def test_an_input_error_is_a_value_error() -> None:
    assert issubclass(InputError, ValueError)
