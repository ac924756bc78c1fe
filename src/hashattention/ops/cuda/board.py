"""Global memory over which the blocks of a launch of wide.cu exchange messages (`Board` of board.cuh)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

#: Library, device, rows, bytes a row; a board in use is also of one stream and one capture.
Place = tuple[str, int | None, int, int]
_boards: dict[tuple[Place, int, int], Tensor] = {}
_spares: dict[Place, Tensor] = {}


def find_board(library: ctypes.CDLL, device: torch.device, stream: int, rows: int, capacity: int) -> tuple[Tensor, int]:
    """The board of a launch that takes up to `capacity` tokens a row, and its bytes a row.

    It is zero at first and stays as a launch left it. No two launches that may run at the same time share one: every
    stream and every captured graph has its own.
    """
    library.capture_id.restype = ctypes.c_ulonglong
    capture = library.capture_id(ctypes.c_void_p(stream))
    row_bytes = library.board_bytes() + 8 * max(16, 1 << (capacity - 1).bit_length())
    place = (library._name, device.index, rows, row_bytes)
    key = (place, stream, capture)
    if key not in _boards:
        # Zeroing memory while a graph is captured would be a node of the graph: a spare was zeroed before.
        spare = _spares.pop(place, None) if capture else None
        _boards[key] = _zeros(rows * row_bytes, device) if spare is None else spare
    if not capture and place not in _spares:
        _spares[place] = _zeros(rows * row_bytes, device)
        torch.cuda.current_stream(device).synchronize()
    return _boards[key], row_bytes


def _zeros(count: int, device: torch.device) -> Tensor:
    return torch.zeros(count, dtype=torch.uint8, device=device)
