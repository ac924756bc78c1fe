"""encode: keys to packed signatures (returned, or written into their cache), queries to bit or integer codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hashattention.errors import InputError
from hashattention.ops import dispatch, reference, shapes


def encode_signature(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, backend: str = "auto"
) -> Tensor:
    """Packed sign bits of an MLP per head: phi_k, or phi_q of a symmetric map (HashAttention, arXiv 2412.14468,
    section 4).

    Parameters
    ----------
    x : Tensor, float ``[B, H, T, in]``
        Keys or queries, after RoPE.
    weights, biases : sequences of Tensor, float ``[H, in, out]`` and ``[H, out]``
        One pair a stage, SiLU between stages; the last `out` is the number of bits, a multiple of 32.
    backend : str
        ``"auto"`` or a backend's name.

    Returns
    -------
    Tensor, int32 ``[B, H, T, bits / 32]``
        Bit j of word w is ``logit[32 w + j] > 0``.

    Raises
    ------
    InputError
        For shapes that do not fit.

    Examples
    --------
    >>> x, weight, bias = torch.ones(1, 1, 1, 4), torch.ones(1, 4, 32), torch.zeros(1, 32)
    >>> encode_signature(x, [weight], [bias]).tolist()
    [[[[-1]]]]
    """
    check_map(x, weights, biases)
    out: Tensor = torch.ops.hashattention.encode_signature(x, list(weights), list(biases), backend)
    return out


def encode_query(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], levels: int = 7, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Integer query codes: the map's logits scaled so that the largest of a row is `levels`, then rounded to even.

    Parameters
    ----------
    x, weights, biases
        As in `encode_signature`.
    levels : int
        Largest magnitude, 1 to 127.

    Returns
    -------
    code : Tensor, int8 ``[B, H, T, bits]``
    scale : Tensor, float32 ``[B, H, T]``
        ``logit ~ code * scale``. One scale a row, so it does not change the row's ranking.

    Raises
    ------
    InputError
        For shapes that do not fit or `levels` out of range.
    """
    check_map(x, weights, biases)
    if not 1 <= levels <= 127:
        raise InputError(f"levels is {levels}; expected 1 to 127, the range of int8 query weights.")
    code, scale = torch.ops.hashattention.encode_query(x, list(weights), list(biases), levels, backend)
    return code, scale


def write_signature(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    signatures: Tensor,
    first: Tensor,
    *,
    block_table: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Encode keys straight into a signature cache, in place: token t of request b goes to position ``first[b] + t``.

    Parameters
    ----------
    x, weights, biases
        As in `encode_signature`; x is ``[B, H, T, in]``.
    signatures : Tensor, int32 ``[B, H, N, W]``, or pages ``[P, H, N, W]`` with a block table
        Written in place; positions outside it are dropped.
    first : Tensor, int32 ``[B]``
        Read on the device.
    block_table : Tensor, int32 ``[B, M]``, optional
    backend : str
        ``"auto"`` or a backend's name.

    Raises
    ------
    InputError
        For shapes that do not fit.

    Examples
    --------
    >>> cache, first = torch.zeros(1, 1, 3, 1, dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    >>> write_signature(torch.ones(1, 1, 1, 4), [torch.ones(1, 4, 32)], [torch.zeros(1, 32)], cache, first)
    >>> cache.flatten().tolist()
    [0, -1, 0]
    """
    check_map(x, weights, biases)
    sizes = {"B": x.shape[0], "H": x.shape[1], "W": weights[-1].shape[-1] // 32}
    shapes.expect(sizes, "signatures", signatures, "B H N W" if block_table is None else "P H N W", torch.int32)
    shapes.expect(sizes, "first", first, "B", torch.int32)
    if block_table is not None:
        shapes.expect(sizes, "block_table", block_table, "B M", torch.int32)
    shapes.expect_same_device(x=x, signatures=signatures, first=first, block_table=block_table)
    maps = list(weights), list(biases)
    torch.ops.hashattention.write_signature(x, *maps, signatures, first, block_table, backend)


def check_map(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    """Raise `InputError` unless `x`, weights and biases fit each other."""
    if not weights or len(weights) != len(biases):
        raise InputError(
            f"a map needs as many weights as biases, at least one; given {len(weights)} and {len(biases)}."
        )
    sizes: dict[str, int] = {}
    shapes.expect(sizes, "x", x, "B H T in")
    for stage, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        shapes.expect(sizes, f"weights[{stage}]", weight, f"H {'in' if stage == 0 else f'w{stage}'} w{stage + 1}")
        shapes.expect(sizes, f"biases[{stage}]", bias, f"H w{stage + 1}")
    bits = weights[-1].shape[-1]
    if bits % 32 or not 32 <= bits <= 256:
        raise InputError(f"the last stage gives {bits} bits; expected a multiple of 32 from 32 to 256.")
    shapes.expect_same_device(x=x, weights=weights[0], biases=biases[0])


@torch.library.custom_op(
    "hashattention::encode_signature",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor[] biases, str backend) -> Tensor",
)
def _encode_signature(x, weights, biases, backend):  # type: ignore[no-untyped-def]
    return dispatch.find("encode_signature", x, backend, weights=weights)(x, weights, biases)


@_encode_signature.register_fake
def _(x, weights, biases, backend):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:3], weights[-1].shape[-1] // 32), dtype=torch.int32)


@torch.library.custom_op(
    "hashattention::encode_query",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor[] biases, int levels, str backend) -> (Tensor, Tensor)",
)
def _encode_query(x, weights, biases, levels, backend):  # type: ignore[no-untyped-def]
    return dispatch.find("encode_query", x, backend, weights=weights)(x, weights, biases, levels)


@_encode_query.register_fake
def _(x, weights, biases, levels, backend):  # type: ignore[no-untyped-def]
    code = x.new_empty((*x.shape[:3], weights[-1].shape[-1]), dtype=torch.int8)
    return code, x.new_empty(x.shape[:3], dtype=torch.float32)


@torch.library.custom_op(
    "hashattention::write_signature",
    mutates_args=("signatures",),
    schema="(Tensor x, Tensor[] weights, Tensor[] biases, Tensor(a!) signatures, Tensor first, Tensor? block_table,"
    " str backend) -> ()",
)
def _write_signature(x, weights, biases, signatures, first, block_table, backend):  # type: ignore[no-untyped-def]
    fused = dispatch.find_fused("write_signature", x, backend, weights=weights)
    if fused is not None:
        fused(x, weights, biases, signatures, first, block_table)
        return
    new = encode_signature(x, weights, biases, backend=backend)
    reference.write_tokens(signatures, new, first, block_table)


@_write_signature.register_fake
def _(x, weights, biases, signatures, first, block_table, backend):  # type: ignore[no-untyped-def]
    return None
