"""Global memory that a launch leaves as the next one is to find it: messages between the blocks of wide.cu (`Board` of
board.cuh), and the codes that encode.cu hands to the step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable

import torch
from torch import Tensor

#: What its layout depends on, device and bytes; a board in use is also of one stream and one capture.
Place = tuple[Hashable, int | None, int]
_boards: dict[tuple[Place, int, int], Tensor] = {}
_spares: dict[Place, Tensor] = {}


def find_board(library: ctypes.CDLL, device: torch.device, stream: int, rows: int, capacity: int) -> tuple[Tensor, int]:
    """The board of a launch of wide.cu that takes up to `capacity` tokens a row, and its bytes a row."""
    row_bytes = library.board_bytes() + 8 * max(16, 1 << (capacity - 1).bit_length())
    return _find(library, (library._name, row_bytes), device, stream, rows * row_bytes), row_bytes


def find_codes(library: ctypes.CDLL, device: torch.device, stream: int, words: int) -> Tensor:
    """So many int64 zeros for words of codes, of the least power of 2 that holds them; the step that takes them leaves
    zeros.
    """
    return _find(library, "codes", device, stream, 8 << (words - 1).bit_length()).view(torch.int64)[:words]


def _find(library: ctypes.CDLL, layout: Hashable, device: torch.device, stream: int, count: int) -> Tensor:
    """Bytes that are zero at first. No two launches that may run at the same time share them: every stream and every
    captured graph has its own.
    """
    library.capture_id.restype = ctypes.c_ulonglong
    capture = library.capture_id(ctypes.c_void_p(stream))
    place = (layout, device.index, count)
    key = (place, stream, capture)
    if key not in _boards:
        # Zeroing memory while a graph is captured would be a node of the graph: a spare was zeroed before.
        spare = _spares.pop(place, None) if capture else None
        _boards[key] = _zeros(count, device) if spare is None else spare
    if not capture and place not in _spares:
        _spares[place] = _zeros(count, device)
        torch.cuda.current_stream(device).synchronize()
    return _boards[key]


def _zeros(count: int, device: torch.device) -> Tensor:
    return torch.zeros(count, dtype=torch.uint8, device=device)
