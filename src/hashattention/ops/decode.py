"""decode: the whole sparse step of one layer, from the query to its attention output."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from hashattention.errors import BackendError, InputError
from hashattention.ops import dispatch, shapes
from hashattention.ops.attend import attend
from hashattention.ops.encode import check_map, encode_query, encode_signature
from hashattention.ops.select import check_rows, score_select

logger = logging.getLogger(__name__)


def group_queries(q: Tensor, heads: int) -> Tensor:
    """Queries ``[B, Hq, T, D]`` as a map with `heads` heads takes them: concatenated over the Hq / heads queries of
    each.
    """
    shapes.expect({}, "q", q, "B Hq T D")
    batch, query_heads, tokens, dim = q.shape
    shapes.expect_multiple(query_heads, heads, "query heads over map heads")
    if query_heads == heads:
        return q
    grouped = q.unflatten(1, (heads, query_heads // heads)).transpose(2, 3)
    return grouped.reshape(batch, heads, tokens, query_heads // heads * dim)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    signatures: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    start: Tensor,
    end: Tensor,
    budgets: Tensor,
    capacity: int,
    *,
    levels: int = 7,
    scale: float,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    block_table: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Encode the queries, score all signatures, select, attend to the selected tokens.

    The new token's k, v and signature are in the caches already.

    Parameters
    ----------
    q : Tensor, float ``[B, Hq, 1, D]``
    k, v, signatures : Tensor
        Caches, as in `attend` and `score`.
    weights, biases : sequences of Tensor
        phi_q: ``[Hc, in, out]`` and ``[Hc, out]`` a stage; ``in`` is D, or D * Hq / Hc for a group code.
    start, end, budgets, capacity, mask : Tensor, int
        As in `select`; the heads of `budgets` are Hsel.
    levels : int
        Range of the integer query code; 0 for a packed bit code (symmetric score).
    scale, softcap : float
        As in `attend`.
    block_table : Tensor, int32 ``[B, M]``, optional
    backend : str
        ``"auto"`` or a backend's name.

    Returns
    -------
    out : Tensor, dtype of q, ``[B, Hq, 1, Dv]``
    logsumexp : Tensor, float32 ``[B, Hq, 1]``

    Raises
    ------
    InputError
        For shapes or dtypes that do not fit.
    """
    if not 0 <= levels <= 127:
        raise InputError(f"levels is {levels}; expected 0 (bit code) to 127.")
    if not weights:
        raise InputError("weights is empty; a map needs at least one stage.")
    _check(q, k, v, signatures, weights, biases, start, end, budgets, capacity, mask, block_table)
    caches, bounds = (k, v, signatures), (start, end, budgets)
    rest = (capacity, levels, scale, softcap, mask, block_table, backend)
    out, logsumexp = torch.ops.hashattention.decode(q, *caches, list(weights), list(biases), *bounds, *rest)
    return out, logsumexp


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    signatures: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    start: Tensor,
    end: Tensor,
    budgets: Tensor,
    capacity: int,
    mask: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """What encode, select and attend would check: a fused kernel reads memory without asking again."""
    check_map(group_queries(q, weights[0].shape[0]), weights, biases)
    cache = "P {} N {}" if block_table is not None else "B {} T {}"
    sizes = {"W": weights[-1].shape[-1] // 32}
    shapes.expect(sizes, "q", q, "B Hq 1 D", torch.float32, torch.bfloat16, torch.float16)
    shapes.expect(sizes, "k", k, cache.format("Hkv", "D"))
    shapes.expect(sizes, "v", v, cache.format("Hkv", "Dv"), k.dtype)
    shapes.expect(sizes, "signatures", signatures, cache.format("Hs", "W"), torch.int32)
    if block_table is not None:
        shapes.expect(sizes, "block_table", block_table, "B M", torch.int32)
        sizes["T"] = sizes["M"] * sizes["N"]
    check_rows(sizes, start, end, budgets, capacity, mask)
    shapes.expect_multiple(weights[0].shape[0], sizes["Hs"], "code heads over signature heads")
    shapes.expect_multiple(weights[0].shape[0], sizes["Hsel"], "code heads over selection heads")
    shapes.expect_multiple(sizes["Hq"], sizes["Hsel"], "query heads over selection heads")
    shapes.expect_multiple(sizes["Hsel"], sizes["Hkv"], "selection heads over KV heads")
    rows = {"start": start, "end": end, "budgets": budgets, "mask": mask, "block_table": block_table}
    shapes.expect_same_device(q=q, k=k, v=v, signatures=signatures, **rows)


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("the fused step did not run, its parts do: %s", reason)


@torch.library.custom_op(
    "hashattention::decode",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor signatures, Tensor[] weights, Tensor[] biases, Tensor start,"
    " Tensor end, Tensor budgets, int capacity, int levels, float scale, float softcap, Tensor? mask,"
    " Tensor? block_table, str backend) -> (Tensor, Tensor)",
)
def _decode(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    signatures,
    weights,
    biases,
    start,
    end,
    budgets,
    capacity,
    levels,
    scale,
    softcap,
    mask,
    block_table,
    backend,
):
    features = {"k": k, "v": v, "signatures": signatures, "code": None, "weights": weights}
    features |= {"selection_heads": budgets.shape[1], "levels": levels}
    fused = dispatch.find_fused("decode", q, backend, **features, capacity=capacity, mask=mask, block_table=block_table)
    if fused is not None:
        maps = (list(weights), list(biases))
        rest = (capacity, levels, scale, softcap, mask, block_table)
        try:
            return fused(q, k, v, signatures, *maps, start, end, budgets, *rest)
        except BackendError as error:
            if backend != "auto":
                raise
            _warn_once(str(error))
    x = group_queries(q, weights[0].shape[0])
    if levels:
        code, _ = encode_query(x, weights, biases, levels, backend=backend)
    else:
        code = encode_signature(x, weights, biases, backend=backend)
    caches = {"block_table": block_table, "backend": backend}
    indices, counts = score_select(
        code, signatures, start, end, budgets, capacity, mask=mask, levels=levels or 127, **caches
    )
    return attend(q, k, v, indices, counts, scale=scale, softcap=softcap, **caches)


@_decode.register_fake
def _(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    signatures,
    weights,
    biases,
    start,
    end,
    budgets,
    capacity,
    levels,
    scale,
    softcap,
    mask,
    block_table,
    backend,
):
    return q.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty(q.shape[:3], dtype=torch.float32)
