"""Counters by which the last program to finish a task knows that it is: zero before a launch and after it.

No launch clears them; a counter's last user sets it back. Launches may share counters only where one ends before the
next starts: each stream has some for all of its launches, and each captured launch, which may be replayed on any
stream, some that nothing else will ever use.
"""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

#: Counters of a device (8 MB; a captured layer takes at most 660), and those of a stream: more than a launch asks for.
COUNTERS, A_STREAM = 2**21, 1024


class _Arena:
    """A device's counters, handed out from the front."""

    def __init__(self, device: torch.device) -> None:
        # A thread of its own: memory made under a graph's pool by the calling one would be given to others later.
        thread = threading.Thread(target=self._allocate, args=(device,))
        thread.start()
        thread.join()
        self.of_stream: dict[int, Tensor] = {}

    def _allocate(self, device: torch.device) -> None:
        self.free = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        if device.type == "cuda":
            # Once: whichever stream comes first must find them at zero.
            torch.cuda.current_stream(device).synchronize()

    def cut(self, count: int) -> Tensor:
        """`count` counters that nothing else has; fewer if there are not so many left."""
        size = -(-count // 4) * 4
        cut, self.free = self.free[:count], self.free[size:]
        return cut

    def shared(self, stream: int) -> Tensor:
        """The counters of a stream."""
        if stream not in self.of_stream:
            self.of_stream[stream] = self.cut(A_STREAM)
        return self.of_stream[stream]


_arena = functools.cache(_Arena)
_ready: set[torch.device] = set()


def take(count: int, device: torch.device) -> Tensor:
    """int32 zeros ``[count]`` for one launch, which leaves them at zero."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if not capturing:
        _ready.add(device)
    if device in _ready:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        held = _arena(device).cut(count) if capturing else _arena(device).shared(stream)[:count]
        if len(held) == count:
            return held
    # None to spare: the launch's own, cleared by another launch.
    return torch.zeros(count, dtype=torch.int32, device=device)
