"""Shape, dtype and device checks whose message names the tensor, what it is and what it must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hashattention.errors import InputError

#: Sums, lengths and coefficients, as `ops.add_remainder` takes them.
Remainder = tuple[Tensor, Tensor, Tensor]


def expect(sizes: dict[str, int], name: str, tensor: Tensor, shape: str, *dtypes: torch.dtype) -> None:
    """Check `tensor` against a shape such as ``"B Hq 1 D"`` and bind new letters in `sizes`.

    Raises
    ------
    InputError
        If the rank, a size bound before, a literal size or the dtype differs.
    """
    wanted = shape.split()
    if tensor.dim() != len(wanted):
        raise InputError(f"{_say(name, tensor)}; expected [{', '.join(wanted)}], {len(wanted)} dimensions.")
    if dtypes and tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(f"{_say(name, tensor)}; expected dtype {allowed}.")
    for letter, size in zip(wanted, tensor.shape, strict=True):
        known = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
        if size != known:
            bound = ", ".join(f"{key}={value}" for key, value in sizes.items())
            expected = f"expected [{', '.join(wanted)}] with {bound}: size {letter} must be {known}."
            raise InputError(f"{_say(name, tensor)}; {expected}")


def _say(name: str, tensor: Tensor) -> str:
    # Only where it is needed: these checks run at every step.
    return f"{name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def expect_multiple(many: int, few: int, meaning: str) -> None:
    """Raise `InputError` unless `many` is a positive multiple of `few`."""
    if few <= 0 or many <= 0 or many % few:
        raise InputError(f"{meaning}: {many} is not a positive multiple of {few}.")


def expect_same_device(**tensors: Tensor | None) -> None:
    """Raise `InputError` unless all given tensors lie on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise InputError(f"all tensors must be on one device; given {places}.")


def mixture_of(code: Tensor, words: int) -> int:
    """How many codes are mixed in one, for signatures of so many words; a bit code is one."""
    return max(1, code.shape[-1] // (32 * words)) if code.dtype == torch.int8 else 1


def mixture_in(tensor: Tensor, arguments: Mapping[str, Any]) -> int:
    """Codes that are mixed in one, in the call that `dispatch.find` was asked about: in its code, or in what its map
    would make.
    """
    words, weights = arguments.get("signatures", tensor).shape[-1], arguments.get("weights")
    if arguments.get("code") is not None:
        return mixture_of(arguments["code"], words)
    return max(1, weights[-1].shape[-1] // (32 * words)) if weights and "signatures" in arguments else 1
