"""Triton kernels: the portable GPU backend. With ``TRITON_INTERPRET=1`` it runs on CPU tensors too, when asked for
by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from hashattention.ops.shapes import mixture_in
from hashattention.ops.triton.attend import attend
from hashattention.ops.triton.decode import decode, decode_step
from hashattention.ops.triton.encode import LAST_STAGE_BYTES, encode_query, encode_signature, write_signature
from hashattention.ops.triton.logits import logits
from hashattention.ops.triton.pool import pool
from hashattention.ops.triton.remainder import add_remainder
from hashattention.ops.triton.score import score
from hashattention.ops.triton.select import MOST_LEVELS, levels_of, score_select
from hashattention.ops.triton.select_scores import select

__all__ = [
    "add_remainder",
    "attend",
    "decode",
    "decode_step",
    "encode_query",
    "encode_signature",
    "logits",
    "pool",
    "refuse",
    "score",
    "score_select",
    "select",
    "write_signature",
]


def refuse(op: str, tensor: Tensor, arguments: Mapping[str, Any]) -> str | None:
    """Why these kernels cannot run `op` on tensors like `tensor`, or None."""
    reason = _refuse_device(tensor, arguments.get("named", False))
    if reason is None and tensor.numel() == 0:
        reason = "empty tensors are left to the reference"
    if reason is None:
        reason = _refuse_cache(tensor, arguments.get("k"))
    if reason is None and arguments.get("mask") is not None:
        reason = "a mask with holes is not supported"
    for name in ("weights", "key_weights"):
        if reason is None and arguments.get(name):
            reason = _refuse_map(arguments[name])
    if reason is None and op == "decode_step" and mixture_in(tensor, arguments) > 1:
        reason = "a mixture's map ends wider than the new key's, which is signed in a launch of its own"
    if reason is None and op in ("score_select", "decode", "decode_step") and "selection_heads" in arguments:
        reason = _refuse_levels(tensor, arguments)
    return reason


def _refuse_device(tensor: Tensor, named: bool) -> str | None:
    if tensor.device.type == "cuda":
        return (
            None
            if torch.cuda.get_device_capability(tensor.device) >= (8, 0)
            else "needs compute capability 8.0 or newer"
        )
    if tensor.device.type == "cpu" and triton.knobs.runtime.interpret:
        return None if named else "the interpreter is for tests; name the backend to use it"
    return f"needs a CUDA tensor, given one on {tensor.device.type}"


def _refuse_cache(tensor: Tensor, k: Tensor | None) -> str | None:
    if k is None or k.dtype != torch.float8_e4m3fn or tensor.device.type != "cuda":
        return None
    newest = torch.cuda.get_device_capability(tensor.device) >= (8, 9)
    return None if newest else "an e4m3 cache needs compute capability 8.9 or newer"


def _refuse_map(weights: list[Tensor]) -> str | None:
    if len(weights) > 3:
        return f"at most 3 stages, given {len(weights)}"
    last = weights[-1].shape[1:].numel() * weights[-1].element_size()
    if len(weights) == 3 and last > LAST_STAGE_BYTES:
        return f"the last stage's weights are {last} bytes a head, at most {LAST_STAGE_BYTES}"
    return None


def _refuse_levels(tensor: Tensor, arguments: Mapping[str, Any]) -> str | None:
    """As many score levels as the call's codes can make must be countable."""
    code, levels = arguments.get("code"), arguments.get("levels", 127)
    bits = 32 * arguments.get("signatures", tensor).shape[-1]
    if code is not None:
        heads, levels = code.shape[1], levels if code.dtype == torch.int8 else 0
    else:
        heads = arguments["weights"][0].shape[0]
    count = levels_of(heads // arguments["selection_heads"], bits, levels, mixture_in(tensor, arguments))
    return None if count <= MOST_LEVELS else f"{count} score levels a row, at most {MOST_LEVELS} are counted"
