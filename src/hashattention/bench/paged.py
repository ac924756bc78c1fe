"""FlashInfer's paged decode, a dense baseline, where it is installed; it is no dependency."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from hashattention.bench.cases import Inputs

PAGE = 16
#: What FlashInfer advises for its split parts.
WORKSPACE_BYTES = 256 * 2**20


def refuse(inputs: Inputs) -> str | None:
    """Why FlashInfer cannot run here, or None."""
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer: not installed"
    if inputs.case.context % PAGE:
        return f"flashinfer: {inputs.case.context} tokens are no whole pages of {PAGE}"
    return None


def version() -> str | None:
    """FlashInfer's version, if it is installed."""
    try:
        return importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        return None


def pages_of(cache: Tensor) -> Tensor:
    """A cache ``[B, H, T, D]`` as pages ``[P, H, N, D]``, request after request."""
    return cache.unflatten(2, (-1, PAGE)).transpose(1, 2).flatten(0, 1).contiguous()


def prepare(inputs: Inputs, tensor_cores: bool) -> Callable[[], Tensor]:
    """The planned wrapper's `run`; planning is not timed, and the pages of a request lie in order."""
    flashinfer = importlib.import_module("flashinfer")
    batch, heads, tokens, dim = inputs.k.shape
    count, device = tokens // PAGE, inputs.k.device
    pages = pages_of(inputs.k), pages_of(inputs.v)
    pointers = torch.arange(batch + 1, dtype=torch.int32, device=device) * count
    order = torch.arange(batch * count, dtype=torch.int32, device=device)
    last = torch.full((batch,), PAGE, dtype=torch.int32, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device),
        "HND",
        use_cuda_graph=True,
        use_tensor_cores=tensor_cores,
        paged_kv_indptr_buffer=pointers.clone(),
        paged_kv_indices_buffer=order.clone(),
        paged_kv_last_page_len_buffer=last.clone(),
        backend="fa2",
    )
    kinds = {"q_data_type": inputs.q.dtype, "kv_data_type": inputs.k.dtype, "sm_scale": inputs.scale}
    wrapper.plan(pointers, order, last, inputs.q.shape[1], heads, dim, PAGE, **kinds)
    query = inputs.q.squeeze(2)
    return lambda: wrapper.run(query, pages).unsqueeze(2)
