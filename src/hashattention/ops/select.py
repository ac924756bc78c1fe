"""select: sink, local and the heavy tokens of every row; score_select: the same from codes, without keeping the
scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hashattention.errors import InputError
from hashattention.ops import dispatch, shapes
from hashattention.ops.score import check_codes, tokens_of


def select(
    scores: Tensor,
    start: Tensor,
    end: Tensor,
    budgets: Tensor,
    capacity: int,
    *,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The exact index set of every row, the same bit for bit on every backend.

    Row b may attend to tokens ``start[b] <= t < end[b]`` (where ``mask[b, t]``). Taken are the first `sink` and the
    last `local` of these
    and, of the rest, the `heavy` with the highest score, ties going to the more recent token. Fewer candidates than
    asked: all.

    Parameters
    ----------
    scores : Tensor, int32 (or float) ``[B, Hsel, T]``
    start, end : Tensor, int32 ``[B]``
        First valid token and one past the last (left padding: start > 0; right padding: end < T).
    budgets : Tensor, int32 ``[B, Hsel, 3]``
        sink, local and heavy counts of each row, read on the device.
    capacity : int
        Index slots a row, fixed by the caller and not by data; where the counts exceed it local comes first, then
        sink, then heavy.
    mask : Tensor, bool ``[B, T]``, optional
        Holes inside start..end (a reused ragged prefix).
    backend : str
        ``"auto"`` or a backend's name.

    Returns
    -------
    indices : Tensor, int32 ``[B, Hsel, capacity]``
        Ascending, packed left, -1 where none.
    counts : Tensor, int32 ``[B, Hsel]``

    Raises
    ------
    InputError
        For shapes or dtypes that do not fit, or a capacity under 1.

    Examples
    --------
    >>> scores = torch.tensor([[[5, 9, 9, 1, 0]]], dtype=torch.int32)
    >>> bounds = torch.tensor([0], dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    >>> select(scores, *bounds, torch.tensor([[[1, 1, 1]]], dtype=torch.int32), 4)[0].tolist()
    [[[0, 2, 4, -1]]]
    """
    sizes: dict[str, int] = {}
    shapes.expect(sizes, "scores", scores, "B Hsel T", torch.int32, torch.float32)
    check_rows(sizes, start, end, budgets, capacity, mask)
    shapes.expect_same_device(scores=scores, start=start, end=end, budgets=budgets, mask=mask)
    indices, counts = torch.ops.hashattention.select(scores, start, end, budgets, capacity, mask, backend)
    return indices, counts


def score_select(
    code: Tensor,
    signatures: Tensor,
    start: Tensor,
    end: Tensor,
    budgets: Tensor,
    capacity: int,
    *,
    mask: Tensor | None = None,
    block_table: Tensor | None = None,
    levels: int = 127,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``select(score(code, signatures, Hsel), ...)`` in one op; Hsel is the number of heads of `budgets`.

    Parameters and results are those of `score` and `select`, and

    Parameters
    ----------
    levels : int
        Largest magnitude of an integer code's weights; a tight one lets a kernel count fewer score levels.

    Raises
    ------
    InputError
        For shapes or dtypes that do not fit.
    """
    shapes.expect({}, "budgets", budgets, "B Hsel 3", torch.int32)
    check_codes(code, signatures, budgets.shape[1], block_table)
    sizes = {"B": code.shape[0], "T": tokens_of(signatures, block_table)}
    check_rows(sizes, start, end, budgets, capacity, mask)
    shapes.expect_same_device(code=code, start=start, end=end, budgets=budgets, mask=mask)
    arguments = (code, signatures, start, end, budgets, capacity, mask, block_table, levels, backend)
    indices, counts = torch.ops.hashattention.score_select(*arguments)
    return indices, counts


def check_rows(
    sizes: dict[str, int], start: Tensor, end: Tensor, budgets: Tensor, capacity: int, mask: Tensor | None
) -> None:
    """Raise `InputError` unless bounds, budgets, mask and capacity fit `sizes`."""
    shapes.expect(sizes, "start", start, "B", torch.int32)
    shapes.expect(sizes, "end", end, "B", torch.int32)
    shapes.expect(sizes, "budgets", budgets, "B Hsel 3", torch.int32)
    if mask is not None:
        shapes.expect(sizes, "mask", mask, "B T", torch.bool)
    if capacity < 1:
        raise InputError(f"capacity is {capacity}; expected at least 1 index slot a row.")


@torch.library.custom_op(
    "hashattention::select",
    mutates_args=(),
    schema="(Tensor scores, Tensor start, Tensor end, Tensor budgets, int capacity, Tensor? mask, str backend)"
    " -> (Tensor, Tensor)",
)
def _select(scores, start, end, budgets, capacity, mask, backend):  # type: ignore[no-untyped-def]
    run = dispatch.find("select", scores, backend, capacity=capacity, mask=mask)
    return run(scores, start, end, budgets, capacity, mask)


@torch.library.custom_op(
    "hashattention::score_select",
    mutates_args=(),
    schema="(Tensor code, Tensor signatures, Tensor start, Tensor end, Tensor budgets, int capacity, Tensor? mask,"
    " Tensor? block_table, int levels, str backend) -> (Tensor, Tensor)",
)
def _score_select(code, signatures, start, end, budgets, capacity, mask, block_table, levels, backend):  # type: ignore[no-untyped-def]
    features = {"code": code, "selection_heads": budgets.shape[1], "levels": levels, "capacity": capacity}
    run = dispatch.find("score_select", signatures, backend, **features, mask=mask, block_table=block_table)
    return run(code, signatures, start, end, budgets, capacity, mask, block_table, levels)


def _fake(budgets: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    return budgets.new_empty((*budgets.shape[:2], capacity)), budgets.new_empty(budgets.shape[:2])


@_select.register_fake
def _(scores, start, end, budgets, capacity, mask, backend):  # type: ignore[no-untyped-def]
    return _fake(budgets, capacity)


@_score_select.register_fake
def _(code, signatures, start, end, budgets, capacity, mask, block_table, levels, backend):  # type: ignore[no-untyped-def]
    return _fake(budgets, capacity)
