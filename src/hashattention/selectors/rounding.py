"""Rounding of short vectors to few bits, as Double Sparsity's labels and quantised Quest pages keep them."""

from __future__ import annotations

from torch import Tensor

from hashattention.errors import ConfigError

#: Bits of an unrounded channel, and of the minimum and the step that a rounded vector carries.
FULL, OVERHEAD = 16, 32


def check_bits(bits: int) -> None:
    """Raise `ConfigError` unless `bits` is 1 to 8, or 16 (not rounded)."""
    if bits not in (*range(1, 9), FULL):
        raise ConfigError(f"bits must be 1 to 8, or 16 for labels that are not rounded; given {bits!r}.")


def round_to_bits(vectors: Tensor, bits: int) -> Tensor:
    """Vectors ``[..., D]`` on a uniform grid of ``2 ** bits`` levels from their minimum to their maximum, dequantised
    to float32; 16 bits: unchanged.
    """
    if bits == FULL:
        return vectors
    vectors = vectors.float()
    lowest = vectors.amin(-1, keepdim=True)
    spread = vectors.amax(-1, keepdim=True) - lowest
    levels = 2**bits - 1
    codes = ((vectors - lowest) / spread.masked_fill(spread == 0, 1.0) * levels).round()
    return lowest + codes * (spread / levels)


def vector_bits(channels: int, bits: int) -> int:
    """Bits of one vector as it would be packed: its codes and, if rounded, minimum and step in 16 bits each."""
    return channels * bits + (0 if bits == FULL else OVERHEAD)
