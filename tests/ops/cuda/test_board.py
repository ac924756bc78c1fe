from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hashattention.ops.cuda import board

CPU = torch.device("cpu")


class Library:
    """A library of the wide step as `find_board` asks it; `captures`: the stream's number -> its capture, 0: none."""

    def __init__(self, name: str = "wide") -> None:
        self._name, self.captures = name, dict[int, int]()
        self.capture_id = _Function(lambda stream: self.captures.get(stream.value, 0))
        self.board_bytes = _Function(lambda: 1000)


class _Function:
    """What ctypes gives for a name: callable, and open to a `restype`."""

    def __init__(self, call) -> None:
        self.call, self.restype = call, None

    def __call__(self, *given):
        return self.call(*given)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No boards from before and no device to wait for; the sizes that are zeroed."""
    zeroed, zeros = list[int](), board._zeros
    monkeypatch.setattr(board, "_boards", {})
    monkeypatch.setattr(board, "_spares", {})
    monkeypatch.setattr(board, "_zeros", lambda count, device: zeroed.append(count) or zeros(count, device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(synchronize=lambda: None))
    return zeroed


def test_a_stream_keeps_its_board_and_shares_it_with_no_other() -> None:
    library = Library()
    first, row = board.find_board(library, CPU, 7, 8, 1000)
    assert row == 1000 + 8 * 1024 and len(first) == 8 * row and not first.any()
    assert board.find_board(library, CPU, 7, 8, 1024)[0] is first
    others = [
        board.find_board(library, CPU, 9, 8, 1000)[0],
        board.find_board(library, CPU, 7, 4, 1000)[0],
        board.find_board(library, CPU, 7, 8, 1025)[0],
        board.find_board(Library("other"), CPU, 7, 8, 1000)[0],
    ]
    assert len({each.data_ptr() for each in [first, *others]}) == 5


def test_every_capture_has_a_board_of_its_own_and_zeroes_none_after_an_eager_step(alone: list[int]) -> None:
    library = Library()
    eager, _ = board.find_board(library, CPU, 7, 8, 1000)
    before = len(alone)
    library.captures[7] = 1
    captured, _ = board.find_board(library, CPU, 7, 8, 1000)
    assert captured is not eager and len(alone) == before
    assert board.find_board(library, CPU, 7, 8, 1000)[0] is captured
    # An eager step makes the next capture's spare.
    library.captures[7] = 0
    assert board.find_board(library, CPU, 7, 8, 1000)[0] is eager
    before = len(alone)
    library.captures[7] = 2
    assert board.find_board(library, CPU, 7, 8, 1000)[0] is not captured
    assert len(alone) == before


def test_a_capture_without_an_eager_step_zeroes_its_own() -> None:
    library = Library()
    library.captures[7] = 5
    found, _ = board.find_board(library, CPU, 7, 2, 10)
    assert not found.any()


def test_codes_are_found_as_they_were_left_whatever_they_are_words_of() -> None:
    library = Library("encode")
    words = board.find_codes(library, CPU, 7, 40)
    assert words.dtype == torch.int64 and words.shape == (40,) and not words.any()
    assert board.find_codes(Library("encode of other maps"), CPU, 7, 40).data_ptr() == words.data_ptr()
    assert board.find_codes(library, CPU, 7, 64).data_ptr() == words.data_ptr()
    others = board.find_codes(library, CPU, 9, 40), board.find_codes(library, CPU, 7, 65)
    assert len({each.data_ptr() for each in (words, *others)}) == 3
