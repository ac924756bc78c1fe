"""Which backend runs an op, and why.

A backend is a module with one function per op it has (same name and arguments as in `reference`) and a function
``refuse(op, tensor, arguments) -> str | None`` that gives the reason it cannot run a call. ``"auto"`` takes the first
of `MODULES` without a reason and logs the choice once; a backend asked for by name that cannot run raises with every
reason.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hashattention.errors import BackendError

logger = logging.getLogger(__name__)

#: Backend name -> module, best first. `reference` runs everything everywhere.
MODULES = {
    "cuda": "hashattention.ops.cuda",
    "triton": "hashattention.ops.triton",
    "cpu": "hashattention.ops.cpu",
    "reference": "hashattention.ops.reference",
}


#: Backends that have whole steps and not all the parts to make them of.
FUSED_ONLY = frozenset({"cuda"})
#: Backends that an automatic choice takes for CUDA tensors alone, and does not import for others.
CUDA_ONLY = frozenset({"cuda", "triton"})


def refusal(backend: str, op: str, tensor: Tensor, arguments: Mapping[str, Any]) -> str | None:
    """Why `backend` cannot run `op` on tensors like `tensor` (device, dtype) with these other arguments, or None if it
    can.
    """
    if backend == "reference":
        return None
    if backend in CUDA_ONLY and tensor.device.type != "cuda" and not arguments.get("named"):
        return f"needs a CUDA tensor, given one on {tensor.device.type}"
    try:
        module = importlib.import_module(MODULES[backend])
    except ImportError as error:
        return f"not importable ({error})"
    if not hasattr(module, op):
        return f"has no {op}"
    reason: str | None = module.refuse(op, tensor, arguments)
    return reason


@functools.cache
def _log_once(op: str, device: str, backend: str, reasons: str) -> None:
    logger.info("%s on %s: backend %s%s", op, device, backend, f" ({reasons})" if reasons else "")


def find(op: str, tensor: Tensor, backend: str = "auto", **arguments: Any) -> Callable[..., Any]:
    """The function that runs `op` for tensors like `tensor`.

    Raises
    ------
    BackendError
        If `backend` is unknown, or named and unable to run this call; the message holds the reason and the choices.
    """
    if backend != "auto" and backend not in MODULES:
        raise BackendError(f"unknown backend {backend!r}; known: auto, {', '.join(MODULES)}.")
    reasons: list[str] = []
    arguments["named"] = backend != "auto"
    for name in MODULES if backend == "auto" else (backend,):
        reason = refusal(name, op, tensor, arguments)
        if reason is None:
            if backend == "auto":
                _log_once(op, tensor.device.type, name, "; ".join(reasons))
            function: Callable[..., Any] = getattr(importlib.import_module(MODULES[name]), op)
            return function
        reasons.append(f"{name}: {reason}")
    raise BackendError(
        f"backend {backend!r} cannot run {op} on {tensor.device}: {'; '.join(reasons)}. Use backend='auto'."
    )


def find_fused(op: str, tensor: Tensor, backend: str = "auto", **arguments: Any) -> Callable[..., Any] | None:
    """The first backend's single function for an `op` that is else made of other ops, or None: then make it of them."""
    arguments["named"] = backend != "auto"
    if backend in FUSED_ONLY and (reason := refusal(backend, op, tensor, arguments)) is not None:
        raise BackendError(f"backend {backend!r} cannot run {op} on {tensor.device}: {reason}. Use backend='auto'.")
    for name in MODULES if backend == "auto" else (backend,):
        if name != "reference" and name in MODULES and refusal(name, op, tensor, arguments) is None:
            if backend == "auto":
                _log_once(op, tensor.device.type, name, "")
            function: Callable[..., Any] = getattr(importlib.import_module(MODULES[name]), op)
            return function
    return None
