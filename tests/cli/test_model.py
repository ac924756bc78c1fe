from __future__ import annotations

import pytest
import torch

from hashattention.cli.model import parse_device, parse_dtype
from hashattention.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        (None, "cpu", torch.float32),
        (None, "cuda:1", None),
        ("bfloat16", "cpu", torch.bfloat16),
        ("float16", "cuda", torch.float16),
    ],
)
def test_dtypes(name: str | None, device: str, dtype: torch.dtype | None) -> None:
    assert parse_dtype(name, device) is dtype


def test_an_unknown_dtype_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="one of float32, bfloat16, float16; given 'fp32'"):
        parse_dtype("fp32", "cpu")


def test_a_device_that_is_there_and_one_that_is_not() -> None:
    assert parse_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="device 'toaster' cannot be used"):
        parse_device("toaster")
