"""score: query codes against all signatures."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattention.errors import InputError
from hashattention.ops import dispatch, shapes


def score(
    code: Tensor,
    signatures: Tensor,
    selection_heads: int,
    *,
    block_table: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Integer score of every cached token for one query a row.

    A packed bit code gives ``bits - 2 * popcount(code xor signature)`` (HashAttention, arXiv 2412.14468); an integer
    code gives
    ``sum_j code_j * (+1 or -1)``, the sign being bit j of the signature. An integer code of
    M times as many entries is a mixture of M codes: the largest of their sums counts. Scores of the code heads that
    share a selection head are summed.

    Parameters
    ----------
    code : Tensor, int32 ``[B, Hc, 1, W]`` (symmetric) or int8 ``[B, Hc, 1, 32 W M]`` (asymmetric)
    signatures : Tensor, int32 ``[B, Hs, T, W]``, or pages ``[P, Hs, N, W]`` with a block table
    selection_heads : int
        Hsel: Hc must be a multiple of it. Code head c reads signature head ``c * Hs // Hc`` and adds to selection head
        ``c * Hsel // Hc``.
    block_table : Tensor, int32 ``[B, M]``, optional
    backend : str
        ``"auto"`` or a backend's name.

    Returns
    -------
    Tensor, int32 ``[B, Hsel, T]`` (T = M * N when paged; tokens past a request's length hold no meaning)

    Raises
    ------
    InputError
        For shapes or dtypes that do not fit.

    Examples
    --------
    >>> code = torch.full((1, 1, 1, 32), 2, dtype=torch.int8)
    >>> score(code, torch.tensor([[[[-1], [0]]]], dtype=torch.int32), 1).tolist()
    [[[64, -64]]]
    """
    check_codes(code, signatures, selection_heads, block_table)
    out: Tensor = torch.ops.hashattention.score(code, signatures, selection_heads, block_table, backend)
    return out


def check_codes(code: Tensor, signatures: Tensor, selection_heads: int, block_table: Tensor | None) -> None:
    """Raise `InputError` unless codes, signatures and heads fit each other."""
    sizes: dict[str, int] = {}
    paged = block_table is not None
    shapes.expect(sizes, "signatures", signatures, "P Hs N W" if paged else "B Hs T W", torch.int32)
    integer = code.dtype == torch.int8
    shapes.expect(sizes, "code", code, "B Hc 1 32WM" if integer else "B Hc 1 W", torch.int8, torch.int32)
    if integer:
        shapes.expect_multiple(code.shape[3], 32 * sizes["W"], "entries of a code over bits of a signature")
    if block_table is not None:
        shapes.expect(sizes, "block_table", block_table, "B M", torch.int32)
    if not 1 <= sizes["W"] <= 8:
        raise InputError(f"signatures have {sizes['W']} words; expected 1 to 8 (32 to 256 bits).")
    shapes.expect_multiple(sizes["Hc"], sizes["Hs"], "code heads over signature heads")
    shapes.expect_multiple(sizes["Hc"], selection_heads, "code heads over selection heads")
    shapes.expect_same_device(code=code, signatures=signatures, block_table=block_table)


def tokens_of(cache: Tensor, block_table: Tensor | None) -> int:
    """T: tokens a row of a dense or paged cache spans."""
    return cache.shape[2] if block_table is None else block_table.shape[1] * cache.shape[2]


@torch.library.custom_op(
    "hashattention::score",
    mutates_args=(),
    schema="(Tensor code, Tensor signatures, int selection_heads, Tensor? block_table, str backend) -> Tensor",
)
def _score(code, signatures, selection_heads, block_table, backend):  # type: ignore[no-untyped-def]
    run = dispatch.find("score", signatures, backend, code=code, block_table=block_table)
    return run(code, signatures, selection_heads, block_table)


@_score.register_fake
def _(code, signatures, selection_heads, block_table, backend):  # type: ignore[no-untyped-def]
    return code.new_empty((code.shape[0], selection_heads, tokens_of(signatures, block_table)), dtype=torch.int32)
