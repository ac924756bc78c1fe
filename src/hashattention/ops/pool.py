"""pool: one score per token and KV head from the logits of its group's heads."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from hashattention.errors import InputError
from hashattention.ops import dispatch, shapes

Peaks = Literal["peak_max", "peak_sum", "logits"]


def pool(logits: Tensor, start: Tensor, end: Tensor, how: Peaks, *, backend: str = "auto") -> Tensor:
    """Scores that a shared selection ranks; tokens outside ``start[b] <= t < end[b]`` count for nothing.

    ``"peak_max"`` and ``"peak_sum"`` divide each head's attention weights by their largest, so that no head is
    outvoted, and take the logarithm of the maximum or of the sum over the group; ``"logits"`` is the mean logit.

    Parameters
    ----------
    logits : Tensor, float32 ``[B, Hkv, G, T]``
    start, end : Tensor, int32 ``[B]``
    how : str
    backend : str
        ``"auto"`` or a backend's name.

    Returns
    -------
    Tensor, float32 ``[B, Hkv, T]``
        -inf outside the bounds.

    Raises
    ------
    InputError
        For shapes, dtypes or a `how` that do not fit.

    Examples
    --------
    >>> bounds = torch.tensor([0], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    >>> pool(torch.tensor([[[[9.0, 3.0, 8.0], [0.0, 1.0, 0.0]]]]), *bounds, "peak_max").tolist()
    [[[0.0, 0.0, -1.0]]]
    """
    sizes: dict[str, int] = {}
    shapes.expect(sizes, "logits", logits, "B Hkv G T", torch.float32)
    shapes.expect(sizes, "start", start, "B", torch.int32)
    shapes.expect(sizes, "end", end, "B", torch.int32)
    shapes.expect_same_device(logits=logits, start=start, end=end)
    if how not in get_args(Peaks):
        raise InputError(f"how must be one of {', '.join(get_args(Peaks))}; given {how!r}.")
    out: Tensor = torch.ops.hashattention.pool(logits, start, end, how, backend)
    return out


@torch.library.custom_op(
    "hashattention::pool",
    mutates_args=(),
    schema="(Tensor logits, Tensor start, Tensor end, str how, str backend) -> Tensor",
)
def _pool(logits, start, end, how, backend):  # type: ignore[no-untyped-def]
    return dispatch.find("pool", logits, backend)(logits, start, end, how)


@_pool.register_fake
def _(logits, start, end, how, backend):  # type: ignore[no-untyped-def]
    return logits.new_empty((*logits.shape[:2], logits.shape[3]))
