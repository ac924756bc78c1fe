"""CUDA C++ kernels for compute capability 9.0: the group code's decode step in one launch or two.

Compiled at first use. They serve maps of one or two hidden layers with one signature, one selection and one code
(or a mixture of 2 or 4) a head; all else falls to the portable kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hashattention.ops.cuda.build import find_compiler
from hashattention.ops.cuda.layout import (
    are_few,
    carveout_of,
    choose,
    choose_fused,
    encode_blocks,
    held_signature,
    remainder_bytes,
    require,
)
from hashattention.ops.cuda.parts import attend, score_select
from hashattention.ops.cuda.step import Map, count_processors, describe, encode, fuses, launch
from hashattention.ops.shapes import Remainder, mixture_in

__all__ = ["attend", "decode", "decode_step", "refuse", "score_select"]

SHORT = (torch.float16, torch.bfloat16)
#: Codes of a query: powers of two are what encode.cu lays its columns out for.
MIXTURES = (1, 2, 4)
#: Entries of a query's codes: the registers of a warp that scores.
MOST_ENTRIES = 256


def refuse(op: str, tensor: Tensor, arguments: Mapping[str, Any]) -> str | None:
    """Why these kernels cannot run `op` on tensors like `tensor`, or None."""
    if tensor.device.type != "cuda":
        return f"needs a CUDA tensor, given one on {tensor.device.type}"
    if torch.cuda.get_device_capability(tensor.device)[0] != 9:
        return "needs compute capability 9.0"
    if find_compiler() is None:
        return "needs nvcc (CUDA_HOME or PATH)"
    if arguments.get("mask") is not None:
        return "a mask with holes is not supported"
    if tensor.numel() == 0:
        return "empty tensors are left to the reference"
    if op in ("score_select", "attend") and not arguments.get("named"):
        return "a part of the step, compiled for those who name it"
    checks = {
        "score_select": (_refuse_pages, _refuse_length, _refuse_code, _refuse_signatures, _refuse_mixture),
        "attend": (_refuse_pages, _refuse_attend),
    }.get(op, (_refuse_pages, _refuse_length, _refuse_mixture, _refuse_map, _refuse_attend, _refuse_signatures))
    return next((reason for check in checks if (reason := check(tensor, arguments))), None)


def _refuse_pages(tensor: Tensor, arguments: Mapping[str, Any]) -> str | None:
    if arguments.get("block_table") is None:
        return None
    caches = {
        "k": arguments.get("k"),
        "signatures": arguments.get("signatures", tensor if "code" in arguments else None),
    }
    for name, cache in caches.items():
        if cache is not None and (cache.shape[2] < 8 or cache.shape[2] & (cache.shape[2] - 1)):
            return f"pages must hold a power of two of at least 8 tokens, {name}'s hold {cache.shape[2]}"
    return None


def _refuse_length(tensor: Tensor, arguments: Mapping[str, Any]) -> str | None:
    signatures, table = arguments.get("signatures", tensor), arguments.get("block_table")
    tokens = signatures.shape[2] * (1 if table is None else table.shape[1])
    known = remainder_bytes(8, 256) if arguments.get("remainder") else 0
    held = choose(0, 1, tokens, arguments["capacity"], 8 * 256, mixture_in(tensor, arguments), known)
    return None if held else f"{tokens} tokens a row are more than a cluster's shared memory holds"


def _refuse_mixture(tensor: Tensor, arguments: Mapping[str, Any]) -> str | None:
    mixture, words = mixture_in(tensor, arguments), arguments.get("signatures", tensor).shape[-1]
    if mixture not in MIXTURES:
        return f"needs a code, or a mixture of 2 or 4, given {mixture}"
    entries = mixture * words * 32
    return None if entries <= MOST_ENTRIES else f"at most {MOST_ENTRIES} entries a query, given {entries}"


def _refuse_attend(q: Tensor, arguments: Mapping[str, Any]) -> str | None:
    k = arguments["k"]
    v = arguments.get("v", k)
    heads = arguments["indices"].shape[1] if "indices" in arguments else arguments["selection_heads"]
    if q.dtype not in SHORT or k.dtype != q.dtype:
        return f"needs q, k and v in fp16 or bf16 alike, given {q.dtype} and {k.dtype}"
    if q.shape[-1] not in (64, 128, 256) or v.shape[-1] != q.shape[-1]:
        return f"needs a head dimension of 64, 128 or 256, the same for v; given {q.shape[-1]} and {v.shape[-1]}"
    if q.shape[1] // heads > 8:
        return f"at most 8 query heads a selection head, given {q.shape[1] // heads}"
    if any(t.stride(-1) != 1 or t.data_ptr() % 16 or any(s % 8 for s in t.stride()[:-1]) for t in (q, k, v)):
        return "rows of q, k and v must be aligned to 16 bytes"
    return None


def _refuse_map(q: Tensor, arguments: Mapping[str, Any]) -> str | None:
    weights, heads = arguments["weights"], arguments["selection_heads"]
    if len(weights) not in (2, 3) or weights[0].shape[0] != heads:
        return "needs a map of 2 or 3 stages with one code a selection head"
    if any(w.dtype != q.dtype or not w.is_contiguous() for w in weights):
        return "needs contiguous weights of the dtype of q"
    widths, mixture = [w.shape[-1] for w in weights], mixture_in(q, arguments)
    if encode_blocks(weights[0].shape[1], 64, widths[:-1], widths[-1] // mixture, mixture) is None:
        return (
            f"needs hidden layers of a multiple of 64 entries that fit a cluster's shared memory, given {widths[:-1]}"
        )
    return None


def _refuse_code(tensor: Tensor, arguments: Mapping[str, Any]) -> str | None:
    code = arguments["code"]
    if code.shape[1] != arguments["selection_heads"]:
        return "needs one code a selection head"
    return None


def _refuse_signatures(tensor: Tensor, arguments: Mapping[str, Any]) -> str | None:
    signatures, levels, code = arguments.get("signatures", tensor), arguments["levels"], arguments.get("code")
    levels = levels if code is None or code.dtype == torch.int8 else 0
    words = signatures.shape[-1]
    if signatures.shape[1] != arguments["selection_heads"]:
        return "needs one signature a selection head"
    if words not in (1, 2, 4):
        return f"needs signatures of 32, 64 or 128 bits, given {words * 32}"
    if words * 32 * max(levels, 1) > 2045:
        return f"{words * 32 * max(levels, 1) + 1} score levels a row, at most 2046 are counted"
    if signatures.stride(2) != words or signatures.data_ptr() % 16 or any(s % 4 for s in signatures.stride()[:2]):
        return "rows of signatures must be dense and aligned to 16 bytes"
    return None


def _align(key: Tensor) -> Tensor:
    """The same rows, copied only if their 16 bytes cannot be read where they are: a slice of a cache can."""
    strides = key.stride()
    aligned = strides[-1] == 1 and key.data_ptr() % 16 == 0 and not any(s % 8 for s in strides[:2])
    return key if aligned else key.contiguous()


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    signatures: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    start: Tensor,
    end: Tensor,
    budgets: Tensor,
    capacity: int,
    levels: int,
    scale: float,
    softcap: float = 0.0,
    block_table: Tensor | None = None,
    new_key: tuple[Tensor, list[Tensor], list[Tensor]] | None = None,
    shape: tuple[int, int] | None = None,
    fused: bool | None = None,
    remainder: Remainder | None = None,
) -> tuple[Tensor, Tensor]:
    """The op `decode`; `new_key` (k ``[B, Hkv, 1, D]``, phi_k's weights and biases) is encoded in the same launch as q.

    Its signature goes to position ``end[b] - 1``. Few rows (requests times selection heads) are one launch, more are
    two: `fused` says which, None as `are_few` has it. `shape` forces (threads, blocks a row) of the second. The
    remainder is added before the output is rounded, by the tokens that were attended to.
    """
    batch, heads = budgets.shape[:2]
    bits = signatures.shape[-1] * 32
    mixture = weights[-1].shape[-1] // bits
    out = torch.empty((*q.shape[:3], v.shape[-1]), dtype=q.dtype, device=q.device)
    logsumexp = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    tokens = signatures.shape[2] * (1 if block_table is None else block_table.shape[1])
    tensors: dict[str, Tensor | None] = {"signatures": signatures, "start": start, "end": end, "budgets": budgets}
    tensors |= {"table": block_table, "q": q, "k": k, "v": v, "out": out, "logsumexp": logsumexp}
    if remainder is not None:
        sums, lengths, coefficients = remainder
        tensors["sums"] = sums if sums.stride(2) == 1 else sums.contiguous()
        tensors |= {"lengths": lengths.contiguous(), "coefficients": coefficients.contiguous()}
    run = functools.partial(
        launch, heads=heads, batch=batch, capacity=capacity, bits=bits, levels=levels, tokens=tokens, tensors=tensors,
        scale=scale, softcap=softcap, mixture=mixture,
    )  # fmt: skip
    if new_key:
        new_key = _align(new_key[0]), *new_key[1:]
    hidden = fuses(q, heads, weights, new_key[1] if new_key else None, mixture)
    x = q.view(batch, heads, 1, -1)
    known = 0 if remainder is None else remainder_bytes(q.shape[1] // heads, q.shape[-1])
    outputs, paged = q.shape[1] // heads * q.shape[-1], block_table is not None
    if hidden and (are_few(heads, batch, tokens, hidden) if fused is None else fused):
        sizes = tokens, capacity, outputs, hidden, bits, q.shape[-1], count_processors(q.device)
        whole = choose_fused(heads, batch, *sizes, mixture, known, paged)
        if whole:
            maps = describe(x, weights, biases), describe(*new_key) if new_key else Map()
            run(3, hidden=hidden, maps=maps, shape=whole)
            return out, logsumexp
    signature = held_signature(tokens, bits, paged)
    chosen = require(
        choose(0, heads * batch, tokens, capacity, outputs, mixture, known, signature, forced=shape), tokens
    )
    fresh = (*new_key, signatures, end, block_table) if new_key else None
    planes = tensors["planes"] = encode(x, weights, biases, levels, mixture, fresh, carveout=carveout_of(chosen))
    try:
        run(0, shape=chosen)
    except BaseException:
        # Nobody takes these codes any more; the memory may be of inference mode.
        with torch.inference_mode():
            planes.zero_()
        raise
    return out, logsumexp


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    signatures: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    start: Tensor,
    end: Tensor,
    budgets: Tensor,
    capacity: int,
    levels: int,
    scale: float,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    block_table: Tensor | None = None,
    remainder: Remainder | None = None,
) -> tuple[Tensor, Tensor]:
    """As the op `decode`."""
    maps = [w.contiguous() for w in weights], [b.float().contiguous() for b in biases]
    table = None if block_table is None else block_table.contiguous()
    rows = start.contiguous(), end.contiguous(), budgets.contiguous()
    return decode_step(
        q.contiguous(), k, v, signatures, *maps, *rows, capacity, levels, scale, softcap, table, remainder=remainder
    )
