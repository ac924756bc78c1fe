"""Buffers of long caches: like any other tensor, on large pages where the system has them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from hashattention.ops import buffer


@pytest.mark.parametrize("shape", [(0,), (1, 2, 3), (1, 2, 30_000, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_like_the_other_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = buffer.allocate(torch.zeros(3, dtype=dtype), shape)
    assert (tuple(made.shape), made.dtype, made.is_contiguous()) == (shape, dtype, True)
    made.fill_(1)
    assert made.float().sum() == made.numel()


def test_no_memory_no_advice() -> None:
    assert buffer.allocate(torch.zeros(1, device="meta"), (10_000, 10_000)).device.type == "meta"


@pytest.mark.skipif(not buffer.has_large_pages(), reason="this system gives no large pages")
def test_a_long_buffer_lies_on_large_pages() -> None:
    made = buffer.allocate(torch.zeros(1), (16 * 2**20,))
    made.fill_(1)
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        first, last = (int(word, 16) for word in entry.split(" ", 1)[0].split("-"))
        if first <= made.data_ptr() + 8 * 2**20 < last:
            # "hg": the advice was taken; whether pages are free at this moment is the system's matter.
            assert re.search(r"^VmFlags:.*\bhg\b", entry, re.MULTILINE)
            return
    raise AssertionError("the buffer is in no mapping")
