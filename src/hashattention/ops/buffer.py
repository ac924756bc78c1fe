"""Memory for long caches: on large pages where the system gives them."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

#: Bytes from which a buffer asks for large pages, and of one such page.
LARGE, PAGE = 4 * 2**20, 2 * 2**20
#: Where Linux says who gets them: all, those who ask, or nobody; and the number of that advice.
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MADV_HUGEPAGE = 14


def allocate(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised tensor of `shape`, in the dtype and on the device of `like`, for a cache that is about to be
    filled.

    The selected rows of a long cache lie on as many small pages as there are rows, and a processor must find each.

    Examples
    --------
    >>> import torch
    >>> allocate(torch.ones(1, dtype=torch.bfloat16), (2, 3)).shape
    torch.Size([2, 3])
    """
    buffer = like.new_empty(shape)
    # A fake tensor has no memory to speak of.
    if buffer.device.type == "cpu" and buffer.nbytes >= LARGE and type(buffer) is Tensor and has_large_pages():
        first = -(-buffer.data_ptr() // PAGE) * PAGE
        last = (buffer.data_ptr() + buffer.nbytes) // PAGE * PAGE
        # Advice: a system that does not take it loses nothing.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_HUGEPAGE)
    return buffer


def has_large_pages() -> bool:
    """Whether this system gives large pages to buffers that ask."""
    return sys.platform == "linux" and SETTING.exists() and "[never]" not in SETTING.read_text()
