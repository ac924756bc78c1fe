"""decode: the whole sparse step of one layer, from the query to its attention output."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hashattention.errors import BackendError, InputError
from hashattention.ops import dispatch, shapes
from hashattention.ops.attend import attend, check_scales
from hashattention.ops.encode import check_map, encode_query, encode_signature, write_signature
from hashattention.ops.remainder import add_remainder, check_remainder
from hashattention.ops.select import check_rows, score_select
from hashattention.ops.shapes import Remainder

logger = logging.getLogger(__name__)

#: The newest token's key ``[B, Hkv, 1, D]`` and phi_k's weights and biases.
NewKey = tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]


class Call(NamedTuple):
    """The arguments of one step, in the order of the op's schema."""

    q: Tensor
    k: Tensor
    v: Tensor
    signatures: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    start: Tensor
    end: Tensor
    budgets: Tensor
    capacity: int
    levels: int
    scale: float
    softcap: float
    mask: Tensor | None
    block_table: Tensor | None
    v_scale: float
    sums: Tensor | None
    lengths: Tensor | None
    coefficients: Tensor | None
    backend: str

    @property
    def remainder(self) -> Remainder | None:
        """The three tensors of a remainder, or None."""
        if self.sums is None or self.lengths is None or self.coefficients is None:
            return None
        return self.sums, self.lengths, self.coefficients


SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor{} signatures, Tensor[] weights, Tensor[] biases, Tensor start, Tensor end,"
    " Tensor budgets, int capacity, int levels, float scale, float softcap, Tensor? mask, Tensor? block_table,"
    " float v_scale, Tensor? sums, Tensor? lengths, Tensor? coefficients, str backend{}) -> (Tensor, Tensor)"
)


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
    new_key: NewKey | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    remainder: Remainder | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Encode the queries, score all signatures, select, attend to the selected tokens.

    The new token's k and v are in the caches already, and so is its signature unless `new_key` is given.

    Parameters
    ----------
    q : Tensor, float ``[B, Hq, 1, D]``
    k, v, signatures : Tensor
        Caches, as in `attend` and `score`.
    weights, biases : sequences of Tensor
        phi_q: ``[Hc, in, out]`` and ``[Hc, out]`` a stage; ``in`` is D, or D * Hq / Hc for a group code; the last
        ``out`` is the bits of a signature, or M times as many for a mixture of M integer codes.
    start, end, budgets, capacity, mask : Tensor, int
        As in `select`; the heads of `budgets` are Hsel.
    levels : int
        Range of the integer query code; 0 for a packed bit code (symmetric score).
    scale, softcap : float
        As in `attend`.
    block_table : Tensor, int32 ``[B, M]``, optional
    new_key : tuple, optional
        The newest token's key ``[B, Hkv, 1, D]`` and phi_k's weights and biases: its signature is encoded first and
        written to `signatures`, in place, at position ``end[b] - 1`` (a row with end 0 writes nothing).
    k_scale, v_scale : float
        As in `attend`.
    remainder : tuple, optional
        Sums float32 ``[B, Hkv, D + Dv + 1]``, lengths int32 ``[B]`` (how many tokens each row may select from) and
        coefficients float32 ``[Hq, 3]``: the output is what `add_remainder` makes of it, with one rounding to the dtype
        of q less where one kernel does both. For caches without scales.
    backend : str
        ``"auto"`` or a backend's name.

    Returns
    -------
    out : Tensor, dtype of q, ``[B, Hq, 1, Dv]``
    logsumexp : Tensor, float32 ``[B, Hq, 1]``
        Of the selected tokens, with a remainder too.

    Raises
    ------
    InputError
        For shapes or dtypes that do not fit.
    """
    if not 0 <= levels <= 127:
        raise InputError(f"levels is {levels}; expected 0 (bit code) to 127.")
    if not weights:
        raise InputError("weights is empty; a map needs at least one stage.")
    sizes = _check(q, k, v, signatures, weights, biases, start, end, budgets, capacity, mask, block_table)
    if not levels and weights[-1].shape[-1] != 32 * signatures.shape[-1]:
        raise InputError("a mixture is of integer codes; a bit code (levels=0) has as many bits as a signature.")
    caches, bounds, maps = (k, v, signatures), (start, end, budgets), (list(weights), list(biases))
    check_scales(k, k_scale, v_scale)
    if remainder is not None:
        check_remainder(sizes, q, *remainder)
        if (k_scale, v_scale) != (1.0, 1.0):
            raise InputError(
                f"k_scale is {k_scale} and v_scale {v_scale}; a remainder goes with 1 alone: call add_remainder."
            )
    options = scale * k_scale, softcap, mask, block_table, v_scale, *(remainder or (None, None, None)), backend
    call = (q, *caches, *maps, *bounds, capacity, levels, *options)
    if new_key is None:
        out, logsumexp = torch.ops.hashattention.decode(*call)
        return out, logsumexp
    key, key_weights, key_biases = _check_new_key(k, signatures, *new_key)
    out, logsumexp = torch.ops.hashattention.decode_step(*call, key, list(key_weights), list(key_biases))
    return out, logsumexp


def _check_new_key(
    k: Tensor, signatures: Tensor, key: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> NewKey:
    """The new key as the maps take it: one head a map."""
    shapes.expect({"Hkv": k.shape[1], "D": k.shape[3]}, "new_key", key, "B Hkv 1 D")
    if not weights:
        raise InputError("the new key's map is empty; it needs at least one stage.")
    heads, words = weights[0].shape[0], weights[-1].shape[-1] // 32
    if (heads, words) != (signatures.shape[1], signatures.shape[3]):
        given = f"{heads} heads of {words} words; the cache holds {signatures.shape[1]} of {signatures.shape[3]}"
        raise InputError(f"the new key's map makes signatures of {given}.")
    shapes.expect_multiple(heads, key.shape[1], "signature heads over KV heads")
    if heads != key.shape[1]:
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
    check_map(key, weights, biases)
    shapes.expect_same_device(new_key=key, signatures=signatures)
    return key, weights, biases


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
) -> dict[str, int]:
    """What encode, select and attend would check: a fused kernel reads memory without asking again. The sizes found."""
    check_map(group_queries(q, weights[0].shape[0]), weights, biases)
    cache = "P {} N {}" if block_table is not None else "B {} T {}"
    sizes: dict[str, int] = {}
    shapes.expect(sizes, "q", q, "B Hq 1 D", torch.float32, torch.bfloat16, torch.float16)
    shapes.expect(sizes, "k", k, cache.format("Hkv", "D"))
    shapes.expect(sizes, "v", v, cache.format("Hkv", "Dv"), k.dtype)
    shapes.expect(sizes, "signatures", signatures, cache.format("Hs", "W"), torch.int32)
    shapes.expect_multiple(weights[-1].shape[-1], 32 * sizes["W"], "entries of a code over bits of a signature")
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
    return sizes


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("the fused step did not run, its parts do: %s", reason)


def _find(name: str, call: Call, **more: Any) -> Callable[..., Any] | None:
    features: dict[str, Any] = {
        "k": call.k,
        "v": call.v,
        "signatures": call.signatures,
        "code": None,
        "weights": call.weights,
    }
    features |= {"selection_heads": call.budgets.shape[1], "levels": call.levels, "capacity": call.capacity, **more}
    features |= {"mask": call.mask, "block_table": call.block_table, "remainder": call.remainder}
    return dispatch.find_fused(name, call.q, call.backend, **features)


def _launch(fused: Callable[..., Any], call: Call, *arguments: Any) -> tuple[Tensor, Tensor] | None:
    """What the fused step gives, or None if it could not be launched and was not asked for by name."""
    # Only backends that take float8 caches know of a scale.
    options: dict[str, Any] = {} if call.v_scale == 1.0 else {"v_scale": call.v_scale}
    if call.remainder is not None:
        options["remainder"] = call.remainder
    try:
        out, logsumexp = fused(*arguments, **options)
    except BackendError as error:
        if call.backend != "auto":
            raise
        _warn_once(str(error))
        return None
    return out, logsumexp


def _step(call: Call, new_key: NewKey) -> tuple[Tensor, Tensor]:
    """The step after the new key's signature: both in one function where a backend has it."""
    key, key_weights, key_biases = new_key
    # A mixture has as many more entries at the end: backends say whether they take it.
    stages, key_stages = ([(w.shape[2], w.dtype) for w in weights] for weights in (call.weights, key_weights))
    alike = stages[:-1] == key_stages[:-1] and stages[-1][1] == key_stages[-1][1]
    fused = _find("decode_step", call, key_weights=key_weights) if alike else None
    if fused is not None:
        # Biases are added to float32 sums; adjacent maps are what the kernels read.
        maps = [[w.contiguous() for w in call.weights], [b.float().contiguous() for b in call.biases]]
        key_maps = [[w.contiguous() for w in key_weights], [b.float().contiguous() for b in key_biases]]
        rows = call.start.contiguous(), call.end.contiguous(), call.budgets.contiguous()
        rest = call.capacity, call.levels, call.scale, call.softcap
        table = None if call.block_table is None else call.block_table.contiguous()
        caches = call.k, call.v, call.signatures
        done = _launch(fused, call, call.q.contiguous(), *caches, *maps, *rows, *rest, table, (key, *key_maps))
        if done is not None:
            return done
    first = call.end - 1
    parts = "auto" if call.backend in dispatch.FUSED_ONLY else call.backend
    write_signature(key, key_weights, key_biases, call.signatures, first, block_table=call.block_table, backend=parts)
    return _decode(call)


