"""Roofline: the bytes a method must move, and the copy bandwidth this machine shows."""

from __future__ import annotations

import time

import torch

from hashattention.bench import paper
from hashattention.bench.cases import Inputs

#: Bytes of the copied buffer: beyond every cache.
COPY_BYTES = 256 * 2**20


def bytes_of(method: str, kind: str, inputs: Inputs) -> int:
    """Bytes `method` must read at least once: caches, signatures, maps; queries and outputs are small beside them."""
    itemsize = inputs.k.element_size()
    batch, heads, tokens, dim = inputs.k.shape
    row = 2 * dim * itemsize
    signatures = inputs.signatures.nbytes
    both = *inputs.weights, *inputs.biases, *inputs.key_weights, *inputs.key_biases
    maps = sum(tensor.nbytes for tensor in both)
    selected = batch * heads * inputs.capacity * row
    if kind == "paper":
        return paper.bytes_moved(inputs)
    if kind == "dense":
        return batch * heads * tokens * row
    parts = {"encode": maps, "score+select": signatures, "attend": selected}
    if kind == "ours":
        return sum(parts.values())
    return parts.get(method.split(",")[0], selected)


def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes a second that a copy reads and writes with the threads torch now uses; the best of 7 on a CPU and of 100 on
    a GPU, where the first are slower.
    """
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(100 if source.is_cuda else 7):
        if source.is_cuda:
            torch.cuda.synchronize()
        before = time.perf_counter()
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - before)
    return 2 * COPY_BYTES / best
