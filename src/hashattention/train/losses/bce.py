"""The paper's loss: weighted binary cross-entropy on the heaviest tokens."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def bce(scores: Tensor, labels: Tensor, heavy: Tensor, label_weight: float) -> Tensor:
    """Weighted binary cross-entropy of ``sigmoid(scores)`` against `labels` (0 or 1), per head: ``[..., Hsel]``.

    HashAttention, arXiv 2412.14468, section 4; `label_weight` is its ``alpha + beta * context``.
    """
    weight = scores.new_tensor(label_weight)
    each = functional.binary_cross_entropy_with_logits(scores, labels, pos_weight=weight, reduction="none")
    return (each * heavy).sum((-2, -1)) / heavy.sum((-2, -1)).clamp(min=1)
