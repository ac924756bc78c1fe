"""logits: exact attention logits of one query a row against all cached keys."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattention.ops import dispatch, shapes


def logits(q: Tensor, k: Tensor, *, scale: float, backend: str = "auto") -> Tensor:
    """``scale * q . k`` of every query head and token, summed in float32: what exact selection ranks, and what dense
    attention's softmax takes.

    Parameters
    ----------
    q : Tensor, float ``[B, Hq, 1, D]``
    k : Tensor, float ``[B, Hkv, T, D]``, of the dtype of q
        Query head h reads KV head ``h * Hkv // Hq``.
    scale : float
    backend : str
        ``"auto"`` or a backend's name.

    Returns
    -------
    Tensor, float32 ``[B, Hq, T]``

    Raises
    ------
    InputError
        For shapes or dtypes that do not fit.

    Examples
    --------
    >>> logits(torch.ones(1, 2, 1, 4), torch.arange(8.0).view(1, 1, 2, 4), scale=0.5).tolist()
    [[[3.0, 11.0], [3.0, 11.0]]]
    """
    sizes: dict[str, int] = {}
    shapes.expect(sizes, "q", q, "B Hq 1 D", torch.float32, torch.float16, torch.bfloat16)
    shapes.expect(sizes, "k", k, "B Hkv T D", q.dtype)
    shapes.expect_multiple(sizes["Hq"], sizes["Hkv"], "query heads over KV heads")
    shapes.expect_same_device(q=q, k=k)
    out: Tensor = torch.ops.hashattention.logits(q, k, scale, backend)
    return out


@torch.library.custom_op(
    "hashattention::logits", mutates_args=(), schema="(Tensor q, Tensor k, float scale, str backend) -> Tensor"
)
def _logits(q, k, scale, backend):  # type: ignore[no-untyped-def]
    return dispatch.find("logits", q, backend, k=k)(q, k, scale)


@_logits.register_fake
def _(q, k, scale, backend):  # type: ignore[no-untyped-def]
    return q.new_empty((q.shape[0], q.shape[1], k.shape[2]), dtype=torch.float32)
