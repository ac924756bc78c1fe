"""add_remainder: the mean value stands for the tokens that were not selected."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattention.ops import dispatch, shapes


def add_remainder(
    out: Tensor,
    logsumexp: Tensor,
    q: Tensor,
    sums: Tensor,
    taken: Tensor,
    lengths: Tensor,
    coefficients: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention over selected tokens, with the mean value of all tokens for those left out.

    The output is ``(1 - p) out + p v`` with v the mean value and p the estimated share of the attention that was left
    out. The idea is SparQ's (arXiv 2312.04985), which takes p from approximate scores of all tokens; here it follows
    from three learned numbers a query head. With mu the logit of the mean key, m the logarithm of the mean weight of
    the tokens taken, t of n tokens: ``p = sigmoid(log((n - t) / t) + min(0, a + b (mu - m) + c log(t / n)))``. So a
    token left out never counts more than the mean one taken, and where all are taken nothing changes.

    Parameters
    ----------
    out, logsumexp : Tensor
        What `attend` gives: ``[B, Hq, 1, Dv]`` and float32 ``[B, Hq, 1]``.
    q : Tensor, float ``[B, Hq, 1, D]``
    sums : Tensor, float32 ``[B, Hkv, D + Dv + 1]``
        Summed keys, summed values, and how many tokens were summed (0: nothing changes).
    taken : Tensor, int32 ``[B, Hsel]``
        Tokens that were attended to (0: nothing changes).
    lengths : Tensor, int32 ``[B]``
        Tokens there are (valid ones: none that padding or a mask hides).
    coefficients : Tensor, float32 ``[Hq, 3]``
        a, b and c of every query head.
    scale, softcap : float
        As in `attend`.
    backend : str
        ``"auto"`` or a backend's name.

    Returns
    -------
    Tensor, dtype of out, ``[B, Hq, 1, Dv]``

    Raises
    ------
    InputError
        For shapes or dtypes that do not fit.

    Examples
    --------
    >>> out, query = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    >>> sums = torch.tensor([[[0.0, 8.0, 4.0]]])  # four tokens with a mean value of 2
    >>> counts = torch.tensor([[1]], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    >>> add_remainder(out, torch.zeros(1, 1, 1), query, sums, *counts, torch.zeros(1, 3), scale=1.0).item()
    1.5
    """
    sizes: dict[str, int] = {}
    shapes.expect(sizes, "q", q, "B Hq 1 D", torch.float32, torch.bfloat16, torch.float16)
    shapes.expect(sizes, "out", out, "B Hq 1 Dv", q.dtype)
    shapes.expect(sizes, "logsumexp", logsumexp, "B Hq 1", torch.float32)
    check_remainder(sizes, q, sums, lengths, coefficients)
    shapes.expect(sizes, "taken", taken, "B Hsel", torch.int32)
    shapes.expect_multiple(sizes["Hq"], sizes["Hsel"], "query heads over selection heads")
    shapes.expect_same_device(q=q, out=out, logsumexp=logsumexp, taken=taken)
    arguments = out, logsumexp, q, sums, taken, lengths, coefficients, scale, softcap
    mixed: Tensor = torch.ops.hashattention.add_remainder(*arguments, backend)
    return mixed


def check_remainder(sizes: dict[str, int], q: Tensor, sums: Tensor, lengths: Tensor, coefficients: Tensor) -> None:
    """Check a remainder beside queries ``[B, Hq, 1, D]`` and values of ``sizes["Dv"]`` entries."""
    sizes["D+Dv+1"] = sizes["D"] + sizes["Dv"] + 1
    shapes.expect(sizes, "sums", sums, "B Hkv D+Dv+1", torch.float32)
    shapes.expect(sizes, "lengths", lengths, "B", torch.int32)
    shapes.expect(sizes, "coefficients", coefficients, "Hq 3", torch.float32)
    shapes.expect_multiple(sizes["Hq"], sizes["Hkv"], "query heads over KV heads")
    shapes.expect_same_device(q=q, sums=sums, lengths=lengths, coefficients=coefficients)


@torch.library.custom_op(
    "hashattention::add_remainder",
    mutates_args=(),
    schema=(
        "(Tensor out, Tensor logsumexp, Tensor q, Tensor sums, Tensor taken, Tensor lengths, Tensor coefficients,"
        " float scale, float softcap, str backend) -> Tensor"
    ),
)
def _add_remainder(out, logsumexp, q, sums, taken, lengths, coefficients, scale, softcap, backend):  # type: ignore[no-untyped-def]
    found = dispatch.find("add_remainder", q, backend)
    return found(out, logsumexp, q, sums, taken, lengths, coefficients, scale, softcap)


@_add_remainder.register_fake
def _(out, logsumexp, q, sums, taken, lengths, coefficients, scale, softcap, backend):  # type: ignore[no-untyped-def]
    return torch.empty_like(out, memory_format=torch.contiguous_format)