def _decode(call: Call) -> tuple[Tensor, Tensor]:
    """The step, fused or as its parts."""
    fused = _find("decode", call)
    if fused is not None and (done := _launch(fused, call, *call[:15])) is not None:
        return done
    x = group_queries(call.q, call.weights[0].shape[0])
    if call.levels:
        code, _ = encode_query(x, call.weights, call.biases, call.levels, backend=call.backend)
    else:
        code = encode_signature(x, call.weights, call.biases, backend=call.backend)
    caches: dict[str, Any] = {"block_table": call.block_table, "backend": call.backend}
    bounds = call.start, call.end, call.budgets, call.capacity
    levels = call.levels or 127
    indices, counts = score_select(code, call.signatures, *bounds, mask=call.mask, levels=levels, **caches)
    options: dict[str, Any] = {"scale": call.scale, "softcap": call.softcap, "backend": call.backend}
    paged: dict[str, Any] = {"block_table": call.block_table, "v_scale": call.v_scale}
    out, logsumexp = attend(call.q, call.k, call.v, indices, counts, **paged, **options)
    if call.remainder is not None:
        sums, lengths, coefficients = call.remainder
        out = add_remainder(out, logsumexp, call.q, sums, counts, lengths, coefficients, **options)
    return out, logsumexp


@torch.library.custom_op("hashattention::decode", mutates_args=(), schema=SCHEMA.format("", ""))
def _decode_op(*call):  # type: ignore[no-untyped-def]
    return _decode(Call(*call))


@torch.library.custom_op(
    "hashattention::decode_step",
    mutates_args=("signatures",),
    schema=SCHEMA.format("(a!)", ", Tensor new_key, Tensor[] key_weights, Tensor[] key_biases"),
)
def _decode_step_op(*call):  # type: ignore[no-untyped-def]
    return _step(Call(*call[:-3]), call[-3:])


@_decode_op.register_fake
def _(*call):  # type: ignore[no-untyped-def]
    return _fake(Call(*call))


@_decode_step_op.register_fake
def _(*call):  # type: ignore[no-untyped-def]
    return _fake(Call(*call[:-3]))


def _fake(call: Call) -> tuple[Tensor, Tensor]:
    shape = call.q.shape[:3]
    return call.q.new_empty((*shape, call.v.shape[-1])), call.q.new_empty(shape, dtype=torch.float32)
