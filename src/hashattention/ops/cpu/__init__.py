"""Native CPU kernels (AVX-512, AVX2 or plain C++, chosen at run time); without them, numpy and torch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hashattention.ops.shapes import mixture_in

logger = logging.getLogger(__name__)

MISSING: str | None = None
try:
    # torch is imported above: its OpenMP library is the one the kernels then use, so there is one pool of threads.
    from hashattention.ops.cpu import native
    from hashattention.ops.cpu.native import (
        add_remainder,
        attend,
        decode,
        decode_step,
        encode_query,
        encode_signature,
        score,
        score_select,
        select,
        write_signature,
    )
except ImportError as error:
    MISSING = str(error)
    from hashattention.ops.cpu.fallback import score, score_select, select

__all__ = [
    "MISSING",
    "add_remainder",
    "attend",
    "decode",
    "decode_step",
    "describe",
    "encode_query",
    "encode_signature",
    "refuse",
    "score",
    "score_select",
    "select",
    "write_signature",
]


def refuse(op: str, tensor: Tensor, arguments: Mapping[str, Any]) -> str | None:
    """Why these kernels cannot run `op` on tensors like `tensor`, or None."""
    if tensor.device.type != "cpu":
        return f"needs a CPU tensor, given one on {tensor.device.type}"
    if MISSING is not None:
        _say_once()
        return _refuse_fallback(tensor, arguments)
    if op == "decode_step" and arguments.get("mask") is not None:
        return "a mask with holes is left to decode"
    caches = [arguments[name] for name in ("k", "v") if arguments.get(name) is not None]
    for cache in caches:
        if cache.dtype not in native.DTYPES or cache.stride(-1) != 1:
            return f"needs K and V in float32, bfloat16 or float16 with adjacent values, given {cache.dtype}"
    if op in ("attend", "decode", "decode_step") and tensor.dtype not in native.DTYPES:
        return f"needs queries in float32, bfloat16 or float16, given {tensor.dtype}"
    return None


def describe() -> str:
    """The instruction set in use, or what stands in for the native kernels."""
    return "numpy" if MISSING is not None else native.instruction_set()


def _refuse_fallback(tensor: Tensor, arguments: Mapping[str, Any]) -> str | None:
    if mixture_in(tensor, arguments) > 1:
        return "without native kernels a mixture of codes is left to torch"
    # Only integers have room for a position beside the score.
    return (
        None if tensor.dtype in (torch.int32, torch.int8) else f"without native kernels {tensor.dtype} is left to torch"
    )


@functools.cache
def _say_once() -> None:
    logger.warning(
        "the native CPU kernels are not installed (%s): numpy and torch stand in, several times slower. "
        "Install again with a C++17 compiler present: pip install --force-reinstall --no-deps hashattention",
        MISSING,
    )
