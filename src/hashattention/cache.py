"""Per-token tensors beside K and V of one layer (signatures, page summaries, ...), kept in step with crops and
beams.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

from hashattention.ops.buffer import allocate

Result = TypeVar("Result")
#: Room is a multiple of this many tokens, so that rows start where wide loads may.
ROOM = 64


def can_write(buffer: Tensor) -> bool:
    """Whether torch lets this code write into `buffer`: one made in inference mode is closed outside of it."""
    return torch.is_inference_mode_enabled() or not buffer.is_inference()


@dataclasses.dataclass(frozen=True)
class Memory:
    """Entries held by name, and copies of them where they may change."""

    lengths: dict[Hashable, int]
    contents: dict[Hashable, Tensor]


class TokenCache:
    """Side tensors ``[B, H, T, ...]`` by name, grown on demand: appending one token costs no copy of the others.

    Examples
    --------
    >>> side = TokenCache()
    >>> side.extend("ones", 3, lambda first: torch.ones(1, 1, 3 - first, 2)).shape
    torch.Size([1, 1, 3, 2])
    >>> side.crop(2)
    >>> side.length("ones")
    2
    """

    def __init__(self) -> None:
        self._buffers: dict[Hashable, Tensor] = {}
        self._lengths: dict[Hashable, int] = {}
        self._strides: dict[Hashable, int] = {}

    def length(self, name: Hashable) -> int:
        """Entries held under `name`: tokens, or pages of `stride` tokens."""
        return self._lengths.get(name, 0)

    def held(self, name: Hashable) -> Tensor:
        """All entries held under `name`, of which there must be some, ``[B, H, length, ...]``."""
        return self._buffers[name][:, :, : self._lengths[name]]

    def extend(self, name: Hashable, tokens: int, make: Callable[[int], Tensor], stride: int = 1) -> Tensor:
        """The tensor under `name` for the first `tokens` tokens; ``make(first)`` gives those from `first` on if some
        lack. An entry may stand for a page of `stride` tokens: a crop keeps the pages that are still whole.
        """
        held = self.length(name)
        self._strides[name] = stride
        if held < tokens:
            self._append(name, make(held), tokens)
        return self._buffers[name][:, :, :tokens]

    def fill(self, name: Hashable, tokens: int, write: Callable[[Tensor], Result]) -> Result:
        """``write(tensor)`` writes in place what lacks up to `tokens` of the tensor under `name`, which must hold some
        already; they are held once it has returned, with its result.
        """
        result = write(self._reserve(name, self._buffers[name], tokens)[:, :, :tokens])
        self._lengths[name] = max(tokens, self.length(name))
        return result

    def _append(self, name: Hashable, new: Tensor, tokens: int) -> None:
        held = self.length(name)
        assert new.shape[2] == tokens - held, f"{name}: {new.shape[2]} new tokens for {held} -> {tokens}"
        self._reserve(name, new, tokens)[:, :, held:tokens] = new
        self._lengths[name] = tokens

    def _reserve(self, name: Hashable, like: Tensor, tokens: int) -> Tensor:
        """The buffer under `name`, with room for `tokens` and open to writing."""
        buffer, held = self._buffers.get(name), self.length(name)
        if buffer is None or buffer.shape[2] < tokens or not can_write(buffer):
            # A first fill is exact; later growth doubles, so that decoding copies each token O(1) times.
            room = tokens if buffer is None else -(-max(tokens, 2 * held) // ROOM) * ROOM
            grown = allocate(like, (*like.shape[:2], room, *like.shape[3:]))
            if buffer is not None:
                grown[:, :, :held] = buffer[:, :, :held]
            buffer = self._buffers[name] = grown
        return buffer

    def remember(self, contents: bool) -> Memory:
        """What `recall` goes back to: how much is held now, and with `contents` a copy of it (without one, what is held
        must not be written meanwhile).
        """
        held = self._buffers.items() if contents else ()
        return Memory(dict(self._lengths), {name: buffer[:, :, : self.length(name)].clone() for name, buffer in held})

    def recall(self, memory: Memory) -> bool:
        """Back to the moment of `memory`, in the same buffers; behind a copy that it holds they are 0.

        False if some buffers were made since; they are dropped.
        """
        later = self._buffers.keys() - memory.lengths.keys()
        for name in later:
            del self._buffers[name], self._strides[name]
        self._lengths = dict(memory.lengths)
        for name, held in memory.contents.items():
            self._buffers[name][:, :, : held.shape[2]] = held
            self._buffers[name][:, :, held.shape[2] :] = 0
        return not later

    def advance(self, tokens: int) -> None:
        """Count the entries of the first `tokens` tokens as held: somebody wrote them in place."""
        for name, buffer in self._buffers.items():
            self._lengths[name] = min(tokens // self._strides[name], buffer.shape[2])

    def crop(self, tokens: int) -> None:
        """Forget every token from position `tokens` on."""
        self._lengths = {name: min(length, tokens // self._strides[name]) for name, length in self._lengths.items()}

    def select(self, requests: Tensor) -> None:
        """Keep (or reorder, or repeat) the batch rows `requests` int64 ``[B']``."""
        self._buffers = {name: buffer[requests.to(buffer.device)] for name, buffer in self._buffers.items()}

    def narrow(self, requests: Tensor) -> TokenCache:
        """A cache of its own for the batch rows `requests` int64 ``[B']``; this one stays as it is."""
        other = TokenCache()
        other._buffers = {name: buffer[requests] for name, buffer in self._buffers.items()}
        other._lengths, other._strides = dict(self._lengths), dict(self._strides)
        return other

    def repeat(self, times: int) -> None:
        """Repeat every batch row `times` times, interleaved."""
        self._buffers = {name: buffer.repeat_interleave(times, dim=0) for name, buffer in self._buffers.items()}

    def reset(self) -> None:
        """Forget everything."""
        self._buffers.clear()
        self._lengths.clear()
        self._strides.clear()

    def to(self, device: torch.device | str) -> None:
        """Move every tensor to `device`."""
        self._buffers = {name: buffer.to(device, non_blocking=True) for name, buffer in self._buffers.items()}

    def nbytes(self) -> int:
        """Bytes held, spare room included."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
