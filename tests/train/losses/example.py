"""Three queries over 16 tokens, with and without many candidates, and random scores."""

from __future__ import annotations

import torch

from hashattention.train import labels
from hashattention.train.labels import Teacher


def example(seed: int = 1):
    torch.manual_seed(seed)
    positions = torch.tensor([6, 12, 15])
    heavy = labels.heavy_candidates(positions, torch.arange(16), 2, 3)
    logits = torch.randn(2, 1, 3, 16) * 3
    logits = logits.masked_fill(torch.arange(16) > positions[:, None], -torch.inf)
    return Teacher(logits, heavy), torch.randn(2, 1, 3, 16)
