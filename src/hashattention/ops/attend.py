"""attend: attention over selected tokens only."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattention.errors import InputError
from hashattention.ops import dispatch, shapes

#: Types of a quantised K and V cache.
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    block_table: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one query a head over its row's selected tokens; softmax in float32.

    Parameters
    ----------
    q : Tensor, float ``[B, Hq, 1, D]``
    k, v : Tensor, float ``[B, Hkv, T, D]`` and ``[B, Hkv, T, Dv]``, or pages ``[P, Hkv, N, D]`` with a block table
    indices : Tensor, int32 ``[B, Hsel, K]``
        Token positions, packed left; Hsel is Hkv (shared by the group) or Hq.
    counts : Tensor, int32 ``[B, Hsel]``
        Slots used; the others are never read.
    scale : float
        Multiplies the logits, usually ``D ** -0.5``.
    softcap : float
        0 for none, else logits become ``softcap * tanh(logits / softcap)``.
    block_table : Tensor, int32 ``[B, M]``, optional
    k_scale, v_scale : float
        What a float8 (e4m3 or e5m2) cache is to be multiplied by, one number a tensor.
    backend : str
        ``"auto"`` or a backend's name.

    Returns
    -------
    out : Tensor, dtype of q, ``[B, Hq, 1, Dv]``
    logsumexp : Tensor, float32 ``[B, Hq, 1]``
        Natural logarithm; parts over disjoint index sets merge by it. A row with count 0 gives out 0, logsumexp -inf.

    Raises
    ------
    InputError
        For shapes or dtypes that do not fit.

    Examples
    --------
    >>> q, k, v = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 3, 2), torch.arange(6.0).view(1, 1, 3, 2)
    >>> rows = torch.tensor([[[0, 2]]], dtype=torch.int32), torch.tensor([[2]], dtype=torch.int32)
    >>> attend(q, k, v, *rows, scale=1.0)[0].tolist()
    [[[[2.0, 3.0]]]]
    """
    sizes: dict[str, int] = {}
    paged = block_table is not None
    shapes.expect(sizes, "q", q, "B Hq 1 D", torch.float32, torch.bfloat16, torch.float16)
    shapes.expect(sizes, "k", k, "P Hkv N D" if paged else "B Hkv T D")
    shapes.expect(sizes, "v", v, "P Hkv N Dv" if paged else "B Hkv T Dv", k.dtype)
    shapes.expect(sizes, "indices", indices, "B Hsel K", torch.int32)
    shapes.expect(sizes, "counts", counts, "B Hsel", torch.int32)
    if block_table is not None:
        shapes.expect(sizes, "block_table", block_table, "B M", torch.int32)
    shapes.expect_multiple(sizes["Hq"], sizes["Hsel"], "query heads over selection heads")
    shapes.expect_multiple(sizes["Hsel"], sizes["Hkv"], "selection heads over KV heads")
    shapes.expect_same_device(q=q, k=k, v=v, indices=indices, counts=counts, block_table=block_table)
    check_scales(k, k_scale, v_scale)
    arguments = (q, k, v, indices, counts, scale * k_scale, softcap, block_table, v_scale, backend)
    out, logsumexp = torch.ops.hashattention.attend(*arguments)
    return out, logsumexp


def check_scales(k: Tensor, k_scale: float, v_scale: float) -> None:
    """Raise `InputError` for scales of a cache that is not quantised."""
    if k.dtype not in FLOAT8 and (k_scale, v_scale) != (1.0, 1.0):
        raise InputError(
            f"k_scale {k_scale} and v_scale {v_scale} are for float8 caches; k is {k.dtype}: leave them out."
        )


@torch.library.custom_op(
    "hashattention::attend",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, float scale, float softcap,"
    " Tensor? block_table, float v_scale, str backend) -> (Tensor, Tensor)",
)
def _attend(q, k, v, indices, counts, scale, softcap, block_table, v_scale, backend):  # type: ignore[no-untyped-def]
    run = dispatch.find("attend", q, backend, k=k, v=v, indices=indices, block_table=block_table)
    # Only backends that take float8 caches know of a scale.
    scales = {} if v_scale == 1.0 else {"v_scale": v_scale}
    return run(q, k, v, indices, counts, scale, softcap, block_table, **scales)


@_attend.register_fake
def _(q, k, v, indices, counts, scale, softcap, block_table, v_scale, backend):  # type: ignore[no-untyped-def]
    return q.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty(q.shape[:3], dtype=torch.float32)
